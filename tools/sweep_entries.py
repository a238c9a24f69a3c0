"""Who is measured at a point of the sweep: what our dispatch takes, what it chooses among, and its peers."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from custom_ops.form import default_scale, empty_outputs
from custom_ops.kernels.gluon.dense_choice import best_plan
from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.kernels.gluon.dense_shape import DenseShape, dense_shape
from custom_ops.kernels.specialise import architecture, kernel_operands
from custom_ops.kernels.tile_config import TileConfig, can_use_descriptors, forward_config, heads_together
from tools.cases import Case
from tools.sweep_cases import POINTS, call_of, dims_of, mask_of, problem_of
from tools.variants import VARIANTS, Prepared, Problem, Unavailable, Variant, peers_with_fa3

OURS, PORTABLE, FA3, CUDNN = "ours", "portable", "fa3", "cudnn"
Job = tuple[str, str]
"""Point and entry, by name."""


# ------------------------------------------------------------------ ours


def choice(problem: Problem) -> dict[str, Any]:
    """What the eager dispatch takes for this call: `kernel` (`"gluon"`, `"cudnn"`, `"triton"`), `tiling`, `why`.

    `against` says why it cannot be the Hopper kernel, and is empty where it could.
    """
    from custom_ops.kernels import launch

    slots = problem.form.slots(problem.operands)
    call = problem.form, problem.query, problem.key, problem.value, slots
    kernel, why = launch.kernel_for(*call)
    tiling = {"gluon": lambda: _tiling(shipped_shape(problem)), "triton": lambda: str(portable_config(problem))}
    return {
        "kernel": kernel,
        "tiling": tiling[kernel]() if kernel in tiling else "",
        "why": why,
        "against": launch.against_hopper(*call),
    }


def shipped_shape(problem: Problem, consumers: int | None = None) -> DenseShape:
    """What the Hopper kernel is compiled for: what is chosen for this call, or the shipped tiling of so many consumers.

    Of three there is not one everywhere: then of two.
    """
    slots = problem.form.slots(problem.operands)
    mask = problem.form.mask_of(slots)
    present = tuple(t is not None for t in kernel_operands(slots).values())
    sizes = Sizes.of(problem.query.shape, problem.key.shape, problem.value.shape)
    group, sharing = sizes.heads // sizes.kv_heads, sizes.kv_heads // sizes.value_heads
    if consumers is None:
        consumers = best_plan(mask, slots.ints, present, sizes).consumers  # type: ignore[arg-type]
    return dense_shape(mask, present, group, sharing, sizes.head_dim, sizes.value_dim, False, consumers)  # type: ignore[arg-type]


def _tiling(shape: DenseShape) -> str:
    kinds = [name for name in ("overlap", "split") if getattr(shape, name)]
    return " ".join([f"{shape.block_m} rows x {shape.block_n} keys, {shape.stages} stages", *kinds])


def portable_config(problem: Problem) -> TileConfig:
    """The shipped tiling of the portable kernel."""
    slots, query = problem.form.slots(problem.operands), problem.query
    level = architecture(query.device) if query.is_cuda else 0
    width = problem.form.mask_of(slots).width_for(slots.ints)
    fit = can_use_descriptors(level, slots.key_padding is not None)
    return forward_config(level, query.dtype, query.shape[3], problem.value.shape[3], width, fit)


def _portable(problem: Problem) -> Prepared:
    """The portable Triton kernel, whatever the dispatch would take."""
    from custom_ops.kernels import launch

    form, scale = problem.form, default_scale(problem.query, problem.scale)
    slots, config = form.slots(problem.operands), portable_config(problem)
    tensors = (problem.query, problem.key, problem.value)
    return Prepared(lambda: (launch.forward(form, *tensors, slots, scale, config=config)[0],))


def _gluon(problem: Problem, overrides: Mapping[str, Any], shipped: int | None = None) -> Prepared:
    """The Hopper kernel with some of its compile-time numbers replaced.

    ``shipped``: those of the shipped tiling of so many consumers, not of the chosen one.
    """
    from custom_ops.kernels.gluon import dense_launch

    form, scale = problem.form, default_scale(problem.query, problem.scale)
    slots = form.slots(problem.operands)
    mask = form.mask_of(slots)
    shape = dataclasses.replace(shipped_shape(problem, shipped), **overrides)

    def run() -> tuple[torch.Tensor]:
        out, lse = empty_outputs(problem.query, problem.value)
        dense_launch.forward(
            mask, problem.query, problem.key, problem.value, slots, scale, 0.0, out, lse, shape=shape
        )
        return (out,)

    return Prepared(run)


# ------------------------------------------------------------------ peers


def _fa3(problem: Problem) -> Prepared:
    """FlashAttention-3 with everything but the call itself outside the clock: at small points the rest would show."""
    call = peers_with_fa3().fa3_op()
    query, key, value = (
        t.transpose(1, 2).contiguous().flatten(0, 1) for t in (problem.query, problem.key, problem.value)
    )
    batch, heads, length, _ = problem.query.shape
    starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * length
    window = problem.operands.get("window")
    absent = (
        "k_new v_new q_v out cu_seqlens_k_new seqused_q seqused_k page_table kv_batch_idx leftpad_k "
        "rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale scheduler_metadata pack_gqa s_aux "
        "cp_tot_seqused_k"
    )
    arguments: dict[str, Any] = {
        **dict.fromkeys(absent.split()),
        "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": length, "max_seqlen_k": length,
        "softmax_scale": default_scale(query, problem.scale), "softcap": 0.0,
        "is_causal": not problem.is_unmasked,
        "window_size_left": -1 if window is None else int(window) - 1,
        "window_size_right": -1 if window is None else 0,
        "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
    }  # fmt: skip
    return Prepared(
        lambda: call(query, key, value, **arguments)[0],
        lambda out: (out.view(batch, length, heads, -1).transpose(1, 2),),
    )


def _cudnn(problem: Problem) -> Prepared:
    if "window" in problem.operands:
        raise Unavailable("SDPA takes a window only as a mask of S x S elements")
    return VARIANTS["sdpa-cudnn"].prepare(problem)


ENTRIES: dict[str, Variant[Problem]] = {
    variant.name: variant
    for variant in (
        Variant(OURS, "lowered-attn", VARIANTS["ours-eager"].prepare, ours=True),
        Variant(FA3, "FlashAttention-3", _fa3),
        Variant(CUDNN, "cuDNN", _cudnn),
        Variant(PORTABLE, "portable Triton", _portable, ours=True),
    )
}
"""By name, in the order of a round."""


# ------------------------------------------------------------------ other tilings of the Hopper kernel


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A way to compile the Hopper kernel, as `--variants` gives it."""

    name: str
    overrides: Mapping[str, Any]
    """Fields of `DenseShape`."""
    only: str = "*"
    """The points that it is measured at, as `--only` says it."""
    shipped: int | None = None
    """Consumers of the shipped tiling that it starts from; None: of the one chosen for the call."""

    @property
    def variant(self) -> Variant[Problem]:
        prepare = functools.partial(_gluon, overrides=self.overrides, shipped=self.shipped)
        return Variant(self.name, self.name, prepare, ours=True)

    def measures(self, case: Case) -> bool:
        return any(fnmatch.fnmatch(case.name, pattern.strip()) for pattern in self.only.split(","))


def tilings(text: str | None) -> list[Tiling]:
    """Those of a JSON object, or of the file of that name: by name, `DenseShape` fields, and `only` and `shipped`.

    `{"two": {"shipped": 2}, "deep": {"shipped": 2, "stages": 3, "only": "causal_d64*"}}`. `shipped`: fields replace
    those of the shipped tiling of so many consumers; without, of the one chosen for a point. Without `value_stages`,
    `stages` stands for both. Raises ValueError where a field is unknown or the name is taken.
    """
    if text is None:
        return []
    given = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    fields = [field.name for field in dataclasses.fields(DenseShape)]
    found = []
    for name, numbers in given.items():
        overrides = dict(numbers)
        only, shipped = overrides.pop("only", "*"), overrides.pop("shipped", None)
        if "stages" in overrides:
            overrides.setdefault("value_stages", overrides["stages"])
        unknown = [field for field in overrides if field not in fields]
        if unknown:
            raise ValueError(f"--variants: {name}: expected fields of {', '.join(fields)}, got {', '.join(unknown)}")
        if name in ENTRIES:
            raise ValueError(f"--variants: expected names other than {', '.join(ENTRIES)}, got {name}")
        found.append(Tiling(name, overrides, only, shipped))
    return found


def entries_of(case: Case, names: Sequence[str], extra: Sequence[Tiling]) -> list[Variant[Problem]]:
    """Those of `names`, then the tilings that are measured at `case`."""
    return [ENTRIES[name] for name in names] + [tiling.variant for tiling in extra if tiling.measures(case)]


# ------------------------------------------------------------------ what is compiled


def compile_key(case: Case, entry: str, l2_bytes: int) -> tuple[object, ...] | None:
    """Calls of one key run the same compiled kernel; None: nothing is compiled, or nothing that a cache on disk keeps.

    What the dispatch takes counts as the Hopper kernel: the portable one is compiled for its own entry.
    """
    if entry in (FA3, CUDNN):
        return None
    key = (entry, mask_of(case), dims_of(case), case.query_heads // case.kv_heads)
    if entry != PORTABLE:
        return *key, _consumers_of(case)
    heads = case.batch * case.kv_heads
    elements_a_key = case.head_dim + case.value_dim
    return *key, heads_together(l2_bytes, heads, case.key_len * elements_a_key * case.dtype.itemsize)


def _consumers_of(case: Case) -> int:
    """Of the kernel that is chosen for a point, on the GPU where rates were measured."""
    mask, ints, sizes = call_of(case)
    return best_plan(mask, ints, (False,) * 5, sizes).consumers


def jobs_of(
    cases: Sequence[Case], names: Sequence[str], extra: Sequence[Tiling], l2_bytes: int
) -> dict[tuple[object, ...], Job]:
    """A (point, entry) for each key, the one with the most work, slowest to compile first."""
    largest: dict[tuple[object, ...], tuple[int, Job]] = {}
    for case in cases:
        for entry in (variant.name for variant in entries_of(case, names, extra)):
            key = compile_key(case, entry, l2_bytes)
            if key is not None and (key not in largest or case.flops > largest[key][0]):
                largest[key] = case.flops, (case.name, entry)
    ordered = sorted(largest.items(), key=lambda item: item[1][1][1] == PORTABLE)
    return {key: job for key, (_, job) in ordered}


def first_call(extra: Sequence[Tiling], job: Job, seed: int, device: str = "cuda") -> None:
    """Call an entry once at a point, not as a graph: what `tools.trial` does in processes of its own."""
    case = POINTS[job[0]]
    known = {entry.name: entry for entry in entries_of(case, list(ENTRIES), extra)}
    known[job[1]].prepare(problem_of(case, device, seed)).run()
