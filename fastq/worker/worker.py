"""The worker as those who start one see it. It forks the zygote and hands over to ``worker.life``.

The order matters: the zygote is forked before the event loop is even imported, so that children share little and no
process with a loop or a thread ever forks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastq.brokers import find_broker
from fastq.plugins import load
from fastq.pool import Group, find_pool
from fastq.pool.titles import set_title
from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess, Children
from fastq.worker.groups import groups_of
from fastq.worker.options import WorkerOptions
from fastq.worker.process.log import ChildLogging
from fastq.worker.program import Program

if TYPE_CHECKING:
    from fastq.worker.life import Life


class Worker:
    """One worker process and its pool. ``options`` are resolved against the program's settings."""

    def __init__(self, program: Program, options: WorkerOptions) -> None:
        self.program = program
        self.options = options
        self.kind = find_pool(options.pool)
        self.groups = groups_of(options, self.kind, bool(program.async_names))
        self.life: Life | None = None

    def run(self, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run until stopped and return the exit code. Call it before the process has threads or an event loop."""
        return self.run_with(self.prepare_pool(), on_ready, handle_signals)

    def prepare_pool(self) -> Any:
        """Return what the pool needs that must be made before there is a thread or a loop, for ``run_with``."""
        options = self._child_options()
        children = Children([self._child_main(options, group) for group in self.groups])

        def begin() -> None:
            set_title(self.program.process_title, self.options.hostname, "zygote")
            children.prepare()

        prepare = load(self.kind.prepare)
        return prepare(children, begin, self.program.companion)

    def _child_main(self, options: ChildOptions, group: Group) -> ChildProcess:
        # Of each child its kind and the memory that it shares with the main process go by its group.
        return self.program.child_main(replace(options, calls=group.calls, slots=group.places))

    def run_with(self, prepared: Any, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run with a pool that was prepared already; this may be another thread than the one that did it."""
        from fastq.worker.life import Life

        self.life = Life(self.program, self.options, prepared, self.groups)
        return self.life.run(on_ready, handle_signals)

    def stop_soon(self, how: str = "warm") -> None:
        """Ask for a warm or cold stop, from any thread."""
        if self.life is not None:
            self.life.stop_soon(how)

    def _child_options(self) -> ChildOptions:
        options, settings = self.options, self.program.settings
        handler = next((each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)), None)
        redirects = handler is not None and settings.worker_redirect_stdouts
        level = settings.worker_redirect_stdouts_level if redirects else ""
        setup = ChildLogging(handler, options.logfile, options.hostname, level)
        return ChildOptions(
            options.hostname,
            options.max_memory_per_child or 0,
            settings.task_track_started,
            find_broker(str(settings.broker_url)).speaks_amqp,
            self.program.process_title,
            setup,
        )
