"""Replies of Redis collected behind the caller's back: nothing waits, nothing is lost when the connection is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import redis as redis_py

from fastq.brokers import open_publisher
from fastq.brokers.redis.behind import WINDOW, RedisBehindPublisher
from fastq.brokers.redis.publisher import RedisPublisher
from fastq.errors import FastqError, PublishError
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Redis, wait_until

BEHIND = {"broker_transport_options": {"confirm_publish": "behind"}}


def message(queue: str = "behind") -> Message:
    return encode_task("t", new_id(), b"[[],{},{}]", routing_key=queue)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    wait_until(condition, timeout_s, lambda: TimeoutError("it has not come about"))


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


@contextmanager
def impatient(redis_url: str) -> Iterator[tuple[FaultProxy, RedisBehindPublisher]]:
    """A publisher that waits half a second, and a proxy on its way; one message has gone through."""
    parts = urlsplit(redis_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        publisher = RedisBehindPublisher(proxy.url(redis_url), Settings({**BEHIND, "fastq_publish_timeout": 0.5}))
        publisher.publish([message()])
        assert publisher.flush() == 0
        yield proxy, publisher
        publisher.close()


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


def test_what_was_not_answered_when_the_connection_was_cut_is_sent_again(
    redis_url: str, direct: RedisPublisher
) -> None:
    parts = urlsplit(redis_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        publisher = RedisBehindPublisher(proxy.url(redis_url), Settings(BEHIND))
        publisher.publish([message()])
        assert publisher.flush() == 0
        proxy.stall()
        for _ in range(20):
            publisher.publish([message()])
        assert direct.depth("behind") == 1
        proxy.cut()
        proxy.resume()
        # Nobody calls the publisher again: its watcher notices.
        until(lambda: direct.depth("behind") >= 21)
        assert publisher.flush() == 0
        assert direct.depth("behind") == 21
        publisher.close()


def test_a_server_that_is_slow_to_answer_is_not_sent_its_messages_twice(
    redis_url: str, direct: RedisPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    with impatient(redis_url) as (proxy, publisher):
        proxy.hold_replies()
        publisher.publish([message()])
        until(lambda: "still waiting" in caplog.text)
        proxy.resume()
        assert publisher.flush(10) == 0
        assert proxy.connections == 1
        assert direct.depth("behind") == 2


def test_a_full_window_is_an_error_and_nothing_more_is_sent(redis_url: str) -> None:
    with impatient(redis_url) as (proxy, publisher):
        proxy.hold_replies()
        publisher.publish([message() for _ in range(WINDOW)])
        began = time.monotonic()
        with pytest.raises(PublishError, match=rf"not published: .* {WINDOW} message") as caught:
            publisher.publish([message()], began + 0.3)
        assert time.monotonic() - began < 5
        assert caught.value.again is None
        proxy.resume()
        assert publisher.flush(10) == 0
        assert proxy.connections == 1
        assert publisher.depth("behind") == 1 + WINDOW


def test_a_server_that_reads_nothing_is_not_sent_its_messages_twice(redis_url: str) -> None:
    large = [encode_task("t", new_id(), bytes(6 << 20), routing_key="behind") for _ in range(4)]
    with impatient(redis_url) as (proxy, publisher):
        proxy.stall()
        publisher.publish([message()])
        with pytest.raises(PublishError, match="may still be stored") as caught:  # more than the sockets hold
            publisher.publish(large)
        assert caught.value.again == ()
        with pytest.raises(PublishError, match="not published") as caught:
            publisher.publish([message()])
        assert caught.value.again is None
        proxy.resume()
        publisher.publish([message()])  # behind the others
        assert publisher.flush(20) == 0
        assert proxy.connections == 1
        assert publisher.depth("behind") == 3 + len(large)


def test_a_server_that_restarts_is_sent_what_it_had_not_answered(redis_url: str, redis_server: Redis) -> None:
    publisher = RedisBehindPublisher(redis_url, Settings(BEHIND))
    publisher.publish([message()])
    assert publisher.flush() == 0
    redis_server.restart()
    publisher.publish([message()])  # into a connection that is gone
    assert publisher.flush(10) == 0
    assert publisher.depth("behind") >= 1
    publisher.close()


def test_a_server_that_is_away_is_the_callers_error_and_is_not_tried_again_behind_its_back(redis_url: str) -> None:
    parts = urlsplit(redis_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        through = proxy.url(redis_url)
    publisher = RedisBehindPublisher(through, Settings(BEHIND))
    with pytest.raises(FastqError):
        publisher.publish([message()])
    assert publisher.flush(0) == 0


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


def test_a_forked_child_leaves_the_parents_messages_alone(
    publisher: RedisBehindPublisher, direct: RedisPublisher
) -> None:
    publisher.publish([message()])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            publisher.publish([message()])
            code = publisher.flush()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert publisher.flush() == 0
    assert direct.depth("behind") == 2


def test_a_script_that_ends_at_once_has_its_messages_stored(redis_url: str, direct: RedisPublisher) -> None:
    script = (
        "from fastq import FastQ\n"
        f"app = FastQ('s', broker={redis_url!r}, broker_transport_options={{'confirm_publish': 'behind'}})\n"
        "for _ in range(100): app.send_task('t', queue='behind')\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=30, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert direct.depth("behind") == 100
