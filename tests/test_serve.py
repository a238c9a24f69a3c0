"""The serving loop: pages, scheduling, and tokens equal to those of a model that recomputes everything every time."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.serve import __main__ as command
from tools.serve import whole_step
from tools.serve.autoregressive import Autoregressive, with_confidence
from tools.serve.block_diffusion import MODES, BlockDiffusion
from tools.serve.dense import MaskRules, visible
from tools.serve.loop import Server, ServeSettings
from tools.serve.model import SIZES, CacheConfig, Decoder, ModelConfig, with_attention
from tools.serve.pages import PageAllocator
from tools.serve.scheduler import Scheduler, Strategy, make_buckets, random_requests
from tools.serve.shares import kind_of
from tools.serve.step import Bucket, Chunk, PackedTensors, Request, Step, StepTensors, smallest

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
BLOCK = 4
MASK_TOKEN = TINY.vocab - 1


# ---------------------------------------------------------------------- pages and step tensors


def test_pages_are_handed_out_once_and_come_back() -> None:
    allocator = PageAllocator(8, seed=1)
    first, second = allocator.take(5), allocator.take(3)
    assert sorted(first + second) == list(range(8)) and allocator.free == 0
    with pytest.raises(RuntimeError, match="expected 1 free ones, got 0 of 8"):
        allocator.take(1)
    allocator.give_back(first)
    assert allocator.free == 5 and allocator.taken == frozenset(second)
    for wrong in (first[:1], second[:1] * 2):
        with pytest.raises(ValueError, match="expected pages in use, each once"):
            allocator.give_back(wrong)
    allocator.rename([7 - page for page in range(8)])
    assert allocator.taken == frozenset(7 - page for page in second)
    assert set(allocator.take(5)) == {7 - page for page in first}


def test_packed_tensors_are_apart_aligned_and_no_views() -> None:
    packed = PackedTensors({"a": (torch.int32, (3,)), "b": (torch.int64, (2, 5)), "c": (torch.int32, ())}, CPU)
    packed.host["a"].fill_(7)
    packed.host["b"].copy_(torch.arange(10).view(2, 5))
    packed.host["c"].fill_(9)
    assert not packed.device["b"].any()
    packed.upload()
    for name, tensor in packed.device.items():
        assert torch.equal(tensor, packed.host[name])
        assert tensor.data_ptr() % 16 == 0 and not tensor._is_view()
    assert packed.device["b"].is_contiguous()


def test_a_step_is_written_down_as_the_ops_read_it() -> None:
    cache = CacheConfig(pages=10, page_size=4, max_pages=3)
    decoding = Request(0, [], 1, cached=5, pages=[7, 2], table_row=1)
    fresh = Request(1, [], 1, cached=0, pages=[4], table_row=0)
    parts = [
        (decoding, Chunk(5, [50], 1, 1, range(1), True)),
        (fresh, Chunk(0, [60, 61, 62], 2, 3, range(2, 3), False, prefix=2, padded_prefix=4)),
    ]
    tables = torch.tensor([[4, -1, -1], [7, 2, -1]], dtype=torch.int32)
    tensors = StepTensors(Bucket(6, 3, 3), cache, CPU)
    tensors.fill(Step(parts, tensors.bucket), tables)
    found = {name: t.tolist() for name, t in tensors.on_device.items()}
    assert found == {
        "tokens": [50, 60, 61, 62, 0, 0],
        "positions": [5, 0, 1, 2, 0, 0],
        "slot_mapping": [2 * 4 + 1, 4 * 4, 4 * 4 + 1, -1, -1, -1],
        "logit_rows": [0, 3, 0],
        "cu_seqlens_q": [0, 1, 4, 4],
        "context_lens": [5, 0, 0],
        "page_tables": [[7, 2, -1], [4, -1, -1], [-1, -1, -1]],
        "valid_lens": [1, 3, 0],
        "status": [1, 0, 0],
        "prefix_lens": [0, 2, 0],
        "padded_prefix_lens": [0, 4, 0],
    }
    assert Step(parts, tensors.bucket).kinds == (1, 1, 0)
    tensors.fill(None)
    assert tensors.on_device["slot_mapping"].tolist() == [-1] * 6
    assert not tensors.on_device["cu_seqlens_q"].any() and bool((tensors.on_device["page_tables"] == -1).all())


def test_the_smallest_bucket_that_fits_is_taken() -> None:
    buckets = [Bucket(4, 4, 4), Bucket(16, 4, 4), Bucket(8, 8, 8)]
    assert smallest(buckets, 3, 3, 3) == Bucket(4, 4, 4)
    assert smallest(buckets, 5, 2, 1) == Bucket(8, 8, 8)
    assert smallest(buckets, 9, 4, 4) == Bucket(16, 4, 4)
    with pytest.raises(ValueError, match="add a larger bucket"):
        smallest(buckets, 9, 5, 1)


# ---------------------------------------------------------------------- scheduling


def strategies() -> list[Strategy]:
    return [Autoregressive(), *(BlockDiffusion(MASK_TOKEN, m, BLOCK, 2, hole) for m in MODES for hole in (False, True))]


def named(strategy: Strategy) -> str:
    if isinstance(strategy, BlockDiffusion):
        return strategy.mode + "-hole" * strategy.prefix_hole
    return strategy.name


@pytest.mark.parametrize("strategy", strategies(), ids=named)
def test_scheduler_serves_everyone_within_its_limits(strategy: Strategy) -> None:
    """Random tokens in place of a model: no page is shared, nothing outgrows a bucket, everything is given back."""
    cache = CacheConfig(pages=40, page_size=4, max_pages=16)  # too few for all at once: some must wait
    rows = 16 if strategy.name == "ar" else 48  # few enough that prompts are read in chunks
    scheduler = Scheduler(strategy, cache, make_buckets(strategy, 6, rows), seed=3)
    draw = random.Random(5)
    requests = random_requests(20, MASK_TOKEN, (1, 30), (1, 20), every=0.5, seed=2)
    for request in requests:
        scheduler.add(request)
    most, kinds = 0, [0, 0, 0]
    for now in range(2000):
        step = scheduler.next_step(now)
        if step is None:
            if not scheduler.waiting:
                break
            continue
        assert all(request.arrival <= now for request, _ in step.parts)
        assert step.n_tokens <= step.bucket.tokens and len(step.parts) <= step.bucket.requests
        pages = [page for request in scheduler.running for page in request.pages]
        assert len(set(pages)) == len(pages) and set(pages) == scheduler.allocator.taken
        for request, chunk in step.parts:
            table = scheduler.page_tables[request.table_row].tolist()
            assert table == request.pages + [-1] * (cache.max_pages - len(request.pages))
            assert len(request.pages) * cache.page_size >= chunk.first + chunk.store
            assert len(request.pages) <= request.reserved
        most, kinds = max(most, len(step.parts)), [a + b for a, b in zip(kinds, step.kinds, strict=True)]
        wanted = sum(len(chunk.logit_rows) for _, chunk in step.parts)
        rows = [(draw.randrange(MASK_TOKEN), draw.random()) for _ in range(wanted)]
        scheduler.complete(step, torch.tensor(rows, dtype=torch.float64).view(wanted, 2))
    assert sorted(r.name for r in scheduler.finished) == list(range(20))
    assert all(len(r.generated) == r.max_new_tokens and r.cached <= strategy.total_tokens(r) for r in requests)
    assert scheduler.allocator.free == cache.pages and bool((scheduler.page_tables == -1).all())
    assert most >= 5 and kinds[0] and kinds[1]
    if named(strategy) not in ("prefix_full", "prefix_full-hole"):
        assert kinds[2], "some prompt was read in chunks"


def test_requests_that_can_never_run_are_refused() -> None:
    cache = CacheConfig(pages=8, page_size=4, max_pages=4)
    scheduler = Scheduler(Autoregressive(), cache, [Bucket(8, 2, 2)])
    scheduler.add(Request(0, [1] * 8, 9))
    with pytest.raises(ValueError, match="request 1: expected a prompt and new tokens that fit 4 pages of 4"):
        scheduler.add(Request(1, [1] * 8, 10))
    full = Scheduler(BlockDiffusion(MASK_TOKEN, "prefix_full", BLOCK), cache, [Bucket(8, 1, 4)])
    with pytest.raises(ValueError, match="expected a prompt that fits a step of 8 rows, got 12 tokens"):
        full.add(Request(2, [1] * 12, 1))


def test_block_diffusion_unmasks_the_surest_and_commits_whole_blocks() -> None:
    strategy = BlockDiffusion(MASK_TOKEN, "block_causal", BLOCK, 2)
    request = Request(0, [1, 2, 3, 4, 5], 6)
    strategy.start(request)
    first = strategy.chunk(request, 100)
    assert first is not None and (first.tokens, first.store, first.decoding) == ([1, 2, 3, 4], 4, False)
    strategy.advance(request, first, torch.empty(0, 2, dtype=torch.float64))
    block = strategy.chunk(request, 100)
    assert block is not None
    assert (block.tokens, block.store, block.valid) == ([5, *[MASK_TOKEN] * 3], 0, 4)
    strategy.advance(request, block, torch.tensor([[9, 1.0], [10, 0.1], [11, 0.5], [12, 0.4]], dtype=torch.float64))
    assert request.block == [5, None, 11, 12] and request.cached == 4 and not request.generated
    strategy.advance(request, block, torch.tensor([[9, 1.0], [20, 0.1], [21, 0.5], [22, 0.4]], dtype=torch.float64))
    assert request.generated == [20, 11, 12] and request.block == [None] * 3
    both = strategy.chunk(request, 100)  # the finished block enters the cache beside the next one, which is short
    assert both is not None and both.tokens == [5, 20, 11, 12, *[MASK_TOKEN] * 4]
    assert (both.first, both.store, both.valid, both.logit_rows) == (4, 4, 7, range(4, 7))
    assert strategy.chunk(request, 7) is None
    for wrong in ({"mode": "plain"}, {"denoise_steps": 5}):
        with pytest.raises(ValueError, match=r"expected (one of|1 to 4)"):
            BlockDiffusion(MASK_TOKEN, block_size=BLOCK, **wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- tokens, against full recomputation


class FullAttention(nn.Module):
    """Plain attention over one whole sequence, with the mask that stands in `masks`."""

    def __init__(self, masks: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.masks, self.scale = masks, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.masks["mask"], scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1)


class Recompute:
    """The same weights, run over the whole sequence for every token: no cache, no pages, no batch."""

    def __init__(self, model: Decoder) -> None:
        self.masks: dict[str, Tensor] = {}

        def attention(config: ModelConfig, layer: int) -> nn.Module:
            return FullAttention(self.masks, 1 / math.sqrt(config.head_dim))

        self.model = with_attention(model, attention)

    def logits(self, tokens: list[int], mask: Tensor) -> Tensor:
        self.masks["mask"] = mask
        rows = torch.arange(len(tokens))
        return self.model(torch.tensor(tokens), rows, rows)

    def autoregressive(self, request: Request) -> list[int]:
        tokens = list(request.prompt)
        for _ in range(request.max_new_tokens):
            mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            tokens.append(int(self.logits(tokens, mask)[-1].argmax()))
        return tokens[len(request.prompt) :]

    def block_diffusion(self, request: Request, strategy: BlockDiffusion) -> list[int]:
        block, n = strategy.block_size, len(request.prompt)
        hole = strategy.prefix_hole
        prefix = n if hole else n // block * block
        padded = -(-prefix // block) * block
        tokens = request.prompt[:prefix] + [MASK_TOKEN] * (padded - prefix)
        rest = request.prompt[prefix:]
        total = padded + len(rest) + request.max_new_tokens
        while len(tokens) < total:
            work: list[int | None] = [*rest, *[None] * (block - len(rest))]
            work, rest = work[: total - len(tokens)], []
            while None in work:
                known = tokens + [MASK_TOKEN if token is None else token for token in work]
                mask = self.mask(len(known), block, prefix, padded, strategy.mode, hole)
                chosen = with_confidence(self.logits(known, mask)[len(tokens) :], MASK_TOKEN)
                strategy.unmask(work, chosen[:, 0].long().tolist(), chosen[:, 1].tolist())
            tokens += [token for token in work if token is not None]
        return tokens[-request.max_new_tokens :]

    @staticmethod
    def mask(size: int, block: int, prefix: int, padded: int, mode: str, hole: bool) -> Tensor:
        """Row by row in plain Python: who sees whom, prompt rows as they were when they were read."""
        rows = []
        for a in range(size):
            own_block = [b // block <= a // block for b in range(size)]
            if a >= padded:
                row = [own_block[b] and not (hole and prefix <= b < padded) for b in range(size)]
            elif mode == "block_causal":
                row = own_block
            elif mode == "prefix_causal":
                row = [b <= a for b in range(size)]
            else:
                row = [b < (prefix if a < prefix else padded) for b in range(size)]
            rows.append(row)
        return torch.tensor(rows)


def serve_and_compare(strategy: Strategy, compiled: bool, **changes: object) -> Server:
    """Serve a few requests to their end; tokens must be those of full recomputation, logits within the tolerance."""
    settings = ServeSettings(TINY, CPU, torch.float32, max_requests=4, max_rows=32, bucket_sizes=0, page_size=4,
                             max_tokens=64, compiled=compiled, seed=11)  # fmt: skip
    server = Server(dataclasses.replace(settings, **changes), strategy)  # type: ignore[arg-type]
    server.warm_up()
    for request in random_requests(7, MASK_TOKEN, (3, 26), (3, 13), every=1.0, seed=4):
        server.scheduler.add(request)
    now, kinds = 0, [0, 0, 0]
    while server.scheduler.waiting or server.scheduler.running:
        report = server.step(now)
        now += 1
        if report is not None:
            assert report.error is None or report.error.within, report.error
            kinds = [a + b for a, b in zip(kinds, report.step.kinds, strict=True)]
    assert kinds[0] and kinds[1]
    assert server.watch.problems(len(server.tensors)) == []
    recompute = Recompute(server.model)
    for request in server.scheduler.finished:
        if isinstance(strategy, BlockDiffusion):
            expected = recompute.block_diffusion(request, strategy)
        else:
            expected = recompute.autoregressive(request)
        assert request.generated == expected, request.name
    distinct = {token for request in server.scheduler.finished for token in request.generated}
    assert len(server.scheduler.finished) == 7 and len(distinct) > 10  # nothing degenerate was compared
    return server


@pytest.mark.parametrize("strategy", [Autoregressive(new_keys_in_cache=False), *strategies()], ids=named)
def test_tokens_are_those_of_full_recomputation(strategy: Strategy) -> None:
    serve_and_compare(strategy, compiled=False)


@pytest.mark.parametrize(
    "strategy", [Autoregressive(), BlockDiffusion(MASK_TOKEN, "prefix_full", BLOCK, 2, True)], ids=named
)
def test_compiled_tokens_are_those_of_full_recomputation(strategy: Strategy) -> None:
    torch.compiler.reset()
    server = serve_and_compare(strategy, compiled=True)
    assert server.watch.total.compiles == len(server.tensors) == 1


def test_a_tied_head_uses_the_embedding() -> None:
    tied = dataclasses.replace(TINY, tied=True)
    server = Server(
        ServeSettings(tied, CPU, torch.float32, max_requests=2, max_rows=8, compiled=False), Autoregressive()
    )
    assert server.model.head is None
    server.scheduler.add(Request(0, [1, 2, 3], 2))
    report = server.step()
    assert report is not None and report.error is not None and report.error.within


# ---------------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize("mistake", ["context_lens", "page_tables", "positions"])
def test_logits_that_are_a_little_wrong_are_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key less, a page of another request or a position off by one, for the served model only."""
    settings = ServeSettings(TINY, CPU, torch.float32, max_requests=2, max_rows=32, page_size=4, compiled=False)
    server = Server(settings, Autoregressive(new_keys_in_cache=False))
    for request in random_requests(2, MASK_TOKEN, (12, 20), (9, 9), every=0.0, seed=1):
        server.scheduler.add(request)
    good = [report.error for _ in range(3) if (report := server.step()) and report.error]
    assert good and all(error.within for error in good)
    run = server._run

    def tampered(bucket: Bucket) -> Tensor:
        served = server.tensors[bucket].on_device[mistake]
        kept = served.clone()
        if mistake == "page_tables":
            served[1, 0] = served[0, 0]
        else:
            served[0] += -1 if mistake == "context_lens" else 1
        logits = run(bucket)
        served.copy_(kept)
        return logits

    monkeypatch.setattr(server, "_run", tampered)
    report = server.step()
    assert report is not None and report.error is not None and not report.error.within
    assert report.error.of_allowed > 100


def test_nan_is_never_within_the_tolerance() -> None:
    from tools.serve.check import LogitsError

    assert not LogitsError(math.nan, 0.1, 1.0).within


def test_rules_are_those_of_the_mask_language() -> None:
    """Two ways to write the same modes down, over every small request."""
    from custom_ops.paged.masks import MODES as PAGED_MODES
    from custom_ops.paged.masks import paged_mask

    draw = random.Random(0)
    for mode in PAGED_MODES:
        for _ in range(40):
            c, n, block = draw.randint(0, 9), draw.randint(1, 9), draw.randint(1, 4)
            hole, window, status = draw.random() < 0.5, draw.choice((None, 3)), draw.randint(0, 1)
            valid, prefix = draw.randint(0, n), draw.randint(0, c + n)
            padded = prefix + draw.randint(0, block)
            rules = MaskRules(mode, block, hole, window)
            mask = paged_mask(mode, block_size=block, window=window, prefix_hole=hole)
            values = {"context": c, "valid": valid, "status": status, "prefix": prefix, "padded_prefix": padded}
            a, b = torch.arange(c, c + n), torch.arange(c + n)
            operands = {o.name: torch.tensor([values[o.name]]) for o in mask.operands}
            expected = mask.dense(a, b, operands)[0] & (a - c < valid)[:, None]
            numbers = (torch.tensor(values[name]) for name in values)
            found = visible(a[:, None], b[None], *numbers, rules)
            assert torch.equal(found, expected), (rules, values, n)


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "triton_tem_fused_paged_attention_view_3": "attention",
        "paged_forward_kernel": "attention",
        "lowered_attn::paged_attention": "attention",
        "lowered_attn::store_kv_cache": "rest",
        "schedule_kernel": "schedule",
        "nvjet_tst_128x64_64x8_2x1_v_bz_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64": "matmul",
        "triton_red_fused__to_copy_add_mean_mm_mul_rsqrt_2": "rest",
        "triton_poi_fused_paged_attention_store_kv_cache_5": "rest",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_command_reports_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status tells scripts what the last line tells people."""
    arguments = ["--requests", "3", "--prompt", "3", "9", "--new", "2", "5", "--max-requests", "4", "--max-rows", "32",
                 "--buckets", "0", "--report-every", "4", "--page-size", "4", "--max-tokens", "64"]  # fmt: skip
    torch.compiler.reset()
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 requests finished" in printed and "All is well" in printed and "Attention takes" in printed
    monkeypatch.setattr("tools.serve.check.ERROR_RATIO", 0.0)
    monkeypatch.setattr("tools.serve.check.FLOOR", 0.0)
    torch.compiler.reset()
    assert command.main([*arguments, "--steps", "4"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: step" in printed and "Something is wrong" in printed


def test_whole_step_says_where_the_time_goes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "whole" / "step.json"
    sizes = "--batch 3 --context 20 --chunks 1 --chunk-tokens 5 --page-size 4 --layers 1"
    arguments = ["--device", "cpu", "--size", "tiny", "--repeats", "2", "--only", "mixed", "--output", str(output)]
    arguments += sizes.split()
    torch.compiler.reset()
    assert whole_step.main(arguments) == 0
    (figures,) = json.loads(output.read_text())["steps"]
    assert (figures["name"], figures["rows"], figures["requests"]) == ("mixed", 7, 3) and not figures["wrong"]
    assert figures["us_by_kind"]["attention"] > 0 and figures["us_by_kind"]["schedule"] > 0
    assert sum(figures["us_by_kind"].values()) == pytest.approx(1e3 * figures["kernels_ms"], rel=0.01)
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "neither matmul nor attention" in printed
