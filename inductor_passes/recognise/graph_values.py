"""What Dynamo's graph says of its values: shapes, sizes as expressions, and when a tensor is written to.

Dynamo's graph is not functional: ``k_cache[:, :, i] = k`` is a node in it. A node's name stands for what its memory
holds when it is read, so whoever wants to read a tensor later than its user did must know that nothing wrote to it.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from inductor_passes import compat


def example(node: Any) -> Any:
    """The fake tensor, symbolic size or number that a node makes; what is no node is its own example."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def size_of(value: Any) -> sympy.Expr | None:
    """An integer as an expression over symbolic sizes: of a number, of a symbolic one, or of a node; None if none."""
    value = example(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return sympy.Integer(value)
    return compat.expression(value) if isinstance(value, torch.SymInt) else None


def number_of(value: Any) -> float | None:
    """A constant, or what was computed from sizes that turned out to be constant; None where it is neither."""
    number = example(value)
    if isinstance(number, (torch.SymFloat, torch.SymInt)):
        number = number.node.expr
    constant = isinstance(number, (int, float, sympy.Number)) and not isinstance(number, bool)
    return float(number) if constant else None


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    """The sizes of the tensor that a node makes."""
    return tuple(sympy.sympify(size_of(size)) for size in example(node).shape)


def name_of(node: Node) -> str:
    """What a node calls, the same for methods, functions, operators and aten ops, written in place or not."""
    target = node.target
    own = _own_name(node)
    if own:
        special = own.startswith("__")  # functorch's wrapped operators, and aten's
        return _OPERATORS.get(own.strip("_"), own.strip("_")) if special else own.rstrip("_")
    name = getattr(target, "__name__", str(target))
    if getattr(target, "__module__", "") == "_operator":
        in_place = name.startswith("i") and name[1:] in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor")
        return _OPERATORS.get(name[1:] if in_place else name, name[1:] if in_place else name)
    return name.rstrip("_")


def _own_name(node: Node) -> str:
    """The name of the method or the op that a node calls, as it is; empty where it calls something else."""
    if node.op == "call_method":
        return str(node.target)
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


_OPERATORS = {
    "and_": "bitwise_and", "and": "bitwise_and", "or_": "bitwise_or", "or": "bitwise_or", "xor": "bitwise_xor",
    "invert": "bitwise_not", "inv": "bitwise_not", "floordiv": "floor_divide", "mod": "remainder",
}  # fmt: skip


class Writes:
    """Which nodes of a graph write to which memory."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.shared: dict[Hashable, Node] = {}
        """What was computed for one call of attention and is the same for the next: layers share their operands."""
        inputs = {key: example(n).dtype for n in graph.find_nodes(op="placeholder") for key in memory_of(n)}
        self._written: list[tuple[int, set[int]]] = []
        # A tensor that was reshaped in place has one example for before and after: nobody can tell what it was.
        changed = (n.args[0] for n in graph.nodes if _own_name(n) in _RESHAPES and n.args)
        self._reshaped = {key for n in changed if isinstance(n, Node) for key in memory_of(n)}
        for node, position in self.position.items():
            memory = {key for target in _written_by(node) for key in memory_of(target)}
            # Two inputs may be one tensor: only their dtypes tell that they are not.
            dtypes = {inputs[key] for key in memory & inputs.keys()}
            memory |= {key for key, dtype in inputs.items() if dtype in dtypes}
            if memory:
                self._written.append((position, memory))

    def place(self, new: Node, old: Node) -> None:
        """Take a new node, which writes to nothing, for one that runs when ``old`` does."""
        self.position[new] = self.position[old]

    def between(self, tensor: Node, first: Node, last: Node) -> bool:
        """Whether what ``tensor`` holds may change after ``first`` ran and before ``last`` does."""
        memory = memory_of(tensor)
        if memory & self._reshaped:
            return True
        start, end = self.position[first], self.position[last]
        return any(start < position < end and memory & written for position, written in self._written)


TRANSFORMS = ("vmap", "grad", "jvp")
"""functorch's transforms: between their beginning and their end in a graph, shapes are not those of the data."""


def in_transform(node: Node) -> bool:
    """Whether a node runs inside one of ``TRANSFORMS``."""
    begins, ends = ({f"_{name}_{how}_nesting" for name in TRANSFORMS} for how in ("increment", "decrement"))
    return inside(node, begins, ends)


def inside(node: Node, begins: set[str], ends: set[str]) -> bool:
    """Whether more functions of ``begins`` than of ``ends`` were called before a node."""
    depth = 0
    for other in node.graph.nodes:
        if other is node:
            return depth > 0
        name = getattr(other.target, "__name__", "")
        depth += (name in begins) - (name in ends)
    return False


_RESHAPES = frozenset(
    f"{name}_"
    for name in ("as_strided", "resize", "resize_as", "set", "squeeze", "swapaxes", "swapdims", "t", "transpose",
                 "unsqueeze")
)  # fmt: skip


def memory_of(node: Node) -> set[int]:
    """The storages of the tensors that a node makes. Views share theirs with what they view."""
    leaves = torch.utils._pytree.tree_leaves(example(node))
    tensors = [compat.without_levels(t) for t in leaves if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided and not t.is_nested}


def _written_by(node: Node) -> list[Node]:
    """The nodes whose tensors a node may write to; all that it reads where nothing is known of it."""
    if node.op == "call_method":
        in_place = str(node.target).endswith("_") and not str(node.target).endswith("__")
        return [n for n in node.args[:1] if isinstance(n, Node)] if in_place else []
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function":
        return []
    target = node.target
    written = node.kwargs.get("out")
    out = [n for n in (written if isinstance(written, (list, tuple)) else [written]) if isinstance(n, Node)]
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads() if not name.endswith("out")]
        return node.all_input_nodes if any(s.is_mutable for s in schemas) else out
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else out
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [] if target.name() == "flex_attention" else node.all_input_nodes
    name = getattr(target, "__name__", str(target))
    if getattr(target, "__module__", "") == "_operator":
        changes = target is operator.setitem or target is operator.delitem or name in _IN_PLACE_OPERATORS
        return [n for n in node.args[:1] if isinstance(n, Node)] if changes else out
    module = getattr(target, "__module__", "") or ""
    if name.endswith("_") or node.kwargs.get("inplace"):
        return [n for n in node.args[:1] if isinstance(n, Node)] + out
    known = not module or module.startswith(("torch", "math", "builtins"))
    return out if known else node.all_input_nodes


def computes_only(node: Node) -> bool:
    """Whether all that a node does is to compute its value, of which nothing remains when nobody reads it."""
    if node.op not in ("call_function", "call_method") or _written_by(node):
        return False
    return isinstance(example(node), (torch.Tensor, torch.SymInt, int)) and not _is_random(node)


def _is_random(node: Node) -> bool:
    if name_of(node) == "dropout":
        return not drops_nothing(node)
    return "rand" in name_of(node) or name_of(node) in ("bernoulli", "multinomial", "normal", "uniform")


def drops_nothing(dropout: Node) -> bool:
    """Whether a dropout gives what it is given: with a probability of 0, or outside of training."""
    given = dict(zip(("input", "p", "training", "inplace"), dropout.args, strict=False)) | dropout.kwargs
    probability, training = given.get("p", 0.5), given.get("training", given.get("train", True))
    return (isinstance(probability, (int, float)) and probability == 0) or training is False


_IN_PLACE_OPERATORS = frozenset(
    f"i{name}"
    for name in ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub",
                 "truediv", "xor")
)  # fmt: skip
