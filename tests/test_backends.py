"""Every backend computes every form: outputs and gradients against an fp64 oracle, refusals, tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import sympy
import torch
from torch import Tensor

from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.masks import Mask
from custom_ops.reference import reference_attention
from lowered_attn import UnsupportedBackendError
from lowered_attn.backends import BACKENDS, get_backend, run_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH = 2
# Where a query sees one key, dq and dk are differences of equal numbers and the oracle is exactly 0. What
# fp32 leaves is its epsilon times |dO . V| * |k|, at most about 1.2e-7 * 20 * 4 on these inputs.
CANCELLATION = 1e-5


@pytest.fixture(autouse=True)
def static_shapes() -> None:
    """Each case compiles afresh, with static shapes: flex's lowering fails on some dynamic ones (torch 2.11, CUDA)."""
    if torch.cuda.is_available():
        torch.compiler.reset()


def pad_first(length: int) -> Tensor:
    """Padding that hides the first three keys of request 0, so that its first queries see nothing."""
    padding = torch.zeros(BATCH, length, dtype=torch.bool)
    padding[0, :3] = True
    return padding


def pad_hole(length: int) -> Tensor:
    """Padding that hides eight keys in the middle of request 1: wider than the windows here."""
    padding = torch.zeros(BATCH, length, dtype=torch.bool)
    padding[1, 10:18] = True
    return padding


def ragged_segments(queries: int, segments: int) -> Tensor:
    """Segments of uneven length, in order; one query before the first segment and one far past the last."""
    index = torch.arange(queries).mul(segments).div(queries, rounding_mode="floor").expand(BATCH, -1).clone()
    index[1] = index[1].sub(1).clamp(min=0)
    index[0, 0], index[1, -1] = -1, segments + 5
    return index


def packed(queries: int, keys: int) -> dict[str, Tensor | int | None]:
    """Documents of ten tokens, in order; those of request 1 are numbered past 32 bits. The last query has no keys."""
    ids = [(torch.arange(n) // 10 % 2)[None] + torch.tensor([[0], [2**40]]) for n in (queries, keys)]
    ids[0][:, -1] = 2**33
    return {"query_documents": ids[0], "key_documents": ids[1]}


@dataclass(frozen=True)
class Case:
    """A call of a form. Sizes are small and odd; operands are made at run time, on the CPU."""

    id: str
    form: str
    operands: Callable[[], dict[str, Tensor | int | None]]
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (37, 37)
    dims: tuple[int, int] = (16, 16)
    blind_rows: list[tuple[int, int]] = field(default_factory=list)
    """(request, query) pairs that see nothing."""
    scale: float | None = None
    value_heads: int | None = None
    """Heads of v, where KV heads share them."""


CASES = [
    Case("full", "full_self", dict),
    Case("full-mha-scale", "full_self", dict, heads=(3, 3), scale=0.4),
    Case(
        "full-padded",
        "full_self",
        lambda: {"key_padding": pad_first(37)},
        blind_rows=[(0, 0), (0, 1), (0, 2)],
    ),
    Case(
        "full-q_start",
        "full_self",
        # Longer than flex's blocks of 128, and the requests see different blocks.
        lambda: {"q_start": torch.tensor([3, 290], dtype=torch.int32)},
        lengths=(5, 301),
    ),
    Case("full-one-token", "full_self", dict, lengths=(1, 1)),
    Case("sliding-scale", "sliding_self", lambda: {"window": 5}, heads=(6, 2), scale=0.4),
    Case(
        "sliding-padded",
        "sliding_self",
        lambda: {"window": 5, "key_padding": pad_hole(37)},
        blind_rows=[(1, 14), (1, 15), (1, 16), (1, 17)],
    ),
    Case(
        "cross",
        "segment_cross",
        lambda: {"query_segments": ragged_segments(37, 11), "lookback": 2},
        lengths=(37, 11),
        blind_rows=[(0, 0), (1, 36)],
    ),
    Case(
        "cross-padded-values-wider",
        "segment_cross",
        lambda: {"query_segments": ragged_segments(37, 11), "lookback": 0, "key_padding": pad_first(11)},
        lengths=(37, 11),
        dims=(16, 24),
        blind_rows=[(0, i) for i in range(11)] + [(1, 36)],
    ),
    Case("bidirectional", "bidirectional", dict, lengths=(37, 11)),
    Case(
        "bidirectional-padded",
        "bidirectional",
        lambda: {"key_padding": torch.tensor([[True] * 37, [False] * 5 + [True] * 32])},
        blind_rows=[(0, i) for i in range(37)],
    ),
    Case("document", "document", lambda: packed(37, 21), lengths=(37, 21), blind_rows=[(0, 36), (1, 36)]),
    Case("document-causal", "document_causal", lambda: packed(37, 37), blind_rows=[(0, 36), (1, 36)]),
    Case(
        "prefix-padded",
        "prefix_lm",
        lambda: {"prefix_lens": torch.tensor([2, 11], dtype=torch.int32), "key_padding": pad_first(37)},
        blind_rows=[(0, 0), (0, 1), (0, 2)],
    ),
    Case("full-shared-values", "full_self", dict, heads=(4, 4), value_heads=1, dims=(16, 48)),
    Case(
        "sliding-shared-values-padded",
        "sliding_self",
        lambda: {"window": 5, "key_padding": pad_hole(37)},
        heads=(8, 4),
        value_heads=2,
        dims=(16, 24),
        blind_rows=[(1, 14), (1, 15), (1, 16), (1, 17)],
    ),
    Case(
        "cross-shared-values",
        "segment_cross",
        lambda: {"query_segments": ragged_segments(37, 11), "lookback": 2},
        heads=(3, 3),
        value_heads=1,
        lengths=(37, 11),
        dims=(16, 64),
        blind_rows=[(0, 0), (1, 36)],
    ),
]
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_devices = pytest.mark.parametrize("device", DEVICES)


def differentiable(backend: str, device: str) -> bool:
    """Whether a backward exists there: flex has none on a CPU."""
    return backend != "flex" or device != "cpu"


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Tensor | int | None]]:
    """q, k, v and the operands of `case`."""
    (q_heads, kv_heads), (queries, keys), (dim, value_dim) = case.heads, case.lengths, case.dims
    shapes = [(q_heads, queries, dim), (kv_heads, keys, dim), (case.value_heads or kv_heads, keys, value_dim)]
    tensors = [torch.randn(BATCH, *shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    operands = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in case.operands().items()}
    return tensors, operands


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Return [out, dq, dk, dv] of `attend` in the inputs' dtype."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@by_id
@on_backends
def test_outputs_and_gradients_are_as_close_to_fp64_as_the_reference(
    backend: str, case: Case, dtype: torch.dtype, device: str
) -> None:
    form = FORMS[case.form]
    inputs, operands = make_inputs(case, dtype, device)
    cotangent = torch.randn(BATCH, case.heads[0], case.lengths[0], case.dims[1], dtype=torch.float64).to(device)

    def reference(compute: torch.dtype) -> list[Tensor]:
        def attend(*qkv: Tensor) -> Tensor:
            return reference_attention(*qkv, form, operands, case.scale, compute)[0]

        return with_gradients(attend, [t.to(compute) for t in inputs], cotangent)

    # fp64 stays on the CPU: the forms refuse it on CUDA.
    def oracle() -> list[Tensor]:
        on_cpu = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in operands.items()}

        def attend(*qkv: Tensor) -> Tensor:
            return reference_attention(*qkv, form, on_cpu, case.scale, torch.float64)[0]

        return with_gradients(attend, [t.cpu().double() for t in inputs], cotangent.cpu())

    def attend(*qkv: Tensor) -> Tensor:
        return run_attention(backend, form, *qkv, operands, case.scale)

    if differentiable(backend, device):
        results = with_gradients(attend, inputs, cotangent)
    else:
        results = [attend(*inputs)]
    for name, result, exact, low in zip("out dq dk dv".split(), results, oracle(), reference(dtype), strict=False):
        assert result.dtype == dtype and result.shape == exact.shape
        floor = CANCELLATION + 4 * torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * (low.cpu().double() - exact).abs().max() + floor
        error = (result.cpu().double() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@on_devices
@pytest.mark.parametrize("case", [c for c in CASES if c.blind_rows], ids=lambda case: case.id)
@on_backends
def test_rows_that_see_nothing_are_zero_with_zero_gradients(backend: str, case: Case, device: str) -> None:
    form = FORMS[case.form]
    inputs, operands = make_inputs(case, torch.float32, device)
    with_backward = differentiable(backend, device)
    q, k, v = (t.requires_grad_(with_backward) for t in inputs)
    out = run_attention(backend, form, q, k, v, operands)
    requests, rows = zip(*case.blind_rows, strict=True)
    assert torch.count_nonzero(out[list(requests), :, list(rows)]) == 0
    seen = torch.count_nonzero(out.detach().abs().sum((1, 3)))
    assert seen == BATCH * case.lengths[0] - len(case.blind_rows)
    if not with_backward:
        return
    blind = torch.zeros_like(out)
    blind[list(requests), :, list(rows)] = 1
    for name, gradient in zip("qkv", torch.autograd.grad(out, (q, k, v), blind), strict=True):
        assert torch.count_nonzero(gradient) == 0, f"d{name}"


@on_devices
@pytest.mark.parametrize("case", [c for c in CASES if "padded" in c.id], ids=lambda case: case.id)
@on_backends
def test_nan_in_hidden_keys_reaches_nothing(backend: str, case: Case, device: str) -> None:
    form = FORMS[case.form]
    inputs, operands = make_inputs(case, torch.float32, device)
    hidden = operands["key_padding"]
    assert isinstance(hidden, Tensor)
    poisoned = [inputs[0], *(t.masked_fill(hidden[:, None, :, None], float("nan")) for t in inputs[1:])]

    def attend(*qkv: Tensor) -> Tensor:
        return run_attention(backend, form, *qkv, operands)

    if differentiable(backend, device):
        cotangent = torch.ones(BATCH, case.heads[0], case.lengths[0], case.dims[1], device=device)
        clean, dirty = (with_gradients(attend, i, cotangent) for i in (inputs, poisoned))
    else:
        clean, dirty = [attend(*inputs)], [attend(*poisoned)]
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.id in ("full", "sliding-padded", "cross", "sliding-shared-values-padded")],
    ids=lambda c: c.id,
)
@on_backends
def test_a_call_traces_as_one_graph_and_gives_the_same(backend: str, case: Case) -> None:
    form = FORMS[case.form]
    inputs, operands = make_inputs(case, torch.float32, "cpu")
    torch._dynamo.reset()

    def attend(*qkv: Tensor) -> Tensor:
        return run_attention(backend, form, *qkv, operands)

    def traced(*qkv: Tensor) -> Tensor:
        return torch.compile(attend, fullgraph=True, backend="aot_eager")(*qkv)

    if not differentiable(backend, "cpu"):
        torch.testing.assert_close(traced(*inputs), attend(*inputs))
        return
    cotangent = torch.randn_like(attend(*inputs))
    for a, b in zip(*(with_gradients(f, inputs, cotangent) for f in (traced, attend)), strict=True):
        torch.testing.assert_close(a, b)


def test_flex_under_inductor_skips_blocks_request_by_request() -> None:
    # Eager flex on a CPU applies the mask and reads no block: only a compiled one shows that the blocks are right.
    case = next(c for c in CASES if c.id == "full-q_start")
    inputs, operands = make_inputs(case, torch.float32, "cpu")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(*qkv: Tensor) -> Tensor:
        return run_attention("flex", FORMS[case.form], *qkv, operands)

    expected = run_attention("reference", FORMS[case.form], *inputs, operands)
    torch.testing.assert_close(compiled(*inputs), expected)


@on_devices
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["lowered", "flex", "reference"])
def test_a_soft_cap_caps_the_scaled_scores(backend: str, compiled: bool, device: str) -> None:
    case = next(c for c in CASES if c.id == "sliding-padded")
    inputs, operands = make_inputs(case, torch.float32, device)
    torch._dynamo.reset()

    def attend(*qkv: Tensor) -> Tensor:
        return run_attention(backend, FORMS[case.form], *qkv, operands, 0.9, 1.5)

    def capped(*qkv: Tensor) -> Tensor:
        """By torch's own operations, from the definition."""
        q, k, v = (t.repeat_interleave(case.heads[0] // t.shape[1], 1) for t in qkv)
        keys = torch.arange(37, device=device)
        distance = keys[:, None] - keys
        hidden = operands["key_padding"]
        assert isinstance(hidden, Tensor)
        visible = (distance >= 0) & (distance < 5) & ~hidden[:, None, None]
        scores = (1.5 * torch.tanh(0.9 * q @ k.mT / 1.5)).masked_fill(~visible, -1e30)
        return (scores.softmax(-1) @ v).masked_fill(~visible.any(-1, keepdim=True), 0)

    compiler = "inductor" if backend == "flex" else "lowered_attn"
    tested = torch.compile(attend, fullgraph=True, backend=compiler, dynamic=False) if compiled else attend
    if not differentiable(backend, device):
        torch.testing.assert_close(tested(*inputs), capped(*inputs))
        return
    cotangent = torch.randn_like(inputs[0])
    for a, b in zip(*(with_gradients(f, inputs, cotangent) for f in (tested, capped)), strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_refuses_a_soft_cap() -> None:
    inputs, _ = make_inputs(CASES[0], torch.float32, "cpu")
    with pytest.raises(UnsupportedBackendError, match="no soft-cap, got softcap=50. .*'lowered', 'flex', 'reference'"):
        run_attention("sdpa", FORMS["full_self"], *inputs, {}, softcap=50.0)
    run_attention("sdpa", FORMS["full_self"], *inputs, {}, softcap=0.0)


def test_sdpa_says_plain_causal_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(*_: object) -> Tensor:
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(Mask, "dense", dense)
    inputs, _ = make_inputs(CASES[0], torch.float32, "cpu")
    absent = {"key_padding": None, "q_start": None}
    assert run_attention("sdpa", FORMS["full_self"], *inputs, absent).shape == inputs[0].shape
    with pytest.raises(AssertionError, match="a dense mask was built"):
        run_attention("sdpa", FORMS["sliding_self"], *inputs, {"window": 5})


def test_sdpa_does_not_take_another_form_without_operands_for_causal() -> None:
    everything = Form(Mask("everything", sympy.true), self_attention=False)
    q, k, v = make_inputs(CASES[0], torch.float32, "cpu")[0]
    out = run_attention("sdpa", everything, q, k, v, {})
    torch.testing.assert_close(out, run_attention("reference", everything, q, k, v, {}))


@on_backends
def test_exactly_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Tensor]:
        def run(form: object, q: Tensor, *_: object) -> Tensor:
            calls.append(name)
            return q

        return run

    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "run", spy(name))
    inputs, _ = make_inputs(CASES[0], torch.float32, "cpu")
    run_attention(backend, FORMS["full_self"], *inputs, {})
    assert calls == [backend]


def test_an_unsupported_call_raises_with_reasons_alternatives_and_remedy() -> None:
    inputs, _ = make_inputs(CASES[0], torch.float32, "cpu")
    inputs[1].requires_grad_()
    with pytest.raises(UnsupportedBackendError) as error:
        run_attention("flex", FORMS["full_self"], *inputs, {})
    message = str(error.value)
    assert "backend='flex' cannot run full_self" in message
    assert "no backward on a CPU" in message
    assert "Backends that can: 'lowered', 'sdpa', 'reference'." in message
    assert "Pass backend='lowered'" in message


def test_every_reason_is_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_inputs(CASES[0], torch.float64, "cpu")
    inputs[0].requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    reasons = get_backend("flex").unsupported_reasons(FORMS["full_self"], *inputs, {})
    assert len(reasons) == 2
    assert "no backward" in reasons[0] and "torch.float64" in reasons[1]


@pytest.mark.gpu
def test_flex_refuses_small_heads_on_cuda() -> None:
    q = torch.randn(1, 2, 9, 8, device="cuda")
    with pytest.raises(UnsupportedBackendError, match="head dims of at least 16 on CUDA, got 8"):
        run_attention("flex", FORMS["full_self"], q, q, q, {})


def test_an_unknown_backend_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="expected one of 'lowered', 'sdpa', 'flex', 'reference', got 'fast'"):
        get_backend("fast")


@on_backends
def test_every_backend_refuses_what_the_form_refuses(backend: str) -> None:
    q = torch.randn(1, 2, 3, 16)
    k = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match="q_start"):
        run_attention(backend, FORMS["full_self"], q, k, k, {})
