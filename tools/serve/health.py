"""What a compiled step must not do once it is warm: break the graph, compile, record, skip a CUDA graph, or sync."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters


@dataclass(frozen=True)
class Counts:
    """Totals of this process."""

    graph_breaks: int
    compiles: int  # graphs that Dynamo captured
    cudagraph_skips: int
    recorded: int  # inputs that recorded CUDA graphs copy: grows with every graph that is recorded

    @staticmethod
    def now() -> Counts:
        """Read torch's counters."""
        inductor = counters["inductor"]
        return Counts(
            sum(counters["graph_break"].values()),
            counters["stats"]["unique_graphs"],
            inductor["cudagraph_skips"],
            inductor["cudagraph_recorded_non_static_inputs"],
        )

    def since(self, earlier: Counts) -> Counts:
        """What has been added since `earlier`."""
        return Counts(
            self.graph_breaks - earlier.graph_breaks,
            self.compiles - earlier.compiles,
            self.cudagraph_skips - earlier.cudagraph_skips,
            self.recorded - earlier.recorded,
        )


class Watch:
    """Counts from its making on, and syncs of the calls that run inside `no_sync`."""

    def __init__(self, device: torch.device, strict: bool = False) -> None:
        self.device, self.syncs = device, 0
        self._start = self._warm = Counts.now()
        if strict:
            torch._inductor.config.triton.cudagraph_or_error = True

    def warmed_up(self) -> None:
        """Say that every bucket has been run: nothing may be compiled or recorded from here on."""
        self._warm = Counts.now()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Run a call on CUDA in which anything that waits for the GPU raises; on a CPU there is nothing to watch."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says each time that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchroniz" in str(error):
                self.syncs += 1
            raise
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @property
    def total(self) -> Counts:
        """Since this watch was made."""
        return Counts.now().since(self._start)

    def problems(self, most_compiles: int) -> list[str]:
        """What is wrong, in words; nothing where all is well. Warm-up may have compiled `most_compiles` graphs."""
        total, warm = self.total, Counts.now().since(self._warm)
        found = []
        if total.graph_breaks:
            found.append(f"{total.graph_breaks} graph breaks, expected 0")
        if total.compiles > most_compiles:
            found.append(f"{total.compiles} graphs compiled, expected at most {most_compiles}, one a bucket and mode")
        if warm.compiles:
            found.append(f"{warm.compiles} graphs compiled after warm-up, expected 0")
        if total.cudagraph_skips and self.device.type == "cuda":  # each graph of a CPU counts as skipped
            found.append(f"{total.cudagraph_skips} skipped CUDA graphs, expected 0")
        if warm.recorded:
            found.append("CUDA graphs recorded after warm-up, expected 0")
        if self.device.type == "cuda" and not total.recorded:
            found.append("no CUDA graph was recorded, expected one a bucket")
        if self.syncs:
            found.append(f"{self.syncs} host syncs inside compiled steps, expected 0")
        return found

    def summary(self) -> str:
        """One line with every counter."""
        total, warm = self.total, Counts.now().since(self._warm)
        line = f"graph breaks {total.graph_breaks}, graphs compiled {total.compiles} ({warm.compiles} after warm-up)"
        if self.device.type == "cuda":
            line += f", skipped CUDA graphs {total.cudagraph_skips}, host syncs in the step {self.syncs}"
        return line
