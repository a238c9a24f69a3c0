"""Who takes a dense call on Hopper, and the walk of its items: the model against the kernel's text, and examples."""

from __future__ import annotations

import ast
import inspect
import random
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from custom_ops.form import empty_outputs
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon import dense_choice, dense_cost
from custom_ops.kernels.gluon.dense_choice import (
    RATES,
    best_plan,
    choose,
    cudnn_reasons,
    own_tiles,
    rates_of,
    shapes_of,
    walk_of,
)
from custom_ops.kernels.gluon.dense_cost import (
    H200,
    Gpu,
    Rates,
    Sizes,
    Walk,
    best_walk,
    busiest,
    items_of,
    key_tiles,
    listed,
    program_loads,
    unused_rows,
)
from custom_ops.kernels.tile_config import TileConfig
from custom_ops.masks import Mask
from tools import fit_choice
from tools.sweep_cases import POINTS

NONE = (False,) * 5
CAUSAL, FULL, SLIDING = (FORMS[name].mask.specialise([]) for name in ("full_self", "bidirectional", "sliding_self"))
KERNEL = Path(dense_cost.__file__).with_name("dense_walk.py")


def sizes(length: int = 4096, batch: int = 1, heads: int = 16, kv_heads: int = 16, dims: tuple[int, int] = (128, 128),
          key_len: int | None = None) -> Sizes:  # fmt: skip
    return Sizes(batch, heads, kv_heads, kv_heads, length, key_len or length, *dims)


def sizes_of(name: str) -> Sizes:
    case = POINTS[name]
    return sizes(case.query_len, case.batch, case.query_heads, case.kv_heads, (case.head_dim, case.value_dim))


# ---------------------------------------------------------------------- the walk


class Device:
    """The kernel's own ``Walk.number`` and ``Walk.item``, run as Python: the text, without its decorators."""

    def __init__(self, **fields: int) -> None:
        self.__dict__.update(fields)
        tree = ast.parse(KERNEL.read_text())
        (walk,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Walk")
        methods = [n for n in walk.body if isinstance(n, ast.FunctionDef) and n.name in ("number", "item")]
        for method in methods:
            method.decorator_list = []
            for argument in method.args.args:
                argument.annotation = None
        gl = mock.Mock(minimum=min, maximum=max, program_id=lambda axis: self.program,
                       num_programs=lambda axis: self.programs)  # fmt: skip
        scope: dict[str, Any] = {"gl": gl, "anew": lambda value: value}
        exec(compile(ast.Module(body=list(methods), type_ignores=[]), str(KERNEL), "exec"), scope)
        self._number, self._item = scope["number"], scope["item"]

    def items_of_program(self, program: int, S: Any) -> list[tuple[int, int, int]]:
        self.program, turn, found = program, 0, []
        while (number := self._number(self, turn)) < self.items:
            found.append(self._item(self, number, S))
            turn += 1
        return found


def walked(batch: int, heads: int, query_len: int, block_m: int, walk: Walk, programs: int) -> list[list[tuple]]:
    """The items of every program: ``(batch, head, first query)``."""
    row_tiles = -(-query_len // block_m)
    device = Device(
        items=row_tiles * batch * heads, row_tiles=row_tiles, groups=-(-batch * heads // walk.group_heads),
        group_heads=walk.group_heads, all_heads=batch * heads, heads=heads, query_len=query_len,
        snake=walk.snake, programs=programs,
    )  # fmt: skip
    return [device.items_of_program(program, mock.Mock(block_m=block_m)) for program in range(programs)]


def random_walks(count: int) -> list[tuple[int, int, int, int, Walk, int]]:
    draw = random.Random(3)
    found = []
    for _ in range(count):
        batch, heads = draw.randint(1, 5), draw.randint(1, 9)
        query_len, block_m = draw.randint(1, 2500), draw.choice((128, 192))
        items = -(-query_len // block_m) * batch * heads
        walk = Walk(draw.randint(1, batch * heads), draw.randint(0, 1))
        found.append((batch, heads, query_len, block_m, walk, min(draw.randint(1, 40), items)))
    return found


@pytest.mark.parametrize("call", random_walks(60), ids=str)
def test_the_model_walks_as_the_kernel_does(call: tuple) -> None:
    batch, heads, query_len, block_m, walk, programs = call
    items = walked(*call)
    tiles = range(-(-query_len // block_m))
    skipped = unused_rows(query_len, block_m)
    expected = {(b, h, t * block_m - skipped) for b in range(batch) for h in range(heads) for t in tiles}
    every = [item for program in items for item in program]
    assert len(every) == len(expected) and set(every) == expected, "every item exactly once"
    costs = [float(draw) for draw in random.Random(5).sample(range(1000), len(tiles))]
    loads = [sum(costs[(first + skipped) // block_m] for _, _, first in program) for program in items]
    assert program_loads(items_of(costs, batch * heads, walk.group_heads), walk.snake, programs) == loads
    if len(every) <= dense_cost.EXACT_TURNS * programs:
        assert busiest(costs, batch * heads, walk, Gpu(programs, 1)) == max(loads)


def test_the_busiest_program_is_exact_where_items_are_few_and_near_where_they_are_many() -> None:
    costs = [float(t + 1) for t in range(30)]
    walk = Walk(7, 1)
    few = busiest(costs, 7, walk, Gpu(20, 1))
    assert few == max(program_loads(items_of(costs, 7, 7), 1, 20))
    many = busiest(costs, 70, walk, Gpu(20, 1))
    assert many == pytest.approx(max(program_loads(items_of(costs, 70, 7), 1, 20)), rel=0.02)
    assert busiest([2.0] * 30, 70, walk, Gpu(20, 1)) == 2.0 * 105


@pytest.mark.parametrize("name", POINTS)
def test_programs_of_every_point_of_the_sweep_are_about_as_busy(name: str) -> None:
    """Within the larger of 9% and an item of the mean: what is left belongs to the tiling."""
    case, call = POINTS[name], sizes_of(name)
    mask = case.form.mask.specialise([])
    ints = () if case.window is None else (case.window,)
    for shape in shapes_of(mask, NONE, call, False):
        rates = rates_of(f"gluon{shape.consumers}", call.head_dim, False)
        costs = [rates.item + rates.tile * count for count in own_tiles(mask, ints, NONE, call, shape)]
        walk, _ = walk_of(costs, shape, call, H200)
        programs = min(132, len(costs) * call.all_heads)
        loads = program_loads(items_of(costs, call.all_heads, walk.group_heads), walk.snake, programs)
        mean = statistics.fmean(loads)
        assert max(loads) - mean <= max(0.09 * mean, max(costs)), (walk, max(loads) / mean)
        assert sum(loads) == pytest.approx(sum(costs) * call.all_heads)
        assert walk.group_heads <= call.all_heads


def test_a_group_that_leaves_less_on_the_busiest_program_is_taken() -> None:
    """7, 7 and 2 heads of 22 row tiles: each group is a little over a round, which the next one does not even out."""
    costs = [float(t + 1) for t in range(22)]
    fitting = busiest(costs, 16, Walk(7, 0), H200)
    walk, load = best_walk(costs, 16, 1, 2 << 20, H200)
    assert load < 0.9 * fitting and walk.group_heads > 7
    # Of heads that are far too large to share L2, no more run at once than have to.
    assert best_walk(costs, 16, 1, 40 << 20, H200)[0].group_heads < 16
    assert best_walk([3.0] * 22, 16, 1, 2 << 20, H200)[0].group_heads == 7, "nothing to gain"
    assert best_walk(costs, 16, 4, 2 << 20, H200)[0].group_heads % 4 == 0, "heads of a KV head stay together"


# ---------------------------------------------------------------------- what a row tile reads


@pytest.mark.parametrize("mask, ints", ((CAUSAL, ()), (FULL, ()), (SLIDING, (300,)), (SLIDING, (5000,))), ids=str)
@pytest.mark.parametrize("rows, keys", ((192, 128), (128, 64)))
def test_key_tiles_are_those_of_the_mask(mask: Mask, ints: tuple[int, ...], rows: int, keys: int) -> None:
    for query_len, key_len, from_end in ((1000, 1000, False), (333, 1400, False), (333, 1400, True), (700, 100, True)):
        call = sizes(query_len, key_len=key_len)
        skipped = unused_rows(query_len, rows)
        found = key_tiles(mask, ints, call, rows, keys, from_end=from_end, skipped=skipped)
        shift = max(key_len - query_len, 0) if from_end else 0
        position = torch.arange(query_len) + shift
        visible = mask.dense(position, torch.arange(key_len), dict(zip(("window",), ints, strict=False)))[0]
        visible = visible.expand(query_len, key_len)
        for tile, count in enumerate(found):
            first = max(tile * rows - skipped, 0)
            seen = visible[first : tile * rows - skipped + rows].any(0).nonzero().flatten()
            span = int(seen[-1] - seen[0] + 1) if len(seen) else 0
            assert count == -(-span // keys), (tile, count)


def test_masks_that_read_tensors_count_as_dense() -> None:
    mask = FORMS["segment_cross"].mask.specialise([])
    assert key_tiles(mask, (4,), sizes(500, key_len=1000), 128, 128, from_end=False) == [8] * 4


def test_a_list_gives_the_next_item_to_the_first_free_program() -> None:
    assert listed([1.0, 5.0, 1.0], 2, Gpu(2, 1)) == 8.0
    assert listed([2.0, 2.0], 3, Gpu(4, 1)) == 4.0


# ---------------------------------------------------------------------- examples


def test_rates_are_there_for_every_kernel_and_head_dim() -> None:
    for kernel in ("gluon2", "gluon3", "cudnn", "triton"):
        for dim in (64, 72, 96, 104, 128, 136, 192, 200, 256):
            for kind in ("causal", "full", "window"):
                rates = rates_of(kernel, dim, kind)
                assert 0 <= rates.launch < 20 and 0 < rates.item < 20 and 0 < rates.tile < 4
    assert all(isinstance(rates, Rates) for rates in RATES.values())


@pytest.mark.parametrize(
    "mask, ints, call, kernel, consumers",
    (
        # A row tile of 128 keys: 1,024 of them have cuDNN's smaller costs of an item.
        (CAUSAL, (), sizes(128, 32, 32, 8), "cudnn", None),
        (FULL, (), sizes(128, 32, 32, 8), "cudnn", None),
        (CAUSAL, (), sizes(512, 1, 32, 32, (64, 64)), "cudnn", None),
        # 352 items of 192 rows are 2.7 rounds, and 512 of 128 rows 3.9.
        (CAUSAL, (), sizes(4096, 1, 16, 16), "gluon", 2),
        (FULL, (), sizes(1000, 1, 32, 32, (192, 128)), "gluon", 2),
        # All keys seen: two consumers overlap their own softmax all the way.
        (FULL, (), sizes(4096, 4, 32, 8), "gluon", 2),
        # Many rounds: the kernel that moves least of K and V.
        (CAUSAL, (), sizes(4096, 4, 32, 8), "gluon", 3),
        (CAUSAL, (), sizes(8192, 1, 32, 32, (192, 128)), "gluon", 3),
        (CAUSAL, (), sizes(16384, 1, 32, 32, (64, 64)), "gluon", 3),
        (SLIDING, (1024,), sizes(16384, 1, 32, 8), "gluon", 3),
        # There is but one tiling.
        (CAUSAL, (), sizes(16384, 1, 16, 4, (256, 256)), "gluon", 2),
    ),
    ids=str,
)  # fmt: skip
def test_choices_are_the_measured_ones(
    mask: Mask, ints: tuple[int, ...], call: Sizes, kernel: str, consumers: int | None
) -> None:
    found = choose(mask, ints, NONE, call)
    assert found.kernel == kernel, found
    assert consumers is None or best_plan(mask, ints, NONE, call).consumers == consumers
    assert "us" in found.reason or found.times == (("gluon", found.times[0][1]),)
    times = dict(found.times)
    assert times[kernel] == min(times.values()) or times["gluon"] * 0.97 <= min(times.values())


def test_others_are_asked_only_where_they_can_take_the_call() -> None:
    call = sizes(128, 32, 32, 8)
    assert choose(CAUSAL, (), NONE, call).kernel == "cudnn"
    assert dict(choose(CAUSAL, (), NONE, call).times).keys() == {"gluon", "cudnn"}
    for kept in (
        choose(CAUSAL, (), NONE, call, cudnn=False),
        choose(CAUSAL, (), (True, *NONE[1:]), call),
        choose(CAUSAL, (), NONE, call, has_softcap=True),
        choose(SLIDING, (100,), NONE, call),
    ):
        assert kept.kernel == "gluon" and [kernel for kernel, _ in kept.times] == ["gluon"]
        assert kept.reason == "the Hopper kernel takes every call of this kind that it can"
    few = choose(CAUSAL, (), NONE, sizes(128, 1, 32, 8), cudnn=False)
    assert [kernel for kernel, _ in few.times] == ["gluon", "triton"]


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"present": (True, *NONE[1:])}, "operands: expected none and no softcap"),
        ({"has_softcap": True}, "operands: expected none and no softcap"),
        ({"mask": SLIDING}, "mask: expected plain causal or unmasked attention"),
        (
            {"sizes": sizes(128, key_len=256)},
            "lengths: expected as many queries as keys under a causal mask",
        ),
        ({"sizes": Sizes(1, 8, 8, 2, 128, 128, 128, 128)}, "v: expected a value head for every KV head"),
        ({"sizes": sizes(dims=(100, 96))}, "head dims: expected multiples of 8 up to 256, got 100 and 96"),
    ),
    ids=str,
)
def test_what_cudnn_cannot_take_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    fine: dict[str, Any] = {"mask": CAUSAL, "present": NONE, "sizes": sizes(), "has_softcap": False}
    assert cudnn_reasons(**fine) == [] and cudnn_reasons(**fine | {"mask": FULL}) == []
    assert cudnn_reasons(**fine | changes) == [reason]


def test_a_choice_takes_less_than_a_millisecond() -> None:
    """In the middle of the sweep; each is kept by the sizes of the call."""
    names = [name for name in POINTS if POINTS[name].window is None]
    for _ in range(2):  # bounds of masks are compiled in the first
        best_plan.cache_clear()
        times = []
        for name in names:
            begin = time.perf_counter()
            choose(POINTS[name].form.mask.specialise([]), (), NONE, sizes_of(name))
            times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 1e-3, max(times)


def test_the_compiler_can_ask_with_numbers_alone() -> None:
    with mock.patch.object(torch.cuda, "get_device_properties", side_effect=AssertionError("asked a GPU")):
        assert choose(CAUSAL, (), NONE, sizes(640, 3, 8, 8)).kernel in ("gluon", "cudnn")
    assert "torch.cuda" not in inspect.getsource(dense_choice) + inspect.getsource(dense_cost)


# ---------------------------------------------------------------------- fitted rates


def test_rates_that_made_the_times_are_found_again() -> None:
    names = [name for name in POINTS if name.startswith("causal_d128") and not name.endswith("32768")]
    for kernel, true in (("gluon3", Rates(8.0, 2.0, 2.2)), ("cudnn", Rates(7.5, 1.4, 0.9))):
        loads = [fit_choice.load_of(kernel, name, H200) for name in names]
        points = [(load, fit_choice.predicted(load, true)) for load in loads if load is not None]
        assert len(points) == len(names)
        found = fit_choice.fitted(points)
        assert (found.launch, found.item, found.tile) == pytest.approx((true.launch, true.item, true.tile), rel=0.05)


def test_points_without_the_tiling_are_left_out() -> None:
    assert fit_choice.load_of("gluon3", "causal_d256_h16g4_b1_s512", H200) is None
    assert fit_choice.load_of("gluon2", "causal_d256_h16g4_b1_s512", H200) is not None


# ---------------------------------------------------------------------- eager dispatch


def call_of(length: int = 128, batch: int = 32, heads: tuple[int, int] = (32, 8), dim: int = 128) -> tuple:
    return tuple(
        torch.empty(batch, length, count, dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for count in (heads[0], heads[1], heads[1])
    )


def layouts(*tensors: torch.Tensor) -> tuple:
    return tuple((t.shape, t.stride()) for t in tensors)


def test_an_eager_call_takes_cudnn_only_where_nothing_is_copied_and_plans_are_few() -> None:
    pytest.importorskip("triton")
    from custom_ops.kernels.launch import LEAST_CUDNN, cudnn_call_reasons

    def reasons(*tensors: torch.Tensor, version: int = LEAST_CUDNN) -> list[str]:
        return cudnn_call_reasons(Sizes.of(*(t.shape for t in tensors)), layouts(*tensors), version)

    query, key, value = call_of()
    assert reasons(query, key, value) == []
    fused = torch.empty(32, 128, 48 * 128, dtype=torch.bfloat16, device="meta").unflatten(2, (48, 128))
    assert reasons(*(t.transpose(1, 2) for t in fused.split([32, 8, 8], 2))) == []
    assert "expected at least version" in reasons(query, key, value, version=0)[0]
    assert "all heads of a token" in reasons(query.contiguous(), key, value)[0]
    one_head = torch.empty(32, 1, 128, 128, dtype=torch.bfloat16, device="meta")  # of either order
    assert reasons(query, one_head, one_head) == [] and reasons(one_head, one_head, one_head) == []
    assert "all heads of a token" in reasons(query, one_head.expand(32, 8, 128, 128), value)[0]
    assert "multiples of 128, got 100 and 100" in reasons(*call_of(100))[0]


class Taken(Exception):
    pass


@pytest.mark.parametrize("name", ("full_self", "bidirectional"))
@pytest.mark.parametrize("kernel", ("cudnn", "gluon", "triton"))
def test_a_call_goes_where_it_was_chosen_to(kernel: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from custom_ops.kernels import launch

    query, key, value = (torch.zeros_like(t, device="cpu") for t in call_of(batch=1))
    form = FORMS[name]
    slots = form.slots(dict.fromkeys(form.operand_names))
    decision = mock.create_autospec(launch._decide, return_value=(kernel, (), "because"))
    monkeypatch.setattr(launch, "_decide", decision)
    monkeypatch.setattr(launch, "_hopper", mock.Mock(side_effect=Taken("gluon")))
    monkeypatch.setattr(launch, "forward_config", mock.Mock(side_effect=Taken("triton")))
    library = mock.Mock(side_effect=lambda q, *rest, **kw: (torch.zeros_like(q), torch.zeros(*q.shape[:3], 1)))
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", library)
    assert launch.kernel_for(form, query, key, value, slots) == (kernel, "because")
    if kernel != "cudnn":
        with pytest.raises(Taken, match=kernel):
            launch.forward(form, query, key, value, slots, 0.1)
        return
    out, lse = launch.forward(form, query, key, value, slots, 0.1)
    arguments, keywords = library.call_args
    assert arguments[3:] == (None, True, 0.0, name == "full_self", False) and keywords == {"scale": 0.1}
    promised = empty_outputs(query, value)
    assert [(t.shape, t.stride()) for t in (out, lse)] == [(t.shape, t.stride()) for t in promised]
    # A tiling is the portable kernel's.
    monkeypatch.setattr(launch, "_set_allocator", mock.Mock(side_effect=Taken("triton")))
    with pytest.raises(Taken, match="triton"):
        launch.forward(form, query, key, value, slots, 0.1, config=TileConfig(64, 64, 4, 3, descriptors=True))


def test_cudnns_output_of_one_head_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from custom_ops.kernels import launch

    query, value = torch.zeros(2, 1, 128, 64), torch.zeros(2, 1, 128, 64)
    given = torch.randn_like(query)  # with q's strides, as the library's
    library = mock.Mock(return_value=(given, torch.zeros(2, 1, 128, 1)))
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", library)
    out, _ = launch._cudnn(query, value, value, 0.1, is_causal=True)
    promised, _ = empty_outputs(query, value)
    assert given.stride() != promised.stride() == out.stride()
    assert out.data_ptr() == given.data_ptr() and torch.equal(out, given)
    library.return_value = (torch.randn(2, 4, 128, 64), torch.zeros(2, 4, 128, 1))  # of another order
    query, value = torch.zeros(2, 4, 128, 64), torch.zeros(2, 4, 128, 64)
    out, _ = launch._cudnn(query, value, value, 0.1, is_causal=True)
    assert out.stride() == empty_outputs(query, value)[0].stride() and torch.equal(out, library.return_value[0])
