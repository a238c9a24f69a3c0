"""Metadata of serving steps: checks, lengths, pytrees, the fetch hook, and one compilation whatever the lengths."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from custom_ops.paged.masks import MODES, request_operand_names
from lowered_attn.block_diffusion import BlockDiffusionMetaData
from lowered_attn.metadata import (
    AttnMetaDataBase,
    CausalMetaData,
    fetch_attn_metadata,
    is_warming_up,
    reset_warming_up,
    set_debug,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)

PAGE = 4
TOKENS, REQUESTS, PAGES = 24, 3, 8
"""A bucket: rows, requests, and pages a request."""


@dataclass(kw_only=True, eq=False)
class UserMetaData(AttnMetaDataBase):
    """What a strategy writes: a mode, a tensor and a constant of its own."""

    mode = "prefix_causal"
    status: Tensor
    temperature: Tensor | None = None
    label: str = "user"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fields(new: tuple[int, ...] = (5, 0, 1), context: tuple[int, ...] = (0, 6, 7)) -> dict[str, Any]:
    """Fields of a step: each request has its own pages, and its new tokens lie in the next slots of those."""
    ends = torch.tensor((0, *new)).cumsum(0)
    tables = torch.arange(REQUESTS * PAGES, dtype=torch.int32).view(REQUESTS, PAGES)
    slots = [
        int(tables[r, a // PAGE]) * PAGE + a % PAGE
        for r in range(REQUESTS)
        for a in range(context[r], context[r] + new[r])
    ]
    return {
        "cu_seqlens_q": ends.int(),
        "context_lens": int32(*context),
        "page_tables": tables,
        "slot_mapping": torch.tensor([*slots, *[-1] * (TOKENS - len(slots))]),
        "page_size": PAGE,
    }


def random_fields(rng: random.Random) -> dict[str, Any]:
    return fields(*(tuple(rng.randrange(8) for _ in range(REQUESTS)) for _ in range(2)))


def diffusion_fields(rng: random.Random) -> dict[str, Any]:
    """Every value that any mode reads."""
    values = {name: int32(*(rng.randrange(4) for _ in range(REQUESTS))) for name in ("valid_lens", "prefix_lens")}
    status = int32(*(rng.randrange(2) for _ in range(REQUESTS)))
    return random_fields(rng) | values | {"status": status, "padded_prefix_lens": values["prefix_lens"] + 2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Neither a hook nor a mode outlives a test."""
    torch.compiler.reset()
    counters.clear()
    yield
    set_fetch_fn_for_attn_metadata(None)
    set_debug(False)
    reset_warming_up()


# ---------------------------------------------------------------------- lengths


def test_lengths_of_causal() -> None:
    metadata = CausalMetaData(**fields(new=(5, 2, 1), context=(0, 6, 7)))
    assert (metadata.num_requests, metadata.num_tokens) == (REQUESTS, TOKENS)
    assert metadata.new_lens.tolist() == [5, 2, 1]
    assert metadata.total_lens.tolist() == [5, 8, 8]
    assert metadata.prefill_lens.tolist() == [5, 0, 0]
    assert metadata.decode_lens.tolist() == [0, 2, 1]
    assert metadata.prefill_lens.dtype == metadata.decode_lens.dtype == torch.int32
    assert (metadata.mode, metadata.prefix_hole, metadata.valid_lens) == ("causal", False, None)


def test_status_says_which_requests_prefill() -> None:
    metadata = BlockDiffusionMetaData(**fields(new=(5, 2, 1), context=(0, 6, 7)), status=int32(1, 0, 1))
    assert metadata.prefill_lens.tolist() == [0, 2, 0]
    assert metadata.decode_lens.tolist() == [5, 0, 1]
    without = dataclasses.replace(metadata, status=None)
    assert without.prefill_lens.tolist() == [5, 0, 0]


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_request_values_are_in_the_order_of_the_op(mode: str, hole: bool) -> None:
    values = diffusion_fields(random.Random(0))
    metadata = BlockDiffusionMetaData(**values, mode=mode, mask_prefix_hole=hole)
    by_operand = {"status": "status", "prefix": "prefix_lens", "padded_prefix": "padded_prefix_lens"}
    expected = [values[by_operand[name]] for name in request_operand_names(mode, hole)]
    assert all(a is b for a, b in zip(metadata.request_values(), expected, strict=True))


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_q: expected a tensor of int32, got list"),
        ({"cu_seqlens_q": torch.zeros(4)}, "cu_seqlens_q: expected dtype int32, got float32"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens_q: expected shape \[R \+ 1\]"),
        ({"context_lens": torch.zeros(3, dtype=torch.int64)}, "context_lens: expected dtype int32, got int64"),
        ({"context_lens": int32(1, 2)}, r"context_lens: expected shape \[3\].*got shape \[2\]"),
        ({"page_tables": int32(1, 2, 3)}, r"page_tables: expected shape \[3, any\].*got shape \[3\]"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int32)}, "slot_mapping: expected dtype int64, got int32"),
        ({"slot_mapping": torch.zeros(4, 1, dtype=torch.int64)}, r"slot_mapping: expected shape \[any\]"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32, device="meta")}, "context_lens: expected device cpu"),
        ({"page_size": 0}, "page_size: expected an int of at least 1, got 0"),
        ({"page_size": 512}, "page_size: expected at most 256, got 512"),
        ({"block_size": 0}, "block_size: expected an int of at least 1"),
        ({"kv_cache_layout": "paged"}, "kv_cache_layout: expected 'unified' or 'distinct', got 'paged'"),
        ({"mode": "diagonal"}, "mode: expected one of .*'block_causal'.*, got 'diagonal'"),
        ({"mode": "prefix_full", "status": int32(0, 0, 0)}, "prefix_lens: .*mode 'prefix_full' reads it"),
        ({"mask_prefix_hole": True}, "prefix_lens: .*'block_causal' with its prefix hole reads it"),
        ({"valid_lens": int32(1)}, r"valid_lens: expected shape \[3\]"),
        (
            {"status": torch.zeros(3, dtype=torch.bool), "mode": "prefix_causal"},
            "status: expected dtype int32, got bool",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"BlockDiffusionMetaData: {message}"):
        BlockDiffusionMetaData(**(fields() | change))


def test_mode_must_be_set() -> None:
    with pytest.raises(NotImplementedError, match="AttnMetaDataBase: mode: expected one of plain, causal"):
        AttnMetaDataBase(**fields())


def test_checks_read_no_value() -> None:
    """Values on a device that holds none: reading one would raise."""
    values = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in fields().items()}
    metadata = CausalMetaData(**values)
    assert metadata.decode_lens.shape == (REQUESTS,)


# ---------------------------------------------------------------------- pytrees and copies


def test_leaves_are_the_tensors_that_are_there() -> None:
    metadata = UserMetaData(**fields(), status=int32(0, 1, 1))
    leaves, spec = pytree.tree_flatten(metadata)
    names = ["cu_seqlens_q", "context_lens", "page_tables", "slot_mapping", "status"]
    assert [id(leaf) for leaf in leaves] == [id(getattr(metadata, name)) for name in names]
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is UserMetaData
    assert vars(again) == vars(metadata)
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(metadata)[0]]
    assert keys == [f".{name}" for name in names]


def test_equal_structure_is_equal_constants() -> None:
    def spec(**constants: Any) -> pytree.TreeSpec:
        return pytree.tree_structure(BlockDiffusionMetaData(**random_fields(random.Random(1)), **constants))

    assert spec() == spec()
    assert spec(block_size=4) != spec()
    assert spec(mode="plain") != spec()


def test_tree_map_may_change_what_the_leaves_are() -> None:
    metadata = CausalMetaData(**fields())
    shapes = pytree.tree_map(lambda t: tuple(t.shape), metadata)
    assert shapes.page_tables == (REQUESTS, PAGES)
    assert shapes.page_size == PAGE


def test_a_class_that_is_no_dataclass_is_an_error() -> None:
    class Forgotten(CausalMetaData):
        scores: Tensor | None = None

    with pytest.raises(TypeError, match="Forgotten: expected a dataclass, got fields .scores.*@dataclass"):
        Forgotten(**fields())


def test_a_subclass_that_only_overrides_needs_no_decorator() -> None:
    class Plain(CausalMetaData):
        mode = "plain"

    assert len(pytree.tree_leaves(Plain(**fields()))) == 4


def test_a_subclass_with_slots_is_a_pytree() -> None:
    @dataclass(kw_only=True, slots=True)
    class Slotted(CausalMetaData):
        extra: Tensor | None = None

    metadata = pytree.tree_map(lambda t: t + 1, Slotted(**fields(), extra=int32(1)))
    assert metadata.extra.tolist() == [2]


def test_a_tensor_in_a_static_field_is_an_error() -> None:
    @dataclass(kw_only=True)
    class Wrong(CausalMetaData):
        extra: Any = None

    with pytest.raises(ValueError, match="extra: expected no tensor in a static field.*annotate it: extra: Tensor"):
        Wrong(**fields(), extra=int32(1))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(duplicate: Callable[[UserMetaData], UserMetaData]) -> None:
    metadata = UserMetaData(**fields(), status=int32(0, 1, 1), label="other")
    again = duplicate(metadata)
    assert type(again) is UserMetaData
    for field in dataclasses.fields(metadata):
        ours, theirs = getattr(metadata, field.name), getattr(again, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_to_moves_every_tensor_and_shares_what_is_there() -> None:
    metadata = UserMetaData(**fields(), status=int32(0, 1, 1))
    moved = metadata.to("meta")
    assert {leaf.device.type for leaf in pytree.tree_leaves(moved)} == {"meta"}
    assert metadata.to("cpu").page_tables is metadata.page_tables


def test_without_tokens_has_the_same_shapes_and_stores_nothing() -> None:
    metadata = UserMetaData(**fields(), status=int32(0, 1, 1), temperature=torch.ones(3))
    warm_up = metadata.without_tokens()
    assert pytree.tree_structure(warm_up) == pytree.tree_structure(metadata)
    assert [t.shape for t in pytree.tree_leaves(warm_up)] == [t.shape for t in pytree.tree_leaves(metadata)]
    assert (warm_up.slot_mapping == -1).all()
    assert (warm_up.page_tables == -1).all()
    assert not warm_up.total_lens.any()
    assert not warm_up.temperature.any()


# ---------------------------------------------------------------------- the hook and the switches


def test_without_a_hook_the_message_says_how_to_set_one() -> None:
    with pytest.raises(RuntimeError, match="got none; set it once.*set_fetch_fn_for_attn_metadata"):
        fetch_attn_metadata()


def test_a_hook_must_return_metadata() -> None:
    set_fetch_fn_for_attn_metadata(lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="expected an AttnMetaDataBase from the hook, got NoneType"):
        fetch_attn_metadata()
    with pytest.raises(ValueError, match="fn: expected a function without arguments"):
        set_fetch_fn_for_attn_metadata(CausalMetaData(**fields()))  # type: ignore[arg-type]


def test_a_hook_can_be_replaced_and_removed() -> None:
    first, second = CausalMetaData(**fields()), CausalMetaData(**fields())
    for metadata in (first, second):
        set_fetch_fn_for_attn_metadata(lambda metadata=metadata: metadata)
        assert fetch_attn_metadata() is metadata
    set_fetch_fn_for_attn_metadata(None)
    with pytest.raises(RuntimeError):
        fetch_attn_metadata()


def test_warming_up_is_a_switch() -> None:
    assert not is_warming_up()
    set_warming_up(True)
    assert is_warming_up()
    set_warming_up(False)
    assert not is_warming_up()
    set_warming_up(True)
    reset_warming_up()
    assert not is_warming_up()


# ---------------------------------------------------------------------- tracing


class Runner:
    """An engine's runner, which holds the step's metadata."""

    metadata: AttnMetaDataBase | None = None

    def fetch(self) -> AttnMetaDataBase:
        assert self.metadata is not None
        return self.metadata


_current: AttnMetaDataBase | None = None
_table: dict[str, AttnMetaDataBase] = {}


def by_method() -> tuple[Callable[[AttnMetaDataBase], None], Callable[[], Any]]:
    runner = Runner()
    return lambda m: setattr(runner, "metadata", m), runner.fetch


def by_closure() -> tuple[Callable[[AttnMetaDataBase], None], Callable[[], Any]]:
    runner = Runner()
    return lambda m: setattr(runner, "metadata", m), lambda: runner.metadata


def by_global() -> tuple[Callable[[AttnMetaDataBase], None], Callable[[], Any]]:
    return lambda m: globals().__setitem__("_current", m), lambda: _current


def by_dict() -> tuple[Callable[[AttnMetaDataBase], None], Callable[[], Any]]:
    return lambda m: _table.__setitem__("step", m), lambda: _table["step"]


def read_all(x: Tensor, metadata: AttnMetaDataBase) -> Tensor:
    """Everything that a forward may read of metadata."""
    lengths = metadata.prefill_lens * 2 + metadata.decode_lens * 3 + metadata.total_lens
    for value in (*metadata.request_values(), metadata.valid_lens):
        if value is not None:
            lengths = lengths + value
    numbers = metadata.page_size + metadata.block_size + metadata.num_requests + metadata.num_tokens
    named = len(metadata.mode) + metadata.prefix_hole + (metadata.kv_cache_layout == "unified")
    return x * lengths.sum() + metadata.page_tables.sum() + metadata.slot_mapping.sum() + numbers + named


class Layer(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return read_all(x, fetch_attn_metadata())


MAKERS: dict[str, Callable[[random.Random], AttnMetaDataBase]] = {
    "causal": lambda rng: CausalMetaData(**random_fields(rng)),
    "in_cache": lambda rng: CausalMetaData(**random_fields(rng), new_keys_in_cache=True),
    "diffusion": lambda rng: BlockDiffusionMetaData(
        **diffusion_fields(rng), mode="prefix_full", mask_prefix_hole=True, block_size=4
    ),
    "user": lambda rng: UserMetaData(**random_fields(rng), status=int32(0, 1, rng.randrange(2))),
}


@pytest.mark.parametrize("hook", [by_method, by_closure, by_global, by_dict])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_object_each_step_compiles_once(kind: str, hook: Callable) -> None:
    show, fetch = hook()
    set_fetch_fn_for_attn_metadata(fetch)
    counter, rng = CompileCounter(), random.Random(0)
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True)
    for step in range(20):
        metadata = MAKERS[kind](rng)
        show(metadata)
        set_warming_up(step < 3)
        x = torch.randn(4)
        torch.testing.assert_close(compiled(x), read_all(x, metadata))
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", MAKERS)
def test_metadata_may_be_an_argument_too(kind: str) -> None:
    counter, rng = CompileCounter(), random.Random(0)
    compiled = torch.compile(read_all, backend=counter, fullgraph=True)
    for _ in range(5):
        metadata, x = MAKERS[kind](rng), torch.randn(4)
        torch.testing.assert_close(compiled(x, metadata), read_all(x, metadata))
    assert counter.frame_count == 1


def test_without_dynamic_shapes_each_bucket_compiles_once() -> None:
    show, fetch = by_method()
    set_fetch_fn_for_attn_metadata(fetch)
    counter, rng = CompileCounter(), random.Random(0)
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=False)
    for tokens in (24, 32, 24, 40, 32, 24, 40):
        values = random_fields(rng)
        values["slot_mapping"] = torch.nn.functional.pad(values["slot_mapping"], (0, tokens - TOKENS), value=-1)
        show(CausalMetaData(**values))
        compiled(torch.randn(4))
    assert counter.frame_count == 3


def test_a_constant_that_changes_compiles_again() -> None:
    """What is static is baked in, so it must be guarded on: a stale block size would be a wrong mask."""
    show, fetch = by_method()
    set_fetch_fn_for_attn_metadata(fetch)
    compiled = torch.compile(Layer(), backend="eager", fullgraph=True)
    for block_size in (1, 4, 8):
        metadata = CausalMetaData(**fields(), block_size=block_size)
        show(metadata)
        x = torch.randn(4)
        torch.testing.assert_close(compiled(x), read_all(x, metadata))


def test_a_missing_hook_is_said_in_a_compiled_call() -> None:
    with pytest.raises(Exception, match="expected a function that gives the step's metadata"):
        torch.compile(Layer(), backend="eager", fullgraph=True)(torch.randn(4))
