"""What a Transformers layer attends to, said as a form instead of as a mask tensor.

Transformers asks a mask function once per kind of layer and hands what it returns to every layer's attention. Ours
returns a ``FormMask``: the form's name and its operands, none of them larger than ``[B, Lk]``. Which form it is follows
from the mask function that Transformers would apply to every pair of positions: it is called once, on a symbolic query
and a symbolic key that write down how they are compared. What it says beyond the forms is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lowered_attn.checks import fail

WHERE = "attn_implementation='lowered_attn'"
ELSEWHERE = "use attn_implementation='sdpa' or 'eager' for this model"


class FormMask(NamedTuple):
    """What the queries of a layer see, as a form and its operands; a layer's ``attention_mask``."""

    form: str
    """Name of a form in ``custom_ops.forms.FORMS``."""
    window: int | None = None
    """Latest keys that a query sees, its own included; None = all of them."""
    key_padding: Tensor | None = None
    """bool ``[B, Lk]``, True = hidden; None = no key is padding."""
    q_start: Tensor | None = None
    """int32 ``[B]``: the position of the first query among the keys; None = 0, with as many queries as keys."""
    query_starts: Tensor | None = None
    """int32 ``[B, Lq]``: the first key that each query sees, for packed sequences."""

    # generate() makes masks ahead and passes them as the model's attention_mask, which Transformers then asks how many
    # dimensions it has: 2 would mean key padding.
    @property
    def ndim(self) -> int:
        """Not 2: this is no padding mask."""
        return 4


class _Comparisons:
    """A conjunction of comparisons of a key's position with a query's, as a mask function puts them together."""

    device = None

    def __init__(
        self, lower: tuple[int, ...] = (), upper: tuple[int, ...] = (), everything: bool = False
    ) -> None:
        self.lower = lower
        """Numbers n of ``key - query > n``."""
        self.upper = upper
        """Numbers n of ``key - query <= n``."""
        self.everything = everything
        """Whether one of the terms says that every key is visible."""

    def __and__(self, other: _Comparisons) -> _Comparisons:
        everything = self.everything or other.everything
        return _Comparisons(self.lower + other.lower, self.upper + other.upper, everything)

    def to(self, device: object) -> _Comparisons:
        """Itself: and_masks moves what it joins."""
        return self


class _Query:
    """A query's position plus a number."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def __sub__(self, number: int) -> _Query:
        if not isinstance(number, int):
            raise TypeError("the distance of a query and a key, which no form reads")
        return _Query(self.shift - number)

    def __ge__(self, number: int) -> _Comparisons:
        """What bidirectional masks say for True: a position is never negative."""
        return _Comparisons(everything=True)

    def new_ones(self, shape: tuple[()], dtype: torch.dtype) -> _Comparisons:
        """True, which and_masks starts from."""
        return _Comparisons()


class _Key:
    """A key's position."""

    def __le__(self, query: _Query) -> _Comparisons:
        return _Comparisons(upper=(query.shift,))

    def __gt__(self, query: _Query) -> _Comparisons:
        return _Comparisons(lower=(query.shift,))


def form_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | FormMask | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> FormMask:
    """The mask of one kind of layer, for Transformers' ``AttentionMaskInterface``; no ``[Lq, Lk]`` tensor is made.

    The arguments are those of ``transformers.masking_utils.sdpa_mask``: the keys are at positions ``kv_offset`` to
    ``kv_offset + kv_length - 1``, the queries from ``q_offset`` on (a tensor without dimensions where the cache is
    static), and ``attention_mask`` bool ``[B, tokens]`` is False where a token is padding. ``mask_function(batch, head,
    query, key)`` is what Transformers would apply to every pair. ValueError for a mask that is none of the forms.
    """
    if isinstance(attention_mask, FormMask):  # made ahead, by generate()
        return attention_mask
    if use_vmap:
        _refuse("a mask function that the model adds (or_mask_function or and_mask_function)")
    whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if whole and _may_be_packed(mask_function, attention_mask, allow_is_causal_skip, config, keywords):
        starts = _starts(mask_function, batch_size, q_length, keywords.get("local_size"), device)
        return FormMask("causal_from", query_starts=starts)
    padding = _key_padding(attention_mask, q_length, kv_length, q_offset, kv_offset, allow_is_causal_skip)
    window, causal = _span(mask_function)
    if not causal:
        return FormMask("bidirectional", key_padding=padding)
    q_start = _q_start(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    return FormMask("full_self" if window is None else "sliding_self", window, padding, q_start)


def _span(mask_function: Callable[..., Any]) -> tuple[int | None, bool]:
    """The window of a mask function, None where it has none, and whether it is causal."""
    try:
        visible = mask_function(None, None, _Query(), _Key())
    except (AttributeError, TypeError):  # it reads a tensor, or compares in a way that no form does
        _refuse("chunks, blocks, a two-sided window, or a mask function that does more than compare positions")
    if visible.everything and not visible.lower and not visible.upper:
        return None, False
    if visible.everything or visible.upper != (0,) or len(visible.lower) > 1:
        _refuse(f"key - query in {visible.upper} at most and above {visible.lower}")
    return (-visible.lower[0] if visible.lower else None), True


def _may_be_packed(
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    config: Any,
    keywords: dict[str, Any],
) -> bool:
    """Whether Transformers may have joined ``mask_function`` with ``packed_sequence_mask_function``.

    It does where neither a cache nor an attention_mask is given, for position_ids that start again; in a graph, where
    it cannot look at them, for all. It joins by ``and_masks``, behind the causal function or the sliding one, and then
    allows no skip. The bidirectional functions, which are never packed, have a skip of their own; chunks are told by
    the config; whatever else is joined comes as an ``or_mask`` or with ``use_vmap``.
    """
    chunked = getattr(config, "attention_chunk_size", None) is not None
    bidirectional = "allow_is_bidirectional_skip" in keywords
    if attention_mask is not None or allow_is_causal_skip or chunked or bidirectional:
        return False
    return mask_function.__name__ == "and_mask"  # torch 2.11's Dynamo compares no longer name


def _starts(
    mask_function: Callable[..., Any], batch_size: int, length: int, window: int | None, device: torch.device | str
) -> Tensor:
    """int32 ``[B, S]``: the first key that each query sees, where packed sequences lie side by side."""
    batch = torch.arange(batch_size, device=device)[:, None]
    positions = torch.arange(length, device=device)[None]
    # A token that does not see the one before it begins a sequence, or has a window of 1.
    joined = mask_function(batch, torch.zeros_like(batch), positions, (positions - 1).clamp(min=0))
    begins = torch.where(joined.expand(batch_size, length), 0, positions).cummax(1).values
    starts = begins if window is None else torch.maximum(begins, positions - (window - 1))
    return starts.to(torch.int32)


def _key_padding(
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    may_skip: bool,
) -> Tensor | None:
    """bool ``[B, kv_length]``, True = hidden; None where nothing is padding, which is looked up outside graphs only."""
    if attention_mask is None:
        return None
    if may_skip and not torch.compiler.is_compiling() and attention_mask.all():
        if attention_mask.shape[1] >= q_offset + q_length:  # else later tokens count as padding
            return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:  # slots of a static cache that have no token yet
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return ~attention_mask[:, kv_offset : kv_offset + kv_length]


def _q_start(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor | None:
    """int32 ``[B]``: the position of the first query among the keys; None = 0, where queries and keys are the same."""
    start = q_offset - kv_offset
    if isinstance(start, Tensor):
        return start.to(device=device, dtype=torch.int32).expand(batch_size).contiguous()
    if start == 0 and q_length == kv_length:
        return None
    return torch.full((batch_size,), start, dtype=torch.int32, device=device)


def _refuse(got: str) -> NoReturn:
    fail(WHERE, "mask", "causal attention, with a window or without", got, ELSEWHERE)
