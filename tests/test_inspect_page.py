"""`lowered-attn inspect`: the page, the text, what it refuses, and what the wheel ships."""

from __future__ import annotations

import ast
import functools
import re
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes.decisions import Decision
from inductor_passes.gpu_facts import GPUS, peak
from inductor_passes.resources import Resources
from lowered_attn import cli
from lowered_attn.inspect import page, text
from lowered_attn.inspect.capture import Inspection, Kernel
from lowered_attn.inspect.lines import changes, source_lines
from tests.hopper import chosen
from tools.cases import CASES
from tools.inspect import inspect_case

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
    import torch
    from torch import nn
    from lowered_attn import Attention, CausalMetaData, make_full_self_block, make_sliding_self_block
    from lowered_attn import set_fetch_fn_for_attn_metadata

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(make_sliding_self_block(64, 2, 32), make_full_self_block(64, 2))

        def forward(self, x):
            return self.layers(x)

    trained, served = Two(), Two().eval()
    converted = Two().eval().to(torch.bfloat16).requires_grad_(False)

    def example_inputs():
        return torch.randn(2, 128, 64)

    def half_inputs():
        return example_inputs().to(torch.bfloat16)

    def gated(q, k, v, gate):
        out = torch.ops.lowered_attn.sliding_self(q, k, v, 64)[0]
        return (out * torch.sigmoid(gate)).transpose(1, 2).flatten(2)

    def causal(q, k, v, gate):
        return torch.ops.lowered_attn.full_self(q, k, v)[0] * gate

    def gated_inputs():
        def draw(heads):
            return torch.randn(2, 256, heads, 64, dtype=torch.bfloat16).transpose(1, 2)

        return {"q": draw(8), "k": draw(2), "v": draw(2), "gate": draw(8)}

    def broken_graph(q, k, v, gate):
        first = gated(q, k, v, gate)
        torch._dynamo.graph_break()
        return first + gated(q, k, v, gate)

    def plain(x):
        return x * 2

    def raising(x):
        raise KeyError("no <b>such</b> thing")

    def reading():
        return torch.ones(3)[: int(torch.randn(3).sum().item())]

    def no_tensor():
        return 1

    attention = Attention(num_heads=8, head_dim=64, scale=None, num_kv_heads=2)
    attention.k_cache = torch.zeros(32, 16, 2, 64)
    attention.v_cache = torch.zeros(32, 16, 2, 64)
    step = CausalMetaData(
        cu_seqlens_q=torch.tensor([0, 3, 4], dtype=torch.int32),
        context_lens=torch.tensor([0, 5], dtype=torch.int32),
        page_tables=torch.tensor([[4], [9]], dtype=torch.int32),
        slot_mapping=torch.tensor([64, 65, 66, 149]),
        page_size=16,
    )
    set_fetch_fn_for_attn_metadata(lambda: step)

    def step_inputs():
        return torch.randn(4, 512), torch.randn(4, 128), torch.randn(4, 128)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with `users_model.py` in it, imported afresh."""
    from lowered_attn import metadata

    (tmp_path / "users_model.py").write_text(textwrap.dedent(MODEL))
    (tmp_path / "bare.py").write_text("def call(x):\n    return x\n")
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    hook = {name: value for name, value in vars(metadata).items() if name.startswith("_fetch")}
    yield tmp_path
    vars(metadata).update(hook)
    for name in ("users_model", "bare", "needy"):
        sys.modules.pop(name, None)


class Structure(HTMLParser):
    """Elements that are open, ids, links and what would be loaded."""

    VOID = ("meta", "br", "link", "img", "input", "path", "rect", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def run(*arguments: str) -> int:
    return cli.main(["inspect", *arguments])


@functools.cache
def training(arch: str = "sm_90") -> Inspection:
    return inspect_case(CASES["train_causal_small"], arch)


def test_the_page_of_a_gated_function_shows_everything(here: Path) -> None:
    assert run("users_model:gated", "--arch", "sm_90", "--inputs", "gated_inputs") == cli.OK
    html = (here / "inspect.html").read_text()
    assert "1 attention call lowered, 0 left alone, 0 graph breaks; other ops fused into 1" in html
    fused = re.findall(r'<span class="fused">(.*?)</span>', html)
    assert any("tl.sigmoid(" in line for line in fused) and any("tl.store(" in line for line in fused)
    assert re.search(r'class="removed matched">.*?lowered_attn\.sliding_self\.default', html)
    assert re.search(r'class="added matched">.*?lowered_attn\.grouped_attention\.default', html)
    assert "14 full: no predicate" in html and "28 partial" in html and "86 empty: skipped" in html
    # 8 heads; a query sees min(i + 1, 64) keys; two products of 64.
    assert text.amount(2 * 2 * 8 * (64 * 65 // 2 + 192 * 64) * 128, "FLOP") in html
    assert ".target sm_90a" in html and "wgmma" in html and "<summary>PTX, " in html


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    html = page.render(training())
    found = Structure(html)
    assert "http" not in re.sub(r"<meta http-equiv", "", html.split("<main>")[0])
    tags = {tag for tag, _ in found.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"@import|url\(|\bon\w+=", html.split("</style>")[0])
    links = [value for _, attributes in found.attributes for name in ("href", "src") if (value := attributes.get(name))]
    ids = {attributes["id"] for _, attributes in found.attributes if attributes.get("id")}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    # A phone's width, both colour schemes, and a keyboard that reaches what scrolls.
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html and "default-src 'none'" in html
    scrolling = [a for _, a in found.attributes if a.get("class") == "scroll"]
    assert scrolling and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)


def test_a_training_case_shows_its_backward_kernels() -> None:
    found = training()
    assert found.trains and {call.phase for call in found.calls} == {"forward", "backward"}
    forward, backward = found.calls
    assert backward.flops * 2 == forward.flops * 5 and forward.bound == backward.bound == "exact"
    kernels = {kernel.name: kernel for kernel in found.kernels}
    assert {"delta_kernel", "query_gradient_kernel", "key_value_gradient_kernel"} <= set(kernels)
    assert all(kernel.resources.registers > 0 for kernel in found.kernels)
    assert found.outside["torch.ops.lowered_attn.attention_backward.default"] == 1
    html = page.render(found)
    assert "Compiled forward and backward" in html and "query_gradient_kernel" in html


def test_the_hopper_kernel_is_shown_where_it_is_allowed(here: Path) -> None:
    arguments = ("users_model:causal", "--inputs", "gated_inputs")
    with chosen("gluon"):
        assert run(*arguments) == run(*arguments, "--library-kernels", "--output", "allowed.html") == cli.OK
    own, allowed = ((here / name).read_text() for name in ("inspect.html", "allowed.html"))
    assert "dense_attention_kernel" in allowed and "An op launches this kernel itself" in allowed
    assert "the Hopper kernel, called as an op" in allowed and "into the store of the output: mul" in own
    assert "dense_attention_kernel" not in own and "not the Hopper kernel: library_kernels: expected True" in own


def test_modules_train_unless_they_are_in_eval_mode(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("users_model:served", "--text") == cli.OK
    printed = capsys.readouterr().out
    assert "2 attention calls lowered" in printed and "Compiled: forward only" in printed
    assert "full_self (node" in printed and "sliding_self (node" in printed and "extern_kernels.mm" in printed
    assert not (here / "inspect.html").exists()


@pytest.mark.slow
def test_a_class_without_arguments_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("users_model:Two", "--text") == cli.OK
    assert "forward and backward" in capsys.readouterr().out


def test_a_serving_step_is_text_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["users_model:attention", "--inputs", "users_model:step_inputs", "--no-grad", "--text", "--ptx"]
    assert run(*command, "--output", "page.html") == cli.OK
    printed = capsys.readouterr().out
    assert "paged Triton template" in printed and "store_kv_cache" in printed
    assert "page tables hold up to 16 tokens a request" in printed
    assert "one request, as an example: 40 tokens cached and 8 new ones" in printed and ".target sm_90a" in printed
    assert Structure((here / "page.html").read_text())


def test_modules_change_their_dtype_when_they_are_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("users_model:converted", "--inputs", "half_inputs", "--text") == cli.OK
    assert "torch.bfloat16" in capsys.readouterr().out


def test_what_follows_a_graph_break_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("users_model:broken_graph", "--inputs", "gated_inputs", "--text") == cli.OK
    printed = capsys.readouterr().out
    assert "2 attention calls lowered" in printed and ", 1 graph break;" in printed
    assert "graph break (1x): " in printed and "Your graph 2 of 2" in printed


def test_nothing_recognised_is_a_page_and_an_exit_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("users_model:plain", "--output", "nothing.html") == cli.NOTHING
    html = (here / "nothing.html").read_text()
    assert "Nothing was recognised" in html and Structure(html)
    assert "Nothing was recognised" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:x"], "nowhere: expected a module in .* or installed, got none"),
        (["needy:x"], "import needy: .*ModuleNotFoundError: No module named 'a_package_that_nobody_has' .*needy.py:1"),
        (["users_model"], "'users_model': expected module:callable"),
        (["users_model:nothing"], "expected nothing in users_model, got no such name; it has .*gated"),
        (["users_model:step"], "users_model:step: expected a callable, got CausalMetaData"),
        (["bare:call"], "bare.example_inputs: expected a function .*got none; .*--inputs"),
        (["users_model:plain", "--inputs", "no_tensor"], r"no_tensor\(\): expected at least one tensor"),
        (["users_model:plain", "--inputs", "reading"], r"reading\(\): .*DataDependent.*tensors have no data"),
        (["users_model:raising"], "compiling users_model:raising: .*no <b>such</b> thing"),
        (["users_model:gated"], r"compiling users_model:gated: .*"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == cli.FAILED
    assert re.search(f"lowered-attn inspect: .*{message}", capsys.readouterr().err)
    assert not (here / "inspect.html").exists()


def test_architectures_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("users_model:plain", "--arch", "sm_70")
    assert stopped.value.code == cli.USAGE
    printed = capsys.readouterr().err
    assert all(arch in printed for arch in GPUS)
    assert all(peak(arch).flops(torch.bfloat16) > peak(arch).flops(torch.float32) for arch in GPUS)
    with pytest.raises(ValueError, match="arch: expected one of"):
        peak("sm_70")


def test_a_machine_without_triton_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run("users_model:plain") == cli.FAILED
    assert "triton: expected it installed" in capsys.readouterr().err


def test_everything_is_escaped() -> None:
    bad = "<script>alert('x')</script>&\""
    ptx = Resources(bad, "sm_90", bad, 32, 4, 8, 0, 0, 0, (bad,), bad)
    source = f"def triton_poi_x():\n    '''{bad}'''\n"
    found = Inspection(
        bad, "sm_90", bad, bad, False, False, (Decision("refused", bad, bad, bad, {"module": bad}),), (bad,),
        ((bad, bad, f"{bad}\n{bad}"),), {bad: 1}, (), (Kernel(bad, source, "forward", ptx, "", (bad,)),), {bad: 1},
    )  # fmt: skip
    html = page.render(found)
    Structure(html)
    assert "<script" not in html and "alert(&#x27;x&#x27;)" in html


def test_lines_know_what_changed_and_what_was_fused() -> None:
    before = "graph():\n    %a : [num_users=1] = one\n    %b : [num_users=1] = two\n    return b"
    after = before.replace("two", "three").replace("%a : [num_users=1]", "%a : [num_users=2]")
    shown = [(line.kind, line.matched) for line in changes(before, after, ["b"])]
    # How many users a node has is no change.
    assert shown == [("", False), ("", False), ("removed", True), ("added", True), ("", False)]
    kernel = "def triton_tem_a():\n    y = 1\n    tmp0 = y\n    tl.store(p, tmp0)\n"
    source = f"import x\n\n{kernel}\ndef helper():\n    tmp1 = 2\n"
    parts = source_lines(source, True)
    assert [line.text.strip() for line in parts.fused] == ["tmp0 = y", "tl.store(p, tmp0)"]
    assert [line.text for line in parts.head] == ["import x"] and "helper" in parts.helpers[0].text
    assert source_lines(source, False).fused == []


def test_the_wheel_ships_the_command() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nlowered-attn = "lowered_attn.cli:main"\n' in settings
    (patterns,) = re.findall(r"^include = (\[.*\])$", settings, re.MULTILINE)
    setuptools = pytest.importorskip("setuptools", reason="it says which packages a wheel has")
    packages = setuptools.find_packages(ROOT, include=ast.literal_eval(patterns))
    assert {"lowered_attn", "lowered_attn.inspect", "inductor_passes", "custom_ops"} <= set(packages)
    # tools is not in the wheel: nothing that is may import it.
    folders = (ROOT / name for name in packages if "." not in name)
    shipped = [path for folder in folders for path in folder.rglob("*.py")]
    assert not [path for path in shipped if re.search(r"^\s*(from|import) tools\b", path.read_text(), re.MULTILINE)]
