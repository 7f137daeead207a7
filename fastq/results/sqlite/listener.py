"""Whoever waits in this process for a result in the SQLite file: one of them listens to the bell, for all.

No SQL: the file is looked into through a function. A thread is started only while somebody watches.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, TypeAlias

from fastq.brokers.sqlite.bells import CLIENT, BellFolder, unpack_results
from fastq.errors import ConnectionLost, FastqError

logger = logging.getLogger("fastq.results.listener")

#: A wait that outlasts this is written into the file, for results of messages that do not carry our address.
REGISTER_AFTER_S: Final = 0.05
#: A second look into the file, should a datagram have been lost.
LOOK_EVERY_S: Final = 5.0
#: Chosen: the thread stays for so long, as the next watcher is likely to come soon.
LINGER_S: Final = 5.0
RETRY_S: Final = 1.0
#: Heard at once, so many datagrams may mean that the bell's buffer (10 or more) was full and some were refused.
MAYBE_LOST: Final = 10

_POKE: Final = b"\0"  # no result: only ends the wait of whoever listens

#: Returns the final metas of those tasks that have one. With an address: and has the other results announced there.
Look: TypeAlias = Callable[[Iterable[str], "str | None"], Mapping[str, bytes]]


class Waiter:
    """Somebody who waits for one result; with a callback, the thread waits for them."""

    __slots__ = ("callback", "is_registered", "meta", "signal", "task_id")

    def __init__(self, task_id: str, callback: Callable[[bytes], None] | None = None) -> None:
        self.task_id = task_id
        self.callback = callback
        self.meta: bytes | None = None
        self.is_registered = False
        self.signal = threading.Event()


class Listener:
    """This process's bell and everybody who waits for it to ring. Thread-safe."""

    def __init__(self, path: str, look: Look, unregister: Callable[[str, str], None]) -> None:
        self._folder = BellFolder(path)
        self._bell = self._folder.bind(CLIENT)
        self.address = self._bell.name
        self._look = look
        self._unregister = unregister
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waiting: dict[str, list[Waiter]] = {}
        # Who holds this listens. It is taken and released under the lock above, so that nobody leaves without an heir.
        self._listening = threading.Lock()
        self._leader: threading.Event | None = None
        self._followers: set[threading.Event] = set()
        # The thread's part.
        self._thread: threading.Thread | None = None
        self._poked = threading.Event()
        self._fresh: list[Waiter] = []
        self._dropped: list[Waiter] = []
        self._ended: deque[Waiter] = deque()

    def add(self, waiter: Waiter) -> Waiter:
        """Start to wait for a result; look into the file afterwards."""
        with self._lock:
            self._waiting.setdefault(waiter.task_id, []).append(waiter)
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Wait no longer."""
        with self._lock:
            waiters = self._waiting.get(waiter.task_id, [])
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters:
                self._waiting.pop(waiter.task_id, None)
            is_last = not waiters
        if waiter.is_registered and waiter.meta is None and is_last:
            self._unregister(waiter.task_id, self.address)

    def wait(self, waiter: Waiter, deadline: float | None) -> bytes | None:
        """Return the meta that a waiter gets; None when the deadline passes first."""
        look_at = time.monotonic() + REGISTER_AFTER_S
        while waiter.meta is None:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return None
            if now >= look_at:
                look_at = now + LOOK_EVERY_S
                self._look_for([waiter])
            else:
                until = look_at if deadline is None else min(look_at, deadline)
                self._lead_or_follow(waiter.signal, until, lambda: waiter.meta is not None)
        return waiter.meta

    def watch(self, task_id: str, callback: Callable[[bytes], None]) -> Callable[[], None]:
        """Have a callback made by the thread when the result is there; returns what ends the watch."""
        waiter = self.add(Waiter(task_id, callback))
        with self._lock:
            self._fresh.append(waiter)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve_watchers, name="fastq-results", daemon=True)
                self._thread.start()
        self._poke_thread()
        return partial(self._unwatch, waiter)

    def _unwatch(self, waiter: Waiter) -> None:
        """Make no callback. What the file says of the waiter is the thread's to remove: that may block."""
        with self._lock:
            waiters = self._waiting.get(waiter.task_id, [])
            if waiter not in waiters:
                return
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[waiter.task_id]
            self._dropped.append(waiter)
        self._poke_thread()

    def deliver(self, results: Mapping[str, bytes]) -> None:
        """Give results to those who wait for them."""
        has_watchers = False
        with self._lock:
            for task_id, meta in results.items():
                for waiter in self._waiting.pop(task_id, ()):
                    waiter.meta = meta
                    waiter.signal.set()
                    if waiter.callback is not None:
                        self._ended.append(waiter)
                        has_watchers = True
        if has_watchers:
            self._poke_thread()

    def close(self) -> None:
        """Stop: waits raise ConnectionLost, watches are dropped."""
        with self._lock:
            self._closed.set()
            for signal in [*self._followers, self._poked]:
                signal.set()
            self._folder.ring(self.address, _POKE)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(RETRY_S)
        with self._listening:
            pass  # nobody listens any more
        with self._lock:
            self._folder.close()

    # --- listening: one at a time -------------------------------------------------------------------------------------

    def _lead_or_follow(self, signal: threading.Event, until: float, is_done: Callable[[], bool]) -> None:
        """Return when there is news for the caller, when it may have to lead, or at ``until`` (monotonic)."""
        with self._lock:
            if self._closed.is_set():
                raise ConnectionLost("the result store was closed while a result was awaited")
            if is_done():
                return
            signal.clear()
            leads = self._listening.acquire(blocking=False)
            if leads:
                self._leader = signal
            else:
                self._followers.add(signal)
        try:
            if not leads:
                signal.wait(max(0.0, until - time.monotonic()))
                return
            while not is_done() and not self._closed.is_set() and (left_s := until - time.monotonic()) > 0:
                self._listen(left_s)
        finally:
            with self._lock:
                self._followers.discard(signal)
                if leads:
                    self._leader = None
                    self._listening.release()
                if self._leader is None and self._followers:
                    # The thread first, if it waits: it stays, others come and go.
                    heir = self._poked if self._poked in self._followers else next(iter(self._followers))
                    heir.set()

    def _listen(self, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._bell.fileno(), select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return
        datagrams = self._bell.hear()
        looks_again = len(datagrams) >= MAYBE_LOST
        found: dict[str, bytes] = {}
        for datagram in datagrams:
            looks_again |= not datagram
            for task_id, meta in unpack_results(datagram):
                if meta is None:
                    looks_again = True
                else:
                    found[task_id] = meta
        self.deliver(found)
        if looks_again:
            with self._lock:
                task_ids = list(self._waiting)
            self.deliver(self._look(task_ids, None))

    def _look_for(self, waiters: Sequence[Waiter]) -> None:
        """Look into the file, and be announced there: the message may have been another process's."""
        with self._lock:
            self._folder.restore(self._bell)
        new = [waiter.task_id for waiter in waiters if not waiter.is_registered]
        known = [waiter.task_id for waiter in waiters if waiter.is_registered]
        for waiter in waiters:
            waiter.is_registered = True
        if new:
            self.deliver(self._look(new, self.address))
        if known:
            self.deliver(self._look(known, None))

    # --- watching: the thread -----------------------------------------------------------------------------------------

    def _poke_thread(self) -> None:
        self._poked.set()
        with self._lock:
            if self._leader is self._poked and threading.current_thread() is not self._thread:
                self._folder.ring(self.address, _POKE)

    def _has_news(self) -> bool:
        return bool(self._fresh or self._ended or self._dropped)

    def _serve_watchers(self) -> None:
        """Wait for all watched results until there has been none to wait for, for a while."""
        watched: set[Waiter] = set()
        look_at = register_at = leave_at = time.monotonic() + LOOK_EVERY_S
        while True:
            now = time.monotonic()
            with self._lock:
                fresh, self._fresh = self._fresh, []
                if self._closed.is_set() or (not watched and not fresh and now >= leave_at):
                    self._thread = None
                    return
            try:
                if fresh:
                    watched.update(fresh)
                if self._dropped:
                    self._let_go(watched)
                    fresh = [waiter for waiter in fresh if waiter in watched]
                if fresh:
                    register_at = min(register_at, now + REGISTER_AFTER_S)
                    self.deliver(self._look([waiter.task_id for waiter in fresh], None))
                if now >= look_at:
                    look_at = register_at = now + LOOK_EVERY_S
                    self._look_for(list(watched))
                elif now >= register_at:
                    register_at = look_at
                    self._look_for([waiter for waiter in watched if not waiter.is_registered])
                watched -= self._call_back()
                if watched:
                    leave_at = now + LINGER_S
                self._lead_or_follow(self._poked, min(look_at, register_at), self._has_news)
            except (FastqError, OSError) as error:
                if not self._closed.is_set():
                    logger.error("cannot look for results, trying again: %s", error)
                    self._poked.wait(RETRY_S)

    def _let_go(self, watched: set[Waiter]) -> None:
        """Forget those whose watch was ended; keep no reference to them."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
        watched.difference_update(dropped)
        for waiter in dropped:
            if waiter.is_registered and waiter.task_id not in self._waiting:
                self._unregister(waiter.task_id, self.address)

    def _call_back(self) -> set[Waiter]:
        """Make the callbacks that are due and return whose they were."""
        called: set[Waiter] = set()
        while self._ended:
            waiter = self._ended.popleft()
            called.add(waiter)
            assert waiter.callback is not None
            assert waiter.meta is not None
            try:
                waiter.callback(waiter.meta)
            except Exception:
                logger.exception("the callback for task %s failed", waiter.task_id)
        return called
