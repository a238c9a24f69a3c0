"""Write the GPU code that torch.compile generates for calls of ``tests.latent_cases``, to be run without a GPU.

    python -m tests.latent_sources FOLDER

Triton's interpreter is for processes in which nothing is compiled, so the tests that run this code are in another one.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import torch
from torch import Tensor

from custom_ops.paged.call import LatentCall
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn.compile import backend
from tests.latent_cases import LatentCase, arguments, latent_case, make
from tests.latent_models import Store, by_halves, compiled, interleaved
from tests.test_paged_codegen import template

ARCH = "sm_80"
STORES: dict[str, dict[str, Any]] = {
    "512 + 64": {"split": (512, 64)},
    "512 + 64, read": {"split": (512, 64), "reads": "after"},
    "64 + 16 interleaved": {"split": (64, 16), "reads": "after", "rope": interleaved},
    "48 + 16": {"split": (48, 16), "rope": by_halves},
}
CASES: dict[str, LatentCase] = {
    "decode": latent_case(lengths="decode", heads=20, split=(512, 64), direct=False),
    "mixed": latent_case(lengths="mixed", heads=20, split=(64, 16), page_size=3),
    "ragged": latent_case("block_causal", lengths="ragged", heads=3, split=(48, 16)),
    "prefix": latent_case("prefix_full", lengths="ragged", heads=5, split=(32, 0), direct=False),
}


def attend(gate: Tensor, request_values: list[Tensor], **named: Any) -> tuple[Tensor, Tensor]:
    """Attention with a gate for each head, and lse: what the template computes."""
    out, lse = torch.ops.lowered_attn.paged_latent_attention(**named, request_values=request_values)
    return out * torch.sigmoid(gate)[..., None], lse


def of_call(call: LatentCall) -> Generated:
    """What is generated for ``attend`` over tensors like those of ``call``."""
    with pretend_gpu(ARCH) as gpu, torch.no_grad():

        def like(value: Any) -> Any:
            return torch.empty_like(value, device="cuda") if isinstance(value, Tensor) else value

        with gpu.fake_tensors():
            gate = torch.empty(call.q.shape[:2], device="cuda")
            named = {name: like(value) for name, value in arguments(call).items()}
            values = [like(t) for t in named.pop("request_values")]
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in named.items() if name not in tensors}

        def step(gate: Tensor, values: list[Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return attend(gate, values, **tensors, **rest)

        return generate(step, gate, values, tensors, backend=backend)


def launched(made: Generated) -> list[Any]:
    """What the one launch is given, in order: shapes of tensors, and numbers."""
    # Inputs as the wrapper's own benchmark makes them, and what it allocates.
    shapes = dict(re.findall(r"(\w+) = (?:rand_strided|empty_strided_cuda)\(\(([\d, ]*)\)", made.wrapper))
    (given,) = re.findall(r"triton_\w+\.run\((.*), stream=", made.wrapper)
    names = [name for name in given.split(", ") if name in shapes or name.isdecimal()]
    return [int(n) if n.isdecimal() else [int(size) for size in re.findall(r"\d+", shapes[n])] for n in names]


def main(folder: pathlib.Path) -> None:
    found: dict[str, dict[str, Any]] = {"stores": {}, "cases": {}}
    for name, settings in STORES.items():
        made, _ = compiled(Store, ARCH, dtype=torch.float32, **settings)
        (source,) = made.kernels.values()
        found["stores"][name] = {"source": source, "arguments": launched(made)}
    for name, case in CASES.items():
        found["cases"][name] = {"source": template(of_call(make(case)))}
    (folder / "sources.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
