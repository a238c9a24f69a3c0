"""The forms of multi-head latent attention: keys and values of all heads come from one latent a token."""

from lowered_attn.forms.mla import full_self, segment_cross, sliding_self
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.forms.mla.deepseek import DeepSeekAttention

__all__ = ["DeepSeekAttention", "LatentCache", "full_self", "segment_cross", "sliding_self"]
