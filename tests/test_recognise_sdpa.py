"""``scaled_dot_product_attention`` as users write it becomes a form's op; what only looks like it is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_passes import decisions
from inductor_passes.graph_pass import Chain, source_hash
from inductor_passes.pretend_gpu import generate, pretend_gpu
from inductor_passes.recognise import Recognise
from lowered_attn import AttentionConfig, explain, make_full_self_block
from tests.recognising import (
    Function,
    check_recognised,
    qkv,
    recognised,
    repeat_kv,
    triangle,
)

SDPA = F.scaled_dot_product_attention
INF = float("-inf")


# ------------------------------------------------------------------ recognised


def _llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As ``sdpa_attention_forward`` of transformers has it."""
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    out = SDPA(q, k, v, attn_mask=None, dropout_p=0.0, scale=q.shape[-1] ** -0.5, is_causal=q.shape[2] > 1)
    return out.transpose(1, 2).contiguous()


CAUSAL: dict[str, Function] = {
    "is_causal and enable_gqa": lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True),
    "positional": lambda q, k, v: SDPA(q, k, v, None, 0.0, True, enable_gqa=True),
    "torch._C._nn": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "scale": lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True, scale=0.3),
    "integer scale": lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True, scale=1),
    "scale before": lambda q, k, v: SDPA(q * 0.5, k, v, is_causal=True, enable_gqa=True, scale=1.0),
    "scale before and again": lambda q, k, v: SDPA(q / math.sqrt(8), k, v, is_causal=True, enable_gqa=True),
    "mask": lambda q, k, v: SDPA(q, k, v, attn_mask=triangle(6), enable_gqa=True),
    "llama": _llama,
}

REPEATED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": lambda x: repeat_kv(x, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave function": lambda x: torch.repeat_interleave(x, repeats=2, dim=-3),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeat": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(2, 4, 6, 8),
    "token-major": lambda x: x.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
    "token-major reshape": lambda x: x.transpose(1, 2)[:, :, :, None].expand(2, 6, 2, 2, 8).reshape(2, 6, 4, 8).permute(
        0, 2, 1, 3),
    "contiguous": lambda x: repeat_kv(x.contiguous(), 2).contiguous(),
}  # fmt: skip


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_attention(spelling: str) -> None:
    outcome = check_recognised(CAUSAL[spelling], *qkv())
    assert outcome.calls[0].tensors[1].shape[1] == 2


@pytest.mark.parametrize("repeated", REPEATED)
def test_repeated_heads_are_read_once(repeated: str) -> None:
    repeat = REPEATED[repeated]
    outcome = check_recognised(lambda q, k, v: SDPA(q, repeat(k), repeat(v), is_causal=True), *qkv())
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 2, 2]
    for name in ("repeat_interleave", "expand", "repeat", "reshape"):
        assert outcome.count(name) == 0, outcome.graphs


def test_one_head_for_all() -> None:
    expanded = lambda q, k, v: SDPA(q, k.expand(2, 4, 6, 8), v.repeat(1, 4, 1, 1), is_causal=True)  # noqa: E731
    outcome = check_recognised(expanded, *qkv(heads=(4, 1)))
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 1, 1]


def test_repeated_twice() -> None:
    twice = lambda q, k, v: SDPA(q, *(repeat_kv(repeat_kv(t, 2), 2) for t in (k, v)), is_causal=True)  # noqa: E731
    outcome = check_recognised(twice, *qkv(heads=(8, 2)))
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [8, 2, 2]


def test_a_repetition_below_enable_gqa() -> None:
    both = lambda q, k, v: SDPA(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True, enable_gqa=True)  # noqa: E731
    outcome = check_recognised(both, *qkv(heads=(8, 2)))
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [8, 2, 2]


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (1, 7)])
def test_is_causal_starts_at_the_top_left(lengths: tuple[int, int]) -> None:
    """Torch's meaning: query 0 sees key 0 alone. A decoding step with is_causal sees one key, and so do we."""
    outcome = check_recognised(lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True), *qkv(lengths=lengths))
    assert torch.equal(outcome.calls[0].keywords["q_start"], torch.zeros(2, dtype=torch.int32))


def test_no_mask_is_bidirectional() -> None:
    for lengths in ((6, 6), (3, 7)):
        unmasked = lambda q, k, v: SDPA(q, k, v, enable_gqa=True)  # noqa: E731
        check_recognised(unmasked, *qkv(lengths=lengths), forms=("bidirectional",))


def test_padding_of_queries_that_see_all() -> None:
    keep = torch.rand(2, 6) < 0.7
    keep[:, 0] = True
    padded = lambda q, k, v, keep: SDPA(q, k, v, keep[:, None, None], enable_gqa=True)  # noqa: E731
    check_recognised(padded, *qkv(), keep, forms=("bidirectional",))


def test_values_of_another_width() -> None:
    q, k, v = qkv(heads=(4, 4))
    check_recognised(lambda q, k, v: SDPA(q, k, v, is_causal=True), q, k, torch.cat([v, v], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    outcome = recognised(CAUSAL["is_causal and enable_gqa"], q, k, v)
    assert [d.op for d in outcome.of_stage("recognised")] == ["full_self"]
    expected = CAUSAL["is_causal and enable_gqa"](q.double(), k.double(), v.double())
    error = (outcome.result.double() - expected).abs().max()
    assert outcome.result.dtype == dtype
    assert error <= 2 * (CAUSAL["is_causal and enable_gqa"](q, k, v).double() - expected).abs().max() + 1e-12


def test_under_autocast() -> None:
    def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return SDPA(q, k.bfloat16(), v, is_causal=True, enable_gqa=True)

    arguments = qkv()
    outcome = recognised(cast, *arguments)
    assert [d.op for d in outcome.of_stage("recognised")] == ["full_self"]
    assert outcome.result.dtype == torch.bfloat16
    torch.testing.assert_close(outcome.result, cast(*arguments), rtol=2e-2, atol=2e-2)


def test_a_view_that_only_the_users_layout_allows() -> None:
    """Torch lays the output out like q, ours is token-major: ``view`` of it must not fail."""
    for view in (lambda out: out.view(2, -1), lambda out: out[:1].view(-1), lambda out: out.mT.mT.view(8, -1),
                 lambda out: out.split(2, dim=1)[0].view(2, -1)):
        check_recognised(lambda q, k, v: view(SDPA(q, k, v, is_causal=True)), *qkv(heads=(4, 4)))  # noqa: B023
    merged = lambda q, k, v: SDPA(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 6, -1)  # noqa: E731
    outcome = check_recognised(merged, *qkv(heads=(4, 4)))
    assert outcome.count("contiguous") == 0


def test_a_static_cache_written_in_the_step() -> None:
    """Decoding: the step writes its key and value, then repeats and reads the whole cache."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        mask = at[:, None] >= torch.arange(keys.shape[2])
        return SDPA(q, repeat_kv(keys, 2), repeat_kv(values, 2), attn_mask=mask)

    q, k, v = qkv(lengths=(1, 1))
    caches = [torch.randn(2, 2, 16, 8) for _ in "kv"]
    at = torch.tensor([5])
    expected = step(q, k, v, *(c.clone() for c in caches), at)
    outcome = recognised(step, q, k, v, *caches, at)
    assert [d.op for d in outcome.of_stage("recognised")] == ["full_self"]
    assert outcome.calls[0].tensors[1].shape[1] == 2
    torch.testing.assert_close(outcome.result, expected)


def test_a_cache_written_after_it_was_repeated() -> None:
    """What was repeated is older than the cache is now: the repetition stays."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        repeated = repeat_kv(keys, 2)
        keys.zero_()
        return SDPA(q, repeated, repeat_kv(v, 2), is_causal=True)

    q, k, v = qkv()
    expected = step(q, k, v, k.clone())
    outcome = recognised(step, q, k, v, k.clone())
    torch.testing.assert_close(outcome.result, expected)
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 4, 2]


def test_repeated_heads_that_are_written_to() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        k.mul_(1.5)
        v[:, 1] = 0
        return SDPA(q, k, v, is_causal=True)

    outcome = check_recognised(written, *qkv())
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 4, 4]


def test_attention_that_reads_attention() -> None:
    def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = SDPA(q, k, v, is_causal=True)
        halves = (one[:, :2].contiguous(), one[:, ::2])
        two = SDPA(one, *(half.repeat_interleave(2, 1) for half in halves), is_causal=True)
        return SDPA(two, one, two.clone().to(one.dtype), attn_mask=triangle(6) & (two[:, 0, :, 0] < 9)[:, None, None])

    outcome = check_recognised(chain, *qkv(heads=(4, 4)), forms=("full_self",) * 3)
    assert [c.tensors[1].shape[1] for c in outcome.calls] == [4, 2, 4]


def test_inside_a_checkpoint() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inner = lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(inner, q, k, v, use_reentrant=False)

    arguments = qkv(requires_grad=True)
    with decisions.recording() as log:
        out = torch.compile(layer, backend="lowered_attn", fullgraph=True)(*arguments)
    assert [d.op for d in log.records if d.stage == "recognised"] == ["full_self"]
    _check_gradients(layer, out, arguments)


def _check_gradients(function: Function, out: Tensor, arguments: tuple[Tensor, ...]) -> None:
    expected = function(*arguments)
    seen = torch.randn_like(expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad((t * seen).sum(), arguments) for t in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ through the backend


class Layer(nn.Module):
    """Attention as models write it: a cache-free layer with grouped heads and a sliding window."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)
        self.window = window

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split([32, 16, 16], dim=-1)
        q, k, v = (t.view(batch, length, -1, 8).transpose(1, 2) for t in (q, k, v))
        at = torch.arange(length, device=x.device)
        mask = at[None, :] <= at[:, None]
        if self.window is not None:
            mask = mask & (at[:, None] - at < self.window)
        if keep is not None:
            mask = mask & keep[:, None, None, :]
        out = SDPA(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("window", [None, 4])
def test_training_a_layer(window: int | None) -> None:
    layer = Layer(window)
    x = torch.randn(2, 12, 32, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="lowered_attn", fullgraph=True)
    parameters = (x, *layer.parameters())
    ours = torch.autograd.grad(compiled(x).square().sum(), parameters)
    theirs = torch.autograd.grad(layer(x).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    said = explain(layer, x)
    assert [d.op for d in said.of_stage("recognised")] == ["full_self" if window is None else "sliding_self"]
    assert not said.of_stage("refused") and not said.graph_breaks
    assert "k repeated 2 times" in str(said)


def test_one_graph_serves_every_length() -> None:
    layer = Layer(4)
    compiles = 0

    def counting(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        from inductor_passes import compile_with_passes

        return compile_with_passes(gm, example_inputs, options={"force_disable_caches": True})

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=counting, dynamic=True, fullgraph=True)
    with decisions.recording() as log, torch.no_grad():
        for batch, length in ((2, 9), (3, 17), (4, 5)):
            x, keep = torch.randn(batch, length, 32), torch.rand(batch, length) < 0.8
            keep[:, ::2] = True
            torch.testing.assert_close(compiled(x, keep), layer(x, keep), rtol=1e-4, atol=1e-5)
    assert compiles == 1
    assert [d.op for d in log.records if d.stage == "recognised"] == ["sliding_self"]


def test_the_option_turns_it_off() -> None:
    arguments = qkv()
    function = CAUSAL["is_causal and enable_gqa"]
    torch.compiler.reset()
    with decisions.recording() as log:
        options = {"recognise": False, "force_disable_caches": True}
        out = torch.compile(function, backend="lowered_attn", options=options)(*arguments)
    torch.testing.assert_close(out, function(*arguments))
    assert {d.stage for d in log.records} == {"refused"}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_backend_that_was_asked_for_runs(backend: str) -> None:
    block = make_full_self_block(dim=32, num_heads=4, cfg=AttentionConfig(backend=backend))
    x = torch.randn(2, 9, 32)
    said = explain(block, x)
    assert not said.of_stage("recognised") and not said.of_stage("grouped")
    if backend == "sdpa":
        assert ["backend='sdpa' was asked for" in d.detail for d in said.of_stage("refused")] == [True]


@pytest.mark.slow
def test_a_layer_is_one_attention_kernel_on_a_gpu() -> None:
    """No mask tensor and no repeated heads are left: what attention reads are the layer's own q, k and v."""
    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            q, k, v = (
                torch.empty(2, heads, 128, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2)
            )

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            at = torch.arange(q.shape[2], device=q.device)
            mask = (at[:, None] >= at) & (at[:, None] - at < 32)
            return SDPA(q, repeat_kv(k, 4), repeat_kv(v, 4), attn_mask=mask)

        made = generate(attention, q, k, v)
    assert len(made.kernels) == 1
    assert "sliding_self" in made.wrapper and "scaled_dot_product" not in made.wrapper


def test_the_pass_is_part_of_inductors_key() -> None:
    (key,) = Chain(after=(Recognise(),)).uuid()  # type: ignore[misc]
    assert key.startswith("Recognise:") and source_hash() in key


def test_explain_counts_each_call_once() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return SDPA(q, k, v, is_causal=True) + SDPA(q, k, v, attn_mask=bias)

    said = explain(two, *qkv(heads=(4, 4)), torch.randn(6, 6))
    assert [d.op for d in said.of_stage("recognised")] == ["full_self"]
    assert [d.op for d in said.of_stage("refused")] == ["scaled_dot_product_attention"]
    assert [name for name, _, _ in said.graphs][0] == "Recognise"
