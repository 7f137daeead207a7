"""The caller's handle on a sent task: its state, value and exception. Holds a store, knows no application."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from traceback import format_exception_only
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from fastq.codecs.meta import rebuild_exception
from fastq.errors import ResultsDisabled, ResultTimeout
from fastq.net.threads import in_thread
from fastq.request import running_message
from fastq.states import EXCEPTION_STATES, FAILURE, PENDING, PROPAGATE_STATES, READY_STATES, SUCCESS

if TYPE_CHECKING:
    import asyncio

    from fastq.interfaces import Meta, ResultStore, Unwatch

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)

#: Chosen: characters of an error that are told.
_MAX_REASON = 300

UNKNOWN: Meta = {"status": PENDING, "result": None}


class ResultSource(Protocol):
    """What a result needs of its application."""

    @property
    def store(self) -> ResultStore:
        """The result store. Raises ResultsDisabled when there is none."""

    def exceptions_of(self, task_name: str | None) -> Sequence[type[BaseException]]:
        """Return the exception classes that the task names: stored ones are rebuilt with their own constructors."""

    def is_collected(self, task_id: str) -> bool:
        """Return whether a call waits for the end of a batch before it is sent."""


@dataclass(slots=True)
class Collected:
    """Calls that are sent together, later, as the handles on them see it; ``failure``: with what it has ended badly."""

    failure: str | None = None

    def fail(self, error: BaseException) -> None:
        """Have everybody who asks for a result told that there will be none, as the batch has ended with this error."""
        self.failure = format_exception_only(type(error), error)[-1].strip()[:_MAX_REASON]


@dataclass(frozen=True, slots=True)
class Progress:
    """A state of a task as ``stream`` yields it.

    ``value``: what ``update_state`` stored, the returned value, or the exception of a task that failed or is to run
    again; None where there is nothing.
    """

    state: str
    value: Any = None

    @property
    def is_final(self) -> bool:
        """Whether the task has ended with it."""
        return self.state in READY_STATES


class RemoteTraceback(Exception):
    """The worker's traceback, shown as the cause of an exception that ``get()`` raises."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class AsyncResult(Generic[R_co]):
    """A task's result, now or later. Equal to any other handle on the same id."""

    __slots__ = ("__weakref__", "_collected", "_meta", "_source", "_task_name", "id", "ignored")

    def __init__(
        self,
        task_id: str,
        source: ResultSource,
        task_name: str | None = None,
        ignored: bool = False,
        collected: Collected | None = None,
    ) -> None:
        self.id = task_id
        #: The task stores no result.
        self.ignored = ignored
        self._source = source
        self._task_name = task_name
        self._meta: Meta | None = None
        self._collected = collected  # the batch that it is, or was, to be sent with

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, AsyncResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> Any:
        arguments = self.id, self._source, self._task_name, self.ignored
        # With rpc:// nobody else can have the result. The words are those of every version: others read them, too.
        unsent = None if self._collected is None else self._collected.failure
        return type(self), arguments, (None, {"_meta": self._meta, "_unsent": unsent})

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        self._meta = state[1]["_meta"]
        unsent = state[1].get("_unsent")
        self._collected = None if unsent is None else Collected(unsent)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    def get(self, timeout: float | None = None, propagate: bool = True, *, disable_sync_subtasks: bool = True) -> R_co:
        """Wait for the task to end and return its value, or raise its exception (``propagate=False``: return it).

        Raises ResultTimeout after ``timeout`` seconds, and RuntimeError inside a running task: the worker may have no
        process left to run the task that is waited for.
        """
        _check_timeout(timeout)
        self._check_wait(disable_sync_subtasks)
        meta = self._meta
        if meta is None:
            meta = self._meta = self._source.store.wait(self.id, timeout)
        return self._conclude(meta, propagate)

    async def aget(
        self, timeout: float | None = None, propagate: bool = True, *, disable_sync_subtasks: bool = True
    ) -> R_co:
        """Do as ``get`` does without blocking the event loop."""
        _check_timeout(timeout)
        self._check_wait(disable_sync_subtasks)
        if self._meta is None:
            import asyncio  # not at the top: it would more than double what a child of a pool has to map

            loop = asyncio.get_running_loop()
            ended: asyncio.Future[Meta] = loop.create_future()
            watch = Watch(self._source.store, self.id, lambda meta: _hand_over(loop, ended, meta))
            try:
                self._meta = await asyncio.wait_for(watch.until(lambda: ended), timeout)
            except asyncio.TimeoutError:
                raise ResultTimeout(f"task {self.id} has not ended within {timeout} s") from None
            finally:
                # A handle that nobody waits on any more must not be kept by the store.
                watch.end()
        return self._conclude(self._meta, propagate)

    async def stream(
        self, timeout: float | None = None, *, disable_sync_subtasks: bool = True
    ) -> AsyncGenerator[Progress, None]:
        """Yield the state that the task is in, then each as it comes, the one that it ends with last.

        A failure is yielded, not raised. Raises ResultTimeout when no state comes for ``timeout`` seconds, and what
        ``aget`` raises before it waits.
        """
        _check_timeout(timeout)
        self._check_wait(disable_sync_subtasks)
        if self._meta is None:
            import asyncio

            loop, store = asyncio.get_running_loop(), self._source.store
            states: asyncio.Queue[Meta] = asyncio.Queue()
            watch = Watch(store, self.id, lambda meta: _put(loop, states, meta), observes=True)
            try:
                known = await asyncio.wait_for(in_thread(partial(store.load, self.id)), timeout)
                meta = known or UNKNOWN
                while meta["status"] not in READY_STATES:
                    yield self._progress(meta)
                    seen = meta
                    while meta == seen:
                        meta = await asyncio.wait_for(watch.until(states.get), timeout)
                    if meta.get("lost"):
                        raise self._exception(meta)
                self._meta = meta
            except asyncio.TimeoutError:
                raise ResultTimeout(f"task {self.id} has shown no new state within {timeout} s") from None
            finally:
                watch.end()
        yield self._progress(self._meta)

    @property
    def state(self) -> str:
        """Return the task's state; PENDING also means that nothing is known of it."""
        return cast("str", self._load()["status"])

    status = state

    @property
    def result(self) -> Any:
        """Return the value, the exception of a task that failed, what ``update_state`` stored, or None."""
        return self._value_in(self._load())

    info = result

    @property
    def task_id(self) -> str:
        """Return the id."""
        return self.id

    @property
    def traceback(self) -> str | None:
        """Return the worker's traceback as text."""
        return self._load().get("traceback")

    @property
    def children(self) -> list[AsyncResult[Any]]:
        """Return the results of the tasks that this one has sent."""
        found = self._load().get("children") or ()
        return [AsyncResult(_child_id(child), self._source) for child in found]

    @property
    def date_done(self) -> datetime | None:
        """Return when the task ended."""
        text = self._load().get("date_done")
        return datetime.fromisoformat(text) if isinstance(text, str) else text

    @property
    def name(self) -> str | None:
        """Return the task's name, where this handle or the store (``result_extended``) knows it."""
        return self._task_name or self._load().get("name")

    @property
    def args(self) -> Sequence[Any] | None:
        """Return the positional arguments, with ``result_extended``."""
        return self._load().get("args")

    @property
    def kwargs(self) -> Mapping[str, Any] | None:
        """Return the keyword arguments, with ``result_extended``."""
        return self._load().get("kwargs")

    @property
    def worker(self) -> str | None:
        """Return the name of the worker that ran the task, with ``result_extended``."""
        return self._load().get("worker")

    @property
    def retries(self) -> int | None:
        """Return how often the task was retried, with ``result_extended``."""
        return self._load().get("retries")

    @property
    def queue(self) -> str | None:
        """Return the queue that the task came from, with ``result_extended``."""
        return self._load().get("queue")

    def ready(self) -> bool:
        """Return whether the task has ended."""
        return self.state in READY_STATES

    def successful(self) -> bool:
        """Return whether the task has ended with a value."""
        return self.state == SUCCESS

    def failed(self) -> bool:
        """Return whether the task has ended with an exception."""
        return self.state == FAILURE

    def forget(self) -> None:
        """Drop what is stored of the task, here and in the store."""
        self._meta = None
        self._source.store.forget(self.id)

    def _load(self) -> Meta:
        """Return what is known; a final state is asked for only once."""
        if self._meta is not None:
            return self._meta
        self._check_sent()
        meta = self._source.store.load(self.id) or UNKNOWN
        if meta["status"] in READY_STATES:
            self._meta = meta
        return meta

    def _check_wait(self, disable_sync_subtasks: bool) -> None:
        if disable_sync_subtasks and running_message() is not None:
            raise RuntimeError(
                f"get() of task {self.id} inside a running task can wait for ever: the workers may all be waiting. "
                "Let the task return and start the next one, or pass disable_sync_subtasks=False"
            )
        if self._source.is_collected(self.id):
            raise RuntimeError(
                f"get() of task {self.id} inside `with app.batch()` would wait for ever: it is sent when the block "
                "ends. Call get() after the block"
            )
        self._check_sent()
        if self.ignored:
            raise ResultsDisabled(f"task {self._task_name}[{self.id}] was sent with ignore_result: it stores no result")

    def _check_sent(self) -> None:
        if self._collected is not None and self._collected.failure is not None:
            raise RuntimeError(
                f"task {self.id} was never sent: the block of `with app.batch()` ended with {self._collected.failure}. "
                "There will be no result"
            )

    def _conclude(self, meta: Meta, propagate: bool) -> R_co:
        if meta["status"] not in PROPAGATE_STATES:
            return cast("R_co", meta.get("result"))
        error = self._exception(meta)
        if propagate:
            raise error
        return cast("R_co", error)

    def _value_in(self, meta: Meta) -> Any:
        return self._exception(meta) if meta["status"] in EXCEPTION_STATES else meta.get("result")

    def _progress(self, meta: Meta) -> Progress:
        return Progress(meta["status"], self._value_in(meta))

    def _exception(self, meta: Meta) -> Exception:
        error = rebuild_exception(meta.get("result"), self._source.exceptions_of(self._task_name or meta.get("name")))
        traceback = meta.get("traceback")
        if traceback and error.__cause__ is None:
            error.__cause__ = RemoteTraceback(traceback)
        return error


class EagerResult(AsyncResult[R_co]):
    """The result of a task that ran where it was called."""

    __slots__ = ("_value",)

    def __init__(
        self, task_id: str, source: ResultSource, task_name: str, state: str, value: Any, traceback: str | None = None
    ) -> None:
        super().__init__(task_id, source, task_name)
        self._value = value
        self._meta = {"status": state, "result": value, "traceback": traceback, "task_id": task_id}

    def __reduce__(self) -> Any:
        meta = cast("Meta", self._meta)
        return type(self), (self.id, self._source, self._task_name, meta["status"], self._value, meta["traceback"])

    def forget(self) -> None:
        """Do nothing: nothing is stored."""

    def _check_wait(self, disable_sync_subtasks: bool) -> None:
        """Waiting for what has ended is always safe."""

    def _exception(self, meta: Meta) -> Exception:
        return cast("Exception", self._value)


class Watch:
    """What is to be told of one task, asked for by a coroutine: in a thread where it may block, and ended once."""

    def __init__(
        self, store: ResultStore, task_id: str, callback: Callable[[Meta], None], observes: bool = False
    ) -> None:
        self._store = store
        self._begin = partial(store.observe if observes else store.watch, task_id, callback)
        self._lock = threading.Lock()
        self._unwatch: Unwatch | None = None
        self._has_begun = self._has_ended = False

    def until(self, told: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Return what is to be awaited until ``told`` is done. Raises what the store does when it cannot be asked."""
        if not self._has_begun:
            self._has_begun = True
            if not self._store.is_there():
                return self._until(told)
            self._watch()
        return told()

    async def _until(self, told: Callable[[], Awaitable[T]]) -> T:
        await in_thread(self._watch)
        return await told()

    def _watch(self) -> None:
        unwatch = self._begin()
        with self._lock:
            self._unwatch = unwatch
            if not self._has_ended:
                return
        unwatch()  # nobody waits any more: it took too long to ask

    def end(self) -> None:
        """Be told of nothing any more. Never waits."""
        with self._lock:
            self._has_ended = True
        if self._unwatch is not None:
            self._unwatch()


def _check_timeout(timeout: Any) -> None:
    if timeout is not None and (isinstance(timeout, bool) or not hasattr(timeout, "__float__")):
        raise TypeError(f"timeout is {timeout!r:.80}; expected a number of seconds, or None to wait without end")


def _put(loop: asyncio.AbstractEventLoop, states: asyncio.Queue[Meta], meta: Meta) -> None:
    """Pass a meta from the store's thread to the loop, which may be gone by now."""
    try:
        loop.call_soon_threadsafe(states.put_nowait, meta)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _hand_over(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[Meta], meta: Meta) -> None:
    """Pass a meta from the store's thread to the loop; the loop, and who waited on it, may be gone by now."""
    try:
        loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(meta))
    except RuntimeError:
        if not loop.is_closed():
            raise


def _child_id(child: Any) -> str:
    """Return the id in Celery's form of a result: ``[[id, parent], children]``."""
    return cast("str", child[0][0] if isinstance(child, (list, tuple)) else child)
