"""torch's `flex_attention`, with a block mask made from the form's mask.

On CUDA flex needs `torch.compile`: an eager call runs one compiled function, made at the first use and kept.
Under an outer `torch.compile` it is traced as it is. On a CPU an eager call runs flex's own eager path, which
builds every score.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from custom_ops.padding import clear_padded
from lowered_attn.backends.shared_values import by_value_head

NAME = "flex"
# tl.dot takes no smaller tile: flex's lowering raises below it on CUDA (torch 2.11 to 2.15).
LEAST_CUDA_HEAD_DIM = 16
# Flex's own tiling takes 262 to 459 KB of shared memory on sm_90 for values of 256 and 512.
WIDE_VALUES = {
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 8, "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 8, "bwd_num_stages": 1,
}  # fmt: skip
CPU_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reasons(
    form: Form, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, OperandValue], softcap: float = 0.0
) -> list[str]:
    """Return what flex_attention refuses about these inputs (torch 2.11 to 2.15)."""
    reasons = []
    if q.device.type == "cpu":
        if q.requires_grad or k.requires_grad or v.requires_grad:
            reasons.append(
                "flex_attention has no backward on a CPU, and q, k or v requires a gradient "
                "(torch.no_grad() leaves the output alone)"
            )
        if torch.compiler.is_compiling() and q.dtype not in CPU_COMPILED_DTYPES:
            reasons.append(f"compiled flex_attention takes float32, bfloat16 or float16 on a CPU, got {q.dtype}")
    elif q.device.type == "cuda":
        if min(q.shape[3], v.shape[3]) < LEAST_CUDA_HEAD_DIM:
            reasons.append(
                f"flex_attention takes head dims of at least {LEAST_CUDA_HEAD_DIM} on CUDA, "
                f"got {q.shape[3]} for q and k, {v.shape[3]} for v"
            )
    else:
        reasons.append(f"flex_attention is used on cpu and cuda only, got {q.device.type}")
    return reasons


def run(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, OperandValue],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Return [B, Hq, Lq, Dv] in q's dtype; rows that see nothing are 0."""
    if q.is_cuda and not torch.compiler.is_compiling():
        return _compiled()(form, q, k, v, operands, scale, softcap)
    return _flex(form, q, k, v, operands, scale, softcap)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, fullgraph=True)


def _flex(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, OperandValue],
    scale: float | None,
    softcap: float,
) -> Tensor:
    k, v = clear_padded(k, v, operands.get("key_padding"))  # type: ignore[arg-type]
    q_start = operands.get("q_start")
    mask_mod = form.mask.flex_mask_mod(operands, q_start if isinstance(q_start, Tensor) else None)
    # One mask for the whole batch where no tensor says how requests differ.
    batch = q.shape[0] if any(isinstance(value, Tensor) for value in operands.values()) else None
    block_mask = create_block_mask(mask_mod, batch, None, q.shape[2], k.shape[2], device=q.device)
    # Flex tiles by the keys' head dim alone, and needs more shared memory than there is where values are wider.
    tiling = WIDE_VALUES if q.is_cuda and v.shape[3] > max(q.shape[3], 128) else None

    def cap(score: Tensor, *indices: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    attend = functools.partial(
        flex_attention,
        score_mod=cap if softcap else None,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=tiling,
    )
    return by_value_head(attend, q, k, v)
