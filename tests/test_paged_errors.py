"""Bad paged calls: refused before any kernel runs, with what was expected, what came and the remedy; bad values too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_ops.paged import cpu
from custom_ops.paged.call import PagedCall
from custom_ops.paged.checks import check_values
from custom_ops.paged.layout import FP8, CacheSizes, empty_caches
from custom_ops.paged.schedule import ScheduleCall
from tests.paged_cases import PagedCase, make

OPS = torch.ops.lowered_attn
META = torch.device("meta")
ALL_MESSAGES = r"lowered_attn::\w+: .+: expected .+, got .+; .+"
FLOATS = "expected float32, float16 or bfloat16, got {}; cast it"
MODES = "'plain', 'causal', 'block_causal', 'prefix_full', 'prefix_causal', 'cache_only'"
MOVE = "expected device cpu, got meta; move it with .to('cpu')"
INT32 = "expected dtype int32, got {}; cast it with .to(torch.int32)"
UNIFIED, DISTINCT = "[pages, page_size, Hkv, D]", "[pages, Hkv, D / X, page_size, X] with X = 16 / element size"
RESHAPE = "reshape it, or pass layout='{}'"
ROWS = "one row for each of q's, one head for each of the caches'"
NUMBER = "{}: expected a finite number, at least 0, got {}; pass another {}"
STARTS = "it holds one value more than context_lens: request r's rows are cu_seqlens_q[r]:cu_seqlens_q[r + 1]"
CACHES = (
    "expected dtype float32, as q, k and v, or float8_e4m3fn, got {}; allocate the caches in one of these, or "
    "cast q, k and v"
)

# ---------------------------------------------------------------------- attention


def good_call(**settings: Any) -> PagedCall:
    """R 3, T 27, Hq 4, Hkv 2, D 16, pages of 16, fp32, every operand of prefix_full, a sink."""
    return make(PagedCase("prefix_full", lengths="chunks", sinks=True, **settings))


Changes = dict[str, Any]
"""By argument: a dtype or device to convert it to, the sizes of a new tensor, or any other value in its place."""


def with_changes(arguments: dict[str, Any], changes: Changes) -> dict[str, Any]:
    arguments = dict(arguments)
    for name, value in changes.items():
        if isinstance(value, (torch.dtype, torch.device)):
            value = arguments[name].to(value)
        elif isinstance(value, tuple):
            value = arguments[name].new_zeros(value)
        arguments[name] = value
    return arguments


BAD_CALLS: dict[str, tuple[Changes, str]] = {
    "mode": ({"mode": "casual"}, f"mode: expected one of {MODES}, got 'casual'; pass one of these"),
    "impl": (
        {"impl": "flash"},
        "impl: expected one of 'triton', 'triton_grouped', 'triton_portable', got 'flash'; pass one of these",
    ),
    "shape-class": (
        {"shape_class": "prefill"},
        "shape_class: expected one of 'auto', 'decode', 'chunk', got 'prefill'; pass one of these",
    ),
    "layout": ({"layout": "paged"}, "layout: expected one of 'unified', 'distinct', got 'paged'; pass one of these"),
    "no-block": ({"block_size": 0}, "block_size: expected at least 1, got 0; it counts the tokens of a block"),
    "negative-window": (
        {"window": -1},
        "window: expected at least 0, got -1; it counts keys, the query's own included; 0 means no window",
    ),
    "q-rank": (
        {"q": (27, 64)},
        "q: expected 3 dimensions [T, Hq, D], got shape [27, 64]; split heads with q.view(T, Hq, D)",
    ),
    "q-fp64": ({"q": torch.float64}, "q: " + FLOATS.format("float64")),
    "q-int": ({"q": torch.int32}, "q: " + FLOATS.format("int32")),
    "q-heads": (
        {"q": (27, 3, 16)},
        "q: expected a head count divisible by the caches' 2, got 3; each KV head serves Hq / Hkv query heads",
    ),
    "q-head-dim": ({"q": (27, 4, 32)}, "q: expected the caches' head dim, 16, got 32; make caches for this head dim"),
    "cache-rank": (
        {"k_cache": (9, 2, 4, 16, 4)},
        f"k_cache: expected 4 dimensions {UNIFIED}, got shape [9, 2, 4, 16, 4]; " + RESHAPE.format("distinct"),
    ),
    "distinct-rank": (
        {"layout": "distinct"},
        f"k_cache: expected 5 dimensions {DISTINCT}, got shape [7, 16, 2, 16]; " + RESHAPE.format("unified"),
    ),
    "distinct-width": (
        {"layout": "distinct", "k_cache": (9, 2, 2, 16, 8), "v_cache": (9, 2, 16, 16)},
        f"k_cache: expected shape [9, 2, 4, 16, 4], got [9, 2, 2, 16, 8]; distinct caches are {DISTINCT}",
    ),
    "v-cache-shape": (
        {"v_cache": (7, 16, 1, 16)},
        f"v_cache: expected shape [7, 16, 2, 16], got [7, 16, 1, 16]; unified caches are {UNIFIED}",
    ),
    "cache-dtype": ({"k_cache": torch.bfloat16}, "k_cache: " + CACHES.format("bfloat16")),
    "cache-other-fp8": ({"k_cache": torch.float8_e5m2}, "k_cache: " + CACHES.format("float8_e5m2")),
    "caches-differ": (
        {"v_cache": FP8},
        "v_cache: expected k_cache's dtype, float32, got float8_e4m3fn; give both one dtype",
    ),
    "cache-device": ({"k_cache": META}, "k_cache: " + MOVE),
    "large-pages": (
        {"k_cache": (2, 257, 2, 16), "v_cache": (2, 257, 2, 16)},
        "page size: expected 1 to 256, got 257; make the pages smaller",
    ),
    "empty-pages": (
        {"k_cache": (2, 0, 2, 16), "v_cache": (2, 0, 2, 16)},
        "page size: expected 1 to 256, got 0; make the pages smaller",
    ),
    "no-kv-heads": (
        {"k_cache": (2, 16, 0, 16), "v_cache": (2, 16, 0, 16)},
        "KV heads: expected at least 1, got 0; pass caches of at least one KV head",
    ),
    "wide-heads": (
        {"k_cache": (2, 16, 2, 257), "v_cache": (2, 16, 2, 257), "q": (27, 4, 257)},
        "head dim: expected 1 to 256, got 257; split or pad the heads",
    ),
    "keys-alone": (
        {"v": None},
        "k, v: expected both new keys and new values, or neither, got no v; pass both, or None for both where they are "
        "in the caches already",
    ),
    "values-alone": (
        {"k": None},
        "k, v: expected both new keys and new values, or neither, got no k; pass both, or None for both where they are "
        "in the caches already",
    ),
    "k-rows": ({"k": (26, 2, 16)}, f"k: expected shape [27, 2, 16], got [26, 2, 16]; {ROWS}"),
    "v-heads": ({"v": (27, 4, 16)}, f"v: expected shape [27, 2, 16], got [27, 4, 16]; {ROWS}"),
    "k-dtype": ({"k": torch.float16}, "k: expected dtype float32, got float16; cast it with .to(torch.float32)"),
    "v-device": ({"v": META}, "v: " + MOVE),
    "starts": ({"cu_seqlens_q": (3,)}, f"cu_seqlens_q: expected shape [4], got [3]; {STARTS}"),
    "starts-dtype": ({"cu_seqlens_q": torch.int64}, "cu_seqlens_q: " + INT32.format("int64")),
    "starts-device": ({"cu_seqlens_q": META}, "cu_seqlens_q: " + MOVE),
    "contexts": ({"context_lens": (3, 1)}, "context_lens: expected shape [any], got [3, 1]; one length a request"),
    "contexts-dtype": ({"context_lens": torch.float32}, "context_lens: " + INT32.format("float32")),
    "valid": (
        {"valid_lens": torch.zeros(4, dtype=torch.int32)},
        "valid_lens: expected shape [3], got [4]; one length a request, as context_lens",
    ),
    "pages": (
        {"page_tables": (2, 5)},
        "page_tables: expected shape [3, any], got [2, 5]; one row a request, as many as context_lens has values",
    ),
    "pages-dtype": ({"page_tables": torch.int64}, "page_tables: " + INT32.format("int64")),
    "values-missing": (
        {"request_values": []},
        "request_values: expected 3 tensors, got 0; mode 'prefix_full' reads status, prefix, padded_prefix",
    ),
    "values-too-many": (
        {"mode": "causal"},
        "request_values: expected 0 tensors, got 3; mode 'causal' reads none",
    ),
    "values-of-the-hole": (
        {"mode": "causal", "prefix_hole": True},
        "request_values: expected 2 tensors, got 3; mode 'causal' with prefix_hole reads prefix, padded_prefix",
    ),
    "values-dtype": (
        {"request_values": [torch.zeros(3, dtype=torch.int32), torch.zeros(3), torch.zeros(3)]},
        "request_values (prefix): " + INT32.format("float32"),
    ),
    "values-shape": (
        {"request_values": [torch.zeros(n, dtype=torch.int32) for n in (3, 3, 1)]},
        "request_values (padded_prefix): expected shape [3], got [1]; one value a request",
    ),
    "sinks": ({"sinks": (2,)}, "sinks: expected shape [4], got [2]; one sink a query head"),
    "sinks-dtype": (
        {"sinks": torch.bfloat16},
        "sinks: expected dtype float32, got bfloat16; cast it with .to(torch.float32)",
    ),
    "scale-without-fp8": (
        {"k_scale": torch.ones(1)},
        "k_scale: expected None for a float32 cache, got a tensor; scales go with float8_e4m3fn caches",
    ),
    "negative-cap": ({"softcap": -1.0}, NUMBER.format("softcap", -1.0, "softcap")),
    "nan-cap": ({"softcap": math.nan}, NUMBER.format("softcap", "nan", "softcap")),
    "negative-scale": ({"scale": -0.5}, NUMBER.format("scale", -0.5, "scale")),
    "infinite-scale": ({"scale": math.inf}, NUMBER.format("scale", "inf", "scale")),
    "schedule-dtype": (
        {"schedule": torch.zeros(3)},
        "schedule: " + INT32.format("float32"),
    ),
}  # fmt: skip
on_bad_calls = pytest.mark.parametrize("changes, message", BAD_CALLS.values(), ids=BAD_CALLS)


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs is a failure of its own."""

    def ran(*_: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(cpu, "attention", ran)
    monkeypatch.setattr(cpu, "store", ran)


def test_the_good_call_is_good() -> None:
    call = good_call()
    assert call.q.shape == (27, 4, 16) and call.k_cache.shape == (7, 16, 2, 16) and call.requests == 3
    for changes in ({}, {"sinks": None, "scale": 0.0}, {"k": None, "v": None}, {"schedule": torch.zeros(5).int()}):
        OPS.paged_attention(**with_changes(vars(call), changes))


@on_bad_calls
@pytest.mark.usefixtures("no_kernel")
def test_bad_calls_are_refused(changes: Changes, message: str) -> None:
    arguments = with_changes(vars(good_call()), changes)
    for name in ("paged_attention", "paged_attention_reference"):
        with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
            getattr(OPS, name)(**arguments)
        assert str(error.value) == f"lowered_attn::{name}: {message}"


def faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, list):
        return [faked(mode, v) for v in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "changes, message",
    # Fakes of two devices torch refuses by itself.
    [pytest.param(*bad, id=name) for name, bad in BAD_CALLS.items() if META not in bad[0].values()],
)
def test_fakes_refuse_the_same(changes: Changes, message: str) -> None:
    arguments = with_changes(vars(good_call()), changes)
    with FakeTensorMode() as mode, pytest.raises(ValueError) as error:
        OPS.paged_attention(**{name: faked(mode, value) for name, value in arguments.items()})
    assert str(error.value) == f"lowered_attn::paged_attention: {message}"


def test_compiled_calls_are_refused_while_tracing() -> None:
    torch._dynamo.reset()
    arguments = dict(vars(good_call()))
    q = arguments.pop("q")
    traced = torch.compile(lambda q: OPS.paged_attention(q, **arguments), backend="aot_eager", fullgraph=True)
    # Dynamo wraps the error in one of its own.
    with pytest.raises(Exception, match="paged_attention: q: expected a head count divisible by the caches' 2, got 3"):
        traced(q[:, :3])


def test_fp8_caches_take_scales_of_one_value_each() -> None:
    call = good_call(fp8=True)
    OPS.paged_attention(**vars(call))
    for value, got in (
        (torch.ones(2), "shape [1], got [2]; one scale"),
        (torch.ones(1).half(), "dtype float32, got float16"),
    ):
        with pytest.raises(ValueError) as error:
            OPS.paged_attention(**{**vars(call), "v_scale": value})
        assert f"v_scale: expected {got}" in str(error.value)


def test_head_dims_that_cuda_kernels_do_not_take_are_refused_there_only() -> None:
    caches = empty_caches("unified", CacheSizes(2, 4, 1, 12), torch.float32)
    q, starts, lens, pages = torch.zeros(1, 1, 12), torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1, 1)
    ints = [t.int() for t in (starts, lens, pages)]
    OPS.paged_attention(q, q, q, *caches, *ints, None, [])
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from inductor_passes.pretend_gpu import pretend_gpu

    with pretend_gpu("sm_90"), FakeTensorMode():
        q, *rest = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (q, *caches, *ints))
        with pytest.raises(
            ValueError, match="head dim: expected a multiple of 8 on CUDA, got 12; pad the heads, or use"
        ):
            OPS.paged_attention(q, q, q, *rest, None, [])


# ---------------------------------------------------------------------- schedule and store

BAD_SCHEDULES: dict[str, tuple[Changes, str]] = {
    "mode": ({"mode": "x"}, f"mode: expected one of {MODES}, got 'x'; pass one of these"),
    "layout": ({"layout": "x"}, "layout: expected one of 'unified', 'distinct', got 'x'; pass one of these"),
    "starts": ({"cu_seqlens_q": (5,)}, f"cu_seqlens_q: expected shape [4], got [5]; {STARTS}"),
    "values": (
        {"request_values": []},
        "request_values: expected 3 tensors, got 0; mode 'prefix_full' reads status, prefix, padded_prefix",
    ),
    "tokens": ({"num_tokens": -1}, "num_tokens: expected at least 0, got -1; pass the rows of q, padding included"),
    "heads": (
        {"num_heads": 3},
        "num_heads: expected a multiple of num_kv_heads, 2, got 3; each KV head serves Hq / Hkv query heads",
    ),
    "page-size": ({"page_size": 0}, "page size: expected 1 to 256, got 0; make the pages smaller"),
    "dtype": ({"dtype": torch.int8}, "dtype: expected float32, float16 or bfloat16, got int8; pass q's dtype"),
    "cache-dtype": (
        {"cache_dtype": torch.float16},
        "cache_dtype: expected float32 or float8_e4m3fn, got float16; pass the caches' dtype",
    ),
}


@pytest.mark.parametrize("changes, message", BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_bad_schedules_are_refused(changes: Changes, message: str) -> None:
    arguments = vars(ScheduleCall.of(good_call()))
    # A dtype here is a value, and no tensor to convert.
    tensors = {n: v for n, v in changes.items() if isinstance(v, tuple)}
    arguments = {**with_changes(arguments, tensors), **{n: v for n, v in changes.items() if n not in tensors}}
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        OPS.paged_schedule(**arguments)
    assert str(error.value) == f"lowered_attn::paged_schedule: {message}"


BAD_STORES: dict[str, tuple[Changes, str]] = {
    "k-rank": (
        {"k": (6, 32)},
        "k: expected 3 dimensions [T, Hkv, D], got shape [6, 32]; split heads with k.view(T, Hkv, D)",
    ),
    "k-dtype": ({"k": torch.float64}, "k: " + FLOATS.format("float64")),
    "v-dtype": ({"v": torch.float16}, "v: expected dtype float32, got float16; cast it with .to(torch.float32)"),
    "v-rows": (
        {"v": (5, 2, 16)},
        "v: expected shape [6, 2, 16], got [5, 2, 16]; one head for each of the caches', k and v alike",
    ),
    "heads": (
        {"k": (6, 4, 16)},
        "k: expected shape [6, 2, 16], got [6, 4, 16]; one head for each of the caches', k and v alike",
    ),
    "slots-dtype": (
        {"slot_mapping": torch.int32},
        "slot_mapping: expected dtype int64, got int32; cast it with .to(torch.int64)",
    ),
    "slots": ({"slot_mapping": (7,)}, "slot_mapping: expected shape [6], got [7]; one slot a row of k, -1 for none"),
    "cache-dtype": ({"k_cache": torch.float16}, "k_cache: " + CACHES.format("float16")),
    "layout": ({"layout": "x"}, "layout: expected one of 'unified', 'distinct', got 'x'; pass one of these"),
    "scale": (
        {"v_scale": torch.ones(1)},
        "v_scale: expected None for a float32 cache, got a tensor; scales go with float8_e4m3fn caches",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_STORES.values(), ids=BAD_STORES)
@pytest.mark.usefixtures("no_kernel")
def test_bad_stores_are_refused(changes: Changes, message: str) -> None:
    new, caches = torch.randn(6, 2, 16), empty_caches("unified", CacheSizes(3, 4, 2, 16), torch.float32)
    good = {"k": new, "v": new, "k_cache": caches[0], "v_cache": caches[1], "slot_mapping": torch.arange(6)}
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        OPS.store_kv_cache(**with_changes(good, changes))
    assert str(error.value) == f"lowered_attn::store_kv_cache: {message}"


# ---------------------------------------------------------------------- values, in debug mode


def good_values() -> dict[str, Any]:
    """Three requests on 8 pages of 4 tokens: 5 cached and 3 new, 0 and 2 (1 valid), 9 and 0; two rows of padding."""
    return {
        "num_tokens": 7,
        "num_pages": 8,
        "page_size": 4,
        "cu_seqlens_q": torch.tensor([0, 3, 5, 5]).int(),
        "context_lens": torch.tensor([5, 0, 9]).int(),
        "page_tables": torch.tensor([[3, 1, -1], [2147480000, -1, -1], [0, 7, 2]]).int(),
        "valid_lens": torch.tensor([3, 1, 0]).int(),
        "slot_mapping": torch.tensor([5, 6, 7, 20, -1, -1, -1]),
    }


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_VALUES: dict[str, tuple[Changes, str]] = {
    "first": (
        {"cu_seqlens_q": int32(1, 3, 5, 5)},
        "cu_seqlens_q[0]: expected 0, got 1; the first request's rows are the first of q",
    ),
    "decreasing": (
        {"cu_seqlens_q": int32(0, 3, 2, 5)},
        "cu_seqlens_q[2]: expected at least 3, the value before, got 2; request 1 cannot have -1 new tokens: sum up "
        "the lengths",
    ),
    "past-q": (
        {"cu_seqlens_q": int32(0, 3, 8, 9)},
        "cu_seqlens_q[2]: expected at most 7, the rows of q, got 8; request 1 ends past q: pad q, or drop the request",
    ),
    "negative-context": (
        {"context_lens": int32(5, -1, 9)},
        "context_lens[1]: expected at least 0, got -1; it counts the tokens that are cached",
    ),
    "too-many-valid": (
        {"valid_lens": int32(3, 3, 0)},
        "valid_lens[1]: expected 0 to 2, the new tokens of request 1, got 3; it counts the new tokens that are real",
    ),
    "negative-valid": (
        {"valid_lens": int32(-1, 1, 0)},
        "valid_lens[0]: expected 0 to 3, the new tokens of request 0, got -1; it counts the new tokens that are real",
    ),
    "too-long": (
        {"context_lens": int32(13, 0, 9)},
        "page_tables (request 0): expected at most 12 tokens: 3 pages of 4, got 13; give page_tables more columns",
    ),
    "page-id": (
        {"page_tables": torch.tensor([[3, 8, -1], [-1, -1, -1], [0, 7, 2]]).int()},
        "page_tables (request 0): expected page ids of 0 to 7 for its 5 tokens, got 8 at page_tables[0, 1]; give it a "
        "page before its tokens are stored",
    ),
    "cached-page-id": (
        {"direct": False},
        "page_tables (request 1): expected page ids of 0 to 7 for its 2 tokens, got 2147480000 at page_tables[1, 0]; "
        "give it a page before its tokens are stored",
    ),
    "slot-past": (
        {"slot_mapping": torch.tensor([5, 6, 7, 32, -1, -1, -1])},
        "slot_mapping[3] (request 1): expected -1, or 0 to 31, got 32; a slot is page * page_size + offset",
    ),
    "slot-below": (
        {"slot_mapping": torch.tensor([-2, 6, 7, 20, -1, -1, -1])},
        "slot_mapping[0] (request 0): expected -1, or 0 to 31, got -2; a slot is page * page_size + offset",
    ),
    "slot-twice": (
        {"slot_mapping": torch.tensor([5, 6, 7, 6, -1, -1, -1])},
        "slot_mapping[3] (request 1): expected a slot that comes once, got 6, also at row 1; two tokens would be "
        "stored in one place",
    ),
    "slot-of-padding": (
        {"slot_mapping": torch.tensor([5, 6, 7, 20, -1, -1, 9])},
        "slot_mapping[6] (padding): expected -1 past the last request, got 9; padding rows are not stored",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_named(changes: Changes, message: str) -> None:
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        check_values(**{**good_values(), **changes})
    assert str(error.value) == f"lowered_attn::check_values: {message}"


def test_good_values_pass() -> None:
    values = good_values()
    check_values(**values)
    check_values(**{n: v for n, v in values.items() if n not in ("valid_lens", "slot_mapping")})
    # A window of 2: the first page of request 0 (positions 0 to 3) is behind what its new tokens see, from 4 on.
    values["page_tables"][0, 0] = -1
    check_values(**values, window=2)
    with pytest.raises(ValueError, match=r"got -1 at page_tables\[0, 0\]"):
        check_values(**values, window=3)
    # A request without new tokens reads no page.
    check_values(**{**good_values(), "page_tables": torch.tensor([[3, 1, -1], [-1, -1, -1], [-1, -1, -1]]).int()})
    empty = {"cu_seqlens_q": int32(0), "context_lens": int32(), "page_tables": torch.zeros(0, 0).int()}
    check_values(num_tokens=0, num_pages=0, page_size=16, **empty, slot_mapping=torch.zeros(0).long())
