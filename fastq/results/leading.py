"""One of many threads leads, the others follow until they are told or have to lead. Knows not what is led: no results.

Each thread comes with a signal of its own. The leader may sleep in ``poll``; whoever has news for it wakes it there.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from fastq.net.waker import Waker

#: Chosen: who follows sees so often whether anybody leads; a leader that leaves tells it.
FOLLOW_S: Final = 5.0
MAX_SLEEP_S: Final = 1e6


class Signal:
    """What a thread waits for and another one sets; waiting takes it. Costs a fifth of a ``threading.Event``."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = lock = threading.Lock()
        lock.acquire()

    def set(self) -> None:
        """Have the thread go on, or not begin to wait."""
        if self._lock.locked():
            with contextlib.suppress(RuntimeError):  # two set it
                self._lock.release()

    def clear(self) -> None:
        """Take it if it is set."""
        self._lock.acquire(blocking=False)

    def wait(self, timeout_s: float) -> None:
        """Wait until it is set, and take it."""
        self._lock.acquire(timeout=timeout_s)


class Lead:
    """Who leads and who follows. ``favourite`` is the signal of a thread that stays, so it leads rather than others."""

    def __init__(self) -> None:
        self.favourite = Signal()
        self._lock = threading.Lock()
        self._leader: Signal | None = None
        self._followers: dict[Signal, None] = {}
        self._is_asleep = False
        self._waker: Waker | None = None
        self._poll: select.poll | None = None
        self._polled = -1

    @property
    def is_taken(self) -> bool:
        """Whether somebody leads."""
        return self._leader is not None

    def lead_or_follow(
        self,
        signal: Signal,
        follow_until: float,
        is_done: Callable[[], bool],
        lead: Callable[[], None],
    ) -> None:
        """Lead if nobody does; else return when told, when there is nobody who leads, or at a time (monotonic).

        It does neither if ``is_done``: what makes it so is followed by ``tell``.
        """
        try:
            with self._lock:
                if is_done():
                    return
                signal.clear()
                if self._leader is None:
                    self._leader = signal
                else:
                    self._followers[signal] = None
            if self._leader is signal:
                lead()
            else:
                signal.wait(max(0.0, min(follow_until - time.monotonic(), FOLLOW_S)))
        finally:
            # First, and without a call, in which an interrupt might strike: nobody must follow one that has left.
            if self._leader is signal:
                self._leader = None
            with self._lock:
                self._followers.pop(signal, None)
                if self._leader is None and self._followers:
                    first = self.favourite if self.favourite in self._followers else next(iter(self._followers))
                    first.set()

    def tell(self, signal: Signal) -> None:
        """Have a thread return, or see whether it is done."""
        if self._leader is signal:
            self.tell_leader()
        else:
            signal.set()

    def tell_leader(self) -> None:
        """Have the leader look around for something to do."""
        # One that is awake does so before it sleeps, and before it leaves.
        if self._is_asleep and self._waker is not None:
            self._waker.wake()

    def tell_followers(self) -> None:
        """Have all that follow return."""
        with self._lock:
            for signal in self._followers:
                signal.set()

    # --- for the leader

    def sleep(self, descriptor: int, until: float, is_done: Callable[[], bool]) -> bool:
        """Return whether a descriptor (-1: none) is readable, at the latest at a time (monotonic) or when told."""
        poll = self._poll if self._polled == descriptor else None
        poll = poll or self._new_poll(descriptor)
        self._is_asleep = True
        try:
            if is_done():
                return False
            ready = [found for found, _ in poll.poll(min(max(0.0, until - time.monotonic()), MAX_SLEEP_S) * 1000)]
        finally:
            self._is_asleep = False
        if ready and ready != [descriptor]:
            assert self._waker is not None
            self._waker.clear()
        return descriptor in ready

    def _new_poll(self, descriptor: int) -> select.poll:
        self._waker = self._waker or Waker()
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
        self._poll, self._polled = poll, descriptor
        return poll
