"""The running worker for users' code in other threads: its queues, its numbers and its calls, looked up when asked for.

Nothing here costs anything while nobody asks: no call is counted or kept for it.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import celery
from celery.worker import state
from kombu import Queue

from fastq.celery.conf.settings import queue_options
from fastq.celery.worker.requests import request_of
from fastq.errors import ConnectionLost
from fastq.queues import Topology
from fastq.worker.remote.commands.command import ConsumerView, WorkerView

if TYPE_CHECKING:
    import asyncio

#: Longest wait for an answer of the event loop, which is busy for milliseconds at most.
ANSWER_S = 10.0


class Inside:
    """Asks the worker on its event loop, from any thread. Make it on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, view: WorkerView) -> None:
        self._loop = loop
        self._view = view
        self._thread = threading.get_ident()

    def ask(self, work: Callable[[WorkerView], Any]) -> Any:
        """Return what the function returns of the worker; it may be a coroutine function. Raises what it raises."""
        import asyncio  # not before the fork: children have no use for it

        if threading.get_ident() == self._thread:
            return work(self._view)
        if self._loop.is_closed():
            raise ConnectionLost("the worker has ended")
        answer = asyncio.run_coroutine_threadsafe(self._do(work), self._loop)
        try:
            return answer.result(ANSWER_S)
        except asyncio.TimeoutError as error:  # before Python 3.11 one of its own
            raise TimeoutError(f"the worker has not answered within {ANSWER_S:g} s; it is stopping") from error

    async def _do(self, work: Callable[[WorkerView], Any]) -> Any:
        found = work(self._view)
        return await found if inspect.isawaitable(found) else found

    def look(self, work: Callable[[WorkerView], Any], default: Any) -> Any:
        """Return what ``ask`` returns; the default from a worker that has ended."""
        try:
            return self.ask(work)
        except (ConnectionLost, TimeoutError, RuntimeError):
            return default


class TaskConsumer:
    """What receives tasks, with the names that kombu's Consumer has."""

    def __init__(self, app: celery.Celery, inside: Inside) -> None:
        self._app = app
        self._inside = inside

    @property
    def queues(self) -> list[Queue]:
        """Return the queues that are received from."""
        names = self._inside.ask(lambda view: [spec.name for spec in _connected(view).queue_specs])
        return [self._app.amqp.queues[name] for name in names]

    def consuming_from(self, queue: Queue | str) -> bool:
        """Return whether a queue is received from."""
        name = queue.name if isinstance(queue, Queue) else queue
        return name in [each.name for each in self.queues]

    def add_queue(self, queue: Queue) -> Queue:
        """Declare a queue and receive from it too."""
        options = queue_options(queue)
        self._inside.ask(lambda view: _connected(view).add_queue(Topology(view.settings).spec_of(options)))
        return queue

    def cancel_by_queue(self, queue: Queue | str) -> None:
        """Receive from a queue no longer."""
        name = queue.name if isinstance(queue, Queue) else queue
        self._inside.ask(lambda view: _connected(view).cancel_queue(name))

    def consume(self, no_ack: bool | None = None) -> None:
        """Nothing to do: what was added is received from already."""


def _connected(view: WorkerView) -> ConsumerView:
    if view.consumer is None:
        raise ConnectionLost("the broker of the tasks is away; ask again when the worker is connected")
    return view.consumer


# --- celery.worker.state ----------------------------------------------------------------------------------------------


def show_state(inside: Inside, app: celery.Celery, hostname: str) -> None:
    """Have ``celery.worker.state`` show the calls that run and wait here, and how many have run, from now on."""

    def requests(look: Callable[[WorkerView], list[dict[str, Any]]]) -> Callable[[], list[Any]]:
        return lambda: [request_of(app, row, hostname) for row in inside.look(look, []) if row["name"] in app.tasks]

    reserved = requests(lambda view: [*view.core.active(), *view.core.reserved(), *view.core.scheduled()])
    found: Any
    for found, look in (
        (state.active_requests, requests(lambda view: view.core.active())),
        (state.reserved_requests, reserved),
        (getattr(state, "scheduled_requests", WeakSet()), requests(lambda view: view.core.scheduled())),  # Celery 5.7
    ):
        # In place: users have imported them by name.
        found.__class__ = _LiveSet
        found.look = look
    state.total_count.__class__ = _LiveCounter
    state.total_count.look = lambda: inside.look(_runs, {})
    state.requests = _LiveRequests(state.requests, reserved)


def _runs(view: WorkerView) -> dict[str, int]:
    """Return how many calls of each task have begun."""
    begun = Counter(row["name"] for row in view.core.active())
    begun.update({task.name: task.runs for task in view.core.tasks.values() if task.runs})
    return begun


class _LiveSet(WeakSet[Any]):
    """Requests of strategies, which Celery's code has put here, and those of the message loop."""

    look: Callable[[], list[Any]]

    def __iter__(self) -> Iterator[Any]:
        own = list(super().__iter__())
        known = {request.id for request in own}
        yield from own
        yield from (request for request in self.look() if request.id not in known)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, request: object) -> bool:
        return super().__contains__(request) or getattr(request, "id", None) in {each.id for each in self.look()}


class _LiveRequests(MutableMapping[str, Any]):
    def __init__(self, own: dict[str, Any], look: Callable[[], list[Any]]) -> None:
        self._own = own
        self._look = look

    def _all(self) -> dict[str, Any]:
        return {**{request.id: request for request in self._look()}, **self._own}

    def __getitem__(self, task_id: str) -> Any:
        return self._all()[task_id]

    def __setitem__(self, task_id: str, request: Any) -> None:
        self._own[task_id] = request

    def __delitem__(self, task_id: str) -> None:
        del self._own[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


class _LiveCounter(Counter[str]):
    look: Callable[[], dict[str, int]]

    def _now(self) -> Counter[str]:
        return Counter(self.look())

    def __getitem__(self, name: str) -> int:
        return self._now()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._now().get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def __contains__(self, name: object) -> bool:
        return name in self._now()

    def keys(self) -> Any:
        return self._now().keys()

    def values(self) -> Any:
        return self._now().values()

    def items(self) -> Any:
        return self._now().items()

    def __repr__(self) -> str:
        return repr(self._now())
