"""What is particular to the buses of RabbitMQ and of Redis, and to brokers without one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from fastq.brokers import has_bus, open_blocking_bus
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, SettingsError
from fastq.interfaces import Bus
from fastq.settings import Settings
from tests.support.conformance.buses import with_bus
from tests.support.control_node import Node
from tests.support.servers import RabbitMQ, Redis


def test_a_broker_without_a_bus_is_named() -> None:
    assert not has_bus("sqlite:///x.db")
    with pytest.raises(SettingsError, match="memory:// carries no remote control"):
        open_blocking_bus("memory://", Settings())


async def publish_until_refused(bus: Bus, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        bus.publish_event("worker.online", {}, b"{}")
        await asyncio.sleep(0.01)


@pytest.mark.rabbitmq
def test_nothing_is_heaped_up_while_rabbitmq_blocks(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
        await asyncio.to_thread(rabbitmq.block_publishers)
        try:
            with pytest.raises(ConnectionLost, match="takes no messages now"):
                await publish_until_refused(bus)
        finally:
            await asyncio.to_thread(rabbitmq.unblock_publishers)

    with_bus(amqp_url, body)


@pytest.mark.redis
def test_nothing_is_left_in_redis_after_asking(redis_server: Redis) -> None:
    url = redis_server.url(15)
    redis = BlockingRedis(parse_redis_url(url, Settings()), 5)
    redis.call("FLUSHDB")  # others may have asked there
    node = Node(url, "fastq@here").start()
    client = open_blocking_bus(url, Settings({"broker_url": url}))
    try:
        assert list(client.ask("ping", {}, 5.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]
    finally:
        client.close()
        node.stop()
    assert redis.call("KEYS", "*pidbox*") == []
    redis.close()
