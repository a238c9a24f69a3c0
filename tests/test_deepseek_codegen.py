"""The GPU code that torch.compile generates for `DeepSeekAttention`, without a GPU: serving steps and streams."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes import decisions
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn import CausalMetaData, DeepSeekAttention, set_fetch_fn_for_attn_metadata
from lowered_attn.compile import backend
from tests.test_paged_codegen import called

WIDTH, HEADS, LAYERS, ROWS, REQUESTS, PAGE_SIZE, PAGES = 256, 16, 3, 32, 8, 64, 256


@pytest.fixture(autouse=True)
def in_bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)
    set_fetch_fn_for_attn_metadata(None)


class Model(nn.Module):
    """Layers of a served model: norm, attention, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS))
        self.layers = nn.ModuleList(DeepSeekAttention(WIDTH, HEADS, q_comp_dim=1536) for _ in range(LAYERS))
        for layer in self.layers:
            layer.paged.latent_cache = torch.empty(PAGES, PAGE_SIZE, 576)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer.serve(norm(x), positions)
        return x


def largest_allocation(made: Generated) -> int:
    """Elements of the largest tensor that the forward allocates."""
    body = made.wrapper.split("def call(", 1)[1].split("def benchmark", 1)[0]
    shapes = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", body)
    assert shapes
    return max(math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes)


def attention_calls(names: list[str]) -> int:
    return sum("paged_latent_attention" in name for name in names)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_served_layer_is_five_launches_and_its_matmuls(arch: str, direct: bool) -> None:
    """Norm; q_norm, kv_norm, RoPE and the store; the query; attention; the layout of values.

    For all layers once: the schedule, and angles.
    """
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors(), torch.device("cuda"):
            model, x, positions = Model().eval(), torch.empty(ROWS, WIDTH), torch.empty(ROWS, dtype=torch.int64)
            lengths = {
                name: torch.empty(*size, dtype=torch.int32)
                for name, size in (
                    ("cu_seqlens_q", (REQUESTS + 1,)), ("context_lens", (REQUESTS,)), ("page_tables", (REQUESTS, 4))
                )
            }  # fmt: skip
            slots = torch.empty(ROWS, dtype=torch.int64)
            step = CausalMetaData(**lengths, slot_mapping=slots, page_size=PAGE_SIZE, new_keys_in_cache=not direct)
        set_fetch_fn_for_attn_metadata(lambda: step)
        with decisions.recording() as log:
            made = generate(model, x, positions, backend=backend)
    names = called(made)
    assert len(names) <= 2 + 5 * LAYERS, names
    assert names.count("paged_schedule") == 1 and attention_calls(names) == LAYERS
    stores = [d for d in log.records if d.op == "store_latent_cache"]
    assert len(stores) == LAYERS and all(d.stage == "lowered" for d in stores)
    assert largest_allocation(made) < PAGES * PAGE_SIZE * 576  # no copy of a cache


@pytest.mark.parametrize("new", [1, 4])
def test_a_stream_writes_and_reads_its_cache_in_place(new: int) -> None:
    with pretend_gpu("sm_80") as gpu:
        with gpu.fake_tensors(), torch.device("cuda"):
            module = DeepSeekAttention(WIDTH, HEADS).eval()
            x, cache = torch.empty(2, new, WIDTH), module.make_cache(2, 8000)
        made = generate(lambda x: module(x, cache=cache), x, backend=backend)
    names = called(made)
    assert attention_calls(names) == 1 and names.count("paged_schedule") == 1
    assert largest_allocation(made) < cache.data.numel()
