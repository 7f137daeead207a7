"""A node that answers remote control, in a thread of the test: fastq's Control over a worker made of plain values.

Messages that the view lists are real ones; what commands do to the pool, the queues and so on is written down.
Beside it: stock Celery's worker and command line as child processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from fastq._child import TaskRules
from fastq.queues import QueueSpec, Topology
from fastq.settings import Settings
from fastq.wire.message import encode_task
from fastq.worker.options import WorkerOptions
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.control import Control
from fastq.worker.remote.revoked import Revoked
from fastq.worker.report import configuration, report_text
from tests import ROOT
from tests.support.forked import run_command
from tests.support.servers import wait_until


def row(name: str, task_id: str, args: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    """Return a message as the core lists it; ``headers`` and the options of ``encode_task`` go into the message."""
    listed = {key: more.pop(key) for key in ("pid", "started", "acknowledged", "deliveries", "eta") if key in more}
    body = more.pop("body", None) or json.dumps([list(args), {}, {}]).encode()
    message = encode_task(name, task_id, body, eta=listed.get("eta"), argsrepr=repr(tuple(args)), **more)
    return {
        "id": task_id,
        "name": name,
        "props": message.props,
        "body": body,
        "exchange": "",
        "routing_key": "celery",
        "redelivered": False,
        "deliveries": 1,
        "eta": None,
        "pid": None,
        "started": None,
        "acknowledged": False,
        **listed,
    }


class Recorded:
    """Writes down every call of its methods."""

    def __init__(self, done: list[tuple[Any, ...]], **attributes: Any) -> None:
        self.done = done
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: self.done.append((name, *args))


class CoreOfRows:
    """What commands ask of the core, out of lists."""

    def __init__(self, done: list[tuple[Any, ...]]) -> None:
        self.done = done
        self.tasks = {name.encode(): TaskRules(name) for name in ("proj.add", "proj.nap")}
        self.revoked: Any = None
        self.prefetch = 8
        self.stalls = 0
        self.rows: dict[str, list[dict[str, Any]]] = {"active": [], "reserved": [], "scheduled": []}

    def active(self) -> list[dict[str, Any]]:
        return self.rows["active"]

    def reserved(self) -> list[dict[str, Any]]:
        return self.rows["reserved"]

    def scheduled(self) -> list[dict[str, Any]]:
        return self.rows["scheduled"]

    def terminate(self, ids: set[str], signum: int) -> list[str]:
        found = [each["id"] for each in self.rows["active"] if each["id"] in ids]
        self.done.append(("terminate", sorted(ids), signum))
        return found


class Queues:
    """What commands ask of the consumer."""

    def __init__(self, settings: Settings) -> None:
        self.queue_specs = [Topology(settings).spec("celery")]

    async def add_queue(self, spec: QueueSpec) -> None:
        self.queue_specs.append(spec)

    async def cancel_queue(self, name: str) -> None:
        self.queue_specs = [spec for spec in self.queue_specs if spec.name != name]


class PlainEvents:
    """What commands ask of the events."""

    def __init__(self) -> None:
        self.enabled = False
        self.heartbeats = 0

    def enable(self) -> bool:
        was, self.enabled = self.enabled, True
        return not was

    def disable(self) -> bool:
        was, self.enabled = self.enabled, False
        return was

    def heartbeat(self) -> None:
        self.heartbeats += 1


class View:
    """A worker as commands see it. ``done`` has what they did."""

    def __init__(self, settings: Settings, hostname: str) -> None:
        settings.freeze()
        self.done: list[tuple[Any, ...]] = []
        self.hostname = hostname
        self.instance = "i-1"
        self.started_unix = time.time() - 9
        self.settings = settings
        self.options = WorkerOptions(hostname=hostname).resolved(settings)
        self.core = CoreOfRows(self.done)
        self.pool: Any = Recorded(self.done, pids=[11, 12], size=2, beside=0)
        self.consumer: Any = Queues(settings)
        self.events: Any = PlainEvents()
        self.autoscale: Any = None
        self.revocations = Revoked()
        self.clock = LamportClock()
        self.registry: Mapping[str, Any] = {
            "proj.add": SimpleNamespace(name="proj.add", max_retries=3),
            "proj.nap": SimpleNamespace(name="proj.nap", max_retries=3, rate_limit="100/m"),
            "celery.chord": SimpleNamespace(name="celery.chord"),
        }
        self.custom_commands: Mapping[str, Callable[..., Any]] = {}

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        return configuration(self.settings, with_defaults)

    def report(self) -> str:
        return report_text(self.settings)

    def mark_revoked(self, ids: Sequence[str]) -> None:
        self.done.append(("mark_revoked", *ids))

    def stop(self, how: str) -> None:
        self.done.append(("stop", how))


class Node:
    """A Control on a loop of its own, in a thread. ``view`` False: without a worker behind it."""

    def __init__(self, url: str, hostname: str, with_view: bool = True, **settings: Any) -> None:
        self._loop = uvloop.new_event_loop()
        self._is_ready = threading.Event()
        self._settings = Settings({"broker_url": url, **settings})
        self.hostname = hostname
        self.view = View(self._settings, hostname) if with_view else None
        self.control: Control
        self._task: asyncio.Task[None]
        # Daemonic: a test that fails half-way must not keep pytest from ending.
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._main()], daemon=True)

    async def _main(self) -> None:
        clock = self.view.clock if self.view else None
        self.control = Control(self._settings, self.hostname, self.view, clock)
        self._task = asyncio.ensure_future(self.control.serve())
        self._is_ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def start(self) -> Node:
        self._thread.start()
        self._is_ready.wait(10)
        self.wait_until_listening()
        return self

    def wait_until_listening(self) -> None:
        wait_until(self.control.ready.is_set, 30, lambda: AssertionError("the node did not get to listen in 30 s"))

    def run(self, work: Callable[[], Any]) -> Any:
        """Run a coroutine function on the node's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()


# --- stock Celery and our own command line

CELERY_APP = """
import time
from celery import Celery
app = Celery("proj", broker={url!r})
app.conf.update({settings!r})

@app.task(name="proj.add")
def add(x, y):
    return x + y

@app.task(name="proj.nap", rate_limit="100/m")
def nap(seconds):
    time.sleep(seconds)
"""


class CeleryWorker:
    """A stock `celery worker`, ready when made; ``stop`` kills it."""

    def __init__(self, folder: Path, url: str, hostname: str, *arguments: str, **settings: Any) -> None:
        (folder / "proj.py").write_text(CELERY_APP.format(url=url, settings=settings), encoding="utf-8")
        self.folder = folder
        self._log = folder / "celery.log"
        command = [sys.executable, "-m", "celery", "-A", "proj", "worker", "-n", hostname, "-l", "INFO", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(
            lambda: " ready." in self.log() or self.process.poll() is not None,
            60,
            lambda: AssertionError(f"Celery's worker did not get ready\n{self.log()}"),
        )
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait(30)


def environment() -> dict[str, str]:
    """Return the environment without what would choose a broker or application."""
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY", "FASTQ"))}
    return {**chosen, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def command_line(program: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `celery` or `fastq` and return how it ended."""
    return run_command(program, arguments, folder, environment())
