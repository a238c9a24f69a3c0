"""Metadata of block diffusion: blocks of tokens that are denoised together, behind a cached prefix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowered_attn.metadata import AttnMetaDataBase

PREFILLING, DECODING = 0, 1


@dataclass(kw_only=True, eq=False)
class BlockDiffusionMetaData(AttnMetaDataBase):
    """A request prefills its prompt, then denoises a block at a time; `mode` says what a new token sees.

    Request r has c = context_lens[r] cached and n new tokens, of which valid_lens[r] are real; its row i is token
    a = c + i, and B = block_size. It sees all cached tokens, and new tokens by mode:

    "plain"          all real ones
    "causal"         up to itself
    "block_causal"   up to the end of its own block: b < (a // B + 1) * B
    "prefix_full"    while prefilling, with P = prefix_lens[r] and P' = padded_prefix_lens[r] in new tokens: row i < P
                     sees new tokens j < P, row P <= i < P' sees j < P', and i >= P' as block_causal; while decoding,
                     as block_causal
    "prefix_causal"  while prefilling, up to itself; while decoding, as block_causal
    "cache_only"     none
    """

    valid_lens: Tensor | None = None
    """int32 [R]: how many of a request's new tokens are real; None = all. Rows past them return 0."""
    status: Tensor | None = None
    """int32 [R]: 0 = prefilling, 1 = decoding."""
    prefix_lens: Tensor | None = None
    """int32 [R]: P, the prompt's tokens."""
    padded_prefix_lens: Tensor | None = None
    """int32 [R]: P', the prompt's tokens with what pads its last block."""
    mode: str = "block_causal"
    """One of the modes above, or a registered one."""
    mask_prefix_hole: bool = False
    """Also hide the cached tokens P <= b < P' from everyone, with P and P' counted from the request's start."""

    @property
    def prefix_hole(self) -> bool:
        """Whether the cached tokens that pad the prompt are hidden."""
        return self.mask_prefix_hole

    def is_prefilling(self) -> Tensor:
        """bool [R]: by status; without it, whether nothing of the request is cached."""
        return super().is_prefilling() if self.status is None else self.status == PREFILLING
