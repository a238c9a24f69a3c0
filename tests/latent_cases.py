"""What the tests of latent attention share: ``tests.paged_cases`` with one KV head, whose keys are the latents.

What must not be read holds NaN there, and so it does here. Oracle and tolerance are those of any ``PagedCall``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from custom_ops.paged.call import LatentCall
from custom_ops.paged.latent import latent_call
from tests import paged_cases
from tests.paged_cases import PagedCase, moved

OPS = torch.ops.lowered_attn
SPLITS = ((512, 64), (64, 16), (32, 0), (48, 16))
"""Elements of the value and rotary elements behind them: DeepSeek's, small ones, none, no power of two."""


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """A call of latent attention by its sizes."""

    split: tuple[int, int]
    scale: float
    paged: PagedCase
    """Everything else, with the latents as the keys of one KV head."""

    def __str__(self) -> str:
        return f"split{'+'.join(map(str, self.split))}-{self.paged}"


def latent_case(
    *settings: Any, heads: int = 4, split: tuple[int, int] = (32, 16), scale: float = 0.2, **named: Any
) -> LatentCase:
    """The case of ``heads`` query heads; the other settings are ``PagedCase``'s."""
    return LatentCase(split, scale, PagedCase(*settings, heads=(heads, 1), head_dim=sum(split), **named))


def make(case: LatentCase, device: str = "cpu", placement: int = 0) -> LatentCall:
    """Random tensors of ``case``; ``placement`` as in ``tests.paged_cases.make``."""
    call = paged_cases.make(case.paged, placement=placement)
    fields = {name: value for name, value in vars(call).items() if name not in ("k", "v", "k_cache", "v_cache")}
    for absent in ("sinks", "k_scale", "v_scale", "layout"):
        fields.pop(absent)
    latent = None if call.k is None else call.k.squeeze(1)
    fields.update(latent=latent, latent_cache=call.k_cache.squeeze(2), value_dim=case.split[0], scale=case.scale)
    found = moved(latent_call(**fields), device)
    assert isinstance(found, LatentCall)
    return found


def arguments(call: LatentCall) -> dict[str, Any]:
    """Arguments of ``paged_latent_attention``, by name and in its order."""
    names = (
        "q", "latent", "latent_cache", "cu_seqlens_q", "context_lens", "page_tables", "valid_lens", "request_values",
        "schedule", "value_dim", "scale", "mode", "block_size", "window", "prefix_hole", "softcap", "impl",
        "shape_class",
    )  # fmt: skip
    latents = {"latent": None if call.k is None else call.k.squeeze(1), "latent_cache": call.k_cache.squeeze(2)}
    return {name: latents[name] if name in latents else getattr(call, name) for name in names}


def changed(call: LatentCall, **fields: Any) -> LatentCall:
    """``call`` with other arguments of the op."""
    return latent_call(**{**arguments(call), **fields})


def attend(call: LatentCall) -> tuple[Tensor, Tensor]:
    """The op."""
    return OPS.paged_latent_attention(**arguments(call))


def in_place_of_nan(call: LatentCall, garbage: float) -> LatentCall:
    """``call`` with ``garbage`` where it holds NaN."""
    held = {name: arguments(call)[name] for name in ("q", "latent", "latent_cache")}
    return changed(call, **{n: t.masked_fill(t.isnan(), garbage) for n, t in held.items() if t is not None})
