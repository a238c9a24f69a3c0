"""Autoregressive decoding: a token a step and request, prompts read in chunks beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.serve.step import Chunk, MetaData, Request, StepTensors


class Autoregressive:
    """Greedy decoding under a causal mask. Every token is stored when it is first run.

    So attention may read new keys from the cache like all the others (`new_keys_in_cache`), which is faster.
    """

    name = "ar"
    logits_per_request = 1
    rows_per_decode = 1

    def __init__(self, new_keys_in_cache: bool = True) -> None:
        self.new_keys_in_cache = new_keys_in_cache

    def start(self, request: Request) -> None:
        """Begin `request`: nothing of it is cached."""
        request.tokens, request.cached = list(request.prompt), 0

    def total_tokens(self, request: Request) -> int:
        """Positions that `request` takes up in the cache when it is done; the last token never enters it."""
        return len(request.prompt) + request.max_new_tokens - 1

    def is_decoding(self, request: Request) -> bool:
        """Whether only the newest token is not in the cache yet."""
        return len(request.generated) > 0

    def chunk(self, request: Request, budget: int) -> Chunk | None:
        """What `request` runs next in at most `budget` rows: the rest of what is known, or a part of it."""
        tokens = request.tokens[request.cached : request.cached + budget]
        n = len(tokens)
        if n == 0:
            return None
        complete = request.cached + n == len(request.tokens)
        wanted = range(n - 1, n) if complete else range(0)
        return Chunk(request.cached, tokens, store=n, valid=n, logit_rows=wanted, decoding=self.is_decoding(request))

    def metadata(self, tensors: StepTensors) -> MetaData:
        """The metadata object of a bucket."""
        return tensors.causal(self.new_keys_in_cache)

    def choose(self, logits: Tensor) -> Tensor:
        """What is read back of the logits `[L, vocab]`: the likeliest token of each row, fp64 `[L, 1]` on the host."""
        return logits.argmax(-1, keepdim=True).double().cpu()

    def advance(self, request: Request, chunk: Chunk, chosen: Tensor) -> None:
        """Note what the step did; `chosen` has the rows of `choose` that are this request's."""
        request.cached += chunk.store
        if len(chunk.logit_rows):
            token = int(chosen[0, 0])
            request.tokens.append(token)
            request.generated.append(token)


def with_confidence(logits: Tensor, excluded: int) -> Tensor:
    """The likeliest token but `excluded` and its probability, for each row of `[L, vocab]`: fp64 `[L, 2]`, on the host.

    Both go back in one copy.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
    wide[:, excluded] = float("-inf")
    confidence, token = wide.softmax(-1).max(-1)
    return torch.stack((token.double(), confidence.double()), -1).cpu()
