"""The regular forms: each head has keys and values of its own, or shares them in a group of heads (GQA)."""

from lowered_attn.forms.regular import full_self, segment_cross, sliding_self

__all__ = ["full_self", "segment_cross", "sliding_self"]
