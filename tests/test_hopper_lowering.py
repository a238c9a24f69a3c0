"""Which dense calls the compiler hands to the Hopper kernel, as one opaque call, and why not: on pretended GPUs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache

pytest.importorskip("triton", reason="pretending to be a GPU compiles with Triton")

from custom_ops.forms import FORMS
from inductor_passes import LIBRARY_OPTION, QUERIES_OPTION, decisions, hopper, pretend_parts
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn import aoti_compile_and_package
from lowered_attn.compile import backend
from lowered_attn.explain import Explanation
from tests.helpers import Case, make
from tests.hopper import chosen
from tests.test_paged_codegen import called

OPS = torch.ops.lowered_attn
OP = "grouped_attention"
BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(384, 384), dims=(128, 128), band=300)


@pytest.fixture(autouse=True)
def whichever_is_faster() -> Iterator[None]:
    with chosen("gluon"):
        yield


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def heads_of(*counts: int, dim: int = 128, length: int = 384) -> list[Tensor]:
    """q, k, v, ... ``[2, heads, length, dim]``, token-major."""
    return [empty(2, length, count, dim).transpose(1, 2) for count in counts]


def compiled(
    attend: Callable[..., Any], inputs: Callable[[], list[Tensor]], arch: str = "sm_90", **keywords: Any
) -> tuple[Generated, list[decisions.Decision]]:
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            arguments = inputs()
        with decisions.recording() as log:
            return generate(attend, *arguments, backend=backend, **keywords), log.records


def compiled_case(
    case: Case, arch: str = "sm_90", with_lse: bool = True, **keywords: Any
) -> tuple[Generated, decisions.Decision]:
    """What is generated for a case's op, its numbers constants of the code, and how it was lowered."""
    numbers: dict[str, Any] = {}
    names: list[str] = []

    def inputs() -> list[Tensor]:
        call = make(case, "cuda")
        names.extend(name for name, value in call.operands.items() if isinstance(value, Tensor))
        numbers.update({name: value for name, value in call.operands.items() if name not in names}, **call.keywords)
        return [*call.qkv, *(call.operands[name] for name in names)]  # type: ignore[list-item]

    def attend(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = FORMS[case.form].op(q=q, k=k, v=v, **dict(zip(names, tensors, strict=True)), **numbers)
        return (out, lse) if with_lse else out

    generated, records = compiled(attend, inputs, arch, **keywords)
    (decision,) = [d for d in records if d.stage == "lowered"]
    return generated, decision


def changed(**changes: Any) -> Case:
    return dataclasses.replace(BASE, **changes)


TAKEN = {
    **{name: changed(form=name) for name in FORMS},
    "padding": changed(padding="some"),
    "padding and starts": changed(form="sliding_self", padding="some", q_start=True),
    "soft-cap": changed(softcap=30.0),
    "DeepSeek's prefill": changed(dims=(192, 128), heads=(8, 8)),
    "head dim 64": changed(dims=(64, 64), dtype=torch.float16),
    "head dim 256": changed(dims=(256, 256)),
    "shared values": changed(value_heads=1, heads=(8, 4)),
    "ragged": changed(lengths=(131, 131)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TAKEN)
def test_the_call_is_one_op_and_nothing_is_copied(name: str, dynamic: bool) -> None:
    generated, decision = compiled_case(TAKEN[name], dynamic=dynamic)
    assert called(generated) == [OP] and not generated.kernels
    assert decision.facts["kernel"] == "gluon_dense" and decision.facts["against_hopper"] == []
    assert decision.facts["writes_lse"] and "gluon" in decision.facts["predicted_us"]  # type: ignore[operator]
    assert decision.detail.startswith("the Hopper kernel, called as an op, into which Inductor fuses nothing; ")


KEPT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "head dim 48": ({"dims": (48, 48)}, {}, "head_dim: expected a multiple of 8 from 64 to 256, got 48"),
    "fp32": ({"dtype": torch.float32}, {}, "q: expected bfloat16 or float16, got torch.float32"),
    "few queries": ({"lengths": (127, 127)}, {}, "queries: expected at least 128, got 127"),
    "few queries, dynamic": ({"lengths": (127, 127)}, {"dynamic": True}, "queries: expected at least 128, got 127"),
    "narrow window": ({"band": 100}, {}, "window: expected at least 128 keys a query, got 100"),
    "Ampere": ({}, {"arch": "sm_80"}, "architecture: expected 90 (Hopper), got 80"),
    "Blackwell": ({}, {"arch": "sm_100"}, "architecture: expected 90 (Hopper), got 100"),
    "switched off": ({}, {"options": {LIBRARY_OPTION: False}}, "library_kernels: expected True, got False"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_calls_keep_the_template_and_say_why(name: str) -> None:
    changes, keywords, reason = KEPT[name]
    generated, decision = compiled_case(changed(form="sliding_self", **changes), **keywords)
    assert OP not in called(generated) and any("tl.dot" in source for source in generated.kernels.values())
    assert decision.facts["kernel"] == "triton_grouped" and decision.facts["against_hopper"] == [reason]
    on_hopper = keywords.get("arch", "sm_90") == "sm_90"
    assert decision.detail.endswith(f"; not the Hopper kernel: {reason}") == on_hopper, decision.detail


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.full_self(q, k, v)[0]


UNREADABLE: dict[str, Callable[[], list[Tensor]]] = {
    "rows off by 8 bytes": lambda: [*heads_of(8, 2), empty(2, 384, 2, 132).transpose(1, 2)[..., :128]],
    "every head the same": lambda: [*heads_of(8, 2), heads_of(1)[0].expand(-1, 2, -1, -1)],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_the_copy_engine_cannot_read_keeps_the_template(name: str) -> None:
    generated, records = compiled(attended, UNREADABLE[name])
    assert [source for source in generated.kernels.values() if "tl.dot" in source] and OP not in called(generated)
    (decision,) = [d for d in records if d.stage == "lowered"]
    assert decision.facts["against_hopper"] == [
        "q, k and v: expected addresses and strides that are multiples of 16 bytes, and none of 0"
    ]


READABLE: dict[str, Callable[[], list[Tensor]]] = {
    "token-major": lambda: heads_of(8, 2, 2),
    "head-major": lambda: [empty(2, heads, 384, 128) for heads in (8, 2, 2)],
    "slices of one projection": lambda: list(empty(2, 384, 12, 128).transpose(1, 2).split([8, 2, 2], 1)),
    "columns of wider rows": lambda: [empty(2, 384, heads, 136).transpose(1, 2)[..., 8:] for heads in (8, 2, 2)],
    "one request": lambda: [t[:1] for t in heads_of(8, 2, 2)],
}


@pytest.mark.parametrize("name", READABLE)
def test_what_it_can_read_is_read_where_it_lies(name: str) -> None:
    generated, _ = compiled(attended, READABLE[name])
    assert called(generated) == [OP] and not generated.kernels


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_projections_are_read_where_they_lie_and_heads_merged_without_a_copy(dynamic: bool) -> None:
    def layer(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (x @ weight).unflatten(-1, (12, 64)).split([8, 2, 2], 2))
        return attended(q, k, v).transpose(1, 2).flatten(2) @ out

    generated, _ = compiled(layer, lambda: [empty(2, 384, 512), empty(512, 768), empty(512, 512)], dynamic=dynamic)
    assert called(generated) == [OP] and not generated.kernels
    assert generated.wrapper.count("extern_kernels.mm(") == 2


def test_what_is_around_the_call_is_in_kernels_of_its_own_and_explain_says_so() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q * 2, k * 2, v).tanh().transpose(1, 2).flatten(2)

    generated, records = compiled(layer, lambda: heads_of(8, 2, 2), options={QUERIES_OPTION: True})
    names = called(generated)
    assert names.index(OP) == 2 and len(names) == 4, names
    assert not [d for d in records if d.stage == "fused"]
    printed = str(Explanation(tuple(records), {}, (), "cuda"))
    alone = 'stays a kernel of its own: Inductor fuses nothing into the Hopper kernel; options={"library_kernels": '
    assert f"\n    apart: q (mul) {alone}" in printed and "\n    apart: k (mul) stays a kernel of its own" in printed
    assert f"\n    apart: tanh {alone}" in printed
    assert "\n    lowered: the Hopper kernel, called as an op, into which Inductor fuses nothing; " in printed


def test_without_library_kernels_the_same_is_one_kernel() -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return attended(q, k, v) * torch.sigmoid(gate)

    generated, records = compiled(gated, lambda: heads_of(8, 2, 2, 8), options={LIBRARY_OPTION: False})
    assert len(called(generated)) == 1 and called(generated)[0].startswith("triton_tem_")
    assert [d.detail for d in records if d.stage == "fused"] == ["into the store of the output: sigmoid, mul"]


def test_a_training_graph_calls_it_and_the_backward_reads_what_it_saved() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q, k, v).sum()

    generated, records = compiled(loss, lambda: [t.requires_grad_() for t in heads_of(8, 2, 2)])
    forward, backward = generated.wrapper.split("def call(")[1:]
    assert f"torch.ops.lowered_attn.{OP}" in forward and "torch.ops.lowered_attn.attention_backward" in backward
    (decision,) = [d for d in records if d.stage == "lowered"]
    assert decision.facts["kernel"] == "gluon_dense" and decision.facts["writes_lse"]


@pytest.mark.parametrize("fastest", ["lowered_attn_attend_into", "triton_lowered_attn"])
@pytest.mark.parametrize("name", ["full_self", "document", "padding and starts", "DeepSeek's prefill"])
def test_autotuning_times_it_beside_templates(name: str, fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are made up, for want of a GPU."""
    seen: list[str] = []

    def times(*arguments: Any, **more: Any) -> dict[Any, float]:
        choices = arguments[6]
        seen[:] = [choice.name for choice in choices]
        return {choice: at / 100 + (not choice.name.startswith(fastest)) for at, choice in enumerate(choices)}

    monkeypatch.setattr(AlgorithmSelectorCache, "do_autotuning", times)
    monkeypatch.setattr(AlgorithmSelectorCache, "make_precompile_fn", lambda *arguments, **more: dict)
    monkeypatch.setattr(pretend_parts, "_the_only_choice", lambda select: select)
    case, options = TAKEN[name], {"max_autotune": True, QUERIES_OPTION: True}
    generated, decision = compiled_case(case, with_lse=False, options=options)
    assert len(seen) > 2 and seen[-1] == "lowered_attn_attend_into"
    assert all(name.startswith("triton_lowered_attn_") for name in seen[:-1])
    calls = re.findall(r"extern_kernels\.lowered_attn_attend_into\((.*)\)$", generated.wrapper, re.MULTILINE)
    if fastest == seen[-1]:
        assert f"form='{case.form}'" in calls[0] and re.search(r", out=buf\d+$", calls[0]) and not calls[1:]
        assert not generated.kernels and not called(generated)
    else:
        assert not calls and len(generated.kernels) == 1 and len(called(generated)) == 1
    assert decision.facts["kernel"] == ("gluon_dense" if calls else "triton_grouped")
    assert decision.detail.startswith("the Hopper kernel, by" if calls else "grouped Triton template, by")
    assert decision.facts["against_hopper"] == []


def test_autotuning_takes_it_untimed_where_its_log_sum_exp_is_read() -> None:
    generated, decision = compiled_case(BASE, options={"max_autotune": True})
    assert called(generated) == [OP] and decision.facts["kernel"] == "gluon_dense"


def test_a_shape_that_the_template_is_predicted_to_be_faster_for_keeps_it() -> None:
    with chosen("triton"):
        decision = compiled_case(BASE)[1]
    assert decision.facts["kernel"] == "triton_grouped"
    (reason,) = decision.facts["against_hopper"]  # type: ignore[misc]
    assert re.fullmatch(r"predicted: .*gluon [\d.]+ us.*", reason) and reason in decision.detail
    assert {"gluon", "triton"} <= decision.facts["predicted_us"].keys()  # type: ignore[attr-defined]


class Sliding(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.sliding_self(q, k, v, 300)[0]


@pytest.mark.parametrize("package", [False, True], ids=["cpp_wrapper", "package"])
def test_what_c_plus_plus_calls_is_the_template(package: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's forms run without Python; and in torch 2.11 C++ cannot call an op with a list."""

    def stop(self: GraphLowering) -> None:
        raise RuntimeError("from here on it takes a GPU")

    monkeypatch.setattr(GraphLowering, "codegen_with_cpp_wrapper", stop)
    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            inputs = tuple(heads_of(8, 2, 2))
            program = torch.export.export(Sliding(), inputs)
        with decisions.recording() as log, pytest.raises(Exception, match="from here on it takes a GPU"):
            if package:
                aoti_compile_and_package(program)
            else:
                generate(Sliding(), *inputs, backend=backend, options={"cpp_wrapper": True})
    (decision,) = [d for d in log.records if d.stage == "lowered"]
    assert decision.facts["kernel"] == "triton_grouped" and decision.facts["against_hopper"] == [hopper.CPP_WRAPPER]
