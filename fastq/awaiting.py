"""Running a coroutine to its end where no event loop is: in a process that runs one call at a time, or in a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from contextvars import copy_context
from functools import partial, wraps
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: How long what coroutines have left running may take to end. Below the second that a call has to give way.
CLOSE_S = 0.5


class _Own(threading.local):
    """The loop of a thread: one for all coroutines, as what they keep open belongs to it."""

    loop: asyncio.AbstractEventLoop | None = None
    pid = 0
    #: Has an error raised in the coroutine that runs.
    interrupt: Callable[[Exception], object] | None = None


_own = _Own()
#: What calls a function in another thread while greenlets run, in a process that gevent or eventlet has patched.
in_thread: Callable[[Callable[[], Any]], Any] | None = None


def run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what the coroutine returns. Where this thread's loop runs already, another thread runs it meanwhile."""
    if in_thread is not None:
        result: T = in_thread(partial(copy_context().run, asyncio.run, coroutine))
        return result
    if asyncio._get_running_loop() is not None:
        return _elsewhere(coroutine)
    if _own.loop is None or _own.pid != os.getpid():
        _own.loop, _own.pid = asyncio.new_event_loop(), os.getpid()
    loop = _own.loop
    interruptible = Interruptible(coroutine)
    task = loop.create_task(interruptible.run())
    _own.interrupt = lambda error: loop.call_soon_threadsafe(interruptible.interrupt, task, error)
    while True:
        try:
            return loop.run_until_complete(task)
        except Exception as error:
            if task.done():
                raise
            # A limit has struck the loop: the coroutine is to see it where it waits, as a function would.
            interruptible.interrupt(task, error)
        except BaseException:  # what the coroutine has open is closed before it goes on
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    loop.run_until_complete(task)
            raise
        finally:
            if task.done():
                _own.interrupt = None


def close_here() -> None:
    """End the loop of this thread, and what its coroutines have left running on it."""
    loop, _own.loop = _own.loop, None
    if loop is None or _own.pid != os.getpid():
        return
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_S))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()  # threads of its executor are not waited for


@contextlib.contextmanager
def entered_here(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter an asynchronous context manager on the loop that runs this thread's coroutines; leave it there, too."""
    value = run_here(_await(manager.__aenter__()))
    try:
        yield value
    except BaseException as error:
        if not run_here(_await(manager.__aexit__(type(error), error, error.__traceback__))):
            raise
    else:
        run_here(_await(manager.__aexit__(None, None, None)))


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def interrupt_here(error: Exception, frame: FrameType | None) -> bool:
    """Have an error raised in the coroutine that runs, for the handler of a signal that has come at that frame.

    False: it is to raise it itself. Code of the loop would swallow it.
    """
    place = "" if frame is None else str(frame.f_globals.get("__name__"))
    if _own.interrupt is None or not place.startswith(("asyncio.", "selectors")):
        return False
    _own.interrupt(error)
    return True


def _elsewhere(coroutine: Coroutine[Any, Any, T]) -> T:
    ended: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            ended.append(asyncio.run(coroutine))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="fastq-await")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return ended[0]


def running_here(function: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., T]:
    """Return a plain function that runs the coroutine function to its end."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:
        return run_here(function(*args, **kwargs))

    return run


_CLASSES: dict[type[Exception], type[Exception]] = {}


def _cancelling(error: Exception) -> BaseException:
    """Return the error as one that cancels, too: what waits for others (task groups, scopes) then ends them as well."""
    cls = type(error)
    try:
        if cls not in _CLASSES:
            _CLASSES[cls] = type(cls.__name__, (cls, asyncio.CancelledError), {"__module__": cls.__module__})
        return _CLASSES[cls](*error.args)
    except TypeError:  # a class that nothing can be derived from in this way
        return error


class Interruptible(Generic[T]):
    """A coroutine in which an error can be raised from outside, at its next await."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._coroutine = coroutine
        self._is_cancelled = is_cancelled  # by somebody else, for good
        self._error: Exception | None = None
        self.is_interrupted = False

    async def run(self) -> T:
        """Await the coroutine."""
        try:
            return await self
        except asyncio.CancelledError as error:
            if self._error is None or not isinstance(error, type(self._error)):
                raise
            # By now it cancels nothing any more, and what awaits this takes it for what it is.
            raise self._error.with_traceback(error.__traceback__) from None

    def interrupt(self, task: asyncio.Task[T], error: Exception) -> None:
        """Raise the error in the coroutine, which that task runs."""
        self._error = error
        self.is_interrupted = False
        task.cancel()

    def __await__(self) -> Generator[Any, Any, T]:
        return _Steps(self)

    def _throw(self, value: Any) -> Any:
        if self._error is None or self.is_interrupted or self._is_cancelled():
            return self._coroutine.throw(value)
        if isinstance(value, asyncio.CancelledError):
            self.is_interrupted = True
            if (task := asyncio.current_task()) is not None and hasattr(task, "uncancel"):  # since Python 3.11
                task.uncancel()
            value = _cancelling(self._error)
        return self._coroutine.throw(value)


class _Steps(Generator[Any, Any, T]):
    """The iterator behind ``Interruptible``."""

    def __init__(self, interruptible: Interruptible[T]) -> None:
        self._throw = interruptible._throw
        self._coroutine = interruptible._coroutine

    def __next__(self) -> Any:
        return self._coroutine.send(None)

    def send(self, value: Any) -> Any:
        """Go on with a value."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Go on with an exception."""
        value = error[0] if len(error) == 1 or error[1] is None else error[1]
        return self._throw(value() if isinstance(value, type) else value)

    def close(self) -> None:
        """End it."""
        self._coroutine.close()
