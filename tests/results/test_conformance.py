"""The stores that are no broker's own, and the suite that every store passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis as redis_py

from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.interfaces import ResultStore
from fastq.settings import Settings
from fastq.wire.amqp import encode_properties
from fastq.wire.message import Message
from tests.support.conformance.stores import StoreConformance, WaitingConformance
from tests.support.servers import Redis


@pytest.mark.redis
class TestRedis(WaitingConformance):
    @pytest.fixture
    def url(self, redis_server: Redis) -> str:
        url = redis_server.url(7)
        with redis_py.Redis.from_url(url) as client:
            client.flushdb()
        return url

    @pytest.fixture
    def settings(self) -> Settings:
        return Settings()


class Replying:
    """Stores where a worker would send its reply to: at the caller."""

    def __init__(self, amqp_url: str, store: ResultStore) -> None:
        self._store = store
        self.publisher = AmqpPublisher(amqp_url, Settings({"task_create_missing_queues": False}))

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": task_id}
        queue = self._store.reply_address()
        assert queue is not None
        self.publisher.publish([Message("", queue, encode_properties(properties), meta)])


@pytest.mark.rabbitmq
class TestRpc(StoreConformance):
    keeps = False

    @pytest.fixture
    def url(self) -> str:
        return "rpc://"

    @pytest.fixture
    def settings(self, amqp_url: str) -> Settings:
        return Settings({"broker_url": amqp_url})

    @pytest.fixture
    def other(self, store: ResultStore, amqp_url: str) -> Iterator[Replying]:  # type: ignore[override]
        store.reply_address()
        replying = Replying(amqp_url, store)
        yield replying
        replying.publisher.close()
