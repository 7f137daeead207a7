"""Logging of a worker that runs a Celery application: Celery's own code sets it up, at the moments when Celery does.

So formats, colours, ``setup_logging`` and its companions, log files per child and the redirected streams are Celery's.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from dataclasses import dataclass

import celery

from fastq.worker.log import log_stream
from fastq.worker.options import WorkerOptions

#: Logging has one level less than the option.
_LEVELS = {"FATAL": "CRITICAL"}


def set_up(app: celery.Celery, options: WorkerOptions) -> bool:
    """Set logging up in the main process; return whether the application did so itself (signal ``setup_logging``)."""
    handled = app.log.setup(
        _LEVELS.get(options.loglevel, options.loglevel),
        options.logfile or None,
        redirect_stdouts=False,
        colorize=options.color,
        hostname=options.hostname,
    )
    return bool(handled)


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

    def __call__(self, number: int) -> None:
        """Open the child's own log file, if its name asks for one."""
        for name in ("billiard", "multiprocessing"):
            if (process := sys.modules.get(f"{name}.process")) is not None:
                process.current_process().index = number - 1  # what %i stands for
        if "%i" in self.logfile.lower():
            self.app.log.already_setup = False
            self.app.log.setup(int(os.environ["CELERY_LOG_LEVEL"]), self.logfile, hostname=self.hostname)
        if self.logfile:
            # A child that is stuck writes its stacks where the operator looks, not where standard error went.
            faulthandler.register(signal.SIGUSR1, file=log_stream(), all_threads=True, chain=False)
