"""Every private Inductor name that the passes lean on, in one spelling from torch 2.11 to 2.15.

Nothing else in the project imports ``torch._inductor`` or ``torch._dynamo``, except ``pretend_gpu`` and
``pretend_parts``, which replace parts of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch._dynamo.utils import counters
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2 as auto_functionalized
from torch._inductor import config, inductor_prims, ir, lowering, scheduler
from torch._inductor.codegen.common import TritonScratchWorkspace, get_device_op_overrides
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.select_algorithm import (
    ExternKernelCaller,
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min, ModularIndexing

__all__ = [
    "KEEPS_STRIDES",
    "MOVES",
    "VIEWS",
    "CustomGraphPass",
    "ExternKernelChoice",
    "FloorDiv",
    "MaskedStore",
    "ModularIndexing",
    "SymbolicGridFn",
    "TritonTemplate",
    "auto_functionalized",
    "calls_of",
    "compile_and_package",
    "compile_fx",
    "computed_in_order",
    "config",
    "contiguous",
    "current_graph",
    "current_node",
    "divide",
    "elementwise",
    "empty_strided",
    "equal",
    "example_arguments",
    "expression",
    "fallback",
    "graph_breaks",
    "ir",
    "is_extern",
    "is_generated",
    "keep_stride_order",
    "known_true",
    "lower",
    "masked_scatter",
    "mode_options",
    "multiple_of",
    "ops",
    "permute",
    "prologues_first",
    "realized",
    "register_lowering",
    "scratch_is_safe",
    "select",
    "serving_options",
    "size_hint",
    "static_int",
    "template_options",
    "unit_last_stride",
    "why_apart",
]

register_lowering = lowering.register_lowering

VIEWS = tuple(
    getattr(packet, overload)
    for packet in (torch.ops.aten.view, torch.ops.aten.reshape, torch.ops.aten.squeeze, torch.ops.aten.unsqueeze)
    for overload in ("default", "dim", "dims")
    if overload in packet.overloads()
)
"""Views in a functional graph that keep the order of elements: one of the same shape is the same tensor."""
MOVES = (
    torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int, torch.ops.aten.expand.default,
)  # fmt: skip
"""Views that do not."""
KEEPS_STRIDES = inductor_prims.force_stride_order
"""What ``keep_stride_order`` calls: its value itself, in an order of strides."""


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes holds for all of them, adding no guard."""
    return statically_known_true(condition)


def expression(size: torch.SymInt) -> sympy.Expr:
    """A symbolic size as an expression, without the maxima and minima that the ranges of its symbols decide."""
    ranges = size.node.shape_env.bound_sympy

    def decided(extreme: sympy.Expr) -> sympy.Expr:
        sign = 1 if isinstance(extreme, Max) else -1
        for one in extreme.args:
            others = [other for other in extreme.args if other is not one]
            if all(ranges(sign * (one - other)).lower >= 0 for other in others):
                return one
        return extreme

    return sympy.sympify(size.node.expr).replace(lambda e: isinstance(e, (Max, Min)), decided)


def without_levels(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside functorch's wrappers (``vmap``, ``grad``), which have no memory of their own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's config for a ``torch.compile`` mode; raises RuntimeError naming the modes for an unknown one."""
    return dict(torch._inductor.list_mode_options(mode))


def compile_and_package(gm: torch.fx.GraphModule, inputs: tuple[Any, Any], path: Any, options: dict[str, Any]) -> Any:
    """AOTInductor's package of an exported program's module; ``inputs``: example arguments and keywords."""
    options = {**options, "aot_inductor.package": True}
    return torch._inductor._aoti_compile_and_package_inner(gm, *inputs, package_path=path, inductor_configs=options)


def template_options() -> dict[str, Any]:
    """Options for graphs with templates of ours.

    Up to 2.12, reordering loops keeps an epilogue that flattens the heads out of the attention kernel.
    """
    return {} if hasattr(config, "loop_reindexing_after_fusion") else {"loop_ordering_after_fusion": False}


def serving_options() -> dict[str, Any]:
    """Options for graphs that read and write a KV cache.

    Combo kernels put independent kernels of one level of the graph into one launch: the norm and RoPE of q, which has
    more heads than k, run in the launch that stores k and v. From 2.13 on Inductor refuses where its estimate of the
    peak memory rises by 5%: a graph that serves keeps almost nothing alive, so one layer's q passes that limit.
    """
    options: dict[str, Any] = {"combo_kernels": True, **template_options()}
    if hasattr(config, "combo_kernel_peak_memory_pct_threshold"):
        options["combo_kernel_peak_memory_pct_threshold"] = None
    return options


def graph_breaks() -> dict[str, int]:
    """Dynamo's count of graph breaks so far in this process, by reason."""
    return dict(counters["graph_break"])


def lower(target: Any, *arguments: Any, **keywords: Any) -> Any:
    """Inductor's own lowering of an aten op."""
    return lowering.lowerings[target](*arguments, **keywords)


def fallback(target: Any) -> Callable[..., Any]:
    """A lowering that calls the op as it is."""
    return lowering.fallback_handler(target, add_to_fallback_set=False)


def permute(box: Any, order: Sequence[int]) -> Any:
    """A view with its dimensions in ``order``."""
    return lower(torch.ops.aten.permute.default, box, list(order))


def empty_strided(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A contiguous buffer that a template fills."""
    return lowering.empty_strided(size, None, dtype=dtype, device=device)


def unit_last_stride(box: Any) -> Any:
    """The value in memory with a unit stride in its last dimension, for good; copied only where it has another.

    Inductor's ``require_stride1`` is content with a unit stride in any dimension, and leaves open layouts open: the
    scheduler of 2.11 then laid rotated queries out with the head dim outermost. An open layout becomes token-major,
    which is how projections write heads ``[B, H, S, D]``.
    """
    box = ir.ExternKernel.realize_input(box)
    if isinstance(box.get_layout(), ir.FlexibleLayout):
        dims = len(box.get_size())
        return ir.ExternKernel.require_stride_order(box, [3, 1, 2, 0] if dims == 4 else list(reversed(range(dims))))
    if V.graph.sizevars.statically_known_equals(box.get_stride()[-1], 1):
        return box
    return ir.ExternKernel.require_contiguous(box)


def contiguous(box: Any) -> Any:
    """The value as a contiguous buffer, copied only where it is not one."""
    return ir.ExternKernel.require_contiguous(box)


def keep_stride_order(graph: torch.fx.Graph, value: torch.fx.Node, strides: Sequence[int]) -> torch.fx.Node:
    """The value of a node, laid out with strides that have the order of ``strides``."""
    node = graph.call_function(KEEPS_STRIDES, (value, list(strides)))
    node.meta["val"] = value.meta["val"]
    return node


def static_int(value: Any) -> int:
    """A size as a Python int, guarded on where it is symbolic."""
    return int(V.graph.sizevars.guard_int(value))


def size_hint(value: Any) -> int:
    """A representative value of a size, without a guard: for choosing, never for correctness."""
    return int(V.graph.sizevars.optimization_hint(value))


def scratch_is_safe() -> bool:
    """Whether a kernel of the graph may use Triton's scratch memory, as tensor descriptors made on the device do.

    C++ wrappers, AOTInductor's among them, allocate one program's scratch for all programs in torch 2.11, which then
    write past it.
    """
    if not V.graph.cpp_wrapper:
        return True
    lines, _ = get_device_op_overrides("cuda").cpp_scratch(0, TritonScratchWorkspace(1, str)) or ([], "")
    return any("grid_0" in line for line in lines)


class MaskedStore(NamedTuple):
    """``target[place(index)] = value(index)`` where ``is_valid(index)``."""

    value: Callable[[Any], Any]
    place: Callable[[Any], list[Any]]
    is_valid: Callable[[Any], Any]


class _MaskedScatter(ir.Scatter):
    """A scatter of several stores, each of which happens only where its ``is_valid(index)``.

    A store runs inside ``ops.masked``, which adds the condition to the masks of all loads and stores in it. Its place
    is computed outside: there a slot is loaded once a row, inside once more for every element (205 us for 16,384
    tokens of k and v instead of 142 on an H200).
    """

    def store_output(self, output_name: str | None, indexer: Any, vars: Sequence[Any]) -> Any:
        name = output_name or "unnamed"
        for one in self.stores:  # type: ignore[attr-defined]
            place = indexer(one.place(vars))

            def store(one: MaskedStore = one, place: Any = place) -> Any:
                ops.store(name, place, one.value(vars))
                return ops.constant(0, torch.int32)

            ops.masked(one.is_valid(vars), store, 0)


def masked_scatter(target: Any, size: Sequence[Any], *stores: MaskedStore) -> None:
    """Do ``stores`` into ``target`` for every index of ``size``, in place and in one node of the graph.

    Two nodes that write one buffer are never fused. What ``stores`` read is read by the one node.
    """

    def values(index: Any) -> Any:
        return [one.value(index) for one in stores][-1]

    scatter = _MaskedScatter(
        device=target.get_device(), dtype=target.get_dtype(), inner_fn=values, ranges=list(size),
        output_indexer=stores[0].place,
    )  # fmt: skip
    object.__setattr__(scatter, "stores", stores)
    buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(target), data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)


class Elementwise(NamedTuple):
    """A value that Inductor computes element by element, and has not computed yet."""

    operations: frozenset[str]
    """Names of Inductor's operations in it, and in what only it reads."""
    buffers: tuple[str, ...]
    """Names of the operations of the graph that compute it, where some are in memory of their own."""
    loads: int
    """How many loads an element of it takes."""
    lies_in_memory: bool
    """Whether it has a buffer already, whose loops are what they are."""


def _under_views(box: Any) -> Any:
    """The buffer, or the loops of what is no buffer yet, under a value's views."""
    while isinstance(box, (ir.BaseView, ir.MutableBox)):
        box = box.data
    return box


def _is_as_large(buffer: Any, loops: Any) -> bool:
    """Whether a buffer is an earlier form of a value, and no table, such as angles, of which many elements read one."""
    return 2 * size_hint(buffer.get_numel()) > size_hint(sympy.prod(loops.ranges))


def elementwise(box: Any) -> Elementwise | None:
    """How a value is computed, or None where it is not elementwise: an input, a product, a reduction."""
    data = _under_views(box)
    buffered = isinstance(data, ir.ComputedBuffer)
    loops = data.data if buffered else data
    if not isinstance(loops, ir.Pointwise):
        return None
    count = loops.inner_fn_opcount()
    operations, names = set(count.used_ops), [data.get_operation_name()] if buffered else []
    loads = len(count.read_buffers)
    for name in count.read_buffers:
        read = V.graph.try_get_buffer(name)
        if isinstance(read, ir.ComputedBuffer) and isinstance(read.data, ir.Pointwise) and _is_as_large(read, loops):
            node = read.get_origin_node()
            if node is not None and len(node.users) == 1:
                before = read.data.inner_fn_opcount()
                operations |= before.used_ops
                loads += len(before.read_buffers) - 1
                names.append(read.get_operation_name())
    return Elementwise(frozenset(operations), tuple(names), loads, buffered)


def computed_in_order(box: Any, order: Sequence[int], value: Elementwise) -> Any | None:
    """An ``elementwise`` value as a dense buffer with its dimensions in ``order``, which a template may compute itself.

    None where it lies in memory in another order. A template reads a tile once, so that it reads no more bytes than a
    kernel of its own would, which would write them too: Inductor's estimate for products, whose operands are read again
    and again, is left out.
    """
    moved, data = permute(box, order), _under_views(box)
    if value.lies_in_memory:
        data.decide_layout()
        buffer = realized(moved)
        dense = ir.FlexibleLayout.contiguous_strides(buffer.get_size())
        if not all(known_true(sympy.Eq(s, d)) for s, d in zip(buffer.get_stride(), dense, strict=True)):
            return None
    else:
        with ir.IRNode.current_origins(data.origins):
            buffer = ir.Pointwise.create(
                device=moved.get_device(), dtype=moved.get_dtype(), inner_fn=moved.make_loader(),
                ranges=[V.graph.sizevars.simplify(size) for size in moved.get_size()],
            )  # fmt: skip
        buffer = realized(buffer)
    V.graph.invoke_quant_ops.update([_under_views(buffer).get_operation_name(), *value.buffers])
    return buffer


def known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds for every value they may take, without a guard."""
    return bool(V.graph.sizevars.statically_known_true(condition))


def multiple_of(value: Any, factor: int) -> bool:
    """Whether a size or stride is a multiple of ``factor`` for every value it may take, without a guard."""
    return bool(V.graph.sizevars.statically_known_multiple_of(value, factor))


def divide(one: Any, other: Any) -> Any:
    """A quotient of fp32 values inside a CUDA kernel, correctly rounded as eager division is; ``truediv`` is not."""
    if hasattr(OpsHandler, "div_rn"):
        return ops.div_rn(one, other)
    return ops.inline_asm_elementwise(
        one, other, asm="div.rn.f32 $0, $1, $2;", constraints="=f,f,f", dtype=torch.float32, is_pure=True, pack=1
    )


def equal(one: Any, other: Any) -> Any:
    """The condition that two sizes are equal."""
    return sympy.Eq(one, other)


def realized(box: Any) -> Any:
    """The value in memory, whatever its strides."""
    return ir.ExternKernel.realize_input(box)


def example_arguments(node: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with fake tensors in place of nodes."""
    return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])


def calls_of(gm: torch.fx.GraphModule, targets: Collection[Any]) -> list[torch.fx.Node]:
    """Every node of a graph and of the graphs inside it that calls one of ``targets``."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule))
    return [node for graph in graphs for node in graph.nodes if node.target in targets]


@contextlib.contextmanager
def prologues_first() -> Iterator[None]:
    """Leave out of kernels side by side what a template may compute (``computed_in_order``), while a graph is compiled.

    Inductor fuses prologues last. RoPE of q and of k read the same angles, and with as many heads of both they become
    one kernel, of which a template could take no part any more.
    """
    theirs = V.choices

    class Choices(type(theirs)):  # type: ignore[misc]
        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            if any(node.get_operation_names() <= V.graph.invoke_quant_ops for node in (node1, node2)):
                return False
            return theirs.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)

    ours = copy.copy(theirs)
    ours.__class__ = Choices
    with V.set_choices_handler(ours):
        yield


def is_generated(kernel: Any) -> bool:
    """Whether Inductor generates all of a kernel in its schedule: it is no template and calls nothing else."""
    return all(isinstance(part, SchedulerNode) and not part.is_template() for part in kernel.get_nodes())


def is_extern(kernel: Any, part: Any) -> bool:
    """Whether ``part`` of a kernel in the schedule, an output of ``select``, calls what Inductor did not generate."""
    node = part.node
    if isinstance(node, ir.MultiTemplateBuffer):  # decided after fusion: a template where something was fused into it
        return len(kernel.get_nodes()) == 1 and isinstance(node.get_min_choice()[0], ExternKernelCaller)
    return isinstance(node, ir.ExternKernelOut)


def why_apart(first: Any, second: Any) -> str:
    """Why Inductor did not fuse two kernels of its schedule, in its words; the second reads what the first writes."""
    with _reasons() as reasons:
        first.scheduler.can_fuse(first, second)
    return reasons[0] if reasons else "another fusion came first"


@contextlib.contextmanager
def _reasons() -> Iterator[list[str]]:
    """Collect why Inductor fuses two kernels not: it logs that and returns no more than False."""
    reasons: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            why: Any = record.msg
            if isinstance(why, scheduler.WhyNoFuse):
                reasons.append(why.reason % why.args)

    logger, handler = scheduler.fusion_log, Collect()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield reasons
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def current_graph() -> Any:
    """The graph that Inductor is lowering or scheduling."""
    return V.graph


def current_node() -> torch.fx.Node:
    """The FX node being lowered."""
    return V.graph.current_node


def select(
    name: str, choices: list[Any], inputs: list[Any], layout: Any, input_gen_fns: dict[int, Any] | None = None
) -> Any:
    """Autotune among ``choices`` where there are several, and return the chosen kernel's output.

    ``autotune_select_algorithm`` returns the output in 2.11 and (output, choice) from 2.13 on.
    """
    result = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=input_gen_fns)
    return result[0] if isinstance(result, tuple) else result
