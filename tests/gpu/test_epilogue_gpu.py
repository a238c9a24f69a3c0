"""What follows attention in the Hopper kernel, as the op and as compiled code call it, against fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from custom_ops.epilogue import parse
from custom_ops.form import default_scale
from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from lowered_attn.compile import backend
from tests import fusions
from tests.epilogue_cases import CASES, exact, extra_of, of_dtype, rounding
from tests.fusions import Inputs
from tests.helpers import Call, Case, largest_error, low_precision, make, oracle
from tests.hopper import chosen

pytestmark = pytest.mark.gpu

BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(1000, 1000), dims=(128, 128), band=300)
SHAPES: dict[str, Case] = {
    "D128": BASE,
    "fp16": dataclasses.replace(BASE, dtype=torch.float16, lengths=(513, 513)),
    "D64": dataclasses.replace(BASE, dims=(64, 64), heads=(4, 4), lengths=(577, 577)),
    "D128, values of 40": dataclasses.replace(BASE, dims=(128, 40), lengths=(200, 333), q_start=True),
    "D128, values of 80": dataclasses.replace(BASE, dims=(128, 80), lengths=(300, 300)),
    "few tiles": dataclasses.replace(BASE, lengths=(128, 128), batch=40),
    "sliding": dataclasses.replace(BASE, form="sliding_self"),
    "sliding, starts": dataclasses.replace(BASE, form="sliding_self", lengths=(700, 300), q_start=True, band=128),
    "all keys, padding": dataclasses.replace(BASE, form="bidirectional", lengths=(321, 700), padding="some"),
    "no key seen": dataclasses.replace(BASE, form="bidirectional", padding="all", lengths=(300, 300)),
    "documents": dataclasses.replace(BASE, form="document_causal", lengths=(450, 450)),
    "segments": dataclasses.replace(BASE, form="segment_cross", lengths=(500, 700), padding="first"),
    "prefix": dataclasses.replace(BASE, form="prefix_lm", softcap=20.0, lengths=(450, 450)),
    "blind rows": dataclasses.replace(BASE, lengths=(700, 900), q_start=True),
}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results start as NaN: what a kernel forgets to write shows."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from custom_ops.kernels import launch

    empty = launch.empty_outputs
    monkeypatch.setattr(launch, "empty_outputs", lambda q, v: tuple(t.fill_(math.nan) for t in empty(q, v)))
    with chosen("gluon"):
        yield


def sizes_of(call: Call) -> tuple[int, int, int, int]:
    batch, heads, length, _ = call.q.shape
    return batch, heads, length, call.v.shape[3]


def run_op(call: Call, text: str, extra: Tensor | None) -> Tensor:
    slots = call.form.slots(call.operands)
    return torch.ops.lowered_attn.attention_with_epilogue(
        *call.qkv, *slots[:-1], call.form.name, list(slots.ints), default_scale(call.q, call.scale), call.softcap,
        text, extra,
    )  # fmt: skip


def run_in_kernel(call: Call, text: str, extra: Tensor | None) -> Tensor:
    """The op where it must not compute the epilogue apart."""
    from custom_ops.kernels import launch

    slots, scale = call.form.slots(call.operands), default_scale(call.q, call.scale)
    result = launch.forward_with_epilogue(call.form, *call.qkv, slots, scale, call.softcap, parse(text), extra)
    assert result is not None
    return result


def check(call: Call, text: str, extra: Tensor | None, *results: Tensor) -> None:
    """Against fp64: within twice the error of the reference, whose attention is rounded, and a rounding."""
    expected, low = exact(text, oracle(call).out, extra), exact(text, low_precision(call).out.double(), extra)
    for result in results:
        assert largest_error(result, expected) <= 2 * largest_error(low, expected) + rounding(result, expected)


@pytest.mark.parametrize(
    "name, shape", [(n, s) for n in CASES for s in SHAPES if n == "gate" or s in ("D128", "fp16", "blind rows")]
)
def test_results_are_as_exact_as_the_reference_and_repeat(name: str, shape: str) -> None:
    torch.manual_seed(7)
    call = make(SHAPES[shape], "cuda")
    text = of_dtype(CASES[name], call.q.dtype)
    extra = extra_of(text, sizes_of(call), call.q.dtype, "cuda")
    results = []
    for consumers in (2, 3):
        with chosen("gluon", consumers):
            result = run_in_kernel(call, text, extra)
            assert result.shape == sizes_of(call) and result.dtype == call.q.dtype
            assert result.transpose(1, 2).is_contiguous()
            for _ in range(20):
                assert torch.equal(run_op(call, text, extra), result)
        results.append(result)
    check(call, text, extra, *results)


@pytest.mark.parametrize("consumers", (2, 3))
@pytest.mark.parametrize("dims", ((128, 128), (64, 64), (128, 64)), ids=str)
@pytest.mark.parametrize("length, batch", ((2048, 4), (128, 64), (257, 33), (192, 40)))
def test_programs_of_many_items_load_each_its_own(
    length: int, batch: int, dims: tuple[int, int], consumers: int
) -> None:
    """Against the kernel without an epilogue: every stage and barrier is used many times over."""
    torch.manual_seed(7)
    case = dataclasses.replace(BASE, heads=(32, 8), lengths=(length, length), batch=batch, dims=dims)
    call, text = make(case, "cuda"), CASES["gate"]
    extra = extra_of(text, sizes_of(call), torch.bfloat16, "cuda")
    with chosen("gluon", consumers):
        result = run_in_kernel(call, text, extra)
        out, _ = call.form.op(*call.qkv, **call.operands)
    apart = exact(text, out.float(), extra)
    # Of each element: its own rounding, and that of the output before it was gated.
    assert bool(((result.float() - apart).abs() <= apart.abs() * 2.0**-7).all())


def test_items_without_keys_wait_for_what_they_read_too() -> None:
    """Among items with keys, in any order: windows that end before the first key or begin after the last."""
    torch.manual_seed(7)
    case, text = dataclasses.replace(SHAPES["sliding, starts"], heads=(32, 8), batch=24), CASES["residual"]
    call = make(case, "cuda")
    call.operands["q_start"] = torch.randint(-900, 900, (24,), dtype=torch.int32, device="cuda")
    extra = extra_of(text, sizes_of(call), torch.bfloat16, "cuda")
    for consumers in (2, 3):
        with chosen("gluon", consumers):
            result = run_in_kernel(call, text, extra)
            out, lse = call.form.op(*call.qkv, **call.operands)
        blind = lse == float("-inf")
        assert extra is not None and bool(blind.any()) and not bool(blind.all())
        assert torch.equal(result[blind], extra[blind])
        assert bool(((result.float() - out.float() - extra.float()).abs() <= 2.0**-5).all())


def test_nothing_is_read_or_written_past_the_last_query() -> None:
    torch.manual_seed(7)
    from custom_ops.kernels.gluon import dense_launch

    call, text = make(dataclasses.replace(BASE, lengths=(193, 300), batch=1, q_start=True), "cuda"), CASES["gate"]
    around = torch.full((1, 193 + 64, 8, 128 + 64), math.nan, dtype=torch.bfloat16, device="cuda")
    extra = around[:, :193, :, :128].normal_().transpose(1, 2)
    expected = run_in_kernel(call, text, extra)
    check(call, text, extra, expected)
    guarded = torch.full((1, 193 + 64, 8, 128), 77, dtype=torch.bfloat16, device="cuda")
    result, lse = guarded[:, :193].transpose(1, 2), torch.empty(1, 8, 193, device="cuda")
    slots, scale = call.form.slots(call.operands), default_scale(call.q, None)
    mask = call.form.mask_of(slots)
    dense_launch.forward(mask, *call.qkv, slots, scale, 0.0, result, lse, epilogue=parse(text), extra=extra)
    assert torch.equal(result, expected) and bool((guarded[:, 193:] == 77).all())
    _, expected_lse = call.form.op(*call.qkv, **call.operands)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("layout", ("columns apart", "expanded", "head by head", "off by 2 bytes"))
def test_what_it_reads_lies_anyhow(layout: str) -> None:
    torch.manual_seed(7)
    call, text = make(BASE, "cuda"), CASES["gate"]
    sizes = sizes_of(call)
    extra = {
        "columns apart": lambda: torch.randn(*sizes, 2, device="cuda", dtype=torch.bfloat16)[..., 0],
        "expanded": lambda: torch.randn(1, 1, 1000, 128, device="cuda", dtype=torch.bfloat16).expand(sizes),
        "head by head": lambda: torch.randn(sizes, device="cuda", dtype=torch.bfloat16),
        "off by 2 bytes": lambda: torch.randn(math.prod(sizes) + 1, device="cuda").bfloat16()[1:].view(sizes),
    }[layout]()
    expected = run_in_kernel(call, text, extra.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run_in_kernel(call, text, extra), expected)


@pytest.mark.parametrize("changes", ({"lengths": (70, 70)}, {"dims": (96, 96)}, {"dims": (192, 128)}), ids=str)
def test_what_the_kernel_does_not_take_is_computed_apart(changes: dict[str, Any]) -> None:
    torch.manual_seed(7)
    call, text = make(dataclasses.replace(BASE, **changes), "cuda"), CASES["gate"]
    extra = extra_of(text, sizes_of(call), torch.bfloat16, "cuda")
    check(call, text, extra, run_op(call, text, extra))


def model(name: str, attend: Callable[[Inputs, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        given = Inputs(*tensors)
        return fusions.after(name, attend(given, given.q), given)

    return run


def by_definition(dtype: torch.dtype) -> Callable[[Inputs, Tensor], Tensor]:
    def attend(at: Inputs, q: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, at.k, at.v))
        return reference_attention(q, k, v, FORMS["full_self"], {}, dtype=dtype)[0]

    return attend


FUSED = ("gate an element", "gate merged heads", "gate, then merge", "residual", "gate an element of heads")


@pytest.mark.parametrize("length", (300, 1024))
@pytest.mark.parametrize("name", FUSED)
def test_compiled_code_is_one_kernel_and_as_exact(name: str, length: int) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    given = fusions.inputs(2, length, 8, 2, 128, torch.bfloat16, "cuda")
    with torch.no_grad():
        compiled = torch.compile(model(name, fusions.attend), backend=backend, fullgraph=True)
        actual, (code, *_) = run_and_get_code(compiled, *given)
        body = code.split("def call(", 1)[1].split("def get_args", 1)[0]
        # Assertions name ops too.
        assert body.count("attention_with_epilogue.default(") == body.count("= torch.ops.") == 1
        assert ".run(" not in body and "extern_kernels." not in body
    expected = model(name, by_definition(torch.float64))(*(t.double() for t in given)).double().cpu()
    low = model(name, by_definition(torch.float32))(*given).double().cpu()
    assert largest_error(actual, expected) <= 2 * largest_error(low, expected) + rounding(actual, expected)


def test_in_training_it_is_apart_and_gradients_are_right() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    given = [t.requires_grad_(t.is_floating_point()) for t in fusions.inputs(2, 512, 8, 2, 128, torch.bfloat16, "cuda")]
    plain = model("gate merged heads", fusions.attend)
    grads = []
    for run in (plain, torch.compile(plain, backend=backend, fullgraph=True)):
        result, codes = run_and_get_code(run, *given)
        grads.append(torch.autograd.grad(result.float().square().mean(), given[:3]))
        assert not any("attention_with_epilogue" in code for code in codes)
    for eager, compiled in zip(*grads, strict=True):
        assert largest_error(compiled, eager.double().cpu()) <= 2.0**-6 * float(eager.abs().max())


def test_a_graph_replays() -> None:
    torch.manual_seed(7)
    call, text = make(BASE, "cuda"), CASES["gate"]
    extra = extra_of(text, sizes_of(call), torch.bfloat16, "cuda")
    expected = run_in_kernel(call, text, extra)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_in_kernel(call, text, extra)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
