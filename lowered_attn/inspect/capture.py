"""Compile a callable for a GPU that is not there, and keep everything that can be shown of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from custom_ops.epilogue import parse
from custom_ops.form import Slots
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_choice import HOPPER
from inductor_passes import LIBRARY_OPTION, compile_with_passes
from inductor_passes.decisions import Decision, recording
from lowered_attn.inspect.calls import OPS, Call, calls_in
from lowered_attn.inspect.target import InspectError, Target, load, on_pretended_gpu, told

TEMPLATE = "triton_tem_"
"""How the names of kernels begin that Inductor made from a template."""
_OUTSIDE = re.compile(r"\b(?:extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.\w+\.\w+)(?=\()")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that was generated, or that one of our ops launches."""

    name: str
    source: str
    """Triton, as Inductor wrote it; empty for a kernel that an op launches."""
    phase: str
    """"forward" or "backward"."""
    resources: Any
    """`inductor_passes.resources.Resources`, or None where Triton could not compile it."""
    problem: str = ""
    """Why there are no resources."""
    fuses: tuple[str, ...] = ()
    """The ops of the user's graph that the kernel computes, as Inductor counts them."""

    @property
    def from_template(self) -> bool:
        """Whether it is an attention template."""
        return self.name.startswith(TEMPLATE)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What became of a callable. Plain data; `page` and `text` show it."""

    name: str
    arch: str
    gpu: str
    versions: str
    trains: bool
    """Whether a backward was compiled."""
    library: bool
    """Whether kernels that Inductor cannot fuse into were allowed."""
    decisions: tuple[Decision, ...]
    graphs: tuple[str, ...]
    """The user's graphs as Dynamo traced them: more than one where the graph breaks."""
    passes: tuple[tuple[str, str, str], ...]
    """(pass, graph before, graph after)."""
    breaks: dict[str, int]
    """Graph breaks by reason."""
    calls: tuple[Call, ...]
    kernels: tuple[Kernel, ...]
    outside: dict[str, int]
    """Calls that have no generated code, such as matrix products: how often each."""

    @property
    def recognised(self) -> bool:
        """Whether any attention was lowered."""
        return bool(self.calls) or any(d.stage == "lowered" for d in self.decisions)


def inspect_callable(
    name: str, arch: str, inputs: str | None = None, *, gradients: bool = True, library: bool = False
) -> Inspection:
    """Import and compile "module:callable" for `arch` ("sm_80", "sm_90", "sm_100"); no GPU is needed.

    `inputs` names a function for the inputs; `gradients=False` compiles as under torch.no_grad(), as a module in eval
    mode always is; `library=True` allows kernels that Inductor cannot fuse into, as compiling does by default. Raises
    InspectError where the target cannot be found, imported or compiled; ValueError for an unknown `arch`;
    PretendGpuError where nothing can be generated here, such as without Triton.
    """
    from inductor_passes.pretend_gpu import pretend_gpu

    with pretend_gpu(arch) as gpu:
        mode = gpu.fake_tensors()
        with on_pretended_gpu(mode):
            target = load(name, inputs)
        return inspect_target(target, gpu, mode, gradients=gradients, library=library)


def inspect_target(target: Target, gpu: Any, mode: Any, *, gradients: bool = True, library: bool = False) -> Inspection:
    """Compile a target inside `pretend_gpu`'s context `gpu`; `mode` is what its tensors were made in."""
    from inductor_passes import compat
    from inductor_passes.compile import HOOK

    graphs: list[str] = []
    calls: list[Call] = []
    evaluates = isinstance(target.call, nn.Module) and not target.call.training
    with_gradients = gradients and torch.is_grad_enabled() and not evaluates
    mark, kernel_mark = len(gpu.wrappers), len(gpu.kernels)

    def observe(graph: torch.fx.Graph) -> None:
        # Inductor writes a graph's wrapper after its passes have run: one that it has written is a forward's.
        backward = any(node.target == OPS.attention_backward.default for node in graph.nodes)
        calls.extend(calls_in(graph, "backward" if backward else "forward"))

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(str(gm.graph))
        plain = torch.fx.GraphModule(gm, _copied(gm.graph))
        options = {LIBRARY_OPTION: library, HOOK: observe}
        compile_with_passes(gm, example_inputs, options=options)
        return plain.forward  # on fake tensors, so that what follows a graph break is compiled too

    before = compat.graph_breaks()
    torch.compiler.reset()
    try:
        with mode, recording() as log, contextlib.nullcontext() if with_gradients else torch.no_grad():
            torch.compile(target.call, backend=backend)(*target.inputs, **target.keywords)
    except Exception as error:
        raise InspectError(told(f"compiling {target.name}", _cause(error))) from error
    finally:
        torch.compiler.reset()
    breaks = {r: n - before.get(r, 0) for r, n in compat.graph_breaks().items() if n > before.get(r, 0)}
    wrappers = gpu.wrappers[mark:]
    kernels = _generated(gpu.kernels[kernel_mark:], wrappers, gpu.facts.arch)
    kernels += _launched(calls, log.records, gpu.facts.arch)
    calls = [_with_tile(call, log.records) for call in calls]
    return Inspection(
        target.name, gpu.facts.arch, gpu.facts.name, _versions(), any(_is_backward(w) for w in wrappers), library,
        tuple(log.records), tuple(graphs), tuple(log.graphs), breaks, tuple(calls), tuple(kernels), _outside(wrappers),
    )  # fmt: skip


def _with_tile(call: Call, decisions: Sequence[Decision]) -> Call:
    """The call with its mask drawn in the tiles that the kernel has, where the decision names them."""
    facts = _facts(call, decisions)
    tiling = re.search(r"BLOCK_M=(\d+) BLOCK_N=(\d+)", str(facts.get("configs")))
    if call.picture is None or not tiling:
        return call
    query, key = call.arguments[:2]
    heads = int(query.shape[1]) // int(key.shape[1])  # their rows share a tile
    tile = max(int(tiling[1]) // heads, 1), int(tiling[2])
    return dataclasses.replace(call, picture=dataclasses.replace(call.picture, tile=tile))


def _facts(call: Call, decisions: Sequence[Decision]) -> dict[str, object]:
    """What is known about how a call was lowered."""
    return next((d.facts for d in decisions if d.stage == "lowered" and d.node == call.node), {})


def _copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = torch.fx.Graph()
    output = copy.graph_copy(graph, {})
    copy.output(output)
    return copy


def _cause(error: BaseException) -> BaseException:
    """What the user's code or an op of ours raised, under what Dynamo and Inductor wrapped around it."""
    while (below := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = below
    return error


def _versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _is_backward(wrapper: str) -> bool:
    return bool(re.search(r"^# AOT ID: \['\d+_backward'\]", wrapper, re.MULTILINE))


def _generated(kernels: Iterable[tuple[str, str]], wrappers: Sequence[str], arch: str) -> list[Kernel]:
    from inductor_passes.pretend_gpu import compile_with_triton
    from inductor_passes.resources import read_resources

    made: dict[str, Kernel] = {}
    for name, source in kernels:
        if source in made:
            continue
        owner = next((w for w in wrappers if source.strip() in w), next((w for w in wrappers if name in w), ""))
        resources, problem = None, ""
        try:
            resources = read_resources(compile_with_triton(source)[0], arch)
        except Exception as error:  # Triton's errors have no common class: the page says what it said
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        phase = "backward" if _is_backward(owner) else "forward"
        made[source] = Kernel(name, source, phase, resources, problem, _fused_nodes(name, owner))
    return list(made.values())


def _fused_nodes(name: str, wrapper: str) -> tuple[str, ...]:
    """The graph's nodes that a kernel computes, by the comment that Inductor writes above it."""
    above = wrapper.partition(f"{name} = async_compile")[0].rpartition("# Topologically Sorted Source Nodes: [")[2]
    nodes = above.partition("]")[0]
    return tuple(n.strip() for n in nodes.split(",") if n.strip())


def _launched(calls: Sequence[Call], decisions: Sequence[Decision], arch: str) -> list[Kernel]:
    """The kernels that ops launch themselves, outside of Inductor: every backward's, and the Hopper forward's."""
    kernels: dict[tuple[Any, ...], Kernel] = {}
    for call in calls:
        found = []
        if call.phase == "backward":
            found = backward_kernels(call.arguments, arch)
        elif _facts(call, decisions).get("kernel") == HOPPER:
            found = forward_kernels(call.arguments, arch)
        for resources in found:
            key = (resources.kernel, resources.config, resources.registers, call.op, call.shapes)
            kernels.setdefault(key, Kernel(resources.kernel, "", call.phase, resources, "", (call.op,)))
    return list(kernels.values())


def forward_kernels(arguments: Sequence[Any], arch: str) -> list[Any]:
    """Resources of what an op launches for its arguments, fake tensors on "cuda".

    It is `lowered_attn::grouped_attention`, or `lowered_attn::attention_with_epilogue`, which takes two more.
    """
    from custom_ops.op import kernels_for

    qkv, (form, slots, scale, *more) = arguments[:3], _operands(arguments[3:])
    kernels = kernels_for(qkv[0].device)
    forward = kernels.forward
    if len(more) > 1:
        more, (text, extra) = more[:1], more[1:]
        forward = functools.partial(kernels.forward_with_epilogue, epilogue=parse(text), extra=extra)
    return launched_by(lambda *qkv: forward(form, *qkv, slots, scale, *more), arch, *qkv)


def backward_kernels(arguments: Sequence[Any], arch: str) -> list[Any]:
    """Resources of what `lowered_attn::attention_backward` launches for these arguments, fake tensors on "cuda"."""
    from custom_ops.op import kernels_for

    grad, grad_lse, *qkv = arguments[:7]
    form, slots, scale, *softcap = _operands(arguments[7:])
    launch = kernels_for(grad.device).backward

    def run(grad: Any, *qkv: Any) -> Any:
        return launch(form, grad, grad_lse, *qkv, slots, scale, *softcap)

    return launched_by(run, arch, grad, *qkv)


def _operands(arguments: Sequence[Any]) -> list[Any]:
    """The form, its operands, the scale and perhaps the soft-cap, of what an op takes after its tensors."""
    form, ints, *rest = arguments[5:]
    return [FORMS[form], Slots._make([*arguments[:5], tuple(int(i) for i in ints)]), *rest]


def launched_by(run: Callable[..., Any], arch: str, *tensors: Any) -> list[Any]:
    """Resources of the kernels that `run(*tensors)` launches eagerly: compiled, not run. Inside `pretend_gpu`."""
    from inductor_passes.pretend_gpu import compile_launches
    from inductor_passes.resources import read_resources

    return [read_resources(kernel, arch) for kernel in compile_launches(run, *tensors)]


def _outside(wrappers: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for wrapper in wrappers:
        _, _, calls = wrapper.partition("def call(")
        for line in calls.partition("def benchmark_compiled_module")[0].splitlines():
            for name in () if line.lstrip().startswith("#") else _OUTSIDE.findall(line):
                if "set_" not in name:
                    counts[name] = counts.get(name, 0) + 1
    return counts
