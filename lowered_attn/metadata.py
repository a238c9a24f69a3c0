"""Metadata of a serving step: which rows belong to which request, and where keys lie in the paged cache.

An engine makes one metadata object a step and hands it out through a fetch hook, which `Attention.forward` reads.
Every tensor of it becomes an input of the compiled graph, so a new object with other lengths recompiles nothing; every
other field is a constant of the graph. R requests share the T rows of q, k and v of a step.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from custom_ops.paged.layout import LAYOUTS, PAGE_SIZES
from custom_ops.paged.masks import MODES, request_operand_names
from lowered_attn.checks import check_int, fail

# The operands of the built-in modes; another one has a field of its own name.
OPERAND_FIELDS = {"prefix": "prefix_lens", "padded_prefix": "padded_prefix_lens"}

Self = TypeVar("Self", bound="AttnMetaDataBase")


@dataclass(kw_only=True, eq=False)
class AttnMetaDataBase:
    """What attention has to know about a step; a strategy subclasses it in its own file.

    A subclass is decorated with `@dataclass(kw_only=True)`, sets `mode` and adds fields. A field whose annotation names
    Tensor is a graph input: it may hold other values every step. Any other field is static: the compiled graph is
    guarded on what it reads of it. Subclasses become pytrees by themselves; their leaves are the tensors. Shapes,
    dtypes and devices are checked when an object is made, without reading a value; `validate` reads the values.
    """

    cu_seqlens_q: Tensor
    """int32 [R + 1]: the new tokens of request r are rows cu_seqlens_q[r] to cu_seqlens_q[r + 1] of q; the first is 0,
    and rows from the last on pad the bucket."""
    context_lens: Tensor
    """int32 [R]: tokens cached before this step."""
    page_tables: Tensor
    """int32 [R, max_pages]: the page of tokens j * page_size to (j + 1) * page_size - 1 of request r at [r, j]. What
    lies past a request's length is never read: any number may stand there."""
    slot_mapping: Tensor
    """int64 [T]: where row t is stored, page * page_size + offset; -1 = not stored."""
    page_size: int
    """Tokens a page, 1 to 256."""
    block_size: int = 1
    """Tokens a block of the block-causal modes; blocks are counted from a request's start."""
    kv_cache_layout: str = "unified"
    """"unified" or "distinct": see `Attention`."""
    new_keys_in_cache: bool = False
    """The engine's promise that this step stores every new token that anyone sees, unchanged, in its request's own
    page: attention then reads the new keys there as well, which is faster. It needs caches of k's dtype; debug mode
    verifies it."""
    request_fields: tuple[str, ...] = dataclasses.field(init=False, repr=False)
    """Names of the tensors that the mode reads, in the op's order."""

    @property
    def mode(self) -> str:
        """Name of a mode in `custom_ops.paged.masks.MODES`; a subclass sets it, as `mode = "causal"` or as a field."""
        cls = type(self).__name__
        raise NotImplementedError(f"{cls}: mode: expected one of {', '.join(MODES)}, got none; set it in class {cls}")

    @property
    def prefix_hole(self) -> bool:
        """Whether cached keys prefix_lens <= b < padded_prefix_lens are hidden, counted from a request's start."""
        return False

    @property
    def valid_lens(self) -> Tensor | None:
        """int32 [R]: how many of a request's new tokens are real; None = all. Rows past them return 0."""
        return None

    def is_prefilling(self) -> Tensor:
        """bool [R]: whether a request prefills in this step; here, whether nothing of it is cached."""
        return self.context_lens == 0

    def request_values(self) -> list[Tensor]:
        """The tensors int32 [R] that the mode reads, in the order of `request_operand_names(mode, prefix_hole)`."""
        return [getattr(self, name) for name in self.request_fields]

    # ------------------------------------------------------------------ lengths; none of them syncs

    @property
    def num_requests(self) -> int:
        """R, the bucket's padding requests included."""
        return self.context_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, the bucket's padding rows included."""
        return self.slot_mapping.shape[0]

    @property
    def new_lens(self) -> Tensor:
        """int32 [R]: new tokens of each request."""
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    @property
    def total_lens(self) -> Tensor:
        """int32 [R]: cached and new tokens of each request."""
        return self.context_lens + self.new_lens

    @property
    def prefill_lens(self) -> Tensor:
        """int32 [R]: new tokens of the requests that prefill, 0 for the others."""
        return self.new_lens.masked_fill(~self.is_prefilling(), 0)

    @property
    def decode_lens(self) -> Tensor:
        """int32 [R]: new tokens of the requests that decode, 0 for the others."""
        return self.new_lens.masked_fill(self.is_prefilling(), 0)

    # ------------------------------------------------------------------ copies

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`; tensors that are there already are shared."""
        return pytree.tree_map(lambda t: t.to(device, non_blocking=non_blocking), self)

    def without_tokens(self: Self) -> Self:
        """A copy with the same shapes and no token: the warm-up of the graph that this object would run.

        Every slot and page id is -1 and every other tensor 0, so that nothing is stored and every row returns 0.
        """
        minus_one = ("page_tables", "slot_mapping")
        tensors: dict[str, Any] = {
            name: torch.full_like(value, -1 if name in minus_one else 0)
            for name in fields_of(type(self)).tensors
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **tensors)

    # ------------------------------------------------------------------ checks

    def __post_init__(self) -> None:
        cls = type(self)
        where, fields = cls.__name__, fields_of(cls)
        requests = self.cu_seqlens_q.shape[0] - 1 if isinstance(self.cu_seqlens_q, Tensor) else 0
        tokens = "T, a slot for each row of q"
        check_tensor(where, "cu_seqlens_q", self.cu_seqlens_q, torch.int32, (None,), "R + 1, with a 0 first")
        if requests < 0:
            fail(where, "cu_seqlens_q", "shape [R + 1]", "shape [0]", "start it with a 0")
        check_tensor(where, "context_lens", self.context_lens, torch.int32, (requests,), "R = len(cu_seqlens_q) - 1")
        check_tensor(where, "page_tables", self.page_tables, torch.int32, (requests, None), "R, max_pages")
        check_tensor(where, "slot_mapping", self.slot_mapping, torch.int64, (None,), tokens)
        check_int(where, "page_size", self.page_size, PAGE_SIZES[0])
        if self.page_size > PAGE_SIZES[1]:
            fail(where, "page_size", f"at most {PAGE_SIZES[1]}", self.page_size, "use smaller pages")
        check_int(where, "block_size", self.block_size, 1)
        if self.kv_cache_layout not in LAYOUTS:
            expected = " or ".join(map(repr, LAYOUTS))
            fail(where, "kv_cache_layout", expected, repr(self.kv_cache_layout), "name the layout of the caches")
        if self.mode not in MODES:
            remedy = "set a mode of that list, or add yours with custom_ops.paged.masks.register_mode"
            fail(where, "mode", f"one of {', '.join(map(repr, MODES))}", repr(self.mode), remedy)
        operands = request_operand_names(self.mode, self.prefix_hole)
        self.request_fields = tuple(OPERAND_FIELDS.get(name, name) for name in operands)
        for name in self.request_fields:
            if getattr(self, name, None) is None:
                reader = f"mode {self.mode!r}" + " with its prefix hole" * self.prefix_hole
                fail(where, name, "int32 [R]", None, f"{reader} reads it: pass it, or choose another mode")
        for name in (*self.request_fields, "valid_lens"):
            value = getattr(self, name)
            if value is not None:
                check_tensor(where, name, value, torch.int32, (requests,), "R = len(cu_seqlens_q) - 1")
        for name in fields.tensors:
            value = getattr(self, name)
            if value is not None and value.device != self.cu_seqlens_q.device:
                expected = f"device {self.cu_seqlens_q.device}, where cu_seqlens_q is"
                fail(where, name, expected, f"device {value.device}", "make all of them there, or call .to(device)")
        for name in fields.static:
            if isinstance(getattr(self, name), Tensor):
                fail(where, name, "no tensor in a static field", "a tensor", f"annotate it: {name}: Tensor")
        if _debug:
            self.validate(sliding_window=1)  # how far back the layers look is theirs to check

    def validate(self, num_pages: int | None = None, sliding_window: int | None = None) -> None:
        """Read the values, which syncs, and raise ValueError where they break a rule that kernels rely on.

        `num_pages`: pages of the caches; without it, page ids and slots have no upper bound. `sliding_window`: the
        longest of the layers' windows, None where a layer has none; pages behind it may have been freed.
        """
        from lowered_attn.metadata_values import check_values

        check_values(self, num_pages, sliding_window)

    # ------------------------------------------------------------------ pytree

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        _register(cls)


@dataclass(frozen=True)
class Fields:
    """Names of a metadata class's fields."""

    tensors: tuple[str, ...]
    """Graph inputs, the leaves of the pytree; a value may be None."""
    static: tuple[str, ...]
    """Constants of the graph."""


_FIELDS: dict[type, Fields] = {}


def fields_of(cls: type[AttnMetaDataBase]) -> Fields:
    """The fields of `cls` by their annotations; TypeError where the class was not made a dataclass."""
    if cls not in _FIELDS:
        _FIELDS[cls] = _read_fields(cls)
    return _FIELDS[cls]


def _read_fields(cls: type[AttnMetaDataBase]) -> Fields:
    own = {n for n, a in inspect.get_annotations(cls).items() if "ClassVar" not in str(a)}
    if missing := own - set(cls.__dataclass_fields__):
        raise TypeError(
            f"{cls.__name__}: expected a dataclass, got fields ({', '.join(sorted(missing))}) that are none; "
            f"write @dataclass(kw_only=True) above the class"
        )
    fields = dataclasses.fields(cls)
    tensors = tuple(f.name for f in fields if "Tensor" in str(f.type))
    return Fields(tensors, tuple(f.name for f in fields if f.name not in tensors))


def check_tensor(
    where: str, name: str, value: object, dtype: torch.dtype, sizes: tuple[int | None, ...], what: str
) -> None:
    """Raise ValueError unless `value` is a tensor of that dtype and shape; a size of None may be anything.

    `what` says in words what the sizes are. Nothing is read from the device. For subclasses' own fields too.
    """
    kind = str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor):
        fail(where, name, f"a tensor of {kind}", type(value).__name__, f"pass torch.tensor(..., dtype={dtype})")
    if value.dtype != dtype:
        fail(where, name, f"dtype {kind}", str(value.dtype).removeprefix("torch."), f"cast it with .to({dtype})")
    shape = tuple(value.shape)
    if len(shape) != len(sizes) or any(e is not None and g != e for g, e in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        fail(where, name, f"shape [{wanted}] ({what})", f"shape {list(shape)}", "make it that long: nothing broadcasts")


def _flatten(metadata: AttnMetaDataBase) -> tuple[list[Any], tuple]:
    fields = fields_of(type(metadata))
    given = tuple(name for name in fields.tensors if getattr(metadata, name) is not None)
    static = tuple((name, getattr(metadata, name)) for name in fields.static)
    return [getattr(metadata, name) for name in given], (given, static)


def _flatten_with_keys(metadata: AttnMetaDataBase) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple]:
    leaves, context = _flatten(metadata)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context


def _register(cls: type[AttnMetaDataBase]) -> None:
    """Make `cls` a pytree. Its fields are looked up at the first use: @dataclass runs after __init_subclass__."""

    def unflatten(leaves: Iterable[Any], context: tuple) -> AttnMetaDataBase:
        # Not through __init__: a tree_map may put anything in place of the tensors, which the checks would refuse.
        metadata = object.__new__(cls)
        given, static = context
        values = dict.fromkeys(fields_of(cls).tensors) | dict(zip(given, leaves, strict=True)) | dict(static)
        for name, value in values.items():
            object.__setattr__(metadata, name, value)
        return metadata

    pytree.register_pytree_node(
        cls,
        _flatten,
        unflatten,
        flatten_with_keys_fn=_flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


_register(AttnMetaDataBase)


@dataclass(kw_only=True, eq=False)
class CausalMetaData(AttnMetaDataBase):
    """Autoregressive decoding: prefill, chunked prefill and decode in any mix; a token sees all up to itself."""

    mode: ClassVar[str] = "causal"  # type: ignore[assignment,misc]


# ---------------------------------------------------------------------- the fetch hook

_fetch: Callable[[], AttnMetaDataBase] | None = None


def set_fetch_fn_for_attn_metadata(fn: Callable[[], AttnMetaDataBase] | None) -> None:
    """Set the function that gives the current step's metadata; None removes it.

    Set it once, before the first compiled call: the function itself is a constant of the graph, and what it returns is
    not. It is traced, so it may read a global, an attribute or a dict, but not a ContextVar before torch 2.15.
    """
    if fn is not None and not callable(fn):
        fail("set_fetch_fn_for_attn_metadata", "fn", "a function without arguments", repr(fn), "pass one, or None")
    global _fetch
    _fetch = fn


def fetch_attn_metadata() -> AttnMetaDataBase:
    """The current step's metadata. RuntimeError without a hook, TypeError where the hook returned something else."""
    if _fetch is None:
        raise RuntimeError(
            "fetch_attn_metadata: expected a function that gives the step's metadata, got none; set it once, before "
            "the model runs: lowered_attn.set_fetch_fn_for_attn_metadata(lambda: runner.metadata)"
        )
    metadata = _fetch()
    if not isinstance(metadata, AttnMetaDataBase):
        raise TypeError(
            f"fetch_attn_metadata: expected an AttnMetaDataBase from the hook, got {type(metadata).__name__}; make the "
            "step's metadata before the model runs (CausalMetaData, BlockDiffusionMetaData, or a subclass of your own)"
        )
    return metadata


# ---------------------------------------------------------------------- warm-up and debug mode

_warming_up = False
_debug = os.environ.get("LOWERED_ATTN_DEBUG", "0") not in ("", "0")


def set_warming_up(value: bool) -> None:
    """Say whether the runner is warming up. Nothing here reads it: a warm-up step is a step without tokens."""
    global _warming_up
    _warming_up = bool(value)


def is_warming_up() -> bool:
    """Whether the runner said that it is warming up. For the runner: in a compiled forward it would be a constant."""
    return _warming_up


def reset_warming_up() -> None:
    """End the warm-up: the same as set_warming_up(False)."""
    set_warming_up(False)


def set_debug(value: bool) -> None:
    """Check the values of all metadata, which syncs, from now on; the environment's LOWERED_ATTN_DEBUG=1 does so too.

    Every object is checked when it is made. Eager `Attention` also checks page ids and slots against its caches;
    compiled code never does: call `metadata.validate(num_pages)` before the step.
    """
    global _debug
    _debug = bool(value)


def is_debug() -> bool:
    """Whether debug mode is on."""
    return _debug
