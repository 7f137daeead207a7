"""Threads of the main process in which Celery's code and users' code runs, so that nothing of theirs stops the loop.

``Recorder`` does what it is given, in order: users' receivers of signals, strategies, and Celery's records of failures.
``HubThread`` runs kombu's event loop for users' steps. Neither is started before somebody needs it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from kombu.asynchronous import Hub
from kombu.asynchronous.timer import Timer

logger = logging.getLogger("celery.worker")

#: Time that a thread has for its last work when the worker ends.
JOIN_S = 10.0

#: Longest sleep of a timer that has entries: they are looked at again at least this often.
_LONGEST_S = 3600.0

#: Pause after a callback of the event loop has failed, so that one that always fails does not take a whole processor.
_AFTER_ERROR_S = 1.0

Exit = Callable[[SystemExit], None]


class Recorder:
    """One thread that does what it is given, in order, and what its timer brings. ``on_exit`` hears of a SystemExit."""

    def __init__(self, on_exit: Exit) -> None:
        self.timer = _WakingTimer(self._wake)
        self._on_exit = on_exit
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ends_at: float | None = None

    def put(self, work: Callable[[], Any]) -> None:
        """Have it done soon; an error is logged."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastq-recorder", daemon=True)
            self._thread.start()
        self._work.put(work)

    def promise(self, work: Callable[[], Any]) -> Future[None]:
        """Have it done soon; the future is done when it is, whatever came of it."""
        done: Future[None] = Future()

        def fulfil() -> None:
            is_awaited = done.set_running_or_notify_cancel()
            try:
                work()
            finally:
                if is_awaited:
                    done.set_result(None)

        self.put(fulfil)
        return done

    def end(self) -> float:
        """Return the seconds that are left for what was given; counted from the first time that this is called."""
        now = time.monotonic()
        if self._ends_at is None:
            self._ends_at = now + JOIN_S
        return max(0.0, self._ends_at - now)

    def close(self) -> None:
        """Wait until all is done that was given; what waits for its time is dropped."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(self.end())

    def _wake(self) -> None:
        if self._thread is not threading.current_thread():
            self.put(_nothing)

    def _run(self) -> None:
        schedule = iter(self.timer)
        while True:
            delay, entry = next(schedule)
            if entry is not None:
                self._do(entry)
                continue
            try:
                work = self._work.get(timeout=delay)
            except queue.Empty:
                continue
            if work is None:
                return
            self._do(work)

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except SystemExit as error:
            self._on_exit(error)
        except Exception:
            logger.exception("error in %r", work)


class _WakingTimer(Timer):  # type: ignore[misc]  # kombu is not typed
    """kombu's timer for another thread: says when there is an entry more."""

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__(max_interval=_LONGEST_S)
        self._wake = wake

    def _enter(self, eta: float, priority: int, entry: Any, **options: Any) -> Any:
        entered = super()._enter(eta, priority, entry, **options)
        self._wake()
        return entered


def _nothing() -> None:
    pass


class HubThread:
    """kombu's event loop in a thread. ``on_error`` hears what its callbacks raise and returns whether it was known."""

    def __init__(self, on_exit: Exit, on_error: Callable[[Exception], bool]) -> None:
        self._on_exit = on_exit
        self._on_error = on_error
        self._work: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._bells = (-1, -1)
        self._ending = False
        self._is_allowed = False

    @property
    def hub(self) -> Any:
        """Return the event loop; it runs from ``allow`` on, when it was asked for."""
        hub = self._hub
        if self._is_allowed:
            self.start()
        return hub

    @cached_property
    def _hub(self) -> Any:
        return Hub(_WakingTimer(self._ring))

    def allow(self) -> None:
        """Run the event loop if anybody has asked for it, and as soon as somebody does."""
        self._is_allowed = True
        if "_hub" in vars(self):
            self.start()

    def start(self) -> None:
        """Run the event loop."""
        if self._thread is None and not self._ending:
            self._bells = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="fastq-steps", daemon=True)
            self._thread.start()

    def call(self, work: Callable[[], Any]) -> None:
        """Have it done in the thread; an error is logged."""
        self._work.put(work)
        self._ring()

    def stop(self) -> None:
        """Do what was given before, then end the thread."""
        if self._thread is None:
            return
        self.call(self._end)
        self._thread.join(JOIN_S)
        if not self._thread.is_alive():
            self._thread = None
            self._hub.close()
            for bell in self._bells:
                os.close(bell)

    def _end(self) -> None:
        self._ending = True

    def _ring(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            try:
                os.write(self._bells[1], b"\0")
            except BlockingIOError:  # it has bells enough
                return

    def _answer(self) -> None:
        os.read(self._bells[0], 4096)

    def _run(self) -> None:
        self._listen()
        while not self._ending:
            try:
                self._carry_on()
            except SystemExit as error:
                self._on_exit(error)
            except Exception as error:
                if not self._on_error(error):
                    logger.exception("error in the event loop of the steps")
                    time.sleep(_AFTER_ERROR_S)
                self._listen()

    def _listen(self) -> None:
        self._hub.add_reader(self._bells[0], self._answer)

    def _carry_on(self) -> None:
        while not self._ending:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                self._hub.run_once()
            else:
                work()
