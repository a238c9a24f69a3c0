"""One schedule for all layers that can share it: op counts, equal results, and calls that must keep their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import lowered_attn  # noqa: F401
from custom_ops.masks import k, q
from custom_ops.paged import CacheSizes, empty_caches, masks
from inductor_passes import decisions, share_schedule
from inductor_passes.share_schedule import SCHEDULE, ShareSchedule
from lowered_attn.compile import backend

OPS = torch.ops.lowered_attn
HEADS, KV_HEADS, DIM, PAGE_SIZE = 4, 2, 64, 4
LENGTHS = (torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([3, 6], dtype=torch.int32))


def schedule(lengths: tuple[Tensor, Tensor], num_tokens: Any = 5, **names: Any) -> Tensor:
    return OPS.paged_schedule(
        lengths[0], lengths[1], None, [],
        **{
            "num_tokens": num_tokens, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM,
            "page_size": PAGE_SIZE, "dtype": torch.float32, "cache_dtype": torch.float32, "direct": False, **names,
        },
    )  # fmt: skip


def shared(fn: Any, *arguments: Any, **trace: Any) -> tuple[int, int]:
    """Schedules in the graph of ``fn`` before and after the pass."""
    graph = make_fx(fn, **trace)(*arguments).graph
    before = len(graph.find_nodes(op="call_function", target=SCHEDULE))
    share = ShareSchedule()
    share(graph)
    graph.lint()
    after = len(graph.find_nodes(op="call_function", target=SCHEDULE))
    assert share.rewritten == before - after
    return before, after


def test_equal_calls_become_one() -> None:
    def three(*lengths: Tensor) -> Tensor:
        # A default that is spelled out is the same call.
        return schedule(lengths) + schedule(lengths, mode="causal") + schedule(lengths, window=0)

    assert shared(three, *LENGTHS) == (3, 1)


def test_equal_symbolic_sizes_are_one_size() -> None:
    def two(q: Tensor, k: Tensor, *lengths: Tensor) -> Tensor:
        return schedule(lengths, num_tokens=q.shape[0]) + schedule(lengths, num_tokens=k.shape[0])

    assert shared(two, torch.zeros(5, 2), torch.zeros(5, 3), *LENGTHS, tracing_mode="symbolic") == (2, 1)
    assert shared(two, torch.zeros(5, 2), torch.zeros(6, 3), *LENGTHS, tracing_mode="symbolic") == (2, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"window": 8},
        {"mode": "plain"},
        {"mode": "block_causal", "block_size": 4},
        {"direct": True},
        {"num_heads": 8},
        {"num_tokens": 6},
        {"page_size": 8},
        {"cache_dtype": torch.float8_e4m3fn},
        {"impl": "triton"},
        {"shape_class": "decode"},
        {"num_kv_heads": 1, "value_dim": 32},
    ],
    ids=lambda other: "-".join(other),
)
def test_another_argument_keeps_its_own(other: dict[str, Any]) -> None:
    def two(*lengths: Tensor) -> Tensor:
        return torch.cat([schedule(lengths), schedule(lengths, **other)])

    assert shared(two, *LENGTHS) == (2, 2)


def test_other_lengths_keep_their_own() -> None:
    """Tensors are compared by what makes them, not by what they hold."""

    def two(cu_seqlens_q: Tensor, context_lens: Tensor, others: Tensor) -> Tensor:
        return torch.cat([schedule((cu_seqlens_q, context_lens)), schedule((cu_seqlens_q, others))])

    assert shared(two, *LENGTHS, LENGTHS[1].clone()) == (2, 2)


class Layers(torch.nn.Module):
    """Attention layers over caches of their own; one of them may have a window."""

    def __init__(self, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.windows = windows
        sizes = CacheSizes(8, PAGE_SIZE, KV_HEADS, DIM)
        for i in range(2 * len(windows)):
            self.register_buffer(f"cache_{i}", torch.randn_like(empty_caches("unified", sizes, torch.float32)[0]))

    def forward(self, x: Tensor, pages: Tensor, *lengths: Tensor) -> Tensor:
        caches = list(self.buffers())
        for i, window in enumerate(self.windows):
            made = schedule(lengths, num_tokens=x.shape[0], window=window)
            out, _ = OPS.paged_attention(
                x, None, None, caches[2 * i], caches[2 * i + 1], *lengths, pages, None, [], made, window=window
            )
            x = x + out
        return x


@pytest.mark.parametrize(("windows", "removed"), [((0, 0, 0), 2), ((0, 3, 0), 1)], ids=["alike", "one window"])
def test_compiled_results_are_eager_ones(windows: tuple[int, ...], removed: int) -> None:
    torch.compiler.reset()
    model, x = Layers(windows), torch.randn(5, HEADS, DIM)
    pages = torch.tensor([[1, 5, 9], [2, 0, 7]], dtype=torch.int32)
    with torch.no_grad(), decisions.recording() as log:
        compiled = torch.compile(model, backend=backend, fullgraph=True)(x, pages, *LENGTHS)
        torch.testing.assert_close(compiled, model(x, pages, *LENGTHS), rtol=1e-5, atol=1e-5)
    ((_, before, after),) = [graph for graph in log.graphs if graph[0] == "ShareSchedule"]
    count = "torch.ops.lowered_attn.paged_schedule"
    assert before.count(count) - after.count(count) == removed


class MixedLayers(torch.nn.Module):
    """A layer over keys and values between two over latents."""

    def __init__(self) -> None:
        super().__init__()
        self.regular = Layers((0,))
        for name in ("first", "last"):
            self.register_buffer(name, torch.randn(8, PAGE_SIZE, DIM))

    def over_latents(self, cache: Tensor, x: Tensor, pages: Tensor, *lengths: Tensor) -> Tensor:
        made = schedule(lengths, num_tokens=x.shape[0], num_kv_heads=1, value_dim=48)
        out, _ = OPS.paged_latent_attention(x, None, cache, *lengths, pages, None, [], made, value_dim=48, scale=0.2)
        return x + torch.nn.functional.pad(out, (0, DIM - 48))

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        x = self.regular(self.over_latents(self.first, x, *rest), *rest)
        return self.over_latents(self.last, x, *rest)


def test_layers_over_latents_share_one_beside_the_others() -> None:
    torch.compiler.reset()
    model, x = MixedLayers(), torch.randn(5, HEADS, DIM)
    pages = torch.tensor([[1, 5, 9], [2, 0, 7]], dtype=torch.int32) % 8
    with torch.no_grad(), decisions.recording() as log:
        compiled = torch.compile(model, backend=backend, fullgraph=True)(x, pages, *LENGTHS)
        torch.testing.assert_close(compiled, model(x, pages, *LENGTHS), rtol=1e-5, atol=1e-5)
    ((_, before, after),) = [graph for graph in log.graphs if graph[0] == "ShareSchedule"]
    assert [text.count("torch.ops.lowered_attn.paged_schedule") for text in (before, after)] == [3, 2]


def test_a_mode_of_the_users_own_is_part_of_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache knows a graph by the mode's name: an edited expression must not be served the old kernel."""
    shipped = ShareSchedule().uuid()
    monkeypatch.setattr(masks, "MODES", dict(masks.MODES))
    monkeypatch.setattr(share_schedule, "MODES", masks.MODES)
    masks.register_mode(masks.PagedMode("one_ahead", k <= q + 1))
    one_ahead = ShareSchedule().uuid()
    masks.MODES["one_ahead"] = masks.PagedMode("one_ahead", k <= q + 2)
    assert len({shipped, one_ahead, ShareSchedule().uuid()}) == 3
