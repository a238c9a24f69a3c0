"""Latent attention on a CPU: values against fp64 and against the dense form, what must not be read, what must not be
copied, what torch expects of an op."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from custom_ops.forms import FORMS
from custom_ops.paged.call import IMPLS, LatentCall
from custom_ops.paged.latent import latent_call
from custom_ops.paged.masks import MODES
from custom_ops.paged.reference import reference_attention_of
from custom_ops.paged.schedule import ScheduleCall, config_of
from custom_ops.reference import reference_attention
from tests.helpers import pairwise
from tests.latent_cases import SPLITS, LatentCase, arguments, attend, changed, in_place_of_nan, latent_case, make
from tests.paged_cases import LENGTHS, assert_as_exact_as_the_reference, oracle
from tests.test_op_protocol import assert_same_metadata, check, compiled
from tests.test_ops import allocations

OPS = torch.ops.lowered_attn
on_modes = pytest.mark.parametrize("mode", tuple(MODES))
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def cases() -> list[LatentCase]:
    """Every two settings together at least once."""
    factors = {
        "mode": tuple(MODES),
        "lengths": ("mixed", "ragged", "decode", "drafts", "chunks", "long", "nothing", "nobody"),
        "dtype": (torch.float32, torch.bfloat16, torch.float16),
        "page_size": (1, 3, 16, 64, 256),
        "direct": (True, False),
        "heads": (1, 3, 16, 63),
        "split": (*SPLITS, (1, 0), (7, 5), (128, 128)),
        "scale": (0.0, 0.07, 0.4),
        "window": (0, 1, 9),
        "prefix_hole": (False, True),
        "block_size": (1, 4, 32),
        "softcap": (0.0, 1.5),
    }
    return [latent_case(**row) for row in pairwise(factors)]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_values_are_as_exact_as_the_reference(case: LatentCase) -> None:
    call = make(case)
    assert_as_exact_as_the_reference(*attend(call), call)


@on_dtypes
@pytest.mark.parametrize("lengths", ["drafts", "ragged"])
@on_modes
def test_every_mode_in_every_dtype(mode: str, lengths: str, dtype: torch.dtype) -> None:
    for direct in (True, False):
        call = make(latent_case(mode, dtype, lengths=lengths, direct=direct, window=11, prefix_hole=True))
        assert_as_exact_as_the_reference(*attend(call), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 3, 16, 63, 128])
def test_every_number_of_heads_at_deepseeks_sizes(heads: int, dtype: torch.dtype) -> None:
    for lengths in ("decode", "drafts"):
        call = make(latent_case(dtype=dtype, lengths=lengths, heads=heads, split=(512, 64), page_size=64, scale=0.07))
        assert_as_exact_as_the_reference(*attend(call), call)


# ---------------------------------------------------------------------- against other attention


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@on_modes
def test_it_is_attention_whose_values_are_the_first_elements_of_its_keys(mode: str, direct: bool, window: int) -> None:
    """Of the regular op, whose tests hold every mode against its definition."""
    for hole in (False, True):
        call = make(latent_case(mode, lengths="ragged", direct=direct, window=window, prefix_hole=hole))
        fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call) if f.name != "first_elements"}
        out, lse = OPS.paged_attention(**{**fields, "v": call.k, "v_cache": call.k_cache})
        latent_out, latent_lse = attend(call)
        torch.testing.assert_close(latent_out, out[..., : call.value_dim])
        torch.testing.assert_close(latent_lse, lse)
        assert (lse == -math.inf).any() and (lse > -math.inf).any()


def tokens_of(call: LatentCall, r: int) -> Tensor:
    """The latents of request r in order, ``[tokens, D]``."""
    start, stop = call.cu_seqlens_q[r : r + 2].tolist()
    stored = int(call.context_lens[r]) + (0 if call.direct else stop - start)
    position, page_size = torch.arange(stored), call.cache_sizes.page_size
    cached = call.k_cache[call.page_tables[r, position // page_size].long(), position % page_size, 0]
    return cached if call.k is None else torch.cat([cached, call.k[start:stop, 0]])


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("form", ["full_self", "sliding_self"])
def test_paged_equals_dense(form: str, direct: bool) -> None:
    window = {"window": 7} if form == "sliding_self" else {}
    case = latent_case(lengths="mixed", heads=6, split=(128, 64), direct=direct, **window)
    call = make(dataclasses.replace(case, paged=dataclasses.replace(case.paged, unseen=False)))
    out, lse = attend(call)
    for r in range(call.requests):
        rows = slice(*call.cu_seqlens_q[r : r + 2].tolist())
        key = tokens_of(call, r)[None, None]
        query = call.q[rows].transpose(0, 1)[None]
        operands = {**window, "q_start": call.context_lens[r : r + 1]}
        dense, dense_lse = reference_attention(
            query, key, key[..., : call.value_dim], FORMS[form], operands, call.scale, torch.float64
        )
        torch.testing.assert_close(out[rows], dense[0].transpose(0, 1).float())
        torch.testing.assert_close(lse[rows], dense_lse[0].t().float())


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_paged_equals_torchs_attention(split: tuple[int, int]) -> None:
    call = make(latent_case(lengths="drafts", heads=16, split=split, scale=0.07))
    out, _ = attend(call)
    valids = [valid for _, _, valid in LENGTHS["drafts"]]
    for r, (context, valid) in enumerate(zip(call.context_lens.tolist(), valids, strict=True)):
        rows = slice(int(call.cu_seqlens_q[r]), int(call.cu_seqlens_q[r]) + valid)
        key = tokens_of(call, r)[: context + valid].double()[None]
        query = call.q[rows].transpose(0, 1).double()
        visible = torch.arange(context + valid) <= torch.arange(context, context + valid)[:, None]
        dense = scaled_dot_product_attention(query, key, key[..., : split[0]], visible, scale=call.scale)
        torch.testing.assert_close(out[rows], dense.transpose(0, 1).float())


def test_one_pass_equals_steps_with_a_cache() -> None:
    """A prompt at once, then the same tokens stored in chunks and decoded token by token."""
    tokens, page_size, split = 21, 4, (48, 16)
    latents, q = torch.randn(tokens, sum(split)), torch.randn(tokens, 5, sum(split))
    cache = torch.full((7, page_size, sum(split)), math.nan)
    table = torch.tensor([[5, 0, 3, 6, 1, 2]], dtype=torch.int32)

    def step(first: int, stop: int, direct: bool) -> Tensor:
        new = latents[first:stop]
        position = torch.arange(first, stop)
        slots = table[0, position // page_size].long() * page_size + position % page_size
        lengths = [torch.tensor(x, dtype=torch.int32) for x in ([0, stop - first], [first])]
        if not direct:
            OPS.store_latent_cache(new, cache, slots)
        out, _ = OPS.paged_latent_attention(
            q[first:stop], new if direct else None, cache, *lengths, table, None, [], value_dim=split[0], scale=0.3
        )
        if direct:
            OPS.store_latent_cache(new, cache, slots)
        return out

    whole = step(0, tokens, True)
    for direct in (True, False):
        cache.fill_(math.nan)
        parts = [step(0, 9, direct), step(9, 16, direct), *(step(i, i + 1, direct) for i in range(16, tokens))]
        torch.testing.assert_close(torch.cat(parts), whole)


# ---------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"window": 5}, {"softcap": 2.0, "prefix_hole": True}], ids=str)
def test_what_lies_in_unused_memory_reaches_nothing(settings: dict[str, Any], dtype: torch.dtype) -> None:
    for direct in (True, False):
        call = make(latent_case("prefix_full", dtype, lengths="ragged", direct=direct, **settings))
        clean = attend(call)
        for garbage in (0.0, math.inf, 3e4):
            for a, b in zip(attend(in_place_of_nan(call, garbage)), clean, strict=True):
                assert torch.equal(a, b)


def test_pages_may_lie_anywhere() -> None:
    results = []
    for placement in range(3):
        torch.manual_seed(0)
        case = latent_case("block_causal", torch.bfloat16, page_size=3, lengths="drafts")
        results.append(attend(make(case, placement=placement)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_page_ids_that_no_row_needs_may_be_anything() -> None:
    # Behind a window of 4, whole pages of 3 tokens are seen by nobody: an engine may have given them away.
    call = make(latent_case(window=4, page_size=3, direct=False))
    clean = attend(call)
    for anything in (-1, 2147480000):
        freed = call.page_tables.clone()
        for r, context in enumerate(call.context_lens.tolist()):
            freed[r, : max(context - 3, 0) // 3] = anything
        assert not torch.equal(freed, call.page_tables)
        for run in (attend, reference_attention_of):
            torch.testing.assert_close(run(changed(call, page_tables=freed)), clean)


def test_strided_inputs_give_what_contiguous_ones_do() -> None:
    call = make(latent_case(heads=3, split=(32, 16)))
    given = arguments(call)
    rows, width = call.q.shape[0], 3 * 48
    fused = torch.cat([call.q.flatten(1), given["latent"], torch.full((rows, 5), math.nan)], 1)
    q, latent, _ = fused.split([width, 48, 5], 1)
    every_other = [torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0] for t in (latent, given["latent_cache"])]
    for fields in ({"latent": latent}, {"latent": every_other[0], "latent_cache": every_other[1]}):
        strided = changed(call, q=q.unflatten(1, (3, 48)), **fields)
        assert not strided.q.is_contiguous() and not strided.k.is_contiguous()
        results = attend(strided)
        assert all(t.is_contiguous() for t in results)
        torch.testing.assert_close(results, attend(call))  # products of other strides add up in another order


def test_all_implementations_are_the_same_on_a_cpu_and_two_runs_are_bitwise_equal() -> None:
    call = make(latent_case("block_causal", torch.bfloat16, lengths="long", heads=8))
    schedule = OPS.paged_schedule(**vars(ScheduleCall.of(call)))
    assert schedule.shape == (0,) and schedule.dtype == torch.int32
    first = attend(call)
    for impl in IMPLS:
        for a, b in zip(attend(changed(call, impl=impl, schedule=schedule, shape_class="decode")), first, strict=True):
            assert torch.equal(a, b)


def test_a_page_table_that_ends_too_early_is_refused_instead_of_read_past() -> None:
    call = make(latent_case(lengths="decode"))
    message = r"paged_latent_attention: page_tables \(request 0\): expected pages for 33 tokens, got 2 pages of 16; "
    with pytest.raises(ValueError, match=message):
        attend(changed(call, page_tables=call.page_tables[:, :2]))


def test_lengths_that_make_no_sense_read_no_foreign_memory() -> None:
    call = make(latent_case(lengths="chunks"))
    for fields in (
        {"cu_seqlens_q": torch.tensor([0, 8, 5, 2147480000], dtype=torch.int32)},
        {"context_lens": torch.tensor([-5, 0, 3], dtype=torch.int32)},
        {"valid_lens": torch.tensor([-5, 99, 2147480000], dtype=torch.int32)},
        {"page_tables": torch.full_like(call.page_tables, 2147480000)},
        {"page_tables": torch.full_like(call.page_tables, -7)},
    ):
        out, lse = attend(changed(call, **fields))
        assert out.shape == (*call.q.shape[:2], 32) and lse.shape == call.q.shape[:2]


# ---------------------------------------------------------------------- what must not be copied

HEADS, CACHED, SPLIT = 128, 4096, (512, 64)
LATENTS = CACHED * sum(SPLIT) * 4
"""Bytes of the cached latents in fp32: 9 MiB."""


def long_call(
    new: int, dtype: torch.dtype, mode: str, direct: bool, cached: int = CACHED, split: tuple[int, int] = SPLIT
) -> LatentCall:
    """One request, pages of 64 tokens."""
    pages = cached // 64
    width = sum(split)
    return latent_call(
        torch.randn(new, HEADS, width).to(dtype),
        torch.randn(new, width).to(dtype) if direct else None,
        torch.randn(pages, 64, width).to(dtype),
        torch.tensor([0, new], dtype=torch.int32),
        torch.tensor([cached - (0 if direct else new)], dtype=torch.int32),
        torch.randperm(pages, dtype=torch.int32)[None],
        None,
        [],
        value_dim=split[0],
        scale=0.07,
        mode=mode,
        softcap=30.0,
    )


@pytest.mark.parametrize("op", ["paged_latent_attention", "paged_latent_attention_reference"])
@pytest.mark.parametrize("mode", ["causal", "block_causal"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_copies_no_latent_for_each_head(
    dtype: torch.dtype, new: int, direct: bool, mode: str, op: str
) -> None:
    call = long_call(new, dtype, mode, direct)
    taken = allocations(lambda: getattr(OPS, op)(**arguments(call)))
    # One copy for each head would be 1.1 GiB in fp32, and 128 pieces of 9 MiB where it is made head by head. The
    # largest is the gathered latents; the scores of 3 tokens are 6 MiB, and the reference makes seven such.
    assert max(taken) <= LATENTS + (new * sum(SPLIT) * 4 if direct else 0)
    assert sum(taken) <= (10 if op.endswith("reference") else 4) * LATENTS


def test_values_are_read_out_of_the_latents() -> None:
    call = changed(make(latent_case(lengths="decode")))
    for keys, values in ((call.k, call.v), (call.k_cache, call.v_cache)):
        assert values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride() and values.shape[-1] == 32


def test_a_chunk_over_a_long_cache_takes_memory_by_its_length() -> None:
    call = long_call(32, torch.float32, "causal", True, cached=16384, split=(16, 8))
    # All scores at once are 128 heads * 32 * 16416 * 4 B = 257 MiB; a chunk's are 2**24 elements.
    assert max(allocations(lambda: attend(call))) <= 64 << 20
    two_heads = changed(call, q=call.q[:, :2])
    torch.testing.assert_close(attend(call)[0][:, :2], oracle(two_heads)[0].float())


# ---------------------------------------------------------------------- what torch expects of an op

PROTOCOL: dict[str, LatentCase] = {
    "plain": latent_case(),
    "everything": latent_case(
        "prefix_full", torch.bfloat16, lengths="ragged", direct=False, window=9, prefix_hole=True, softcap=2.0,
        impl="triton",
    ),
    "decode": latent_case(dtype=torch.float16, lengths="decode", heads=7, split=(32, 0), padding_rows=0),
    "nobody": latent_case(lengths="nobody", padding_rows=0),
}  # fmt: skip
on_protocol = pytest.mark.parametrize("case", PROTOCOL.values(), ids=PROTOCOL)


@on_protocol
def test_opcheck(case: LatentCase) -> None:
    # opcheck compares results with themselves, and NaN is not NaN: no poison here.
    call = in_place_of_nan(make(case), 0.0)
    for op in (OPS.paged_latent_attention.default, OPS.paged_latent_attention_reference.default):
        check(op, (), arguments(call))
    check(OPS.paged_schedule.default, (), vars(ScheduleCall.of(call)))


def test_the_schemas_are_the_documented_ones() -> None:
    expected = (
        "(Tensor q, Tensor? latent, Tensor latent_cache, Tensor cu_seqlens_q, Tensor context_lens, Tensor page_tables, "
        "Tensor? valid_lens, Tensor[]? request_values, Tensor? schedule=None, *, int value_dim, float scale, "
        'str mode="causal", int block_size=1, int window=0, bool prefix_hole=False, float softcap=0., '
        'str impl="triton_grouped", str shape_class="auto") -> (Tensor, Tensor)'
    )
    for name in ("paged_latent_attention", "paged_latent_attention_reference"):
        assert str(getattr(OPS, name).default._schema) == f"lowered_attn::{name}{expected}"
    assert str(OPS.store_latent_cache.default._schema) == (
        "lowered_attn::store_latent_cache(Tensor latent, Tensor(a!) latent_cache, Tensor slot_mapping) -> ()"
    )


def test_calls_are_made_from_the_arguments_of_the_op_and_their_defaults() -> None:
    schema = OPS.paged_latent_attention.default._schema.arguments
    parameters = list(inspect.signature(latent_call).parameters.values())
    assert parameters.pop().name == "op"
    assert [a.name for a in schema] == [p.name for p in parameters] == list(arguments(make(latent_case())))
    assert [a.kwarg_only for a in schema] == [p.kind is p.KEYWORD_ONLY for p in parameters]
    assert [a.default_value for a in schema if a.has_default_value()] == [
        p.default for p in parameters if p.default is not p.empty
    ]


@on_protocol
def test_fake_results_have_the_real_shapes_dtypes_and_strides(case: LatentCase) -> None:
    call = make(case)
    given = arguments(call)
    with FakeTensorMode() as mode:
        fields = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in given.items()}
        fields["request_values"] = [mode.from_tensor(t) for t in call.request_values]
        fakes = [getattr(OPS, f"paged_latent_attention{twin}")(**fields) for twin in ("", "_reference")]
        fake_schedule = OPS.paged_schedule(**vars(ScheduleCall.of(latent_call(**fields))))
    for fake in fakes:
        assert_same_metadata(fake, attend(call))
    assert_same_metadata([fake_schedule], [OPS.paged_schedule(**vars(ScheduleCall.of(call)))])


def test_reference_op_is_the_reference() -> None:
    call = make(latent_case("prefix_causal", torch.bfloat16, lengths="ragged"))
    results = OPS.paged_latent_attention_reference(**arguments(call))
    for a, b in zip(results, reference_attention_of(call), strict=True):
        assert torch.equal(a, b)
    assert_as_exact_as_the_reference(*results, call)


def test_gradients_are_refused_instead_of_wrong() -> None:
    call = make(latent_case())
    call.q.requires_grad_()
    for name in ("paged_latent_attention", "paged_latent_attention_reference"):
        out, _ = getattr(OPS, name)(**arguments(call))
        with pytest.raises(RuntimeError, match=f"{name}: expected no gradient through this op, got one; paged attent"):
            out.sum().backward()
    with torch.no_grad():
        assert not attend(call)[0].requires_grad


@pytest.mark.parametrize("name", ["paged_latent_attention", "paged_latent_attention_reference"])
def test_other_lengths_and_sizes_compile_once(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, *tensors: Tensor | None, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        settings = {"value_dim": 20, "scale": 0.2, "mode": "prefix_causal", "block_size": 4}
        return getattr(OPS, name)(q * 1, *tensors, values, **settings)

    traced = compiled(step, backend=counter, dynamic=True)
    # Sizes that are equal the first time are compiled as one: no two sizes of the first call are.
    for lengths, padding in (("ragged", 3), ("mixed", 5), ("long", 2), ("chunks", 4)):
        call = make(latent_case("prefix_causal", lengths=lengths, padding_rows=padding, heads=6, split=(20, 4)))
        n_valid = call.cu_seqlens_q.diff() if call.valid_lens is None else call.valid_lens
        tensors = list(arguments(call).values())[:6] + [n_valid]
        for a, b in zip(traced(*tensors, values=call.request_values), attend(call), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


LAZY = """
import sys, torch, custom_ops
cache, latent, q = torch.zeros(2, 4, 24), torch.randn(1, 24), torch.randn(1, 3, 24)
starts, lens, pages = torch.tensor([0, 1]).int(), torch.tensor([3]).int(), torch.zeros(1, 1).int()
torch.ops.lowered_attn.store_latent_cache(latent, cache, torch.tensor([3]))
attend = torch.ops.lowered_attn.paged_latent_attention
attend(q, None, cache, starts, lens, pages, None, [], value_dim=16, scale=0.1)
assert not {"triton", "torch.utils.flop_counter"} & set(sys.modules)
"""


def test_a_call_on_a_cpu_imports_no_triton(pytestconfig: pytest.Config) -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the schedule on a GPU


def test_a_schedule_of_other_sizes_is_refused_on_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton compiles the generated code")
    from inductor_passes.pretend_gpu import pretend_gpu

    call = make(latent_case(dtype=torch.bfloat16, heads=128, split=(512, 64), page_size=64))
    given = arguments(call)
    with pretend_gpu("sm_90"), FakeTensorMode():
        fields = {
            n: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t
            for n, t in given.items()
        }
        schedule_call = ScheduleCall.of(latent_call(**fields))
        assert schedule_call.value_dim == 512 and schedule_call.num_kv_heads == 1 and schedule_call.head_dim == 576
        schedule = OPS.paged_schedule(**vars(schedule_call))
        layout = config_of(schedule_call).schedule_layout(call.requests, call.q.shape[0])
        assert schedule.shape == (layout.size,)
        out, lse = OPS.paged_latent_attention(**{**fields, "schedule": schedule})
        assert out.shape == (*call.q.shape[:2], 512) and out.device.type == "cuda" and lse.dtype == torch.float32
        expected = rf"paged_latent_attention: schedule: expected {schedule.shape[0]} elements, got {len(schedule) - 1};"
        with pytest.raises(ValueError, match=expected):
            OPS.paged_latent_attention(**{**fields, "schedule": schedule[1:]})
