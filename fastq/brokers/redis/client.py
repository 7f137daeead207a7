"""One connection to Redis for all threads of a process: commands that may be repeated. Made when it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastq.brokers.redis.blocking import BlockingRedis
from fastq.errors import ConnectionLost, RedisError
from fastq.net import forks

if TYPE_CHECKING:
    from fastq.brokers.redis.login import Command
    from fastq.brokers.redis.replies import Shape


class RedisClient:
    """Lends a connection to one thread at a time; a forked child makes one of its own."""

    def __init__(self, connect: Callable[[], BlockingRedis]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._redis = connect()
        forks.register(self)

    def use(self, commands: Sequence[Command], kind: Shape = object) -> list[Any]:
        """Return the replies to commands: once more on a new connection if this one was lost.

        Raises ConnectionLost, RedisError for an error among the replies, SettingsError.
        """
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

    def distrust(self) -> None:
        """Another connection was lost: this one may be too, and a new one costs less than to find out."""
        if self._lock.acquire(blocking=False):
            try:
                self._redis.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close the connection; a later use opens another one."""
        with self._lock:
            self._redis.close()

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock; the connection is the parent's."""
        self._lock = threading.Lock()
        self._redis.close()
        self._redis = self._connect()
