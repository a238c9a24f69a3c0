"""Block diffusion: a block of tokens starts masked, a few steps unmask it, then it is committed to the cache.

A step runs a request's block `[B]` against its cached tokens and against itself, and stores nothing (slots -1): the
block will change. The tokens that are surest become known. When all are, the block's final keys and values enter the
cache in the same step that first runs the next block: rows 0 to B - 1 are the finished block and are stored, rows B to
2B - 1 are the next one.
"""

from __future__ import annotations

from torch import Tensor

from tools.serve.autoregressive import with_confidence
from tools.serve.step import Chunk, MetaData, Request, StepTensors

MODES = ("block_causal", "prefix_full", "prefix_causal")
"""How a prompt sees itself: in blocks, all of it, or causally. Generated blocks always see what is before their end."""


class BlockDiffusion:
    """Blocks of `block_size` tokens, unmasked in `denoise_steps` steps.

    A prompt that does not end with a block: its last tokens belong to the first block that is generated, where they
    are known from the start. With `prefix_hole` it is filled up to a whole block instead, run and cached with that
    filling, and the filling is hidden from whatever comes later.
    """

    name = "diffusion"

    def __init__(self, mask_token: int, mode: str = "block_causal", block_size: int = 4, denoise_steps: int = 2,
                 prefix_hole: bool = False) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}; pass another --prefix-mode")
        if not 1 <= denoise_steps <= block_size:
            raise ValueError(f"denoise_steps: expected 1 to {block_size}, got {denoise_steps}; every step unmasks some")
        self.mask_token, self.mode, self.block_size = mask_token, mode, block_size
        self.denoise_steps, self.prefix_hole = denoise_steps, prefix_hole

    @property
    def logits_per_request(self) -> int:
        """Rows of logits that a request may want in a step."""
        return self.block_size

    @property
    def rows_per_decode(self) -> int:
        """Rows that a decoding request may add to a step: the finished block and the next one."""
        return 2 * self.block_size

    def prefix(self, request: Request) -> tuple[int, int]:
        """How many tokens are read as the prompt, and how many rows that takes in whole blocks."""
        n, block = len(request.prompt), self.block_size
        return (n, -(-n // block) * block) if self.prefix_hole else (n // block * block,) * 2

    def start(self, request: Request) -> None:
        """Begin `request`: nothing of it is cached."""
        n, padded = self.prefix(request)
        request.tokens = request.prompt[:n] + [self.mask_token] * (padded - n)
        request.cached = 0
        request.block = self._new_block(request, known=request.prompt[n:])

    def total_tokens(self, request: Request) -> int:
        """Positions that `request` may take up in the cache."""
        return self.prefix(request)[1] + len(request.prompt[self.prefix(request)[0] :]) + request.max_new_tokens

    def is_decoding(self, request: Request) -> bool:
        """Whether its prompt has been read."""
        return request.cached >= self.prefix(request)[1]

    def chunk(self, request: Request, budget: int) -> Chunk | None:
        """What `request` runs next in at most `budget` rows; None where what it needs is not to be had in them."""
        prefix, padded = self.prefix(request)
        if not self.is_decoding(request):
            n = min(padded - request.cached, budget)
            if self.mode == "prefix_full" and n < padded:
                return None  # its first tokens see its last ones: all of it, or nothing
            if self.mode == "block_causal" or self.prefix_hole:
                n = n // self.block_size * self.block_size
            tokens = request.tokens[request.cached : request.cached + n]
            return Chunk(request.cached, tokens, n, n, range(0), False, prefix, padded) if n else None
        final = request.tokens[request.cached :]  # a finished block that is not in the cache yet, or nothing
        rows = len(final) + self.block_size
        if rows > budget:
            return None
        block = [self.mask_token if token is None else token for token in request.block]
        filling = [self.mask_token] * (self.block_size - len(block))
        wanted = range(len(final), len(final) + len(block))
        valid = len(final) + len(block)
        tokens = final + block + filling
        return Chunk(request.cached, tokens, len(final), valid, wanted, True, prefix, padded)

    def metadata(self, tensors: StepTensors) -> MetaData:
        """The metadata object of a bucket."""
        return tensors.block_diffusion(self.mode, self.block_size, self.prefix_hole)

    def choose(self, logits: Tensor) -> Tensor:
        """What is read back of the logits `[L, vocab]`: token and confidence of each row, fp64 `[L, 2]` on the host."""
        return with_confidence(logits, self.mask_token)

    def advance(self, request: Request, chunk: Chunk, chosen: Tensor) -> None:
        """Note what the step did; `chosen` has the rows of `choose` that are this request's."""
        request.cached += chunk.store
        if not chunk.decoding:
            return
        self.unmask(request.block, chosen[:, 0].long().tolist(), chosen[:, 1].tolist())
        if None in request.block:
            return
        n_known = len(request.prompt) - self.prefix(request)[0] if not request.generated else 0
        finished = [token for token in request.block if token is not None]
        request.generated.extend(finished[n_known:])
        request.tokens.extend(finished)
        request.block = self._new_block(request, known=[])

    def unmask(self, block: list[int | None], tokens: list[int], confidence: list[float]) -> None:
        """Make known the surest masked tokens of `block`, in place: a `denoise_steps`-th of a block, rounded up."""
        count = -(-self.block_size // self.denoise_steps)
        masked = [i for i, token in enumerate(block) if token is None]
        for i in sorted(masked, key=lambda i: -confidence[i])[:count]:
            block[i] = tokens[i]

    def _new_block(self, request: Request, known: list[int]) -> list[int | None]:
        """`known` tokens and masked ones, as many as the request still wants, at most a block."""
        wanted = request.max_new_tokens - len(request.generated)
        return [*known, *[None] * min(wanted, self.block_size - len(known))]
