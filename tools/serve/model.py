"""A decoder of Qwen3's kind with random weights, over flat tokens `[T]` of all requests of a step.

RMSNorm before attention and before the MLP, RMSNorm of every head of q and k, RoPE, grouped-query attention, SwiGLU.
Requests appear nowhere in it: `Attention` knows them from the step's metadata.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowered_attn import Attention


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    hidden: int  # width of the residual stream
    layers: int
    heads: int  # query heads
    kv_heads: int  # a divisor of `heads`
    head_dim: int  # even, for RoPE
    intermediate: int  # width of the MLP
    vocab: int
    tied: bool = False  # whether the head's weight is the embedding's
    max_positions: int = 8192  # rows of the RoPE table
    rope_theta: float = 1e6
    norm_eps: float = 1e-6


SIZES = {
    "tiny": ModelConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=256),
    "small": ModelConfig(
        hidden=1024, layers=8, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=32768, tied=True
    ),
    "8b-like": ModelConfig(
        hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=12288, vocab=151936
    ),
}
"""Presets by name. "8b-like" has the shapes of Qwen3-8B, 8.2e9 weights; "tiny" is for a laptop's CPU."""

MakeAttention = Callable[[ModelConfig, int], nn.Module]
"""Makes the attention of a layer, by the layer's index. Called with q `[T, Hq, D]`, k and v `[T, Hkv, D]`."""


def paged(attn_impl: str) -> MakeAttention:
    """`lowered_attn.Attention` with `attn_impl` in every layer; caches are attached later (`attach_caches`)."""

    def make(config: ModelConfig, layer: int) -> nn.Module:
        scale = 1 / math.sqrt(config.head_dim)
        return Attention(config.heads, config.head_dim, scale, config.kv_heads, attn_impl=attn_impl)

    return make


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., C]` over its root mean square, times `weight [C]`; in at least fp32, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of `x [T, H, D]` by the angles whose `cos` and `sin` are `[T, 1, D / 2]`."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Layer(nn.Module):
    """One decoder layer over `x [T, hidden]`."""

    def __init__(self, config: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        widths = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        self.widths = widths
        self.qkv = nn.Parameter(torch.empty(sum(widths), config.hidden))
        self.output = nn.Parameter(torch.empty(config.hidden, widths[0]))
        self.gate_up = nn.Parameter(torch.empty(2 * config.intermediate, config.hidden))
        self.down = nn.Parameter(torch.empty(config.hidden, config.intermediate))
        self.attention_norm = nn.Parameter(torch.empty(config.hidden))
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden))
        self.q_norm = nn.Parameter(torch.empty(config.head_dim))
        self.k_norm = nn.Parameter(torch.empty(config.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        eps, head_dim = self.config.norm_eps, self.config.head_dim
        projected = F.linear(rms_norm(x, self.attention_norm, eps), self.qkv)
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in projected.split(self.widths, -1))
        q, k = rope(rms_norm(q, self.q_norm, eps), cos, sin), rope(rms_norm(k, self.k_norm, eps), cos, sin)
        x = x + F.linear(self.attention(q, k, v).flatten(1), self.output)
        gate, up = F.linear(rms_norm(x, self.mlp_norm, eps), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Decoder(nn.Module):
    """The whole model: `forward(tokens [T], positions [T], logit_rows [L])` -> logits `[L, vocab]`.

    Made with uninitialised weights on the default device and in the default dtype; see `random_model`.
    """

    cos: Tensor
    """fp32 `[max_positions, head_dim / 2]`."""
    sin: Tensor

    def __init__(self, config: ModelConfig, make_attention: MakeAttention) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab, config.hidden))
        self.layers = nn.ModuleList(Layer(config, make_attention(config, i)) for i in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden))
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab, config.hidden))
        # A table, not cos() in the graph: every model that is compared rotates by exactly the same angles.
        device = self.embedding.device
        frequency = config.rope_theta ** -(
            torch.arange(0, config.head_dim, 2, device=device).double() / config.head_dim
        )
        angles = torch.arange(config.max_positions, device=device).double()[:, None] * frequency
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """Logits `[L, vocab]` of the rows `logit_rows` int64 `[L]`; tokens and positions are int64 `[T]`."""
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = rms_norm(x[logit_rows], self.norm, self.config.norm_eps)
        return F.linear(x, self.embedding if self.head is None else self.head)


def random_model(
    config: ModelConfig, make_attention: MakeAttention, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Decoder:
    """A model whose weights are drawn on `device`: 8e9 of them take well under a second on a GPU.

    Rows of a matrix have a norm of about 1 and those of the two that end a residual branch `1 / sqrt(2 * layers)`.
    Embeddings are small beside what the layers add, so that tokens depend on their context, and logits have a deviation
    of about 4, so that a likeliest token stands out.
    """
    model = _build(config, make_attention, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            deviation = 1 / math.sqrt(weight.shape[1])
            if leaf in ("output", "down"):
                deviation /= math.sqrt(2 * config.layers)
            elif leaf == "head" or (leaf == "embedding" and config.tied):
                deviation *= 4
            weight.normal_(0.0, deviation, generator=generator)
    return model


def with_attention(model: Decoder, make_attention: MakeAttention, dtype: torch.dtype | None = None) -> Decoder:
    """The same weights (not a copy, unless `dtype` is another) with other attention, and no caches yet."""
    own = model.embedding
    other = _build(model.config, make_attention, torch.device("meta"), dtype or own.dtype)
    weights = dict(model.named_parameters())
    for path, module in other.named_modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                weight = weights[f"{path}.{name}" if path else name]
                module._parameters[name] = nn.Parameter(weight.detach().to(dtype or own.dtype), requires_grad=False)
    other.cos, other.sin = model.cos, model.sin
    return other


def _build(config: ModelConfig, make_attention: MakeAttention, device: torch.device, dtype: torch.dtype) -> Decoder:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Decoder(config, make_attention).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of the paged caches of every layer."""

    pages: int
    page_size: int  # tokens in a page
    max_pages: int  # pages that one request may have: columns of a page table

    @property
    def max_tokens(self) -> int:
        """Tokens that one request may have in the cache."""
        return self.max_pages * self.page_size


def attentions(model: nn.Module) -> list[Attention]:
    """Every `Attention` in `model`, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def attach_caches(model: nn.Module, cache: CacheConfig, dtype: torch.dtype, device: torch.device,
                  fill: float | None = math.nan) -> None:  # fmt: skip
    """Give every `Attention` in `model` a K and a V cache `[pages, page_size, kv_heads, head_dim]`.

    They start as NaN, so that reading a slot that was never written cannot go unnoticed. `fill=None` fills them with
    random numbers instead, for measurements over contexts that were never computed.
    """
    for attention in attentions(model):
        shape = (cache.pages, cache.page_size, attention.num_kv_heads, attention.head_dim)
        for name in ("k_cache", "v_cache"):
            tensor = torch.empty(shape, dtype=dtype, device=device)
            setattr(attention, name, tensor.normal_() if fill is None else tensor.fill_(fill))


def caches_of(model: nn.Module) -> list[Tensor]:
    """Every cache of `model`, K before V; none where none was attached."""
    caches = [cache for attention in attentions(model) for cache in (attention.k_cache, attention.v_cache)]
    return [cache for cache in caches if cache is not None]


def scaled(config: ModelConfig, layers: int | None) -> ModelConfig:
    """`config` with another number of layers, if any is given."""
    return config if layers is None else dataclasses.replace(config, layers=layers)
