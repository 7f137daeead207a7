"""The application's own logging handlers in the main process, in a thread: one that blocks, or starts an event loop of
its own, must not do so where the worker's loop runs.

What only formats and writes to a stream stays where it is: ours, and the standard library's without code of users'.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Final

logger = logging.getLogger("fastq.worker")

#: Time to write what is still to be written when the worker ends.
JOIN_S: Final = 5.0

#: Records that wait at most; beyond that new ones are dropped, and counted. Chosen: a few MiB.
HELD_RECORDS: Final = 10_000

#: The standard library's, by name: logging.handlers is large, and most workers can do without it.
_PLAIN: Final = frozenset(
    (
        *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
        *("logging.handlers.WatchedFileHandler", "logging.handlers.RotatingFileHandler"),
        "logging.handlers.TimedRotatingFileHandler",
    )
)
_TRUSTED: Final = ("logging", "celery", "fastq")  # packages whose formatters neither wait nor start a loop


class LogThread:
    """Has the handlers of all loggers that are users' own called in one thread, in the order of the records."""

    def __init__(self) -> None:
        self._records: queue.Queue[tuple[logging.LogRecord, list[logging.Handler]] | None] = queue.Queue(HELD_RECORDS)
        self._forwarders: list[tuple[logging.Logger, Forwarder]] = []
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def take_over(self) -> None:
        """Put a forwarder in the place of users' own handlers. Again: of those that have come since, too."""
        for each in _loggers():
            own = [handler for handler in each.handlers if is_own(handler)]
            if not own:
                continue
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fastq-log", daemon=True)
                self._thread.start()
            forwarder = Forwarder(self, own)
            # In one step, as other threads log too.
            each.handlers = [*(handler for handler in each.handlers if handler not in own), forwarder]
            self._forwarders.append((each, forwarder))

    def put(self, record: logging.LogRecord, handlers: list[logging.Handler]) -> None:
        """Have the handlers called soon. What a handler logs itself reaches the handlers at once."""
        if threading.current_thread() is self._thread:
            _handle(record, handlers)
            return
        try:
            self._records.put_nowait((record, handlers))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Give loggers their handlers back and wait, within bounds, until all records are written."""
        if self._thread is None:
            return
        for each, forwarder in self._forwarders:
            if forwarder in each.handlers:
                at = each.handlers.index(forwarder)
                each.handlers = [*each.handlers[:at], *forwarder.handlers, *each.handlers[at + 1 :]]
        try:
            self._records.put(None, timeout=JOIN_S)
        except queue.Full:
            return  # a handler is stuck
        self._thread.join(JOIN_S)
        if self.dropped:
            logger.warning("%d log records were dropped: the application's log handlers were too slow", self.dropped)

    def _run(self) -> None:
        while (entry := self._records.get()) is not None:
            _handle(*entry)


class Forwarder(logging.Handler):
    """Stands for a logger's own handlers and hands records to the thread that calls them."""

    def __init__(self, thread: LogThread, handlers: list[logging.Handler]) -> None:
        super().__init__(min(handler.level for handler in handlers))
        self.handlers = handlers
        self._log_thread = thread

    def handle(self, record: logging.LogRecord) -> bool:
        """Pass the record on; no lock is needed."""
        self._log_thread.put(record, self.handlers)
        return True


def is_own(handler: logging.Handler) -> bool:
    """Return whether code of users' may run in the handler."""
    kind = type(handler)
    if kind.__module__.startswith("fastq."):
        return False
    if f"{kind.__module__}.{kind.__qualname__}" not in _PLAIN or handler.filters:
        return True
    formatter = handler.formatter
    return formatter is not None and type(formatter).__module__.partition(".")[0] not in _TRUSTED


def _handle(record: logging.LogRecord, handlers: list[logging.Handler]) -> None:
    for handler in handlers:
        if record.levelno < handler.level:
            continue
        try:
            handler.handle(record)
        except (Exception, SystemExit):
            # A handler of users': the next ones and the next records are none the worse for it.
            handler.handleError(record)


def _loggers() -> Iterator[logging.Logger]:
    yield logging.getLogger()
    for each in [*logging.root.manager.loggerDict.values()]:
        if isinstance(each, logging.Logger):
            yield each
