"""Print the Triton code, PTX and resources that torch.compile generates for a case. No GPU is needed.

    python -m tools.inspect --case causal_prefill --arch sm_90
    python -m tools.inspect --case causal_prefill --arch sm_90 --resources
    python -m tools.inspect --case train_causal_small --page inspect.html
    python -m tools.inspect --list

The browser of named cases; `lowered-attn inspect` is the same for a user's own code. `--eager` shows the kernels that
the case's op launches outside of Inductor instead: without torch.compile, and, for the backward of a training case,
from a compiled graph too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_ops.form import default_scale, empty_outputs
from custom_ops.op import kernels_for
from inductor_passes import LIBRARY_OPTION
from inductor_passes.gpu_facts import GPUS
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from inductor_passes.resources import Resources, compile_kernel
from lowered_attn.compile import backend
from lowered_attn.inspect import page
from lowered_attn.inspect.capture import Inspection, backward_kernels, inspect_target, launched_by
from lowered_attn.inspect.target import Target
from tools.cases import CASES, Case


def generate_case(case: Case, arch: str) -> Generated:
    """Compile the case's op with `torch.compile(backend="lowered_attn")` for `arch`, without running it.

    The backward is compiled too where the case has one. Raises ValueError for an unknown `arch`.
    """
    with pretend_gpu(arch) as gpu:
        attend, tensors = _call_of(case, gpu.fake_tensors())
        # A library's kernel has no code to show.
        return generate(attend, *tensors, backend=backend, options={LIBRARY_OPTION: False})


def inspect_case(case: Case, arch: str) -> Inspection:
    """The same as `lowered-attn inspect` collects it. Raises ValueError for an unknown `arch`."""
    with pretend_gpu(arch) as gpu:
        mode = gpu.fake_tensors()
        attend, tensors = _call_of(case, mode)
        return inspect_target(Target(case.name, attend, tensors, {}), gpu, mode)


def _call_of(case: Case, fake_tensors: AbstractContextManager[Any]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The case's op as a function of tensors, and these. Its integers belong to the model: constants of the code."""
    with fake_tensors:
        arguments = case.inputs("cuda", requires_grad=case.backward).arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    integers = {name: value for name, value in arguments.items() if name not in tensors}

    def attend(*values: Tensor) -> Tensor:
        return case.form.op(**dict(zip(tensors, values, strict=True)), **integers, scale=case.scale)[0]

    return attend, tuple(tensors.values())


def eager_kernels(case: Case, arch: str) -> list[Resources]:
    """The kernels that the case's op launches itself: its forward's, then its backward's where the case has one.

    Raises ValueError for an unknown `arch`.
    """
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            inputs = case.inputs("cuda")
            out, lse = empty_outputs(inputs.query, inputs.value)
            grad_out = torch.empty_like(out)
        form, qkv = case.form, (inputs.query, inputs.key, inputs.value)
        slots, scale = form.slots(inputs.operands), default_scale(inputs.query, case.scale)
        kernels = kernels_for(inputs.query.device)
        launched = launched_by(lambda *tensors: kernels.forward(form, *tensors, slots, scale), arch, *qkv)
        if case.backward:
            arguments = (grad_out, None, *qkv, out, lse, *slots[:-1], form.name, slots.ints, scale)
            launched += backward_kernels(arguments, arch)
        return launched


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, metavar="NAME", help="a case of --list")
    parser.add_argument("--arch", choices=GPUS, default="sm_90", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--wrapper", action="store_true", help="also print the code that launches the kernels")
    parser.add_argument("--ptx", action="store_true", help="also print each kernel's PTX")
    parser.add_argument("--resources", action="store_true", help="print resources in place of the Triton source")
    parser.add_argument(
        "--eager", action="store_true", help="the kernels launched outside of Inductor: resources or PTX"
    )
    parser.add_argument("--page", type=Path, help="write the page of `lowered-attn inspect` to this file instead")
    options = parser.parse_args(arguments)
    if options.list:
        width = max(map(len, CASES))
        for case in CASES.values():
            print(f"{case.name:{width}}  {case.title}: {case.description}")
        return 0
    if options.case is None:
        parser.error(f"--case: expected one of {', '.join(CASES)}, got none")
    case = CASES[options.case]
    if options.page is not None:
        options.page.write_text(page.render(inspect_case(case, options.arch)), encoding="utf-8")
        return 0
    if options.eager:
        for kernel in eager_kernels(case, options.arch):
            _show(kernel, options.ptx, options.resources or not options.ptx)
        return 0
    generated = generate_case(case, options.arch)
    if options.wrapper:
        print(generated.wrapper)
    for source in generated.kernels.values():
        if not options.resources:
            print(source)
        if options.ptx or options.resources:
            _show(compile_kernel(source, options.arch), options.ptx, options.resources)
    return 0


def _show(kernel: Resources, ptx: bool, resources: bool) -> None:
    if ptx:
        print(kernel.ptx)
    if resources:
        print(f"kernel: {kernel.kernel}", *kernel.lines(), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
