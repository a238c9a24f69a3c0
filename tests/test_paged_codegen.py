"""The GPU code that torch.compile generates around a paged cache, without a GPU: stores, schedules, attention."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from custom_ops.paged import LAYOUTS, CacheSizes, empty_caches
from inductor_passes import LIBRARY_OPTION, decisions
from inductor_passes.pretend_gpu import GPUS, CompiledKernel, Generated, compile_with_triton, generate, pretend_gpu
from lowered_attn.compile import backend

OPS = torch.ops.lowered_attn
FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, HIDDEN, PAGE_SIZE, PAGES = 8, 2, 128, 256, 16, 64
SLOTS = PAGES * PAGE_SIZE


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight


def norm_and_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm, then RoPE by halves, of x ``[T, H, D]``, in fp32."""
    wide = norm(x, weight)
    left, right = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class Layer(nn.Module):
    """A layer's attention part: projection, qk-norm, RoPE, store, paged attention, gate, projection, residual."""

    def __init__(self, layout: str, cache_dtype: torch.dtype, direct: bool, schedules: bool, **names: Any) -> None:
        super().__init__()
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, bias=False, **bf16)
        self.gate = nn.Linear(HIDDEN, HEADS * DIM, bias=False, **bf16)
        self.out = nn.Linear(HEADS * DIM, HIDDEN, bias=False, **bf16)
        self.weights = nn.ParameterList(torch.empty(n, device="cuda") for n in (HIDDEN, DIM, DIM))
        caches = empty_caches(layout, CacheSizes(PAGES, PAGE_SIZE, KV_HEADS, DIM), cache_dtype, "cuda")
        self.k_cache: Tensor
        self.v_cache: Tensor
        self.scale: Tensor | None
        for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
            self.register_buffer(name, cache)
        self.register_buffer("scale", torch.empty(1, device="cuda") if cache_dtype == FP8 else None)
        self.layout, self.direct, self.schedules, self.names = layout, direct, schedules, names

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *lengths: Tensor) -> Tensor:
        hidden = norm(x, self.weights[0]).to(x.dtype)
        q, k, v = self.qkv(hidden).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q = norm_and_rope(q, self.weights[1], cos, sin)
        k = norm_and_rope(k, self.weights[2], cos, sin)
        OPS.store_kv_cache(k, v, self.k_cache, self.v_cache, slots, self.scale, self.scale, layout=self.layout)
        cu_seqlens_q, context_lens, page_tables = lengths
        schedule = None
        if self.schedules:
            schedule = OPS.paged_schedule(
                cu_seqlens_q, context_lens, None, [], num_tokens=q.shape[0], num_heads=HEADS, num_kv_heads=KV_HEADS,
                head_dim=DIM, page_size=PAGE_SIZE, dtype=q.dtype, cache_dtype=self.k_cache.dtype, direct=self.direct,
                layout=self.layout, **self.names,
            )  # fmt: skip
        new = (k, v) if self.direct else (None, None)
        attended, _ = OPS.paged_attention(
            q, *new, self.k_cache, self.v_cache, cu_seqlens_q, context_lens, page_tables, None, [], schedule, None,
            self.scale, self.scale, layout=self.layout, **self.names,
        )  # fmt: skip
        return x + self.out(attended.flatten(1) * torch.sigmoid(self.gate(hidden)))


class Model(nn.Module):
    """Layers whose attention reads what they just stored, or the new keys directly."""

    def __init__(
        self,
        layers: int = 2,
        layout: str = "unified",
        cache_dtype: torch.dtype = torch.bfloat16,
        direct: bool = False,
        schedules: bool = True,
        windows: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        names = [{"window": windows[i]} if windows else {} for i in range(layers)]
        self.layers = nn.ModuleList(Layer(layout, cache_dtype, direct, schedules, **n) for n in names)

    def forward(self, x: Tensor, angles: Tensor, *rest: Tensor) -> Tensor:
        both = torch.cat([angles, angles], -1)[:, None]
        for layer in self.layers:
            x = layer(x, both.cos(), both.sin(), *rest)
        return x


class OneAllocation(Model):
    """Layers whose caches are slices of one tensor."""

    def __init__(self, *order: int) -> None:
        super().__init__(layers=2)
        sizes = (2, 2, PAGES, PAGE_SIZE, KV_HEADS, DIM)
        everything = torch.empty([sizes[i] for i in order], dtype=torch.bfloat16, device="cuda")
        everything = everything.permute([order.index(i) for i in range(6)])
        for layer, caches in zip(self.layers, everything, strict=True):
            layer.k_cache, layer.v_cache = caches


class Attend(nn.Module):
    """One attention call over a cache, with whatever it can be given, its output cast."""

    def __init__(
        self, layout: str = "unified", cache_dtype: torch.dtype = torch.bfloat16, direct: bool = False,
        lse: bool = False, sinks: bool = False, request_values: int = 0, tokens: int = 32,
        to: torch.dtype = torch.bfloat16, **names: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        caches = empty_caches(layout, CacheSizes(PAGES, PAGE_SIZE, KV_HEADS, DIM), cache_dtype, "cuda")
        self.k_cache, self.v_cache = (nn.Buffer(cache) for cache in caches)
        self.scale = nn.Buffer(torch.empty(1, device="cuda")) if cache_dtype == FP8 else None
        self.sinks = nn.Buffer(torch.empty(HEADS, device="cuda")) if sinks else None
        self.direct, self.lse, self.to_dtype, self.names = direct, lse, to, {"layout": layout, **names}
        self.tokens, self.values = tokens, request_values

    def forward(self, projected: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor, page_tables: Tensor) -> Any:
        q, k, v = projected.unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        out, lse = OPS.paged_attention(
            q, k if self.direct else None, v if self.direct else None, self.k_cache, self.v_cache, cu_seqlens_q,
            context_lens, page_tables, None, [context_lens] * self.values, None, self.sinks, self.scale, self.scale,
            **self.names,
        )  # fmt: skip
        out = out.flatten(1).to(self.to_dtype)
        return (out, lse) if self.lse else out


class Store(Layer):
    """Norm and RoPE of q and k and the stores alone, from one projection's output."""

    def forward(self, projected: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = projected.unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        k = norm_and_rope(k, self.weights[2], cos, sin)
        OPS.store_kv_cache(k, v, self.k_cache, self.v_cache, slots, self.scale, self.scale, layout=self.layout)
        return norm_and_rope(q, self.weights[1], cos, sin)


class StoreKeys(Store):
    """The same without q."""

    def forward(self, *arguments: Tensor) -> None:  # type: ignore[override]
        super().forward(*arguments)


def model_inputs(tokens: int = 32, requests: int = 4) -> tuple[Tensor, ...]:
    def int32(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.int32, device="cuda")

    return (
        torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda"),
        torch.empty(tokens, DIM // 2, device="cuda"),
        torch.empty(tokens, dtype=torch.int64, device="cuda"),
        int32(requests + 1), int32(requests), int32(requests, 8),
    )  # fmt: skip


def compiled(
    model: type[nn.Module], arch: str = "sm_90", compile_arguments: dict[str, Any] | None = None, **settings: Any
) -> tuple[Generated, list[decisions.Decision]]:
    """What is generated for a fresh model, and what was decided."""
    with pretend_gpu(arch) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            made: nn.Module
            arguments: tuple[Tensor, ...]
            if model is Model:
                made, arguments = Model(**settings), model_inputs()
            elif model is OneAllocation:
                made, arguments = OneAllocation(*settings["order"]), model_inputs()
            elif model is Attend:
                made = Attend(**settings)
                rows = torch.empty(made.tokens, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device="cuda")
                arguments = (rows, *model_inputs()[3:])
            else:
                made = model(**{"direct": False, "schedules": False, **settings})
                rows = torch.empty(32, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device="cuda")
                turns = torch.empty(32, 1, DIM, device="cuda")
                arguments = (rows, turns, turns, torch.empty(32, dtype=torch.int64, device="cuda"))
        with decisions.recording() as log:
            return generate(made, *arguments, backend=backend, **(compile_arguments or {})), log.records


@functools.cache
def store(layout: str, cache_dtype: torch.dtype, with_q: bool) -> Generated:
    return compiled(Store if with_q else StoreKeys, layout=layout, cache_dtype=cache_dtype)[0]


@functools.cache
def two_layers(layout: str, direct: bool) -> Generated:
    return compiled(Model, "sm_80", layout=layout, direct=direct)[0]


def called(generated: Generated) -> list[str]:
    """Names of the kernels and custom ops that the forward calls, in order; matmuls left out."""
    body = generated.wrapper.split("def call(", 1)[1]
    calls = re.findall(r"(\w+)\.run\(|(?:= |^\s+)torch\.ops\.\w+\.(\w+)", body, re.MULTILINE)
    return [kernel or op for kernel, op in calls]


def is_attention(name: str) -> bool:
    return name == "paged_attention" or name.startswith("triton_tem_")


def template(generated: Generated) -> str:
    """The source of the one attention kernel."""
    (source,) = {source for source in generated.kernels.values() if "tl.dot" in source}
    return source


def stores(source: str) -> list[tuple[str, str]]:
    """(address, mask) of every ``tl.store`` of a generated kernel."""
    return re.findall(r"tl\.store\((.*), \w+, (.*)\)", source)


def meaning(mask: str, source: str) -> str:
    """A mask with its temporaries spelled out, down to what is loaded."""
    lines = dict(re.findall(r"^ *(tmp\d+) = (.*)$", source, re.MULTILINE))
    for _ in range(4):
        mask = re.sub(r"tmp\d+", lambda m: m[0] if "tl.load" in lines[m[0]] else f"({lines[m[0]]})", mask)
    return mask


on_layouts = pytest.mark.parametrize("layout", LAYOUTS)
on_caches = pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])


@on_layouts
@on_caches
@pytest.mark.parametrize("with_q", [False, True], ids=["k", "q and k"])
def test_norm_rope_and_both_stores_are_one_launch(layout: str, cache_dtype: torch.dtype, with_q: bool) -> None:
    made = store(layout, cache_dtype, with_q)
    assert len(called(made)) == 1 and len(made.kernels) == 1, called(made)


@on_layouts
@on_caches
def test_stores_into_the_caches_are_masked_by_the_slot(layout: str, cache_dtype: torch.dtype) -> None:
    (source,) = store(layout, cache_dtype, True).kernels.values()
    masked = [meaning(mask, source) for _, mask in stores(source) if "tmp" in mask]
    assert len(stores(source)) == 3 and len(masked) == 2  # q's rows are all written
    for mask in masked:
        assert re.search(r"tmp\d+ >= \(tl\.full\(.*?, 0, tl\.int64\)\)", mask), mask
        assert re.search(rf"tmp\d+ < \(tl\.full\(.*?, {SLOTS}, tl\.int64\)\)", mask), mask
    assert "device_assert" not in source  # slots that are not written need no check
    assert f"+ {SLOTS}" not in source  # -1 does not wrap around to the last slot


@on_layouts
@on_caches
def test_a_slot_is_loaded_once_a_row(layout: str, cache_dtype: torch.dtype) -> None:
    """Not once more for every element of k and v, inside the mask."""
    (source,) = store(layout, cache_dtype, True).kernels.values()
    (slots,) = re.findall(r"'(\w+)': '\*i64'", source)
    (load,) = re.findall(rf"tl\.load\({slots} .*", source)
    assert "broadcast_to" not in load, load


@on_layouts
@on_caches
def test_the_store_compiles_without_spills(layout: str, cache_dtype: torch.dtype) -> None:
    """Inductor's autotuner drops the tilings that spill: one must remain."""
    (source,) = store(layout, cache_dtype, True).kernels.values()
    with pretend_gpu("sm_90"):
        kernels = compile_with_triton(source)
    assert any(spills(kernel) == 0 for kernel in kernels), [kernel.log for kernel in kernels]


def spills(kernel: CompiledKernel) -> int:
    (count,) = re.findall(r"(\d+) bytes spill stores", kernel.log)
    return int(count)


@on_layouts
@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
def test_no_cache_is_copied(layout: str, direct: bool) -> None:
    assert_no_cache_is_copied(two_layers(layout, direct))


@pytest.mark.parametrize(
    ("order", "launches"),
    [((0, 1, 2, 3, 4, 5), 2), ((1, 0, 2, 3, 4, 5), 2), ((0, 2, 1, 3, 4, 5), 3)],
    ids=["K and V of a layer", "layers of K and of V", "K and V of a page"],
)
def test_caches_of_one_allocation_are_not_copied(order: tuple[int, ...], launches: int) -> None:
    """Where K and V take turns page by page their stores write one buffer, one after the other: a launch more."""
    made, _ = compiled(OneAllocation, "sm_80", order=order)
    assert_no_cache_is_copied(made)
    assert called(made).index("paged_schedule") == launches


def assert_no_cache_is_copied(made: Generated) -> None:
    body = made.wrapper.split("def call(", 1)[1].split("def get_args", 1)[0]
    assert "clone" not in body and "copy_(" not in body
    for shape, dtype in re.findall(r"empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), (torch\.\w+)\)", body):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        assert dtype != "torch.bfloat16" or torch.Size(sizes).numel() < SLOTS * KV_HEADS * DIM, shape


@on_layouts
@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
def test_a_layer_is_one_launch_between_projection_and_attention(layout: str, direct: bool) -> None:
    names = called(two_layers(layout, direct))
    norm_kernel, store_kernel = names[:2]
    attention = [name for name in names if is_attention(name)]
    assert names == [norm_kernel, store_kernel, "paged_schedule", attention[0], norm_kernel, store_kernel, attention[1]]


def test_dynamic_row_counts_fuse_as_well() -> None:
    made, _ = compiled(Store, layout="unified", cache_dtype=torch.bfloat16, compile_arguments={"dynamic": True})
    assert len(called(made)) == 1


def test_the_user_decides_on_combo_kernels() -> None:
    options = {"options": {"combo_kernels": False}}
    made, _ = compiled(Store, layout="unified", cache_dtype=torch.bfloat16, compile_arguments=options)
    assert len(called(made)) == 2


def test_an_fp8_cache_that_torch_cannot_write_is_refused() -> None:
    with pytest.raises(Exception, match="k_cache: expected a 16-bit cache below sm_89, got float8_e4m3fn"):
        compiled(StoreKeys, "sm_80", layout="unified", cache_dtype=FP8)


@pytest.mark.parametrize("order", [None, (0, 1, 2, 3, 4, 5)], ids=["apart", "one allocation"])
def test_cuda_graphs_take_the_caches(order: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor skips CUDA graphs where a graph writes an input that may move; buffers of a module are static."""
    from torch._inductor.output_code import CompiledFxGraph

    seen: list[CompiledFxGraph] = []
    post_compile = CompiledFxGraph.post_compile

    def keep(self: CompiledFxGraph, *arguments: Any) -> None:
        seen.append(self)
        post_compile(self, *arguments)

    monkeypatch.setattr(CompiledFxGraph, "post_compile", keep)
    if order is None:
        compiled(Model)
    else:
        compiled(OneAllocation, order=order)
    (graph,) = seen
    mutated, static = set(graph.mutated_input_idxs), set(graph.fx_kwargs["static_input_idxs"])
    assert mutated and mutated <= static
    assert graph.disabled_cudagraphs_reason is None


@pytest.mark.parametrize("schedules", [False, True], ids=["none given", "one a layer"])
def test_three_layers_share_one_schedule(schedules: bool) -> None:
    names = called(compiled(Model, layers=3, schedules=schedules)[0])
    assert names.count("paged_schedule") == 1


def test_layers_with_another_window_have_a_schedule_of_their_own() -> None:
    names = called(compiled(Model, layers=3, windows=(0, 64, 64))[0])
    assert names.count("paged_schedule") == 2


# ---------------------------------------------------------------------- attention


PORTABLE = {"options": {LIBRARY_OPTION: False}}


@on_layouts
@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_gate_is_an_epilogue_of_attention(layout: str, direct: bool, dynamic: bool) -> None:
    settings = {"layers": 1, "layout": layout, "direct": direct}
    made, records = compiled(Model, "sm_80", {"dynamic": dynamic}, **settings)
    assert len(called(made)) == 4 and is_attention(called(made)[-1]), called(made)
    source = template(made)
    in_loop = source.split("while unit < end_unit:", 1)[1].split("unit += end - first", 1)[0]
    assert "tl.sigmoid" in in_loop and in_loop.count("tl.store(") == 1
    (decision,) = [d for d in records if d.op == "paged_attention" and d.stage == "lowered"]
    assert decision.stage == "lowered" and decision.facts["kernel"] == "triton_paged"


def test_a_cast_to_fp8_is_an_epilogue_of_attention() -> None:
    made, _ = compiled(Attend, "sm_90", PORTABLE, to=FP8)
    assert called(made)[0] == "paged_schedule" and len(called(made)) == 2
    assert "tl.float8e4nv" in template(made)


@pytest.mark.parametrize("lse", [False, True], ids=["lse unread", "lse read"])
def test_lse_is_written_where_it_is_read(lse: bool) -> None:
    source = template(compiled(Attend, "sm_80", lse=lse)[0])
    assert ("tl.store(LSE" in source) == lse == ("arg_LSE" in source)


OPERANDS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": True},
    "softcap": {"softcap": 30.0},
    "scale": {"scale": 0.5},
    "window": {"window": 64},
    "plain": {"mode": "plain"},
    "block": {"mode": "block_causal", "block_size": 32},
    "prefix": {"mode": "prefix_full", "block_size": 4, "request_values": 3},
    "hole": {"mode": "block_causal", "block_size": 4, "prefix_hole": True, "request_values": 2},
    "cache only": {"mode": "cache_only", "direct": True},
    "a program a head": {"impl": "triton"},
    "fp8": {"cache_dtype": FP8},
    "fp8 distinct direct": {"cache_dtype": FP8, "layout": "distinct", "direct": True},
}


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_every_operand_has_a_template_that_compiles(operands: dict[str, Any]) -> None:
    made, _ = compiled(Attend, "sm_90", PORTABLE, **operands)
    assert called(made)[0] == "paged_schedule" and [is_attention(name) for name in called(made)[1:]] == [True]
    with pretend_gpu("sm_90"):
        (kernel,) = compile_with_triton(template(made))
    assert kernel.shared_memory <= GPUS["sm_90"].shared_memory_per_block_optin


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tokens", [4, 32], ids=["decode", "chunk"])
def test_attention_compiles_without_spills(arch: str, tokens: int) -> None:
    made, _ = compiled(Attend, arch, PORTABLE, tokens=tokens)
    with pretend_gpu(arch):
        (kernel,) = compile_with_triton(template(made))
    assert spills(kernel) == 0


def test_without_library_kernels_schedule_and_attention_are_portable() -> None:
    made, records = compiled(Model, "sm_90", PORTABLE, layers=2)
    assert called(made).count("paged_schedule") == 1 and "paged_attention" not in called(made)
    assert "impl='triton_portable'" in made.wrapper
    attention = [d for d in records if d.op == "paged_attention" and d.stage == "lowered"]
    assert {d.facts["impl"] for d in attention} == {"triton_portable"}
