"""One tool's run: its application's worker under either program, its client, and helpers such as beat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.servers import wait_until
from tests.support.worker_process import ROOT, Program, WorkerProcess

APPS = "tests.celery.tools.apps"
CLIENT_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 20.0
# Nobody to talk to, so a worker need not wait a second for answers.
ALONE = ("--without-gossip", "--without-mingle")


class Tool:
    """The application `apps/<name>.py` with a broker, a folder for its files and an environment of its own."""

    def __init__(
        self, program: Program, folder: Path, environment: dict[str, str], start_worker: Callable[..., WorkerProcess]
    ) -> None:
        self.program = program
        self.folder = folder
        self.environment = {**environment, "TOOL_FOLDER": str(folder)}
        self._start_worker = start_worker
        self._helpers: list[subprocess.Popen[bytes]] = []

    def worker(self, name: str, *arguments: str) -> WorkerProcess:
        """Return a worker of the application that is ready; one child unless told otherwise."""
        concurrency = () if "-c" in arguments else ("-c", "1")
        options = (*concurrency, *ALONE, *arguments)
        return self._start_worker(*options, app=f"{APPS}.{name}", program=self.program, env=self.environment)

    def worker_and_beat(self, name: str, scheduler: str, is_inside: bool) -> tuple[WorkerProcess, Callable[[], str]]:
        """Return a worker, and what a function says that the beat has printed: one in the worker, or one beside it."""
        if is_inside:
            worker = self.worker(name, "-B", "--scheduler", scheduler)
            return worker, worker.log
        worker = self.worker(name)
        return worker, self.helper("-m", "celery", "-A", f"{APPS}.{name}", "beat", "-S", scheduler, "-l", "INFO")

    def client(self, name: str, *arguments: str) -> Any:
        """Run the application as a program and return the JSON value it printed last."""
        done = subprocess.run(
            [sys.executable, "-m", f"{APPS}.{name}", *arguments],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"the client of {name} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])

    def helper(self, *command: str) -> Callable[[], str]:
        """Start a Python program that runs until the test ends; return a function that returns what it printed."""
        log_file = self.folder / f"helper{len(self._helpers) + 1}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._helpers.append(process)
        return lambda: log_file.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End the helpers."""
        for process in self._helpers:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)


def wait_for(what: Callable[[], Any], timeout_s: float, described: Callable[[], str]) -> Any:
    """Return the first true value of `what()`; fail with what `described()` says when that takes too long."""
    found: list[Any] = []

    def ready() -> bool:
        found[:] = [what()]
        return bool(found[0])

    wait_until(ready, timeout_s, lambda: AssertionError(described()))
    return found[0]
