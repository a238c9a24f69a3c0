"""Attention over a paged cache: the module that a served model holds, and the functions it chooses from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from custom_ops.checks import HEAD_DIMS
from custom_ops.paged.layout import LAYOUTS, CacheSizes
from lowered_attn.checks import check_int, fail
from lowered_attn.metadata import AttnMetaDataBase
from lowered_attn.paged_layer import PagedLayer, Step, attend, check_numbers, check_page_size, new_tokens


class Attention(PagedLayer):
    """Attention of one layer of a served model: stores the step's keys and values, then attends through the cache.

    `num_heads` query heads share `num_kv_heads` KV heads of `head_dim` elements. Scores are multiplied by `scale`, None
    meaning 1 / sqrt(head_dim); with `softcap`, s becomes softcap * tanh(s / softcap). With `sliding_window`, a token
    sees that many latest ones, itself included. With `use_sinks`, the fp32 parameter `sinks` [num_heads] holds one more
    logit a head, whose value is 0. `attn_impl` names the CUDA kernel: "triton_grouped", a program for all query heads
    of a KV head; "triton", a program a query head; both take one path on a CPU. "reference" is readable, slow and
    syncs, on every device. Nothing falls back to another one.

    Inference only: run it under torch.no_grad() or torch.inference_mode(). ValueError for sizes that do not fit.
    """

    CACHES = ("k_cache", "v_cache")
    ALLOCATE = "as custom_ops.paged.layout.empty_caches makes them"

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
        where = "Attention"
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
            check_int(where, name, value, 1)
        if head_dim > HEAD_DIMS[1]:
            fail(where, "head_dim", f"at most {HEAD_DIMS[1]}", head_dim, "split the heads")
        if num_heads % num_kv_heads:
            expected = f"a divisor of num_heads = {num_heads}"
            fail(where, "num_kv_heads", expected, num_kv_heads, "each KV head serves num_heads / num_kv_heads heads")
        super().__init__(attn_impl, scale, sliding_window, softcap)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self._register_engine_buffers("k_scale", "v_scale")
        self.register_parameter("sinks", nn.Parameter(torch.zeros(num_heads)) if use_sinks else None)

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
        k_cache, v_cache = self._caches()
        metadata = self._step()
        flat = q.dim() == 2
        q = self._heads("q", q, self.num_heads, self.head_dim, metadata)
        k = self._heads("k", k, self.num_kv_heads, self.head_dim, metadata)
        v = self._heads("v", v, self.num_kv_heads, self.head_dim, metadata)
        check_caches(metadata, k_cache)
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
    sizes = check_caches(metadata, k_cache)
    if not metadata.new_keys_in_cache and (k is None or v is None):
        missing = "k" if k is None else "v"
        remedy = f"pass {missing}, or set new_keys_in_cache where the step stored all new keys"
        fail(f"{impl} attention", missing, "the new keys and values, which the metadata does not promise", None, remedy)
    return attend(
        "paged_attention",
        impl,
        q,
        new_tokens(metadata, k_cache, k, v),
        (k_cache, v_cache),
        Step.of(metadata),
        sizes,
        (scores.sinks, scores.k_scale, scores.v_scale),
        scale=scores.scale,
        sliding_window=scores.sliding_window,
        softcap=scores.softcap,
        layout=metadata.kv_cache_layout,
    )


def check_caches(metadata: AttnMetaDataBase, k_cache: Tensor) -> CacheSizes:
    """The caches' sizes; ValueError unless they have the metadata's layout and page size."""
    layout = LAYOUTS[metadata.kv_cache_layout]
    rank = layout.key_dims.count(",") + 1
    if k_cache.dim() != rank:
        expected = f"{layout.key_dims}, for kv_cache_layout {metadata.kv_cache_layout!r} of {type(metadata).__name__}"
        fail("Attention", "k_cache", expected, f"shape {list(k_cache.shape)}", "make both of one layout")
    sizes = layout.sizes(k_cache)
    check_page_size("Attention", "k_cache", metadata, sizes.page_size)
    return sizes


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
