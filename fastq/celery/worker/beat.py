"""``worker -B``: the application's beat, with its own scheduler class, in a process of its own beside the children.

The pool starts it, starts it again when it ends, and ends it with the worker. Scheduling is Celery's own code.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import NoReturn

import celery
from celery.beat import EmbeddedService

from fastq.errors import SettingsError
from fastq.pool.process import set_name
from fastq.worker.process.files import check_file

logger = logging.getLogger("celery.beat")


class Beat:
    """What runs in the beat's process. Making one raises SettingsError for a schedule file of no use."""

    def __init__(self, app: celery.Celery, schedule_filename: str, scheduler: str) -> None:
        conf = app.conf
        self._app = app
        self._filename = schedule_filename or conf.beat_schedule_filename
        self._scheduler = scheduler or conf.beat_scheduler
        self._check_file()

    def __call__(self) -> int:
        """Schedule until SIGTERM, which lets it keep its schedule; return the exit code."""
        set_name(b"fastq-beat")
        # Keys pressed at the terminal go to the whole group; the worker says when it is time.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end)
        code = 0
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            self._run()
        except SystemExit:
            pass
        except Exception as error:  # the scheduler is users' code
            logger.critical("beat raised exception %s: %r", type(error), error, exc_info=True)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def _check_file(self) -> None:
        # What the database behind a shelve makes of the name depends on which one it is.
        for suffix in ("", ".db", ".dat", ".dir", ".bak"):
            try:
                check_file(self._filename + suffix)
            except FileNotFoundError:
                return  # the folder; it is said where the file is made
            except OSError as error:
                raise SettingsError(
                    f"schedule file {self._filename + suffix!r} cannot be used: {error.strerror}. Name another file "
                    "with --schedule, or give --uid"
                ) from error

    def _run(self) -> None:
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
