"""What follows an attention call elementwise, read from an FX graph as one epilogue with the tensor that it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from custom_ops import epilogue as epilogues
from custom_ops.epilogue import CASTS, Epilogue
from inductor_passes import compat
from inductor_passes.graph_pass import describe

aten = torch.ops.aten
Axes = tuple[tuple[int, ...], ...]
"""Of every dimension of a view of ``[B, H, L, D]``, which of those four it runs over, the outermost first."""
HEADS_FIRST: Axes = ((0,), (1,), (2,), (3,))
IN_MEMORY = (0, 2, 1, 3)
"""Dimensions of attention's output as they lie in memory: those side by side merge in a view."""
FLOATS = tuple(CASTS.values())
"""Dtypes of what is computed on the way."""

SPELLINGS: dict[Any, str] = {
    aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div",
    aten.neg.default: "neg", aten.abs.default: "abs", aten.exp.default: "exp", aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
    aten.maximum.default: "maximum", aten.minimum.default: "minimum",
    aten.clamp_min.default: "maximum", aten.clamp_max.default: "minimum",
    aten.clamp_min.Tensor: "maximum", aten.clamp_max.Tensor: "minimum",
}  # fmt: skip
"""The operation of every aten op that is one."""
CAST = torch.ops.prims.convert_element_type.default
SAME_ORDER = (*compat.VIEWS, aten._unsafe_view.default, aten.clone.default)
"""Ops that keep all elements in their order; where a copy would lie is for the kernel to say."""
DTYPE_NAMES = {dtype: name for name, dtype in CASTS.items()}


@dataclasses.dataclass(frozen=True)
class Extra:
    """The further tensor of an epilogue."""

    source: Node
    moves: tuple[Node, ...]
    """Views to be made of it first, the first one first: nodes that make them of something else."""
    axes: Axes
    """Of the result."""


@dataclasses.dataclass(frozen=True)
class Region:
    """What is computed from one output, down to ``root``, which alone is read from outside."""

    root: Node
    epilogue: Epilogue
    extra: Extra | None
    computed: tuple[Node, ...]
    """Nodes that compute something, in the graph's order."""
    views: tuple[Node, ...]
    """Views between the output and ``root``."""


class Reader:
    """Reads what follows the output ``[B, H, L, D]`` of an attention call."""

    def __init__(self, output: Node) -> None:
        self.output = output
        self.sizes: tuple[Any, ...] = tuple(output.meta["val"].shape)
        self.axes: dict[Node, Axes] = {output: HEADS_FIRST}
        """Of every node of the region."""
        self.refusal = ""
        """Why something that is computed from the output is not in the region; empty where all is, or nothing is."""

    def region(self) -> Region | None:
        """The largest region; None where there is none."""
        root = None
        other = ""
        computes = False
        for node in _after(self.output):
            if not self.axes.keys() & set(node.all_input_nodes):
                continue
            axes = self._axes_of(node)
            if axes is None:
                continue
            self.axes[node] = axes
            computes |= _is_elementwise(node) and not _widens(node)
            if computes and self._is_exit(node):
                if _dtype(node) == _dtype(self.output):
                    root, other = node, ""
                elif not _widens(node):
                    other = f"{describe(node)} gives {_dtype(node)}, where the output is of {_dtype(self.output)}"
        if root is None:
            self.refusal = self.refusal or other or self._who_else(computes)
            return None
        after = min(_readers(root), default=None)
        if after is None or _is_generated(after):
            follows = f"{describe(after)} follows, in a kernel that computes all of it" if after is not None else ""
            self.refusal = self.refusal or follows
            return None
        writer = _Writer(self, root)
        if len(writer.extras) > 1:
            self.refusal = f"it reads {len(writer.extras)} tensors, and there is room for one"
            return None
        extra = writer.extras[0] if writer.extras else None
        if extra is not None and _dtype(extra.source) != _dtype(self.output):
            self.refusal = f"it reads {describe(extra.source)}, which is of {_dtype(extra.source)}"
            return None
        return Region(root, writer.epilogue(), extra, tuple(sorted(writer.computed)), self._views_to(root))

    def _is_exit(self, node: Node) -> bool:
        """Whether nothing but ``node`` is read outside of what was read so far."""
        return all(user in self.axes for one in self.axes if one is not node for user in one.users)

    def _views_to(self, node: Node) -> tuple[Node, ...]:
        views: list[Node] = []
        while node is not self.output:
            if not _is_elementwise(node):
                views.insert(0, node)
            node = next(one for one in node.all_input_nodes if one in self.axes)
        return tuple(views)

    def _who_else(self, computes: bool) -> str:
        """Who reads a value that is not the last."""
        if not computes:
            return ""
        others = [user for one in self.axes for user in one.users if user not in self.axes]
        return f"what is computed is also read by {describe(others[0])}"

    def _axes_of(self, node: Node) -> Axes | None:
        """The axes of a node that reads the region, if it becomes part of it."""
        inputs = [self.axes[one] for one in node.all_input_nodes if one in self.axes]
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return None
        axes = inputs[0]
        if node.target is aten.permute.default:
            return tuple(axes[d] for d in node.args[1])  # type: ignore[union-attr, index, misc]
        if node.target is aten.transpose.int:
            order = list(axes)
            first, second = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
            order[first], order[second] = order[second], order[first]
            return tuple(order)
        if node.target in SAME_ORDER:
            return self._merged([a for group in axes for a in group], val.shape)
        why = self._against(node, inputs)
        if why is not None:
            self.refusal = self.refusal or why
            return None
        return axes if _is_elementwise(node) else None

    def _against(self, node: Node, inputs: list[Axes]) -> str | None:
        """Why an elementwise node is not part of the region."""
        if not _is_elementwise(node):
            return None
        spelled = _operation(node)
        if spelled is None:
            return f"{describe(node)} to {node.meta['val'].dtype} is no operation of the kernel's epilogues"
        if any(axes != inputs[0] for axes in inputs):
            return f"{describe(node)} reads the output in two orders"
        if not _same(node.meta["val"].shape, self._shape(inputs[0])):
            return f"{describe(node)} is of another shape than the output"
        for side in (one for one in node.all_input_nodes if one not in self.axes):
            if not _is_readable(side, node):
                return f"{describe(node)} reads {describe(side)}, which is {_what(side)}"
            if not _same(side.meta["val"].shape, self._shape(inputs[0])):
                return f"{describe(node)} reads {describe(side)}, of another shape than the output"
        return None

    def _shape(self, axes: Axes) -> list[Any]:
        return [math.prod(self.sizes[a] for a in group) for group in axes]

    def _merged(self, atoms: list[int], shape: Sequence[Any]) -> Axes | None:
        """The axes of a view of ``shape``, if its dimensions are whole ones, and merge those side by side in memory."""
        groups: list[tuple[int, ...]] = []
        left = list(atoms)
        for size in shape:
            group: list[int] = []
            while not compat.surely(math.prod(self.sizes[a] for a in group) == size):
                if not left:
                    return None
                group.append(left.pop(0))
            groups.append(tuple(group))
        if not groups or not all(compat.surely(self.sizes[a] == 1) for a in left):
            return None
        groups[-1] += tuple(left)
        return tuple(groups) if all(self._side_by_side(group) for group in groups) else None

    def _side_by_side(self, group: tuple[int, ...]) -> bool:
        places = [a for a in IN_MEMORY if not compat.surely(self.sizes[a] == 1)]
        wanted = [a for a in group if a in places]
        at = places.index(wanted[0]) if wanted else 0
        return places[at : at + len(wanted)] == wanted


class _Writer:
    """Writes the region that ends in ``root`` as an epilogue."""

    def __init__(self, reader: Reader, root: Node) -> None:
        self.reader = reader
        self.root = root
        self.statements: list[str] = []
        self.extras: list[Extra] = []
        self.computed: set[Node] = set()
        self.written: dict[Any, str] = {reader.output: "x"}
        for node in reader.axes:
            if node is not reader.output:
                self._write(node)
            if node is root:
                break
        cast = DTYPE_NAMES[root.meta["val"].dtype]
        last = len(self.statements) - 1
        if self.written[root] != f"v{last}" or not self.statements[last].startswith(f"v{last} = {cast}("):
            self._say(cast, self.written[root])

    def epilogue(self) -> Epilogue:
        return epilogues.parse("; ".join(self.statements))

    def _write(self, node: Node) -> None:
        if not _is_elementwise(node):
            (source,) = (one for one in node.all_input_nodes if one in self.reader.axes)
            self.written[node] = self.written[source]
            return
        axes = next(self.reader.axes[one] for one in node.all_input_nodes if one in self.reader.axes)
        self.written[node] = self._compute(node, lambda one: self._side(one, (), axes))

    def _compute(self, node: Node, side: Callable[[Node], str]) -> str:
        """The value of an elementwise node, whose operands outside of the region are ``side``'s."""
        self.computed.add(node)
        name, operands = _operation(node)  # type: ignore[misc]
        values = [
            epilogues.number(o) if not isinstance(o, Node) else self.written[o] if o in self.reader.axes else side(o)
            for o in operands
        ]
        if not isinstance(operands[0], Node) and name not in epilogues.NUMBERS_FIRST:
            values.reverse()
        return values[0] if name == "" else self._say(name, *values)

    def _say(self, name: str, *values: str) -> str:
        self.statements.append(f"v{len(self.statements)} = {name}({', '.join(values)})")
        return f"v{len(self.statements) - 1}"

    def _side(self, node: Node, moves: tuple[Node, ...], axes: Axes) -> str:
        """A value from outside of the region: what makes it is computed too where nobody else reads it."""
        key = (node, moves, axes)
        if key not in self.written:
            if _is_view(node) and len(node.users) == 1 and _is_absorbed(_viewed(node), moved=True):
                self.written[key] = self._side(_viewed(node), (node, *moves), axes)
            elif _is_absorbed(node, moved=bool(moves)):
                self.written[key] = self._compute(node, lambda one: self._side(one, moves, axes))
            else:
                self.extras.append(Extra(node, moves, axes))
                self.written[key] = "y"
        return self.written[key]


def _after(node: Node) -> Iterator[Node]:
    while (node := node.next).op != "root":
        yield node


def _readers(node: Node) -> Iterator[Node]:
    """Who reads a value, or a view of it."""
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_generated(node: Node) -> bool:
    """Whether Inductor generates a kernel for a node, which could compute what the node reads."""
    return _is_elementwise(node) or getattr(torch.Tag, "reduction", None) in getattr(node.target, "tags", ())


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _is_elementwise(node: Node) -> bool:
    """Whether a node computes something element by element."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return node.target is CAST or (pointwise and node.target is not aten.clone.default)


def _widens(node: Node) -> bool:
    """Whether a node is a cast that rounds nothing, which is free wherever its value is read."""
    if node.target is not CAST:
        return False
    source, result = node.args[0].meta["val"].dtype, node.args[1]  # type: ignore[union-attr]
    return source in FLOATS and result in (torch.float32, source)


def _operation(node: Node) -> tuple[str, list[Any]] | None:
    """``(operation, operands)`` of an elementwise node; of a cast that rounds nothing the operation is empty."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return None
    if node.target is CAST:
        if node.args[0].meta["val"].dtype not in FLOATS or val.dtype not in DTYPE_NAMES:  # type: ignore[union-attr]
            return None
        return ("" if _widens(node) else DTYPE_NAMES[val.dtype]), [node.args[0]]
    operands = list(node.args)
    if node.target not in SPELLINGS or node.kwargs or val.dtype not in FLOATS:
        return None
    numbers = [o for o in operands if not isinstance(o, Node)]
    if not all(isinstance(o, (int, float)) and math.isfinite(o) for o in numbers):
        return None
    return SPELLINGS[node.target], operands


def _same(shape: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(shape) == len(expected) and all(
        compat.surely(one == other) for one, other in zip(shape, expected, strict=True)
    )


def _what(side: Node) -> str:
    val = side.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return "a number that varies"
    return f"of {val.dtype}" if val.dtype not in FLOATS else f"on {val.device}"


def _is_readable(side: Node, reader: Node) -> bool:
    """Whether a kernel can read a node's value."""
    val = side.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype in FLOATS and val.device == reader.meta["val"].device


def _is_view(node: Node) -> bool:
    return node.target in (*SAME_ORDER, aten.permute.default, aten.transpose.int)


def _viewed(node: Node) -> Node:
    return node.args[0]  # type: ignore[return-value]


def _is_absorbed(node: Node, moved: bool) -> bool:
    """Whether a value beside the region is computed in it: from what a kernel can read, and for nothing else.

    ``moved``: views of it are made of its operands instead, which then have to be of its shape.
    """
    if moved and _is_view(node) and len(node.users) == 1:
        return _is_absorbed(_viewed(node), moved)
    if not _is_elementwise(node) or _operation(node) is None or (len(node.users) != 1 and not _widens(node)):
        return False
    shape = node.meta["val"].shape
    return all(
        _is_readable(one, node) and (not moved or _same(one.meta["val"].shape, shape))
        for one in node.all_input_nodes
    )
