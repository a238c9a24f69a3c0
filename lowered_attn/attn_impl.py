"""Attention over a paged cache: the module that a served model holds, and the functions it chooses from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from custom_ops.checks import HEAD_DIMS
from custom_ops.kernels.paged_config import resolve_shape_class
from custom_ops.paged.layout import LAYOUTS
from lowered_attn.caches import own_storage
from lowered_attn.checks import check_int, fail
from lowered_attn.metadata import AttnMetaDataBase, fetch_attn_metadata, is_debug

ATTN_IMPLS = ("reference", "triton", "triton_grouped")


class Attention(nn.Module):
    """Attention of one layer of a served model: stores the step's keys and values, then attends through the cache.

    `num_heads` query heads share `num_kv_heads` KV heads of `head_dim` elements. Scores are multiplied by `scale`, None
    meaning 1 / sqrt(head_dim); with `softcap`, s becomes softcap * tanh(s / softcap). With `sliding_window`, a token
    sees that many latest ones, itself included. With `use_sinks`, the fp32 parameter `sinks` [num_heads] holds one more
    logit a head, whose value is 0. `attn_impl` names the CUDA kernel: "triton_grouped", a program for all query heads
    of a KV head; "triton", a program a query head; both take one path on a CPU. "reference" is readable, slow and
    syncs, on every device. Nothing falls back to another one.

    Inference only: run it under torch.no_grad() or torch.inference_mode(). ValueError for sizes that do not fit.
    """

    k_cache: Tensor | None
    """Pages of keys, assigned by the engine: q's dtype or float8_e4m3fn; [pages, page_size, num_kv_heads, head_dim]
    ("unified") or [pages, num_kv_heads, head_dim / x, page_size, x] with x = 16 / element size ("distinct")."""
    v_cache: Tensor | None
    """Pages of values: k_cache's shape ("unified") or [pages, num_kv_heads, head_dim, page_size] ("distinct")."""
    k_scale: Tensor | None
    """fp32 [1]: a key of an fp8 cache is the cache's value times this; None = 1."""
    v_scale: Tensor | None
    """fp32 [1], the same for values."""
    sinks: nn.Parameter | None
    """fp32 [num_heads]: a logit a head whose value is 0; None without use_sinks."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float | None,
        num_kv_heads: int,
        attn_impl: str = "triton_grouped",
        sliding_window: int | None = None,
        *,
        softcap: float | None = None,
        use_sinks: bool = False,
    ) -> None:
        super().__init__()
        where = "Attention"
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
            check_int(where, name, value, 1)
        if head_dim > HEAD_DIMS[1]:
            fail(where, "head_dim", f"at most {HEAD_DIMS[1]}", head_dim, "split the heads")
        if num_heads % num_kv_heads:
            expected = f"a divisor of num_heads = {num_heads}"
            fail(where, "num_kv_heads", expected, num_kv_heads, "each KV head serves num_heads / num_kv_heads heads")
        if attn_impl not in ATTN_IMPLS:
            expected = f"one of {', '.join(map(repr, ATTN_IMPLS))}"
            fail(where, "attn_impl", expected, repr(attn_impl), "pass an available attn_impl")
        check_numbers(where, scale, sliding_window, softcap)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.attn_impl = attn_impl
        self.sliding_window = sliding_window
        self.softcap = softcap
        # Buffers have static addresses in a compiled graph: a cache that is written to is then no reason to skip CUDA
        # graphs. They belong to the engine and to no checkpoint.
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            self.register_buffer(name, None, persistent=False)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(num_heads)) if use_sinks else None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; a cache that is part of a larger allocation is held as an alias over the same memory."""
        if name in ("k_cache", "v_cache") and isinstance(value, Tensor):
            value = own_storage(value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Show sizes and what is attended to."""
        names = ("num_heads", "head_dim", "scale", "num_kv_heads", "attn_impl", "sliding_window", "softcap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [T, num_heads * head_dim] or [T, num_heads, head_dim], whichever q is.

        k and v are [T, num_kv_heads * head_dim] or [T, num_kv_heads, head_dim]. The step's metadata comes from the
        fetch hook. Keys and values are stored where its slots say. A row past cu_seqlens_q[-1], a row that is not valid
        and a row that sees nothing return 0.
        """
        metadata = fetch_attn_metadata()
        k_cache, v_cache = self._caches()
        flat = q.dim() == 2
        q = self._heads("q", q, self.num_heads, metadata)
        k = self._heads("k", k, self.num_kv_heads, metadata)
        v = self._heads("v", v, self.num_kv_heads, metadata)
        check_page_size(metadata, k_cache)
        # Traced, is_compiling() is a constant, so that debug mode is not read there: it cannot sync in a graph.
        if not torch.compiler.is_compiling() and is_debug():
            metadata.validate(k_cache.shape[0], self.sliding_window)
        torch.ops.lowered_attn.store_kv_cache(
            k,
            v,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            self.k_scale,
            self.v_scale,
            layout=metadata.kv_cache_layout,
        )
        sinks = None if self.sinks is None else self.sinks.float()  # model.to(bfloat16) casts parameters
        scores = Scores(self.scale, self.sliding_window, self.softcap, sinks, self.k_scale, self.v_scale)
        out, _ = _attend(self.attn_impl, q, k, v, k_cache, v_cache, metadata, scores)
        return out.flatten(1) if flat else out

    def _caches(self) -> tuple[Tensor, Tensor]:
        if self.k_cache is None or self.v_cache is None:
            missing = "k_cache" if self.k_cache is None else "v_cache"
            raise RuntimeError(
                f"Attention: {missing}: expected a cache, got none; assign attention.k_cache and attention.v_cache "
                "before the first call, as custom_ops.paged.layout.empty_caches makes them"
            )
        return self.k_cache, self.v_cache

    def _heads(self, name: str, x: Tensor, heads: int, metadata: AttnMetaDataBase) -> Tensor:
        """x [T, heads * head_dim] or [T, heads, head_dim] as the latter; ValueError for another shape."""
        tokens = metadata.num_tokens
        if tuple(x.shape) == (tokens, heads, self.head_dim):
            return x
        if tuple(x.shape) != (tokens, heads * self.head_dim):
            wide = f"[{tokens}, {heads * self.head_dim}] or [{tokens}, {heads}, {self.head_dim}]"
            remedy = "slot_mapping has one slot a row: pad both to one bucket, or build Attention with other sizes"
            fail("Attention", name, f"shape {wide}", f"shape {list(x.shape)}", remedy)
        return x.unflatten(1, (heads, self.head_dim))


class Scores(NamedTuple):
    """What turns q, k and v into an output besides the metadata; the keywords of the three functions."""

    scale: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def _attend(
    impl: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttnMetaDataBase,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Out [T, Hq, D] in q's dtype and lse [T, Hq], fp32, of one of ATTN_IMPLS."""
    m, ops = metadata, torch.ops.lowered_attn
    check_page_size(m, k_cache)
    if m.new_keys_in_cache:
        check_promise(m, k, k_cache)
        k = v = None
    elif k is None or v is None:
        missing = "k" if k is None else "v"
        remedy = f"pass {missing}, or set new_keys_in_cache where the step stored all new keys"
        fail(f"{impl} attention", missing, "the new keys and values, which the metadata does not promise", None, remedy)
    requests = m.request_values()
    mask = {
        "mode": m.mode,
        "block_size": m.block_size,
        "window": scores.sliding_window or 0,
        "prefix_hole": m.prefix_hole,
        "layout": m.kv_cache_layout,
    }
    lengths = (m.cu_seqlens_q, m.context_lens)
    numbers = {"softcap": scores.softcap or 0.0, "scale": scores.scale}
    extras = (scores.sinks, scores.k_scale, scores.v_scale)
    if impl == "reference":
        op = ops.paged_attention_reference
        return op(
            q, k, v, k_cache, v_cache, *lengths, m.page_tables, m.valid_lens, requests, None, *extras, **mask, **numbers
        )
    tuning = {"impl": impl, "shape_class": resolve_shape_class("auto", m.num_tokens, m.num_requests)}
    schedule = ops.paged_schedule(
        *lengths,
        m.valid_lens,
        requests,
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=LAYOUTS[m.kv_cache_layout].sizes(k_cache).kv_heads,
        head_dim=q.shape[2],
        page_size=m.page_size,
        dtype=q.dtype,
        cache_dtype=k_cache.dtype,
        direct=k is not None,
        **mask,
        **tuning,
    )
    return ops.paged_attention(
        q, k, v, k_cache, v_cache, *lengths, m.page_tables, m.valid_lens, requests, schedule, *extras,
        **mask, **numbers, **tuning,
    )  # fmt: skip


def triton_grouped_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttnMetaDataBase,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from q [T, Hq, D] to the cache and to the new keys; the query heads of a KV head share a tile.

    k and v [T, Hkv, D] are the new keys and values, which must not be None unless the metadata promises
    `new_keys_in_cache`; they are then not read. Nothing is stored: `torch.ops.lowered_attn.store_kv_cache` does that.
    The keywords are those of `Attention`, with `sinks` fp32 [Hq]. Returns out [T, Hq, D] in q's dtype; with
    `return_lse` also lse [T, Hq], fp32, natural log, -inf where a row sees nothing.
    """
    check_numbers("triton_grouped_attention", scale, sliding_window, softcap)
    scores = Scores(scale, sliding_window, softcap, sinks, k_scale, v_scale)
    out, lse = _attend("triton_grouped", q, k, v, k_cache, v_cache, metadata, scores)
    return (out, lse) if return_lse else out


def triton_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttnMetaDataBase,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as `triton_grouped_attention`, with a program a query head; on a CPU there is no difference."""
    check_numbers("triton_attention", scale, sliding_window, softcap)
    scores = Scores(scale, sliding_window, softcap, sinks, k_scale, v_scale)
    out, lse = _attend("triton", q, k, v, k_cache, v_cache, metadata, scores)
    return (out, lse) if return_lse else out


def reference_torch_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttnMetaDataBase,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as `triton_grouped_attention`, readable: in fp32, a request at a time, on every device. It syncs."""
    check_numbers("reference_torch_attention", scale, sliding_window, softcap)
    scores = Scores(scale, sliding_window, softcap, sinks, k_scale, v_scale)
    out, lse = _attend("reference", q, k, v, k_cache, v_cache, metadata, scores)
    return (out, lse) if return_lse else out


def check_numbers(where: str, scale: float | None, sliding_window: int | None, softcap: float | None) -> None:
    """Raise ValueError unless the numbers are None or in range."""
    if scale is not None and not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
        fail(where, "scale", "None or a finite number of at least 0", repr(scale), "None means 1 / sqrt(head_dim)")
    if sliding_window is not None:
        check_int(where, "sliding_window", sliding_window, 1)
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        fail(where, "softcap", "None or a finite number above 0", repr(softcap), "None means no soft-cap")


def check_page_size(metadata: AttnMetaDataBase, k_cache: Tensor) -> None:
    """Raise ValueError unless the cache has the metadata's layout and page size."""
    name = type(metadata).__name__
    layout = LAYOUTS[metadata.kv_cache_layout]
    rank = 4 if metadata.kv_cache_layout == "unified" else 5
    if k_cache.dim() != rank:
        expected = f"{layout.key_dims}, for kv_cache_layout {metadata.kv_cache_layout!r} of {name}"
        fail("Attention", "k_cache", expected, f"shape {list(k_cache.shape)}", "make both of one layout")
    page_size = layout.sizes(k_cache).page_size
    if page_size != metadata.page_size:
        expected = f"pages of {metadata.page_size} tokens, the page_size of {name}"
        fail("Attention", "k_cache", expected, f"pages of {page_size}", "allocate the cache with that page size")


def check_promise(metadata: AttnMetaDataBase, k: Tensor | None, k_cache: Tensor) -> None:
    """Raise ValueError where the cache cannot hold new keys unchanged."""
    if k is not None and k.dtype != k_cache.dtype:
        where, got = type(metadata).__name__, f"True with a cache of {k_cache.dtype} and k of {k.dtype}"
        fail(
            where, "new_keys_in_cache", "False where storing rounds", got, "leave it False, or keep caches in k's dtype"
        )
