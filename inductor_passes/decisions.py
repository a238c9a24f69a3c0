"""What passes and lowerings decided while compiling, for ``explain`` and for tests.

Nothing is kept unless somebody is recording. A compilation served from Inductor's cache decides nothing, and so
records nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Literal

Stage = Literal["recognised", "grouped", "lowered", "fused", "apart", "refused"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision about one node of a graph."""

    stage: Stage
    """What was decided.

    ``recognised``: user code became a form op; ``grouped``: a form op became a grouped op; ``lowered``: a grouped op
    became a kernel; ``fused``: that kernel computes what is before or after attention too; ``apart``: what could have
    been in that kernel is not; ``refused``: left as it was.
    """
    op: str
    """The form's name."""
    node: str
    """The node's name in the FX graph."""
    detail: str
    """One sentence for people: what it became, or why it was refused."""
    facts: dict[str, object] = dataclasses.field(default_factory=dict)
    """The same for programs: kernel, config, shapes, dtype, predicted times."""


@dataclasses.dataclass
class Log:
    """Decisions in the order in which they were made."""

    records: list[Decision] = dataclasses.field(default_factory=list)
    graphs: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    """(pass name, graph before, graph after) of every pass that changed something."""


# A compilation may run on another thread than its caller's: a plain list under a lock, not a thread-local.
_logs: list[Log] = []
_lock = threading.Lock()


@contextlib.contextmanager
def recording() -> Iterator[Log]:
    """Collect the decisions of every compilation that runs inside the block."""
    log = Log()
    with _lock:
        _logs.append(log)
    try:
        yield log
    finally:
        with _lock:
            _logs[:] = [other for other in _logs if other is not log]


def record(decision: Decision) -> None:
    """Tell whoever is recording."""
    with _lock:
        for log in _logs:
            log.records.append(decision)


def record_graphs(name: str, before: str, after: str) -> None:
    """Tell whoever is recording how a pass changed its graph."""
    with _lock:
        for log in _logs:
            log.graphs.append((name, before, after))


def is_recording() -> bool:
    """Whether anybody listens: what costs time to describe is described only then."""
    return bool(_logs)
