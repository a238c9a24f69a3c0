"""The GPU code that torch.compile generates around a cache of latents, without a GPU: stores, schedules, attention."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes import LIBRARY_OPTION, decisions
from inductor_passes.pretend_gpu import GPUS, Generated, compile_with_triton, pretend_gpu
from inductor_passes.store_pieces import StorePieces
from lowered_attn import CausalMetaData, set_fetch_fn_for_attn_metadata
from lowered_attn.forms.mla.deepseek import DeepSeekAttention
from tests.latent_models import (
    HEADS,
    HIDDEN,
    PAGE_SIZE,
    PAGES,
    SLOTS,
    TOKENS,
    Attend,
    Model,
    Rope,
    Store,
    StoreNorm,
    StoreRows,
    StoreView,
    StoreWithQueries,
    bf16,
    by_halves,
    compiled,
    interleaved,
    lengths,
    slots,
)
from tests.test_paged_codegen import called, is_attention, meaning, spills, stores, template

FP8 = torch.float8_e4m3fn
SPLITS = ((512, 64), (64, 16), (48, 16))
"""Elements of a value, and rotary ones behind them: DeepSeek's first."""
PORTABLE = {"options": {LIBRARY_OPTION: False}}


# ---------------------------------------------------------------------- stores


def the_store(records: list[decisions.Decision]) -> decisions.Decision:
    (decision,) = [d for d in records if d.op == "store_latent_cache"]
    assert decision.stage == "lowered" and decision.facts["kernel"] == "scatter"
    return decision


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rope", [by_halves, interleaved])
@pytest.mark.parametrize("reads", ["nothing", "after"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_norm_rope_and_the_store_are_one_kernel(split: tuple[int, int], rope: Rope, reads: str, dynamic: bool) -> None:
    made, records = compiled(Store, "sm_90", {"dynamic": dynamic}, split=split, rope=rope, reads=reads)
    assert len(called(made)) == 1 and len(made.kernels) == 1, called(made)
    assert the_store(records).facts["pieces"] == 2


@pytest.mark.parametrize(("reads", "launches"), [("nothing", 2), ("after", 3)])
def test_the_cat_would_take_kernels_of_its_own(reads: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Inductor makes fewer of a cat than this, ``StorePieces`` is no longer needed."""
    monkeypatch.setattr(StorePieces, "rewrite", lambda self, graph: 0)
    made, records = compiled(Store, reads=reads)
    assert len(called(made)) == launches, called(made)
    assert "pieces" not in the_store(records).facts


@pytest.mark.parametrize(
    ("model", "settings", "pieces"),
    [
        (StoreView, {}, 2),
        (StoreNorm, {"split": (512, 0)}, None),
        (StoreRows, {}, None),
        (StoreWithQueries, {}, 2),
    ],
    ids=["behind views", "no cat", "a cat of rows", "with queries"],
)
def test_what_is_stored_may_be_anything(model: type[Store], settings: dict[str, Any], pieces: int | None) -> None:
    made, records = compiled(model, **settings)
    assert len(called(made)) == 1, called(made)
    assert the_store(records).facts.get("pieces") == pieces


def test_a_latent_that_is_read_before_the_store_stays_a_cat() -> None:
    made, records = compiled(Store, reads="before")
    assert the_store(records).facts["joined"] is False
    assert_no_cache_is_copied(made)


@pytest.mark.parametrize("reads", ["nothing", "after"])
def test_stores_are_masked_by_the_slot_and_the_columns_of_a_piece(reads: str) -> None:
    (source,) = compiled(Store, reads=reads)[0].kernels.values()
    masks = [meaning(mask, source) for _, mask in stores(source)]
    by_slot = [mask for mask in masks if ">=" in mask]
    assert len(masks) == (4 if reads == "after" else 2) and len(by_slot) == 2, masks
    for mask in by_slot:
        assert re.search(r"tmp\d+ >= \(tl\.full\(.*?, 0, tl\.int64\)\)", mask), mask
        assert re.search(rf"tmp\d+ < \(tl\.full\(.*?, {SLOTS}, tl\.int64\)\)", mask), mask
    for width in (512, 64):
        columns = rf"\br0_1\b.*? < \(tl\.full\(\[1, 1\], {width}, tl\.int64"
        assert len([mask for mask in masks if re.search(columns, mask)]) == len(masks) // 2, masks
    assert "device_assert" not in source  # slots that are not written need no check
    assert f"+ {SLOTS}" not in source  # -1 does not wrap around to the last slot


@pytest.mark.parametrize("model", [Store, StoreView, StoreWithQueries])
def test_the_store_compiles_without_spills(model: type[Store]) -> None:
    (source,) = compiled(model)[0].kernels.values()
    with pretend_gpu("sm_90"):
        kernels = compile_with_triton(source)
    assert any(spills(kernel) == 0 for kernel in kernels), [kernel.log for kernel in kernels]


def assert_no_cache_is_copied(made: Generated, but_for_products: bool = False) -> None:
    """``but_for_products``: einsum calls its transposed products clones."""
    body = made.wrapper.split("def call(", 1)[1].split("def get_args", 1)[0]
    assert but_for_products or "clone" not in body
    assert "copy_(" not in body
    for shape, dtype in re.findall(r"empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), (torch\.\w+)\)", body):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        assert dtype != "torch.bfloat16" or torch.Size(sizes).numel() < SLOTS * 576, shape


@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
@pytest.mark.parametrize("together", [False, True], ids=["a cache each", "one allocation"])
@pytest.mark.parametrize("library", [False, True], ids=["portable", "library"])
def test_no_cache_is_copied(direct: bool, together: bool, library: bool) -> None:
    options = {"options": {LIBRARY_OPTION: library}}
    assert_no_cache_is_copied(compiled(Model, "sm_90", options, direct=direct, together=together)[0])


# ---------------------------------------------------------------------- layers and schedules


@functools.cache
def two_layers(direct: bool) -> Generated:
    return compiled(Model, "sm_80", direct=direct)[0]


@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
def test_a_layer_is_one_launch_between_projection_and_attention(direct: bool) -> None:
    names = called(two_layers(direct))
    attention = [name for name in names if is_attention(name)]
    rest = [name for name in names if name not in (*attention, "paged_schedule")]
    # What is left of each layer: the norm of x, then the norm of the value, RoPE and the store.
    assert len(attention) == 2 and names.count("paged_schedule") == 1
    assert len(rest) == 4 and rest[:2] == rest[2:], names


@pytest.mark.parametrize("schedules", [False, True], ids=["none given", "one a layer"])
def test_three_layers_share_one_schedule(schedules: bool) -> None:
    assert called(compiled(Model, layers=3, schedules=schedules)[0]).count("paged_schedule") == 1


def test_layers_with_another_window_have_a_schedule_of_their_own() -> None:
    assert called(compiled(Model, layers=3, windows=(0, 64, 64))[0]).count("paged_schedule") == 2


# ---------------------------------------------------------------------- attention


def the_attention(records: list[decisions.Decision]) -> decisions.Decision:
    (decision,) = [d for d in records if d.op == "paged_latent_attention" and d.stage == "lowered"]
    assert decision.stage == "lowered"
    return decision


@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("heads", [HEADS, 128])
def test_a_gate_of_each_head_is_an_epilogue_of_attention(direct: bool, dynamic: bool, heads: int) -> None:
    made, records = compiled(Attend, "sm_80", {"dynamic": dynamic}, direct=direct, heads=heads)
    assert called(made)[0] == "paged_schedule" and [is_attention(name) for name in called(made)[1:]] == [True]
    in_loop = template(made).split("while unit < end_unit:", 1)[1].split("unit += end - first", 1)[0]
    assert "tl.sigmoid" in in_loop and in_loop.count("tl.store(") == 1
    decision = the_attention(records)
    assert decision.facts["kernel"] == "triton_paged" and "latents of 512 + 64 elements" in decision.detail


def test_a_cast_to_fp8_is_an_epilogue_of_attention() -> None:
    made, _ = compiled(Attend, "sm_90", PORTABLE, to=FP8)
    assert called(made)[0] == "paged_schedule" and len(called(made)) == 2
    assert "tl.float8e4nv" in template(made)


def test_the_hopper_kernel_is_the_op_itself() -> None:
    made, records = compiled(Attend, "sm_90")
    assert called(made)[:2] == ["paged_schedule", "paged_latent_attention"]
    decision = the_attention(records)
    assert decision.facts["kernel"] == "op" and "gluon" in decision.detail


@pytest.mark.parametrize("lse", [False, True], ids=["lse unread", "lse read"])
def test_lse_is_written_where_it_is_read(lse: bool) -> None:
    source = template(compiled(Attend, "sm_80", lse=lse)[0])
    assert ("tl.store(LSE" in source) == lse == ("arg_LSE" in source)


def test_a_latent_is_read_once_for_key_and_value() -> None:
    """The kernel has no pointer to values."""
    source = template(compiled(Attend, "sm_80", direct=True)[0])
    signature = re.search(r"^def triton_tem_\w+\((.*)\):$", source, re.MULTILINE)
    assert signature is not None
    assert {"arg_Q", "arg_K", "arg_K_CACHE"} <= set(signature[1].split(", "))
    assert not {"arg_V", "arg_V_CACHE"} & set(signature[1].split(", "))


OPERANDS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "window": {"window": 64},
    "plain": {"mode": "plain"},
    "block": {"mode": "block_causal", "block_size": 32, "direct": True},
    "prefix": {"mode": "prefix_full", "block_size": 4, "request_values": 3},
    "hole": {"mode": "block_causal", "block_size": 4, "prefix_hole": True, "request_values": 2},
    "cache only": {"mode": "cache_only", "direct": True},
    "a program a head": {"impl": "triton"},
    "1 head": {"heads": 1},
    "3 heads": {"heads": 3},
    "63 heads": {"heads": 63},
    "128 heads": {"heads": 128, "tokens": 4},
    "no rotary elements": {"split": (32, 0), "direct": True},
    "48 + 16": {"split": (48, 16)},
    "64 + 128": {"split": (64, 128)},
}


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_every_operand_has_a_template_that_compiles(operands: dict[str, Any]) -> None:
    made, _ = compiled(Attend, "sm_90", PORTABLE, **operands)
    assert called(made)[0] == "paged_schedule" and [is_attention(name) for name in called(made)[1:]] == [True]
    with pretend_gpu("sm_90"):
        (kernel,) = compile_with_triton(template(made))
    assert kernel.shared_memory <= GPUS["sm_90"].shared_memory_per_block_optin


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tokens", [4, TOKENS], ids=["decode", "chunk"])
@pytest.mark.parametrize("heads", [HEADS, 128])
def test_attention_and_its_gate_compile_without_spills(arch: str, tokens: int, heads: int) -> None:
    """Almost: 3 registers of a thread on sm_90 with 128 heads and Triton 3.6, none with 3.7 and 3.9."""
    made, _ = compiled(Attend, arch, PORTABLE, tokens=tokens, heads=heads)
    with pretend_gpu(arch):
        (kernel,) = compile_with_triton(template(made))
    assert spills(kernel) <= (16 if arch == "sm_90" and heads == 128 else 0)


def test_without_library_kernels_schedule_and_attention_are_portable() -> None:
    made, records = compiled(Model, "sm_90", PORTABLE, layers=2)
    assert called(made).count("paged_schedule") == 1 and "paged_latent_attention" not in called(made)
    assert "impl='triton_portable'" in made.wrapper
    attention = [d for d in records if d.op == "paged_latent_attention" and d.stage == "lowered"]
    assert {d.facts["impl"] for d in attention} == {"triton_portable"}


# ---------------------------------------------------------------------- a whole layer


class Served(nn.Module):
    """Layers of ``DeepSeekAttention`` in a serving step, with a norm and a residual around each."""

    def __init__(self, promised: bool) -> None:
        super().__init__()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
            self.layers = nn.ModuleList(DeepSeekAttention(HIDDEN, HEADS, q_comp_dim=1536) for _ in range(2))
        torch.set_default_dtype(torch.float32)
        for layer in self.layers:
            layer.paged.latent_cache = bf16(PAGES, PAGE_SIZE, 576)
        cu_seqlens_q, context_lens, page_tables = lengths()
        self.metadata = CausalMetaData(
            cu_seqlens_q=cu_seqlens_q, context_lens=context_lens, page_tables=page_tables, slot_mapping=slots(),
            page_size=PAGE_SIZE, new_keys_in_cache=promised,
        )  # fmt: skip

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer.serve(norm(x), positions)
        return x

    def inputs(self) -> tuple[Tensor, ...]:
        set_fetch_fn_for_attn_metadata(lambda: self.metadata)
        return bf16(TOKENS, HIDDEN), torch.empty(TOKENS, dtype=torch.int64, device="cuda")


@pytest.fixture
def no_metadata_is_left() -> Iterator[None]:
    yield
    set_fetch_fn_for_attn_metadata(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("no_metadata_is_left")
@pytest.mark.parametrize("promised", [False, True], ids=["direct", "through the cache"])
def test_a_served_layer_is_five_launches_beside_its_products(promised: bool) -> None:
    """The norm of x; the norms of q's and of the key's compressed part, RoPE and the store; RoPE of q and its join;
    attention; the output by heads. Before all layers: cosines and sines, and the schedule."""
    made, records = compiled(Served, "sm_80", promised=promised)
    names = called(made)
    assert names.count("paged_schedule") == 1
    names.remove("paged_schedule")
    assert len(names) == 1 + 2 * 5, names
    assert [is_attention(name) for name in names[1:]] == [False, False, False, True, False] * 2
    assert [d.facts["joined"] for d in records if d.op == "store_latent_cache"] == [not promised] * 2
    assert_no_cache_is_copied(made, but_for_products=True)
