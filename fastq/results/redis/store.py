"""Results in Redis, for callers, in Celery's keys and layout. What a worker stores is ``saver``'s.

Waiting is pushed: whoever stores a state publishes it on a channel of the task's own, and ``listener`` hears it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import parse_redis_url
from fastq.codecs.payload import PayloadCodec, unreadable_meta
from fastq.errors import ConnectionLost, DecodeError, RedisError, ResultTimeout
from fastq.net import forks
from fastq.results.redis.layout import ResultLayout
from fastq.results.redis.listener import Listener
from fastq.states import SUCCESS

if TYPE_CHECKING:
    from fastq.brokers.redis.login import Command
    from fastq.brokers.redis.replies import Shape
    from fastq.interfaces import Meta, Unwatch
    from fastq.settings import Settings


class RedisStore:
    """ResultStore for redis:// and its kin (the protocol is ``interfaces.ResultStore``)."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._urls = parse_redis_url(url, settings, "results")
        self._layout = ResultLayout(settings)
        self._codec = PayloadCodec(settings)
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._timeout_s = min(settings.redis_socket_timeout or 1e9, settings.fastq_publish_timeout)
        self._connect_timeout_s = settings.redis_socket_connect_timeout or settings.broker_connection_timeout
        self._start_over()
        forks.register(self)

    def _start_over(self) -> None:
        """Be as new: at first, and in a forked child, where the connections are the parent's."""
        self._lock = threading.Lock()
        self._redis = self._new_connection()
        self._listener: Listener | None = None

    # --- the protocol

    def reply_address(self, deadline: float | None = None) -> None:
        """Return None: results are announced to everybody."""

    def load(self, task_id: str) -> Meta | None:
        """Return the stored meta, or None when nothing is known of the task. Raises ConnectionLost, DecodeError."""
        (payload,) = self._look([self._layout.key(task_id)])
        return None if payload is None else self._codec.decode(payload)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta.

        Raises ResultTimeout, DecodeError, ConnectionLost when Redis is away for longer than fastq_publish_timeout.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        payload = self._listening().wait(self._layout.key(task_id), deadline)
        if payload is None:
            raise ResultTimeout(f"task {task_id} has not ended within {timeout_s} s")
        return self._codec.decode(payload)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from a background thread, when a final state is known; returns what ends the watch."""

        def on_payload(payload: bytes) -> None:
            try:
                meta = self._codec.decode(payload)
            except DecodeError as error:
                meta = unreadable_meta(task_id, error)
            callback(meta)

        return self._listening().watch(self._layout.key(task_id), on_payload)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Store an encoded meta and announce it, unless a SUCCESS is there and this is none. Raises ConnectionLost."""
        payload = self._codec.encode(meta)
        reply = self._use(self._layout.store(task_id, state, payload), (int, bytes))[0]
        if isinstance(reply, bytes) and reply != b"OK" and self._codec.decode(reply)["status"] != SUCCESS:
            self._use(self._layout.replace(task_id, state, payload), (int, bytes))

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""
        self._use([("DEL", self._layout.key(task_id))], int)

    def close(self) -> None:
        """Release the connections and the thread; a later call opens them again."""
        with self._lock:
            listener, self._listener = self._listener, None
            self._redis.close()
        if listener is not None:
            listener.close()

    # --- connections

    def _new_connection(self) -> BlockingRedis:
        name = f"fastq results {os.getpid()}"
        return BlockingRedis(self._urls, self._timeout_s, name, self._connect_timeout_s, self._max_message_bytes)

    def _listening(self) -> Listener:
        listener = self._listener
        if listener is not None:
            return listener
        with self._lock:
            if self._listener is None:
                self._listener = Listener(
                    self._new_connection(), self._look, self._codec.is_final, self._distrust, self._timeout_s
                )
            return self._listener

    def _look(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what is stored under keys now."""
        found: list[bytes | None] = self._use([("GET", key) for key in keys], (bytes, type(None)))
        return found

    def _distrust(self) -> None:
        """The other connection was lost: this one may be too, and a new one costs less than to find out."""
        if self._lock.acquire(blocking=False):
            try:
                self._redis.close()
            finally:
                self._lock.release()

    def _use(self, commands: Sequence[Command], kind: Shape = object) -> list[Any]:
        """Return the replies to commands that may be repeated: once more on a new connection if this one was lost."""
        with self._lock:
            try:
                return self._ask(commands, kind)
            except ConnectionLost:
                return self._ask(commands, kind)

    def _ask(self, commands: Sequence[Command], kind: Shape) -> list[Any]:
        replies = self._redis.pipeline(commands)
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
            self._redis.expect(reply, kind)
        return replies

    def after_fork(self) -> None:
        """In a forked child: leave the parent's connections alone; own ones are made when they are needed."""
        self._redis.close()
        if self._listener is not None:
            self._listener.forget_after_fork()
        self._start_over()
