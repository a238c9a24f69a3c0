"""What one step runs, and the tensors that carry it to the compiled model.

Strategies say what each request adds (`Chunk`), the scheduler puts chunks together (`Step`), and `StepTensors` writes
them down in tensors whose shapes are those of a `Bucket`: as many CUDA graphs as buckets, whatever the lengths.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowered_attn import BlockDiffusionMetaData, CausalMetaData
from tools.serve.model import CacheConfig

MetaData = CausalMetaData | BlockDiffusionMetaData


@dataclass
class Request:
    """A prompt, and what has become of it."""

    name: int
    prompt: list[int]
    max_new_tokens: int
    arrival: int = 0  # the step from which on it may run

    tokens: list[int] = field(default_factory=list)  # everything that is known, by position; a strategy starts it
    cached: int = 0  # tokens in the cache: positions 0 to cached - 1
    generated: list[int] = field(default_factory=list)
    block: list[int | None] = field(default_factory=list)  # block diffusion: the block at work, None = masked
    pages: list[int] = field(default_factory=list)
    table_row: int = -1  # its row of the scheduler's page tables while it runs
    reserved: int = 0  # pages that it may come to need

    @property
    def done(self) -> bool:
        """Whether all its tokens are there."""
        return len(self.generated) >= self.max_new_tokens


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request in one step. Token i sits at position `first + i`."""

    first: int  # tokens of the request in the cache before the step
    tokens: list[int]
    store: int  # the first `store` tokens go into the cache
    valid: int  # the first `valid` tokens are real, the others fill a block up
    logit_rows: range  # tokens whose logits are wanted
    decoding: bool  # False while the prompt is being read
    prefix: int = 0  # block diffusion: tokens of the prompt, from the request's start
    padded_prefix: int = 0  # the same, filled up to a whole block


@dataclass(frozen=True, order=True)
class Bucket:
    """Shapes of a step: `tokens` rows (T), `requests` (R), `logits` rows whose logits are computed (L)."""

    tokens: int
    requests: int
    logits: int


@dataclass(frozen=True)
class Step:
    """Chunks that run together, and the bucket that they fit."""

    parts: list[tuple[Request, Chunk]]
    bucket: Bucket

    @property
    def n_tokens(self) -> int:
        """New tokens of all requests, the bucket's padding left out."""
        return sum(len(chunk.tokens) for _, chunk in self.parts)

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How many requests decode, prefill from their start, and go on with a prompt begun before."""
        decoding = sum(chunk.decoding for _, chunk in self.parts)
        later = sum(not chunk.decoding and chunk.first > 0 for _, chunk in self.parts)
        return decoding, len(self.parts) - decoding - later, later


class PackedTensors:
    """Named tensors that lie in one allocation on the host and one on the device: one copy moves them all.

    They are no views of it for torch, only tensors over the same bytes: graph inputs like any other.
    """

    ALIGNMENT = 64  # bytes; Inductor copies an input that is not aligned to 16

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        offsets, end = {}, 0
        for name, (dtype, shape) in fields.items():
            offsets[name] = end
            size = dtype.itemsize * torch.Size(shape).numel()
            end += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)

        def over(memory: Tensor) -> dict[str, Tensor]:
            found = {}
            for name, (dtype, shape) in fields.items():
                strides = [torch.Size(shape[i + 1 :]).numel() for i in range(len(shape))]
                tensor = torch.empty(0, dtype=dtype, device=memory.device)
                start = offsets[name] // dtype.itemsize
                found[name] = tensor.set_(memory.untyped_storage(), start, shape, strides)
            return found

        self.host, self.device = over(self._host), over(self._device)

    def upload(self) -> None:
        """Send what `host` holds to `device`. Nothing waits for it: write `host` again only after the step's end."""
        self._device.copy_(self._host, non_blocking=True)


class StepTensors:
    """The model's inputs and the attention's metadata of one bucket, in place from step to step."""

    def __init__(self, bucket: Bucket, cache: CacheConfig, device: torch.device) -> None:
        self.bucket, self.cache = bucket, cache
        rows, requests = bucket.tokens, bucket.requests
        i32, i64 = torch.int32, torch.int64
        self._packed = PackedTensors(
            {
                "tokens": (i64, (rows,)),
                "positions": (i64, (rows,)),
                "slot_mapping": (i64, (rows,)),
                "logit_rows": (i64, (bucket.logits,)),
                "cu_seqlens_q": (i32, (requests + 1,)),
                "context_lens": (i32, (requests,)),
                "page_tables": (i32, (requests, cache.max_pages)),
                "valid_lens": (i32, (requests,)),
                "status": (i32, (requests,)),
                "prefix_lens": (i32, (requests,)),
                "padded_prefix_lens": (i32, (requests,)),
            },
            device,
        )
        self.on_device = self._packed.device
        self.on_host = self._packed.host

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `Decoder.forward` takes: tokens, positions and logit_rows."""
        return self.on_device["tokens"], self.on_device["positions"], self.on_device["logit_rows"]

    def upload(self) -> None:
        """Send what `on_host` holds to the device; see `PackedTensors.upload`."""
        self._packed.upload()

    def fill(self, step: Step | None, page_tables: Tensor | None = None) -> None:
        """Write `step` down and send it to the device; None is a warm-up: no request, no token, nothing stored.

        `page_tables` is int32 `[rows, max_pages]` on the host; a request's row is its `table_row`.
        """
        host, page_size = self.on_host, self.cache.page_size
        for name in ("tokens", "positions", "logit_rows", "context_lens", "valid_lens", "status", "prefix_lens",
                     "padded_prefix_lens", "cu_seqlens_q"):  # fmt: skip
            host[name].zero_()
        host["slot_mapping"].fill_(-1)
        host["page_tables"].fill_(-1)
        if step is None:
            self._packed.upload()
            return
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        for request, chunk in step.parts:
            first, n = chunk.first, len(chunk.tokens)
            logit_rows.extend(len(tokens) + row for row in chunk.logit_rows)
            tokens.extend(chunk.tokens)
            positions.extend(range(first, first + n))
            pages = request.pages
            slots.extend(pages[a // page_size] * page_size + a % page_size for a in range(first, first + chunk.store))
            slots.extend([-1] * (n - chunk.store))
        chunks = [chunk for _, chunk in step.parts]
        lengths = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
        columns = {
            "tokens": tokens,
            "positions": positions,
            "slot_mapping": slots,
            "logit_rows": logit_rows,
            "cu_seqlens_q": [0, *lengths],
            "context_lens": [chunk.first for chunk in chunks],
            "valid_lens": [chunk.valid for chunk in chunks],
            "status": [int(chunk.decoding) for chunk in chunks],
            "prefix_lens": [chunk.prefix for chunk in chunks],
            "padded_prefix_lens": [chunk.padded_prefix for chunk in chunks],
        }
        for name, values in columns.items():
            host[name][: len(values)] = torch.tensor(values, dtype=host[name].dtype)
        host["cu_seqlens_q"][len(chunks) :] = len(tokens)
        if page_tables is not None and chunks:
            rows = torch.tensor([request.table_row for request, _ in step.parts])
            host["page_tables"][: len(chunks)] = page_tables[rows]
        self._packed.upload()

    def causal(self, new_keys_in_cache: bool = False) -> CausalMetaData:
        """Metadata of autoregressive decoding, over this bucket's tensors."""
        return CausalMetaData(**self._shared(), new_keys_in_cache=new_keys_in_cache)

    def block_diffusion(self, mode: str, block_size: int, prefix_hole: bool) -> BlockDiffusionMetaData:
        """Metadata of block diffusion, over this bucket's tensors."""
        return BlockDiffusionMetaData(
            **self._shared(),
            valid_lens=self.on_device["valid_lens"],
            status=self.on_device["status"],
            prefix_lens=self.on_device["prefix_lens"],
            padded_prefix_lens=self.on_device["padded_prefix_lens"],
            block_size=block_size,
            mode=mode,
            mask_prefix_hole=prefix_hole,
        )

    def _shared(self) -> dict[str, Any]:
        names = ("cu_seqlens_q", "context_lens", "page_tables", "slot_mapping")
        static = {"page_size": self.cache.page_size, "kv_cache_layout": "unified"}
        return {name: self.on_device[name] for name in names} | static


def fits(bucket: Bucket, tokens: int, requests: int, logits: int) -> bool:
    """Whether a step of these sizes runs in `bucket`."""
    return tokens <= bucket.tokens and requests <= bucket.requests and logits <= bucket.logits


def smallest(buckets: list[Bucket], tokens: int, requests: int, logits: int) -> Bucket:
    """The bucket with the fewest rows that a step of these sizes fits; raises ValueError where none does."""
    fitting = [bucket for bucket in buckets if fits(bucket, tokens, requests, logits)]
    if not fitting:
        raise ValueError(
            f"step: expected at most the tokens, requests and logits of one of "
            f"{[dataclasses.astuple(b) for b in buckets]}, got {tokens, requests, logits}; add a larger bucket"
        )
    return min(fitting)
