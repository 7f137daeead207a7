"""A worker's results into Redis: each batch is one write, in Celery's keys and JSON, announced to whoever waits.

Stores only: queues and messages are ``brokers.redis``'s. It does not reconnect; ``lost`` says when somebody should.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.redis.aio import HEALTH_CHECK_S, AsyncRedis
from fastq.brokers.redis.login import PASSING_CODES
from fastq.brokers.redis.url import parse_redis_url
from fastq.codecs.payload import PayloadCodec
from fastq.errors import ConnectionLost, DecodeError, RedisError
from fastq.link import BatchSource
from fastq.results.redis.layout import ResultLayout
from fastq.states import READY_STATES, SUCCESS

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.brokers.redis.login import Command
    from fastq.interfaces import SaveItem
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.redis_store")

#: Chosen: a server that does not confirm the last results within this is not waited for when a worker stops.
CLOSE_S: Final = 2.0

#: Chosen: results that the server refuses for now are offered again so often.
RETRY_S: Final = 1.0


class RedisResults(BatchSource):
    """The hot half: one write for each batch of results. Brings no deliveries. Runs on the loop's thread."""

    def __init__(self, redis: AsyncRedis, settings: Settings) -> None:
        super().__init__()
        self._redis = redis
        self._layout = ResultLayout(settings)
        self._codec = PayloadCodec(settings)
        self._has_warned = False
        self._is_refused = False

    def pull(self, n: int) -> None:
        """Do nothing: there is nothing to receive here."""

    def save(self, batch: list[SaveItem]) -> None:
        """Store results; the ones with a token are confirmed when Redis has them."""
        self._write(batch)

    def _write(self, batch: list[SaveItem], replaces: bool = False) -> None:
        encode, store = self._codec.encode, self._layout.replace if replaces else self._layout.store
        commands: list[Command] = []
        for task_id, state, meta, _, _ in batch:
            commands += store(task_id, state, encode(meta))
        self._redis.send(commands, partial(self._on_stored, batch, replaces))

    def _on_stored(self, batch: list[SaveItem], replaces: bool, replies: list[Any]) -> None:
        # As a set there are few replies to look at: OK, and how many heard of it.
        if any(type(reply) is not int and reply != b"OK" for reply in set(replies)):
            self._sort_out(batch, replaces, replies)
            return
        self._is_refused = False
        tokens = [token for *_, token in batch if token]
        if tokens:
            self.published(tokens)

    def _sort_out(self, batch: list[SaveItem], replaces: bool, replies: list[Any]) -> None:
        """Go through the replies one by one: some of them say that their result is not stored, or not yet."""
        stored: list[SaveItem] = []
        undecided: list[SaveItem] = []
        delayed: list[SaveItem] = []
        left = iter(replies)
        for item in batch:
            reply = next(left)
            if replaces or item[1] == SUCCESS:
                self._check_announced(next(left))
            if not isinstance(reply, RedisError):
                kept = isinstance(reply, int) or reply == b"OK" or self._has_succeeded(reply)
                (stored if kept else undecided).append(item)
            elif reply.code in PASSING_CODES:
                self._complain(reply)
                # Only what is final is worth another attempt: by then it may be what the task is past.
                (delayed if item[1] in READY_STATES else stored).append(item)
            else:
                # Neither another attempt nor another run of the task would help.
                logger.error("the result of task %s cannot be stored, and is lost: %s", item[0], reply)
                stored.append(item)
        if delayed:
            asyncio.get_running_loop().call_later(RETRY_S, self._write, delayed)
        if undecided:
            self._write(undecided, replaces=True)
        tokens = [token for *_, token in stored if token]
        if tokens:
            self.published(tokens)

    def _has_succeeded(self, payload: bytes) -> bool:
        """Whether a compressed state that was found is a SUCCESS, which is kept."""
        try:
            return bool(self._codec.decode(self._redis.expect(payload, bytes))["status"] == SUCCESS)
        except DecodeError:
            return False

    def _check_announced(self, reply: Any) -> None:
        if isinstance(reply, RedisError) and not self._has_warned:
            self._has_warned = True
            logger.error("results are stored but not announced: %s. Who waits for them will not be told", reply)

    def _complain(self, reason: RedisError) -> None:
        if not self._is_refused:
            self._is_refused = True
            logger.error("Redis takes no results: %s. Tasks whose results wait are not settled; trying again", reason)


class RedisSaver:
    """A worker's connection for its results."""

    source: RedisResults
    lost: asyncio.Future[Exception]
    source_class = RedisResults

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        self._urls = parse_redis_url(url, settings, "results")
        self._settings = settings
        #: The worker's node name; the server lists the connection under it.
        self.name = ""
        self._redis: AsyncRedis

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""
        settings = self._settings
        interval_s = settings.redis_backend_health_check_interval or HEALTH_CHECK_S
        name = f"fastq results {self.name}"
        self._redis = AsyncRedis(self._urls, name, interval_s, settings.fastq_max_message_bytes)
        self.source = self.source_class(self._redis, settings)
        await self._redis.open(settings.redis_socket_connect_timeout or settings.broker_connection_timeout)
        self.lost = self._redis.lost

    async def close(self) -> None:
        """Have what was handed over stored, if the server answers in time, and close the connection."""
        with contextlib.suppress(ConnectionLost, asyncio.TimeoutError):
            await asyncio.wait_for(self._redis.call("PING"), CLOSE_S)
        await self._redis.close()
