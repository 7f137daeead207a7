"""The worker as those who start one see it. It forks the zygote and hands over to ``worker.life``.

The order matters: the zygote is forked before the event loop is even imported, so that children share little and no
process with a loop or a thread ever forks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from fastq.brokers import find_broker
from fastq.plugins import load
from fastq.pool import Serving, find_pool
from fastq.pool.titles import set_title
from fastq.running.birth import ChildOptions
from fastq.running.here import Here
from fastq.worker.options import WorkerOptions
from fastq.worker.process.exitcodes import exit_code_of
from fastq.worker.process.log import ChildLogging
from fastq.worker.program import Program

if TYPE_CHECKING:
    from fastq.worker.life import Life


logger = logging.getLogger("fastq.worker")


class Worker:
    """One worker process and its pool. ``options`` are resolved against the program's settings."""

    def __init__(self, program: Program, options: WorkerOptions) -> None:
        self.program = program
        self._kind = find_pool(options.pool)
        self.options = _without_children(options) if self._kind.runs_here else options
        self.life: Life | None = None

    def run(self, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run until stopped and return the exit code. Call it before the process has threads or an event loop."""
        return self.run_with(self.prepare_pool(), on_ready, handle_signals)

    def prepare_pool(self, owns_process: bool = True) -> Any:
        """Return what the pool needs that must be made before there is a thread or a loop, for ``run_with``.

        Where the process is somebody else's, its streams stay as they are.
        """
        keeps_streams = not owns_process or (self._kind.runs_here and _has_terminal())
        children = self.program.child_main(self._child_options(keeps_streams))

        def begin() -> None:
            set_title(self.program.process_title, self.options.hostname, "zygote")
            children.prepare()

        prepare = load(self._kind.prepare)
        return prepare(Here(children) if self._kind.runs_here else children, begin, self.program.companion)

    def run_with(self, prepared: Any, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run with a pool that was prepared already; this may be another thread than the one that did it."""
        from fastq.worker.life import Life
        from fastq.worker.process.signals import install

        self.life = Life(self.program, self.options, prepared)
        if self._kind.runs_here:
            return self._run_beside(self.life, prepared, on_ready, handle_signals)
        return self.life.run(on_ready, install if handle_signals else None)

    def _run_beside(
        self, life: Life, serving: Serving, on_ready: Callable[[], None] | None, handle_signals: bool
    ) -> int:
        """Run calls in this thread, and the life in another one."""
        from fastq.worker.process.signals import HandlersBeside

        handlers = HandlersBeside() if handle_signals else None
        ended: list[int | BaseException] = []

        def live() -> None:
            try:
                ended.append(life.run(on_ready, handlers.install if handlers is not None else None))
            except BaseException as error:
                ended.append(error)
            finally:
                serving.close()
            if serving.is_stuck and handlers is not None:
                _leave(ended[0])

        thread = threading.Thread(target=live, name="fastq-loop")
        thread.start()
        try:
            serving.serve()
        finally:
            thread.join()
            if handlers is not None:
                handlers.restore()
        (end,) = ended
        if isinstance(end, BaseException):
            raise end
        return end

    def stop_soon(self, how: str = "warm") -> None:
        """Ask for a warm or cold stop, from any thread."""
        if self.life is not None:
            self.life.stop_soon(how)

    def _child_options(self, keeps_streams: bool) -> ChildOptions:
        options, settings = self.options, self.program.settings
        handler = next((each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)), None)
        redirects = handler is not None and not keeps_streams and settings.worker_redirect_stdouts
        level = settings.worker_redirect_stdouts_level if redirects else ""
        setup = ChildLogging(handler, options.logfile, options.hostname, level)
        return ChildOptions(
            options.hostname,
            options.max_memory_per_child or 0,
            settings.task_track_started,
            find_broker(str(settings.broker_url)).speaks_amqp,
            self.program.process_title,
            setup,
            keeps_streams,
        )


def _has_terminal() -> bool:
    """Return whether a person sits there, to whom `breakpoint()` is to show its prompt, not to log it."""
    from fastq.worker.process.signals import is_on_terminal

    return is_on_terminal()


def _without_children(options: WorkerOptions) -> WorkerOptions:
    """Return the options without those that have no meaning where calls run in the worker's own process."""
    for name in ("max_tasks_per_child", "max_memory_per_child"):
        if getattr(options, name):
            logger.warning(
                "--%s has no effect with -P %s: there is no child to replace", name.replace("_", "-"), options.pool
            )
    return options.changed(concurrency=1, autoscale=None, max_tasks_per_child=None, max_memory_per_child=None)


def _leave(end: int | BaseException) -> NoReturn:
    """End the process, whose main thread is in a call that does not end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(end if isinstance(end, int) else exit_code_of(end))
