"""Results in Redis, for callers, in Celery's keys and layout. What a worker stores is ``saver``'s.

Waiting is pushed: whoever stores a state publishes it on a channel of the task's own, named as its key.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.client import RedisClient
from fastq.brokers.redis.url import parse_redis_url
from fastq.codecs.payload import PayloadCodec
from fastq.results.base import WaitingStore
from fastq.results.place import Heard, Place
from fastq.results.redis.layout import ResultLayout
from fastq.states import SUCCESS

if TYPE_CHECKING:
    from fastq.interfaces import Meta
    from fastq.settings import Settings


class RedisPlace(Place[bytes]):
    """Keys to look at on one connection, and their channels on another one, which is made when somebody waits."""

    hears_all = True
    thread_name = "fastq-redis-results"
    logger = logging.getLogger("fastq.results.redis_listener")

    def __init__(self, url: str, settings: Settings) -> None:
        self._urls = parse_redis_url(url, settings, "results")
        self._settings = settings
        self.patience_s = min(settings.redis_socket_timeout or 1e9, settings.fastq_publish_timeout)
        self.layout = ResultLayout(settings)
        self.codec = PayloadCodec(settings)
        self.client = RedisClient(self._new_connection)
        self._channels = self._new_connection()
        self._was_open = False

    def _new_connection(self) -> BlockingRedis:
        settings, name = self._settings, f"fastq results {os.getpid()}"
        connect_s = settings.redis_socket_connect_timeout or settings.broker_connection_timeout
        return BlockingRedis(self._urls, self.patience_s, name, connect_s, settings.fastq_max_message_bytes)

    def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
        """Return what is stored under the tasks' keys."""
        found = self.client.use([("GET", self.layout.key(each)) for each in task_ids], (bytes, type(None)))
        return {task_id: payload for task_id, payload in zip(task_ids, found, strict=True) if payload is not None}

    def decode(self, state: bytes) -> Meta:
        """Return a stored state's meta."""
        return self.codec.decode(state)

    def open(self, until: float) -> None:
        """Connect; what was subscribed to is not any more."""
        self._channels.limit(min(self.patience_s, until - time.monotonic()))
        self._channels.open()
        self._channels.limit(self.patience_s)
        if self._was_open:
            self.client.distrust()
        self._was_open = True

    def listen(self, task_ids: Sequence[str], dropped: Collection[str]) -> None:
        """Subscribe. The server confirms each: what was stored before that nobody has announced to us."""
        key = self.layout.key
        self._channels.subscribe(*map(key, task_ids), instead_of=[key(each) for each in dropped])

    def take(self) -> list[Heard[bytes]]:
        """Return what was announced, and whose subscriptions are confirmed."""
        heard: list[Heard[bytes]] = []
        self._channels.drain()
        while (push := self._channels.take_push()) is not None:
            if push[0] == b"message":
                heard.append((self.layout.task_id(push[1]), push[2]))
            elif push[0] == b"subscribe":
                heard.append((self.layout.task_id(push[1]), None))
        return heard

    def check(self) -> float:
        """Ask a silent server for a sign of life."""
        return self._channels.check_alive()

    def fileno(self) -> int:
        """Return the subscribed socket."""
        return self._channels.fileno()

    def close(self) -> None:
        """End the subscriptions."""
        self._channels.close()

    def forget(self) -> None:
        """Make another connection; the parent's goes on."""
        self._channels.close()
        self._channels = self._new_connection()
        self._was_open = False


class RedisStore(WaitingStore[bytes]):
    """ResultStore for redis:// and its kin (the protocol is ``interfaces.ResultStore``)."""

    def __init__(self, url: str, settings: Settings) -> None:
        place = RedisPlace(url, settings)
        super().__init__(place)
        self._use, self._layout, self._codec, self._client = place.client.use, place.layout, place.codec, place.client

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
        super().close()
        self._client.close()
