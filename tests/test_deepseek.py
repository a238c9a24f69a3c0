"""`DeepSeekAttention`: its formula spelled out, its two computations, which it picks, streaming and serving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowered_attn import DeepSeekAttention, LatentCache, set_debug, set_fetch_fn_for_attn_metadata
from tests.serving_engine import PAGE, REQUESTS, SESSION, TOKENS, Engine

WIDTH = 40
SMALL = {"q_comp_dim": 20, "kv_comp_dim": 32, "nope_dim": 24, "rotary_dim": 8, "value_dim": 16}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "small": (3, SMALL),
    "no query compression": (4, SMALL | {"q_comp_dim": None}),
    "no rotary part": (2, SMALL | {"rotary_dim": 0}),
    "odd": (5, {"q_comp_dim": 7, "kv_comp_dim": 33, "nope_dim": 13, "rotary_dim": 6, "value_dim": 19}),
    "one head": (1, SMALL | {"rope_base": 500.0, "scale": 0.3}),
    "wide values": (2, SMALL | {"nope_dim": 4, "value_dim": 48}),
}
on_sizes = pytest.mark.parametrize("sizes", SIZES)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    set_fetch_fn_for_attn_metadata(None)
    set_debug(False)


def make(sizes: str = "small", dtype: torch.dtype = torch.float32, **keywords: Any) -> DeepSeekAttention:
    heads, dims = SIZES[sizes]
    module = DeepSeekAttention(WIDTH, heads, **(dims | keywords)).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:  # norms start at 1, which would hide one that is left out
                p.uniform_(0.5, 1.5)
            else:
                p.mul_(3)  # scores of about 1, which would hide a wrong scale
    return module


# ---------------------------------------------------------------------- the formula


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, base: float, interleaved: bool = False) -> Tensor:
    """RoPE of x [B, S, ..., R] at 0..S-1 as complex numbers, in halves or in neighbours."""
    width = x.shape[-1]
    if not width:
        return x
    halves = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    speeds = torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=x.dtype)
    angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), speeds)
    angles = angles.view(x.shape[1], *[1] * (x.dim() - 3), width // 2)
    turned = torch.view_as_complex(halves.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(turned)
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


def formula(module: DeepSeekAttention, x: Tensor, padding: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """The attention of DeepSeek-V2's appendix C, every head's keys and values written out, in x's dtype."""
    weights = {name: p.to(x.dtype) for name, p in module.named_parameters()}
    heads, nope, rotary = module.n_heads, module.nope_dim, module.rotary_dim
    compressed = x
    if "q_down.weight" in weights:
        compressed = norm(x @ weights["q_down.weight"].T, weights["q_norm.weight"])
    q = (compressed @ weights["q_up.weight"].T).view(*x.shape[:2], heads, nope + rotary)
    q_rotary = turn(q[..., nope:], module.rope_base, interleaved)
    down = x @ weights["kv_down.weight"].T
    c = norm(down[..., : module.kv_comp_dim], weights["kv_norm.weight"])
    k_rotary = turn(down[..., module.kv_comp_dim :], module.rope_base, interleaved)
    up = (c @ weights["kv_up.weight"].T).view(*x.shape[:2], heads, nope + module.value_dim)
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :nope], up[..., :nope])
    scores = (scores + torch.einsum("bihd,bjd->bhij", q_rotary, k_rotary)) * module.scale
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool().expand_as(scores)
    if padding is not None:
        hidden = hidden | padding[:, None, None, :]
    weight = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)
    out = torch.einsum("bhij,bjhd->bihd", weight, up[..., nope:])
    return out.flatten(2) @ weights["o_proj.weight"].T


@on_sizes
@pytest.mark.parametrize("padded", [False, True])
def test_the_expanded_path_is_the_formula_with_its_gradients(sizes: str, padded: bool) -> None:
    module = make(sizes, torch.float64)
    assert module.scale == SIZES[sizes][1].get("scale", (module.nope_dim + module.rotary_dim) ** -0.5)
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, 3:5] = padding[1, :2] = True

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(x, padding if padded else None)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    found = results(lambda x, p: module(x, key_padding=p))
    assert len(found) == 2 + len(list(module.parameters()))
    for mine, exact in zip(found, results(lambda x, p: formula(module, x, p)), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "flex"])
def test_backends_agree_on_the_expanded_path(backend: str) -> None:
    module = make()
    x = torch.randn(2, 9, WIDTH)
    module.requires_grad_(backend != "flex")  # which has no gradients on a CPU

    def results(which: str) -> list[Tensor]:
        module.backend = which
        out = module(x)
        return [out, *torch.autograd.grad(out.sum(), list(module.parameters()))] if out.requires_grad else [out]

    for mine, other in zip(results(backend), results("lowered"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_published_weights_turn_neighbours() -> None:
    """The class's docstring says how to order the rotary rows of weights that turn pairs (2 i, 2 i + 1)."""
    published = make(dtype=torch.float64)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    rows = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))
    module = make(dtype=torch.float64)
    module.load_state_dict(published.state_dict())
    with torch.no_grad():
        for weight, start in ((module.q_up.weight.unflatten(0, (3, -1)), 24), (module.kv_down.weight[None], 32)):
            weight[:, start:] = weight[:, start:][:, rows]
    torch.testing.assert_close(module(x), formula(published, x, interleaved=True))


# ---------------------------------------------------------------------- the two computations


def stream(module: DeepSeekAttention, x: Tensor, pieces: list[int], cache: LatentCache) -> Tensor:
    assert sum(pieces) == x.shape[1]
    return torch.cat([module(piece, cache=cache) for piece in x.split(pieces, 1)], 1)


@on_sizes
@torch.no_grad()
def test_paths_agree(sizes: str) -> None:
    """Whole and in pieces, expanded and absorbed, of the reference and of the kernel: all are the formula."""
    module = make(sizes)
    x = torch.randn(2, 21, WIDTH)
    exact = formula(module, x.double())
    for module.path in ("expanded", "absorbed", "auto"):
        for module.paged.attn_impl in ("reference", "triton_grouped"):
            torch.testing.assert_close(module(x).double(), exact, rtol=1e-4, atol=1e-4)
            for pieces in ([21], [9, 1, 1, 0, 4, 6], [1] * 21):
                cache = module.make_cache(2, 21)
                torch.testing.assert_close(stream(module, x, pieces, cache).double(), exact, rtol=1e-4, atol=1e-4)
                assert cache.lengths.tolist() == [21, 21]


@torch.no_grad()
def test_requests_of_a_cache_have_their_own_lengths() -> None:
    """Prompts padded at their end, whose padding is taken back; whatever an earlier stream left in the cache."""
    module = make()
    x = torch.randn(2, 30, WIDTH)
    exact = formula(module, x.double())
    for module.path in ("expanded", "absorbed"):
        cache = module.make_cache(2, 30)
        cache.data.fill_(math.nan)
        prompts = module(x[:, :12], cache=cache)
        cache.truncate(torch.tensor([12, 7]))
        later = torch.stack((x[0, 12:20], x[1, 7:15]))
        out = torch.cat([module(piece, cache=cache) for piece in later.split([1, 3, 4], 1)], 1)
        for r, length in enumerate((12, 7)):
            mine = torch.cat((prompts[r, :length], out[r])).double()
            torch.testing.assert_close(mine, exact[r, : length + 8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capacity", [1, 31, 48, 64, 100])
@torch.no_grad()
def test_a_cache_of_any_capacity(capacity: int) -> None:
    """A dense cache is read in pages that divide it."""
    module, x = make(path="absorbed"), torch.randn(3, capacity, WIDTH)
    cache = LatentCache(3, capacity, 40)
    out = stream(module, x, [capacity], cache).double()
    torch.testing.assert_close(out, formula(module, x.double()), rtol=1e-4, atol=1e-4)
    assert module.make_cache(3, capacity).capacity == -(-capacity // 64) * 64


@torch.no_grad()
def test_sixteen_bits() -> None:
    module = make(dtype=torch.bfloat16)
    x = torch.randn(2, 20, WIDTH, dtype=torch.bfloat16)
    exact = formula(module, x.double())
    norm = exact.square().mean().sqrt()
    for module.path in ("expanded", "absorbed"):
        out = stream(module, x, [12, 1, 7], module.make_cache(2, 20))
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).square().mean().sqrt() < 0.02 * norm


class Watch(TorchDispatchMode):
    """The names of this library's ops that run, and the elements of the largest tensor that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "lowered_attn":
            self.ops.append(function._schema.name.removeprefix("lowered_attn::"))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.itemsize)
        return result


def ops_of(call: Callable[[], Any]) -> list[str]:
    with Watch() as watch:
        call()
    return [op for op in watch.ops if op != "paged_schedule"]


def test_what_it_picks() -> None:
    expanded, absorbed = ["full_self"], ["paged_latent_attention"]
    module = make()
    assert module.break_even == 32 * (24 + 16) / (64 - 24 - 16) == 160 / 3
    x = torch.randn(2, 60, WIDTH)
    assert ops_of(lambda: module(x)) == expanded
    with torch.no_grad():
        assert ops_of(lambda: module(x)) == expanded
        for new, path in ((1, absorbed), (53, absorbed), (54, expanded), (60, expanded)):
            assert ops_of(lambda new=new: module(x[:, :new], cache=module.make_cache(2, 60))) == path
        for module.path, path in (("expanded", expanded), ("absorbed", absorbed)):
            for new in (1, 60):
                assert ops_of(lambda new=new: module(x[:, :new])) == path
                assert ops_of(lambda new=new: module(x[:, :new], cache=module.make_cache(2, 60))) == path
        module.path = "auto"
    module.requires_grad_(False)
    assert ops_of(lambda: module(x[:, :1], cache=module.make_cache(2, 60))) == absorbed  # nothing is recorded
    assert ops_of(lambda: module(x.requires_grad_())) == expanded


@pytest.mark.parametrize(
    ("dims", "expected"),
    [({}, 170.67), ({"kv_comp_dim": 64, "nope_dim": 128, "value_dim": 128}, math.inf), (SMALL, 53.33)],
)
def test_break_even_is_where_the_flops_of_both_are_equal(dims: dict[str, int], expected: float) -> None:
    """Multiplications of one head over many cached tokens, counted from the shapes of the products."""
    module = DeepSeekAttention(WIDTH, 1, **dims)
    assert module.break_even == pytest.approx(expected, rel=1e-4)
    cached = 1e6

    def products(new: float, key: int, value: int) -> float:
        return cached * new * (key + value)

    def expanded(new: float) -> float:
        up = cached * module.kv_up.weight.numel()
        return up + products(new, module.nope_dim + module.rotary_dim, module.value_dim)

    def absorbed(new: float) -> float:
        return products(new, module.kv_comp_dim + module.rotary_dim, module.kv_comp_dim)

    edge = min(module.break_even, 1e6)
    assert absorbed(0.99 * edge) < expanded(0.99 * edge)
    if edge < 1e6:
        assert absorbed(1.01 * edge) > expanded(1.01 * edge)


@torch.no_grad()
def test_no_head_has_a_copy_of_the_latents() -> None:
    """Absorbed, nothing that a step makes is as large as two requests' latents, whatever the number of heads."""
    module = DeepSeekAttention(WIDTH, 16, **SMALL)
    cache = module.make_cache(2, 4096)
    module(torch.randn(2, 2000, WIDTH), cache=cache)
    with Watch() as watch:
        module(torch.randn(2, 1, WIDTH), cache=cache)
    assert "paged_latent_attention" in watch.ops
    assert watch.largest < cache.data.numel()
    module.path = "expanded"
    with Watch() as watch:
        module(torch.randn(2, 1, WIDTH), cache=cache)
    assert watch.largest >= 16 * 2 * 4096 * 32  # what it is compared with


# ---------------------------------------------------------------------- serving


def serve(module: Callable[..., Tensor], engine: Engine, x: Tensor, new: list[int], in_cache: bool) -> list[Tensor]:
    """A step of `new` tokens a request, which x [R, S, d_model] holds; each request's outputs."""
    starts = list(engine.lens)
    engine.step(new, new_keys_in_cache=in_cache)
    rows, positions = torch.full((TOKENS, WIDTH), math.nan), torch.zeros(TOKENS, dtype=torch.int64)
    picked = [(r, start + i) for r, (start, n) in enumerate(zip(starts, new, strict=False)) for i in range(n)]
    for t, (r, position) in enumerate(picked):
        rows[t], positions[t] = x[r, position], position
    out = module(rows, positions)
    assert out.shape == (TOKENS, WIDTH) and not out[len(picked) :].any()
    return list(out[: len(picked)].split(new))


@pytest.mark.parametrize("in_cache", [False, True])
@on_sizes
@torch.no_grad()
def test_serving_over_pages_is_the_formula(sizes: str, in_cache: bool) -> None:
    module, engine = make(sizes), Engine()
    width = module.kv_comp_dim + module.rotary_dim
    module.paged.latent_cache = torch.full((engine.sizes.pages, PAGE, width), math.nan)
    assert module.state_dict().keys() == make(sizes).state_dict().keys()  # no checkpoint has the cache
    x = torch.randn(REQUESTS, 24, WIDTH)
    exact = formula(module, x.double())
    for step in SESSION:
        starts, new = list(engine.lens), step + [0] * (REQUESTS - len(step))
        for r, out in enumerate(serve(module.serve, engine, x, new, in_cache)):
            torch.testing.assert_close(out.double(), exact[r, starts[r] : starts[r] + new[r]], rtol=1e-4, atol=1e-4)


class Model(torch.nn.Module):
    """Two layers of a served model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.serve(x, positions)
        return x.nan_to_num(0)  # rows of the bucket's padding


@pytest.mark.parametrize("backend", ["aot_eager", "lowered_attn"])
@torch.no_grad()
def test_every_mix_of_prefill_and_decode_is_one_graph(backend: str) -> None:
    model, engine = Model(), Engine()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(REQUESTS, 24, WIDTH)
    caches = [torch.full((engine.sizes.pages, PAGE, 40), math.nan) for _ in model.layers]
    for layer, cache in zip(model.layers, caches, strict=True):
        layer.paged.latent_cache = cache
    for step in SESSION:
        lens = list(engine.lens)
        new = step + [0] * (REQUESTS - len(step))
        found = serve(compiled, engine, x, new, True)
        engine.lens = lens
        for out, other in zip(found, serve(model, engine, x, new, True), strict=True):
            torch.testing.assert_close(out, other)
    assert counter.frame_count == 1 and not counters["graph_break"]


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("backend", ["aot_eager", "lowered_attn"])
@torch.no_grad()
def test_a_stream_is_one_graph_for_every_length(path: str, backend: str) -> None:
    module, x = make(path=path), torch.randn(2, 30, WIDTH)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    cache = module.make_cache(2, 30)
    exact = formula(module, x.double())
    out = torch.cat([compiled(piece, cache=cache) for piece in x.split(2, 1)], 1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1 and not counters["graph_break"]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model: expected an int of at least 1, got 0"),
        ({"n_heads": 2.0}, "n_heads: expected an int of at least 1, got 2.0"),
        ({"q_comp_dim": 0}, "q_comp_dim: expected an int of at least 1, got 0"),
        ({"kv_comp_dim": 0}, "kv_comp_dim: expected an int of at least 1, got 0"),
        ({"nope_dim": 0}, "nope_dim: expected an int of at least 1, got 0"),
        ({"value_dim": None}, "value_dim: expected an int of at least 1, got None"),
        ({"rotary_dim": -2}, "rotary_dim: expected an int of at least 0, got -2"),
        ({"rotary_dim": 7}, r"rotary_dim: expected an even number \(RoPE turns pairs\), got 7"),
        ({"path": "fast"}, "path: expected one of 'auto', 'expanded', 'absorbed', got 'fast'"),
        ({"backend": "fast"}, "backend: expected one of .*'lowered'.*got 'fast'"),
        ({"attn_impl": "fast"}, "attn_impl: expected one of .*'triton_grouped', got 'fast'"),
        ({"scale": -1.0}, "scale: expected .*got -1.0"),
        ({"kv_comp_dim": 600}, "kv_comp_dim: expected at most 512, .*got 600"),
        ({"nope_dim": 250}, "nope_dim \\+ rotary_dim: expected at most 256, .*got 258"),
        ({"value_dim": 600}, "value_dim: expected at most 512, .*got 600"),
    ],
)
def test_what_cannot_be_built_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"d_model": WIDTH, "n_heads": 2, **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        DeepSeekAttention(arguments.pop("d_model"), arguments.pop("n_heads"), **arguments)


def test_calls_that_do_not_fit_are_named() -> None:
    module = make()
    x, padding = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, d_model\] with d_model = 40, got .*\[2, 5, 39\]"):
        module(x[..., 1:])
    with pytest.raises(ValueError, match=r"key_padding: expected shape \[2, 5\].*got shape \[2, 4\]"):
        module(x, key_padding=padding[:, 1:])
    with pytest.raises(ValueError, match=r"cache: expected None where gradients are recorded.*torch.no_grad"):
        module(x, cache=module.make_cache(2, 8))
    module.path = "absorbed"
    with pytest.raises(ValueError, match=r"path: expected 'auto' or 'expanded' where gradients are recorded, got 'abs"):
        module(x)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"key_padding: expected None with path 'absorbed'.*path='expanded'"):
            module(x, key_padding=padding)
        with pytest.raises(ValueError, match=r"key_padding: expected None with a cache.*truncate"):
            module(x, key_padding=padding, cache=module.make_cache(2, 8))
        with pytest.raises(ValueError, match=r"x: expected the cache's 3 requests, got shape \[2, 5, 40\]"):
            module(x, cache=LatentCache(3, 8, 40))
        for wrong in (LatentCache(2, 8, 32), LatentCache(2, 8, 40, dtype=torch.float64)):
            with pytest.raises(ValueError, match="LatentCache: latent: expected .*make the cache"):
                module(x, cache=wrong)
        with pytest.raises(ValueError, match="LatentCache: capacity: expected at most 4 tokens"):
            module(x, cache=LatentCache(2, 4, 40))
        with pytest.raises(ValueError, match="make_cache: capacity: expected an int of at least 1, got 0"):
            module.make_cache(2, 0)
        with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got float64"):
            module.double()(x.double())
        module.float()
        with pytest.raises(ValueError, match=r"serve: x: expected shape \[T, 40\], got shape \[2, 5, 40\]"):
            module.serve(x, torch.arange(5))
        with pytest.raises(ValueError, match=r"serve: positions: expected shape \[5\].*got shape \[4\]"):
            module.serve(x[0], torch.arange(4))
        with pytest.raises(RuntimeError, match="set_fetch_fn_for_attn_metadata|latent_cache"):
            module.serve(x[0], torch.arange(5))
