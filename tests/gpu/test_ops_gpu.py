"""The form ops on a real GPU, eager and compiled: values, gradients, CUDA graphs, recompiles.

Kernels are compiled once a case, so the list below pairs settings instead of multiplying them, and later tests use
cases of that list.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from inductor_passes import compat
from tests.helpers import (
    Call,
    Case,
    Grads,
    Results,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    dense_mask,
    largest_error,
    make,
    oracle,
    run,
    tolerances,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = ((16, 16), (64, 64), (80, 48), (96, 96), (128, 128), (192, 128), (256, 256))
HEADS = ((2, 2), (8, 2), (7, 1), (8, 1))
LENGTHS = (127, 1000)
on_forms = pytest.mark.parametrize("name", FORMS)


def case_of(form: int, dim: int) -> Case:
    """Form and head dim all combined; every form with every dtype and head count, every head dim with every dtype."""
    operands = form + dim
    return Case(
        list(FORMS)[form],
        DTYPES[(form + dim) % 3],
        heads=HEADS[(2 * form + dim) % 4],
        lengths=(LENGTHS[0], LENGTHS[0]),
        dims=DIMS[dim],
        padding="some" if operands % 2 else "none",
        q_start=bool(operands % 2),
        band=(5, 130, 700)[(form + dim // 2) % 3],
    )


SHARED_VALUES = [
    Case("full_self", torch.bfloat16, (8, 8), (127, 127), (128, 512), value_heads=1),
    Case("sliding_self", torch.float16, (8, 4), (127, 127), (64, 512), "some", True, band=130, value_heads=2),
    Case("segment_cross", torch.bfloat16, (6, 6), (127, 127), (256, 320), band=5, value_heads=2),
    Case("full_self", torch.float32, (3, 3), (127, 127), (96, 512), "some", value_heads=1),
]
"""Values that all heads or groups of them share, wider than the keys."""
CAPPED = [
    Case("full_self", torch.bfloat16, (8, 2), (127, 127), (128, 128), softcap=1.0),
    Case("sliding_self", torch.float16, (8, 4), (127, 127), (256, 256), "some", True, softcap=50.0, band=70),
    Case("segment_cross", torch.float32, (6, 6), (127, 127), (64, 64), softcap=3.0),
    Case("full_self", torch.float32, (4, 2), (127, 127), (96, 96), "some", softcap=30.0),
]
CASES = [*(case_of(form, dim) for dim in range(len(DIMS)) for form in range(len(FORMS))), *SHARED_VALUES, *CAPPED]
COMPILED = [*(case_of(form, dim) for dim in (1, 2, 6) for form in range(len(FORMS))), *SHARED_VALUES, *CAPPED]
"""Every form with every dtype, for one common and two odd head dims; shared values; capped scores."""
BF16 = {name: next(c for c in CASES if c.form == name and c.dtype == torch.bfloat16) for name in FORMS}


def longer(case: Case) -> Case:
    return dataclasses.replace(case, lengths=(LENGTHS[1], LENGTHS[1]))


def poison_free_memory() -> None:
    """Leave NaN in what the caching allocator hands out next, so that an output which a kernel does not write shows."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    small = [torch.full((n,), math.nan, device="cuda") for n in (128, 4096, 1 << 16, 1 << 17) for _ in range(64)]
    large = [torch.full((n << 20,), math.nan, device="cuda") for n in (1, 4, 16, 64) for _ in range(4)]
    del small, large


@functools.cache
def expected(case: Case) -> tuple[Call, Grads, Results, dict[str, float]]:
    """A case's tensors, the exact results and how far one may be off: computed once for eager and compiled."""
    torch.manual_seed(1234)
    call = make(case, "cuda")
    grads = cotangents(call)
    exact = oracle(call, grads)
    return call, grads, exact, tolerances(call, exact, grads)


def assert_as_expected(case: Case, attend: Callable[..., Any]) -> None:
    call, grads, exact, allowed = expected(case)
    poison_free_memory()
    results = run(attend, call, grads)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    for name, value in results._asdict().items():
        error = largest_error(value, getattr(exact, name))
        assert error <= allowed[name], f"{name}: error {error:.3e} against fp64, allowed {allowed[name]:.3e}"


def compiled(attend: Callable[..., Any], **keywords: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(attend, fullgraph=True, **{"backend": "lowered_attn", **keywords})


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_is_as_exact_as_the_reference(case: Case) -> None:
    for one in (case, longer(case)):
        assert_as_expected(one, FORMS[case.form].op)


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_is_as_exact_as_the_reference(case: Case) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        return FORMS[case.form].op(q, k, v, **arguments)

    step = compiled(attend, dynamic=False)
    for _ in range(2):  # the first call compiles, which allocates: only the second meets poisoned memory alone
        assert_as_expected(case, step)


@pytest.mark.parametrize(
    "case",
    [
        Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(1, 1), dims=(64, 64)),
        Case(
            "sliding_self",
            torch.bfloat16,
            heads=(8, 1),
            lengths=(1, 1000),
            dims=(128, 128),
            q_start=True,
            band=130,
        ),
        Case("segment_cross", torch.float16, heads=(7, 1), lengths=(1000, 1), dims=(64, 64), band=0),
    ],
    ids=str,
)
def test_one_token(case: Case) -> None:
    assert_as_expected(case, FORMS[case.form].op)


@pytest.mark.parametrize("layout", ["token_major", "sliced", "strided_last", "head_dim_first"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_strides(layout: str, is_compiled: bool) -> None:
    case = dataclasses.replace(BF16["full_self"], layout=layout)
    op = FORMS[case.form].op

    def attend(*tensors: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        return op(*tensors, **arguments)

    assert_as_expected(case, compiled(attend, dynamic=False) if is_compiled else op)


@on_forms
def test_one_output_alone_has_gradients(name: str) -> None:
    call, (grad_out, grad_lse), *_ = expected(BF16[name])
    for grads in ((grad_out, None), (None, grad_lse)):
        assert_as_exact_as_the_reference(run(call.form.op, call, grads), call, grads)


@on_forms
def test_two_runs_are_bitwise_equal(name: str) -> None:
    call, grads, *_ = expected(longer(BF16[name]))
    for a, b in zip(run(call.form.op, call, grads), run(call.form.op, call, grads), strict=True):
        assert torch.equal(a, b)


@on_forms
def test_hidden_keys_and_rows_that_see_nothing(name: str) -> None:
    # Only a request of which all keys are hidden has rows that see nothing where queries see keys on both sides.
    padding = "all" if name == "bidirectional" else "some"
    case = next(c for c in CASES if c.form == name and c.padding == "some")
    call, grads, *_ = expected(dataclasses.replace(case, padding=padding))
    hidden = call.operands["key_padding"][:, None, :, None]
    poisoned = dataclasses.replace(call, k=call.k.masked_fill(hidden, math.nan), v=call.v.masked_fill(hidden, math.inf))
    clean, dirty = (run(call.form.op, c, grads) for c in (call, poisoned))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for gradient in dirty[3:]:
        assert torch.count_nonzero(gradient.masked_select(hidden)) == 0
    blind = ~dense_mask(call.form, call.q, call.k, call.operands).any(-1).expand_as(clean.lse)
    assert blind.any()
    assert torch.equal(clean.lse == -math.inf, blind)
    assert torch.count_nonzero(clean.out[blind]) == 0 and torch.count_nonzero(clean.dq[blind]) == 0


@on_forms
def test_calls_with_nothing_to_do(name: str) -> None:
    form = FORMS[name]
    for lengths in ((0, 0), (3, 0), (0, 3)):
        call = make(Case(name, torch.bfloat16, lengths=lengths, q_start=True), "cuda")
        results = run(form.op, call, cotangents(call))
        assert (results.lse == -math.inf).all()
        assert all(torch.count_nonzero(t) == 0 for t in (results.out, *results[2:]))


def test_segments_at_the_ends_of_int32_see_nothing_and_disturb_no_neighbour() -> None:
    call, grads, *_ = expected(BF16["segment_cross"])
    segments = call.operands["query_segments"].to(torch.int32)
    segments[:, ::5], segments[:, 1::5] = torch.iinfo(torch.int32).max, torch.iinfo(torch.int32).min
    call = dataclasses.replace(call, operands={**call.operands, "query_segments": segments})
    assert_as_exact_as_the_reference(run(call.form.op, call, grads), call, grads)


def test_offsets_past_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, has {free >> 30}")
    # 2^31 elements are reached at token 524,288 of the last head; the window keeps the work small.
    length, heads, dim, window = 540_000, 32, 128, 130
    q, k, v = (torch.empty(1, heads, length, dim, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    out, lse = torch.ops.lowered_attn.sliding_self(q, k, v, window)
    for head, end in ((0, 300), (heads - 1, length)):
        part = (slice(None), slice(head, head + 1), slice(end - 300, end))
        near, near_lse = reference_attention(q[part], k[part], v[part], FORMS["sliding_self"], {"window": window})
        torch.testing.assert_close(out[part][:, :, window:], near[:, :, window:], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[part][:, :, window:], near_lse[:, :, window:], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- what torch expects of an op


@on_forms
def test_opcheck(name: str) -> None:
    call, *_ = expected(BF16[name])
    for requires_grad in (False, True):
        leaves = [t.detach().clone().requires_grad_(requires_grad) for t in call.qkv]
        results = torch.library.opcheck(call.form.op.default, (*leaves, *call.operands.values()))
        assert set(results.values()) == {"SUCCESS"}, results


@on_forms
def test_autocast_eager_and_compiled(name: str) -> None:
    call, _, exact, allowed = expected(BF16[name])
    wide = call.to(torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return call.form.op(q, k, v, **arguments)

    for step in (attend, compiled(attend)) if name == "sliding_self" else (attend,):
        results = run(step, wide, cotangents(call))
        assert results.out.dtype == torch.bfloat16 and results.lse.dtype == torch.float32
        assert [t.dtype for t in results[2:]] == [torch.float32] * 3
        assert largest_error(results.out, exact.out) <= allowed["out"]
        assert largest_error(results.lse, exact.lse) <= allowed["lse"]


# ---------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("name, training", [*((name, False) for name in FORMS), ("sliding_self", True)], ids=str)
def test_cuda_graphs_replay_with_new_inputs_and_operands(name: str, training: bool) -> None:
    case = dataclasses.replace(BF16[name], padding="some", q_start=True)
    form = FORMS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = form.op(q, k, v, **arguments)
        return out * 2, lse

    with compat.config.patch({"triton.cudagraph_or_error": True}):
        step = compiled(attend, mode="reduce-overhead", dynamic=False)
        for replay in range(5):
            torch.manual_seed(replay)
            call = make(case, "cuda")
            grads = cotangents(call) if training else None
            torch.compiler.cudagraph_mark_step_begin()
            results = run(step, call, grads)
            # Outputs live in the graph's memory until the next step.
            results = Results(*(None if t is None else t.clone() for t in results))
            wanted = run(attend, call, grads)
            for field, value in results._asdict().items():
                if value is not None:
                    exact = getattr(wanted, field)
                    # One rounding of the largest result: the epilogue (* 2) sees fp32 here and bf16 there.
                    seen = exact[exact.isfinite()]
                    torch.testing.assert_close(
                        value,
                        exact,
                        rtol=0,
                        atol=torch.finfo(BF16[name].dtype).eps * float(seen.abs().max()),
                        msg=lambda m, f=field, r=replay: f"{f}, replay {r}: {m}",
                    )
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------- dynamic shapes


@pytest.mark.parametrize("name", ["full_self", "segment_cross"])
def test_fifty_shapes_compile_once(name: str) -> None:
    form = FORMS[name]
    backend = CompileCounterWithBackend("lowered_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        return form.op(q, k, v, **arguments)

    graph = compiled(attend, backend=backend, dynamic=True)

    def step(*tensors: Tensor, softcap: float, **arguments: Any) -> tuple[Tensor, Tensor]:
        # A float that enters a graph makes Dynamo call its backend twice; in a model the soft-cap is a constant.
        assert softcap == 0.0
        return graph(*tensors, **arguments)

    random.seed(0)
    after_two = 0
    for i in range(50):
        query_len, key_len, batch = random.randint(2, 300), random.randint(2, 300), random.randint(2, 5)
        case = Case(
            name,
            torch.bfloat16,
            (8, 2),
            (query_len, key_len),
            (64, 64),
            padding="some",
            q_start=True,
            batch=batch,
        )
        call = make(case, "cuda")
        if i == 10:
            poison_free_memory()
        assert_as_exact_as_the_reference(run(step, call), call)
        after_two = backend.frame_count if i == 1 else after_two
    assert backend.frame_count == after_two <= 2
    assert not counters["graph_break"]
