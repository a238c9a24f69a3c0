"""``attn_implementation="lowered_attn"`` for Hugging Face Transformers, and ``"paged|lowered_attn"``.

Importing this module registers both::

    import lowered_attn.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lowered_attn")

A layer of the model then calls a form of ``torch.ops.lowered_attn`` with grouped heads as they are, and no mask tensor
is made. What no form can say (see ``transformers_masks``) raises a ValueError that names it; nothing falls back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import lowered_attn  # noqa: F401  (registers the ops)
from custom_ops.forms import FORMS
from lowered_attn.checks import fail
from lowered_attn.integrations.transformers_masks import ELSEWHERE, WHERE, FormMask, form_mask
from lowered_attn.integrations.transformers_paged import paged_attention

try:
    import transformers
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    raise ImportError(
        "lowered_attn.integrations.transformers: expected transformers 5.17, got an import that failed "
        f"({error}); pip install 'lowered-attn[transformers]'"
    ) from error

NAME = "lowered_attn"
PAGED_NAME = "paged|lowered_attn"
"""What Transformers' continuous batching calls; it takes "lowered_attn" too and adds the prefix itself."""
SUPPORTED = (5, 17)
"""The one release series that is tested: what is read of masks, caches and batches is nobody's public promise, and 5.23
differs in static caches and in continuous batching."""


def register() -> None:
    """Register both implementations, which importing this module has done already. ImportError for other releases."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version != SUPPORTED:
        raise ImportError(
            f"lowered_attn.integrations.transformers: expected transformers {'.'.join(map(str, SUPPORTED))}, got "
            f"{transformers.__version__}; pip install 'lowered-attn[transformers]'"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, form_mask)
    # No mask function: lengths and pages, which continuous batching passes along, say what is visible.
    AttentionInterface.register(PAGED_NAME, paged_attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: FormMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer of a Transformers model, for its ``AttentionInterface``.

    query is ``[B, Hq, Lq, D]``, key ``[B, Hkv, Lk, D]`` and value ``[B, Hkv, Lk, Dv]``; ``attention_mask`` is what
    ``form_mask`` made, or None in an encoder. Returns ``[B, Lq, Hq, Dv]`` and no weights. ValueError for dropout,
    sinks, biases, weights that somebody asks for, and masks that are no ``FormMask``.
    """
    mask = attention_mask if isinstance(attention_mask, FormMask) else _mask_of(module, attention_mask, keywords)
    if dropout:
        fail(WHERE, "dropout", "0", dropout, "set attention_dropout=0 in the model's config, or call model.eval()")
    if s_aux is not None:
        fail(WHERE, "s_aux", "no attention sinks", "sinks", f"{ELSEWHERE}; the paged implementation takes sinks")
    if position_bias is not None:
        fail(WHERE, "position_bias", "None", f"shape {list(position_bias.shape)}", ELSEWHERE)
    if keywords.get("output_attentions"):
        fail(WHERE, "output_attentions", "False", True, "no weights are ever in memory: use 'eager' to see them")
    form = FORMS[mask.form]
    operands = {name: getattr(mask, name) for name in form.operand_names}
    out, _ = form.op(query, key, value, **operands, scale=scaling, softcap=softcap or 0.0)
    return out.transpose(1, 2), None


def _mask_of(module: nn.Module, mask: Tensor | None, keywords: dict[str, Any]) -> FormMask:
    """The mask of a layer that got none from ``form_mask``: an encoder's without padding, if its module says so."""
    is_causal = keywords.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is None and not is_causal:
        return FormMask("bidirectional")
    got = "None in a causal layer" if mask is None else f"a tensor of shape {list(mask.shape)}"
    remedy = f"pass attention_mask as [B, tokens] or leave it out; where the model makes masks itself, {ELSEWHERE}"
    fail(WHERE, "attention_mask", "what Transformers' mask functions make", got, remedy)


register()
