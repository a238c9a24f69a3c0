"""AttentionConfig: which attention a model's blocks are built with."""

from __future__ import annotations

from dataclasses import dataclass

from lowered_attn.checks import check_int, fail
from lowered_attn.forms import FAMILIES

# What only multi-head latent attention has: named here so that the message can say where they belong.
MLA_FIELDS = ("kv_comp_dim", "q_comp_dim", "retr_dim")


@dataclass(frozen=True)
class AttentionConfig:
    """Form, backend and sizes of attention, shared by a model's blocks; ValueError where they do not fit.

    One config may build every block: a field that a block has no use for, such as lookback for
    self-attention, is not read there.
    """

    form: str = "regular"
    """Family of forms, a name in lowered_attn.forms.FAMILIES."""
    backend: str = "lowered"
    """Who runs it: "lowered", "sdpa", "flex" or "reference". It runs there or raises, never elsewhere. The mla form
    also calls "reference" "fallback".
    """
    head_dim: int | None = None
    """Width of one head; None means the model width divided by the number of heads."""
    kv_comp_dim: int | None = None
    """Width of a token's latent, which keys and values come from, at most 512; None means 4 heads, mla only."""
    q_comp_dim: int | None = None
    """Width of the compressed queries; None means 12 heads, mla only."""
    retr_dim: int | None = None
    """Width of a query and of a key, where scores and positions live, at most 256; None means one head, mla only."""
    lookback: int | None = None
    """Earlier segments that a cross-attention query sees; None leaves it to the factory's argument."""

    def __post_init__(self) -> None:
        where = "AttentionConfig"
        _check_choice("form", self.form, tuple(FAMILIES))
        _check_choice("backend", self.backend, FAMILIES[self.form].backends, f" with form={self.form!r}")
        for field in ("head_dim", *MLA_FIELDS):
            value = getattr(self, field)
            if value is None:
                continue
            if field not in FAMILIES[self.form].options:
                owner = "the mla form" if field in MLA_FIELDS else "another form"
                fail(
                    where,
                    field,
                    f"None with form={self.form!r}",
                    value,
                    f"{field} belongs to {owner}: leave it out here",
                )
            check_int(where, field, value, 1)
        if self.lookback is not None:
            check_int(where, "lookback", self.lookback, 0)

    def options(self) -> dict[str, int]:
        """Return the keywords for this family's constructors: its fields that are set."""
        values = {name: getattr(self, name) for name in FAMILIES[self.form].options}
        return {name: value for name, value in values.items() if value is not None}


def _check_choice(field: str, value: object, available: tuple[str, ...], context: str = "") -> None:
    if value not in available:
        expected = f"one of {', '.join(map(repr, available))}{context}"
        fail("AttentionConfig", field, expected, repr(value), f"pass an available {field}")
