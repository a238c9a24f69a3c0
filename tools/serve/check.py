"""Whether a step's logits are right: two more models with the same weights see the same tokens.

The reference is the model run eagerly with `attn_impl="reference"`, in the same dtype, with paged caches of its own.
The exact model computes in fp64 (fp32 on CUDA, whatever the dtype served) and keeps unpaged keys and values. The
compiled model may be `ERROR_RATIO` times as far from the exact one as the reference is, which makes the same roundings
in another order, plus `FLOOR` units in the last place.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tools.serve.dense import DenseAttention, DenseStep, MaskRules
from tools.serve.model import CacheConfig, Decoder, ModelConfig, attach_caches, paged, with_attention
from tools.serve.step import Step, StepTensors

ERROR_RATIO = 2.0
"""Times the reference's own error: how far two ways of rounding may lie apart."""
FLOOR = 8.0
"""Units of the dtype that an error may always have: where the reference happens to be exact, a sum in another order is
not. A key too many or too few in one row changes its logits by a hundred times as much in the model that tests use."""


@dataclass(frozen=True)
class LogitsError:
    """The worst row of a step: |logits - exact| / |exact|, in L2 norms over the vocabulary."""

    compiled: float
    reference: float
    allowed: float

    @property
    def of_allowed(self) -> float:
        """The compiled model's error as a multiple of what is allowed."""
        return self.compiled / self.allowed if self.allowed else math.inf

    @property
    def within(self) -> bool:
        """Whether that is at most 1 (false for NaN)."""
        return self.of_allowed <= 1


class LogitsCheck:
    """Runs the reference and the exact model beside a served one; call it once for every step, in order."""

    def __init__(self, model: Decoder, cache: CacheConfig, max_requests: int, rules: MaskRules) -> None:
        config, weight = model.config, model.embedding
        self.rules, self.dtype, self.device = rules, weight.dtype, weight.device
        self.reference = with_attention(model, paged("reference"))
        attach_caches(self.reference, cache, self.dtype, self.device)
        exact_dtype = torch.float32 if self.device.type == "cuda" else torch.float64
        history = (max_requests, cache.max_tokens, config.kv_heads, config.head_dim)
        self._current: dict[str, DenseStep] = {}

        def dense(config: ModelConfig, layer: int) -> nn.Module:
            scale = 1 / math.sqrt(config.head_dim)
            return DenseAttention(scale, history, exact_dtype, self.device, self._current)

        self.exact = with_attention(model, dense, exact_dtype)
        self.largest_reference_error = 0.0
        self.worst: LogitsError | None = None

    @torch.no_grad()
    def __call__(self, logits: Tensor, step: Step, tensors: StepTensors) -> LogitsError | None:
        """Compare `logits [L, vocab]` of `step`; None where it wants none. The caches are brought up to date anyway.

        The step's metadata must still be what the fetch hook returns.
        """
        rows = [request.table_row for request, _ in step.parts]
        self._current["step"] = DenseStep.of(tensors.on_host, rows, self.rules)
        reference, exact = self.reference(*tensors.inputs), self.exact(*tensors.inputs)
        wanted = sum(len(chunk.logit_rows) for _, chunk in step.parts)
        if wanted == 0:
            return None
        found, plain, true = (t[:wanted].to(exact.dtype) for t in (logits, reference, exact))
        size = true.norm(dim=-1)
        compiled, own = (((t - true).norm(dim=-1) / size).max().item() for t in (found, plain))
        # The largest so far: a step of few rows may happen to be one in which the reference erred little.
        self.largest_reference_error = max(self.largest_reference_error, own)
        allowed = ERROR_RATIO * self.largest_reference_error + FLOOR * torch.finfo(self.dtype).eps
        error = LogitsError(compiled, own, allowed)
        if self.worst is None or not error.of_allowed <= self.worst.of_allowed:
            self.worst = error
        return error

    def describe(self) -> str:
        """One line about the worst step."""
        if self.worst is None:
            return "no logits were compared"
        compiled, reference, allowed = dataclasses.astuple(self.worst)
        return f"largest error {compiled:.1e} (allowed {allowed:.1e}; the eager reference itself {reference:.1e})"
