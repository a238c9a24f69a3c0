"""Debug mode: what the tensors of metadata hold, which syncs with the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from custom_ops.paged import checks
from lowered_attn.checks import fail

if TYPE_CHECKING:
    from lowered_attn.metadata import AttnMetaDataBase

ANY_PAGES = 2**31 - 1
"""No cache has more pages, since page ids are int32: the bound where the caches are not known."""


def check_values(metadata: AttnMetaDataBase, num_pages: int | None, sliding_window: int | None) -> None:
    """Raise ValueError naming the first length, page id, slot or status that makes no sense, and a broken promise."""
    promised = metadata.new_keys_in_cache and metadata.mode != "cache_only"
    checks.check_values(
        num_tokens=metadata.num_tokens,
        num_pages=ANY_PAGES if num_pages is None else num_pages,
        page_size=metadata.page_size,
        cu_seqlens_q=metadata.cu_seqlens_q,
        context_lens=metadata.context_lens,
        page_tables=metadata.page_tables,
        valid_lens=metadata.valid_lens,
        slot_mapping=metadata.slot_mapping,
        direct=not promised,
        window=sliding_window or 0,
    )
    if promised:
        _check_promise(metadata)
    for name in metadata.request_fields:
        _check_request_value(metadata, name)


def _check_promise(metadata: AttnMetaDataBase) -> None:
    """Every valid new token has the slot that the page table gives its position."""
    tables, page_size = metadata.page_tables.cpu().long(), metadata.page_size
    starts, contexts = metadata.cu_seqlens_q.tolist(), metadata.context_lens.tolist()
    valids = metadata.new_lens if metadata.valid_lens is None else metadata.valid_lens
    slots = metadata.slot_mapping.cpu()
    for r, (start, context, valid) in enumerate(zip(starts, contexts, valids.tolist(), strict=False)):
        positions = torch.arange(context, context + valid)
        expected = tables[r, positions // page_size] * page_size + positions % page_size
        wrong = (slots[start : start + valid] != expected).nonzero()
        if len(wrong):
            i = int(wrong[0])
            fail(
                type(metadata).__name__,
                f"slot_mapping[{start + i}]",
                f"{int(expected[i])}, where new_keys_in_cache promises that token {context + i} of request {r} is",
                int(slots[start + i]),
                "store every new token in its own page, or leave new_keys_in_cache False",
            )


def _check_request_value(metadata: AttnMetaDataBase, name: str) -> None:
    """`status` is 0 or 1, a prefix is at most as long as with its padding; a strategy's own may be any number."""
    value: Tensor = getattr(metadata, name)
    if name == "status":
        highest, remedy = torch.ones_like(value), "0 = prefilling, 1 = decoding"
    elif name == "prefix_lens":
        padded: Tensor | None = getattr(metadata, "padded_prefix_lens", None)
        highest, remedy = value if padded is None else padded, "padded_prefix_lens counts the prefix and its padding"
    else:
        return
    for r, (number, most) in enumerate(zip(value.tolist(), highest.tolist(), strict=True)):
        if not 0 <= number <= most:
            fail(type(metadata).__name__, f"{name}[{r}]", f"0 to {most}", number, remedy)
