"""AOTInductor packages on a real GPU: forms that need no Python, and a served model with its ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inductor_passes.decisions import recording
from lowered_attn import CausalMetaData, aoti_compile_and_package, set_fetch_fn_for_attn_metadata
from tests.helpers import Results, assert_as_exact_as_the_reference
from tests.test_aoti import (
    AUTO,
    PROMPTS,
    STEPS,
    EveryForm,
    Request,
    Served,
    export,
    form_calls,
    in_a_fresh_process,
    sizes_of,
    step_of,
    tensors_of,
)

pytestmark = pytest.mark.gpu

BF16 = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    set_fetch_fn_for_attn_metadata(None)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_forms_without_our_packages(dynamic: bool, head_dim: int, tmp_path: Path) -> None:
    """Kernels are in the package: the process that runs it imports torch alone."""
    more = {"heads": (8, 2), "dims": (head_dim, head_dim), **BF16}
    examples = form_calls(2, 384, **more)
    inputs = tuple(tensors_of(call) for call in examples)
    program = export(EveryForm(examples), inputs, (sizes_of(inputs),) if dynamic else None)
    with recording() as log:
        package = aoti_compile_and_package(program, package_path=tmp_path / "forms.pt2")
    assert sum(d.stage == "lowered" for d in log.records) == len(examples)
    calls = [form_calls(*size, **more) for size in (((2, 384), (3, 1000), (2, 70)) if dynamic else ((2, 384),))]
    results = in_a_fresh_process(package, [tuple(tensors_of(c) for c in step) for step in calls], tmp_path, imports="")
    for step, found in zip(calls, results, strict=True):
        for call, (out, lse) in zip(step, found, strict=True):
            assert_as_exact_as_the_reference(Results(out, lse), call)


@pytest.mark.parametrize("library_kernels", [True, False])
@pytest.mark.parametrize("in_cache", [False, True], ids=["new keys direct", "new keys in the cache"])
def test_a_served_model_keeps_its_caches(in_cache: bool, library_kernels: bool, tmp_path: Path) -> None:
    def inputs(requests: list[Request]) -> tuple[Tensor, CausalMetaData]:
        metadata = CausalMetaData(**step_of(requests), new_keys_in_cache=in_cache).to("cuda")
        return torch.randn(metadata.num_tokens, 512, **BF16), metadata

    model, example = Served(128, **BF16), inputs(PROMPTS)
    program = export(model, example, ({0: AUTO}, [{0: AUTO}] * 4))
    options = {"library_kernels": library_kernels}
    with recording() as log:
        package = aoti_compile_and_package(program, package_path=tmp_path / "served.pt2", inductor_configs=options)
    kernels = [d.facts["kernel"] for d in log.records if d.stage == "lowered"]
    assert kernels.count("scatter") == 2 and (library_kernels or kernels.count("triton_paged") == 2), kernels
    calls = [inputs(requests) for requests in STEPS]
    results = in_a_fresh_process(package, calls, tmp_path)
    with torch.no_grad():
        for arguments, found in zip(calls, results, strict=True):
            # Two layers in bfloat16, each of which rounds what the next one reads.
            torch.testing.assert_close(found, model(*arguments), rtol=2e-2, atol=2e-2)
