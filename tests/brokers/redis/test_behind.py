"""Replies of Redis collected behind the caller's back: nothing waits, nothing is lost when the connection is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import redis as redis_py

from fastq.brokers import open_publisher
from fastq.brokers.redis.behind import WINDOW, RedisBehindPublisher
from fastq.brokers.redis.publisher import RedisPublisher
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.servers import Redis

BEHIND = {"broker_transport_options": {"confirm_publish": "behind"}}


def message(queue: str = "behind") -> Message:
    return encode_task("t", new_id(), b"[[],{},{}]", routing_key=queue)


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(5)
    with redis_py.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def publisher(redis_url: str) -> Iterator[RedisBehindPublisher]:
    opened = open_publisher(redis_url, Settings(BEHIND))
    assert isinstance(opened, RedisBehindPublisher)
    yield opened
    opened.close()


@pytest.fixture
def direct(redis_url: str) -> Iterator[RedisPublisher]:
    opened = RedisPublisher(redis_url, Settings())
    yield opened
    opened.close()


def test_every_message_is_stored_in_its_order(publisher: RedisBehindPublisher, redis_url: str) -> None:
    sent = [message() for _ in range(3 * WINDOW)]
    for each in sent[:WINDOW]:
        publisher.publish([each])
    publisher.publish(sent[WINDOW:])
    assert publisher.flush() == 0
    with redis_py.Redis.from_url(redis_url) as client:
        stored = client.lrange("behind", 0, -1)
    ids = [json.loads(envelope)["headers"]["id"] for envelope in reversed(stored)]
    assert ids == [each.id for each in sent]


def test_a_server_that_restarts_is_sent_what_it_had_not_answered(redis_url: str, redis_server: Redis) -> None:
    publisher = RedisBehindPublisher(redis_url, Settings(BEHIND))
    publisher.publish([message()])
    assert publisher.flush() == 0
    redis_server.restart()
    publisher.publish([message()])  # into a connection that is gone
    assert publisher.flush(10) == 0
    assert publisher.depth("behind") >= 1
    publisher.close()


def test_what_redis_refuses_is_logged_and_the_rest_arrives(
    publisher: RedisBehindPublisher, direct: RedisPublisher, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_py.Redis.from_url(redis_url) as client:
        client.set("taken", "by another type")
    refused = message("taken")
    with caplog.at_level(logging.ERROR):
        publisher.publish([message(), refused, message()])
        assert publisher.flush() == 0
    assert direct.depth("behind") == 2
    assert f"refused task {refused.id}: WRONGTYPE" in caplog.text
