"""The regular blocks: formulas spelled out, padding, locality, positions, gradients, refusals, tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import silu

from lowered_attn.backends import BACKENDS
from lowered_attn.forms.regular.full_self import FullSelf
from lowered_attn.forms.regular.segment_cross import SegmentCross
from lowered_attn.forms.regular.sliding_self import SlidingSelf
from lowered_attn.layers import apply_rope

WIDTH, HEADS, WINDOW = 32, 4, 5
SelfBlock = Callable[..., nn.Module]
SELF_BLOCKS: dict[str, SelfBlock] = {
    "full": lambda **kw: FullSelf(WIDTH, HEADS, 2, **kw),
    "sliding": lambda **kw: SlidingSelf(WIDTH, HEADS, WINDOW, 2, **kw),
}
on_self_blocks = pytest.mark.parametrize("name", SELF_BLOCKS)


def rotate(x: Tensor, position: int, base: float = 10000.0) -> Tensor:
    """RoPE of one fp64 head vector [D] by complex multiplication."""
    half = x.shape[0] // 2
    turns = torch.tensor([position * base ** (-2 * i / x.shape[0]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(turns), turns)
    return torch.cat((turned.real, turned.imag))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm spelled out."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend_slowly(
    q: Tensor, k: Tensor, v: Tensor, visible: Callable[[int, int, int], bool], heads: int, kv_heads: int
) -> Tensor:
    """Attention over merged heads, q [B, Lq, H * D], k and v [B, Lk, Hkv * D], a query and a head at a time."""
    batch, queries, width = q.shape
    dim = width // heads
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(queries):
            seen = [j for j in range(k.shape[1]) if visible(b, i, j)]
            for h in range(heads):
                own, shared = slice(h * dim, (h + 1) * dim), h // (heads // kv_heads)
                group = slice(shared * dim, (shared + 1) * dim)
                if seen:
                    weights = (k[b, seen, group] @ q[b, i, own] / math.sqrt(dim)).softmax(0)
                    out[b, i, own] = weights @ v[b, seen, group]
    return out


def rotate_heads(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """RoPE of merged heads [B, S, H * D] at positions [B, S], vector by vector."""
    out = torch.empty_like(x)
    for b, i in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        out[b, i] = torch.cat([rotate(head, int(positions[b, i])) for head in x[b, i].split(dim)])
    return out


def padding(batch: int, length: int, hidden: list[tuple[int, int]]) -> Tensor:
    """bool [batch, length], True at the (request, key) pairs of `hidden`."""
    out = torch.zeros(batch, length, dtype=torch.bool)
    for b, i in hidden:
        out[b, i] = True
    return out


# -------------------------------------------------------------------------------- RoPE


def test_rope_is_complex_rotation_at_each_position() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2], [7, 100, 5]])
    expected = torch.stack(
        [
            torch.stack([torch.stack([rotate(x[b, i, h], int(positions[b, i])) for h in range(2)]) for i in range(3)])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(apply_rope(x, positions), expected)
    torch.testing.assert_close(apply_rope(x, positions[0])[0], expected[0])


def test_rope_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        return float((apply_rope(q, torch.tensor([query_at])) * apply_rope(k, torch.tensor([key_at]))).sum())

    assert score(9, 4) == pytest.approx(score(1005, 1000), rel=1e-9)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_rope_of_a_bf16_tensor_rounds_only_the_result() -> None:
    # In bf16 the angle of position 4001 would be off by up to 8 radians.
    x = torch.randn(1, 1, 2, 16).bfloat16()
    positions = torch.tensor([4001])
    torch.testing.assert_close(
        apply_rope(x, positions), apply_rope(x.double(), positions).bfloat16(), rtol=0.01, atol=0.01
    )


# -------------------------------------------------------------------------------- self blocks


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2], ids=["mha", "gqa"])
@on_self_blocks
def test_a_self_block_is_its_formula(name: str, kv_heads: int, padded: bool) -> None:
    block = SELF_BLOCKS[name](n_kv_heads=kv_heads).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    hidden = padding(2, 11, [(0, 0), (0, 1), (1, 6)]) if padded else None
    window = WINDOW if name == "sliding" else 11
    p = {n.removesuffix(".weight"): w.detach() for n, w in block.named_parameters()}

    def visible(b: int, i: int, j: int) -> bool:
        return i - window < j <= i and not (padded and bool(hidden[b, j]))

    normed = norm(x, p["attention_norm"])
    positions = torch.arange(11).expand(2, 11)
    q, k = (rotate_heads(normed @ p[f"attention.{n}_proj"].T, positions, WIDTH // HEADS) for n in "qk")
    attended = attend_slowly(q, k, normed @ p["attention.v_proj"].T, visible, HEADS, kv_heads)
    expected = x + attended @ p["attention.o_proj"].T
    normed = norm(expected, p["ffn_norm"])
    expected = expected + (silu(normed @ p["ffn.gate_proj"].T) * (normed @ p["ffn.up_proj"].T)) @ p["ffn.down_proj"].T
    torch.testing.assert_close(block(x, key_padding=hidden), expected)


@on_self_blocks
def test_a_token_reaches_exactly_the_tokens_that_see_it(name: str) -> None:
    block = SELF_BLOCKS[name]()
    x = torch.randn(1, 17, WIDTH)
    changed = x.clone()
    changed[0, 6] += 1
    moved = (block(x) != block(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == (list(range(6, 17)) if name == "full" else list(range(6, 6 + WINDOW)))


@on_self_blocks
def test_a_padded_token_reaches_no_other_and_a_blind_one_keeps_its_residual(name: str) -> None:
    block = SELF_BLOCKS[name]()
    x = torch.randn(2, 9, WIDTH)
    hidden = padding(2, 9, [(0, 0), (0, 1), (1, 4)])
    changed = torch.where(hidden[..., None], x + 1, x)
    out = block(x, key_padding=hidden)
    torch.testing.assert_close(block(changed, key_padding=hidden)[~hidden], out[~hidden], rtol=0, atol=0)
    blind = x[0, :2]
    torch.testing.assert_close(out[0, :2], blind + block.ffn(block.ffn_norm(blind)))
    assert not torch.allclose(block(changed)[~hidden], block(x)[~hidden])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "flex")])
@pytest.mark.parametrize("name", [*SELF_BLOCKS, "cross"])
def test_backends_agree_on_outputs_and_all_gradients_of_a_block(name: str, backend: str) -> None:
    def results(which: str) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 13, WIDTH, dtype=torch.float64, requires_grad=True)
        if name == "cross":
            block: nn.Module = SegmentCross(WIDTH, 24, 32, HEADS, 1, which, n_kv_heads=2).double()
            kv = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
            out = block(x, kv, query_segments=segments(13, 5), key_padding=padding(2, 5, [(0, 0), (1, 3)]))
            leaves = [x, kv]
        else:
            block = SELF_BLOCKS[name](n_kv_heads=2, backend=which).double()
            out = block(x, key_padding=padding(2, 13, [(0, 0), (1, 3)]))
            leaves = [x]
        return [out, *torch.autograd.grad(out, [*leaves, *block.parameters()], torch.randn_like(out))]

    for a, b in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


@on_self_blocks
def test_flex_agrees_without_gradients(name: str) -> None:
    flex, reference = SELF_BLOCKS[name](backend="flex"), SELF_BLOCKS[name](backend="reference")
    reference.load_state_dict(flex.state_dict())
    x = torch.randn(2, 13, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(flex(x), reference(x))


@on_self_blocks
def test_heads_are_split_and_merged_without_a_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    run = BACKENDS["lowered"].run

    def spy(form: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        out = run(form, q, k, v, *rest)
        seen.extend((q, k, v, out))
        return out

    monkeypatch.setattr(BACKENDS["lowered"], "run", spy)
    SELF_BLOCKS[name](n_kv_heads=2)(torch.randn(2, 9, WIDTH))
    assert len(seen) == 4
    assert all(t.transpose(1, 2).is_contiguous() for t in seen)


@on_self_blocks
def test_a_bf16_block_keeps_its_dtype(name: str) -> None:
    block = SELF_BLOCKS[name]().bfloat16()
    out = block(torch.randn(1, 7, WIDTH).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


# -------------------------------------------------------------------------------- cross


def segments(queries: int, count: int) -> Tensor:
    """int64 [2, queries]: uneven segments in order, the second request one behind the first."""
    index = torch.arange(queries).mul(count).div(queries, rounding_mode="floor")
    return torch.stack((index, (index - 1).clamp(min=0)))


@pytest.mark.parametrize("with_rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("lookback", [0, 2])
def test_segment_cross_is_its_formula(lookback: int, with_rope: bool) -> None:
    cross = SegmentCross(WIDTH, 24, 48, 6, lookback, n_kv_heads=3).double()
    with torch.no_grad():
        for parameter in cross.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    q = torch.randn(2, 13, WIDTH, dtype=torch.float64)
    kv = torch.randn(2, 5, 24, dtype=torch.float64)
    owner, hidden, padded = (
        segments(13, 5),
        padding(2, 5, [(0, 0), (1, 3)]),
        padding(2, 13, [(1, 12), (1, 4)]),
    )
    at = {"query_positions": owner * 7 + 3, "key_positions": torch.arange(5).mul(7).expand(2, 5)} if with_rope else {}
    p = {n.removesuffix(".weight"): w.detach() for n, w in cross.named_parameters()}

    def visible(b: int, i: int, j: int) -> bool:
        return int(owner[b, i]) - lookback <= j <= int(owner[b, i]) and not bool(hidden[b, j])

    queries = norm(q, p["q_norm"]) @ p["attention.q_proj"].T
    keys, values = (norm(kv, p["kv_norm"]) @ p[f"attention.{n}_proj"].T for n in "kv")
    if with_rope:
        queries = rotate_heads(queries, at["query_positions"], 8)
        keys = rotate_heads(keys, at["key_positions"], 8)
    expected = attend_slowly(queries, keys, values, visible, 6, 3) @ p["attention.o_proj"].T
    expected[padded] = 0
    out = cross(q, kv, query_segments=owner, key_padding=hidden, query_padding=padded, **at)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["lowered", "sdpa", "reference"])
def test_what_a_padded_query_holds_reaches_no_output_and_no_gradient(backend: str) -> None:
    cross = SegmentCross(WIDTH, 24, 32, HEADS, 1, backend)
    clean, kv = torch.randn(2, 13, WIDTH), torch.randn(2, 5, 24)
    padded = padding(2, 13, [(0, 12), (0, 11), (1, 0)])
    poisoned = clean.masked_fill(padded[..., None], float("nan"))

    def results(q: Tensor) -> list[Tensor]:
        q = q.clone().requires_grad_()
        out = cross(q, kv, query_segments=segments(13, 5), query_padding=padded)
        return [out, *torch.autograd.grad(out.sum(), [q, *cross.parameters()])]

    out, dq, *weights = results(poisoned)
    assert torch.count_nonzero(out[padded]) == torch.count_nonzero(dq[padded]) == 0
    assert (out[~padded] != 0).all()
    for a, b in zip([out, dq, *weights], results(clean), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FullSelf(30, 4), ["d_model", "multiple of n_heads = 4", "got 30", "head_dim"]),
        (lambda: FullSelf(20, 4), ["head_dim", "even", "got 5"]),
        (lambda: FullSelf(32, 4, head_dim=7), ["head_dim", "even", "got 7"]),
        (lambda: FullSelf(32, 4, n_kv_heads=3), ["n_kv_heads", "divisor of n_heads = 4", "got 3"]),
        (lambda: FullSelf(32, 0), ["n_heads", "at least 1", "got 0"]),
        (lambda: FullSelf(32, 4, 0), ["ffn_dim_multiplier", "at least 1"]),
        (lambda: FullSelf(32, 4, backend="fast"), ["backend", "'lowered'", "'fast'"]),
        (lambda: SlidingSelf(32, 4, 0), ["window_size", "at least 1", "got 0"]),
        (lambda: SlidingSelf(32, 4, 2.5), ["window_size", "int", "2.5"]),
        (lambda: SegmentCross(32, 24, 30, 4), ["d_attn", "multiple of n_heads = 4", "got 30"]),
        (lambda: SegmentCross(32, 24, 32, 4, -1), ["lookback", "at least 0", "got -1"]),
        (lambda: SegmentCross(32, 24, 32, 4, head_dim=16), ["head_dim", "d_attn // n_heads = 8", "got 16"]),
    ],
)
def test_a_bad_size_is_refused_when_the_module_is_built(build: Callable[[], nn.Module], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build()
    for word in words:
        assert word in str(error.value)


def call_cross(**changes: Any) -> Tensor:
    """Call a small SegmentCross with one argument changed."""
    arguments = {
        "q": torch.randn(2, 7, 32),
        "kv": torch.randn(2, 3, 24),
        "query_segments": segments(7, 3),
        **changes,
    }
    return SegmentCross(32, 24, 32, 4)(arguments.pop("q"), arguments.pop("kv"), **arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FullSelf(32, 4)(torch.randn(2, 7, 24)), ["x", "d_model = 32", "[2, 7, 24]"]),
        (lambda: FullSelf(32, 4)(torch.randn(7, 32)), ["x", "[B, S, d_model]", "[7, 32]"]),
        (
            lambda: FullSelf(32, 4)(torch.randn(2, 7, 32), key_padding=torch.zeros(2, 6, dtype=torch.bool)),
            ["key_padding", "[2, 7]", "[2, 6]"],
        ),
        (lambda: call_cross(q=torch.randn(2, 7, 24)), ["q", "q_dim = 32", "[2, 7, 24]"]),
        (lambda: call_cross(kv=torch.randn(2, 3, 32)), ["kv", "kv_dim = 24", "[2, 3, 32]"]),
        (lambda: call_cross(query_segments=segments(6, 3)), ["query_segments", "[2, 7]", "[2, 6]"]),
        (
            lambda: call_cross(query_positions=segments(7, 3)),
            ["key_positions", "query_positions is given", "got None", "pass both"],
        ),
        (
            lambda: call_cross(key_positions=segments(3, 3)),
            ["query_positions", "key_positions is given", "got None", "pass both"],
        ),
        (
            lambda: call_cross(query_positions=segments(7, 3), key_positions=torch.arange(3)),
            ["key_positions", "[2, 3]", "[3]", "no broadcast"],
        ),
        (
            lambda: call_cross(query_padding=torch.zeros(1, 7, dtype=torch.bool)),
            ["query_padding", "[2, 7]", "[1, 7]"],
        ),
    ],
)
def test_a_bad_input_is_refused_when_the_module_is_called(call: Callable[[], Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    for word in ["expected", *words]:
        assert word in str(error.value)


# -------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", [*SELF_BLOCKS, "cross"])
def test_a_block_compiles_once_for_every_length(name: str) -> None:
    torch._dynamo.reset()
    block: nn.Module = SegmentCross(WIDTH, 24, 32, HEADS, 1) if name == "cross" else SELF_BLOCKS[name]()
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for length in (13, 21, 8):
        x = torch.randn(2, length, WIDTH, requires_grad=True)
        kv = (torch.randn(2, 5, 24),) if name == "cross" else ()
        options = (
            {"query_segments": segments(length, 5)}
            if name == "cross"
            else {"key_padding": padding(2, length, [(0, 3)])}
        )
        expected, out = block(x, *kv, **options), compiled(x, *kv, **options)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            *(torch.autograd.grad(o.square().sum(), [x, *block.parameters()]) for o in (out, expected)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
