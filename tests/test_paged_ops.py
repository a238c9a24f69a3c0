"""Paged attention on a CPU: values against fp64, every mode's definition, what must not be read, what torch expects."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from custom_ops.paged.call import IMPLS, PagedCall
from custom_ops.paged.layout import LAYOUTS, CacheSizes, empty_caches
from custom_ops.paged.masks import MODES
from custom_ops.paged.reference import reference_paged_attention
from custom_ops.paged.schedule import ScheduleCall, config_of
from tests.helpers import pairwise
from tests.paged_cases import (
    LENGTHS,
    PagedCase,
    assert_as_exact_as_the_reference,
    attend,
    changed,
    lay_out_values,
    make,
)
from tests.test_op_protocol import assert_same_metadata, check, compiled
from tests.test_ops import largest_allocation

OPS = torch.ops.lowered_attn
on_modes = pytest.mark.parametrize("mode", tuple(MODES))
on_layouts = pytest.mark.parametrize("layout", tuple(LAYOUTS))


def cases() -> list[PagedCase]:
    """Every two settings together at least once."""
    factors = {
        "mode": tuple(MODES),
        "lengths": ("mixed", "ragged", "decode", "chunks", "long", "nothing", "nobody"),
        "dtype": (torch.float32, torch.bfloat16, torch.float16),
        "page_size": (1, 3, 16, 256),
        "fp8": (False, True),
        "layout": tuple(LAYOUTS),
        "direct": (True, False),
        "heads": ((2, 2), (4, 1), (7, 1)),
        "head_dim": (16, 64, 112, 256),
        "window": (0, 1, 9),
        "prefix_hole": (False, True),
        "block_size": (1, 4, 32),
        "softcap": (0.0, 1.5),
        "sinks": (False, True),
    }
    return [PagedCase(**row) for row in pairwise(factors)]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_values_are_as_exact_as_the_reference(case: PagedCase) -> None:
    call = make(case)
    assert_as_exact_as_the_reference(*attend(call), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", ["mixed", "ragged"])
@on_modes
def test_every_mode_in_every_dtype(mode: str, lengths: str, dtype: torch.dtype) -> None:
    for fp8 in (False, True):
        call = make(PagedCase(mode, dtype, fp8=fp8, lengths=lengths))
        assert_as_exact_as_the_reference(*attend(call), call)


# ---------------------------------------------------------------------- what a query sees

# By the definitions, in plain Python: position a and key b, c cached tokens, o the request's values.


def block_causal(a: int, b: int, c: int, size: int, o: dict[str, int]) -> bool:
    return b < (a // size + 1) * size


def prefix_full(a: int, b: int, c: int, size: int, o: dict[str, int]) -> bool:
    if o["status"] == 1:
        return block_causal(a, b, c, size, o)
    i, j = a - c, b - c
    if i < o["prefix"]:
        return j < o["prefix"]
    if i < o["padded_prefix"]:
        return j < o["padded_prefix"]
    return block_causal(a, b, c, size, o)


SEES: dict[str, Callable[[int, int, int, int, dict[str, int]], bool]] = {
    "plain": lambda a, b, c, size, o: True,
    "causal": lambda a, b, c, size, o: b <= a,
    "block_causal": block_causal,
    "prefix_full": prefix_full,
    "prefix_causal": lambda a, b, c, size, o: block_causal(a, b, c, size, o) if o["status"] == 1 else b <= a,
    "cache_only": lambda a, b, c, size, o: b < c,
}


def weights_of(call: PagedCall, attend: Callable[[PagedCall], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights ``[T, Hq, D]`` of a request's key 0 to D - 1 and lse: its values become the unit vectors."""
    _, page_size, kv_heads, head_dim = call.cache_sizes
    pages = torch.full((call.cache_sizes.pages, page_size, kv_heads, head_dim), math.nan)
    v = None if call.v is None else torch.full_like(call.v, math.nan)
    unit = torch.eye(head_dim)[:, None].expand(-1, kv_heads, -1)
    for r in range(call.requests):
        start, stop = call.cu_seqlens_q[r : r + 2].tolist()
        context, stored = int(call.context_lens[r]), int(call.context_lens[r]) + (0 if call.direct else stop - start)
        position = torch.arange(stored)
        pages[call.page_tables[r, position // page_size].long(), position % page_size] = unit[:stored]
        if v is not None:
            v[start:stop] = unit[context : context + stop - start]
    return attend(changed(call, v=v, v_cache=lay_out_values(pages, call.layout, call.q.dtype)))


@pytest.mark.parametrize("restrict", [{}, {"window": 6}, {"prefix_hole": True}, {"window": 3, "prefix_hole": True}])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@on_modes
def test_a_query_sees_exactly_the_keys_of_the_definition(mode: str, direct: bool, restrict: dict[str, Any]) -> None:
    layout = "unified" if direct else "distinct"
    # Weights are compared with 0: the softcap keeps every one far above what fp32 rounds to 0.
    case = PagedCase(
        mode, head_dim=64, page_size=3, layout=layout, lengths="ragged", direct=direct, softcap=3.0, **restrict
    )
    call = make(dataclasses.replace(case, unseen=False))
    names = [o.name for o in call.mask.operands[2:]]
    expected = torch.zeros(call.q.shape[0], 64, dtype=torch.bool)
    for r, (c, _, valid) in enumerate(LENGTHS["ragged"]):
        o = dict(zip(names, (int(t[r]) for t in call.request_values), strict=True))
        for i in range(valid):
            for b in range(c + valid):
                shown = SEES[mode](c + i, b, c, call.block_size, o) if b >= c else True
                shown &= not call.window or c + i - b < call.window
                shown &= not (case.prefix_hole and b < c and o["prefix"] <= b < o["padded_prefix"])
                expected[int(call.cu_seqlens_q[r]) + i, b] = shown
    for run in (attend, lambda call: OPS.paged_attention_reference(**vars(call))):
        weights, lse = weights_of(call, run)
        assert torch.equal(weights > 0, expected[:, None].expand_as(weights))
        blind = ~expected.any(1)
        assert blind.any() and torch.equal(lse == -math.inf, blind[:, None].expand_as(lse))
        assert torch.count_nonzero(weights[blind]) == 0


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sinks_take_weight_and_rows_that_see_nothing_leave_them_out(softcap: float) -> None:
    # Behind a window of 3, later rows of a request see nothing of a cache that earlier ones see.
    call = make(PagedCase("cache_only", lengths="ragged", window=3, softcap=softcap))
    out, lse = attend(call)
    sinks = torch.tensor([0.5, -1.0, 3.0, -math.inf])
    with_sinks, lse_with_sinks = attend(changed(call, sinks=sinks))
    seeing = lse > -math.inf
    assert seeing.any() and not seeing.all()
    expected = torch.logaddexp(lse, sinks.expand_as(lse))
    torch.testing.assert_close(lse_with_sinks[seeing], expected[seeing])
    torch.testing.assert_close(with_sinks[seeing], (out * (lse - expected).exp()[..., None])[seeing])
    assert (lse_with_sinks[~seeing] == -math.inf).all() and torch.count_nonzero(with_sinks[~seeing]) == 0


# ---------------------------------------------------------------------- what must not matter


def filled(call: PagedCall, garbage: float) -> PagedCall:
    """``call`` with ``garbage`` where it holds NaN."""
    fields = {name: getattr(call, name) for name in ("q", "k", "v", "k_cache", "v_cache")}
    return changed(
        call,
        **{
            n: t.float().masked_fill(t.float().isnan(), garbage).to(t.dtype) for n, t in fields.items() if t is not None
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"window": 5, "sinks": True, "fp8": True}, {"softcap": 2.0, "prefix_hole": True}], ids=str
)
@on_layouts
def test_what_lies_in_unused_memory_reaches_nothing(layout: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    for direct in (True, False):
        call = make(PagedCase("prefix_full", dtype, lengths="ragged", layout=layout, direct=direct, **settings))
        clean = attend(call)
        for garbage in (0.0, math.inf, 3e4):  # fp8 has no infinity: NaN once more
            for a, b in zip(attend(filled(call, garbage)), clean, strict=True):
                assert torch.equal(a, b)


@on_layouts
def test_pages_may_lie_anywhere(layout: str) -> None:
    for fp8 in (False, True):
        case = PagedCase("block_causal", torch.bfloat16, fp8=fp8, layout=layout, page_size=3)
        results = []
        for placement in range(3):
            torch.manual_seed(0)
            results.append(attend(make(case, placement=placement)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_page_ids_that_no_row_needs_may_be_anything() -> None:
    # Behind a window of 4, whole pages of 3 tokens are seen by nobody: an engine may have given them away.
    call = make(PagedCase(window=4, page_size=3, lengths="mixed", direct=False))
    clean = attend(call)
    freed = call.page_tables.clone()
    for r, context in enumerate(call.context_lens.tolist()):
        freed[r, : max(context - 3, 0) // 3] = -1
    assert not torch.equal(freed, call.page_tables)
    for a, b in zip(attend(changed(call, page_tables=freed)), clean, strict=True):
        assert torch.equal(a, b)
    exact = reference_paged_attention(**vars(changed(call, page_tables=freed)))
    torch.testing.assert_close(clean, exact)


@on_layouts
def test_strided_inputs_give_what_contiguous_ones_do(layout: str) -> None:
    call = make(PagedCase(layout=layout))
    rows, heads, head_dim = call.q.shape
    parts = [call.q, call.k, call.v]
    fused = torch.cat([t.flatten(1) for t in parts], 1)
    widths = [t[0].numel() for t in parts]
    q, k, v = (t.unflatten(1, (-1, head_dim)) for t in fused.split(widths, 1))
    every_other = [torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0] for t in (call.k_cache, call.v_cache)]
    strided = changed(call, q=q, k=k, v=v, k_cache=every_other[0], v_cache=every_other[1])
    assert not any(t.is_contiguous() for t in (strided.q, strided.v, strided.k_cache))
    for a, b in zip(attend(strided), attend(call), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_both_implementations_are_the_same_on_a_cpu_and_two_runs_are_bitwise_equal() -> None:
    call = make(PagedCase("block_causal", torch.bfloat16, lengths="long", heads=(8, 2), sinks=True))
    schedule = OPS.paged_schedule(**vars(ScheduleCall.of(call)))
    assert schedule.shape == (0,) and schedule.dtype == torch.int32
    first = attend(call)
    for impl in IMPLS:
        for a, b in zip(attend(changed(call, impl=impl, schedule=schedule, shape_class="decode")), first, strict=True):
            assert torch.equal(a, b)


def test_a_page_table_that_ends_too_early_is_refused_instead_of_read_past() -> None:
    call = make(PagedCase(lengths="decode"))
    short = changed(call, page_tables=call.page_tables[:, :2])
    with pytest.raises(
        ValueError, match=r"page_tables \(request 0\): expected pages for 33 tokens, got 2 pages of 16; "
    ):
        attend(short)


def test_lengths_that_make_no_sense_read_no_foreign_memory() -> None:
    call = make(PagedCase(lengths="chunks"))
    for fields in (
        {"cu_seqlens_q": torch.tensor([0, 8, 5, 2147480000], dtype=torch.int32)},
        {"context_lens": torch.tensor([-5, 0, 3], dtype=torch.int32)},
        {"valid_lens": torch.tensor([-5, 99, 2147480000], dtype=torch.int32)},
        {"page_tables": torch.full_like(call.page_tables, 2147480000)},
        {"page_tables": torch.full_like(call.page_tables, -7)},
    ):
        out, lse = attend(changed(call, **fields))
        assert out.shape == call.q.shape and lse.shape == call.q.shape[:2]


def test_a_long_context_takes_memory_by_its_length() -> None:
    context, new = 8192, 1024
    sizes = CacheSizes(context // 64, 64, 1, 16)
    caches = [t.normal_() for t in empty_caches("unified", sizes, torch.float32)]
    q, k, v = (torch.randn(new, heads, 16) for heads in (8, 1, 1))
    lengths = [torch.tensor(x, dtype=torch.int32) for x in ([0, new], [context])]
    pages = torch.arange(sizes.pages, dtype=torch.int32)[None]
    for softcap in (0.0, 5.0):
        # All scores at once are 8 heads * 1024 * 9216 * 4 B = 288 MiB; a chunk's are 2**24 elements.
        most = largest_allocation(
            lambda cap=softcap: OPS.paged_attention(q, k, v, *caches, *lengths, pages, None, [], softcap=cap)
        )
        assert most <= 64 << 20


# ---------------------------------------------------------------------- what torch expects of an op

PROTOCOL: dict[str, PagedCase] = {
    "plain": PagedCase(),
    "everything": PagedCase(
        "prefix_full", torch.bfloat16, layout="distinct", lengths="ragged", direct=False, window=9, prefix_hole=True,
        softcap=2.0, sinks=True, impl="triton",
    ),
    "decode": PagedCase(dtype=torch.float16, lengths="decode", heads=(7, 1), padding_rows=0),
    "fp8": PagedCase(dtype=torch.bfloat16, fp8=True, lengths="chunks"),
    "nobody": PagedCase(lengths="nobody", padding_rows=0),
}  # fmt: skip
on_protocol = pytest.mark.parametrize("case", PROTOCOL.values(), ids=PROTOCOL)


@on_protocol
def test_opcheck(case: PagedCase) -> None:
    # opcheck compares results with themselves, and NaN is not NaN: no poison here.
    call = filled(make(case), 0.0)
    for op in (OPS.paged_attention.default, OPS.paged_attention_reference.default):
        if case.fp8:  # torch compares no fp8 tensors on a CPU, and test_schema compares inputs
            torch.library.opcheck(op, (), vars(call), test_utils=("test_autograd_registration", "test_faketensor"))
        else:
            check(op, (), vars(call))
    check(OPS.paged_schedule.default, (), vars(ScheduleCall.of(call)))


def test_the_schemas_are_the_documented_ones() -> None:
    arguments = (
        "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor context_lens, "
        "Tensor page_tables, Tensor? valid_lens, Tensor[]? request_values, Tensor? schedule=None, Tensor? sinks=None, "
        'Tensor? k_scale=None, Tensor? v_scale=None, *, str mode="causal", int block_size=1, int window=0, '
        'bool prefix_hole=False, str layout="unified", float softcap=0., float? scale=None, '
        'str impl="triton_grouped", str shape_class="auto") -> (Tensor, Tensor)'
    )
    for name in ("paged_attention", "paged_attention_reference"):
        assert str(getattr(OPS, name).default._schema) == f"lowered_attn::{name}{arguments}"
    assert str(OPS.store_kv_cache.default._schema) == (
        "lowered_attn::store_kv_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
        'Tensor? k_scale=None, Tensor? v_scale=None, *, str layout="unified") -> ()'
    )


@pytest.mark.parametrize("op, of", [("paged_attention", PagedCall), ("paged_schedule", ScheduleCall)])
def test_calls_have_the_arguments_of_their_ops_and_their_defaults(op: str, of: type) -> None:
    arguments = getattr(OPS, op).default._schema.arguments
    fields = dataclasses.fields(of)
    assert [a.name for a in arguments] == [f.name for f in fields]
    assert [a.default_value for a in arguments if a.has_default_value()] == [
        f.default for f in fields if f.default is not dataclasses.MISSING
    ]


@on_protocol
def test_fake_results_have_the_real_shapes_dtypes_and_strides(case: PagedCase) -> None:
    call = make(case)
    with FakeTensorMode() as mode:
        fields = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in vars(call).items()}
        fake_call = PagedCall(**{**fields, "request_values": [mode.from_tensor(t) for t in call.request_values]})
        fakes = attend(fake_call), OPS.paged_attention_reference(**vars(fake_call))
        fake_schedule = OPS.paged_schedule(**vars(ScheduleCall.of(fake_call)))
    for fake in fakes:
        assert_same_metadata(fake, attend(call))
    assert_same_metadata([fake_schedule], [OPS.paged_schedule(**vars(ScheduleCall.of(call)))])


def test_reference_op_is_the_reference() -> None:
    call = make(PagedCase("prefix_causal", torch.bfloat16, lengths="ragged", sinks=True))
    results = OPS.paged_attention_reference(**vars(call))
    for a, b in zip(results, reference_paged_attention(**vars(call)), strict=True):
        assert torch.equal(a, b)
    assert_as_exact_as_the_reference(*results, call)


def test_gradients_are_refused_instead_of_wrong() -> None:
    call = make(PagedCase())
    call.q.requires_grad_()
    for name in ("paged_attention", "paged_attention_reference"):
        out, _ = getattr(OPS, name)(**vars(call))
        with pytest.raises(
            RuntimeError, match=f"{name}: expected no gradient through this op, got one; paged attention"
        ):
            out.sum().backward()
    with torch.no_grad():
        assert not attend(call)[0].requires_grad


@pytest.mark.parametrize("name", ["paged_attention", "paged_attention_reference"])
def test_other_lengths_and_sizes_compile_once(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, *tensors: Tensor | None, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        return getattr(OPS, name)(q * 1, *tensors, values, mode="prefix_causal", block_size=4)

    traced = compiled(step, backend=counter, dynamic=True)
    # Sizes that are equal the first time are compiled as one: no two sizes of the first call are.
    for lengths, padding in (("ragged", 3), ("mixed", 5), ("long", 2), ("chunks", 4)):
        call = make(PagedCase("prefix_causal", lengths=lengths, padding_rows=padding, heads=(6, 2), head_dim=32))
        n_valid = call.cu_seqlens_q.diff() if call.valid_lens is None else call.valid_lens
        tensors = list(vars(call).values())[:8] + [n_valid]
        for a, b in zip(traced(*tensors, values=call.request_values), attend(call), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


LAZY = """
import sys, torch, custom_ops
from custom_ops.paged import CacheSizes, empty_caches
caches = empty_caches("unified", CacheSizes(2, 4, 1, 16), torch.float32)
q, starts, lens = torch.randn(1, 1, 16), torch.tensor([0, 1]).int(), torch.tensor([3]).int()
torch.ops.lowered_attn.store_kv_cache(q, q, *caches, torch.tensor([3]))
torch.ops.lowered_attn.paged_attention(q, None, None, *caches, starts, lens, torch.zeros(1, 1).int(), None, [])
assert not {"triton", "torch.utils.flop_counter"} & set(sys.modules)
"""


def test_a_call_on_a_cpu_imports_no_triton(pytestconfig: pytest.Config) -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the schedule's size on a GPU


def test_the_schedule_of_a_gpu_has_the_size_of_its_capacities() -> None:
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from inductor_passes.pretend_gpu import pretend_gpu

    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "direct": False}
    dtypes = {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16}
    with pretend_gpu("sm_90"), FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for requests, tokens in ((64, 64), (3, 500), (0, 0)):
            starts, lens = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (requests + 1, requests))
            schedule = OPS.paged_schedule(starts, lens, None, [], num_tokens=tokens, **sizes, **dtypes)
            call = ScheduleCall(starts, lens, None, [], num_tokens=tokens, **sizes, **dtypes)
            assert schedule.shape == (config_of(call).schedule_layout(requests, tokens).size,)
            assert schedule.dtype == torch.int32 and schedule.device.type == "cuda"
        symbolic = mode.shape_env.create_unbacked_symint()
        torch._check(symbolic >= 0)
        schedule = OPS.paged_schedule(
            starts, lens, None, [], num_tokens=symbolic, shape_class="chunk", **sizes, **dtypes
        )
        assert not isinstance(schedule.shape[0], int)


def test_a_schedule_of_other_sizes_is_refused_on_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from inductor_passes.pretend_gpu import pretend_gpu

    call = make(PagedCase(dtype=torch.bfloat16, head_dim=64))
    with pretend_gpu("sm_90"), FakeTensorMode():
        fields = {
            n: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t
            for n, t in vars(call).items()
        }
        on_gpu = PagedCall(**fields)
        schedule = OPS.paged_schedule(**vars(ScheduleCall.of(on_gpu)))
        out, lse = attend(changed(on_gpu, schedule=schedule))
        assert out.shape == call.q.shape and out.device.type == "cuda" and lse.dtype == torch.float32
        expected = rf"schedule: expected {schedule.shape[0]} elements, got {schedule.shape[0] - 1}; pass what"
        with pytest.raises(ValueError, match=expected):
            attend(changed(on_gpu, schedule=schedule[1:]))
