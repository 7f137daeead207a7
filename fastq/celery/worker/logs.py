"""Logging of a worker that runs a Celery application: Celery's own code sets it up, at the moments when Celery does.

So formats, colours, ``setup_logging`` and its companions, log files per child and the redirected streams are Celery's.
"""

from __future__ import annotations

import faulthandler
import logging
import os
from dataclasses import dataclass

import celery
from celery._state import get_current_task
from celery.app import log

from fastq.celery.conf.settings import blaming
from fastq.pool.process import DUMP_SIGNAL
from fastq.pool.titles import process_name
from fastq.running import messages
from fastq.worker.options import WorkerOptions, expand_path
from fastq.worker.process.log import TaskFields, log_stream, move
from fastq.worker.process.logfile import LogFile

#: Logging has one level less than the option.
_LEVELS = {"FATAL": "CRITICAL"}


def set_up(app: celery.Celery, options: WorkerOptions) -> bool:
    """Set logging up in the main process; return whether the application did so itself (signal ``setup_logging``)."""
    # The class that Celery opens log files with; ours follows no links of somebody else's.
    log.WatchedFileHandler = LogFile
    with blaming("worker_log_format", "worker_task_log_format", "worker_log_datefmt", "worker_log_color"):
        handled = app.log.setup(
            _LEVELS.get(options.loglevel, options.loglevel),
            options.logfile or None,
            redirect_stdouts=False,
            colorize=options.color,
            hostname=options.hostname,
        )
    return bool(handled)


#: Celery's logger for each of our main process's lines that people look for; the other lines come from the last.
_NAMES = {
    messages.READY: "celery.apps.worker",
    messages.WARM_SHUTDOWN: "celery.apps.worker",
    messages.COLD_SHUTDOWN: "celery.apps.worker",
    messages.CONNECTED: "celery.worker.consumer.connection",
    messages.CONNECTION_LOST: "celery.worker.consumer.consumer",
    messages.CANNOT_CONNECT: "celery.worker.consumer.consumer",
}
_NAME = "celery.worker"


class _AsCelery(logging.Handler):
    """Hands records of ours on under the names of Celery's loggers: those are the ones that projects configure."""

    def emit(self, record: logging.LogRecord) -> None:
        """Have the logger of that name handle the record, as if it had been logged there."""
        record.name = _NAMES.get(str(record.msg), _NAMES.get(record.getMessage(), _NAME))
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def speak_as_celery() -> None:
    """Have the lines of this process come from Celery's loggers, unless the project configures ``fastq`` by name."""
    ours = logging.getLogger("fastq")
    if not ours.handlers:
        ours.addHandler(_AsCelery())
        ours.propagate = False
        if ours.level == logging.NOTSET:
            ours.setLevel(logging.DEBUG)  # the logger that it is handed to decides


def redirect(app: celery.Celery) -> None:
    """Turn what is printed from now on into records, if the settings say so; children inherit that."""
    if app.conf.worker_redirect_stdouts:
        app.log.redirect_stdouts(app.conf.worker_redirect_stdouts_level)


@dataclass(frozen=True, slots=True)
class ChildLogging:
    """What a freshly forked child does to the logging of its parent. Call it with the child's number."""

    app: celery.Celery
    logfile: str
    hostname: str
    calls: str = "one"

    def prepare(self) -> None:
        """Have records tell of the child and its task, once for all children."""
        TaskFields.install(_running_task)

    def __call__(self, number: int) -> None:
        """Open the child's own log file, if its name asks for one."""
        if "%i" in self.logfile.lower():
            self.app.log.already_setup = False
            self.app.log.setup(int(os.environ["CELERY_LOG_LEVEL"]), self.logfile, hostname=self.hostname)
            self.prepare()
        self._begin(number)

    def renumber(self, before: int, number: int) -> None:
        """Go on in the file of that number: without Celery's code, so that receivers of its signals are called once."""
        if "%i" in self.logfile.lower():
            move(*(expand_path(self.logfile, self.hostname, each) for each in (before, number)))
        self._begin(number)

    def here(self) -> None:
        """Have records of the worker's own process tell of the task."""
        self.prepare()

    def _begin(self, number: int) -> None:
        if TaskFields.of_process is not None:
            TaskFields.of_process.process_name = process_name(number, self.calls)
        if self.logfile:
            # A child that is stuck writes its stacks where the operator looks, not where standard error went.
            faulthandler.register(DUMP_SIGNAL, file=log_stream(), all_threads=True, chain=False)


def _running_task() -> tuple[str, str] | None:
    task = get_current_task()
    return (task.name, task.request.id) if task is not None and task.request.id else None
