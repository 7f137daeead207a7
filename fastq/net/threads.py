"""What blocks, done in threads for an event loop that must not. The threads end by themselves, and hold up no exit."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastq.net import forks

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

#: Chosen: a thread stays for so long, as the next call is likely to come soon.
LINGER_S: Final = 5.0


class Threads:
    """At most so many threads, started when they are needed. A forked child has none."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self.after_fork()
        forks.register(self)

    def after_fork(self) -> None:
        """In a forked child: the threads are the parent's."""
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._count = self._busy = 0

    async def run(self, function: Callable[[], T]) -> T:
        """Return what a function returns that runs in a thread, in the caller's context.

        It goes on when the caller is cancelled, unless it has not begun.
        """
        import asyncio  # not at the top: children would carry it

        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            if done.cancelled():
                return
            try:
                value = context.run(function)
            except BaseException as error:
                _tell(loop, done, done.set_exception, error)
            else:
                _tell(loop, done, done.set_result, value)

        self._submit(work)
        return await done

    def _submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._jobs.put(job)
            self._busy += 1
            if self._busy <= self._count or self._count >= self._most:
                return
            self._count += 1
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=LINGER_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._count -= 1
                        return
                continue
            job()
            with self._lock:
                self._busy -= 1


def _tell(loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], tell: Callable[[Any], None], what: Any) -> None:
    """Have a future set on its loop; the loop, and who waited on it, may be gone by now."""
    try:
        loop.call_soon_threadsafe(lambda: None if done.done() else tell(what))
    except RuntimeError:
        if not loop.is_closed():
            raise


_threads: Final = Threads(4, "fastq-blocking")  # chosen: what blocks here is rare, and waits for the same few servers


async def in_thread(function: Callable[[], T]) -> T:
    """Return what a function returns that may block: it runs in one of a few threads of ours."""
    return await _threads.run(function)
