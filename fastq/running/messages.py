"""The worker's log lines, in the shape that people's tooling parses. No handlers, no levels beyond each line's own.

The part up to the colon is Celery's, word for word, because log readers match on it; so are the names in the context.
Each task line is logged with that context as the record's only argument and as ``record.data``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from fastq.printable import cut

RECEIVED: Final = "Task %(name)s[%(id)s] received"
SUCCEEDED: Final = "Task %(name)s[%(id)s] succeeded in %(runtime).6fs: %(return_value)s"
FAILED: Final = "Task %(name)s[%(id)s] raised unexpected: %(exc)s\n%(traceback)s"
FAILED_EXPECTED: Final = "Task %(name)s[%(id)s] raised expected: %(exc)s"
RETRY: Final = "Task %(name)s[%(id)s] retry: %(exc)s"
REJECTED: Final = "Task %(name)s[%(id)s] rejected %(exc)s"
IGNORED: Final = "Task %(name)s[%(id)s] ignored"
REVOKED: Final = "Discarding revoked task: %(name)s[%(id)s]"
REVOKED_BY_STAMP: Final = "Discarding revoked task: %(name)s[%(id)s] (revoked by header: %(stamp)s)"
SOFT_LIMIT: Final = "Soft time limit (%(limit)ss) exceeded for %(name)s[%(id)s]"
HARD_LIMIT: Final = "Hard time limit (%(limit)ss) exceeded for %(name)s[%(id)s]"
UNREGISTERED: Final = (
    "Received unregistered task of type %(name)r.\n"
    "The message was rejected: %(id)r. Import the module that defines the task in the application, or name it with -I."
)

CONNECTED: Final = "Connected to %s"
READY: Final = "%(hostname)s ready."
CONNECTION_LOST: Final = "consumer: Connection to broker lost: %s\nTrying to re-establish the connection..."
CANNOT_CONNECT: Final = "consumer: Cannot connect to %s: %s\nTrying again in %.2f seconds... (%d/%s)"

WARM_SHUTDOWN: Final = "worker: Warm shutdown (MainProcess)"
COLD_SHUTDOWN: Final = "worker: Cold shutdown (MainProcess)"
SOFT_SHUTDOWN: Final = "Initiating Soft Shutdown, terminating in %s seconds"
RESTART: Final = "Restarting worker (%s)"

#: Celery cuts the return value in the log line at this many characters.
MAX_RETURN_REPR: Final = 1024


class TaskLog:
    """Writes the lines about tasks to one logger, each at its own level."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def received(self, name: str, task_id: str, args: str = "", kwargs: str = "") -> None:
        """Log, at INFO, that a task's message was taken in; ``args`` and ``kwargs`` as its sender wrote them."""
        self._write(logging.INFO, RECEIVED, {"name": name, "id": task_id, "args": args, "kwargs": kwargs})

    def succeeded(
        self, name: str, task_id: str, runtime_s: float, return_repr: str, args: str = "", kwargs: str = ""
    ) -> None:
        """Log, at INFO, that a task returned; ``args`` and ``kwargs`` as its sender wrote them."""
        context = {"name": name, "id": task_id, "runtime": runtime_s, "return_value": cut(return_repr, MAX_RETURN_REPR)}
        context |= {"args": args, "kwargs": kwargs}
        self._write(logging.INFO, SUCCEEDED, context)

    def failed(self, name: str, task_id: str, exc_repr: str, traceback: str) -> None:
        """Log, at ERROR, that a task raised what it does not list in ``throws``, with the traceback."""
        context = {"name": name, "id": task_id, "exc": exc_repr, "traceback": traceback.rstrip("\n")}
        self._write(logging.ERROR, FAILED, context)

    def failed_expected(self, name: str, task_id: str, exc_repr: str) -> None:
        """Log, at INFO, that a task raised what it lists in ``throws``."""
        self._write(logging.INFO, FAILED_EXPECTED, {"name": name, "id": task_id, "exc": exc_repr})

    def retry(self, name: str, task_id: str, reason: str) -> None:
        """Log, at INFO, that a task will run again; the reason is as ``retry_reason`` writes it."""
        self._write(logging.INFO, RETRY, {"name": name, "id": task_id, "exc": reason})

    def rejected(self, name: str, task_id: str, reason: str) -> None:
        """Log, at WARNING, that a task gave its message back."""
        self._write(logging.WARNING, REJECTED, {"name": name, "id": task_id, "exc": reason})

    def ignored(self, name: str, task_id: str) -> None:
        """Log, at INFO, that a task asked to be forgotten."""
        self._write(logging.INFO, IGNORED, {"name": name, "id": task_id})

    def revoked(self, name: str, task_id: str, stamp: Mapping[str, str] | None = None) -> None:
        """Log, at INFO, that a task had expired or was revoked before it ran; ``stamp``: the one it was revoked for."""
        context = {"name": name, "id": task_id}
        if stamp:
            self._write(logging.INFO, REVOKED_BY_STAMP, {**context, "stamp": dict(stamp)})
        else:
            self._write(logging.INFO, REVOKED, context)

    def soft_limit(self, name: str, task_id: str, limit_s: float) -> None:
        """Log, at WARNING, that a task was told that its time is up."""
        self._write(logging.WARNING, SOFT_LIMIT, {"name": name, "id": task_id, "limit": limit_s})

    def hard_limit(self, name: str, task_id: str, limit_s: float) -> None:
        """Log, at ERROR, that a task's process was killed because its time was up."""
        self._write(logging.ERROR, HARD_LIMIT, {"name": name, "id": task_id, "limit": limit_s})

    def unregistered(self, name: str, task_id: str) -> None:
        """Log, at ERROR, that a message names a task that this application does not have."""
        self._write(logging.ERROR, UNREGISTERED, {"name": name, "id": task_id})

    def handler_failed(self, handler: Callable[..., Any], error: BaseException) -> None:
        """Log, at ERROR, what one of a task's handlers raises: the task's outcome stands already."""
        self._logger.error("task handler %r failed", getattr(handler, "__qualname__", handler), exc_info=error)

    def _write(self, level: int, line: str, context: Mapping[str, object]) -> None:
        self._logger.log(level, line, context, extra={"data": context})


def retry_reason(delay_s: float | None, exc_repr: str | None, count: int = 0, most: int | None = None) -> str:
    """Return the reason of a retry as it stands in the log: ``Retry 2 of 3 in 3s: ValueError('again')``.

    ``count`` is the number of the retry to come, ``most`` how many there may be; None: any number.
    """
    which = f" {count}" if count else ""
    which += f" of {most}" if count and most is not None else ""
    when = "" if delay_s is None else f" in {delay_s:g}s"
    return f"Retry{which}{when}: {exc_repr}" if exc_repr else f"Retry{which}{when}"
