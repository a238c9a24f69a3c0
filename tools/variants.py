"""Who is measured: lowered-attn's ways of running a form, and its peers.

A new one is its function and its line in VARIANTS.

Everything that a user pays once (compiling, a block mask that does not depend on the data, another memory
layout) is done before the clock starts; everything that a user pays at every step is inside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from custom_ops.form import Form
from custom_ops.masks import OperandValue

PEERS = Path(os.environ.get("LOWERED_ATTN_PEERS", Path(__file__).resolve().parent.parent / ".peers")) / "peers.py"

P = TypeVar("P")
"""What a variant computes: a case with its tensors."""


class Unavailable(RuntimeError):
    """The variant cannot run on this machine or on these inputs; the message says why."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case's tensors, made once and shared by all variants."""

    form: Form
    query: Tensor
    """`[B, Hq, Lq, D]`."""
    key: Tensor
    """`[B, Hkv, Lk, D]`."""
    value: Tensor
    """`[B, Hkv, Lk, Dv]`."""
    operands: Mapping[str, OperandValue]
    """By the names of the form's op."""
    scale: float | None = None
    grad_out: Tensor | None = None
    """`[B, Hq, Lq, Dv]`, where the case times forward and backward together; else None."""

    @property
    def is_plain_causal(self) -> bool:
        """Whether a causal flag says all of the mask."""
        return self.form.name == "full_self" and not self.tensor_operands

    @property
    def is_unmasked(self) -> bool:
        """Whether every query sees every key."""
        return self.form.name == "bidirectional" and not self.tensor_operands

    @property
    def tensor_operands(self) -> dict[str, Tensor]:
        """The operands that are data: their values may change at every step."""
        return {name: value for name, value in self.operands.items() if isinstance(value, Tensor)}

    @property
    def groups_heads(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A variant ready to be timed."""

    run: Callable[[], Any]
    """What is timed."""
    outputs: Callable[[Any], tuple[Tensor, ...]] = lambda result: result
    """Makes `(out [B, Hq, Lq, Dv],)`, or `(out, dq, dk, dv)`, of what `run` returned; not timed. Of a paged case,
    `(out [T, Hq, D],)`."""
    written: tuple[Tensor, ...] = ()
    """What a run writes besides its result."""


@dataclasses.dataclass(frozen=True)
class Variant(Generic[P]):
    """A way to compute a case."""

    name: str
    """As typed after `--variants`."""
    title: str
    """As reports print it."""
    prepare: Callable[[P], Prepared]
    """Does what is paid once. Raises `Unavailable` with the reason where the variant cannot run."""
    ours: bool = False
    compiled: bool = False
    """Whether the first call compiles, so that its time is a compile time."""
    by_default: Callable[[P], bool] = lambda problem: True
    """Whether it is measured when no variants are named."""


def _forward_backward(problem: Problem, forward: Callable[[], Tensor]) -> Prepared:
    """`forward` alone, or with the gradients of q, k and v where the case has a backward pass."""
    upstream = problem.grad_out
    if upstream is None:
        return Prepared(lambda: (forward(),))
    inputs = (problem.query, problem.key, problem.value)

    def run() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, inputs, upstream))

    return Prepared(run)


# ------------------------------------------------------------------ ours


def _ours(problem: Problem) -> Prepared:
    return _forward_backward(problem, functools.partial(_call_op, problem, problem.query, problem.key, problem.value))


def _call_op(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    arguments = (problem.operands.get(name) for name in problem.form.operand_names)
    return problem.form.op(query, key, value, *arguments, scale=problem.scale)[0]


def _ours_compiled(problem: Problem, mode: str | None = None) -> Prepared:
    # The function that the name "lowered_attn" stands for: the name itself needs an installed package.
    from lowered_attn.compile import backend

    form, scale, names = problem.form, problem.scale, problem.form.operand_names

    def attend(query: Tensor, key: Tensor, value: Tensor, operands: dict[str, OperandValue]) -> Tensor:
        return form.op(query, key, value, *(operands.get(name) for name in names), scale=scale)[0]

    compiled = torch.compile(attend, backend=backend, mode=mode, fullgraph=True, dynamic=False)
    operands = dict(problem.operands)
    return _forward_backward(problem, lambda: compiled(problem.query, problem.key, problem.value, operands))


# ------------------------------------------------------------------ PyTorch's own


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn SDPA's finding no kernel into `Unavailable`, with the reasons it gives as warnings."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            reasons = [str(w.message).split(" (Triggered internally")[0].strip() for w in given]
            own = [r for r in reasons if r and "because" not in r and "runtime disabled" not in r]
            raise Unavailable("; ".join(own) or str(error)) from error


def _sdpa(problem: Problem, backend: str) -> Prepared:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = None
    if not (problem.is_plain_causal or problem.is_unmasked):
        mask = dense_mask(problem)
        if backend == "FLASH_ATTENTION":
            raise Unavailable("PyTorch's FlashAttention takes no mask")
    chosen = getattr(SDPBackend, backend)

    def forward() -> Tensor:
        with sdpa_kernel(chosen):
            return torch.nn.functional.scaled_dot_product_attention(
                problem.query,
                problem.key,
                problem.value,
                attn_mask=mask,
                is_causal=problem.is_plain_causal,
                scale=problem.scale,
                enable_gqa=problem.groups_heads,
            )

    with _refusals():
        forward()  # only to learn whether this backend takes these inputs
    return _forward_backward(problem, forward)


def dense_mask(problem: Problem) -> Tensor:
    """The case's mask as bool `[B or 1, 1, Lq, Lk]`, True = visible: what a user of SDPA has to build."""
    from custom_ops.reference import query_positions

    device = problem.query.device
    operands = {name: value for name, value in problem.operands.items() if name != "q_start"}
    positions = query_positions(problem.query, problem.operands)
    return problem.form.mask.dense(positions, torch.arange(problem.key.shape[2], device=device), operands)[:, None]


def _flex(problem: Problem, mode: str | None = None, mask_inside: bool = False) -> Prepared:
    """Compiled FlexAttention; with `mask_inside`, every call builds the block mask first, compiled too."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if mask_inside and not problem.tensor_operands:
        raise Unavailable("the mask does not depend on data: it is built once")
    start = problem.operands.get("q_start")
    operands = {name: value for name, value in problem.operands.items() if name != "q_start"}
    mask_mod = problem.form.mask.flex_mask_mod(operands, start)  # type: ignore[arg-type]
    batch, (query_len, key_len) = problem.query.shape[0], (problem.query.shape[2], problem.key.shape[2])
    build = torch.compile(create_block_mask, dynamic=False) if mask_inside else create_block_mask
    attend = torch.compile(flex_attention, mode=mode, dynamic=False)

    def block_mask() -> Any:
        requests = batch if problem.tensor_operands else None
        return build(mask_mod, requests, None, query_len, key_len, device=problem.query.device)

    built = None if mask_inside else block_mask()

    def forward() -> Tensor:
        return attend(
            problem.query,
            problem.key,
            problem.value,
            block_mask=block_mask() if built is None else built,
            scale=problem.scale,
            enable_gqa=problem.groups_heads,
        )

    return _forward_backward(problem, forward)


# ------------------------------------------------------------------ peers from elsewhere


@functools.cache
def peers() -> ModuleType:
    """The adapters in `.peers/peers.py` of this checkout, or in the folder that LOWERED_ATTN_PEERS names.

    Raises `Unavailable` where there are none.
    """
    if not PEERS.exists():
        raise Unavailable("no .peers/peers.py in this checkout")
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peers_with_fa3() -> ModuleType:
    """The adapters, FlashAttention-3 loaded. Raises `Unavailable` where it cannot be."""
    module = peers()
    try:
        module.fa3_op()
    except (OSError, module.Unavailable) as error:  # OSError: built for another torch or CUDA
        raise Unavailable(str(error)) from error
    return module


def _fa3(problem: Problem) -> Prepared:
    """FlashAttention-3, in the token-major layout that it wants, made outside the clock."""
    if problem.grad_out is not None:
        raise Unavailable("this build of FlashAttention-3 has no backward pass")
    if problem.form.name not in ("full_self", "sliding_self") or problem.tensor_operands:
        raise Unavailable("FlashAttention-3 has a causal flag and a window, and no other mask")
    if problem.scale is not None:
        raise Unavailable("the adapter of FlashAttention-3 takes no scale")
    module = peers_with_fa3()
    query, key, value = (t.transpose(1, 2).contiguous() for t in (problem.query, problem.key, problem.value))
    window = problem.operands.get("window")
    return Prepared(
        lambda: module.fa3_dense(query, key, value, causal=True, window=window),
        lambda out: (out.transpose(1, 2),),
    )


AUTOTUNE = "max-autotune-no-cudagraphs"

VARIANTS: dict[str, Variant[Problem]] = {
    variant.name: variant
    for variant in (
        Variant("ours-compiled", "lowered-attn, compiled", _ours_compiled, ours=True, compiled=True),
        Variant("ours-eager", "lowered-attn, eager", _ours, ours=True),
        Variant(
            "ours-autotuned",
            "lowered-attn, max-autotune",
            functools.partial(_ours_compiled, mode=AUTOTUNE),
            ours=True,
            compiled=True,
            by_default=lambda problem: False,
        ),
        Variant("fa3", "FlashAttention-3", _fa3),
        Variant("sdpa-cudnn", "SDPA, cuDNN", functools.partial(_sdpa, backend="CUDNN_ATTENTION")),
        Variant("sdpa-flash", "SDPA, flash", functools.partial(_sdpa, backend="FLASH_ATTENTION")),
        Variant("sdpa-efficient", "SDPA, efficient", functools.partial(_sdpa, backend="EFFICIENT_ATTENTION")),
        Variant("flex", "FlexAttention", _flex, compiled=True),
        Variant(
            "flex+mask",
            "FlexAttention + block mask",
            functools.partial(_flex, mask_inside=True),
            compiled=True,
            by_default=lambda problem: bool(problem.tensor_operands),
        ),
        Variant(
            "flex-autotuned",
            "FlexAttention, max-autotune",
            functools.partial(_flex, mode=AUTOTUNE),
            compiled=True,
            # It compiles and times every candidate, about 10 s for a forward on an H200. The default keeps Flex
            # from looking slower than it is: 0.24 ms against 1.09 ms without it for segment_cross.
            by_default=lambda problem: problem.grad_out is None,
        ),
    )
}
