"""Completions counted in memory shared between processes: outside of every broker, result store and log.

The file is an array of 64-bit counters. A process adds to the one that its pid selects, so no two write the same word
as long as fewer than SLOTS pids lie between the oldest and the newest live worker process. Its threads write the same
one: CPython changes threads at calls and at the end of loops, so not between the reading and the writing of add().
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

SLOTS = 4096


class Counter:
    """A file of counters, made on first use."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, SLOTS * 8)
            self._memory = mmap.mmap(descriptor, SLOTS * 8)
        finally:
            os.close(descriptor)
        self._slots = memoryview(self._memory).cast("Q")
        self._choose_slot()
        # Asked once per process and not per task: the system calls of a task are what is measured.
        os.register_at_fork(after_in_child=self._choose_slot)

    def _choose_slot(self) -> None:
        self._slot = os.getpid() % SLOTS

    def add(self) -> None:
        """Count one completion in this process."""
        self._slots[self._slot] += 1

    def total(self) -> int:
        """Return how many completions all processes have counted."""
        return sum(self._slots)


def open_counter() -> Counter:
    """Return the counter that the benchmark named in BENCH_COUNTER."""
    return Counter(Path(os.environ["BENCH_COUNTER"]))
