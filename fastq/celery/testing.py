"""A Celery application's worker in the process of a test; what it changes in Celery is undone at the end."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import celery
from celery import _state
from celery.app import trace
from kombu.transport.memory import Channel
from kombu.utils.json import dumps

from fastq.brokers.memory.space import Space, find_space
from fastq.celery.running.coroutines import restore
from fastq.celery.worker.program import CeleryProgram
from fastq.errors import SettingsError
from fastq.net.urls import scheme_of
from fastq.wire.head import scan
from fastq.wire.kombu import decode_envelope
from fastq.wire.message import Message
from fastq.worker.options import WorkerOptions


@contextmanager
def program_of(app: Any) -> Iterator[CeleryProgram]:
    """Return the program of a Celery application; on ``memory://`` it gets what kombu's queues of that name are sent.

    Raises SettingsError for what is no application.
    """
    evaluate: Any = getattr(app, "_get_current_object", None)
    target = evaluate() if evaluate is not None else app
    if not isinstance(target, celery.Celery):
        raise SettingsError(f"worker() takes a FastQ or a Celery application, this is {target!r:.80}")
    program = _TestProgram(target)
    current, default = _state.get_current_app(), _state.default_app
    try:
        yield program
    finally:
        program.leave()
        for task in target.tasks.values():
            restore(task)
        trace.reset_worker_optimizations(target)
        _state.set_default_app(default)
        current.set_current()


class _TestProgram(CeleryProgram):
    def __init__(self, app: celery.Celery) -> None:
        super().__init__(app)
        self._before: dict[str, queue.Queue[Any]] = {}

    def prepare(self, options: WorkerOptions) -> WorkerOptions:
        """Have what is sent to the queues from now on, or waits in them, come to the worker."""
        options = super().prepare(options)
        url = str(self.settings.broker_url)
        if scheme_of(url) == "memory":
            self._join(find_space(url), options.queues)
        return options

    def _join(self, space: Space, queues: Sequence[str]) -> None:
        for name in queues:
            space.declare(name)
            before = self._before[name] = Channel.queues.get(name) or queue.Queue()
            joined = Channel.queues[name] = _Joined(space, name)
            while not before.empty():
                joined.put(before.get())

    def leave(self) -> None:
        """Let kombu's queues be as they were."""
        Channel.queues.update(self._before)


class _Joined(queue.Queue[Any]):
    """A queue of kombu's whose messages go to a space of ours."""

    def __init__(self, space: Space, name: str) -> None:
        super().__init__()
        self._space = space
        self._name = name

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Hand one of kombu's messages over."""
        props, body, _ = decode_envelope(dumps(item).encode())
        task_id = scan(props)["id"]
        self._space.publish([Message("", self._name, props, body, task_id if isinstance(task_id, str) else "")])
