"""AttentionConfig and the factories: what is accepted, what is refused and how, what is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lowered_attn import (
    AttentionConfig,
    make_full_self_block,
    make_segment_cross,
    make_sliding_self_block,
    mla,
    regular,
)
from lowered_attn.backends import BACKENDS


def test_the_defaults_are_regular_and_lowered() -> None:
    config = AttentionConfig()
    assert dataclasses.asdict(config) == {
        "form": "regular",
        "backend": "lowered",
        "head_dim": None,
        "kv_comp_dim": None,
        "q_comp_dim": None,
        "retr_dim": None,
        "lookback": None,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backend = "sdpa"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"form": "mlp"}, ["form", "'regular'", "'mla'", "'mlp'"]),
        ({"backend": "fast"}, ["backend", *map(repr, BACKENDS), "'fast'"]),
        ({"backend": "fallback"}, ["backend", *map(repr, BACKENDS), "form='regular'", "'fallback'"]),
        ({"form": "mla", "backend": "fast"}, ["backend", *map(repr, BACKENDS), "'fallback'", "form='mla'", "'fast'"]),
        ({"form": "mla", "kv_comp_dim": 0}, ["kv_comp_dim", "at least 1", "got 0"]),
        ({"form": "mla", "retr_dim": True}, ["retr_dim", "int", "True"]),
        ({"kv_comp_dim": 512}, ["kv_comp_dim", "None", "512", "mla", "leave it out"]),
        ({"q_comp_dim": 1536}, ["q_comp_dim", "mla"]),
        ({"retr_dim": 64}, ["retr_dim", "mla"]),
        ({"head_dim": 0}, ["head_dim", "at least 1", "got 0"]),
        ({"head_dim": 64.0}, ["head_dim", "int", "64.0"]),
        ({"head_dim": True}, ["head_dim", "int", "True"]),
        ({"lookback": -1}, ["lookback", "at least 0", "-1"]),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_the_remedy(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        AttentionConfig(**fields)
    for word in ["AttentionConfig", "expected", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("head_dim", [None, 24])
def test_the_factories_build_the_class_with_the_backend_and_head_dim_of_the_config(
    head_dim: int | None,
) -> None:
    config = AttentionConfig(backend="sdpa", head_dim=head_dim)
    full = make_full_self_block(64, 4, 2, config)
    sliding = make_sliding_self_block(64, 4, 7, 3, config)
    cross = make_segment_cross(64, 32, 4 * (head_dim or 8), 4, 1, config)
    assert type(full) is regular.full_self.FullSelf
    assert type(sliding) is regular.sliding_self.SlidingSelf
    assert type(cross) is regular.segment_cross.SegmentCross
    assert {block.attention.backend for block in (full, sliding, cross)} == {"sdpa"}
    assert full.attention.head_dim == sliding.attention.head_dim == (head_dim or 16)
    assert cross.attention.head_dim == (head_dim or 8)
    assert full.ffn.up_proj.out_features == 2 * 64 and sliding.ffn.up_proj.out_features == 3 * 64
    assert sliding.int_operands == {"window": 7}


@pytest.mark.parametrize("backend", [*BACKENDS, "fallback"])
def test_the_factories_build_mla_with_the_sizes_of_the_config(backend: str) -> None:
    sizes = {"head_dim": 6, "kv_comp_dim": 20, "q_comp_dim": 18, "retr_dim": 10}
    config = AttentionConfig("mla", backend, **sizes, lookback=1)
    full = make_full_self_block(32, 4, 2, config)
    sliding = make_sliding_self_block(32, 4, 7, 3, config)
    cross = make_segment_cross(32, 24, 24, 4, cfg=config)
    assert type(full) is mla.full_self.FullSelf
    assert type(sliding) is mla.sliding_self.SlidingSelf
    assert type(cross) is mla.segment_cross.SegmentCross
    for module in (full, sliding, cross):
        assert dataclasses.asdict(module.attention.sizes) == {"n_heads": 4, **sizes}
        assert module.attention.backend == ("reference" if backend == "fallback" else backend)
    assert full.ffn.up_proj.out_features == 2 * 32 and sliding.ffn.up_proj.out_features == 3 * 32
    assert sliding.int_operands == {"window": 7} and cross.lookback == 1
    with torch.no_grad():
        assert full(torch.randn(2, 9, 32)).shape == (2, 9, 32)


def test_mla_without_sizes_has_the_families_defaults() -> None:
    block = make_full_self_block(64, 4, cfg=AttentionConfig("mla"))
    assert dataclasses.asdict(block.attention.sizes) == {
        "n_heads": 4,
        "head_dim": 16,
        "kv_comp_dim": 64,
        "q_comp_dim": 192,
        "retr_dim": 16,
    }


def test_without_a_config_the_backend_is_lowered_and_the_ffn_is_four_times_as_wide() -> None:
    block = make_full_self_block(32, 2)
    assert block.attention.backend == "lowered"
    assert block.ffn.up_proj.out_features == 4 * 32


@pytest.mark.parametrize(
    ("argument", "configured", "expected"), [(0, None, 0), (2, None, 2), (0, 3, 3), (3, 3, 3), (0, 0, 0)]
)
def test_the_lookback_comes_from_the_argument_or_the_config(
    argument: int, configured: int | None, expected: int
) -> None:
    cross = make_segment_cross(32, 32, 32, 2, argument, AttentionConfig(lookback=configured))
    assert cross.lookback == expected


def test_two_different_lookbacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lookback: expected cfg\.lookback = 3.*got 2; pass it in one place"):
        make_segment_cross(32, 32, 32, 2, 2, AttentionConfig(lookback=3))
