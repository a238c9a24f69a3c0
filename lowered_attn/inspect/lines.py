"""Lines to show, each with what it is: of a graph before and after a pass, and of a generated kernel."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# What FX says of a node between its name and what it is: how many users it has, and a class that is only here.
_ASIDE = re.compile(r" : (?:torch\._subclasses\.\S+ )?\[num_users=\d+\] = ")
_NODE = re.compile(r"\s*%(\w+) =")
# Our templates have no name like this: Inductor's code generator makes them.
_FUSED = re.compile(r"\s*tmp\d+ = |\s*tl\.store\(.*\btmp\d+\b")
CONTEXT = 3
"""Unchanged lines that are kept around a change."""


class Line(NamedTuple):
    """One line of text."""

    text: str
    kind: str = ""
    """"removed", "added", "fused", "gap" (lines left out), or "" for an ordinary line."""
    matched: bool = False
    """Whether the compiler decided something about this node."""


def graph_lines(text: str, matched: Iterable[str]) -> list[Line]:
    """A graph, its matched nodes marked."""
    names = set(matched)
    return [_line(line, "", names) for line in _plain(text)]


def changes(before: str, after: str, matched: Iterable[str]) -> list[Line]:
    """What a pass changed: lines removed and added, with a few around them."""
    names = set(matched)
    old, new = _plain(before), _plain(after)
    shown: list[Line] = []
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT):
        if shown or group[0][1]:
            shown.append(Line("…", "gap"))
        for tag, i, j, k, m in group:
            if tag == "equal":
                shown += [_line(line, "", names) for line in old[i:j]]
            else:
                shown += [_line(line, "removed", names) for line in old[i:j]]
                shown += [_line(line, "added", names) for line in new[k:m]]
    if shown and group[-1][2] < len(old):
        shown.append(Line("…", "gap"))
    return shown


def _plain(text: str) -> list[str]:
    return _ASIDE.sub(" = ", text).strip().splitlines()


def _line(text: str, kind: str, names: set[str]) -> Line:
    node = _NODE.match(text)
    return Line(text, kind, node is not None and node[1] in names)


class Source(NamedTuple):
    """A generated kernel in three parts."""

    head: list[Line]
    """Imports, the decorator and its settings."""
    body: list[Line]
    """The kernel."""
    helpers: list[Line]
    """The functions that it calls: the mask's, and the tile loop."""

    @property
    def fused(self) -> list[Line]:
        """The lines that Inductor fused into a template."""
        return [line for line in self.body if line.kind == "fused"]


def source_lines(source: str, is_template: bool) -> Source:
    """A kernel's source; in a template the lines that Inductor wrote for other ops than attention are "fused"."""
    lines = source.strip().splitlines()
    functions = [n for n in ast.parse("\n".join(lines)).body if isinstance(n, ast.FunctionDef)]
    kernel = next((f for f in functions if f.name.startswith("triton_")), None)
    if kernel is None:
        return Source([], [Line(line) for line in lines], [])
    start, end = kernel.lineno - 1, kernel.end_lineno or len(lines)
    body = [Line(text, "fused" if is_template and _FUSED.match(text) else "") for text in lines[start:end]]
    return Source(_ordinary(lines[:start]), body, _ordinary(lines[end:]))


def _ordinary(lines: Sequence[str]) -> list[Line]:
    return [Line(line) for line in "\n".join(lines).strip("\n").splitlines()]
