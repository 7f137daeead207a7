"""``worker -B``: the application's beat, with its own scheduler class, in a process of its own beside the worker.

A keeper is forked while the main process has neither threads nor a loop. It forks the beat, starts it again when it
ends, and ends it with the worker, however that ends. Scheduling is Celery's own code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

import celery
from celery.beat import EmbeddedService

from fastq.pool.process import die_with_parent, set_name
from fastq.pool.zygote import Exited

logger = logging.getLogger("celery.beat")

FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 60.0
STOP_S: Final = 5.0  # chosen: to write a schedule file, or a row


class Beat:
    """The beat of a worker."""

    def __init__(self, app: celery.Celery, schedule_filename: str, scheduler: str) -> None:
        conf = app.conf
        self._app = app
        self._filename = schedule_filename or conf.beat_schedule_filename
        self._scheduler = scheduler or conf.beat_scheduler
        self._keeper = 0

    def start(self) -> None:
        """Fork the keeper. Call it before this process has threads, a loop or a zygote."""
        self._keeper = _fork(self._keep)

    def ask_stop(self) -> None:
        """Ask the beat to end; does not wait."""
        if self._keeper:
            os.kill(self._keeper, signal.SIGTERM)

    def stop(self) -> None:
        """End the beat; its schedule has been kept when this returns."""
        self.ask_stop()
        if self._keeper:
            os.waitpid(self._keeper, 0)
            self._keeper = 0

    def _keep(self) -> None:
        set_name(b"fastq-keeper")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            pid = _fork(self._run)
            status = _status_of(pid)
            if status is None:
                return
            if time.monotonic() - began > LAST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            logger.error("beat has ended (%s); it starts again in %g s", Exited(pid, status).reason, pause_s)
            if signal.sigtimedwait({signal.SIGTERM}, pause_s) is not None:
                return
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _run(self) -> None:
        set_name(b"fastq-beat")
        signal.signal(signal.SIGTERM, _end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        service = EmbeddedService(self._app, schedule_filename=self._filename, scheduler_cls=self._scheduler)
        for name in ("billiard", "multiprocessing"):
            if (process := sys.modules.get(f"{name}.process")) is not None:
                process.current_process()._name = service.name
            if (util := sys.modules.get(f"{name}.util")) is not None:
                util._run_after_forkers()
        self._app.set_default()
        self._app.set_current()
        service.service.start(embedded_process=True)


def _end(signum: int, frame: object) -> NoReturn:
    """End the beat by the way on which it keeps its schedule."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def _fork(run: Callable[[], None]) -> int:
    """Run the function in a process that is asked to end when this one does; return its pid."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # Keys pressed at the terminal go to the whole group; the worker says when it is time.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(signal.SIGTERM)
        if os.getppid() == parent:
            run()
            code = 0
    except SystemExit:
        code = 0
    except Exception as error:  # the scheduler is users' code
        logger.critical("beat raised exception %s: %r", type(error), error, exc_info=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _status_of(pid: int) -> int | None:
    """Wait for the process and return its status; None when we were asked to end, and it has ended with us."""
    while signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
    os.kill(pid, signal.SIGTERM)
    if signal.sigtimedwait({signal.SIGCHLD}, STOP_S) is None:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
