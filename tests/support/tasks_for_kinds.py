"""Tasks that every kind of pool has to run, for a FastQ and a Celery application: plain, and as coroutine functions.

A body is a generator that yields for how many seconds the task is to wait. Of each body two tasks are made: ``name``
sleeps in its thread, ``name_async`` awaits. ``support.kinds`` knows which of them a kind runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeAlias

from tests.support.task_ledger import record, record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")
STOPPED = b"stopped\0"  # a soft limit was seen inside of the task
PAUSE_S = 0.01

Steps: TypeAlias = "Generator[float, None, Any]"
Body: TypeAlias = "Callable[..., Steps]"

_mark: ContextVar[int | None] = ContextVar("mark", default=None)
_kept: list[bytearray] = []


@dataclass(frozen=True, slots=True)
class Words:
    """What the two kinds of application call differently. ``current_task()`` returns the task that runs."""

    soft_limit: type[Exception]
    ignore: type[Exception]
    reject: type[Exception]
    current_task: Callable[[], Any]
    logger: Any


def settings() -> dict[str, Any]:
    """Return the settings that the test has asked for."""
    found: dict[str, Any] = json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}"))
    return found


def sleeping(body: Body) -> Callable[..., Any]:
    """Return the plain function of a body."""

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        steps = body(*args, **kwargs)
        try:
            pause = next(steps)
            while True:
                try:
                    time.sleep(pause)
                except Exception as error:
                    pause = steps.throw(error)
                else:
                    pause = next(steps)
        except StopIteration as end:
            return end.value

    return run


def awaiting(body: Body) -> Callable[..., Any]:
    """Return the coroutine function of a body."""

    @wraps(body)
    async def run(*args: Any, **kwargs: Any) -> Any:
        steps = body(*args, **kwargs)
        try:
            pause = next(steps)
            while True:
                try:
                    await asyncio.sleep(pause)
                except Exception as error:
                    pause = steps.throw(error)
                else:
                    pause = next(steps)
        except StopIteration as end:
            return end.value

    return run


def add_tasks(app: Any, words: Words) -> None:
    """Give the application every task, in both ways."""

    def task(**options: Any) -> Callable[[Body], Body]:
        def add(body: Body) -> Body:
            app.task(name=body.__name__, bind=True, **options)(sleeping(body))
            app.task(name=f"{body.__name__}_async", bind=True, **options)(awaiting(body))
            return body

        return add

    def other(self: Any, name: str) -> Any:
        """Return the task of that name which runs in the same way as this one."""
        return app.tasks[f"{name}_async" if self.name.endswith("_async") else name]

    @task()
    def work(self: Any, number: int, seconds: float = 0.0) -> Steps:
        """Take that long and return the number."""
        record_start(LEDGER, number)
        if seconds:
            yield seconds
        record_done(LEDGER, number)
        return number

    @task()
    def until(self: Any, number: int, gate: str) -> Steps:
        """Wait until a file exists."""
        record_start(LEDGER, number)
        while not os.path.exists(gate):
            yield PAUSE_S
        record_done(LEDGER, number)
        return number

    @task()
    def who(self: Any, number: int, gate: str) -> Steps:
        """Return everything that this call is taken for, at any time, while others run."""
        record_start(LEDGER, number)
        before, _ = _mark.get(), _mark.set(number)
        seen = set()
        while True:
            is_over = os.path.exists(gate)
            running = words.current_task()
            seen.add((self.request.id, running.request.id, running.name, self.request.args[0], _mark.get()))
            if is_over:
                break
            yield PAUSE_S
        record_done(LEDGER, number)
        return {"before": before, "seen": sorted(seen)}

    @task()
    def where(self: Any, number: int) -> Steps:
        """Return the process, and what it is like for the task's code."""
        yield 0
        program = "import signal; print(signal.getsignal(signal.SIGTERM).name, len(signal.pthread_sigmask(0, ())))"
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return {
            "pid": os.getpid(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "subprocess": child.stdout.split(),
            "thread": threading.current_thread().name,
        }

    @task()
    def stops_in_time(self: Any, number: int, seconds: float) -> Steps:
        """Clean up when the soft limit comes, which takes a moment, and return normally."""
        record_start(LEDGER, number)
        try:
            yield from _pieces(seconds)
        except words.soft_limit:
            record(LEDGER, STOPPED, number)
            yield PAUSE_S
            return "stopped in time"
        return "was not stopped"

    @task()
    def ignores_soft_limit(self: Any, number: int, seconds: float) -> Steps:
        """Go on after the soft limit."""
        record_start(LEDGER, number)
        try:
            yield from _pieces(seconds)
        except words.soft_limit:
            record(LEDGER, STOPPED, number)
        yield from _pieces(seconds)
        record_done(LEDGER, number)

    @task()
    def stuck(self: Any, number: int, seconds: float) -> Steps:
        """Block in C, a coroutine too."""
        record_start(LEDGER, number)
        time.sleep(seconds)
        record_done(LEDGER, number)
        return number
        yield

    @task()
    def kill(self: Any, number: int) -> Steps:
        """End the process that runs this, as a segmentation fault or the memory killer does."""
        record_start(LEDGER, number)
        yield PAUSE_S
        os.kill(os.getpid(), signal.SIGKILL)
        yield 60

    @task()
    def grow(self: Any, number: int, mebibytes: int) -> Steps:
        """Keep that much memory for the rest of the process's life; return the process."""
        record_start(LEDGER, number)
        yield PAUSE_S
        _kept.append(bytearray(b"x") * (mebibytes << 20))
        record_done(LEDGER, number)
        return os.getpid()

    @task()
    def fail(self: Any, number: int) -> Steps:
        """Raise."""
        yield PAUSE_S
        raise ValueError(f"number {number} is bad")

    @task(throws=(KeyError,), max_retries=2, default_retry_delay=0.01)
    def again(self: Any, number: int) -> Steps:
        """Retry until it may not."""
        record_start(LEDGER, number)
        yield PAUSE_S
        if self.request.retries < 2:
            raise self.retry(countdown=0, exc=KeyError(number))
        record_done(LEDGER, number)
        return self.request.retries

    @task(autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0, max_retries=2)
    def again_by_itself(self: Any, number: int, good_after: int) -> Steps:
        """Raise an error that is retried, so often."""
        record_start(LEDGER, number)
        yield PAUSE_S
        if self.request.retries < good_after:
            raise OSError(f"attempt {self.request.retries}")
        return self.request.retries

    @task()
    def rejects(self: Any, number: int) -> Steps:
        """Have the broker drop the message."""
        record_start(LEDGER, number)
        yield PAUSE_S
        raise words.reject("not wanted", requeue=False)

    @task()
    def ignores(self: Any, number: int) -> Steps:
        """Leave the state to whoever has set it."""
        yield PAUSE_S
        self.update_state(state="BY_HAND", meta={"number": number})
        yield PAUSE_S
        raise words.ignore()

    @task()
    def progresses(self: Any, number: int, gate: str) -> Steps:
        """Tell of its progress, and wait."""
        yield PAUSE_S
        self.update_state(state="PROGRESS", meta={"number": number})
        while not os.path.exists(gate):
            yield PAUSE_S
        return number

    @task()
    def sends(self: Any, number: int, count: int, dies: bool = False) -> Steps:
        """Send calls of ``work`` with the numbers that follow; ``dies`` in the first run, once they are sent."""
        record_start(LEDGER, number)
        results = [other(self, "work").delay(number + index + 1) for index in range(count)]
        yield PAUSE_S
        record_done(LEDGER, number)
        return [result.id for result in results]

    @task()
    def logs(self: Any, number: int, gate: str) -> Steps:
        """Write a line before and after a wait."""
        record_start(LEDGER, number)
        words.logger.warning("number %d is here", number)
        while not os.path.exists(gate):
            yield PAUSE_S
        words.logger.warning("number %d goes", number)
        record_done(LEDGER, number)


def _pieces(seconds: float) -> Generator[float, None, None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield PAUSE_S
