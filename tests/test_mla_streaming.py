"""Streaming the mla forms through a latent cache: what one full pass gives, one compilation, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from lowered_attn import mla
from lowered_attn.backends import BACKENDS
from tests.mla_cases import FORMS, HEADS, KV_WIDTH, SELF, SIZES, WIDTH, build, inputs, padding

LatentCache = mla.LatentCache
CAPACITY = 24
TOKEN_BY_TOKEN, MIXED, ONE_PIECE = [1] * 13, [4, 1, 1, 5, 0, 2], [13]
on_forms = pytest.mark.parametrize("name", FORMS)
on_absorption = pytest.mark.parametrize("absorbed", [False, True], ids=["", "absorbed"])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield


def streamable(name: str, absorbed: bool, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    module = build(name, dtype, **options).eval()
    return module.absorb() if absorbed else module


def empty_cache(name: str, module: nn.Module, batch: int = 2, capacity: int = CAPACITY) -> LatentCache:
    """A cache whose unused slots hold NaN: nothing may read them."""
    cache = module.make_cache(batch, capacity, positions=name == "cross-rope")
    cache.data.fill_(float("nan"))
    return cache


def call(name: str, keys: int = 13, padded: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """(token tensors, keywords) of 13 tokens; a segment comes with each token, so that both come in the same pieces."""
    tokens, options = inputs(name, 13, keys, padded, dtype)
    if name not in SELF:
        options["query_segments"] = torch.arange(13).repeat(2, 1).sub(torch.tensor([[0], [1]])).clamp(min=0)
        if name == "cross-rope":
            options["query_positions"] = options["query_segments"] * 7 + 3
    return tokens, options


def pieces(tokens: list[Tensor], options: dict[str, Tensor], sizes: list[int]) -> Iterator[Any]:
    """The call in pieces of so many tokens, all operands cut alike."""
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        yield [t[:, part].contiguous() for t in tokens], {n: t[:, part].contiguous() for n, t in options.items()}
        begin += size


def stream(run: Callable[..., Tensor], cache: LatentCache, call: Any, sizes: list[int]) -> Tensor:
    """The outputs of all pieces, one after another."""
    return torch.cat([run(*tokens, **options, cache=cache) for tokens, options in pieces(*call, sizes)], 1)


# -------------------------------------------------------------------------------- equal to one pass


@pytest.mark.parametrize("sizes", [TOKEN_BY_TOKEN, MIXED, ONE_PIECE], ids=["token_by_token", "mixed", "one_piece"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@on_absorption
@on_forms
def test_a_stream_gives_what_one_pass_gives(name: str, absorbed: bool, padded: bool, sizes: list[int]) -> None:
    module = streamable(name, absorbed)
    tokens, options = call(name, padded=padded)
    cache = empty_cache(name, module)
    streamed = stream(module, cache, (tokens, options), sizes)
    torch.testing.assert_close(streamed, module(*tokens, **options))
    assert cache.lengths.tolist() == [13, 13]
    assert torch.equal(cache.data.isnan().any(-1), torch.arange(CAPACITY).expand(2, -1) >= 13)


@pytest.mark.parametrize("backend", [name for name in (*BACKENDS, "fallback") if name != "lowered"])
@on_forms
def test_every_backend_streams(name: str, backend: str) -> None:
    module = streamable(name, absorbed=False, backend=backend)
    tokens, options = call(name, padded=True)
    sizes = [size for size in MIXED if size]  # eager flex takes no empty tensors
    streamed = stream(module, empty_cache(name, module), (tokens, options), sizes)
    torch.testing.assert_close(streamed, module(*tokens, **options))


@pytest.mark.parametrize("name", SELF)
def test_requests_go_on_at_their_own_lengths(name: str) -> None:
    """Prompts of 3 and 7 tokens, padded at their end; then 5 tokens each."""
    module, lengths = streamable(name, absorbed=False), torch.tensor([3, 7])
    tokens = [torch.randn(1, int(n) + 5, WIDTH, dtype=torch.float64) for n in lengths]
    prompt = torch.full((2, 7, WIDTH), float("nan"), dtype=torch.float64)
    for b, n in enumerate(lengths.tolist()):
        prompt[b, :n] = tokens[b][0, :n]
    cache = empty_cache(name, module)
    first = module(prompt, key_padding=torch.arange(7) >= lengths[:, None], cache=cache)
    cache.truncate(lengths)
    rest = [module(torch.cat([t[:, n + i, None] for t, n in zip(tokens, (3, 7), strict=True)]), cache=cache)
            for i in range(5)]  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        out = torch.cat([first[b : b + 1, :n], torch.cat(rest, 1)[b : b + 1]], 1)
        torch.testing.assert_close(out, module(tokens[b]))
    assert cache.lengths.tolist() == [8, 12]


def test_segments_come_when_they_are_ready() -> None:
    """Steps with no new segment, and a segment that is renewed until it is complete."""
    module = streamable("cross", absorbed=True)
    q, kv = torch.randn(1, 6, WIDTH, dtype=torch.float64), torch.randn(1, 3, KV_WIDTH, dtype=torch.float64)
    owner = torch.tensor([[0, 0, 1, 1, 1, 2]])
    cache, out = empty_cache("cross", module, 1), []
    for i, segment in enumerate(owner[0].tolist()):
        known = int(cache.lengths)
        kv_new = kv[:, known : segment + 1]
        out.append(module(q[:, i : i + 1], kv_new, query_segments=owner[:, i : i + 1], cache=cache))
    exact = module(q, kv, query_segments=owner)
    torch.testing.assert_close(torch.cat(out, 1), exact)

    cache.truncate(torch.tensor([2]))
    draft = torch.randn(1, 1, KV_WIDTH, dtype=torch.float64)
    for segment in (draft, kv[:, 2:]):
        cache.truncate(torch.tensor([2]))
        again = module(q[:, 5:], segment, query_segments=owner[:, 5:], cache=cache)
    torch.testing.assert_close(again, exact[:, 5:])


@on_forms
def test_a_cache_that_is_reset_or_rewound_remembers_nothing(name: str) -> None:
    module = streamable(name, absorbed=False)
    cache = empty_cache(name, module)
    poisoned, hidden = call(name, padded=True)
    stream(module, cache, ([t.fill_(float("nan")) for t in poisoned], hidden), ONE_PIECE)
    tokens, options = call(name)
    cache.reset()
    torch.testing.assert_close(stream(module, cache, (tokens, options), MIXED), module(*tokens, **options))
    # Taken back to 9 tokens, the last 4 once more.
    cache.truncate(torch.tensor([9, 9]))
    _, last = pieces(tokens, options, [9, 4])
    torch.testing.assert_close(module(*last[0], **last[1], cache=cache), module(*tokens, **options)[:, 9:])


def test_truncate_never_lengthens() -> None:
    cache = LatentCache(2, 8, 4)
    cache.append(torch.randn(2, 5, 4))
    cache.truncate(torch.tensor([3, 7]))
    assert cache.lengths.tolist() == [3, 5] and cache.lengths.dtype == torch.int32
    assert cache.key_padding.logical_not().sum(1).tolist() == [3, 5]


def test_append_returns_the_lengths_before_and_stores_there() -> None:
    cache = LatentCache(2, 8, 4, dtype=torch.bfloat16)
    first, second = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 2, 4).bfloat16()
    starts = [cache.append(first), cache.append(second, padding(2, 2, [(1, 0)]))]
    assert [s.tolist() for s in starts] == [[0, 0], [3, 3]] and all(s.dtype == torch.int32 for s in starts)
    assert torch.equal(cache.data[:, :5], torch.cat((first, second), 1)) and not cache.data[:, 5:].any()
    assert cache.key_padding.tolist() == [[i >= 5 for i in range(8)], [i >= 5 or i == 3 for i in range(8)]]


# -------------------------------------------------------------------------------- torch.compile


@on_absorption
@on_forms
def test_thirty_steps_are_one_compilation(name: str, absorbed: bool) -> None:
    module = streamable(name, absorbed, torch.float32)
    counter = CompileCounterWithBackend("lowered_attn")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    tokens, options = call(name, padded=True, dtype=torch.float32)
    exact = module(*tokens, **options)
    cache = empty_cache(name, module)
    address = cache.data.data_ptr()
    streamed = stream(compiled, cache, (tokens, options), TOKEN_BY_TOKEN)
    torch.testing.assert_close(streamed, exact)
    # Other lengths, and another cache, are the same graph.
    cache.truncate(torch.tensor([2, 5]))
    for part in list(pieces(tokens, options, TOKEN_BY_TOKEN))[5:9]:
        compiled(*part[0], **part[1], cache=cache)
    assert cache.lengths.tolist() == [6, 9] and cache.data.data_ptr() == address
    other = empty_cache(name, module)
    torch.testing.assert_close(stream(compiled, other, (tokens, options), TOKEN_BY_TOKEN), exact)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", SELF)
def test_compiled_steps_write_to_the_cache_in_place(name: str) -> None:
    """The graph's caches keep their address, as CUDA graphs ask, and no step copies one."""
    module = streamable(name, absorbed=False, dtype=torch.float32)
    cache = empty_cache(name, module)
    static = {}

    def note(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        nodes = gm.graph.find_nodes(op="placeholder")
        static.update((n.name, hasattr(t, "_dynamo_static_input_type")) for n, t in zip(nodes, example, strict=True))
        return gm

    token = torch.randn(2, 1, WIDTH)
    torch.compile(module, backend=note, fullgraph=True)(token, cache=cache)
    assert {n for n, kept in static.items() if not kept} == {"l_x_"} and any("data" in n for n in static)

    torch.compiler.reset()
    _, (code,) = run_and_get_code(torch.compile(module, backend="lowered_attn", fullgraph=True), token, cache=cache)
    shapes = [eval(shape) for shape in re.findall(r"empty_strided_cpu\((\([\d, ]+\)), .*torch.float32", code)]
    sizes = [math.prod(shape) for shape in shapes]
    assert 2 * CAPACITY * HEADS * SIZES["retr_dim"] in sizes  # the keys
    assert 2 * CAPACITY * SIZES["kv_comp_dim"] not in sizes


@pytest.mark.gpu
@on_forms
def test_a_stream_is_one_cuda_graph(name: str) -> None:
    module = streamable(name, absorbed=False, dtype=torch.float32, kv_comp_dim=64, retr_dim=16).cuda()
    tokens, options = call(name, padded=True, dtype=torch.float32)
    tokens, options = [t.cuda() for t in tokens], {n: t.cuda() for n, t in options.items()}
    cache = empty_cache(name, module)
    compiled = torch.compile(module, backend="lowered_attn", mode="reduce-overhead", fullgraph=True)

    def step(*args: Tensor, **keywords: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **keywords).clone()

    streamed = stream(step, cache, (tokens, options), TOKEN_BY_TOKEN)
    torch.testing.assert_close(streamed, module(*tokens, **options), rtol=2e-2, atol=2e-3)  # tf32
    assert counters["inductor"]["cudagraph_skips"] == 0


# -------------------------------------------------------------------------------- refusals


def test_a_full_cache_refuses_and_keeps_what_it_has() -> None:
    module = streamable("full", absorbed=False)
    cache = empty_cache("full", module, capacity=4)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"capacity: expected at most 4 tokens.*got 0 stored and 5 new; .*larger"):
        module(x, cache=cache)
    module(x[:, :3], cache=cache)
    kept = cache.data.clone()
    with pytest.raises(ValueError, match="got 3 stored and 2 new"):
        module(x[:, :2], cache=cache)
    assert cache.lengths.tolist() == [3, 3] and torch.equal(cache.data[:, :3], kept[:, :3])
    module(x[:, :1], cache=cache)


def test_a_full_cache_is_no_silent_loss_when_compiled() -> None:
    module = streamable("full", absorbed=False, dtype=torch.float32)
    compiled = torch.compile(module, backend="lowered_attn", fullgraph=True)
    cache = empty_cache("full", module, capacity=3)
    for _ in range(3):
        compiled(torch.randn(2, 1, WIDTH), cache=cache)
    with pytest.raises(RuntimeError, match="index out of bounds"):
        compiled(torch.randn(2, 1, WIDTH), cache=cache)


ROWS = torch.zeros(2, 3, 4)
WHOLE = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda: LatentCache(2, 0, 4), ["capacity", "at least 1", "got 0"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS[:1]), ["latent", "[2, new, 4]", "[1, 3, 4]", "make_cache"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS[0]), ["latent", "[2, new, 4]", "[3, 4]"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS.double()), ["dtype", "torch.float32", "torch.float64"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS.to("meta")), ["device", "cpu", "meta"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS, padding(2, 8, [])), ["key_padding", "[2, 3]", "[2, 8]"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS, WHOLE), ["key_padding", "bool", "torch.int64"]),
        (lambda: LatentCache(2, 8, 4).append(ROWS, None, WHOLE), ["positions", "none", "positions=True"]),
        (lambda: LatentCache(2, 8, 4, positions=True).append(ROWS), ["positions", "got None", "positions=True"]),
        (
            lambda: LatentCache(2, 8, 4, positions=True).append(ROWS, None, WHOLE.float()),
            ["positions", "integers", "torch.float32"],
        ),
        (lambda: LatentCache(2, 8, 4).truncate(torch.tensor([3])), ["lengths", "[2]", "[1]"]),
        (lambda: LatentCache(2, 8, 4).truncate(torch.tensor([3, -1])), ["lengths", "at least 0", "got -1"]),
    ],
)
def test_a_bad_argument_of_a_cache_is_refused(misuse: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        misuse()
    for word in ["LatentCache", "expected", *words]:
        assert word in str(error.value)


def test_gradients_do_not_go_through_a_cache() -> None:
    module = streamable("full", absorbed=False)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"no gradient to be recorded.*torch\.no_grad"):
        module(torch.randn(2, 1, WIDTH, dtype=torch.float64), cache=empty_cache("full", module))


def test_a_cache_is_in_no_state_dict_and_has_the_dtype_of_its_module() -> None:
    module = streamable("cross", absorbed=False, dtype=torch.bfloat16)
    cache = module.make_cache(3, 7, positions=True)
    assert not cache.state_dict() and not list(cache.parameters())
    assert cache.data.shape == (3, 7, SIZES["kv_comp_dim"]) and cache.data.dtype == torch.bfloat16
    assert cache.capacity == 7 and cache.positions is not None and not cache.data.any()
    assert "[3, 7, 20]" in repr(cache)
