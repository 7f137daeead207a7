"""Logging in Celery's shape: format, colours, log file, and the standard streams turned into log records.

It decides where records go and how they look, never what is logged. ``setup_logging`` runs once the settings are known,
``ChildLogging`` in every forked child.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Final, TextIO

from fastq.pool.process import DUMP_SIGNAL
from fastq.pool.titles import process_name
from fastq.printable import Lines, printable, printable_lines
from fastq.request import current
from fastq.settings import Settings
from fastq.worker.options import WorkerOptions, expand_path
from fastq.worker.process.exitcodes import CannotCreate

#: Those at which people see what goes well, and the others.
SHOW_INFO: Final = ("DEBUG", "INFO")
LEVELS: Final = (*SHOW_INFO, "WARNING", "ERROR", "CRITICAL", "FATAL")
#: Loggers whose name begins so are for task code: ``logging.getLogger("fastq.task.mymodule")``.
TASK_LOGGERS: Final = "fastq.task."
REDIRECTED_LOGGER: Final = "fastq.redirected"

#: A printed line that is longer than this many characters is logged before its end.
_MAX_LINE: Final = 8192

#: Outside of a task Celery writes question marks.
_NO_TASK: Final = ("???", "???")

_COLORS: Final = {"DEBUG": "\033[34m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[35m"}
_RESET: Final = "\033[0m"

#: Whose records have foreign text in them, but for those that are users' own.
_ESCAPED: Final = ("fastq", "celery.")
_NOT_ESCAPED: Final = (TASK_LOGGERS, REDIRECTED_LOGGER, "celery.task", "celery.redirected")


def open_handler(logfile: str, hostname: str, index: int = 0) -> logging.StreamHandler[Any]:
    """Return the handler that all records go to: the log file, or standard error when none is named.

    Raises CannotCreate when the file cannot be opened for writing.
    """
    if not logfile:
        # The real stream: sys.stderr may be one that turns what is written into records, which would never end.
        return logging.StreamHandler(sys.__stderr__)
    from fastq.worker.process.logfile import (
        LogFile,  # brings sockets and pickle with it, which most workers can do without
    )

    path = expand_path(logfile, hostname, index)
    try:
        return LogFile(path, encoding="utf-8")
    except OSError as error:
        raise CannotCreate(
            f"cannot write log file {path!r}: {error.strerror}. Choose a file that this user may write with --logfile"
        ) from error


def setup_logging(
    handler: logging.StreamHandler[Any],
    level: str,
    settings: Settings,
    color: bool | None = None,
) -> None:
    """Send records of that level and above to the handler, and take the root logger over if the settings say so.

    Where they do not and the program has handlers of its own, those get fastq's records too and ours is not used.
    ``color`` None means: as the setting, or else the handler's stream and the environment say.
    """
    if color is None:
        color = settings.worker_log_color
    use_color = wants_color(handler.stream) if color is None else color
    line, task_line = settings.worker_log_format, settings.worker_task_log_format
    dates = settings.worker_log_datefmt, settings.worker_task_log_datefmt
    handler.setFormatter(Formatter(line, task_line, use_color, *dates))
    root = logging.getLogger()
    if settings.worker_hijack_root_logger:
        for other in root.handlers[:]:
            root.removeHandler(other)
    is_ours = not root.handlers
    if is_ours:
        root.addHandler(handler)
    (root if is_ours else logging.getLogger("fastq")).setLevel(level)


def escape_arguments() -> None:
    """Have what is filled into lines of ours and of Celery's be one line, from now on, in this process and its forks.

    Ids, names, arguments and errors come from outside: a line end in them would forge a line of the log, an escape
    sequence command the terminal that shows it. ``Lines`` and tracebacks keep their lines. What tasks log themselves
    is left alone, and so is ``record.data``.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "escapes", False):
        return

    def make_record(name: str, level: int, path: str, line: int, text: Any, args: Any, *more: Any, **named: Any) -> Any:
        if args and name.startswith(_ESCAPED) and not name.startswith(_NOT_ESCAPED):
            is_context = len(args) == 1 and isinstance(args[0], dict)
            args = (_shown_context(args[0]),) if is_context else tuple(map(_shown, args))
        return make(name, level, path, line, text, args, *more, **named)

    make_record.escapes = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_record)


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, (int, float, Lines)):
        return value
    return printable(value) if isinstance(value, str) else _Shown(value)


def _shown_context(context: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: _shown(value) for key, value in context.items()}
    if "traceback" in context:
        shown["traceback"] = printable_lines(str(context["traceback"]))
    return shown


class _Shown:
    """A value whose text is one line, whichever way it is asked for."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __str__(self) -> str:
        return printable(str(self._value))

    def __repr__(self) -> str:
        return printable(repr(self._value))


def wants_color(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether to colour what goes to the stream: on a terminal or with FORCE_COLOR, but not with NO_COLOR."""
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or stream.isatty()


def log_stream() -> TextIO:
    """Return the stream that records are written to: the log file, or standard error."""
    # Those that have a thread of their own stand behind another one.
    handlers = (handler for each in logging.getLogger().handlers for handler in getattr(each, "handlers", (each,)))
    streams = (each.stream for each in handlers if isinstance(each, logging.StreamHandler))
    return next(streams, None) or sys.__stderr__ or sys.stderr


class Formatter(logging.Formatter):
    """One format for every record and one for those of task code, with the name that fastq gives this process."""

    def __init__(
        self,
        line: str = Settings.worker_log_format,
        task_line: str = Settings.worker_task_log_format,
        use_color: bool = False,
        date: str | None = None,
        task_date: str | None = None,
    ) -> None:
        super().__init__(line, date)
        self.process_name = "MainProcess"
        self._task = logging.Formatter(task_line, task_date)
        self._use_color = use_color

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        record.processName = self.process_name
        text = self._format_task(record) if record.name.startswith(TASK_LOGGERS) else super().format(record)
        color = _COLORS.get(record.levelname, "") if self._use_color else ""
        return f"{color}{text}{_RESET}" if color else text

    def _format_task(self, record: logging.LogRecord) -> str:
        record.task_name, record.task_id = _running_task() or _NO_TASK
        return self._task.format(record)


class TaskFields(logging.Filter):
    """Gives a child's records its name and, while a task runs, that task's name and id: for handlers of the user's own.

    ``running`` returns name and id. A filter of handlers, as a record factory would take the names from ``extra``.
    """

    of_process: ClassVar[TaskFields | None] = None

    def __init__(self, running: Callable[[], tuple[str, str] | None]) -> None:
        super().__init__()
        self.process_name = ""
        self._running = running

    @classmethod
    def install(cls, running: Callable[[], tuple[str, str] | None]) -> TaskFields:
        """Have every handler that a logger has now filter by one filter of this process, and return it."""
        fields = cls.of_process = cls.of_process or cls(running)
        for handler in _all_handlers():
            handler.addFilter(fields)  # no harm when it has it
        return fields

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields that the record does not have; let it pass."""
        if self.process_name:
            record.processName = self.process_name
        task = self._running()
        if task is None and record.name.startswith(TASK_LOGGERS):
            task = _NO_TASK
        if task is not None:
            record.__dict__.setdefault("task_name", task[0])
            record.__dict__.setdefault("task_id", task[1])
        return True


def move(before: str, path: str) -> None:
    """Have the handlers that write the one file, and follow it when it is rotated, write the other one."""
    for handler in _all_handlers():
        reopen = getattr(handler, "reopenIfNeeded", None)
        if reopen is None or handler.baseFilename != os.path.abspath(before):
            continue
        handler.acquire()
        try:
            handler.baseFilename = os.path.abspath(path)
            with contextlib.suppress(OSError):  # the next record meets it again, and says so
                reopen()
        finally:
            handler.release()


def _all_handlers() -> set[Any]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return {handler for logger in loggers for handler in getattr(logger, "handlers", ())}


def _running_task() -> tuple[str, str] | None:
    request = current()
    return (request.task or "", request.id or "") if request else None


@dataclass(frozen=True, slots=True)
class ChildLogging:
    """What a freshly forked child does to the logging that its parent set up."""

    handler: logging.StreamHandler[Any] | None  # None: the program has handlers of its own
    logfile: str = ""
    hostname: str = ""
    redirect_level: str = "WARNING"  # empty: the streams stay as they are
    calls: str = "one"

    def prepare(self) -> None:
        """Have records tell of the child and its task: once for all children, as each page that one writes costs."""
        TaskFields.install(_running_task)

    def __call__(self, number: int) -> None:
        """Name the process ForkPoolWorker-<number>, open its own log file if the name asks so, redirect its streams."""
        if self.handler is not None and "%i" in self.logfile.lower():
            self._open_own_file(self.handler, number)
            self.prepare()
        self._begin(number)
        if self.redirect_level:
            redirect_stdouts(logging.getLevelName(self.redirect_level))

    def renumber(self, before: int, number: int) -> None:
        """Name the process anew, and go on in the file of that name."""
        if "%i" in self.logfile.lower():
            move(*(expand_path(self.logfile, self.hostname, each) for each in (before, number)))
        self._begin(number)

    def here(self) -> None:
        """Begin in the worker's own process: records tell of the task, and what is printed becomes records."""
        self.prepare()
        if self.redirect_level:
            redirect_stdouts(logging.getLevelName(self.redirect_level))

    def _begin(self, number: int) -> None:
        name = process_name(number, self.calls)
        if self.handler is not None and isinstance(self.handler.formatter, Formatter):
            self.handler.formatter.process_name = name
        if "multiprocessing" in sys.modules:
            # Handlers that task code sets up take the process name from there; the rest is what a pool's child has.
            process = sys.modules["multiprocessing"].current_process()
            process.name, process.index, process._identity = name, number - 1, (number,)
        if TaskFields.of_process is not None:
            TaskFields.of_process.process_name = name
        if self.logfile:
            # A child that is stuck writes its stacks where the operator looks, not where standard error went.
            for signum in (DUMP_SIGNAL, signal.SIGUSR1):
                faulthandler.register(signum, file=log_stream(), all_threads=True, chain=False)

    def _open_own_file(self, handler: logging.Handler, number: int) -> None:
        own = open_handler(self.logfile, self.hostname, number)
        own.setFormatter(handler.formatter)
        root = logging.getLogger()
        if handler in root.handlers:
            root.removeHandler(handler)
            root.addHandler(own)


def child_logging(
    options: WorkerOptions, settings: Settings, calls: str = "one", keeps_streams: bool = False
) -> ChildLogging:
    """Return what a child does to the logging that stands now."""
    handler = next((each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)), None)
    redirects = handler is not None and not keeps_streams and settings.worker_redirect_stdouts
    level = settings.worker_redirect_stdouts_level if redirects else ""
    return ChildLogging(handler, options.logfile, options.hostname, level, calls)


def redirect_stdouts(level: int = logging.WARNING) -> None:
    """Turn what is written to stdout and stderr from now on into records of that level, one per line."""
    logger = logging.getLogger(REDIRECTED_LOGGER)
    sys.stdout = StreamToLog(logger, level, sys.__stdout__)
    sys.stderr = StreamToLog(logger, level, sys.__stderr__)


class StreamToLog(io.TextIOBase):
    """A text stream whose lines become log records. Lines of several threads are not mixed."""

    encoding = "utf-8"

    def __init__(self, logger: logging.Logger, level: int, original: TextIO | None) -> None:
        self._logger = logger
        self._level = level
        self._original = original
        self._thread = threading.local()

    def write(self, text: str) -> int:
        """Log each complete line of the text; the rest waits for its end or for a flush."""
        if getattr(self._thread, "is_logging", False):
            # A failing log handler reports to sys.stderr, which is this: that must not become a record again.
            return self._original.write(text) if self._original else len(text)
        *lines, rest = (getattr(self._thread, "rest", "") + text).split("\n")
        if len(rest) > _MAX_LINE:
            lines.append(rest)
            rest = ""
        self._thread.rest = rest
        self._log(lines)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]  # the stub asks for bytes
        """Write each of the strings."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Log what is waiting for the end of its line."""
        rest = getattr(self._thread, "rest", "")
        self._thread.rest = ""
        self._log([rest])

    def _log(self, lines: list[str]) -> None:
        self._thread.is_logging = True
        try:
            for line in lines:
                if line.strip():
                    self._logger.log(self._level, "%s", line.rstrip())
        finally:
            self._thread.is_logging = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return False: what is written here is for a log."""
        return False

    def fileno(self) -> int:
        """Return the real stream's descriptor, for sub-processes that are given this stream."""
        if self._original is None:
            raise io.UnsupportedOperation("fileno")
        return self._original.fileno()
