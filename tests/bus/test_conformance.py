"""The buses of RabbitMQ and of Redis, and the suite that every bus passes."""

from __future__ import annotations

import itertools

import pytest

from tests.support.conformance.buses import BusConformance
from tests.support.servers import Redis

_databases = itertools.count(1)


@pytest.mark.rabbitmq
class TestRabbitMQ(BusConformance):
    @pytest.fixture
    def url(self, amqp_url: str) -> str:
        return amqp_url


@pytest.mark.redis
class TestRedis(BusConformance):
    @pytest.fixture
    def url(self, redis_server: Redis) -> str:
        return redis_server.url(next(_databases) % 16)
