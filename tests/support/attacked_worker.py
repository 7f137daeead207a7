"""A running worker under attack: what is sent to it, whether it still does its work, how much memory it takes.

The worker runs a FastQ or a Celery application with the task ``work``, on RabbitMQ or Redis.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from fastq.brokers import open_blocking_bus
from fastq.interfaces import BlockingBus, Reply
from tests.support.stage import Stage
from tests.support.worker_process import WorkerProcess

Program = Literal["fastq", "celery"]
MIB = 1 << 20
NODE = "attacked@here"
APPS: Mapping[Program, str] = {"fastq": "tests.support.tasks_under_attack", "celery": "tests.celery.tasks_under_attack"}


class Attacked:
    """One worker with that many children. ``folder`` of the stage holds its log."""

    def __init__(self, stage: Stage, program: Program, children: int = 2, **settings: Any) -> None:
        self.stage = stage
        self.program = program
        self.worker: WorkerProcess = stage.start_worker(
            "-c", str(children), "-n", NODE, app=APPS[program], await_ready=True, **settings
        )
        self.children = self.worker.children()
        self.bus: BlockingBus = open_blocking_bus(stage.url, stage.client.conf)

    def close(self) -> None:
        """Close the test's own connection; the stage ends the worker."""
        self.bus.close()

    def send_good(self, timeout_s: float, count: int = 1) -> float:
        """Publish good calls, wait for their end, and return the seconds that took."""
        began = time.monotonic()
        self.stage.wait_for(self.stage.send(count), timeout_s)
        return time.monotonic() - began

    def ask(self, method: str, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Return the worker's reply to a command. Raises TimeoutError when there is none."""
        replies: list[Reply] = list(self.bus.ask(method, arguments, timeout_s, destination=[NODE]))
        if not replies:
            raise TimeoutError(f"no reply to {method} after {timeout_s} s\n{self.worker.log()[-4000:]}")
        return replies[0][1]

    def check_alive(self) -> None:
        """Raise when the worker has ended, or a child of it has died."""
        assert self.worker.exit_code is None, self.worker.log()[-6000:]
        assert self.worker.children() == self.children, self.worker.log()[-6000:]

    @contextmanager
    def memory_bound(self, mebibytes: int) -> Iterator[None]:
        """Raise when any process of the worker took more than that beyond what it had before, at any moment."""
        before = {}
        for pid in self.worker.tree():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
            before[pid] = memory_of(pid, "VmRSS")
        yield
        growth = {pid: (memory_of(pid, "VmHWM") - had) / MIB for pid, had in before.items()}
        print("memory grew by", " ".join(f"{each:.1f}" for each in growth.values()), "MiB")
        assert max(growth.values()) < mebibytes, growth


def memory_of(pid: int, which: str) -> int:
    """Return a line of a process's memory in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.partition(f"{which}:")[2].split()[0]) * 1024


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
