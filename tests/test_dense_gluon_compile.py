"""The Hopper kernel of the dense forms compiled for sm_90 as it is launched: registers, spills, wgmma. No GPU."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from custom_ops.epilogue import parse
from custom_ops.form import Slots, empty_outputs
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_shape import DenseShape, dense_reasons, dense_shape
from custom_ops.masks import Mask, k, q
from inductor_passes.gpu_facts import gpu_facts
from tests.hopper import chosen


def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=of, device="cuda")


def operands_of(form: str, padding: bool, q_start: bool, ids: torch.dtype) -> Slots:
    """Operands of two requests of 1,000 queries and keys, on device "cuda": under fake tensors."""
    operands: dict[str, Any] = {}
    for o in FORMS[form].operands:
        if o.kind == "int":
            operands[o.name] = 1000
        elif o.name == "q_start":
            operands[o.name] = empty(2) if q_start else None
        elif o.boolean:
            operands[o.name] = empty(2, 1000, of=torch.bool) if padding else None
        else:
            operands[o.name] = empty(2) if o.kind == "request" else empty(2, 1000, of=ids)
    return FORMS[form].slots(operands)


def compiled(
    form: str = "full_self",
    dims: tuple[int, int] = (128, 128),
    *,
    heads: tuple[int, int, int] = (32, 8, 8),
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    padding: bool = False,
    q_start: bool = False,
    ids: torch.dtype = torch.int32,
    consumers: int = 3,
    tiling: dict[str, Any] | None = None,
    epilogue: str | None = None,
) -> tuple[Any, DenseShape]:
    """Resources of the kernel as an eager call launches it, or with another tiling. ``heads``: of q, of k, of v.
    ``consumers``: of two shipped tilings, if there are. ``epilogue``: its text, if the kernel has one."""
    pytest.importorskip("triton.experimental.gluon", reason="the kernel is written in Gluon")
    from custom_ops.kernels import launch
    from custom_ops.kernels.gluon import dense_launch
    from custom_ops.kernels.specialise import kernel_operands
    from inductor_passes.pretend_gpu import compile_launches, pretend_gpu
    from inductor_passes.resources import read_resources

    aligned = mock.patch.object(FakeTensor, "data_ptr", lambda self: 0)
    with pretend_gpu("sm_90") as gpu, gpu.fake_tensors(), aligned, chosen("gluon", consumers):
        query, key, value = (
            empty(2, 1000, count, dim, of=dtype).transpose(1, 2)
            for count, dim in zip(heads, (dims[0], *dims), strict=True)
        )
        slots = operands_of(form, padding, q_start, ids)
        assert launch.against_hopper(FORMS[form], query, key, value, slots, softcap) == []
        mask = FORMS[form].mask_of(slots)
        present = tuple(t is not None for t in kernel_operands(slots).values())
        group, sharing = heads[0] // heads[1], heads[1] // heads[2]
        shape = dense_shape(mask, present, group, sharing, *dims, softcap != 0.0, consumers)
        shape = dataclasses.replace(shape, **(tiling or {}))

        def attend(query: Tensor) -> None:
            outputs = empty_outputs(query, value)
            after = None if epilogue is None else parse(epilogue)
            extra = outputs[0].new_empty(outputs[0].shape) if after is not None and after.reads_extra else None
            dense_launch.forward(mask, query, key, value, slots, 0.1, softcap, *outputs, shape, after, extra)

        (kernel,) = compile_launches(attend, query)
    assert kernel.name == "dense_attention_kernel"
    return read_resources(kernel, "sm_90"), shape


ALL: dict[str, Any] = {"padding": True, "q_start": True, "softcap": 20.0, "ids": torch.int64}
SHIPPED: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal-fp16": {"dtype": torch.float16, "heads": (8, 8, 8)},
    "causal-q_start": {"q_start": True},
    "causal-all": ALL,
    "causal-d64": {"dims": (64, 64)},
    "causal-d80": {"dims": (80, 80)},
    "causal-d96": {"dims": (96, 96)},
    "causal-d160-v128": {"dims": (160, 128)},
    "causal-d192-v128": {"dims": (192, 128), "heads": (16, 16, 2)},
    "causal-d256": {"dims": (256, 256)},
    "causal-two": {"consumers": 2},
    "causal-d64-two": {"dims": (64, 64), "consumers": 2},
    "causal-d192-v128-two": {"dims": (192, 128), "consumers": 2},
    "full-two": {"form": "bidirectional", "consumers": 2},
    "full-d192-v128-two": {"form": "bidirectional", "dims": (192, 128), "consumers": 2},
    "sliding-d64-two": {"form": "sliding_self", "dims": (64, 64), "consumers": 2},
    "causal-documents-d64-two": ALL | {"form": "document_causal", "dims": (64, 64), "consumers": 2},
    "full-d64-padding-two": {"form": "bidirectional", "dims": (64, 64), "padding": True, "consumers": 2},
    "full": {"form": "bidirectional"},
    "full-d96": {"form": "bidirectional", "dims": (96, 96)},
    "full-d256-v128": {"form": "bidirectional", "dims": (256, 128)},
    "full-d64-padding": {"form": "bidirectional", "dims": (64, 64), "padding": True},
    "sliding": {"form": "sliding_self"},
    "sliding-all": ALL | {"form": "sliding_self"},
    "sliding-d64": {"form": "sliding_self", "dims": (64, 64)},
    "sliding-d96": {"form": "sliding_self", "dims": (96, 96)},
    "sliding-d192-v128": {"form": "sliding_self", "dims": (192, 128)},
    "segments": {"form": "segment_cross"},
    "segments-all-d192-v128": {"form": "segment_cross", "padding": True, "softcap": 20.0, "dims": (192, 128)},
    "documents": {"form": "document"},
    "causal-documents-all": ALL | {"form": "document_causal"},
    "causal-documents-all-d64": ALL | {"form": "document_causal", "dims": (64, 64)},
    "causal-documents-all-d96": ALL | {"form": "document_causal", "dims": (96, 96)},
    "causal-documents-all-d192-v128": ALL | {"form": "document_causal", "dims": (192, 128)},
    "causal-documents-all-d256": ALL | {"form": "document_causal", "dims": (256, 256)},
    "prefix": {"form": "prefix_lm"},
    "starts": {"form": "causal_from", "ids": torch.int64},
}


def allowed_spills(shape: DenseShape) -> int:
    """Bytes stored plus bytes loaded, over the whole code: Triton 3.9 orders it so that ptxas spills around loops."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 9):
        return 0
    return 680 if shape.consumers == 3 and shape.block_n == 128 and shape.columns == 2 else 520


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_kernels_hardly_spill_and_run_wgmma_side_by_side(name: str) -> None:
    found, shape = compiled(**SHIPPED[name])
    problems = dataclasses.replace(found, spills=max(0, found.spills - allowed_spills(shape))).problems
    assert not problems, (found.spills, problems)
    assert found.wgmma, "products must be wgmma"
    assert found.shared_memory >= shape.shared_bytes
    # The first consumer gets what the other roles leave.
    facts = gpu_facts("sm_90")
    warpgroups = shape.consumers + 1
    a_thread = facts.regs_per_multiprocessor // (128 * warpgroups) // 8 * 8
    roles = [shape.producer_registers, *[shape.consumer_registers] * (shape.consumers - 1)]
    assert all(24 <= count <= 256 and count % 8 == 0 for count in roles)
    assert a_thread * warpgroups - sum(roles) >= shape.consumer_registers


def instructions(ptx: str, folder: Path) -> list[str]:
    """What ptxas makes of PTX for sm_90a, one line an instruction."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    for command in (
        [get_ptxas(90).path, "--gpu-name=sm_90a", str(source), "-o", str(binary)],
        [knobs.nvidia.nvdisasm.path, "-c", str(binary)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "name, weights", (("causal-two", 64), ("sliding", 32), ("causal-d192-v128", 32), ("causal-d256", 32))
)
def test_products_with_v_run_beside_all_of_a_softmax(name: str, weights: int, tmp_path: Path) -> None:
    found, shape = compiled(**SHIPPED[name])
    assert shape.overlap and shape.late_wait and weights == shape.block_n // 2
    # In loops, the wait for all but one product is for scores, the next for all is for outputs.
    beside: int | None = None
    counted: list[int] = []
    for line in instructions(found.ptx, tmp_path):
        if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", line):
            beside = 0
        elif re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", line) and beside is not None:
            counted.append(beside)
            beside = None
        elif "MUFU.EX2" in line and beside is not None:
            beside += 1
    assert len(counted) >= shape.consumers and min(counted) >= weights, counted


def test_a_late_wait_needs_overlap() -> None:
    shape = dense_shape(FORMS["full_self"].mask.specialise([]), (False,) * 5, 1, 1, 128, 128, False)
    with pytest.raises(ValueError, match="late_wait: expected overlap"):
        dataclasses.replace(shape, late_wait=True, overlap=False)


TWO_OVERLAP: dict[str, Any] = {
    "consumers": 2, "overlap": True, "split": False, "consumer_registers": 240, "producer_registers": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    "dims, tiling",
    (
        ((64, 64), TWO_OVERLAP | {"turns": True}),
        ((96, 96), TWO_OVERLAP | {"turns": True}),
        ((256, 256), {"turns": True}),
    ),
    ids=str,
)
def test_consumers_in_turn_keep_wgmma_side_by_side(
    dims: tuple[int, int], tiling: dict[str, Any]
) -> None:
    found, shape = compiled(dims=dims, tiling=tiling)
    assert dataclasses.replace(found, spills=max(0, found.spills - allowed_spills(shape) - 64)).problems == []
    assert found.wgmma


@pytest.mark.parametrize(
    "dims, parts",
    (
        ((64, 64), (64, 0, 64, 0)),
        ((72, 72), (64, 16, 64, 16)),
        ((80, 64), (64, 16, 64, 0)),
        ((96, 88), (64, 32, 64, 32)),
        ((104, 96), (128, 0, 64, 32)),
        ((144, 128), (128, 16, 128, 0)),
        ((160, 40), (128, 32, 64, 0)),
        ((192, 128), (128, 64, 128, 0)),
        ((200, 200), (256, 0, 256, 0)),
    ),
    ids=str,
)
def test_head_dims_are_one_power_of_two_or_two(dims: tuple[int, int], parts: tuple[int, int, int, int]) -> None:
    shape = dense_shape(FORMS["full_self"].mask, (False,) * 5, 1, 1, *dims, False)
    assert (shape.low_dim, shape.high_dim, shape.value_low_dim, shape.value_high_dim) == parts
    assert shape.low_dim + shape.high_dim >= dims[0] and shape.value_low_dim + shape.value_high_dim >= dims[1]


def test_consumers_take_turns_only_with_overlap() -> None:
    shape = dense_shape(FORMS["full_self"].mask.specialise([]), (False,) * 5, 1, 1, 128, 128, False)
    with pytest.raises(ValueError, match="turns: expected overlap"):
        dataclasses.replace(shape, turns=True, overlap=False)


def test_a_mask_with_a_hole_takes_its_predicate() -> None:
    hole = Mask("hole", (k < 4) | ((k > q - 4) & (k <= q)))
    shape = dense_shape(hole, (False,) * 5, 1, 1, 128, 128, False)
    assert not shape.exact and shape.masked_first and not shape.split


FINE: dict[str, Any] = {
    "architecture": 90, "dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "query_len": 4096, "width": None,
    "softcap": 0.0, "aligned": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"dtype": torch.float16},
        *({"head_dim": dim, "value_dim": dim} for dim in (64, 72, 80, 96, 128, 200, 256)),
        {"head_dim": 192},
        {"query_len": 128, "width": 128, "softcap": 50.0},
    ),
    ids=str,
)
def test_nothing_is_said_against_what_the_kernel_takes(changes: dict[str, Any]) -> None:
    assert dense_reasons(**FINE | changes) == []


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"architecture": 100}, "architecture: expected 90 (Hopper), got 100"),
        ({"dtype": torch.float32}, "q: expected bfloat16 or float16, got torch.float32"),
        ({"head_dim": 48, "value_dim": 48}, "head_dim: expected a multiple of 8 from 64 to 256, got 48"),
        ({"head_dim": 100, "value_dim": 96}, "head_dim: expected a multiple of 8 from 64 to 256, got 100"),
        (
            {"head_dim": 192, "value_dim": 192},
            "value_dim: expected a multiple of 8 that needs no more room than head_dim 192, got 192",
        ),
        (
            {"head_dim": 64, "value_dim": 512},
            "value_dim: expected a multiple of 8 that needs no more room than head_dim 64, got 512",
        ),
        ({"query_len": 127}, "queries: expected at least 128, got 127"),
        ({"width": 127}, "window: expected at least 128 keys a query, got 127"),
        ({"softcap": 5000.0}, "softcap: expected at most 1000.0, got 5000.0"),
        (
            {"aligned": False},
            "q, k and v: expected addresses and strides that are multiples of 16 bytes, and none of 0",
        ),
    ),
    ids=str,
)
def test_reasons_name_what_was_expected_and_what_was_found(changes: dict[str, Any], reason: str) -> None:
    assert dense_reasons(**FINE | changes) == [reason]


@pytest.mark.parametrize(
    "make, expected",
    (
        (lambda: torch.empty(2, 100, 4, 128, dtype=torch.bfloat16).transpose(1, 2), True),
        (lambda: torch.empty(1, 4, 100, 136, dtype=torch.bfloat16)[..., :128], True),
        (lambda: torch.empty(2, 4, 100, 132, dtype=torch.bfloat16)[..., :128], False),
        (lambda: torch.empty(2, 4, 100, 136, dtype=torch.bfloat16)[..., 1:129], False),
        (lambda: torch.empty(2, 1, 100, 128, dtype=torch.bfloat16).expand(2, 4, 100, 128), False),
        (lambda: torch.empty(2, 4, 128, 100, dtype=torch.bfloat16).mT, False),
        (lambda: torch.empty(51200, dtype=torch.bfloat16).as_strided((1, 4, 100, 128), (3, 12800, 128, 1)), True),
    ),
)  # fmt: skip
def test_the_copy_engine_reads_aligned_rows(make: Any, expected: bool) -> None:
    pytest.importorskip("triton")
    from custom_ops.kernels.launch import can_copy

    assert can_copy(make()) == expected
