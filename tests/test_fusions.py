"""What Inductor fuses into attention's kernels: kernels counted in the code it generates, and what ``explain`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from custom_ops.paged import CacheSizes, empty_caches
from inductor_passes import LIBRARY_OPTION, QUERIES_OPTION, decisions
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from inductor_passes.resources import compile_kernel
from lowered_attn.compile import backend
from lowered_attn.explain import Explanation
from lowered_attn.layers import apply_rope
from tests import fusions
from tests.fusions import EPILOGUES, EPILOGUES_OF_HEADS, OPS, PROLOGUES, Inputs
from tests.test_paged_codegen import called, is_attention, model_inputs, template

SIZES = (2, 1024, 16, 4, 128)
TOKENS, HEADS, KV_HEADS, DIM = 32, 8, 2, 128
on_shapes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def compiled(
    model: Callable[[Inputs], Any], arch: str = "sm_90", sizes: tuple[int, int, int, int, int] = SIZES,
    dtype: torch.dtype = torch.bfloat16, q_dtype: torch.dtype | None = None, dynamic: bool = False, **options: Any,
) -> tuple[Generated, list[decisions.Decision]]:  # fmt: skip
    """What is generated for a model of ``Inputs``, in inference and without library kernels, and what was decided."""
    with pretend_gpu(arch) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            given = fusions.inputs(*sizes, dtype, "cuda", q_dtype)
        with decisions.recording() as log:
            made = generate(
                lambda *tensors: model(Inputs(*tensors)), *given, backend=backend, dynamic=dynamic,
                options={LIBRARY_OPTION: False, QUERIES_OPTION: True, **options},
            )  # fmt: skip
    return made, log.records


def said(records: list[decisions.Decision], stage: str) -> list[str]:
    return [d.detail for d in records if d.stage == stage]


# ---------------------------------------------------------------------- after attention


def dense(name: str) -> Callable[[Inputs], Tensor]:
    return lambda given: fusions.after(name, fusions.attend(given, given.q), given)


@pytest.mark.parametrize("name", [*EPILOGUES, *EPILOGUES_OF_HEADS])
@on_shapes
def test_what_follows_attention_is_in_its_kernel(name: str, dynamic: bool) -> None:
    made, records = compiled(dense(name), dynamic=dynamic)
    assert len(called(made)) == 1 and is_attention(called(made)[0]), called(made)
    (fused,) = said(records, "fused")
    assert fused.startswith("into the store of the output: ") and not said(records, "apart")


@pytest.mark.parametrize("name", [*EPILOGUES, *EPILOGUES_OF_HEADS])
def test_without_epilogues_it_is_another_kernel(name: str) -> None:
    made, records = compiled(dense(name), epilogue_fusion=False)
    assert len(called(made)) >= 2
    assert not said(records, "fused") and said(records, "apart")


def test_merging_heads_costs_nothing() -> None:
    made, _ = compiled(lambda given: fusions.attend(given, given.q).transpose(1, 2).flatten(2))
    assert len(called(made)) == 1


@pytest.mark.parametrize("name", ["gate, merge, fp8", "int8"])
def test_epilogues_cost_no_spills(name: str) -> None:
    made, _ = compiled(dense(name))
    assert compile_kernel(template(made), "sm_90").problems == []


class Paged(nn.Module):
    """Attention over a cache, and what follows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        caches = empty_caches("unified", CacheSizes(64, 16, KV_HEADS, DIM), torch.bfloat16, "cuda")
        self.k_cache, self.v_cache = (nn.Buffer(cache) for cache in caches)
        self.name = name

    def forward(self, q: Tensor, gate: Tensor, x: Tensor, factor: Tensor, *lengths: Tensor) -> Tensor:
        out, _ = OPS.paged_attention(q, None, None, self.k_cache, self.v_cache, *lengths, None, [], None)
        return EPILOGUES[self.name](out, gate, x, factor)


def paged(name: str, **keywords: Any) -> tuple[list[str], list[decisions.Decision]]:
    options = {LIBRARY_OPTION: False, QUERIES_OPTION: True, **keywords.pop("options", {})}
    with pretend_gpu("sm_90") as gpu, torch.no_grad():
        with gpu.fake_tensors():
            rows = torch.empty(2, TOKENS, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
            x, factor = torch.empty(TOKENS, HEADS * DIM, dtype=rows.dtype, device="cuda"), torch.empty(1, device="cuda")
            model, lengths = Paged(name), model_inputs(TOKENS)[3:]
        with decisions.recording() as log:
            made = generate(model, *rows, x, factor, *lengths, backend=backend, options=options, **keywords)
    return called(made), log.records


@pytest.mark.parametrize("name", EPILOGUES)
@on_shapes
def test_what_follows_paged_attention_is_in_its_kernel(name: str, dynamic: bool) -> None:
    names, records = paged(name, dynamic=dynamic)
    assert names[0] == "paged_schedule" and [is_attention(name) for name in names[1:]] == [True], names
    (fused,) = said(records, "fused")
    assert fused.startswith("into the store of the output: ") and not said(records, "apart")


@pytest.mark.parametrize("name", EPILOGUES)
def test_without_epilogues_it_is_another_kernel_after_paged_attention(name: str) -> None:
    names, records = paged(name, options={"epilogue_fusion": False})
    assert len(names) >= 3 and not said(records, "fused") and said(records, "apart")


def test_a_norm_after_attention_is_a_kernel_of_its_own() -> None:
    def normed(given: Inputs) -> Tensor:
        return nn.functional.rms_norm(fusions.attend(given, given.q).transpose(1, 2).flatten(2), given.x.shape[2:])

    made, records = compiled(normed)
    assert len(called(made)) == 2
    (apart,) = said(records, "apart")
    assert apart.endswith("stays a kernel of its own: it reduces over more than the tile that a program has")


# ---------------------------------------------------------------------- before attention


def before(name: str) -> Callable[[Inputs], Tensor]:
    return lambda given: fusions.attend(given, PROLOGUES[name](given.q, given))


def q_dtype_of(name: str) -> torch.dtype | None:
    return fusions.FP8 if name == "dequantise" else None


@pytest.mark.parametrize("name", PROLOGUES)
@on_shapes
def test_what_makes_a_query_is_in_the_kernel(name: str, dynamic: bool) -> None:
    made, records = compiled(before(name), q_dtype=q_dtype_of(name), dynamic=dynamic)
    assert len(called(made)) == 1 and is_attention(called(made)[0]), called(made)
    # Nothing else is written: q has no buffer.
    assert made.wrapper.count("empty_strided_cuda((") == 1
    (fused,) = said(records, "fused")
    assert fused.startswith("q is computed where it is loaded: ") and not said(records, "apart")


@pytest.mark.parametrize("name", PROLOGUES)
def test_without_prologues_it_is_another_kernel(name: str) -> None:
    made, records = compiled(before(name), q_dtype=q_dtype_of(name), prologue_fusion=False)
    assert len(called(made)) == 2
    (apart,) = said(records, "apart")
    assert apart.startswith("q (") and not said(records, "fused")


@pytest.mark.parametrize(
    ("arch", "instruction"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")], ids=lambda x: x
)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["rope of heads", "rope and scale", "dequantise"])
def test_a_query_made_in_the_kernel_costs_no_spills(name: str, dim: int, arch: str, instruction: str) -> None:
    sizes = (*SIZES[:4], dim)
    if name == "dequantise" and arch == "sm_80":
        pytest.skip("Triton reads float8_e4m3fn from sm_89 on")
    made, _ = compiled(before(name), arch, sizes, q_dtype=q_dtype_of(name))
    kernel = compile_kernel(template(made), arch)
    assert len(called(made)) == 1 and getattr(kernel, instruction) > 0 and kernel.problems == []


@pytest.mark.parametrize("kv_heads", [4, 16], ids=["grouped", "as many heads"])
def test_rope_of_q_and_a_gate_share_one_kernel_and_rope_of_k_is_the_other(kv_heads: int) -> None:
    def layer(given: Inputs) -> Tensor:
        q, k = (fusions.rope_of_heads(t, given) for t in (given.q, given.k))
        return fusions.after("gate merged heads", fusions.attend(given._replace(k=k), q), given)

    made, records = compiled(layer, sizes=(*SIZES[:3], kv_heads, SIZES[4]))
    assert [is_attention(name) for name in called(made)] == [False, True]
    assert [detail.split(":")[0] for detail in said(records, "fused")] == [
        "q is computed where it is loaded", "into the store of the output",
    ]  # fmt: skip
    (apart,) = said(records, "apart")
    assert apart.startswith("k (") and "loaded again for every tile of queries" in apart


def test_explain_prints_what_is_fused_and_what_is_not_under_its_attention() -> None:
    def layer(given: Inputs) -> Tensor:
        q, k = (fusions.rope_of(t, given) for t in (given.q, given.k))
        return fusions.after("residual", fusions.attend(given._replace(k=k), q), given)

    _, records = compiled(layer)
    printed = str(Explanation(tuple(records), {}, (), "cuda"))
    about = printed.split("node full_self", 1)[1]
    assert "\n    fused: q is computed where it is loaded: mul, neg, cat, add\n" in about
    assert "\n    fused: into the store of the output: add\n" in about
    assert "\n    apart: k (mul, neg, cat, add) stays a kernel of its own: its tiles are loaded again" in about
    assert printed.startswith("1 attention forms grouped, 1 lowered, 0 attention ops left alone")


def test_norms_of_q_and_k_stay_one_kernel() -> None:
    def layer(given: Inputs) -> Tensor:
        q, k = (fusions.rope_of(nn.functional.rms_norm(t, t.shape[3:]), given) for t in (given.q, given.k))
        return fusions.attend(given._replace(k=k), q)

    made, _ = compiled(layer, sizes=(*SIZES[:3], SIZES[2], SIZES[4]))
    assert [is_attention(name) for name in called(made)] == [False, True]


def test_angles_are_computed_once_and_read_by_the_kernel() -> None:
    """Of q alone: nothing else reads the angles."""

    def layer(given: Inputs) -> Tensor:
        positions = torch.arange(given.q.shape[1], device=given.q.device)
        return fusions.attend(given, apply_rope(given.q, positions))

    made, records = compiled(layer, sizes=(*SIZES[:4], 64))
    assert [is_attention(name) for name in called(made)].count(True) == 1 and len(called(made)) <= 3, called(made)
    (fused,) = said(records, "fused")
    assert fused.startswith("q is computed where it is loaded: ") and "cos" not in fused
    assert "libdevice.cos" not in template(made) and "tl_math.cos" not in template(made)


def test_attention_of_a_tensor_to_itself_has_it_in_memory() -> None:
    def itself(given: Inputs) -> Tensor:
        q = given.q * 2
        return fusions.attend(given._replace(k=q), q)

    made, records = compiled(itself)
    assert len(called(made)) == 2
    assert any(detail.endswith("its result is also read by attention again") for detail in said(records, "apart"))


def test_every_form_computes_its_queries() -> None:
    def segments(given: Inputs) -> Tensor:
        ids = given.x[:, :, 0].to(torch.int32)
        q, k, v = (t.transpose(1, 2) for t in (fusions.rope_of(given.q, given), given.k, given.v))
        return OPS.segment_cross(q, k, v, ids, 4)[0]

    _, records = compiled(segments)
    assert any(detail.startswith("q is computed") for detail in said(records, "fused"))


def attend_to(change: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda given: fusions.attend(given, change(given))


def rope_by_parts(given: Inputs) -> Tensor:
    cos, sin = given.turns[..., : given.turns.shape[3] // 2].unsqueeze(3).unbind(2)
    first, second = given.q.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def with_its_query(given: Inputs) -> tuple[Tensor, Tensor]:
    q = fusions.rope_of(given.q, given)
    return fusions.attend(given, q), q


REFUSED: dict[str, tuple[Callable[[Inputs], Any], int, str]] = {
    "also an output": (with_its_query, 128, "its result is also read by the graph's output"),
    "also read": (
        lambda given: sum(t.sum() for t in with_its_query(given)), 128, "its result is also read by sum",
    ),
    "a norm": (
        attend_to(lambda given: nn.functional.rms_norm(given.q, given.q.shape[3:])), 128,
        "it is part of a kernel that reduces (a norm)",
    ),
    "two parts": (attend_to(lambda given: given.q * 2), 96, "a tile of 96 columns is loaded in two parts"),
    "wide": (
        attend_to(lambda given: given.q * 2), 256, "a tile of 256 columns leaves no registers to compute it in",
    ),
    "angles": (
        attend_to(lambda given: given.q * (given.gate * 3 + 1).tan()), 128,
        "tan on the way takes too many registers",
    ),
    "a gather": (
        attend_to(lambda given: given.q * given.turns[0, :, 0][given.x[..., 0].long()][:, :, None]), 128,
        "it reads a table at indices that are data, and a kernel that checks them is slower",
    ),
    "loads": (attend_to(rope_by_parts), 128, "8 loads an element of 128 columns take too many registers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_query_stays_a_kernel_of_its_own_for_a_reason(name: str) -> None:
    model, dim, reason = REFUSED[name]
    made, records = compiled(model, sizes=(*SIZES[:4], dim))
    assert len(called(made)) >= 2
    (apart,) = (detail for detail in said(records, "apart") if detail.startswith("q ("))
    assert apart.endswith(f"stays a kernel of its own: {reason}"), apart
    assert not any(detail.startswith("q ") for detail in said(records, "fused"))


def test_queries_that_lie_in_memory_are_loaded_as_before() -> None:
    made, records = compiled(lambda given: fusions.attend(given, given.q))
    assert "load_query(Q" in template(made) and not said(records, "fused") and not said(records, "apart")


def test_a_training_graph_keeps_the_query_that_its_gradient_reads() -> None:
    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            given = [t.requires_grad_() for t in fusions.inputs(*SIZES, torch.bfloat16, "cuda")[:4]]
        with decisions.recording() as log:
            generate(
                lambda q, k, v, turns: fusions.attend(
                    (at := Inputs(q, k, v, turns, turns, turns, turns)), fusions.rope_of(q, at)
                ),
                *given, backend=backend, options={LIBRARY_OPTION: False, QUERIES_OPTION: True},
            )  # fmt: skip
    (apart,) = said(log.records, "apart")
    assert apart.endswith("its result is also read by the graph's output")
