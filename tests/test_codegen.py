"""The GPU code that torch.compile generates for named cases, compiled to machine code without a GPU.

The generated Triton is kept in tests/expected/<torch minor version>/<case>.txt. After an intended change, rewrite the
files with each supported torch, and read the diff:

    EXPECTTEST_ACCEPT=1 python -m pytest tests/test_codegen.py
"""

from __future__ import annotations

import ast
import difflib
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton compiles the generated code")

import triton

from custom_ops.form import empty_outputs
from custom_ops.forms import FORMS
from custom_ops.op import kernels_for
from inductor_passes import LIBRARY_OPTION
from inductor_passes.pretend_gpu import Generated, compile_launches, generate, pretend_gpu
from inductor_passes.resources import Resources, compile_kernel, read_resources
from lowered_attn.compile import backend
from tests.test_paged_codegen import called
from tools import inspect as inspector
from tools.cases import CASES

OPS = torch.ops.lowered_attn
ACCEPT = os.environ.get("EXPECTTEST_ACCEPT") == "1"
EXPECTED = Path(__file__).parent / "expected" / ".".join(torch.__version__.split(".")[:2])
KERNELS = Path(__file__).parent.parent / "custom_ops" / "kernels"
KEPT = ("causal_prefill", "sliding_prefill", "segment_cross_small")
ODD = ("causal_d80", "causal_d96", "causal_d192", "causal_d256", "causal_gqa7", "mla_prefill_b1_s8192_d192_128")


@functools.cache
def generated(name: str, arch: str) -> Generated:
    """One compile a case and architecture, shared by all tests of this file."""
    return inspector.generate_case(CASES[name], arch)


@functools.cache
def resources(name: str, arch: str) -> Resources:
    """What the case's one kernel costs."""
    (source,) = generated(name, arch).kernels.values()
    return compile_kernel(source, arch)


def readable(source: str) -> str:
    """The generated module as it is kept: without hashes, settings and the functions copied from custom_ops/kernels."""
    source = re.sub(r"^inductor_meta=.*$", "inductor_meta=...", source, flags=re.MULTILINE)
    ours = "\n".join(path.read_text() for path in sorted(KERNELS.glob("*.py")))
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and "\n".join(lines[node.lineno - 1 : node.end_lineno]) in ours:
            decorator = node.decorator_list[0].lineno
            del lines[decorator - 1 : node.end_lineno]
    kept = "\n".join(line.rstrip() for line in lines).strip()
    return re.sub(r"\n{3,}", "\n\n", kept) + "\n"


@pytest.mark.parametrize("name", KEPT)
def test_the_generated_triton_is_the_kept_one(name: str) -> None:
    (source,) = generated(name, "sm_90").kernels.values()
    got, path = readable(source), EXPECTED / f"{name}.txt"
    if ACCEPT:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(got)
    if not EXPECTED.exists():
        pytest.skip(f"tests/expected has nothing for torch {EXPECTED.name}; EXPECTTEST_ACCEPT=1 writes it")
    wanted = path.read_text() if path.exists() else ""
    difference = difflib.unified_diff(wanted.splitlines(), got.splitlines(), "kept", "generated", lineterm="", n=2)
    assert got == wanted, "\n".join(["EXPECTTEST_ACCEPT=1 accepts this change:", *difference])


@pytest.mark.parametrize("name", [*KEPT, *ODD])
def test_a_case_is_one_triton_kernel(name: str) -> None:
    made = generated(name, "sm_90")
    assert len(made.kernels) == 1
    # Nothing else is launched: no fallback to an op, no library call.
    calls = made.wrapper.split("def call(", 1)[1]
    assert re.findall(r"\w+\.run\(", calls) == [f"{next(iter(made.kernels))}.run("]
    assert "torch.ops." not in calls and "extern_kernels." not in calls


@pytest.mark.parametrize("name", [*KEPT, *ODD])
def test_hopper_code_uses_wgmma_and_does_not_spill(name: str) -> None:
    kernel = resources(name, "sm_90")
    assert ".target sm_90a" in kernel.ptx
    assert kernel.wgmma > 0 and kernel.mma == 0 and kernel.tcgen05 == 0
    assert kernel.problems == []


@pytest.mark.parametrize("name", KEPT)
def test_ampere_code_uses_mma_sync_and_does_not_spill(name: str) -> None:
    kernel = resources(name, "sm_80")
    assert re.search(r"\.target sm_80\b", kernel.ptx)
    assert kernel.mma > 0 and kernel.wgmma == 0
    assert kernel.problems == []


@pytest.mark.parametrize("name", KEPT)
def test_blackwell_code_uses_tcgen05_and_does_not_spill(name: str) -> None:
    kernel = resources(name, "sm_100")
    assert ".target sm_100a" in kernel.ptx
    assert kernel.tcgen05 > 0 and kernel.wgmma == 0
    assert kernel.problems == []


def test_a_training_case_generates_a_forward_and_a_backward() -> None:
    made = generated("train_causal_small", "sm_90")
    assert made.wrapper.count("def call(") == 2
    assert "lowered_attn.attention_backward" in made.wrapper.split("def call(")[2]
    # The backward reads the log-sum-exp, so this forward writes it.
    assert "WRITES_LSE : tl.constexpr = True" in next(iter(made.kernels.values()))


@pytest.mark.parametrize("name", ["sliding_prefill", "segment_cross_small", "train_causal_small"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_eager_kernels_use_tensor_cores_and_fit(name: str, arch: str) -> None:
    kernels = {kernel.kernel: kernel for kernel in inspector.eager_kernels(CASES[name], arch)}
    backward = ["delta_kernel", "query_gradient_kernel", "key_value_gradient_kernel"]
    # A window of 5 segments is too few keys for the Hopper kernel.
    forward = "dense_attention_kernel" if arch == "sm_90" and name != "segment_cross_small" else "forward_kernel"
    assert list(kernels) == [forward, *(backward if CASES[name].backward else [])]
    kernels.pop("delta_kernel", None)  # it has no product of matrices
    for kernel in kernels.values():
        assert (kernel.wgmma > 0) == (arch == "sm_90") and (kernel.mma > 0) == (arch == "sm_80")
        # Strides and lengths are known only at run time here, so a few registers may spill.
        assert [problem for problem in kernel.problems if not problem.startswith("spills")] == []


@pytest.mark.parametrize(
    ("arch", "instruction"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")], ids=lambda x: x
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_soft_cap_costs_no_spills(dim: int, arch: str, instruction: str) -> None:
    """Forward by template; forward and backward by eager kernels, which may spill where they do without a cap."""
    # Triton 3.6 and 3.9 spill there without a cap too, up to 44 bytes.
    allowed = 64 if arch == "sm_100" and not triton.__version__.startswith("3.7") else 0
    form = FORMS["full_self"]
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            q, k, v = (
                torch.empty(2, 1024, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                for heads in (16, 4, 4)
            )
            out, lse = empty_outputs(q, v)
        made = generate(
            lambda *qkv: OPS.full_self(*qkv, softcap=50.0)[0], q, k, v, backend=backend, options={LIBRARY_OPTION: False}
        )
        kernels, slots = kernels_for(q.device), form.slots({"key_padding": None, "q_start": None})
        plain, capped = (
            compile_launches(lambda *qkv, cap=cap: kernels.forward(form, *qkv, slots, 0.1, cap), q, k, v)
            for cap in (0.0, 50.0)
        )
        eager = list(capped)
        eager += compile_launches(
            lambda grad, *saved: kernels.backward(form, grad, None, *saved, slots, 0.1, 50.0), out, q, k, v, out, lse
        )
    (source,) = made.kernels.values()
    assert "SOFTCAP : tl.constexpr = 50.0" in source
    kernel = compile_kernel(source, arch)
    assert getattr(kernel, instruction) > 0
    costs = [kernel, *(read_resources(kernel, arch) for kernel in eager)]
    assert len(costs) == 5
    assert not [problem for cost in costs for problem in cost.problems if not problem.startswith("spills")]
    if (dim, arch) == (64, "sm_80"):
        costs = costs[:3]  # the gradients spill without a cap too
    without = read_resources(plain[0], arch).spills  # the Hopper kernel's, with Triton 3.9
    assert costs[1].spills <= max(allowed, without)
    assert max(cost.spills for cost in (costs[0], *costs[2:])) <= allowed


def latent_inputs() -> tuple[Tensor, ...]:
    """q and k [2, 16, 1024, 128], and one value head of 512 elements for all heads, token-major, bf16."""
    return tuple(
        torch.empty(2, 1024, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads, dim in ((16, 128), (16, 128), (1, 512))
    )


LATENT = {
    "full_self": lambda q, k, v: OPS.full_self(q, k, v)[0],
    "sliding_self": lambda q, k, v: OPS.sliding_self(q, k, v, 256)[0],
    "segment_cross": lambda q, k, v: OPS.segment_cross(
        q, k, v, torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device), 4
    )[0],
}


@pytest.mark.parametrize(
    ("form", "arch", "instruction"),
    [
        ("full_self", "sm_80", "mma"),
        ("full_self", "sm_90", "wgmma"),
        ("full_self", "sm_100", "tcgen05"),
        ("sliding_self", "sm_90", "wgmma"),
        ("segment_cross", "sm_90", "wgmma"),
    ],
)
def test_heads_that_share_a_latent_read_it_where_it_lies(form: str, arch: str, instruction: str) -> None:
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            inputs = latent_inputs()
        made = generate(LATENT[form], *inputs, backend=backend, options={LIBRARY_OPTION: False})
    (source,) = [source for source in made.kernels.values() if "tl.dot" in source]
    assert "SHARING : tl.constexpr = 16" in source
    # The output is the only large buffer: nothing holds the latent for every head, or at all.
    buffers = re.findall(r"empty_strided_cuda\((\([^)]*\))", made.wrapper)
    sizes = [math.prod(map(int, re.findall(r"\d+", size))) for size in buffers]
    assert max(sizes) == 2 * 1024 * 16 * 512 and sum(size >= 2 * 1024 * 512 for size in sizes) == 1
    kernel = compile_kernel(source, arch)
    assert getattr(kernel, instruction) > 0 and kernel.problems == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_eager_kernels_of_a_shared_latent_fit_and_do_not_spill(arch: str) -> None:
    form = FORMS["full_self"]
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            q, k, v = latent_inputs()
            out, lse = empty_outputs(q, v)
            operands = form.slots({"key_padding": None, "q_start": None})
        kernels = kernels_for(q.device)
        compiled = compile_launches(lambda *qkv: kernels.forward(form, *qkv, operands, 0.1), q, k, v)
        compiled += compile_launches(
            lambda grad, *saved: kernels.backward(form, grad, None, *saved, operands, 0.1), out, q, k, v, out, lse
        )
    costs = [read_resources(kernel, arch) for kernel in compiled]
    assert [cost.kernel for cost in costs] == [
        "forward_kernel", "delta_kernel", "query_gradient_kernel", "key_value_gradient_kernel",
    ]  # fmt: skip
    *costs, gradients = costs
    assert [problem for cost in costs for problem in cost.problems] == []
    # Triton 3.9 keeps the values in registers where 3.6 and 3.7 keep them in shared memory.
    allowed = 240 if triton.__version__ >= "3.9" else 0
    assert gradients.spills <= allowed
    assert not [problem for problem in gradients.problems if not problem.startswith("spills")]


FLEX = """
import torch
from custom_ops.forms import FORMS
from inductor_passes.pretend_gpu import generate, pretend_gpu
from inductor_passes.resources import compile_kernel
from lowered_attn.backends import run_attention
from tests.test_codegen import latent_inputs

with pretend_gpu("sm_90") as gpu:
    with gpu.fake_tensors():
        inputs = tuple(t.requires_grad_() for t in latent_inputs())
    operands = {"key_padding": None, "q_start": None}
    made = generate(lambda *qkv: run_attention("flex", FORMS["full_self"], *qkv, operands), *inputs, backend="inductor")
kernels = [source for source in made.kernels.values() if "tl.dot" in source]
assert len(kernels) == 2, "forward and backward"
for source in kernels:
    problems = compile_kernel(source, "sm_90").problems
    assert not [problem for problem in problems if problem.startswith("shared memory")], problems
print("it fits")
"""


def test_flex_fits_where_values_are_wider_than_keys(pytestconfig: pytest.Config) -> None:
    """In a process of its own: tracing flex's backward runs the autograd engine on the pretended device, and an engine
    that an earlier test started has no queue for it."""
    done = subprocess.run([sys.executable, "-c", FLEX], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.stdout.strip().endswith("it fits"), done.stderr


def test_the_command_prints_source_ptx_or_resources(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--case", "segment_cross_small", "--arch", "sm_90"]
    assert inspector.main(command) == 0
    assert "@triton.jit" in capsys.readouterr().out
    assert inspector.main([*command, "--ptx"]) == 0
    printed = capsys.readouterr().out
    assert "@triton.jit" in printed and "wgmma.mma_async" in printed
    assert inspector.main([*command, "--resources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["kernel", "registers", "spills", "shared memory", "wgmma", "mma"]
    assert [line.partition(": ")[0] for line in lines] == names
    assert all(re.fullmatch(r"[a-z ]+: \d+", line) for line in lines[1:])
    assert inspector.main([*command, "--eager"]) == 0
    assert capsys.readouterr().out.startswith("kernel: forward_kernel\nregisters: ")


def test_the_command_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--case", "causal"], ["--case", "causal_prefill", "--arch", "sm_70"], []):
        with pytest.raises(SystemExit) as stopped:
            inspector.main(arguments)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert ("sm_100" if "sm_70" in arguments else "sliding_prefill") in message
    assert inspector.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CASES)


@pytest.mark.parametrize("library_kernels", [True, False])
def test_layers_share_their_operands_memory(library_kernels: bool) -> None:
    """Padding and starts that the graph computes are computed once, not once more for every layer."""

    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cached: Tensor) -> Tensor:
        padding, start = ~mask.to(torch.bool), (cached + 1).to(torch.int32).expand(q.shape[0])
        for _ in range(3):
            q = OPS.full_self(q, k, v, padding, start)[0] + q
        return q

    with pretend_gpu("sm_90") as gpu, torch.no_grad():
        with gpu.fake_tensors():
            q, k, v = (torch.empty(2, heads, 256, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
            mask = torch.empty(2, 256, dtype=torch.int64, device="cuda")
            cached = torch.empty(1, dtype=torch.int64, device="cuda")
        made = generate(layers, q, k, v, mask, cached, backend=backend, options={LIBRARY_OPTION: library_kernels})
    launches = called(made)
    kernel = "attention_with_epilogue" if library_kernels else "triton_tem"  # both compute the sums too
    attention = [name for name in launches if name.startswith(kernel)]
    assert len(attention) == 3 and len(launches) - len(attention) <= 2, launches
