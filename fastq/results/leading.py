"""One of many threads leads, the others follow until they are told or have to lead. Knows not what is led: no results.

Each thread comes with a signal of its own. The leader may sleep in ``poll``; whoever has news for it wakes it there.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Final

from fastq.net.waker import Waker

#: Chosen: who follows sees so often whether anybody leads; a leader that leaves tells it.
FOLLOW_S: Final = 5.0
MAX_SLEEP_S: Final = 1e6


class Lead:
    """Who leads and who follows. ``favourite`` is the signal of a thread that stays, so it leads rather than others."""

    def __init__(self) -> None:
        self.favourite = threading.Event()
        self._lock = threading.Lock()
        self._leader: threading.Event | None = None
        self._followers: dict[threading.Event, None] = {}
        self._is_asleep = False
        self._waker: Waker | None = None

    @property
    def is_taken(self) -> bool:
        """Whether somebody leads."""
        return self._leader is not None

    def lead_or_follow(
        self,
        signal: threading.Event,
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

    def tell(self, signal: threading.Event) -> None:
        """Have a thread return, or see whether it is done."""
        signal.set()
        # The leader says that it goes to sleep before it looks around a last time: nothing is overlooked.
        if self._leader is signal:
            self.tell_leader()

    def tell_leader(self) -> None:
        """Have the leader, if it sleeps, look around for something to do."""
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
        waker = self._waker = self._waker or Waker()
        poll = select.poll()
        poll.register(waker, select.POLLIN)
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
        self._is_asleep = True
        try:
            if is_done():
                return False
            ready = [found for found, _ in poll.poll(min(max(0.0, until - time.monotonic()), MAX_SLEEP_S) * 1000)]
        finally:
            self._is_asleep = False
        if waker.fileno() in ready:
            waker.clear()
        return descriptor in ready
