"""What Inductor generates around a cache of latents, run in Triton's interpreter: the numbers, without a GPU.

The code is generated in a process of its own (``tests.latent_sources``): here nothing can be compiled. In fp32, as all
tests of the interpreter.
"""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.kernels import paged_launch
from custom_ops.kernels.paged_config import paged_config, resolve_shape_class
from custom_ops.kernels.specialise import padded_dim
from custom_ops.paged.reference import reference_attention_of
from custom_ops.paged.schedule import ScheduleCall
from inductor_passes.gpu_facts import gpu_facts
from tests.interpreter.generated import kernel, sources_of
from tests.latent_cases import make
from tests.latent_models import PAGE_SIZE, PAGES, SLOTS, by_halves
from tests.latent_sources import ARCH, CASES, STORES
from tests.paged_cases import floors

pytestmark = [
    # Triton 3.6's interpreter makes scalars in a way that numpy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
    # Rows that see nothing subtract -inf from -inf before that is replaced.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sources_of("tests.latent_sources", tmp_path_factory.mktemp("generated"))


@pytest.mark.parametrize("name", STORES)
def test_the_store_writes_norm_and_rope_where_slots_say(
    name: str, sources: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(0)
    split, given = STORES[name]["split"], sources["stores"][name]["arguments"]
    shapes = [shape for shape in given if isinstance(shape, list)]
    tokens, width = shapes[0]
    projected, weight = torch.randn(tokens, width), torch.randn(split[0])
    angles = 6 * torch.rand(tokens, split[1])
    turns = torch.cat([angles.cos(), angles.sin()], 1)
    slots = torch.randperm(SLOTS)[:tokens]
    slots[::7] = torch.tensor([-1, SLOTS, 2**40, -(2**40), -SLOTS])
    cache = torch.full((PAGES, PAGE_SIZE, width), math.nan)
    latent = torch.full((tokens, width), math.nan)
    tensors = [projected, slots, weight, turns, cache, *([latent] if STORES[name].get("reads") else [])]
    assert sorted(list(t.shape) for t in tensors) == sorted(shapes)
    # The first of a shape is an input, the second one of that shape is the latent.
    ordered = [tensors.pop(next(i for i, t in enumerate(tensors) if list(t.shape) == shape)) for shape in shapes]
    numbers = [number for number in given if isinstance(number, int)]
    kernel(sources["stores"][name]["source"], tmp_path / "store.py")[(tokens,)](*ordered, *numbers, XBLOCK=1)

    value, rotary = projected.double().split(split, 1)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6) * weight
    rope = STORES[name].get("rope", by_halves)
    expected = torch.cat([value.float(), rope(rotary.float(), *turns.chunk(2, 1))], 1)
    stored = torch.full_like(cache, math.nan).flatten(0, 1)
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < SLOTS:
            stored[slot] = expected[row]
    torch.testing.assert_close(cache.flatten(0, 1), stored, rtol=1e-5, atol=1e-5, equal_nan=True)
    if STORES[name].get("reads"):
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_template_is_as_exact_as_its_op(name: str, sources: dict[str, Any], tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    call = make(CASES[name])
    facts = gpu_facts(ARCH)
    tokens, heads, width = call.q.shape
    shape_class = resolve_shape_class("auto", tokens, call.requests)
    config = paged_config(
        10 * facts.major + facts.minor, facts.multi_processor_count, call.impl, shape_class, call.q.dtype, call.q.dtype,
        heads, 1, width, call.cache_sizes.page_size, "unified", requests=call.requests, value_dim=call.value_dim,
    )  # fmt: skip
    gate = torch.randn(tokens, heads)
    out, lse = torch.full((tokens, heads, call.value_dim), math.nan), torch.full((tokens, heads), math.nan)
    rows = config.scratch_rows
    tensors: dict[str, Tensor | None] = {
        "Q": call.q,
        "K": None if call.k is None else call.k.squeeze(1),
        "K_CACHE": call.k_cache.squeeze(2),
        "PAGE_TABLES": call.page_tables,
        "SCHEDULE": paged_launch.schedule(ScheduleCall.of(call), config),
        "PARTS": torch.full((rows * padded_dim(call.value_dim),), math.nan),
        "PART_STATS": torch.full((2 * rows,), math.nan),
        "LSE": lse,
    }
    source = sources["cases"][name]["source"]
    run = kernel(source, tmp_path / "template.py")
    (parameters,) = re.findall(r"^def triton_tem_\w+\((.*)\):$", source, re.MULTILINE)
    ends = {"in": gate, "out": out}
    given = [
        tensors[parameter.removeprefix("arg_")] if parameter.startswith("arg_") else ends[parameter.split("_")[0]]
        for parameter in parameters.split(", ")
    ]
    run[(config.programs * config.head_blocks,)](*given)
    expected = reference_attention_of(call, torch.float64)
    gated = (expected[0] * torch.sigmoid(gate.double())[..., None], expected[1])
    for actual, exact, floor in zip((out, lse), gated, floors(call, expected), strict=True):
        torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=2 * floor)
