"""fastq's main job on the embedded broker, checked and timed: a worker, 10,000 tasks, every result, 300 round trips.

`python -m examples.quickstart`. It needs no server and leaves nothing behind; bench/ measures with more care.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastq import AsyncResult, FastQ, Task

TASKS = 10_000
BATCH = 500
ROUND_TRIPS = 300
TIMEOUT_S = 60.0
BAR_WIDTH = 40

T = TypeVar("T")


def main() -> int:
    """Return the exit code: 0 when every result was right and the worker stopped in order."""
    with tempfile.TemporaryDirectory(prefix="fastq-quickstart-") as folder:
        os.environ["FASTQ_BROKER_URL"] = f"sqlite:///{folder}/fastq.db"
        os.environ.pop("FASTQ_RESULT_BACKEND", None)
        from examples.hello import add, app  # after the environment: the application reads it when it is first used

        log = Path(folder, "worker.log")
        command = [sys.executable, "-m", "fastq", "-A", "examples.hello", "worker", "-l", "WARNING", "-c", "2"]
        print(f"  $ fastq {' '.join(command[3:])}")
        with log.open("wb") as output:
            worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            add.delay(0, 0).get(timeout=TIMEOUT_S)
            run_tasks(app, add)
            run_round_trips(add)
        except Exception as error:
            print(
                f"\n{type(error).__name__}: {error}\n--- the worker's log\n{log.read_text()[-4000:]}", file=sys.stderr
            )
            worker.kill()
            return 1
        finally:
            app.close()
            exit_code = stop(worker)
        if exit_code != 0:
            print(f"the worker ended with exit code {exit_code}\n{log.read_text()[-4000:]}", file=sys.stderr)
            return 1
        print("  worker stopped by SIGTERM, exit code 0")
        return 0


def run_tasks(app: FastQ, add: Task[[int, int], int]) -> None:
    """Send the tasks, wait for every result and compare it with the sum."""
    began = time.perf_counter()
    results: list[AsyncResult[int]] = []
    for first in progress(range(0, TASKS, BATCH), "sent", BATCH):
        with app.batch():
            results += [add.delay(number, number) for number in range(first, first + BATCH)]
    for number, result in enumerate(progress(results, "checked")):
        value = result.get(timeout=TIMEOUT_S)
        if value != 2 * number:
            raise ArithmeticError(f"add({number}, {number}) returned {value!r}")
    wall_s = time.perf_counter() - began
    print(f"  {TASKS:,} tasks sent, run and checked in {wall_s:.2f} s: {TASKS / wall_s:,.0f} tasks/s")


def run_round_trips(add: Task[[int, int], int]) -> None:
    """Call one task after the other, each waiting for its result, and print the quantiles."""
    times = []
    for number in range(ROUND_TRIPS):
        began = time.perf_counter()
        add.delay(number, 1).get(timeout=TIMEOUT_S)
        times.append(time.perf_counter() - began)
    times.sort()
    p50_ms, p99_ms = times[ROUND_TRIPS // 2] * 1e3, times[ROUND_TRIPS * 99 // 100] * 1e3
    print(f"  {ROUND_TRIPS} round trips one by one: p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms")
    result = add.delay(2, 3)
    print(f"  add.delay(2, 3).get() -> {result.get(timeout=TIMEOUT_S)}   (task {result.id})")


def stop(worker: subprocess.Popen[bytes]) -> int:
    """Ask the worker to stop and return its exit code."""
    worker.send_signal(signal.SIGTERM)
    try:
        return worker.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def progress(items: Iterable[T], what: str, step: int = 1) -> Iterator[T]:
    """Yield the items and show how far it has come: a bar on a terminal, a line per quarter elsewhere."""
    show: Callable[[int, str], Any] = show_bar if sys.stdout.isatty() else show_line
    last_shown = 0
    for index, item in enumerate(items, 1):
        yield item
        done = index * step
        if done - last_shown >= TASKS // 100:
            show(done, what)
            last_shown = done


def show_bar(done: int, what: str) -> None:
    """Redraw the bar in place."""
    filled = BAR_WIDTH * done // TASKS
    end = "\n" if done == TASKS else ""
    print(f"\r  [{'#' * filled}{' ' * (BAR_WIDTH - filled)}] {done:,}/{TASKS:,} {what}", end=end, flush=True)


def show_line(done: int, what: str) -> None:
    """Print a line at every quarter."""
    if done % (TASKS // 4) == 0:
        print(f"  {done:,}/{TASKS:,} {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
