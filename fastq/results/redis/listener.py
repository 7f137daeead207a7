"""Whoever waits in this process for a result in Redis: one subscribed connection, one of them listens for all.

There is no thread except one while somebody watches. A lost connection is made again, every channel subscribed again,
and what was stored meanwhile is looked up. Keys mean nothing here; a key and its channel have the same name.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

from fastq.brokers.redis.blocking import BlockingRedis
from fastq.errors import ConnectionLost, FastqError

logger = logging.getLogger("fastq.results.redis_listener")

#: Returns what is stored under keys, None for the ones that are not there.
Look: TypeAlias = Callable[[Sequence[bytes]], "list[bytes | None]"]

#: Chosen: the thread stays for so long, as the next watcher is likely to come soon.
LINGER_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 1.0
LOOK_SLICE: Final = 500
CLOSE_S: Final = 2.0
FOREVER_S: Final = 1e9


class Waiter:
    """Somebody who waits for one result; with a callback, the thread waits for them."""

    __slots__ = ("callback", "channel", "needs_look", "payload", "signal")

    def __init__(
        self, channel: bytes, signal: threading.Event, callback: Callable[[bytes], None] | None = None
    ) -> None:
        self.channel = channel
        self.signal = signal
        self.callback = callback
        self.payload: bytes | None = None
        #: Whether something may be stored that was not announced to us.
        self.needs_look = False


class Listener:
    """This process's subscriptions and everybody who waits for one of them. Thread-safe."""

    def __init__(
        self,
        redis: BlockingRedis,
        look: Look,
        is_final: Callable[[bytes], bool],
        on_reconnected: Callable[[], None],
        patience_s: float,
    ) -> None:
        self._redis = redis
        self._on_reconnected = on_reconnected
        self._look = look
        self._is_final = is_final
        self._patience_s = patience_s
        # Taken in this order. The first is held while bytes are sent or taken in, never while somebody waits for them.
        self._io = threading.Lock()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waiting: dict[bytes, list[Waiter]] = {}
        # Subscribed still, though nobody waits on them any more: given up along with the next subscription.
        self._stale: set[bytes] = set()
        self._is_led = False
        self._followers: list[threading.Event] = []
        self._was_connected = False
        self._failing_since = 0.0
        self._pause_s = FIRST_PAUSE_S
        # The thread's part. Its waiters share one signal.
        self._thread: threading.Thread | None = None
        self._poked = threading.Event()
        self._watched = 0
        self._ended: deque[Waiter] = deque()
        self._unsure: set[Waiter] = set()

    def wait(self, channel: bytes, deadline: float | None) -> bytes | None:
        """Return the final state of a task, None when the deadline (monotonic) passes first. Raises ConnectionLost."""
        until = time.monotonic() + FOREVER_S if deadline is None else deadline
        waiter = Waiter(channel, threading.Event())
        # In this order: what is stored before the look is seen by it, what comes after the subscription is heard. What
        # comes between them is seen by a second look, once the server has confirmed the subscription.
        waiter.needs_look = True
        try:
            self._add(waiter, subscribes_anyway=False)
            while waiter.payload is None:
                if waiter.needs_look:
                    self._look_for(waiter, until)
                elif time.monotonic() >= until:
                    break
                else:
                    self._lead_or_follow(waiter.signal, until, lambda: waiter.payload is not None or waiter.needs_look)
        finally:
            self._remove(waiter)
        return waiter.payload

    def watch(self, channel: bytes, callback: Callable[[bytes], None]) -> Callable[[], None]:
        """Have a callback made by the thread when the result is there; returns what ends the watch.

        Raises ConnectionLost if it cannot start to.
        """
        waiter = Waiter(channel, self._poked, callback)
        with self._lock:
            self._watched += 1
        try:
            # The confirmation makes the thread look, so there has to be one.
            self._add(waiter, subscribes_anyway=True)
        except BaseException:
            self._remove(waiter)
            with self._lock:
                self._watched -= 1
            raise
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve_watchers, name="fastq-redis-results", daemon=True)
                self._thread.start()
        return partial(self._unwatch, waiter)

    def _unwatch(self, waiter: Waiter) -> None:
        """Make no callback. The channel is given up with the next subscription."""
        with self._lock:
            waiters = self._waiting.get(waiter.channel, ())
            if waiter in waiters:
                self._watched -= 1
                self._unsure.discard(waiter)
        self._remove(waiter)

    def close(self) -> None:
        """Stop: waits raise ConnectionLost, watches are dropped."""
        with self._lock:
            self._closed.set()
            for signal in [*self._followers, self._poked]:
                signal.set()
            thread = self._thread
        self._redis.interrupt()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
        with self._io:
            self._redis.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close its copy of the socket; the parent's connection goes on."""
        self._redis.close()

    # --- who waits

    def _add(self, waiter: Waiter, subscribes_anyway: bool) -> None:
        with self._lock:
            is_first = waiter.channel not in self._waiting and waiter.channel not in self._stale
            self._stale.discard(waiter.channel)
            self._waiting.setdefault(waiter.channel, []).append(waiter)
        if not is_first and not subscribes_anyway and self._redis.is_open:
            return
        try:
            with self._io:
                if self._connect():
                    self._redis.subscribe(waiter.channel, instead_of=self._take_stale())
        except ConnectionLost as error:
            if not self._was_connected:
                raise
            logger.debug("a result will be asked for on the next connection: %s", error)

    def _remove(self, waiter: Waiter) -> None:
        with self._lock:
            waiters = self._waiting.get(waiter.channel)
            if waiters is None:
                return
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters:
                del self._waiting[waiter.channel]
                self._stale.add(waiter.channel)

    def _deliver(self, channel: bytes, payload: bytes) -> None:
        """Give a state to those who wait for it, if it is final."""
        if channel not in self._waiting or not self._is_final(payload):
            return
        with self._lock:
            waiters = self._waiting.pop(channel, [])
            self._stale.add(channel)
            for waiter in waiters:
                waiter.payload = payload
                if waiter.callback is not None:
                    self._ended.append(waiter)
                waiter.signal.set()

    def _mark_unsure(self, channel: bytes) -> None:
        """The server has confirmed a subscription: what was stored before nobody has announced to us."""
        with self._lock:
            for waiter in self._waiting.get(channel, ()):
                waiter.needs_look = True
                if waiter.callback is not None:
                    self._unsure.add(waiter)
                waiter.signal.set()

    def _look_for(self, waiter: Waiter, until: float) -> None:
        waiter.needs_look = False
        try:
            (payload,) = self._look([waiter.channel])
        except ConnectionLost as error:
            self._endure(error, until)
            waiter.needs_look = time.monotonic() < until
            return
        self._failing_since = 0.0
        if payload is not None:
            self._deliver(waiter.channel, payload)

    # --- the connection; with ``_io`` held

    def _connect(self) -> bool:
        """Return True when there was a connection already; else make one that is subscribed to all channels."""
        if self._redis.is_open:
            return True
        if self._closed.is_set():
            raise ConnectionLost("the result store was closed while a result was awaited")
        self._redis.open()
        if self._was_connected:
            self._on_reconnected()
        self._was_connected = True
        self._failing_since, self._pause_s = 0.0, FIRST_PAUSE_S
        with self._lock:
            channels = list(self._waiting)
            self._stale.clear()
        self._redis.subscribe(*channels)
        return False

    def _take_stale(self) -> set[bytes]:
        """Return the channels to give up: none of those that somebody waits on, or will again before this is sent."""
        with self._lock:
            stale, self._stale = self._stale, set()
            return stale

    def _take_in(self) -> tuple[int, float] | None:
        """Take in what has come. When there was nothing: return the socket to poll, and until when."""
        with self._io:
            self._connect()
            alive_until = self._redis.check_alive()
            if not self._redis.receive(0.0):
                return self._redis.fileno(), alive_until
            while (push := self._redis.take_push()) is not None:
                if push[0] == b"message":
                    self._deliver(push[1], push[2])
                elif push[0] == b"subscribe":
                    self._mark_unsure(push[1])
        return None

    # --- listening: one at a time

    def _lead_or_follow(self, signal: threading.Event, until: float, is_done: Callable[[], bool]) -> None:
        """Return when there is news for the caller, when it may have to lead, or at ``until`` (monotonic)."""
        with self._lock:
            if self._closed.is_set():
                raise ConnectionLost("the result store was closed while a result was awaited")
            if is_done():
                return
            signal.clear()
            leads = not self._is_led
            if leads:
                self._is_led = True
            else:
                self._followers.append(signal)
        try:
            if not leads:
                signal.wait(min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))
                return
            while not is_done() and not self._closed.is_set() and time.monotonic() < until:
                self._listen(until)
        finally:
            with self._lock:
                if leads:
                    self._is_led = False
                else:
                    self._followers.remove(signal)
                if not self._is_led and self._followers:
                    # The thread first, if it waits: it stays, others come and go.
                    heir = self._poked if self._poked in self._followers else self._followers[0]
                    heir.set()

    def _listen(self, until: float) -> None:
        try:
            idle = self._take_in()
        except ConnectionLost as error:
            self._endure(error, until)
            return
        if idle is not None:
            descriptor, alive_until = idle
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(max(0.0, min(until, alive_until) - time.monotonic()) * 1000)

    def _endure(self, error: ConnectionLost, until: float) -> None:
        """Wait a moment for Redis to come back; raise the error when it has been away too long, or was never there."""
        now = time.monotonic()
        if self._closed.is_set():
            raise ConnectionLost("the result store was closed while a result was awaited") from None
        if not self._failing_since:
            self._failing_since = now
        elif now - self._failing_since > self._patience_s:
            raise error
        if not self._was_connected:
            raise error
        self._closed.wait(max(0.0, min(self._pause_s, until - now)))
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)

    # --- watching: the thread

    def _serve_watchers(self) -> None:
        """Wait for all watched results until there has been none to wait for, for a while."""
        leave_at = time.monotonic() + LINGER_S
        while True:
            now = time.monotonic()
            with self._lock:
                if self._watched:
                    leave_at = now + LINGER_S
                if self._closed.is_set() or now >= leave_at:
                    self._thread = None
                    return
            try:
                self._look_for_watched()
                self._call_back()
                self._lead_or_follow(self._poked, leave_at, lambda: bool(self._ended or self._unsure))
            except FastqError as error:
                if not self._closed.is_set():
                    logger.error("cannot look for results, trying again: %s", error)
                    self._closed.wait(LAST_PAUSE_S)

    def _look_for_watched(self) -> None:
        with self._lock:
            unsure, self._unsure = self._unsure, set()
        channels = list({waiter.channel for waiter in unsure if waiter.payload is None})
        for start in range(0, len(channels), LOOK_SLICE):
            part = channels[start : start + LOOK_SLICE]
            try:
                payloads = self._look(part)
            except FastqError:
                with self._lock:
                    self._unsure |= unsure
                raise
            for channel, payload in zip(part, payloads, strict=True):
                if payload is not None:
                    self._deliver(channel, payload)

    def _call_back(self) -> None:
        while self._ended:
            waiter = self._ended.popleft()
            with self._lock:
                self._watched -= 1
            assert waiter.callback is not None
            assert waiter.payload is not None
            try:
                waiter.callback(waiter.payload)
            except Exception:
                logger.exception("the callback for the result %r failed", waiter.channel)
