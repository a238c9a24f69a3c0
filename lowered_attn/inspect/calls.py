"""The attention calls of a compiled graph: their masks, floating-point operations, bytes and the roofline."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from custom_ops.flops import backward_flops, forward_flops
from custom_ops.forms import FORMS
from custom_ops.masks import Mask, OperandValue
from inductor_passes.gpu_facts import peak

OPS = torch.ops.lowered_attn
PAGED = (OPS.paged_attention.default, OPS.paged_latent_attention.default)
DRAWN = 2048
"""Longest side of a drawn mask."""
CACHED, NEW = 40, 8
"""Tokens of the request that a paged mask is drawn for."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A mask and the values that it is drawn with."""

    mask: Mask
    query_len: int
    key_len: int
    operands: dict[str, OperandValue]
    tile: tuple[int, int] | None
    q_start: int
    note: str
    """What of the drawing is an example, because tensors have no values here."""

    def _arguments(self) -> tuple[Any, ...]:
        return self.mask, self.query_len, self.key_len, self.operands, self.tile, self.q_start

    def svg(self) -> str:
        """The drawing as SVG."""
        from custom_ops.mask_drawing import draw_svg

        return draw_svg(*self._arguments())

    def text(self) -> str:
        """The drawing as text; of long sequences, a character a tile."""
        from custom_ops.mask_drawing import CELLS_UP_TO, draw_text, tile_classes

        if max(self.query_len, self.key_len) <= CELLS_UP_TO:
            return draw_text(*self._arguments())
        tile = self.tile or (-(-self.query_len // 32), -(-self.key_len // 32))
        signs = {"empty": "·", "full": "█", "partial": "▓"}
        rows = tile_classes(self.mask, self.query_len, self.key_len, self.operands, tile, self.q_start)
        legend = f"a character a tile of {tile[0]} queries x {tile[1]} keys: █ full, ▓ partial, · empty (skipped)"
        return "\n".join(["".join(signs[kind] for kind in row) for row in rows] + [legend])


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention op of a graph that Inductor lowers."""

    node: str
    """The node's name."""
    op: str
    """The form's name, or the paged op's."""
    phase: str
    """"forward" or "backward"."""
    shapes: str
    """The sizes, for people."""
    dtype: torch.dtype
    flops: int
    """Floating-point operations; two for a multiply-add."""
    bytes: int
    """Bytes of inputs and outputs, each moved once."""
    bound: str
    """What the two numbers are: exact, or an upper bound, and why."""
    picture: Picture | None
    """The mask; None in a backward, whose forward shows it."""
    arguments: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
    """The op's arguments with fake tensors."""

    def roofline(self, arch: str) -> Roofline:
        """The least time on that architecture."""
        limits = peak(arch)
        compute, memory = self.flops / limits.flops(self.dtype), self.bytes / limits.bandwidth
        return Roofline(compute, memory, self.flops / max(self.bytes, 1))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time a call can take, by a GPU's data sheet."""

    compute: float
    """Seconds for the arithmetic alone."""
    memory: float
    """Seconds for the bytes alone."""
    intensity: float
    """Operations a byte."""

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.compute, self.memory)

    @property
    def bound_by(self) -> str:
        """"arithmetic" or "memory"."""
        return "arithmetic" if self.compute >= self.memory else "memory"


def calls_in(graph: torch.fx.Graph, phase: str) -> list[Call]:
    """The attention calls of a graph after our passes, in order."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (OPS.grouped_attention.default, OPS.attention_with_epilogue.default):
            found.append(_dense(node, phase))
        elif node.target == OPS.attention_backward.default:
            found.append(_dense_backward(node))
        elif node.target in PAGED:
            found.append(_paged(node, phase))
    return found


def _values(node: torch.fx.Node) -> tuple[Any, ...]:
    return torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])  # type: ignore[no-any-return]


def _bytes(*tensors: Any) -> int:
    return sum(int(t.numel()) * t.element_size() for t in tensors if isinstance(t, Tensor))


def _sizes(*tensors: Any) -> list[list[int]]:
    return [[int(size) for size in t.shape] for t in tensors]


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    batch, heads, length, dim = query.shape
    _, kv_heads, key_len, _ = key.shape
    dims = f"{dim}" if value.shape[3] == dim else f"{dim}/{value.shape[3]}"
    return f"batch {batch}, heads {heads}/{kv_heads}, queries {length}, keys {key_len}, head dim {dims}"


def _dense(node: torch.fx.Node, phase: str) -> Call:
    arguments = _values(node)
    query, key, value, padding, q_start, query_value, key_value, request_value, name, ints = arguments[:10]
    # What an epilogue reads is the last argument, and as large as the output, which is then alone.
    alone = isinstance(node.meta["val"], Tensor)
    form, out = FORMS[name], (node.meta["val"], arguments[-1]) if alone else node.meta["val"][:1]
    numbers = [int(i) for i in ints]
    shape, key_shape, value_shape = _sizes(query, key, value)
    present = {
        "key_padding": padding, "q_start": q_start, "query": query_value, "key": key_value, "request": request_value
    }  # fmt: skip
    exact = all(value is None for value in present.values())
    return Call(
        node.name, name, phase, _shapes(query, key, value), query.dtype,
        forward_flops(form, shape, key_shape[2], value_shape[3], numbers), _bytes(query, key, value, *out),
        "exact" if exact else "at most: a tensor decides what is hidden",
        _picture(name, numbers, shape, key_shape, present), arguments,
    )  # fmt: skip


def _dense_backward(node: torch.fx.Node) -> Call:
    arguments = _values(node)
    grad, _, query, key, value, out, lse = arguments[:7]
    name, ints = arguments[12:14]
    shape, key_shape, value_shape = _sizes(query, key, value)
    flops = backward_flops(FORMS[name], shape, key_shape[2], value_shape[3], [int(i) for i in ints])
    # Besides the forward's tensors and lse: the gradients of q, k and v are written.
    moved = _bytes(query, key, value, out, lse, grad) + _bytes(query, key, value)
    bound = "exact" if all(a is None for a in arguments[7:12]) else "at most: a tensor decides what is hidden"
    return Call(
        node.name, name, "backward", _shapes(query, key, value), query.dtype, flops, moved, bound, None, arguments
    )  # fmt: skip


def _picture(name: str, ints: list[int], shape: list[int], key_shape: list[int], present: dict[str, Any]) -> Picture:
    mask = FORMS[name].mask
    length, key_len = min(shape[2], DRAWN), min(key_shape[2], DRAWN)
    operands: dict[str, OperandValue] = dict(zip((o.name for o in mask.int_operands), ints, strict=True))
    notes = []
    if length < shape[2] or key_len < key_shape[2]:
        notes.append(f"the first {length} queries and {key_len} keys")
    for operand in mask.operands:
        if operand.kind == "int" or (operand.optional and present.get(operand.name, present.get(operand.kind)) is None):
            continue
        if operand.boolean:
            notes.append(f"{operand.name} hides more keys, and is not drawn")
            continue
        size = {"query": length, "key": key_len}.get(operand.kind)
        # Ids in order, as segments and documents are: eight of them, or a segment a key where keys are segments.
        ids = min(8, key_len) if FORMS[name].self_attention else key_len
        spread = torch.tensor([key_len // 2] if size is None else [i * ids // size for i in range(size)], device="cpu")
        operands[operand.name] = spread.to(torch.int32) if size is None else spread.to(torch.int32)[None]
        notes.append(f"{operand.name} is an example")
    start = 0
    if present["q_start"] is not None:
        start = max(key_len - length, 0)
        notes.append("q_start is an example: the queries are the last keys")
    return Picture(mask, length, key_len, operands, None, start, "; ".join(notes))


def _paged(node: torch.fx.Node, phase: str) -> Call:
    from inductor_passes.share_schedule import call_of

    call = call_of(node)
    rows, heads, dim = (int(size) for size in call.q.shape)
    sizes = call.cache_sizes
    capacity = int(call.page_tables.shape[1]) * sizes.page_size
    seen = min(capacity, call.window) if call.window else capacity
    width = dim if call.latent else dim + call.out_dim
    cached = call.requests * capacity if not call.window else min(rows * seen, call.requests * capacity)
    moved = cached * sizes.kv_heads * width * call.k_cache.element_size()
    names = [o.name for o in call.mask.operands]
    values = {"context": CACHED, "valid": NEW, "prefix": CACHED + 3, "padded_prefix": CACHED + 5, "status": 1}
    drawn: dict[str, OperandValue] = {n: torch.tensor([values.get(n, CACHED)], device="cpu") for n in names}
    picture = Picture(
        call.mask, NEW, CACHED + NEW, drawn, None, CACHED,
        f"one request, as an example: {CACHED} tokens cached and {NEW} new ones",
    )  # fmt: skip
    return Call(
        node.name, call.op, phase,
        f"mode {call.mode}, {rows} new tokens of {call.requests} requests, heads {heads}/{sizes.kv_heads}, "
        f"head dim {dim}, pages of {sizes.page_size}",
        call.q.dtype, 2 * rows * heads * seen * (dim + call.out_dim), moved + _bytes(call.q, *node.meta["val"]),
        f"at most: lengths are in tensors, and page tables hold up to {capacity} tokens a request", picture,
    )  # fmt: skip
