"""Every variant's first call, tried in processes of their own before anything is measured.

Two things are gained. Kernels compile side by side, into the caches that the measuring process reads afterwards. And a
kernel that hangs the GPU or breaks its CUDA context takes along a process that nobody misses: the measurement then
has a row with the reason, and goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

Job = tuple[str, str]
"""Case and variant, by name."""
Call = Callable[[Job, int], object]
"""Makes a job's first call with a seed, on the GPU, and returns when it is done. A function of a module's top level."""

PATIENCE_S = 60
"""Enough for the slowest compile of a paged kernel with eight processes at it."""
START_S = 120
"""Enough for a process to start and to import torch."""

FINE, RAISED, LOST, UNTRIED = "fine", "raised", "lost", "untried"
"""Outcomes: after the last two, the process is of no more use."""


def try_all(
    call: Call,
    jobs: Sequence[Job],
    seed: int,
    workers: int,
    patience_s: float,
    until_s: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[Job, str]:
    """Make each job's first call in one of `workers` processes; the reasons, by job, of those that must not be run.

    Such a job killed its process, broke its CUDA context, or was not done within `patience_s` seconds. One that only
    raised is not among them: it will raise again, as a row. After `until_s` seconds no further job is begun.
    """
    begin = time.perf_counter()
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    reasons: dict[Job, str] = {}

    def drive() -> None:
        child: _Child | None = None
        while until_s is None or time.perf_counter() - begin < until_s:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            child = child or _Child(call, seed)
            outcome, detail, seconds = child.make(job, patience_s)
            if outcome in (LOST, UNTRIED):
                child.end()
                child = None
            if outcome == LOST:
                reasons[job] = detail
            say(f"  tried {job[0]} {job[1]}: {outcome} in {seconds:.1f} s{': ' + detail if detail else ''}"[:300])
        if child is not None:
            child.end()

    threads = [threading.Thread(target=drive, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(f"{len(jobs) - waiting.qsize()} of {len(jobs)} first calls tried in {time.perf_counter() - begin:.0f} s")
    return reasons


class _Child:
    """A process that makes one call after the other."""

    def __init__(self, call: Call, seed: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, call, seed), daemon=True)
        self._process.start()
        self._ready = False
        theirs.close()  # or its end would not show here as the end of the pipe

    def make(self, job: Job, patience_s: float) -> tuple[str, str, float]:
        """Outcome, detail and seconds of a job."""
        begin = time.perf_counter()
        outcome, detail = UNTRIED, f"no process to try it in after {START_S} s"
        try:
            self._ready = self._ready or (self._ours.poll(START_S) and self._ours.recv())
            if self._ready:
                outcome, detail = LOST, f"its first call was not done after {patience_s:.0f} s"
                self._ours.send(job)
                if self._ours.poll(patience_s):
                    outcome, detail = self._ours.recv()
        except (EOFError, OSError):
            self._process.join(5)
            what = "its first call ended the process" if self._ready else "the process that was to try it did not start"
            detail = f"{what}, exit code {self._process.exitcode}"
        return outcome, detail, time.perf_counter() - begin

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.join(10)
        self._ours.close()


def _serve(pipe: Connection, call: Call, seed: int) -> None:
    """Make the calls that the pipe names until it closes."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many of these processes as cores want
    pipe.send(True)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(call, job, seed))


def _outcome(call: Call, job: Job, seed: int) -> tuple[str, str]:
    text = ""
    try:
        call(job, seed)
    except Exception as error:  # the measuring process makes a row of it
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        del error
    try:
        _settle()
    except RuntimeError as error:
        return LOST, f"its first call broke the CUDA context: {text or error}"
    return (RAISED, text) if text else (FINE, "")


def _settle() -> Any:
    """Wait for the GPU and return what is cached of its memory: other processes want it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
