"""What the tests of recognition share: a function's graph after the pass, what it decided, and what the graph computes.

The graph runs as it is, op by op: what Inductor makes of a form's op is tested elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.masks import OperandValue
from inductor_passes.compile import recognise_in
from inductor_passes.decisions import Decision, recording
from inductor_passes.package import erase_assertions
from inductor_passes.recognise import Recognise

Function = Callable[..., Any]


@dataclasses.dataclass
class Call:
    """One call of a form's op as it ran: q, k and v, and what else it took by name."""

    form: Form
    tensors: tuple[Tensor, ...]
    keywords: dict[str, Any]

    def dense(self) -> Tensor:
        """What the form's mask says, bool ``[B or 1, Lq, Lk]``."""
        query, key, _ = self.tensors
        operands: dict[str, OperandValue] = dict.fromkeys(self.form.operand_names) | {
            name: value for name, value in self.keywords.items() if name in self.form.operand_names
        }
        positions = torch.arange(query.shape[2])
        start = operands.get("q_start")
        if isinstance(start, Tensor):
            positions = positions + start[:, None]
        return self.form.mask.dense(positions, torch.arange(key.shape[2]), operands)


@dataclasses.dataclass
class Outcome:
    """What became of a function."""

    result: Any
    calls: list[Call]
    decisions: list[Decision]
    graphs: list[torch.fx.GraphModule]

    def of_stage(self, stage: str) -> list[Decision]:
        return [d for d in self.decisions if d.stage == stage]

    def count(self, name: str) -> int:
        """Nodes whose target is called so."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return sum(getattr(n.target, "__name__", str(n.target)).partition(".")[0] == name for n in nodes)


class _Recording(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, calls: list[Call]) -> None:
        super().__init__(module)
        self._calls = calls

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        for form in FORMS.values():
            if target == form.op.default:
                named = dict(zip(form.operand_names, args[3:], strict=False))
                self._calls.append(Call(form, args[:3], {**named, **kwargs}))
        return super().call_function(target, args, kwargs)


def recognised(
    function: Callable[..., Any], *inputs: Any, dynamic: bool | None = False, trust_block_masks: bool = False
) -> Outcome:
    """Trace a function whole, run the pass on its graph, then run the graph."""
    torch.compiler.reset()
    calls: list[Call] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        recognise_in(gm, Recognise(trust_block_masks))
        gm.graph.lint()
        graphs.append(gm)
        return lambda *arguments: _Recording(gm, calls).run(*arguments)

    with recording() as log:
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return Outcome(result, calls, log.records, graphs)


def recognised_in_export(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> Outcome:
    """The same for the graph of an exported program, of static sizes."""
    assert not dynamic

    class Exported(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    program = torch.export.export(Exported(), inputs)
    gm = program.module(check_guards=False)
    calls: list[Call] = []
    erase_assertions(gm.graph)
    with recording() as log:
        recognise_in(gm, Recognise())
    gm.graph.lint()
    return Outcome(_Recording(gm, calls).run(*inputs), calls, log.records, [gm])


# ------------------------------------------------------------------ scaled_dot_product_attention


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    """Copied from transformers/models/llama/modeling_llama.py (Apache-2.0), so that it is tested as it is written."""
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


def qkv(
    heads: tuple[int, int] = (4, 2), lengths: tuple[int, int] = (6, 6), dim: int = 8, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, heads[0], lengths[0], dim, **keywords)
    return q, *(torch.randn(2, heads[1], lengths[1], dim, **keywords) for _ in "kv")


def triangle(n: int, m: int | None = None) -> Tensor:
    return torch.arange(n)[:, None] >= torch.arange(n if m is None else m)


def check_recognised(
    function: Function, *inputs: Any, forms: tuple[str, ...] = ("full_self",), **keywords: Any
) -> Outcome:
    """Every call is recognised as the form that is named, and the result is the user's."""
    expected = function(*inputs)
    outcome = recognised(function, *inputs, **keywords)
    assert not outcome.of_stage("refused"), outcome.decisions
    assert tuple(d.op for d in outcome.of_stage("recognised")) == forms
    assert outcome.count("scaled_dot_product_attention") == 0
    torch.testing.assert_close(outcome.result, expected, rtol=1e-4, atol=1e-5)
    return outcome


def check_left_alone(function: Function, *inputs: Any, reason: str, **keywords: Any) -> None:
    """Nothing changes, the reason is recorded, and the result is the user's bit for bit."""
    torch.manual_seed(0)
    expected = function(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    outcome = recognised(function, *copy.deepcopy(inputs), **keywords)
    assert not outcome.of_stage("recognised") and not outcome.calls
    assert [reason in d.detail for d in outcome.of_stage("refused")] == [True], outcome.decisions
    assert outcome.count("scaled_dot_product_attention") == 1
    torch.testing.assert_close(outcome.result, expected, rtol=0, atol=0, equal_nan=True)
