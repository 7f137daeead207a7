"""A child that runs a Celery application's tasks: what is Celery's in its life, from its name to its signals."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import celery
from billiard import process
from billiard.context import ForkProcess
from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import Worker
from celery import _state, signals
from celery.app import trace

from fastq.celery.checking.hookpoints import is_genuine
from fastq.celery.running.chords import name_claims
from fastq.celery.running.connections import watch_handlers
from fastq.celery.running.runner import CeleryRunner
from fastq.pool.titles import process_name
from fastq.running.birth import ChildOptions, Signals
from fastq.running.calls import is_hosted
from fastq.running.child import EX_RECYCLE, ChildProcess
from fastq.wire.pipe import ChildPipe


class CeleryChild(ChildProcess):
    """A child that runs the tasks of a Celery application."""

    _signals: Signals

    def __init__(self, app: celery.Celery, options: ChildOptions, results: str) -> None:
        runner = CeleryRunner(app, options, results)
        super().__init__(options, runner)
        self._app = app
        self._connections = runner.connections
        self._is_hosted = is_hosted(options.calls)
        runner.prepare()
        name_claims()

    def __call__(self, sock: int, shared: int, slot: int, group: int = 0) -> int:
        """Run calls until the main process says stop or goes away; returns the exit code."""
        code = super().__call__(sock, shared, slot, group)
        if not is_genuine(Worker._do_exit):
            # A tool waits for the end of a child there; what it has put its own around ends the process.
            Worker._do_exit(_Loop(lambda: None), os.getpid(), code)
        return code

    def handle_signals(self, pipe: ChildPipe) -> None:
        """Set the handlers, one more than other children have."""
        watch_handlers(self._connections.exchange)
        self._signals = Signals(pipe)
        self._signals.handle(signal.SIGUSR1, _on_soft_limit)

    def begin(self, pipe: ChildPipe, number: int) -> None:
        """Do what Celery's pool does in a new child, in its order."""
        app = self._app
        _become(number, self._options.calls)
        for name in ("billiard", "multiprocessing"):
            if (module := sys.modules.get(f"{name}.util")) is not None:
                module._run_after_forkers()
        _state._set_task_join_will_block(True)
        super().begin(pipe, number)
        app.loader.init_worker()
        app.loader.init_worker_process()
        app.set_current()
        _state.set_default_app(app)
        trace._tasks = app._tasks
        if not self._is_hosted:
            signals.worker_process_init.send(sender=self._options.hostname)
        # Over those that the application has set meanwhile.
        self._signals.install()

    def begin_here(self, is_main: bool) -> None:
        """Do what Celery's own solo pool does."""
        app = self._app
        if is_main:
            watch_handlers(self._connections.exchange)
            # For the whole process: in a test's, the test may wait for results.
            _state._set_task_join_will_block(True)
        super().begin_here(is_main)
        app.set_current()
        _state.set_default_app(app)
        trace._tasks = app._tasks
        signals.worker_process_init.send(sender=self._options.hostname)

    def serve(self, pipe: ChildPipe) -> None:
        """Run calls, inside of the loops that tools have put around that of Celery's pool to hear of a child's end."""
        if is_genuine(Worker.workloop):
            super().serve(pipe)
        else:
            Worker.workloop(_Loop(lambda: super(CeleryChild, self).serve(pipe)), pid=os.getpid())

    def end(self, code: int) -> None:
        """Have receivers hear of the end. Of a process with a pool of somebody else's, that tells, or nobody."""
        if self._is_hosted:
            return
        signals.worker_process_shutdown.send(sender=self._options.hostname, pid=os.getpid(), exitcode=code)

    def renumber(self, before: int, number: int) -> None:
        """Go by the number of the slot that this process takes its calls in."""
        _name(process.current_process(), number, self._options.calls)
        super().renumber(before, number)


def _on_soft_limit(signum: int, frame: object) -> None:
    """Raise the soft time limit in the task that runs: what SIGUSR1 means to the children of Celery's pool."""
    if _state.get_current_task() is not None:
        raise SoftTimeLimitExceeded()


def _become(number: int, calls: str) -> None:
    """Make billiard and multiprocessing know this process as that child of a pool: by name, index, daemon flag.

    As in Celery, the flag keeps tasks from starting processes with the standard library in prefork alone.
    """
    child: Any = ForkProcess(daemon=calls == "one")
    _name(child, number, calls)
    child._parent_pid = os.getppid()
    process._process_counter = itertools.count(1)
    process._children = set()
    process._set_current_process(child)


def _name(child: Any, number: int, calls: str) -> None:
    child.name = process_name(number, calls)
    child._identity = (number,)
    child.index = number - 1  # what %i stands for


class _Loop:
    """What billiard's work loop needs of its process, so that a loop that a tool has put around it surrounds ours."""

    maxtasks = None
    max_memory_per_child = None
    inqW_fd = synqW_fd = -1  # noqa: N815  billiard's names
    on_exit = on_ready_counter = wait_for_syn = None

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve
        self.outq = self

    def put(self, item: object) -> None:
        """Take what the loop would tell its main process: nothing of it is needed."""

    def prepare_result(self, result: Any) -> Any:
        """Return the result."""
        return result

    def wait_for_job(self) -> None:
        """Run all calls, then end the loop."""
        self._serve()
        raise SystemExit(EX_RECYCLE)

    def _ensure_messages_consumed(self, completed: int) -> bool:
        return True
