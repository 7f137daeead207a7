"""A ledger outside of brokers and workers: tasks append what they did, a test counts what was lost or done twice.

One record is 32 bytes, appended by one write() to a file opened with O_APPEND: whole or absent, whoever is killed when.
"""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import wait_until

RECORD = struct.Struct("<8sQQd")  # what, task number, pid, unix time
START = b"start\0\0\0"
DONE = b"done\0\0\0\0"


def record_start(path: str | os.PathLike[str], number: int) -> None:
    """Note that the task with this number began, in this process, now."""
    record(path, START, number)


def record_done(path: str | os.PathLike[str], number: int) -> None:
    """Note that the task with this number reached its end."""
    record(path, DONE, number)


def record(path: str | os.PathLike[str], what: bytes, number: int) -> None:
    """Append one record; ``what`` has 8 bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, RECORD.pack(what, number, os.getpid(), time.time()))
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Entry:
    """One record."""

    what: str
    number: int
    pid: int
    at_unix: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ledger says about a set of task numbers."""

    expected: int
    lost: tuple[int, ...]  # never reached their end
    done_twice: tuple[int, ...]
    started_twice: tuple[int, ...]  # more starts than one: redelivered after a death
    unknown: tuple[int, ...]  # in the ledger but never sent

    def __str__(self) -> str:
        return (
            f"{self.expected} sent: {len(self.lost)} lost {self.lost[:5]}, {len(self.done_twice)} done twice "
            f"{self.done_twice[:5]}, {len(self.started_twice)} started twice, {len(self.unknown)} unknown"
        )


class Ledger:
    """The file, read by the test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """Return all records in the order in which they were written."""
        data = self.path.read_bytes() if self.path.exists() else b""
        assert len(data) % RECORD.size == 0, f"{self.path} ends in half a record"
        return [
            Entry(what.rstrip(b"\0").decode(), number, pid, at) for what, number, pid, at in RECORD.iter_unpack(data)
        ]

    def started(self) -> Counter[int]:
        """Return how often each task began."""
        return Counter(entry.number for entry in self.entries() if entry.what == "start")

    def done(self) -> Counter[int]:
        """Return how often each task reached its end."""
        return Counter(entry.number for entry in self.entries() if entry.what == "done")

    def pids(self) -> list[int]:
        """Return the processes that ran tasks, in the order in which they first appeared."""
        return list(dict.fromkeys(entry.pid for entry in self.entries()))

    def running(self) -> dict[int, int]:
        """Return the tasks whose last record is a start, and the process each is in; dead processes count as well."""
        running: dict[int, int] = {}
        for entry in self.entries():
            if entry.what == "start":
                running[entry.number] = entry.pid
            else:
                running.pop(entry.number, None)
        return running

    def wait_for_done(self, count: int, timeout_s: float) -> None:
        """Return when that many different tasks have reached their end."""
        wait_until(
            lambda: len(self.done()) >= count,
            timeout_s,
            lambda: TimeoutError(f"{len(self.done())} of {count} tasks were done after {timeout_s} s"),
        )

    def wait_for_starts(self, count: int, timeout_s: float) -> None:
        """Return when that many different tasks have begun."""
        wait_until(
            lambda: len(self.started()) >= count,
            timeout_s,
            lambda: TimeoutError(f"{len(self.started())} of {count} tasks had begun after {timeout_s} s"),
        )

    def check(self, expected: Iterable[int]) -> Verdict:
        """Return what became of the tasks with these numbers."""
        numbers = set(expected)
        started, done = self.started(), self.done()
        return Verdict(
            expected=len(numbers),
            lost=tuple(sorted(numbers - done.keys())),
            done_twice=tuple(sorted(number for number, count in done.items() if count > 1)),
            started_twice=tuple(sorted(number for number, count in started.items() if count > 1)),
            unknown=tuple(sorted((started.keys() | done.keys()) - numbers)),
        )
