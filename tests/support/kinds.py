"""Workers of every kind of pool, with a FastQ and a Celery application: the rows of the suite in tests/worker/kinds.

A new kind is one more entry of ``KINDS``.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from fastq import AsyncResult
from fastq.brokers import open_blocking_bus
from fastq.interfaces import BlockingBus, Reply
from tests.support.stage import Kind as Broker
from tests.support.stage import Stage, open_stage, until
from tests.support.worker_process import WorkerProcess

Program = Literal["fastq", "celery"]
APPS: Final[Mapping[Program, str]] = {"fastq": "tests.support.kinds_fastq", "celery": "tests.support.kinds_celery"}
#: Calls at a time, unless a test asks for others.
CALLS: Final = 4
#: How long anything may take on a machine that is busy with other things.
PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of pool.

    name             the test's
    options          what ``fastq worker`` is given, after ``-c`` (or what stands for it) and the calls at a time
    is_async         its calls are those of coroutine functions
    others           how many calls of other tasks run beside them
    has_loop         a loop of the process's own awaits them
    shares           its calls share a process
    most             how many calls run at a time, unless a test asks for others
    """

    name: str
    options: tuple[str, ...]
    is_async: bool = False
    shares: bool = True
    count: str = "-c"
    others: int = 0
    has_loop: bool = False
    most: int = CALLS

    def arguments(self, calls: int) -> tuple[str, ...]:
        """Return the options of a worker that runs so many calls at a time."""
        return (*self.options, self.count, str(calls))

    def task(self, name: str) -> str:
        """Return the name of the task that this kind runs."""
        return f"{name}_async" if self.is_async else name


KINDS: Final = (
    Kind("prefork", ("--async-processes", "0"), shares=False),
    Kind("threads", ("-P", "threads", "--async-processes", "0")),
    Kind("asyncio", ("-P", "asyncio"), is_async=True, has_loop=True),
    Kind("gevent", ("-P", "gevent", "--async-processes", "0")),
    Kind("eventlet", ("-P", "eventlet", "--async-processes", "0")),
    Kind("loop", ("-c", "1", "--async-processes", "1"), is_async=True, count="--async-slots", others=1, has_loop=True),
)
#: Functions in pools that are made for others, and other ways to start children; too many to be run each time.
MORE_KINDS: Final = (
    Kind("hosted", ("-P", "tests.support.hosted_pools:Threads")),
    Kind("spawn", ("--pool-start-method", "spawn", "--async-processes", "0"), shares=False),
    Kind("asyncio:plain", ("-P", "asyncio")),
    Kind("prefork:async", ("--async-processes", "0"), is_async=True, shares=False),
    Kind("threads:async", ("-P", "threads", "--async-processes", "0"), is_async=True),
)
#: It has suites of its own; here it does what needs no other call beside it.
SOLO: Final = Kind("solo", ("-P", "solo"), shares=False, most=1)


@dataclass(frozen=True, slots=True)
class Row:
    """A kind with an application, on one of the brokers."""

    kind: Kind
    program: Program
    broker: Broker

    def __str__(self) -> str:
        return f"{self.kind.name}-{self.program}"


#: Set to "all", every kind is tried with every application in every test.
ALL: Final = os.environ.get("FASTQ_TEST_KINDS") == "all"

# Each kind and each application meets both brokers.
EVERY_ROW: Final = tuple(
    Row(kind, program, ("amqp", "redis")[(index + turn) % 2])
    for index, kind in enumerate((*KINDS, *MORE_KINDS))
    for turn, program in enumerate(APPS)
)
ROWS: Final = tuple(row for row in EVERY_ROW if ALL or row.kind in KINDS)

#: The same with one application for each kind of greenlet: what they share with other kinds is tried by those.
SOME_ROWS: Final = tuple(row for row in ROWS if ALL or str(row) not in ("gevent-fastq", "eventlet-celery"))

#: And more than those, for what matters most: limits, revocation, stops, deaths.
CENTRAL_ROWS: Final = tuple(
    row for row in EVERY_ROW if row in ROWS or str(row) in ("hosted-fastq", "spawn-fastq", "spawn-celery")
)
SOLO_ROWS: Final = (Row(SOLO, "fastq", "redis"), Row(SOLO, "celery", "amqp"))


def rows(where: Callable[[Row], bool] = lambda row: True, among: Sequence[Row] = ROWS) -> pytest.MarkDecorator:
    """Return what makes a test run for these rows."""
    return pytest.mark.parametrize("row", [row for row in among if where(row)], ids=str, scope="module")


central_rows = rows(among=CENTRAL_ROWS)
central_and_solo_rows = rows(among=(*CENTRAL_ROWS, *SOLO_ROWS))
solo_too = rows(among=(*ROWS, *SOLO_ROWS))
some_and_solo_rows = rows(among=(*SOME_ROWS, *SOLO_ROWS))
sharing_rows = rows(lambda row: row.kind.shares)


class Field:
    """A broker, and workers and calls of one row."""

    def __init__(self, row: Row, stage: Stage) -> None:
        self.row = row
        self.kind = row.kind
        self.stage = stage
        self.ledger = stage.ledger
        self._gates = (stage.folder / f"gate{number}" for number in itertools.count())
        self._buses: dict[int, BlockingBus] = {}

    def close(self) -> None:
        """End the workers and close connections."""
        for bus in self._buses.values():
            bus.close()
        self.stage.close()

    # -- workers

    def start(self, *arguments: str, calls: int = CALLS, **options: Any) -> WorkerProcess:
        """Return a worker that runs so many calls at a time; options are those of ``Stage.start_worker``."""
        name = f"w{len(self.stage.workers) + 1}@here"
        return self.stage.start_worker(
            *self.kind.arguments(calls), "-n", name, *arguments, app=APPS[self.row.program], **options
        )

    def start_reliable(self, *arguments: str, **options: Any) -> WorkerProcess:
        """Return a worker that acknowledges after the run."""
        return self.start("--reliable", *arguments, **options)

    def ask(self, method: str, worker: int = 1, **arguments: Any) -> Any:
        """Return a worker's reply to a command. Raises TimeoutError when there is none."""
        bus = self._buses.setdefault(0, open_blocking_bus(self.stage.url, self.stage.client.conf))
        replies: list[Reply] = list(bus.ask(method, arguments, PATIENCE_S, destination=[f"w{worker}@here"]))
        if not replies:
            raise TimeoutError(f"no reply to {method}\n{self.stage.workers[worker - 1].log()[-4000:]}")
        return replies[0][1]

    def processes(self, worker: int = 1) -> list[int]:
        """Return the pids of those that run calls."""
        pool = self.ask("stats", worker)["pool"]
        return [int(pid) for pid in pool["processes"]]

    # -- calls

    def gate(self) -> Path:
        """Return a file for calls to wait for, which does not exist."""
        return next(self._gates)

    def call(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send a call of the kind's task, whose result is wanted; its first argument is its number."""
        return self.stage.call(self.kind.task(task), *args, **options)

    def call_many(self, count: int, task: str, *args: Any, **options: Any) -> list[AsyncResult[Any]]:
        """Send several."""
        return [self.call(task, *args, **options) for _ in range(count)]

    def send(self, count: int, task: str, *args: Any, **options: Any) -> list[int]:
        """Send numbered calls without results."""
        return self.stage.send(count, self.kind.task(task), *args, **options)

    def wait_for_running(self, numbers: Sequence[int]) -> None:
        """Return when all these calls have begun and not ended."""
        until(lambda: set(numbers) <= self.ledger.running().keys(), PATIENCE_S, f"{numbers} run, as the ledger says")

    def error_of(self, result: AsyncResult[Any]) -> str:
        """Wait for the end and return the name of the error, as fastq calls it; "" when there is none."""
        value = result.get(timeout=2 * PATIENCE_S, propagate=False)
        if not isinstance(value, Exception):
            return ""
        name = type(value).__name__
        return {"TaskRevokedError": "TaskRevoked"}.get(name, name)

    def last(self, count: int) -> list[int]:
        """Return the numbers of the calls that were sent last."""
        return self.stage.sent[-count:]

    def stays(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Raise when the condition does not hold for all of that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert condition(), what
            time.sleep(0.02)


def open_field(row: Row, request: pytest.FixtureRequest, folder: Path) -> Field:
    """Return the place of a row, without workers."""
    return Field(row, open_stage(row.broker, request, folder))
