"""AOTInductor packages of exported programs: they compute what eager code does, in a process that compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.virtualized import V
from torch.nn.functional import scaled_dot_product_attention

from custom_ops.forms import FORMS
from inductor_passes import compat
from inductor_passes.decisions import recording
from inductor_passes.package import SpellOut
from lowered_attn import (
    Attention,
    AttnMetaDataBase,
    BlockDiffusionMetaData,
    CausalMetaData,
    LatentAttention,
    aoti_compile_and_package,
    make_full_self_block,
    make_sliding_self_block,
    set_fetch_fn_for_attn_metadata,
)
from tests.helpers import Call, Case, Results, assert_as_exact_as_the_reference, make

OPS = torch.ops.lowered_attn
AUTO = torch.export.Dim.AUTO
ROOT = Path(__file__).resolve().parent.parent

# Loading a package asks the C++ compiler what the CPU can do; from then on there is none.
LOAD_AND_RUN = """
import os, sys
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
{imports}

def cached():
    return sorted(name for *_, names in os.walk(os.environ["TORCHINDUCTOR_CACHE_DIR"]) for name in names)

package, calls, results = sys.argv[1:]
arguments = torch.load(calls, weights_only=False)
run = torch._inductor.aoti_load_package(package)
config.cpp.cxx = ("/bin/false",)
before = cached()
with torch.no_grad():
    torch.save([run(*a) for a in arguments], results)
assert cached() == before
assert not counters["frames"] and not counters["inductor"] and not counters["aot_autograd"], counters
"""


def in_a_fresh_process(
    package: Any, calls: list[tuple[Any, ...]], tmp_path: Path, imports: str = "import lowered_attn"
) -> list[Any]:
    """What each call returns from the package."""
    files = [str(tmp_path / name) for name in ("calls.pt", "results.pt")]
    torch.save(calls, files[0])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN.replace("{imports}", imports), str(package), *files],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(files[1], weights_only=False)


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    set_fetch_fn_for_attn_metadata(None)


def export(model: nn.Module, inputs: tuple[Any, ...], sizes: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=sizes)


# ---------------------------------------------------------------------- forms


class EveryForm(nn.Module):
    """Each form's op once; a call's tensors are in a dict, its numbers are the example's."""

    def __init__(self, examples: list[Call]) -> None:
        super().__init__()
        self.examples = examples

    def forward(self, *tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for example, given in zip(self.examples, tensors, strict=True):
            operands = [given.get(name, value) for name, value in example.operands.items()]
            found.append(example.form.op(given["q"], given["k"], given["v"], *operands, **example.keywords))
        return found


def form_calls(batch: int, length: int, device: str = "cpu", **sizes: Any) -> list[Call]:
    settings: dict[str, dict[str, Any]] = {
        "full_self": {}, "sliding_self": {"padding": "some", "q_start": True}, "bidirectional": {"softcap": 0.7},
        "segment_cross": {"scale": 0.3},
    }  # fmt: skip
    named = [(name, settings.get(name, {})) for name in FORMS]
    named.append(("full_self", {"padding": "some", "softcap": 2.0}))
    sizes = {"lengths": (length, length), "batch": batch, **sizes}
    return [make(Case(name, **more, **sizes), device) for name, more in named]


def tensors_of(call: Call) -> dict[str, Tensor]:
    operands = {name: value for name, value in call.operands.items() if isinstance(value, Tensor)}
    return {**dict(zip("qkv", call.qkv, strict=True)), **operands}


def sizes_of(inputs: tuple[dict[str, Tensor], ...]) -> Any:
    """Batches and lengths are free."""
    return tuple(
        {n: {0: AUTO, **({2: AUTO} if n in "qkv" else {1: AUTO} if t.dim() == 2 else {})} for n, t in given.items()}
        for given in inputs
    )


@pytest.mark.slow
def test_every_form_at_every_size(tmp_path: Path) -> None:
    examples = form_calls(2, 33)
    inputs = tuple(tensors_of(call) for call in examples)
    program = export(EveryForm(examples), inputs, (sizes_of(inputs),))
    with recording() as log:
        package = aoti_compile_and_package(program, package_path=tmp_path / "forms.pt2")
    assert package == str(tmp_path / "forms.pt2")
    assert [d.op for d in log.records if d.stage == "grouped"] == [call.form.name for call in examples]

    calls = [form_calls(*size) for size in ((2, 33), (3, 70), (2, 5))]
    results = in_a_fresh_process(package, [tuple(tensors_of(c) for c in step) for step in calls], tmp_path)
    for step, found in zip(calls, results, strict=True):
        for call, (out, lse) in zip(step, found, strict=True):
            assert_as_exact_as_the_reference(Results(out, lse), call)


def test_blocks() -> None:
    model = nn.Sequential(make_sliding_self_block(dim=64, num_heads=4, window_size=7), make_full_self_block(64, 4))
    program = export(model, (torch.randn(2, 33, 64),), ({0: AUTO, 1: AUTO},))
    package = torch._inductor.aoti_load_package(aoti_compile_and_package(program))
    for size in ((2, 33), (3, 70), (5, 4)):
        x = torch.randn(*size, 64)
        with torch.no_grad():
            torch.testing.assert_close(package(x), model(x))


# ---------------------------------------------------------------------- attention that is written without our ops


class Untouched(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        near = (positions <= positions[:, None]) & (positions[:, None] - positions < 5)
        causal = scaled_dot_product_attention(q, k, v, is_causal=True)
        sliding = scaled_dot_product_attention(q, k, v, attn_mask=near & keep[:, None, None])
        scores = (q @ k.transpose(-1, -2)).float() * 0.3
        written = scores.masked_fill(positions > positions[:, None], float("-inf")).softmax(-1)
        return causal + sliding + written.to(v.dtype) @ v


@pytest.mark.parametrize("recognise", [True, False])
def test_attention_is_recognised_in_the_exported_graph(recognise: bool) -> None:
    def inputs(length: int) -> tuple[Tensor, ...]:
        return *(torch.randn(2, 4, length, 16) for _ in "qkv"), torch.arange(length).expand(2, -1) % 3 != 1

    heads = {0: AUTO, 2: AUTO}
    program = export(Untouched(), inputs(33), (heads, heads, heads, {0: AUTO, 1: AUTO}))
    before = str(program.graph)
    with recording() as log:
        package = aoti_compile_and_package(program, inductor_configs={} if recognise else {"recognise": False})
    assert str(program.graph) == before
    found = ["full_self", "sliding_self", "full_self"] if recognise else []
    assert sorted(d.op for d in log.records if d.stage == "recognised") == sorted(found)
    assert sum(d.stage == "lowered" for d in log.records) == len(found)
    run = torch._inductor.aoti_load_package(package)
    for length in (33, 70, 4):
        arguments = inputs(length)
        torch.testing.assert_close(run(*arguments), Untouched()(*arguments), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- serving

PAGE, PAGES = 16, 32
Request = tuple[int, int, int]
"""Cached tokens, new ones, and the page that holds them."""
PROMPTS: list[Request] = [(0, 6, 4), (0, 3, 9), (0, 2, 2)]
STEPS: list[list[Request]] = [PROMPTS, [(6, 1, 4), (3, 2, 9)], [(0, 9, 7), (7, 1, 4), (5, 4, 9), (2, 1, 2)]]
"""What they cache is what they attend to: a package that forgot one would be wrong in the next."""


def step_of(requests: list[Request], **more: Any) -> dict[str, Any]:
    """What both kinds of metadata have; a padding row follows the requests."""
    cached, new, pages = (list(column) for column in zip(*requests, strict=True))
    slots = [page * PAGE + c + i for c, n, page in requests for i in range(n)]
    return {
        "cu_seqlens_q": torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "context_lens": torch.tensor(cached, dtype=torch.int32),
        "page_tables": torch.tensor(pages, dtype=torch.int32)[:, None],
        "slot_mapping": torch.tensor([*slots, -1]), "page_size": PAGE, **more,
    }  # fmt: skip


def by_request(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Served(nn.Module):
    """Two layers whose caches are buffers of theirs; the step's metadata is an argument."""

    def __init__(self, head_dim: int = 16, **where: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.ModuleList(nn.Linear(4 * head_dim, 8 * head_dim, **where) for _ in range(2))
        self.attention = nn.ModuleList(Attention(4, head_dim, None, 2) for _ in range(2))
        for layer in self.attention:
            layer.k_cache, layer.v_cache = (torch.zeros(PAGES, PAGE, 2, head_dim, **where) for _ in "kv")

    def forward(self, x: Tensor, metadata: AttnMetaDataBase) -> Tensor:
        set_fetch_fn_for_attn_metadata(lambda: metadata)
        for project, attention in zip(self.qkv, self.attention, strict=True):
            x = x + attention(*project(x).split((4 * self.head_dim, *[2 * self.head_dim] * 2), dim=-1))
        return x


def test_a_served_model_keeps_its_caches(tmp_path: Path) -> None:
    def inputs(requests: list[Request]) -> tuple[Tensor, CausalMetaData]:
        metadata = CausalMetaData(**step_of(requests))
        return torch.randn(metadata.num_tokens, 64), metadata

    model, example = Served(), inputs(PROMPTS)
    program = export(model, example, ({0: AUTO}, [{0: AUTO}] * 4))
    with recording() as log:
        package = aoti_compile_and_package(program, package_path=str(tmp_path / "served.pt2"))
    (after,) = (graph for name, _, graph in log.graphs if name == "ShareSchedule")
    assert after.count("paged_schedule.default") == 1
    calls = [inputs(requests) for requests in STEPS]
    results = in_a_fresh_process(package, calls, tmp_path)
    with torch.no_grad():
        for arguments, found in zip(calls, results, strict=True):
            torch.testing.assert_close(found, model(*arguments))


class Diffusing(nn.Module):
    """A layer whose caches are arguments, as the metadata is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(4, 16, None, 2, sliding_window=20, softcap=5.0, use_sinks=True)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttnMetaDataBase) -> Tensor:
        set_fetch_fn_for_attn_metadata(lambda: metadata)
        self.attention.k_cache, self.attention.v_cache = k_cache, v_cache
        out = self.attention(*x.split((64, 32, 32), dim=-1))
        self.attention.k_cache = self.attention.v_cache = None
        return out


@pytest.mark.parametrize("layout", ["unified", "distinct"])
def test_block_diffusion_writes_the_callers_caches(layout: str) -> None:
    def inputs(requests: list[Request]) -> tuple[Any, ...]:
        status = by_request([int(cached > 0) for cached, _, _ in requests])
        prefix, padded = (by_request([min(new, size) for _, new, _ in requests]) for size in (3, 4))
        valid = by_request([max(new - 1, 1) for _, new, _ in requests])
        metadata = BlockDiffusionMetaData(
            **step_of(requests), mode="prefix_full", block_size=4, kv_cache_layout=layout,
            status=status, prefix_lens=prefix, padded_prefix_lens=padded, valid_lens=valid,
        )  # fmt: skip
        k_shape, v_shape = (PAGES, PAGE, 2, 16), (PAGES, PAGE, 2, 16)
        if layout == "distinct":
            k_shape, v_shape = (PAGES, 2, 4, PAGE, 4), (PAGES, 2, 16, PAGE)  # type: ignore[assignment]
        return torch.randn(metadata.num_tokens, 128), torch.randn(k_shape), torch.randn(v_shape), metadata

    model, example = Diffusing(), inputs(PROMPTS)
    program = export(model, example, ({0: AUTO}, None, None, [{0: AUTO}] * 8))
    package = torch._inductor.aoti_load_package(aoti_compile_and_package(program))
    for requests in STEPS:
        x, *caches, metadata = inputs(requests)
        expected = [cache.clone() for cache in caches]
        with torch.no_grad():
            torch.testing.assert_close(package(x, *caches, metadata), model(x, *expected, metadata))
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


class Latents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LatentAttention(4, 32, 16, scale=0.1)
        self.attention.latent_cache = torch.zeros(PAGES, PAGE, 48)

    def forward(self, q: Tensor, latent: Tensor, metadata: AttnMetaDataBase) -> Tensor:
        set_fetch_fn_for_attn_metadata(lambda: metadata)
        return self.attention(q, latent)


def test_an_engine_gives_a_package_its_own_cache() -> None:
    def inputs(requests: list[Request]) -> tuple[Any, ...]:
        metadata = CausalMetaData(**step_of(requests), new_keys_in_cache=True)
        return torch.randn(metadata.num_tokens, 4, 48), torch.randn(metadata.num_tokens, 48), metadata

    model, example = Latents(), inputs(PROMPTS)
    program = export(model, example, ({0: AUTO}, {0: AUTO}, [{0: AUTO}] * 4))
    path = aoti_compile_and_package(program)
    with zipfile.ZipFile(path) as archive:
        code = "".join(archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp"))
    assert "proxy_executor_call_function" in code  # and nothing that would copy the cache
    assert "cpp_fused" not in code and "copy_(" not in code
    package = torch._inductor.aoti_load_package(path)
    cache = torch.zeros(PAGES, PAGE, 48)
    package.load_constants({"attention.latent_cache": cache}, check_full_update=True, user_managed=True)
    for requests in STEPS:
        arguments = inputs(requests)
        with torch.no_grad():
            torch.testing.assert_close(package(*arguments), model(*arguments))
        assert torch.equal(cache, model.attention.latent_cache)


# ---------------------------------------------------------------------- calls from C++


NUMBERS: dict[str, Any] = {
    "num_tokens": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": PAGE, "direct": True,
}  # fmt: skip
DTYPES = {"dtype": torch.float32, "cache_dtype": torch.bfloat16}


def test_calls_are_spelled_out_and_others_left_alone() -> None:
    def step(q: Tensor, k_cache: Tensor, lengths: Tensor, starts: Tensor, tables: Tensor) -> Tensor:
        schedule = OPS.paged_schedule(starts, lengths, None, [], **NUMBERS, **DTYPES)
        return OPS.paged_attention(q, None, None, k_cache, k_cache, starts, lengths, tables, None, [], schedule)[0] + q

    graph = torch.fx.symbolic_trace(step).graph
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverloadPacket):
            node.target = node.target.default
    others = [(n.target, n.args, n.kwargs) for n in graph.nodes if "paged" not in str(n.target)]
    spell_out = SpellOut()
    assert spell_out.rewrite(graph) == 2 and spell_out.rewrite(graph) == 0
    assert [(n.target, n.args, n.kwargs) for n in graph.nodes if "paged" not in str(n.target)] == others
    schedule, attention = (n for n in graph.nodes if "paged" in str(n.target))
    assert schedule.target is OPS.paged_schedule_by_names.default
    assert [schedule.kwargs[n] for n in ("dtype", "cache_dtype")] == ["float32", "bfloat16"]
    assert schedule.kwargs["shape_class"] == "auto" and attention.kwargs["block_size"] == 1
    for node in (schedule, attention):
        names = [a.name for a in node.target._schema.arguments]
        assert sorted([*names[: len(node.args)], *node.kwargs]) == sorted(names)


@pytest.mark.parametrize("form", ["full_self", "sliding_self"])
def test_no_ints_are_an_empty_list(form: str) -> None:
    """An empty list arrives as None where C++ calls an op."""
    call = make(Case(form))
    slots = call.form.slots(call.operands)
    ints = list(slots.ints) or None
    found = OPS.grouped_attention(*call.qkv, *slots[:-1], form, ints, 0.25)
    assert_as_exact_as_the_reference(Results(*found), Call(call.form, *call.qkv, call.operands, 0.25))
    gradients = OPS.attention_backward(found[0], None, *call.qkv, *found, *slots[:-1], form, ints, 0.25)
    again = OPS.attention_backward(found[0], None, *call.qkv, *found, *slots[:-1], form, list(slots.ints), 0.25)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_no_request_values_are_an_empty_list() -> None:
    step = CausalMetaData(**step_of([(0, 2, 4), (5, 1, 9)]))
    q, k = torch.randn(4, 4, 16), torch.randn(4, 2, 16)
    caches = [torch.randn(PAGES, PAGE, 2, 16) for _ in "kv"]

    def attend(request_values: list[Tensor] | None) -> Tensor:
        lengths = (step.cu_seqlens_q, step.context_lens, step.page_tables, None, request_values)
        return OPS.paged_attention(q, k, k, *caches, *lengths)[0]

    assert torch.equal(attend(None), attend([]))


def test_a_schedule_with_dtypes_by_their_names() -> None:
    step, names = CausalMetaData(**step_of([(0, 2, 4), (5, 1, 9)])), {"dtype": "float32", "cache_dtype": "float32"}
    arguments = (step.cu_seqlens_q, step.context_lens, None, None)
    results = torch.library.opcheck(OPS.paged_schedule_by_names.default, arguments, {**NUMBERS, **names})
    assert set(results.values()) == {"SUCCESS"}, results
    with pytest.raises(ValueError, match="paged_schedule: dtype: expected float32, float16 or bfloat16, got float64"):
        OPS.paged_schedule_by_names(*arguments, **NUMBERS, **{**names, "dtype": "float64"})


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_packaged_is_named() -> None:
    model = nn.Linear(4, 4)
    program = torch.export.export(model, (torch.randn(2, 4),))
    with pytest.raises(ValueError, match="exported_program: expected an ExportedProgram, got Linear"):
        aoti_compile_and_package(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='package_path: expected a path that ends in ".pt2"'):
        aoti_compile_and_package(program, package_path="model.so")
    program.example_inputs = None
    with pytest.raises(ValueError, match="exported_program: expected example inputs"):
        aoti_compile_and_package(program)


# ---------------------------------------------------------------------- scratch memory on a GPU


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_scratch_memory_is_too_small_in_the_packages_of_one_torch(cpp_wrapper: bool) -> None:
    with V.set_graph_handler(SimpleNamespace(cpp_wrapper=cpp_wrapper)):
        assert compat.scratch_is_safe() == (not cpp_wrapper or not torch.__version__.startswith("2.11"))


@pytest.mark.parametrize("safe", [False, True])
def test_tensor_descriptors_need_it(safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from tools.cases import CASES
    from tools.inspect import generate_case

    monkeypatch.setattr(compat, "scratch_is_safe", lambda: safe)
    (source,) = generate_case(CASES["causal_prefill"], "sm_90").kernels.values()
    assert f"DESCRIPTORS : tl.constexpr = {safe}" in source
