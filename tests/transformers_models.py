"""Tiny Hugging Face models with random weights, one for each way of attending, and how exact their logits can be."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

WINDOW = 5
VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALTERNATING = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**ALTERNATING, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", ALTERNATING),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
}
"""Name -> model class, config class, what differs from ``SIZES``. DeepSeek's keys are wider than its values."""


def make(name: str, **changes: Any) -> Any:
    """A model of ``MODELS`` in eval mode, eager attention, with weights large enough that attention is not uniform."""
    model_class, config_class, different = MODELS[name]
    config = getattr(transformers, config_class)(**{**SIZES, **different, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def switched(model: Any, implementation: str = "lowered_attn") -> Any:
    """A copy of ``model`` with another attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other


def layers(model: Any) -> int:
    """How many layers attend."""
    return model.config.num_hidden_layers


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    """int64 ``[batch, length]``, no token of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length))


def padding(ids: Tensor, side: str) -> Tensor | None:
    """The ``attention_mask`` ``[B, tokens]`` of ``ids``: the last request has 4 tokens of padding, None for "none"."""
    if side == "none":
        return None
    mask = torch.ones_like(ids)
    mask[-1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return mask


def exact(model: Any) -> Any:
    """A copy of ``model`` in fp64, softmax too; eager attention gives NaN there where a row sees nothing."""
    other = switched(model, "exact").double()
    other.set_experts_implementation("eager")  # grouped products do not take fp64
    return other


def _exact_mask(**keywords: Any) -> Tensor | None:
    return sdpa_mask(**{**keywords, "allow_is_causal_skip": False})


def _exact_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **keywords: Any
) -> tuple[Tensor, None]:
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if (cap := keywords.get("softcap")) is not None:
        scores = cap * (scores / cap).tanh()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", _exact_mask)


def assert_as_exact(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """``actual`` is as close to ``exact`` as eager attention is, twice its error, or a few units of rounding.

    ``exact`` is the same in fp64, but for what Transformers always computes in fp32 (norms, RoPE's angles). The floor,
    16 units in the last place of the largest result, is for where eager attention's own error happens to be small.
    """
    assert actual.shape == exact.shape and not actual.isnan().any()
    exact = exact.double()
    unit = torch.finfo(eager.dtype).eps * float(exact.abs().max())
    allowed = 2 * float((eager.double() - exact).abs().max()) + 16 * unit
    error = float((actual.double() - exact).abs().max())
    assert error <= allowed, f"error {error:.3e} against fp64, allowed {allowed:.3e}"
