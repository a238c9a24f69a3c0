"""The mla forms: the formula in fp64, backends and gradients, locality, sizes, refusals, absorption, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from lowered_attn import mla, regular
from lowered_attn.backends import BACKENDS
from lowered_attn.forms.mla.latent import MultiHeadLatentAttention
from tests.mla_cases import (
    BUILD,
    FORMS,
    HEADS,
    KV_WIDTH,
    LOOKBACK,
    SELF,
    SIZES,
    WIDTH,
    WINDOW,
    build,
    inputs,
    oracle,
    padding,
    segments,
)
from tests.test_ops import largest_allocation

FullSelf, SlidingSelf = mla.full_self.FullSelf, mla.sliding_self.SlidingSelf
SegmentCross = mla.segment_cross.SegmentCross
on_forms = pytest.mark.parametrize("name", FORMS)
on_self_forms = pytest.mark.parametrize("name", SELF)
NAMES = (*BACKENDS, "fallback")


def call_of(module: Callable[..., Tensor], options: dict[str, Tensor]) -> Callable[..., Tensor]:
    """`module` as a function of its token tensors alone."""
    return lambda *tokens: module(*tokens, **options)


def results(call: Callable[..., Tensor], module: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    """[out, gradients of the tokens and of all parameters], for a random cotangent that is the same each time."""
    leaves = [t.detach().clone().requires_grad_() for t in tokens]
    out = call(*leaves)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *module.parameters()], cotangent)]


# -------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("backend", [name for name in NAMES if name != "flex"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@on_forms
def test_outputs_and_all_gradients_are_the_formulas(name: str, padded: bool, backend: str) -> None:
    module = build(name, backend=backend)
    tokens, options = inputs(name, padded=padded)
    actual = results(call_of(module, options), module, tokens)
    exact = results(lambda *t: oracle(name, module, list(t), options), module, tokens)
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@on_forms
def test_flex_gives_the_formula(name: str, padded: bool) -> None:
    module = build(name, backend="flex")
    tokens, options = inputs(name, padded=padded)
    with torch.no_grad():
        torch.testing.assert_close(module(*tokens, **options), oracle(name, module, tokens, options))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["lowered", "sdpa", "flex"])
@on_forms
def test_backends_agree_on_cuda(name: str, backend: str) -> None:
    wide = {"kv_comp_dim": 64, "retr_dim": 16}
    module = build(name, torch.float32, backend=backend, **wide).cuda()
    plain = build(name, torch.float32, backend="fallback", **wide).cuda()
    plain.load_state_dict(module.state_dict())
    tokens, options = inputs(name, padded=True, dtype=torch.float32)
    tokens, options = [t.cuda() for t in tokens], {n: t.cuda() for n, t in options.items()}
    torch.compiler.reset()
    pairs = (results(call_of(m, options), m, tokens) for m in (module, plain))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)  # tf32


@on_self_forms
def test_a_token_reaches_exactly_the_tokens_that_see_it(name: str) -> None:
    block = build(name)
    x = torch.randn(1, 17, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[0, 6] += 1
    moved = (block(x) != block(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == (list(range(6, 17)) if name == "full" else list(range(6, 6 + WINDOW)))


@on_self_forms
def test_a_padded_token_reaches_no_other_and_a_blind_one_keeps_its_residual(name: str) -> None:
    block = build(name)
    (x,), options = inputs(name, 9, padded=True)
    hidden = options["key_padding"]
    changed = torch.where(hidden[..., None], float("nan"), x)
    out = block(x, **options)
    torch.testing.assert_close(block(changed, **options)[~hidden], out[~hidden], rtol=0, atol=0)
    blind = x[0, :2]
    torch.testing.assert_close(out[0, :2], blind + block.ffn(block.ffn_norm(blind)))


@pytest.mark.parametrize("backend", ["lowered", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["cross", "cross-rope"])
def test_what_a_padded_query_holds_reaches_no_output_and_no_gradient(name: str, backend: str) -> None:
    module = build(name, backend=backend)
    (q, kv), options = inputs(name, padded=True)
    padded = options["query_padding"]
    poisoned = q.masked_fill(padded[..., None], float("nan"))

    call = call_of(module, options)
    out, dq, *rest = results(call, module, [poisoned, kv])
    assert torch.count_nonzero(out[padded]) == torch.count_nonzero(dq[padded]) == 0
    for a, b in zip([out, dq, *rest], results(call, module, [q, kv]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# -------------------------------------------------------------------------------- memory


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Every (q, k, v, out) of the lowered backend from now on."""
    seen: list[tuple[Tensor, ...]] = []
    run = BACKENDS["lowered"].run

    def record(form: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        out = run(form, q, k, v, *rest)
        seen.append((q, k, v, out))
        return out

    monkeypatch.setattr(BACKENDS["lowered"], "run", record)
    return seen


@on_forms
def test_values_are_the_latent_itself_with_one_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, latents = build(name), []
    module.attention.kv_down.register_forward_hook(lambda *args: latents.append(args[2]))
    seen = spy(monkeypatch)
    tokens, options = inputs(name)
    module(*tokens, **options)
    ((q, k, v, out),), (latent,) = seen, latents
    assert q.shape[1] == k.shape[1] == HEADS and v.shape[1] == 1
    assert v.data_ptr() == latent.data_ptr() and v.shape[3] == SIZES["kv_comp_dim"]
    assert all(t.transpose(1, 2).is_contiguous() for t in (q, k, v, out))


@pytest.mark.parametrize("backend", ["lowered", "sdpa", "reference"])  # eager flex on a CPU copies by itself
@pytest.mark.parametrize("absorbed", [False, True], ids=["", "absorbed"])
def test_no_head_has_a_copy_of_the_latents(absorbed: bool, backend: str) -> None:
    heads, keys, latent_dim = 16, 2048, 256
    sizes = {"kv_comp_dim": latent_dim, "q_comp_dim": 8, "retr_dim": 4}
    block = FullSelf(16, heads, 1, backend, head_dim=2, **sizes).eval()
    with torch.no_grad():
        block = block.absorb() if absorbed else block
        cache = block.make_cache(1, keys)
        block(torch.randn(1, keys - 2, 16), cache=cache)
        token = torch.randn(1, 1, 16)
        block(token, cache=cache)  # not measured: lazy initialisation
        largest = largest_allocation(lambda: block(token, cache=cache))
    # One copy, where hidden rows are cleared before they are multiplied: 2 MiB. A copy a head: 32 MiB.
    assert largest <= keys * latent_dim * 4 + 1024


def test_training_makes_no_copy_of_the_latents_either() -> None:
    heads, keys, latent_dim = 16, 2048, 256
    sizes = {"kv_comp_dim": latent_dim, "q_comp_dim": 8, "retr_dim": 4}
    module = SegmentCross(16, 16, heads * 2, heads, keys, **sizes)
    tokens = [torch.randn(1, 1, 16), torch.randn(1, keys, 16)]
    last = torch.full((1, 1), keys - 1)

    def train_step() -> list[Tensor]:
        return results(lambda *t: module(*t, query_segments=last), module, tokens)

    train_step()
    assert largest_allocation(train_step) <= keys * latent_dim * 4 + 1024


# -------------------------------------------------------------------------------- sizes and refusals


def test_default_sizes_have_the_ratios_of_deepseek_v2() -> None:
    def sizes(module: nn.Module) -> tuple[int, ...]:
        s = module.attention.sizes
        return s.head_dim, s.kv_comp_dim, s.q_comp_dim, s.retr_dim

    assert sizes(FullSelf(64, 4)) == (16, 64, 192, 16)
    assert sizes(SlidingSelf(64, 4, 3, head_dim=128)) == (128, 512, 1536, 128)
    assert sizes(SegmentCross(64, 32, 48, 4)) == (12, 48, 144, 12)
    assert sizes(FullSelf(512, 2)) == (256, 512, 3072, 256)  # the latent is never wider than 512
    assert sizes(FullSelf(32, 4, head_dim=7, retr_dim=6)) == (7, 28, 84, 6)  # a head may be odd: RoPE turns retr_dim


@on_forms
def test_parameters_are_the_six_projections(name: str) -> None:
    module = BUILD[name.removesuffix("-rope")]()
    shapes = {n: tuple(p.shape) for n, p in module.attention.named_parameters()}
    kv_dim = WIDTH if name in SELF else KV_WIDTH
    assert shapes == {
        "q_down.weight": (18, WIDTH),
        "q_up.weight": (HEADS * 10, 18),
        "kv_down.weight": (20, kv_dim),
        "k_up.weight": (HEADS * 10, 20),
        "v_up.weight": (HEADS, 6, 20),
        "o_proj.weight": (WIDTH, HEADS * 6),
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FullSelf(30, 4), ["d_model", "multiple of n_heads = 4", "got 30", "head_dim"]),
        (lambda: FullSelf(20, 4), ["retr_dim", "even", "got 5"]),
        (lambda: FullSelf(32, 4, retr_dim=7), ["retr_dim", "even", "got 7"]),
        (lambda: FullSelf(32, 4, retr_dim=258), ["retr_dim", "at most 256", "got 258"]),
        (lambda: FullSelf(32, 4, kv_comp_dim=513), ["kv_comp_dim", "at most 512", "got 513"]),
        (lambda: FullSelf(32, 4, kv_comp_dim=0), ["kv_comp_dim", "at least 1", "got 0"]),
        (lambda: FullSelf(32, 4, q_comp_dim=1.5), ["q_comp_dim", "int", "1.5"]),
        (lambda: FullSelf(32, 0), ["n_heads", "at least 1", "got 0"]),
        (lambda: FullSelf(32, 4, 0), ["ffn_dim_multiplier", "at least 1"]),
        (lambda: FullSelf(32, 4, backend="fast"), ["backend", *map(repr, NAMES), "'fast'"]),
        (lambda: SlidingSelf(32, 4, 0), ["window_size", "at least 1", "got 0"]),
        (lambda: SegmentCross(32, 24, 30, 4), ["d_attn", "multiple of n_heads = 4", "got 30"]),
        (lambda: SegmentCross(32, 24, 32, 4, -1), ["lookback", "at least 0", "got -1"]),
        (lambda: SegmentCross(32, 24, 32, 4, head_dim=16), ["head_dim", "d_attn // n_heads = 8", "got 16"]),
        (lambda: regular.full_self.FullSelf(32, 4, backend="fallback"), ["backend", "'reference'", "'fallback'"]),
    ],
)
def test_a_bad_size_is_refused_when_the_module_is_built(make: Callable[[], nn.Module], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for word in ["expected", *words]:
        assert word in str(error.value)


def call_cross(**changes: Any) -> Tensor:
    """Call a small SegmentCross with one argument changed."""
    (q, kv), options = inputs("cross", 7, 3)
    return build("cross", **changes.pop("sizes", {}))(changes.pop("q", q), kv, **{**options, **changes})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FullSelf(32, 4)(torch.randn(2, 7, 24)), ["FullSelf", "x", "d_model = 32", "[2, 7, 24]"]),
        (lambda: call_cross(q=torch.randn(2, 7, 24)), ["SegmentCross", "q", "q_dim = 32", "[2, 7, 24]"]),
        (lambda: call_cross(key_padding=padding(2, 6, [])), ["key_padding", "[2, 3]", "[2, 6]"]),
        (lambda: call_cross(query_segments=segments(6, 3)), ["query_segments", "[2, 7]", "[2, 6]"]),
        (
            lambda: call_cross(query_positions=segments(7, 3)),
            ["key_positions", "query_positions is given", "pass both"],
        ),
        (lambda: call_cross(query_padding=padding(1, 7, [])), ["query_padding", "[2, 7]", "[1, 7]"]),
        (
            lambda: call_cross(query_positions=segments(7, 3), key_positions=segments(3, 3), sizes={"retr_dim": 7}),
            ["apply_rope", "even", "got 7"],
        ),
    ],
)
def test_a_bad_input_is_refused_when_the_module_is_called(call: Callable[[], Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    for word in ["expected", *words]:
        assert word in str(error.value)


# -------------------------------------------------------------------------------- absorption


@pytest.mark.parametrize("backend", NAMES)
@on_forms
def test_absorbed_gives_the_same(name: str, backend: str) -> None:
    module = build(name, backend=backend).eval()
    absorbed = module.absorb()
    # More queries than keys, and fewer: without RoPE, keys are projected or the latents themselves.
    for length in (13, 3):
        tokens, options = inputs(name, length, padded=length == 13)
        with torch.no_grad():
            torch.testing.assert_close(absorbed(*tokens, **options), module(*tokens, **options))


@on_forms
def test_absorbed_bf16_is_as_close_to_fp64_as_the_module(name: str) -> None:
    module = build(name, torch.bfloat16).eval()
    absorbed, exact = module.absorb(), copy.deepcopy(module).double()
    tokens, options = inputs(name, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        results = [m(*tokens, **options) for m in (module, absorbed)]
        true = exact(*(t.double() for t in tokens), **options)
    own, folded = ((r.double() - true).abs().max() for r in results)
    assert all(r.dtype == torch.bfloat16 for r in results)
    # Twice the module's own error, and half a unit in the last place of the largest result.
    assert folded <= 2 * own + 2.0**-9 * true.abs().max(), (folded, own)


@pytest.mark.parametrize(("length", "latent_keys"), [(3, True), (5, True), (6, False)])
def test_without_rope_absorbed_keys_are_the_latents(
    length: int, latent_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorbed = build("cross").eval().absorb()
    seen = spy(monkeypatch)
    tokens, options = inputs("cross", length)
    with torch.no_grad():
        absorbed(*tokens, **options)
    ((q, k, v, _),) = seen
    assert (k.shape[1] == 1 and k.data_ptr() == v.data_ptr()) == latent_keys
    assert q.shape[3] == (SIZES["kv_comp_dim"] if latent_keys else SIZES["retr_dim"])


def test_latents_too_wide_for_keys_are_projected() -> None:
    module = build("cross", kv_comp_dim=300).eval()
    tokens, options = inputs("cross", 3)
    with torch.no_grad():
        torch.testing.assert_close(module.absorb()(*tokens, **options), module(*tokens, **options))


def test_absorbing_leaves_the_module_and_its_state_dict_alone() -> None:
    module = build("full").eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    attention = module.attention
    absorbed = module.absorb()
    assert module.attention is attention and isinstance(attention, MultiHeadLatentAttention)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert absorbed.ffn is module.ffn and absorbed.attention.kv_down is attention.kv_down
    assert not {"attention.q_weight", "attention.o_weight"} & absorbed.state_dict().keys()
    # A snapshot: new weights are seen by the module, and by what is absorbed from it afterwards.
    with torch.no_grad():
        module.attention.o_proj.weight.mul_(2)
        tokens, _ = inputs("full")
        assert not torch.allclose(absorbed(*tokens), module(*tokens))
        torch.testing.assert_close(module.absorb()(*tokens), module(*tokens))


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda m: m.train().absorb(), ["absorb", "training", "eval()"]),
        (lambda m: m.absorb().absorb(), ["absorb", "an absorbed one"]),
        (lambda m: m.absorb().train(), ["mode", "got True", "train the module that was absorbed"]),
        (lambda m: m.absorb()(inputs("full")[0][0]), ["gradients", "requires_grad=True", "torch.no_grad()"]),
        (lambda m: m.absorb().load_state_dict(m.state_dict()), ["load_state_dict", "absorb it again"]),
    ],
    ids=["training", "twice", "train", "gradients", "load"],
)
def test_absorption_says_what_it_is_not_for(misuse: Callable[[nn.Module], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        misuse(build("full").eval())
    for word in ["expected", *words]:
        assert word in str(error.value)


# -------------------------------------------------------------------------------- torch.compile


@on_forms
def test_a_module_compiles_once_for_every_length(name: str) -> None:
    torch._dynamo.reset()
    module, counter = build(name), CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for length in (13, 21, 8):
        tokens, options = inputs(name, length, padded=True)
        pairs = (results(call_of(m, options), module, tokens) for m in (module, compiled))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@on_forms
def test_training_through_the_compiler_decreases_the_loss(name: str) -> None:
    torch._dynamo.reset()
    module, counter = build(name, torch.float32), CompileCounterWithBackend("lowered_attn")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    tokens, options = inputs(name, padded=True, dtype=torch.float32)
    wanted = torch.randn_like(tokens[0])
    if "query_padding" in options:
        wanted = wanted.masked_fill(options["query_padding"][..., None], 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (compiled(*tokens, **options) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert losses[-1] < 0.8 * losses[0], losses
    assert counter.frame_count == 1


def test_the_lookback_is_shown() -> None:
    assert f"lookback={LOOKBACK}" in repr(BUILD["cross"]()) and "kv_comp_dim=20" in repr(BUILD["full"]())
