"""The callable that a command line names, and its inputs: imported as tensors without data on a pretended GPU."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

EXAMPLES = "example_inputs"
"""The function beside a callable that makes its inputs."""


class InspectError(RuntimeError):
    """Something that the user can put right: it says what was expected, what came, and what to do."""


class Target(NamedTuple):
    """What is inspected."""

    name: str
    """As the command line names it: "module:callable"."""
    call: Callable[..., Any]
    """A module or a function, whose tensors are fake ones on device "cuda"."""
    inputs: tuple[Any, ...]
    """Positional arguments."""
    keywords: dict[str, Any]
    """Keyword arguments."""


def _on_gpu(value: Any) -> Any:
    """The value with tensors of its shapes, strides and dtypes on device "cuda"; no data moves."""
    if not isinstance(value, Tensor) or value.device.type == "cuda":
        return value
    moved = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    return moved.requires_grad_(value.requires_grad)


@contextlib.contextmanager
def on_pretended_gpu(fake_tensors: Any) -> Iterator[None]:
    """Make tensors without data, on device "cuda" unless another is named; `fake_tensors` is pretend_gpu's mode."""
    with fake_tensors, torch.device("cuda"):
        yield


def load(name: str, inputs: str | None = None) -> Target:
    """Import "module:callable" and make its inputs; call it inside `on_pretended_gpu`.

    Modules are found from the current directory first. `inputs` names another function for the inputs, as
    "module:function" or "function" of the same module; by default `example_inputs`. It returns one value, or a tuple of
    positional arguments, or a dict of keyword arguments. Raises InspectError, saying what is missing.
    """
    module, attribute = _split(name, "module:callable")
    with _import_from_here():
        home = _import(module)
        found = _attribute(home, attribute, name)
        if isinstance(found, type):
            found = _call(f"{name}()", found)
        if not callable(found):
            raise InspectError(f"{name}: expected a callable, got {type(found).__name__}; name a module or function")
        if inputs is not None:
            where, function = _split(inputs, "module:function") if ":" in inputs else (module, inputs)
            make, named = _attribute(_import(where), function, inputs), inputs
        elif not hasattr(home, EXAMPLES):
            raise InspectError(
                f"{module}.{EXAMPLES}: expected a function that returns inputs for {attribute}, got none; "
                f"write one beside it, or name another with --inputs module:function"
            )
        else:
            make, named = getattr(home, EXAMPLES), f"{module}:{EXAMPLES}"
        made = pytree.tree_map(_on_gpu, _call(f"{named}()", make))
    keywords = made if isinstance(made, dict) else {}
    positional = () if keywords else made if type(made) in (tuple, list) else (made,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((positional, keywords))):
        raise InspectError(f"{named}(): expected at least one tensor, got none; return the callable's arguments")
    _move_module(found)
    return Target(name, found, tuple(positional), keywords)


def _move_module(found: Any) -> None:
    """Parameters and buffers that were made with `device="cpu"` go to the GPU too."""
    if isinstance(found, nn.Module):
        for module in found.modules():
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    moved = _on_gpu(value)
                    if value is not None and moved is not value:
                        is_parameter = isinstance(value, nn.Parameter)
                        tensors[key] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved


def _split(name: str, form: str) -> tuple[str, str]:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InspectError(f"{name!r}: expected {form}, as in my_model:model; put a colon between module and name")
    return module.removesuffix(".py").replace("/", "."), attribute


@contextlib.contextmanager
def _import_from_here() -> Iterator[None]:
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (module == missing or module.startswith(f"{missing}.")):
            raise InspectError(
                f"{module}: expected a module in {os.getcwd()} or installed, got none; change to its folder, or "
                "check the name"
            ) from error
        raise InspectError(told(f"import {module}", error)) from error
    except Exception as error:
        raise InspectError(told(f"import {module}", error)) from error


def _attribute(module: ModuleType, path: str, name: str) -> Any:
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            own = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
            raise InspectError(
                f"{name}: expected {path} in {module.__name__}, got no such name; it has {', '.join(own) or 'none'}"
            )
        found = getattr(found, part)
    return found


def _call(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        needs = ""
        if isinstance(make, type) and isinstance(error, TypeError):
            needs = f"; a class is built without arguments ({inspect.signature(make)}): name an instance instead"
        raise InspectError(told(name, error) + needs) from error


def told(what: str, error: BaseException) -> str:
    """The error in a sentence, with the last line of it that is the user's own code."""
    message = f"{what}: expected no error, got {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(importlib.__file__), "<frozen")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if frames:
        message += f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
    if "DataDependentOutput" in type(error).__name__ or "aten._local_scalar_dense" in str(error):
        message += "; tensors have no data while code is inspected: take numbers from Python, not from a tensor"
    return message
