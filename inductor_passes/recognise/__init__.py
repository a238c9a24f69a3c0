"""User code that means a form becomes the form's op, in Dynamo's graph, before autograd and Inductor see it.

A spelling is a file with ``find(graph, writes)``, which yields a ``Candidate`` for every call of attention that it can
read from the graph, and ``Refused`` with a reason for every one that it cannot. What is recognised is proved: the
mask's condition is solved and compared with every form's, repetitions of k and v are followed index by index, and
what a mask read is read as it was then, though somebody wrote to it later. All else keeps the user's own path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.checks import check_kernels
from custom_ops.form import empty_outputs
from inductor_passes import CHOSEN, decisions
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import module_of
from inductor_passes.recognise import flex, hand_written, sdpa
from inductor_passes.recognise.candidate import Candidate, Refused
from inductor_passes.recognise.graph_values import (
    Writes,
    computes_only,
    example,
    in_transform,
    inside,
    memory_of,
    name_of,
    shape_of,
)
from inductor_passes.recognise.indexing import Unreadable, require
from inductor_passes.recognise.match import Matched, Refusal, match_form
from inductor_passes.recognise.repeated_kv import Heads, heads_of, whole
from inductor_passes.recognise.sequences import with_starts
from inductor_passes.recognise.writing import Writer

__all__ = ["SPELLINGS", "Candidate", "Recognise", "Refused"]

Find = Callable[..., Iterator[Candidate | Refused]]

SPELLINGS: tuple[Find, ...] = (sdpa.find, flex.find, hand_written.find)
"""Every spelling that is recognised, in the order in which they look at a graph."""

DEVICES = ("cpu", "cuda")
READS_LAYOUT = ("view", "view_as", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr")


class Recognise(GraphPass):
    """Rewrite what ``SPELLINGS`` find to the forms' ops."""

    def __init__(self, trust_block_masks: bool = False) -> None:
        super().__init__()
        self._trust_block_masks = trust_block_masks

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for find in SPELLINGS:
            writes = Writes(graph)
            settings = {"trust_block_masks": self._trust_block_masks} if find is flex.find else {}
            for found in find(graph, writes, **settings):  # one after another: a call may read an earlier one
                chosen = (found.node.meta.get("custom") or {}).get(CHOSEN)
                if chosen is not None:
                    _refuse(found.node, found.op, f"backend={chosen!r} was asked for")
                elif isinstance(found, Refused):
                    _refuse(found.node, found.op, found.reason)
                elif in_transform(found.node):
                    _refuse(found.node, found.op, "it runs inside a functorch transform, such as vmap")
                else:
                    count += _rewrite(found, writes)
        return count


def _refuse(node: Node, op: str, reason: str) -> None:
    detail = f"torch's own path, left as it is: {reason}"
    decisions.record(decisions.Decision("refused", op, node.name, detail, {"module": module_of(node)}))


def _rewrite(candidate: Candidate, writes: Writes) -> int:
    """Replace a candidate by its form's op, or record why not. Returns how many were replaced."""
    writer = Writer(candidate, writes)
    try:
        candidate = writer.in_order()
        candidate, matched = _match(candidate)
        writer.candidate = candidate
        heads = _grouped_heads(candidate, writes)
        operands = writer.operands(matched)
        query, key, value = candidate.query, *(writer.heads(h) for h in heads)
        _check(candidate, matched, (query, key, value), operands)
    except Unreadable as reason:
        writer.undo()
        _refuse(candidate.node, candidate.op, str(reason))
        return 0
    keywords = {**operands, **({} if candidate.scale is None else {"scale": candidate.scale})}
    if candidate.softcap:
        keywords["softcap"] = candidate.softcap
    _replace(candidate, matched, (query, key, value), keywords, writer, writes)
    _record(candidate, matched, (query, key, value), heads)
    return 1


def _match(candidate: Candidate) -> tuple[Candidate, Matched]:
    """The candidate's form, which may be that of another way to say what its mask says."""
    for tensor in (candidate.query, candidate.key, candidate.value):
        fake = example(tensor)
        require(fake.device.type in DEVICES, f"no kernels for {fake.device.type}")
        plain = not torch.utils._python_dispatch.is_traceable_wrapper_subclass(fake) and fake.layout == torch.strided
        require(plain, "tensors of a kind of their own")
    lengths = {"query_len": shape_of(candidate.query)[2], "key_len": shape_of(candidate.key)[2]}
    packed = with_starts(candidate) if lengths["query_len"] == lengths["key_len"] else None
    for way in (candidate,) if packed is None else (packed, candidate):
        matched = match_form(way.visible, **lengths, tensors=way.tensors)
        if isinstance(matched, Matched):
            break
    if isinstance(matched, Refusal):
        raise Unreadable(matched.reason)
    # What no form can say: the mean of all values for a query whose keys are all hidden.
    require(matched.every_query_sees or not candidate.finite, "a query may see no key, and is then no zero there")
    return way, matched


def _grouped_heads(candidate: Candidate, writes: Writes) -> tuple[Heads, Heads]:
    """k and v with as few heads as forms can take; where v would have more than k, k stays as it is."""
    key, value = (heads_of(t, candidate.node, writes) for t in (candidate.key, candidate.value))
    if sympy.Mod(key.heads, value.heads) != 0:
        key = whole(candidate.key)
    return key, value


def _check(candidate: Candidate, matched: Matched, tensors: tuple[Node, ...], operands: dict[str, Any]) -> None:
    """``Unreadable`` with the form's own message where its op would not take the call."""
    fakes = _fakes(candidate, tensors)
    values = {name: example(value) for name, value in operands.items()}
    try:
        given = {name: values.get(name) for name in matched.form.operand_names}
        matched.form.check(fakes[0], fakes[1], fakes[2], given, candidate.scale, candidate.softcap)
        check_kernels(matched.form, fakes[0])
    except ValueError as error:
        raise Unreadable(str(error)) from None


def _fakes(candidate: Candidate, tensors: tuple[Node, ...]) -> list[torch.Tensor]:
    """q, k and v as the op's kernels see them: under autocast, of one dtype, which the user's output has."""
    fakes = [example(t) for t in tensors]
    if len({t.dtype for t in fakes}) == 1 and not _in_autocast(candidate.node):
        return fakes
    dtype = example(next(node for node, output in candidate.replaced.items() if output == 0)).dtype
    return [t.to(dtype) for t in fakes]


def _in_autocast(node: Node) -> bool:
    """Whether the graph has entered autocast before a node, and not left it."""
    return inside(node, {"_enter_autocast"}, {"_exit_autocast"})


def _replace(
    candidate: Candidate,
    matched: Matched,
    tensors: tuple[Node, ...],
    keywords: dict[str, Any],
    writer: Writer,
    writes: Writes,
) -> None:
    """Call the form's op, give its outputs to the users of the replaced nodes, and erase what nobody reads any more."""
    graph, fakes = candidate.node.graph, _fakes(candidate, tensors)
    with graph.inserting_before(candidate.node):
        call = graph.call_function(matched.form.op.default, tensors, keywords)
    with fakes[0].fake_mode:  # type: ignore[attr-defined]
        call.meta = {**candidate.node.meta, "example_value": empty_outputs(fakes[0], fakes[2])}
    unread = [candidate.node]
    for node, output in candidate.replaced.items():
        result = writer.call(operator.getitem, call, output)
        if output == 0:
            result = writer.out_of_order(result)
        before, after = example(node), example(result)
        if before.dtype != after.dtype:
            result = writer.call("to", result, before.dtype)
        if before.stride() != example(result).stride() and _layout_is_read(node):
            result = writer.call("contiguous", result)
        node.replace_all_uses_with(result)
        unread.append(node)
    writes.place(call, candidate.node)
    for new in (call, *writer.added):
        new.meta.update({name: call.meta[name] for name in ("nn_module_stack", "stack_trace") if name in call.meta})
    erase_unread(unread)


def _layout_is_read(node: Node) -> bool:
    """Whether somebody asks how a tensor, or a view of it, lies in memory: ``view`` fails where ``reshape`` copies."""
    return any(
        name_of(user) in READS_LAYOUT or (memory_of(user) & memory_of(node) and _layout_is_read(user))
        for user in node.users
    )


def erase_unread(nodes: list[Node]) -> None:
    """Drop what nothing reads and what only that read, so far as it does nothing but compute."""
    waiting = list(nodes)
    erased: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method"):
            continue
        if node not in nodes and not computes_only(node):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        waiting += inputs


def _record(candidate: Candidate, matched: Matched, tensors: tuple[Node, ...], heads: tuple[Heads, Heads]) -> None:
    form = matched.form
    said = [f"{candidate.op} whose mask is {form.name}'s"]
    ints = {name: value for name, value in matched.operands.items() if isinstance(value, int)}
    said += [f"{name} {value}" for name, value in ints.items()]
    said += [f"{name} from the graph" for name in matched.operands if name not in ints]
    times = heads[0].times
    if times > 1:
        said.append(f"k repeated {times} times, which the kernel does by itself")
    query, key, value = (tuple(example(t).shape) for t in tensors)
    facts = {
        "module": module_of(candidate.node), "spelling": candidate.op, "query": query, "key": key, "value": value,
        "dtype": example(tensors[0]).dtype, "operands": dict(matched.operands),
    }  # fmt: skip
    decisions.record(decisions.Decision("recognised", form.name, candidate.node.name, ", ".join(said), facts))
