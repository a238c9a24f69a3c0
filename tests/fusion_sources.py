"""Write the GPU code that torch.compile generates for ``tests.fusions``, to be run without a GPU.

    python -m tests.fusion_sources FOLDER

As ``tests.latent_sources``: Triton's interpreter is for processes in which nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys

import torch
from torch import Tensor

from inductor_passes import LIBRARY_OPTION, QUERIES_OPTION
from inductor_passes.pretend_gpu import generate, pretend_gpu
from lowered_attn.compile import backend
from tests import fusions
from tests.fusions import PROLOGUES, Inputs
from tests.test_paged_codegen import called, template

ARCH = "sm_80"


@dataclasses.dataclass(frozen=True)
class Fused:
    """What is before and after attention, in fp32."""

    prologue: str
    epilogue: str
    dim: int = 32
    q_dtype: torch.dtype | None = None
    sizes: tuple[int, int, int, int] = (2, 70, 4, 2)
    """Batch, length, heads, KV heads."""

    def inputs(self, device: str) -> Inputs:
        return fusions.inputs(*self.sizes, self.dim, torch.float32, device, self.q_dtype)

    def __call__(self, given: Inputs) -> Tensor:
        return fusions.after(self.epilogue, fusions.attend(given, PROLOGUES[self.prologue](given.q, given)), given)


CASES = {
    "rope": Fused("rope", "gate merged heads"),
    "rope of heads": Fused("rope of heads", "residual"),
    "padded columns": Fused("rope and scale", "gate heads", dim=24),
    "rope in fp32": Fused("rope in fp32", "gate an element", sizes=(1, 33, 3, 3)),
    "cast": Fused("dequantise", "gate, then merge", q_dtype=torch.float16),
    "scale": Fused("scale", "gate an element of heads", dim=64, sizes=(3, 20, 6, 1)),
}


def source(case: Fused) -> dict[str, object]:
    """The one kernel, what it is given, by the wrapper's names, and the shapes of those that do not share memory."""
    with pretend_gpu(ARCH) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            given = case.inputs("cuda")
        made = generate(
            lambda *tensors: case(Inputs(*tensors)), *given, backend=backend,
            options={LIBRARY_OPTION: False, QUERIES_OPTION: True},
        )
    assert len(called(made)) == 1, called(made)
    (launch,) = re.findall(r"triton_tem_\w+\.run\((.*), stream=", made.wrapper)
    # Inputs as the wrapper's own benchmark makes them, and what it allocates.
    found = re.findall(r"(\w+) = (?:rand_strided|empty_strided_cuda)\(\(([\d, ]*)\)", made.wrapper)
    shapes = {name: [int(size) for size in re.findall(r"\d+", shape)] for name, shape in found}
    return {"source": template(made), "launch": launch.split(", "), "shapes": shapes}


def main(folder: pathlib.Path) -> None:
    (folder / "sources.json").write_text(json.dumps({name: source(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
