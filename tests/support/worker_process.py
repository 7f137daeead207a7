"""A real `fastq worker` as a child process of the test: started, watched through its log, stopped, killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil

from tests import ROOT
from tests.support.servers import wait_until

Program = Literal["fastq", "celery"]

READY = re.compile(r"\S+@\S+ ready\.")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0  # longer than the 25 s of grace that a warm stop has


class WorkerFailed(Exception):
    """The worker did not do in time what the test waited for; the text ends with its log."""


class WorkerProcess:
    """One worker.

    source     the text of a module `tasks` with the application, written into the folder; or
    app        the name of an importable application
    arguments  further options of `fastq worker`, such as "-c", "2"
    program    "celery" starts the same application under stock Celery
    stdin      a descriptor; of a terminal, and the worker is in its foreground
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        source: str | None = None,
        app: str = "tasks",
        env: Mapping[str, str] | None = None,
        log_level: str = "INFO",
        await_ready: bool = True,
        program: Program = "fastq",
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.folder = folder
        self.log_file = folder / "worker.log"
        self.program: Program = program
        self._await_ready = await_ready
        self._stdin = stdin
        self._command = [sys.executable, "-m", program, "-A", app, "worker", "-l", log_level, *arguments]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}
        if source is not None:
            (folder / "tasks.py").write_text(source, encoding="utf-8")

    def start(self) -> WorkerProcess:
        """Return self when the worker has written its ready line, or at once with await_ready=False."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._environment,
                stdin=self._stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_own_terminal if self._stdin >= 0 and os.isatty(self._stdin) else None,
            )
        if self._await_ready:
            self.wait_for_log(READY.pattern, START_TIMEOUT_S)
        return self

    @property
    def pid(self) -> int:
        """The pid of the parent process."""
        assert self._process is not None, "start() first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the worker runs; negative when a signal ended it."""
        assert self._process is not None, "start() first"
        return self._process.poll()

    def log(self) -> str:
        """Return what the worker has printed and logged so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def wait_for_log(self, pattern: str, timeout_s: float = 10.0, count: int = 1) -> re.Match[str]:
        """Return the last match once the pattern has occurred that often in the log; fail when the worker ends."""
        compiled = re.compile(pattern)

        def matches() -> list[re.Match[str]]:
            return list(compiled.finditer(self.log()))

        wait_until(
            lambda: len(matches()) >= count or self.exit_code is not None,
            timeout_s,
            lambda: self._failed(f"no {pattern!r} in the log after {timeout_s} s"),
        )
        found = matches()
        if len(found) < count:
            raise self._failed(f"the worker ended with exit code {self.exit_code} before {pattern!r} was in its log")
        return found[-1]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the parent process."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Return the exit code when the worker has ended."""
        assert self._process is not None, "start() first"
        self._remember()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failed(f"the worker was still running after {timeout_s} s") from None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Send SIGTERM and return the exit code."""
        self._remember()
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill9(self) -> None:
        """Kill the whole tree at once, as a machine that loses its power; nothing happens when it is gone already."""
        if self._process is None:
            return
        self._remember()
        # The parent first: it would see its children die, and give back what they had.
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        for process in [*self._seen.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Asked first: of what it has once found gone, psutil kills whoever has the number now.
                if process.is_running():
                    process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop the whole tree for as long as the ``with`` block takes; what is killed in there stays dead."""
        pids = self.tree()
        _signal_all(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal_all(pids, signal.SIGCONT)

    def kill9_when(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Kill the whole tree at a moment when the condition holds; the tree stands still while it is looked at."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self.standing_still():
                if condition():
                    self.kill9()
                    return
            time.sleep(0.005)
        raise self._failed(f"no moment within {timeout_s} s was one to kill the worker at")

    def kill9_parent(self) -> None:
        """Kill the parent process alone; its children have to notice by themselves."""
        assert self._process is not None, "start() first"
        self._remember()
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def children(self) -> list[int]:
        """Return the pids of the processes that run tasks, oldest first: the tree without the parent and the zygote."""
        tree = self._remember()
        if self.program == "celery":  # it forks from the parent
            return [process.pid for process in sorted(tree, key=_age)]
        return [process.pid for process in sorted(tree, key=_age) if _parent_of(process) != self.pid]

    def tree(self) -> list[int]:
        """Return the pids of the parent and everything below it."""
        return [self.pid, *(process.pid for process in self._remember())]

    def leftovers(self) -> list[int]:
        """Return the pids of processes of the tree that outlived the worker."""
        return [pid for pid, process in self._seen.items() if process.is_running() and not _is_zombie(process)]

    def wait_for_no_leftovers(self, timeout_s: float = 10.0) -> None:
        """Return when nothing of the tree is alive."""
        wait_until(
            lambda: not self.leftovers(),
            timeout_s,
            lambda: self._failed(f"processes {self.leftovers()} outlived the worker"),
        )

    def _remember(self) -> list[psutil.Process]:
        try:
            tree: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen.update((process.pid, process) for process in tree)
        return tree

    def _failed(self, what: str) -> WorkerFailed:
        return WorkerFailed(f"{what}\n--- log of {' '.join(self._command)}\n{self.log()[-6000:]}")


def has_ended(pid: int) -> bool:
    """Return whether a process of this number is gone, or only waits to be waited for."""
    try:
        return _is_zombie(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _age(process: psutil.Process) -> tuple[float, int]:
    try:
        return process.create_time(), process.pid
    except psutil.NoSuchProcess:
        return 0.0, process.pid


def _parent_of(process: psutil.Process) -> int | None:
    try:
        parent: int = process.ppid()
    except psutil.NoSuchProcess:
        return None
    return parent


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
