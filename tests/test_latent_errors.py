"""Bad calls of the latent ops: refused before any kernel runs, with what was expected, what came and the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_ops.paged.layout import FP8
from custom_ops.paged.schedule import ScheduleCall
from tests.latent_cases import arguments, latent_case, make
from tests.test_paged_errors import (
    ALL_MESSAGES,
    FLOATS,
    INT32,
    META,
    MODES,
    MOVE,
    NUMBER,
    STARTS,
    Changes,
    faked,
    no_kernel,  # noqa: F401  (a fixture)
    with_changes,
)

OPS = torch.ops.lowered_attn
CACHE_DTYPE = "expected dtype float32, got {}; keep latents in {}'s dtype: there are no 8-bit caches of latents"
CACHE_RANK = "expected 3 dimensions [pages, page_size, D], got shape {}; all heads share one latent a token"
VALUE_FIRST = "a latent holds its value first, then what is rotated"
PARTS = "expected 32 elements of the value and 0 to 128 rotary ones, got {}; " + VALUE_FIRST
ROWS = "one row for each of q's: the one latent that all heads share"
VALUES = "value_dim: expected 1 to 512, got {}; values are the first elements of latents"
PAGES = "page size: expected 1 to 256, got {}; make the pages smaller"
ON_CUDA = "expected a multiple of 16 on CUDA, got {}; pad the projections with zeros, or use a CPU"


def good_arguments() -> dict[str, Any]:
    """R 3, T 27, Hq 4, D 48, value_dim 32, pages of 16, fp32, every operand of prefix_full."""
    return arguments(make(latent_case("prefix_full", lengths="chunks")))


BAD_CALLS: dict[str, tuple[Changes, str]] = {
    "mode": ({"mode": "casual"}, f"mode: expected one of {MODES}, got 'casual'; pass one of these"),
    "impl": (
        {"impl": "flash"},
        "impl: expected one of 'triton', 'triton_grouped', 'triton_portable', got 'flash'; pass one of these",
    ),
    "no-block": ({"block_size": 0}, "block_size: expected at least 1, got 0; it counts the tokens of a block"),
    "negative-window": (
        {"window": -1},
        "window: expected at least 0, got -1; it counts keys, the query's own included; 0 means no window",
    ),
    "q-rank": (
        {"q": (27, 192)},
        "q: expected 3 dimensions [T, Hq, D], got shape [27, 192]; split heads with q.view(T, Hq, D)",
    ),
    "q-fp64": ({"q": torch.float64}, "q: " + FLOATS.format("float64")),
    "q-size": (
        {"q": (27, 4, 32)},
        "q: expected the cache's latent size, 48, got 32; project queries into the latent space, rotary elements "
        "behind the others",
    ),
    "cache-with-heads": (
        {"latent_cache": (7, 16, 1, 48)},
        "latent_cache: " + CACHE_RANK.format([7, 16, 1, 48]),
    ),
    "cache-dtype": ({"latent_cache": torch.bfloat16}, "latent_cache: " + CACHE_DTYPE.format("bfloat16", "q")),
    "cache-fp8": ({"latent_cache": FP8}, "latent_cache: " + CACHE_DTYPE.format("float8_e4m3fn", "q")),
    "cache-device": ({"latent_cache": META}, "latent_cache: " + MOVE),
    "large-pages": ({"latent_cache": (2, 257, 48)}, PAGES.format(257)),
    "empty-pages": ({"latent_cache": (2, 0, 48)}, PAGES.format(0)),
    "no-value": ({"value_dim": 0}, VALUES.format(0)),
    "negative-value": ({"value_dim": -16}, VALUES.format(-16)),
    "wide-value": (
        {"value_dim": 528, "q": (27, 4, 528), "latent": (27, 528), "latent_cache": (7, 16, 528)},
        VALUES.format(528),
    ),
    "value-past-the-latent": (
        {"value_dim": 49},
        "latent size: " + PARTS.replace("32", "49").format(48),
    ),
    "much-rotary": (
        {"q": (27, 4, 161), "latent": (27, 161), "latent_cache": (7, 16, 161)},
        "latent size: " + PARTS.format(161),
    ),
    "latent-rows": (
        {"latent": (26, 48)},
        "latent: expected shape [27, 48], got [26, 48]; " + ROWS,
    ),
    "latent-with-heads": (
        {"latent": (27, 1, 48)},
        "latent: expected shape [27, 48], got [27, 1, 48]; " + ROWS,
    ),
    "latent-dtype": (
        {"latent": torch.float16},
        "latent: expected dtype float32, got float16; cast it with .to(torch.float32)",
    ),
    "latent-device": ({"latent": META}, "latent: " + MOVE),
    "starts": ({"cu_seqlens_q": (3,)}, f"cu_seqlens_q: expected shape [4], got [3]; {STARTS}"),
    "contexts-dtype": ({"context_lens": torch.int64}, "context_lens: " + INT32.format("int64")),
    "pages": (
        {"page_tables": (2, 5)},
        "page_tables: expected shape [3, any], got [2, 5]; one row a request, as many as context_lens has values",
    ),
    "values-missing": (
        {"request_values": []},
        "request_values: expected 3 tensors, got 0; mode 'prefix_full' reads status, prefix, padded_prefix",
    ),
    "negative-cap": ({"softcap": -1.0}, NUMBER.format("softcap", -1.0, "softcap")),
    "negative-scale": ({"scale": -0.5}, NUMBER.format("scale", -0.5, "scale")),
    "nan-scale": ({"scale": math.nan}, NUMBER.format("scale", "nan", "scale")),
    "schedule-dtype": ({"schedule": torch.zeros(3)}, "schedule: " + INT32.format("float32")),
}  # fmt: skip
on_bad_calls = pytest.mark.parametrize("changes, message", BAD_CALLS.values(), ids=BAD_CALLS)


def test_the_good_call_is_good() -> None:
    given = good_arguments()
    assert given["q"].shape == (27, 4, 48) and given["latent_cache"].shape == (7, 16, 48)
    for changes in ({}, {"latent": None, "scale": 0.0}, {"value_dim": 48}, {"schedule": torch.zeros(5).int()}):
        OPS.paged_latent_attention(**with_changes(given, changes))


@on_bad_calls
@pytest.mark.usefixtures("no_kernel")
def test_bad_calls_are_refused(changes: Changes, message: str) -> None:
    given = with_changes(good_arguments(), changes)
    for name in ("paged_latent_attention", "paged_latent_attention_reference"):
        with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
            getattr(OPS, name)(**given)
        assert str(error.value) == f"lowered_attn::{name}: {message}"


@on_bad_calls
def test_fakes_refuse_what_kernels_refuse(changes: Changes, message: str) -> None:
    given = with_changes(good_arguments(), changes)
    with FakeTensorMode() as mode, pytest.raises(ValueError) as error:
        OPS.paged_latent_attention(**{n: faked(mode, v) for n, v in given.items()})
    assert str(error.value) == f"lowered_attn::paged_latent_attention: {message}"


def test_the_scale_is_never_guessed() -> None:
    given = good_arguments()
    del given["scale"]
    with pytest.raises(RuntimeError, match="missing value for argument 'scale'"):
        OPS.paged_latent_attention(**given)


@pytest.mark.parametrize(
    "width, value_dim, message",
    [(48, 24, f"value_dim: {ON_CUDA.format(24)}"), (40, 32, f"rotary elements: {ON_CUDA.format(8)}")],
    ids=["value", "rotary"],
)
def test_sizes_that_cuda_kernels_do_not_take_are_refused_there_only(width: int, value_dim: int, message: str) -> None:
    q, latent, cache = torch.zeros(1, 1, width), torch.zeros(1, width), torch.zeros(2, 4, width)
    ints = [t.int() for t in (torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1, 1))]
    settings = {"value_dim": value_dim, "scale": 0.1}
    OPS.paged_latent_attention(q, latent, cache, *ints, None, [], **settings)
    OPS.store_latent_cache(latent, cache, torch.tensor([3]))
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from inductor_passes.pretend_gpu import pretend_gpu

    with pretend_gpu("sm_90"), FakeTensorMode():
        on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (q, latent, cache, *ints)]
        with pytest.raises(ValueError) as error:
            OPS.paged_latent_attention(*on_gpu, None, [], **settings)
        assert str(error.value) == f"lowered_attn::paged_latent_attention: {message}"
        if width % 16:
            with pytest.raises(ValueError) as error:
                OPS.store_latent_cache(*on_gpu[1:3], torch.empty(1, dtype=torch.int64, device="cuda"))
            assert str(error.value) == f"lowered_attn::store_latent_cache: latent size: {ON_CUDA.format(width)}"


# ---------------------------------------------------------------------- schedule and store

BAD_SCHEDULES: dict[str, tuple[Changes, str]] = {
    "value": ({"value_dim": 0}, VALUES.format(0)),
    "size": ({"head_dim": 161}, "latent size: " + PARTS.format(161)),
    "kv-heads": (
        {"num_kv_heads": 2},
        "num_kv_heads: expected 1 with a value_dim, got 2; all heads share a latent",
    ),
    "layout": (
        {"layout": "distinct"},
        "layout: expected 'unified' with a value_dim, got 'distinct'; latents lie in one piece each",
    ),
    "cache-dtype": (
        {"cache_dtype": FP8},
        "cache_dtype: expected float32 with a value_dim, got float8_e4m3fn; keep latents in q's dtype",
    ),
    "heads": (
        {"num_heads": 0},
        "num_heads: expected a multiple of num_kv_heads, 1, got 0; each KV head serves Hq / Hkv query heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_bad_schedules_are_refused(changes: Changes, message: str) -> None:
    good = vars(ScheduleCall.of(make(latent_case("prefix_full", lengths="chunks"))))
    OPS.paged_schedule(**good)
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        OPS.paged_schedule(**{**good, **changes})
    assert str(error.value) == f"lowered_attn::paged_schedule: {message}"


BAD_STORES: dict[str, tuple[Changes, str]] = {
    "rank": (
        {"latent": (6, 1, 48)},
        "latent: expected 2 dimensions [T, D], got shape [6, 1, 48]; pass the one latent of each token, which has no "
        "heads",
    ),
    "dtype": ({"latent": torch.float64}, "latent: " + FLOATS.format("float64")),
    "size": ({"latent": (6, 32)}, "latent: expected the cache's latent size, 48, got 32; make a cache for this size"),
    "wide": (
        {"latent": (6, 641), "latent_cache": (3, 4, 641)},
        "latent size: expected 1 to 640, got 641; " + VALUE_FIRST,
    ),
    "cache-rank": ({"latent_cache": (3, 4, 1, 48)}, "latent_cache: " + CACHE_RANK.format([3, 4, 1, 48])),
    "cache-dtype": ({"latent_cache": FP8}, "latent_cache: " + CACHE_DTYPE.format("float8_e4m3fn", "latent")),
    "cache-device": ({"latent_cache": META}, "latent_cache: " + MOVE),
    "page-size": ({"latent_cache": (3, 300, 48)}, PAGES.format(300)),
    "slots-dtype": (
        {"slot_mapping": torch.int32},
        "slot_mapping: expected dtype int64, got int32; cast it with .to(torch.int64)",
    ),
    "slots": (
        {"slot_mapping": (7,)},
        "slot_mapping: expected shape [6], got [7]; one slot a row of latent, -1 for none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_STORES.values(), ids=BAD_STORES)
def test_bad_stores_are_refused(changes: Changes, message: str) -> None:
    cache = torch.full((3, 4, 48), 7.0)
    good = {"latent": torch.randn(6, 48), "latent_cache": cache, "slot_mapping": torch.arange(6)}
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        OPS.store_latent_cache(**with_changes(good, changes))
    assert str(error.value) == f"lowered_attn::store_latent_cache: {message}"
    assert (cache == 7).all()
