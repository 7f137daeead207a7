"""``fastq.patch()``: programs that start Celery's worker by themselves get fastq's, with the application they hold.

Three ways lead there: ``app.worker_main(argv)``, ``app.start(argv)`` with the command ``worker``, and
``app.Worker(...).start()``. Other commands stay Celery's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, Final

import celery
from celery import signals
from celery.bin.worker import worker as celery_worker
from click import Option

from fastq.celery.conf.pools import pool_name
from fastq.errors import FastqError
from fastq.worker.process.exitcodes import exit_code_of

logger = logging.getLogger("celery.worker")

#: Options that stand before the command, with those of Celery that take a value.
_VALUED: Final = ("-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir")

_celery_start: Callable[..., Any] = celery.Celery.start


def patch() -> None:
    """Have Celery applications start fastq's worker from now on. Calling it again changes nothing."""
    celery.Celery.start = start
    celery.Celery.worker_main = worker_main
    # A property, so that what an application has made already does not stand before it.
    celery.Celery.Worker = property(_worker_of)


def start(app: celery.Celery, argv: Sequence[str] | None = None) -> Any:
    """Run a command line: fastq's for ``worker``, otherwise Celery's. Returns None when the worker has ended.

    As with Celery: how it ended is only logged, and a wrong command line is raised as click's UsageError.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if command_of(words) != "worker":
        return _celery_start(app, words)
    _run(app, words)
    return None


def worker_main(app: celery.Celery, argv: Sequence[str] | None = None) -> None:
    """Run a worker. Raises ValueError when the command line does not say so."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "worker" not in words:
        raise ValueError(f"the command line {words!r} does not name the command 'worker'; start others by app.start()")
    start(app, words)


def command_of(words: Sequence[str]) -> str:
    """Return the command in a command line, "" for none: its first word that is neither an option nor its value."""
    takes_value = False
    for word in words:
        if not takes_value and not word.startswith("-"):
            return word
        takes_value = not takes_value and word in _VALUED
    return ""


def _run(app: celery.Celery, words: Sequence[str]) -> int:
    """Run fastq's worker and return its exit code; what ends it is logged. Raises click's UsageError."""
    from fastq.cli import invoke

    try:
        return invoke(words, app) or 0
    except FastqError as error:
        logger.critical("Unrecoverable error: %s", error)
        return exit_code_of(error)


def _worker_of(app: celery.Celery) -> Callable[..., Worker]:
    return lambda **options: Worker(app, **options)


class Worker:
    """What ``app.Worker(**options)`` makes: a worker that has not begun. ``options`` are Celery's, by keyword."""

    def __init__(self, app: celery.Celery, **options: Any) -> None:
        self.app = app
        self.options = options
        self.exitcode: int | None = None
        self._running: Any = None  # the worker as signals get it, once it has begun
        self._asked = ""

    def start(self) -> None:
        """Run until told to stop or until it cannot go on; ``exitcode`` says how it ended."""
        before, words = words_of(self.options)
        me = get_ident()

        def begun(instance: Any, **more: Any) -> None:
            if get_ident() == me:
                self._running = instance
                if self._asked:
                    getattr(instance, self._asked)()

        signals.celeryd_init.connect(begun, weak=False)
        try:
            self.exitcode = _run(self.app, [*before, "worker", *words])
        finally:
            signals.celeryd_init.disconnect(begun)
            self._running = None

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Ask for a warm stop, from any thread; ``start`` returns when running tasks have ended."""
        self._ask("stop")

    def terminate(self, in_sighandler: bool = False) -> None:
        """Ask for a cold stop, from any thread."""
        self._ask("terminate")

    def _ask(self, how: str) -> None:
        self._asked = how
        if (running := self._running) is not None:
            getattr(running, how)()


def words_of(options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return keywords of Celery's worker as a command line: what stands before the command, and its options.

    Raises TypeError for a keyword that no command line can say.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    before = [word for name, word in (("no_color", "-C"), ("quiet", "-q")) if given.pop(name, None)]
    pool = given.pop("pool_cls", None)
    words = [] if pool is None else ["--pool", pool_name(pool) or str(pool)]
    for name, value in given.items():
        option = _OPTIONS.get(name)
        if option is None:
            raise TypeError(f"app.Worker() of fastq has no keyword {name!r}; it takes {', '.join(sorted(_OPTIONS))}")
        long = max(option.opts, key=len)
        words.append(long if option.is_flag else f"{long}={_as_word(name, value)}")
    return before, words


_OPTIONS: Final[dict[str, Option]] = {
    str(each.name): each for each in celery_worker.params if isinstance(each, Option) and each.name != "detach"
}


def _as_word(name: str, value: Any) -> str:
    if name == "loglevel" and isinstance(value, int):
        return logging.getLevelName(value)
    if name == "hostname":
        return str(value).replace("%", "%%")  # taken as it is
    return ",".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
