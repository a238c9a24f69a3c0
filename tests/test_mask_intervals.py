"""The ends of the keys that a query sees, as the Hopper kernel's text has them, against the dense mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from custom_ops.forms import FORMS
from custom_ops.mask_printing import interval_source
from custom_ops.masks import Mask, k, q
from tests.mask_cases import BY_NAME, random_calls, slot_values, tl

EXACT = [mask for mask in BY_NAME.values() if mask.interval() is not None]


def banded(mask: Mask) -> Mask:
    """``mask`` without what it asks of single keys."""
    return Mask(mask.name, mask.banded, tuple(o for o in mask.operands if o.kind != "key"))


@pytest.mark.parametrize("mask", EXACT, ids=lambda mask: mask.name)
def test_printed_ends_are_those_of_the_dense_mask(mask: Mask) -> None:
    scope: dict[str, Any] = {"tl": tl}
    exec(interval_source(mask), scope)
    seen = 0
    for call in random_calls(mask, 60):
        ints, (request_value, query_value, *_) = slot_values(mask, call)
        position = call.positions.numpy()
        per_query = query_value if np.ndim(query_value) == 0 else query_value[:, 0]
        lower, upper = scope[f"{mask.name}_interval"](position, call.key_len, ints, request_value, per_query)
        assert lower.shape == upper.shape == position.shape and lower.dtype == upper.dtype == np.int32
        assert ((lower >= 0) & (upper <= call.key_len)).all()
        keys = np.arange(call.key_len)
        found = (keys >= lower[:, None]) & (keys < upper[:, None])
        operands = {o.name: call.operands[o.name] for o in banded(mask).operands}
        dense = banded(mask).dense(torch.from_numpy(position), torch.from_numpy(keys), operands)
        assert (found == dense[0].numpy()).all()
        seen += int(found.sum())
    assert seen or mask.name == "nothing"


def test_every_form_is_one_interval() -> None:
    assert {form.mask.name for form in FORMS.values()} <= {mask.name for mask in EXACT}


def test_a_mask_with_a_hole_has_no_ends() -> None:
    hole = Mask("hole", (k < 4) | ((k > q - 4) & (k <= q)))
    with pytest.raises(ValueError, match="mask 'hole': expected one interval of keys a query, got several"):
        interval_source(hole)
