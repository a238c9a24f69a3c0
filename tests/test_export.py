"""``torch.export`` of modules with our ops: saved, loaded and run on other sizes, they compute what eager does."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lowered_attn import (
    CausalMetaData,
    fetch_attn_metadata,
    set_fetch_fn_for_attn_metadata,
    triton_grouped_attention,
)

OPS = torch.ops.lowered_attn


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    set_fetch_fn_for_attn_metadata(None)


class Forms(nn.Module):
    """Three forms, with operands, a scale and a soft-cap, around a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        full, _ = OPS.full_self(q, k, v, padding)
        sliding, lse = OPS.sliding_self(q, k, v, 5, scale=0.3, softcap=2.0)
        cross, _ = OPS.segment_cross(q, k, v, segments, 1)
        return self.project((full + sliding + cross).transpose(1, 2).flatten(2)), lse


def form_inputs(length: int) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
    return q, k, v, torch.rand(2, length) < 0.3, torch.arange(length).div(4, rounding_mode="floor").expand(2, -1)


class Step(nn.Module):
    """One step over a paged cache: stores k and v, then attends. The metadata's tensors and the caches are arguments.

    What runs below reaches the metadata through the fetch hook, as layers of a model do.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
        cu_seqlens_q: Tensor, context_lens: Tensor, page_tables: Tensor, slot_mapping: Tensor,
    ) -> Tensor:  # fmt: skip
        step = CausalMetaData(
            cu_seqlens_q=cu_seqlens_q, context_lens=context_lens, page_tables=page_tables, slot_mapping=slot_mapping,
            page_size=16,
        )  # fmt: skip
        set_fetch_fn_for_attn_metadata(lambda: step)
        metadata = fetch_attn_metadata()
        OPS.store_kv_cache(k, v, k_cache, v_cache, slot_mapping, None, None, layout="unified")
        return triton_grouped_attention(q, k, v, k_cache, v_cache, metadata, softcap=3.0)


def step_inputs(*requests: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """One prefilling or decoding step; a request is its cached tokens, its new ones and its page of 16."""
    new = [count for _, count, _ in requests]
    slots = [page * 16 + cached + i for cached, count, page in requests for i in range(count)]
    tensors = (torch.randn(sum(new), heads, 16) for heads in (8, 2, 2))
    caches = (torch.randn(32, 16, 2, 16) for _ in range(2))
    return (
        *tensors, *caches,
        torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.tensor([cached for cached, _, _ in requests], dtype=torch.int32),
        torch.tensor([[page] for _, _, page in requests], dtype=torch.int32),
        torch.tensor(slots),
    )  # fmt: skip


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_forms_export_once_for_all_lengths(strict: bool) -> None:
    model = Forms()
    length = torch.export.Dim("length", min=2, max=512)
    sizes = ({2: length}, {2: length}, {2: length}, {1: length}, {1: length})
    program = saved_and_loaded(torch.export.export(model, form_inputs(33), dynamic_shapes=sizes, strict=strict))
    targets = [node.target for node in program.graph.nodes]
    for op in (OPS.full_self, OPS.sliding_self, OPS.segment_cross):
        assert targets.count(op.default) == 1
    for other in (33, 70, 2):
        arguments = form_inputs(other)
        for a, b in zip(program.module()(*arguments), model(*arguments), strict=True):
            assert torch.equal(a, b)


def test_a_paged_step_exports_and_serves_other_steps() -> None:
    model = Step()
    example = step_inputs((0, 3, 4), (5, 1, 9))
    program = saved_and_loaded(torch.export.export(model, example))
    assert not program.constants  # nothing of the example's step is left in the program
    targets = [node.target for node in program.graph.nodes]
    assert OPS.store_kv_cache.default in targets and OPS.paged_attention.default in targets
    for requests in (((0, 3, 4), (5, 1, 9)), ((2, 1, 30), (7, 3, 2)), ((0, 4, 1), (15, 0, 3))):
        arguments = step_inputs(*requests)
        again = tuple(t.clone() for t in arguments)
        assert torch.equal(program.module()(*arguments), model(*again))
        for cache, expected in zip(arguments[3:5], again[3:5], strict=True):
            assert torch.equal(cache, expected)
