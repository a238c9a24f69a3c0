"""What torch expects of an op: opcheck, fakes, gradcheck, autocast, FLOP formulas, tracing, imports that stay lazy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from custom_ops.form import default_scale
from custom_ops.forms import FORMS
from tests.helpers import LAYOUTS, Call, Case, cotangents, make, run

OPS = torch.ops.lowered_attn
on_forms = pytest.mark.parametrize("name", FORMS)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "operands": {"padding": "some", "q_start": True},
    "low-precision": {"dtype": torch.bfloat16, "heads": (7, 1), "dims": (24, 8), "scale": 0.3},
    "one-token": {"lengths": (1, 1), "padding": "some"},
    "nothing": {"lengths": (0, 0)},
    "no-keys": {"lengths": (3, 0), "q_start": True},
    "capped": {"padding": "some", "q_start": True, "softcap": 0.7},
    "shared-values": {"heads": (4, 4), "value_heads": 2, "dims": (16, 40), "padding": "some"},
    "latent": {"dtype": torch.bfloat16, "heads": (6, 3), "value_heads": 1, "dims": (16, 512)},
}
on_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def arguments(call: Call, requires_grad: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the form's op, on fresh leaves."""
    leaves = (t.detach().clone().requires_grad_(requires_grad) for t in call.qkv)
    return (*leaves, *call.operands.values()), call.keywords


def grouped_arguments(call: Call) -> tuple[Any, ...]:
    """Arguments of ``grouped_attention``."""
    slots = call.form.slots(call.operands)
    return (*call.qkv, *slots[:-1], call.form.name, list(slots.ints), default_scale(call.q, call.scale), call.softcap)


def check(op: Any, args: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> None:
    """opcheck, every one of its tests, and no warning about a misdeclared op."""
    results = torch.library.opcheck(op, args, keywords or {})
    assert set(results.values()) == {"SUCCESS"}, results


# ---------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@on_settings
@on_forms
def test_opcheck_of_the_form_ops(name: str, settings: dict[str, Any], requires_grad: bool) -> None:
    call = make(Case(name, **settings))
    check(getattr(OPS, name).default, *arguments(call, requires_grad))


@on_settings
@on_forms
def test_opcheck_of_the_grouped_ops(name: str, settings: dict[str, Any]) -> None:
    call = make(Case(name, **settings))
    inputs = grouped_arguments(call)
    check(OPS.grouped_attention.default, inputs)
    out, lse = OPS.grouped_attention(*inputs)
    grad_out, grad_lse = cotangents(call)
    for grads in ((grad_out, grad_lse), (grad_out, None), (None, grad_lse)):
        check(OPS.attention_backward.default, (*grads, *call.qkv, out, lse, *inputs[3:]))


@on_forms
def test_the_grouped_op_computes_what_the_form_op_does(name: str) -> None:
    call = make(Case(name, padding="some", q_start=True))
    for a, b in zip(OPS.grouped_attention(*grouped_arguments(call)), run(call.form.op, call), strict=False):
        assert torch.equal(a, b)


@on_forms
def test_the_schema_is_the_documented_one(name: str) -> None:
    documented = {
        "full_self": "Tensor? key_padding=None, Tensor? q_start=None",
        "sliding_self": "SymInt window, Tensor? key_padding=None, Tensor? q_start=None",
        "segment_cross": "Tensor query_segments, SymInt lookback, Tensor? key_padding=None",
        "bidirectional": "Tensor? key_padding=None",
        "document": "Tensor query_documents, Tensor key_documents, Tensor? key_padding=None",
        "document_causal": "Tensor query_documents, Tensor key_documents, Tensor? key_padding=None, "
        "Tensor? q_start=None",
        "causal_from": "Tensor query_starts, Tensor? key_padding=None, Tensor? q_start=None",
        "prefix_lm": "Tensor prefix_lens, Tensor? key_padding=None, Tensor? q_start=None",
    }
    keywords = "*, float? scale=None, float softcap=0."
    expected = f"(Tensor q, Tensor k, Tensor v, {documented[name]}, {keywords}) -> (Tensor, Tensor)"
    assert str(getattr(OPS, name).default._schema) == f"lowered_attn::{name}{expected}"


# ---------------------------------------------------------------------- fakes, gradients


def assert_same_metadata(fake: Any, real: Any) -> None:
    for f, r in zip(fake, real, strict=True):
        assert f.shape == r.shape and f.dtype == r.dtype and f.device == r.device
        # The stride of a dimension of size 1 addresses nothing.
        used = [i for i, size in enumerate(r.shape) if size > 1 and r.numel()]
        assert [f.stride(i) for i in used] == [r.stride(i) for i in used]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@on_forms
def test_fake_results_have_the_real_shapes_dtypes_and_strides(name: str, dtype: torch.dtype, layout: str) -> None:
    for settings in SETTINGS.values():
        call = make(Case(name, layout=layout, **{**settings, "dtype": dtype}))
        inputs = grouped_arguments(call)
        real = OPS.grouped_attention(*inputs)
        real_backward = OPS.attention_backward(*cotangents(call), *call.qkv, *real, *inputs[3:])
        with FakeTensorMode() as mode:
            fake_inputs = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in inputs]
            fake = OPS.grouped_attention(*fake_inputs)
            grads = (mode.from_tensor(t) for t in cotangents(call))
            fake_backward = OPS.attention_backward(*grads, *fake_inputs[:3], *fake, *fake_inputs[3:])
            operands = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in call.operands.items()}
            fake_form = getattr(OPS, name)(*fake_inputs[:3], **operands, **call.keywords)
        assert_same_metadata(fake, real)
        assert_same_metadata(fake_form, real)
        assert_same_metadata(fake_backward, real_backward)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "some", "heads": (2, 2)},
        {"scale": 0.3},
        {"scale": 0.9, "softcap": 0.6, "padding": "some"},
        {"padding": "some", "heads": (3, 3), "value_heads": 1},
        {"heads": (4, 4), "value_heads": 2, "dims": (3, 6)},
    ],
    ids=str,
)
@on_forms
def test_gradcheck(name: str, settings: dict[str, Any]) -> None:
    call = make(
        Case(name, torch.float64, **{"heads": (2, 1), "lengths": (5, 5), "dims": (4, 3), "band": 2, **settings})
    )

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call.form.op(*qkv, **call.operands, **call.keywords)
        return out, lse.masked_fill(lse.isinf(), 0)  # -inf has no finite difference

    assert torch.autograd.gradcheck(attend, tuple(t.requires_grad_() for t in call.qkv))


@on_forms
def test_a_second_derivative_is_refused_instead_of_wrong(name: str) -> None:
    call = make(Case(name))
    q, k, v = (t.requires_grad_() for t in call.qkv)
    (dq,) = torch.autograd.grad(call.form.op(q, k, v, **call.operands)[0].square().sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match="attention_backward: .* there is no second derivative: backend='reference' has one"
    ):
        torch.autograd.grad(dq.sum(), k)
    out, _ = OPS.grouped_attention(*grouped_arguments(call))
    with pytest.raises(RuntimeError, match="grouped_attention: .* call the form op"):
        torch.autograd.grad(out.sum(), q)


# ---------------------------------------------------------------------- autocast


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@on_forms
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(
    name: str, device: str, dtype: torch.dtype
) -> None:
    call = make(Case(name, torch.float32, padding="some"), device)
    expected = run(call.form.op, call.to(dtype))

    def attend(*qkv: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype):
            return call.form.op(*qkv, **keywords)

    results = run(attend, call, cotangents(call))
    assert results.out.dtype == dtype and results.lse.dtype == torch.float32
    assert torch.equal(results.out, expected.out) and torch.equal(results.lse, expected.lse)
    assert [t.dtype for t in results[2:]] == [torch.float32] * 3
    with torch.autocast(device, dtype, enabled=False):
        assert call.form.op(*call.qkv, **call.operands)[0].dtype == torch.float32
    with torch.autocast(device, dtype):
        mixed = call.form.op(call.q, call.k.to(dtype), call.v, **call.operands)
    assert mixed[0].dtype == dtype


@on_forms
def test_autocast_leaves_fp64_alone(name: str) -> None:
    call = make(Case(name, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert call.form.op(*call.qkv, **call.operands)[0].dtype == torch.float64


# ---------------------------------------------------------------------- FLOPs

# Pairs that one head sees: 8 queries, 8 keys; a window of 3 leaves 1 + 2 + 6 * 3; two segments a query with lookback 1.
# What tensors decide counts as if they let everything through.
PAIRS = {
    "full_self": 36, "sliding_self": 21, "segment_cross": 16,
    "bidirectional": 64, "document": 64, "document_causal": 36, "prefix_lm": 64, "causal_from": 64,
}  # fmt: skip


@pytest.mark.parametrize("value_heads", [2, 1])
@on_forms
def test_flops_are_counted_forward_and_backward(name: str, value_heads: int) -> None:
    call = make(
        Case(
            name,
            batch=3,
            heads=(4, 2),
            lengths=(8, 8),
            dims=(16, 24),
            band=1 if name == "segment_cross" else 3,
            value_heads=value_heads,
        )
    )
    pairs = 3 * 4 * PAIRS[name]
    forward, backward = 2 * pairs * (16 + 24), 2 * pairs * (3 * 16 + 2 * 24)
    counter = FlopCounterMode(display=False)
    with counter:
        run(call.form.op, call)
    assert counter.get_total_flops() == forward
    with counter:
        run(call.form.op, call, cotangents(call))
    assert counter.get_total_flops() == forward + backward
    assert counter.get_flop_counts()["Global"] == {
        getattr(OPS, name): forward,
        OPS.attention_backward: backward,
    }
    with counter:
        OPS.grouped_attention(*grouped_arguments(call))
    assert counter.get_total_flops() == forward


def test_flops_of_new_queries_count_the_cached_keys_too() -> None:
    call = make(Case("full_self", batch=1, heads=(1, 1), lengths=(2, 8), dims=(16, 16), q_start=True))
    counter = FlopCounterMode(display=False)
    with counter:
        run(call.form.op, call)
    assert counter.get_total_flops() == 2 * (7 + 8) * 32


COUNT = """
q = torch.randn(1, 2, 8, 16)
with FlopCounterMode(display=False) as counter:
    torch.ops.lowered_attn.full_self(q, q, q)
assert counter.get_total_flops() == 2 * 36 * 2 * 32, counter.get_total_flops()
"""
COUNTER = "import torch\nfrom torch.utils.flop_counter import FlopCounterMode\n"
LAZY = """
import sys
loaded = {"triton", "torch.utils.flop_counter", "torch._inductor.compile_fx"} & set(sys.modules)
assert not loaded, loaded
"""
CALL = "q = torch.randn(1, 2, 8, 16)\ntorch.ops.lowered_attn.full_self(q, q, q)\n"
SCRIPTS = {
    "custom_ops-is-light": f"import custom_ops\n{LAZY}",
    "lowered_attn-is-light": f"import lowered_attn\n{LAZY}",
    "a-call-is-light": f"import torch, custom_ops\n{CALL}{LAZY}",
    "counter-first": f"{COUNTER}import custom_ops\n{COUNT}",
    "counter-last": f"import custom_ops\n{COUNTER}{COUNT}",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_in_a_fresh_process(script: str, pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- tracing


def compiled(attend: Callable[..., Any], **keywords: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(attend, fullgraph=True, **keywords)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "some", "q_start": True, "heads": (7, 1)},
        {"scale": 0.3},
        {"softcap": 2.0, "padding": "some"},
        {"heads": (4, 4), "value_heads": 1, "dims": (16, 40)},
    ],
    ids=str,
)
@on_forms
def test_a_traced_step_gives_what_eager_gives(name: str, settings: dict[str, Any], dynamic: bool) -> None:
    call = make(Case(name, **settings))

    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = call.form.op(q, k, v, **arguments)
        return out * 2, lse

    grads = cotangents(call)
    expected = run(attend, call, grads)
    for a, b in zip(run(compiled(attend, backend="aot_eager", dynamic=dynamic), call, grads), expected, strict=True):
        assert torch.equal(a, b)


@on_forms
def test_dynamic_shapes_compile_once(name: str) -> None:
    form = FORMS[name]
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(lambda *qkv, **operands: form.op(*qkv, **operands), backend=counter, dynamic=True)
    # Sizes that are equal the first time are compiled as one: no batch or length is a head count or a head dim there.
    for length, batch in ((5, 3), (37, 2), (40, 3), (64, 4), (131, 5)):
        call = make(Case(name, lengths=(length, length), batch=batch, padding="some", q_start=True))
        for a, b in zip(step(*call.qkv, **call.operands), form.op(*call.qkv, **call.operands), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_autocast_and_a_changing_scale_and_cap_trace() -> None:
    call = make(Case("full_self"))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return call.form.op(q, k, v, scale=scale, softcap=scale)

    traced = compiled(attend, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        for a, b in zip(traced(*call.qkv, scale), attend(*call.qkv, scale), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_traced_module_exports() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return OPS.sliding_self(q, k, v, 5)[0]

    call = make(Case("sliding_self"))
    program = torch.export.export(Attend(), call.qkv)
    assert OPS.sliding_self.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*call.qkv), Attend()(*call.qkv))
