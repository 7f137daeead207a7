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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import fastq.pool
from fastq.brokers import find_broker
from fastq.errors import SettingsError
from fastq.plugins import load
from fastq.pool import ChildSpec, Group, PoolKind, Serving, find_pool
from fastq.pool.titles import set_title
from fastq.running.birth import ChildOptions
from fastq.running.child import Children
from fastq.running.here import Here
from fastq.worker.groups import groups_of
from fastq.worker.options import WorkerOptions
from fastq.worker.process.exitcodes import exit_code_of
from fastq.worker.process.log import child_logging
from fastq.worker.program import Program

if TYPE_CHECKING:
    from fastq.worker.life import Life

logger = logging.getLogger("fastq.worker")


class Worker:
    """One worker process and its pool. ``options`` are resolved against the program's settings.

    ``imported`` are the threads that the application's import has started: where nobody has said how children start,
    they decide. None: children are forked.
    """

    def __init__(
        self, program: Program, options: WorkerOptions, imported: Sequence[threading.Thread] | None = None
    ) -> None:
        self.program = program
        self.kind = find_pool(options.pool)
        self.options = _without_children(options) if self.kind.runs_here else options
        self.groups = groups_of(self.options, self.kind, bool(program.async_names))
        self._imported = imported
        self._keeps_streams = False
        self.life: Life | None = None

    def run(self, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run until stopped and return the exit code. Call it before the process has threads or an event loop."""
        return self.run_with(self.prepare_pool(), on_ready, handle_signals)

    def prepare_pool(self, owns_process: bool = True) -> Any:
        """Return what the pool needs that must be made before there is a thread or a loop, for ``run_with``.

        Where the process is somebody else's, its streams stay as they are.
        """
        self._keeps_streams = not owns_process or (self.kind.runs_here and _has_terminal())
        if fastq.pool.is_spawning:
            raise SettingsError(
                "a spawned child has run this program anew, which starts a worker: put that under "
                'if __name__ == "__main__":, or have children forked (--pool-start-method fork)'
            )
        kind, method = self.kind, self.options.pool_start_method
        if method == "spawn" or kind.prepare is None:
            return self._spawning(kind, self._specs())
        if method is not None or kind.spawn is None or self._imported is None:
            return self._forking(kind)
        started = [thread.name for thread in self._imported if thread.is_alive()]
        if started and (specs := self._specs_or_none()) is not None:
            return self._spawning_for(kind, specs, started, "its import has started")
        prepared = self._forking(kind)
        if (threads := getattr(prepared, "threads", ())) and (specs := self._specs_or_none()) is not None:
            prepared.close()
            return self._spawning_for(kind, specs, threads, "hooks of os.register_at_fork start")
        return prepared

    def _forking(self, kind: PoolKind) -> Any:
        """Have children forked by a process that has the application."""
        assert kind.prepare is not None
        children = Children([self.program.child_main(self._child_options(group)) for group in self.groups])

        def begin() -> None:
            set_title(self.program.process_title, self.options.hostname, "zygote")
            children.prepare()

        return load(kind.prepare)(Here(children) if kind.runs_here else children, begin, self.program.companion)

    def _spawning(self, kind: PoolKind, specs: Sequence[ChildSpec]) -> Any:
        """Have each child begin as an interpreter of its own."""
        if kind.spawn is None:
            raise SettingsError(
                f"the pool {self.options.pool!r} does not spawn its children; leave out --pool-start-method "
                "(worker_pool_start_method), or use -P prefork"
            )

        def begin() -> None:
            set_title(self.program.process_title, self.options.hostname, "starter")

        return load(kind.spawn)(specs, begin, self.program.companion)

    def _spawning_for(self, kind: PoolKind, specs: Sequence[ChildSpec], threads: Sequence[str], how: str) -> Any:
        """Have children spawned, and say so: nobody has asked for it."""
        logger.warning(
            "children of this application are spawned, each as a fresh Python, as %s %s %s: a lock that such a thread "
            "holds at a fork is never free in a forked child. --pool-start-method fork has them forked nevertheless, "
            "spawn says nothing of it",
            how,
            "a thread" if len(threads) == 1 else f"{len(threads)} threads",
            f"({', '.join(map(repr, threads))})",
        )
        return self._spawning(kind, specs)

    def _specs(self) -> list[ChildSpec]:
        """Return how the children of each group are made."""
        return [
            replace(self.program.child_spec(self.options, self._child_options(group)), patch=group.patch)
            for group in self.groups
        ]

    def _specs_or_none(self) -> list[ChildSpec] | None:
        """Return how children could be spawned; None where another interpreter cannot import the application."""
        try:
            return self._specs()
        except SettingsError:
            return None

    def run_with(self, prepared: Any, on_ready: Callable[[], None] | None = None, handle_signals: bool = True) -> int:
        """Run with a pool that was prepared already; this may be another thread than the one that did it."""
        from fastq.worker.life import Life
        from fastq.worker.process.signals import install

        self.life = Life(self.program, self.options, prepared, self.groups)
        if self.kind.runs_here:
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

    def _child_options(self, group: Group) -> ChildOptions:
        options, settings = self.options, self.program.settings
        return ChildOptions(
            options.hostname,
            options.max_memory_per_child or 0,
            settings.task_track_started,
            find_broker(str(settings.broker_url)).speaks_amqp,
            self.program.process_title,
            child_logging(options, settings, group.calls, self._keeps_streams),
            group.calls,
            group.places,
            group.calls == "one" and len(self.groups) == 1 and bool(self.program.async_names),
            self._keeps_streams,
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
