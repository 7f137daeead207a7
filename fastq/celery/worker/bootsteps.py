"""Steps that an application has added to Celery's worker and consumer: made, started and stopped in their order.

Celery's own steps do not exist here; what requires one finds it satisfied. Steps are made in the main thread before the
first fork, as what they connect (signals) is for children too; after that they run in a thread of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerTerminate
from celery.utils.imports import symbol_by_name

from fastq.celery.worker.consumer import Consumer, Worker
from fastq.celery.worker.threads import HubThread

logger = logging.getLogger("celery.worker")

#: Pause before the connection of the consumer's steps is tried again.
RETRY_S = 1.0


class Steps:
    """The steps of both blueprints. ``ask_stop`` is called with "warm" or "cold" when one raises WorkerShutdown."""

    def __init__(self, ask_stop: Callable[[str], None]) -> None:
        self.thread = HubThread(self._on_exit, self._on_error)
        self._ask_stop = ask_stop
        self._worker: Worker
        self._consumer: Consumer
        self._started: list[Any] = []
        self._ticks: set[Any] | None = None  # what the connection of the steps has put into each turn of the loop

    # --- in the main thread

    def make(self, worker: Worker, options: Mapping[str, Any]) -> None:
        """Make the steps that are asked for; ``options`` are those that the application has added to the command."""
        self._worker, self._consumer = worker, worker.consumer
        for parent, kind in ((worker, "worker"), (worker.consumer, "consumer")):
            made = [step for each in in_order(worker.app.steps[kind]) for step in _made(each, parent, options)]
            for step in made:
                _include(step, parent)

    def start(self) -> None:
        """Start the worker's steps: the pool is there."""
        self._worker.blueprint.state = bootsteps.RUN
        self.thread.allow()
        if self._worker.steps or self._consumer.steps:
            self.thread.start()
            self.thread.call(partial(self._start, self._worker))

    def connected(self) -> None:
        """Start the consumer's steps; again, when they run already and the connection is a new one."""
        if self._consumer.blueprint.state == bootsteps.CLOSE:
            return  # the stop came while the broker was being connected
        self._consumer.blueprint.state = bootsteps.RUN
        if self._consumer.steps:
            self.thread.call(self._restart)

    def quiet(self) -> None:
        """Stop the consumer's steps: nothing more is to be received."""
        self._consumer.blueprint.state = bootsteps.CLOSE
        if self._consumer.steps:
            self.thread.call(self._stop_consumer)

    def stop(self) -> None:
        """Stop all steps and end their thread."""
        self.quiet()
        self._worker.blueprint.state = bootsteps.CLOSE
        if self._worker.steps:
            self.thread.call(partial(self._stop, self._worker))
        self.thread.stop()
        self._worker.blueprint.state = self._consumer.blueprint.state = bootsteps.TERMINATE

    # --- in the thread

    def _start(self, parent: Any) -> None:
        for step in parent.steps:
            try:
                step.start(parent)
            except self._consumer.connection_errors + self._consumer.channel_errors as error:
                if not self._consumer.has_connection:
                    raise
                self._lost(error)
                return
            except Exception as error:
                _report("start", step, error)
                continue
            self._started.append(step)
            _call(step, "register_with_event_loop", self.thread.hub)
        self._register_connection()

    def _register_connection(self) -> None:
        connection = self._consumer.connection if self._consumer.has_connection else None
        if connection is not None and self._ticks is None and connection.transport.implements.asynchronous:
            before = set(self.thread.hub.on_tick)
            connection.transport.register_with_event_loop(connection.connection, self.thread.hub)
            self._ticks = self.thread.hub.on_tick - before

    def _restart(self) -> None:
        self._stop(self._consumer)
        self._start(self._consumer)

    def _stop(self, parent: Any) -> None:
        started = [step for step in parent.steps if step in self._started]
        for step in started:
            _call(step, "close", parent)
        for step in reversed(started):
            _call(step, "stop", parent)
            self._started.remove(step)

    def _stop_consumer(self) -> None:
        started = [step for step in self._consumer.steps if step in self._started]
        self._stop(self._consumer)
        for step in reversed(started):
            _call(step, "shutdown", self._consumer)
        self._drop_connection()

    def _drop_connection(self) -> None:
        if self._ticks is not None:
            hub, transport = self.thread.hub, self._consumer.connection.transport
            hub.on_tick -= self._ticks
            for fd, (callback, _) in list(hub.readers.items()):
                if getattr(callback, "__self__", None) is transport:
                    hub.remove(fd)
            self._ticks = None
        self._consumer.drop_connection()

    def _on_exit(self, error: SystemExit) -> None:
        logger.warning("A step asks the worker to stop: %r", error)
        self._ask_stop("cold" if isinstance(error, WorkerTerminate) else "warm")

    def _on_error(self, error: Exception) -> bool:
        """Connect anew when the connection of the steps is lost; False for any other error."""
        consumer = self._consumer
        if not isinstance(error, consumer.connection_errors + consumer.channel_errors):
            return False
        self._lost(error)
        return True

    def _lost(self, error: Exception) -> None:
        logger.warning("The connection of the consumer's steps was lost: %r; they are started again", error)
        self._stop(self._consumer)
        self._drop_connection()
        self.thread.hub.call_later(RETRY_S, self._restart)


def in_order(classes: Iterable[Any]) -> Iterator[Any]:
    """Yield classes of steps behind those that they require, the last one last; none of Celery's own.

    Raises ValueError for steps that require each other.
    """
    done: dict[str, Any] = {}
    for step in sorted(map(symbol_by_name, classes), key=lambda step: (step.last, step.name)):
        yield from _with_required(step, done, ())


def _with_required(step: Any, done: dict[str, Any], behind: tuple[str, ...]) -> Iterator[Any]:
    step = symbol_by_name(step)
    if step.name in done or step.__module__.partition(".")[0] == "celery":
        return
    if step.name in behind:
        raise ValueError(f"bootsteps require each other: {' -> '.join((*behind, step.name))}. Remove one `requires`")
    for required in step.requires:
        yield from _with_required(required, done, (*behind, step.name))
    done[step.name] = step
    yield step


def _made(step: Any, parent: Any, options: Mapping[str, Any]) -> Iterator[Any]:
    try:
        yield step(parent, **options)
    except Exception as error:
        _report("make", step, error)


def _include(step: Any, parent: Any) -> None:
    try:
        step.include(parent)
    except Exception as error:
        _report("make", step, error)


def _call(step: Any, method: str, *args: Any) -> None:
    function = getattr(step, method, None)
    if function is None:
        return
    try:
        function(*args)
    except Exception as error:
        _report(method, step, error)


def _report(method: str, step: Any, error: Exception) -> None:
    text = "Could not %s the step %s: %r. The worker goes on without it"
    logger.error(text, method, step.name, error, exc_info=error)
