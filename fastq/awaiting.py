"""Running a coroutine to its end where no event loop is: in a process that runs one call at a time, or in a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, TypeVar

T = TypeVar("T")


class _Own(threading.local):
    """The loop of a thread: one for all coroutines, as what they keep open belongs to it."""

    loop: asyncio.AbstractEventLoop | None = None
    pid = 0


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
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except BaseException:  # of a limit for one: what the coroutine has open is closed before it goes on
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                loop.run_until_complete(task)
        raise


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
