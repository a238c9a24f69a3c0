"""The base of every graph pass: its cache key, its counts and its before-and-after text."""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib
import logging
import pathlib
from collections.abc import Sequence

import torch

from inductor_passes import decisions
from inductor_passes.compat import CustomGraphPass

logger = logging.getLogger("lowered_attn.passes")

HASHED_PACKAGES = ("custom_ops", "inductor_passes", "lowered_attn")


@functools.cache
def source_hash() -> str:
    """A hash of every source file of the project.

    Inductor's cache key sees neither out-of-tree lowerings nor templates nor the tile configs that they read: without
    the whole source in it, an edited kernel would be served from yesterday's cache.
    """
    digest = hashlib.sha256()
    for package in HASHED_PACKAGES:
        folder = pathlib.Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".jinja")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(node: torch.fx.Node) -> str:
    """A node by what it does, for people: ``mul``, or ``the graph's output``."""
    if node.op == "output":
        return "the graph's output"
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).strip("_")


class GraphPass(CustomGraphPass, abc.ABC):
    """A rewrite of an FX graph in place. Subclasses are named by what they do and implement ``rewrite``."""

    def __init__(self) -> None:
        self.rewritten = 0
        """Nodes rewritten since the pass was made."""

    @abc.abstractmethod
    def rewrite(self, graph: torch.fx.Graph) -> int:
        """Change ``graph`` and return how many nodes were rewritten."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        watched = decisions.is_recording() or logger.isEnabledFor(logging.DEBUG)
        before = str(graph) if watched else ""
        count = self.rewrite(graph)
        self.rewritten += count
        if count and watched:
            decisions.record_graphs(type(self).__name__, before, str(graph))
            logger.debug("%s rewrote %d nodes\nbefore:\n%s\nafter:\n%s", type(self).__name__, count, before, graph)

    def uuid(self) -> str:
        """What Inductor's cache keys on: this pass and the project's whole source."""
        return f"{type(self).__qualname__}:{source_hash()}"


class Chain(CustomGraphPass):
    """Several passes where Inductor has room for one (up to torch 2.12)."""

    def __init__(self, *passes: CustomGraphPass, after: Sequence[CustomGraphPass] = ()) -> None:
        self.passes = passes
        self.after = tuple(after)
        """Passes that ran on Dynamo's graph, for which Inductor has no hook with a key."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> object:
        """None, which turns the cache off, where a pass of the user's has no uuid."""
        uuids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in (*self.after, *self.passes)]
        return None if None in uuids else tuple(uuids)
