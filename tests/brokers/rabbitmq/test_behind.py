"""Confirms collected behind the caller's back: nothing waits, nothing is lost when the connection is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from fastq.brokers import open_publisher
from fastq.brokers.rabbitmq.behind import WINDOW, BehindPublisher
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.errors import FastqError, PublishError
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import wait_until

BEHIND = {"broker_transport_options": {"confirm_publish": "behind"}}


def message(queue: str = "behind") -> Message:
    return encode_task("t", new_id(), b"[[],{},{}]", routing_key=queue)


@pytest.fixture
def publisher(amqp_url: str) -> Iterator[BehindPublisher]:
    opened = open_publisher(amqp_url, Settings(BEHIND))
    assert isinstance(opened, BehindPublisher)
    yield opened
    opened.close()


@contextmanager
def impatient(amqp_url: str) -> Iterator[tuple[FaultProxy, BehindPublisher]]:
    """A publisher that waits half a second, and a proxy on its way; one message has gone through."""
    parts = urlsplit(amqp_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        publisher = BehindPublisher(proxy.url(amqp_url), Settings({**BEHIND, "fastq_publish_timeout": 0.5}))
        publisher.publish([message()])
        assert publisher.flush() == 0
        yield proxy, publisher
        publisher.close()


def test_every_message_is_stored_and_confirmed(publisher: BehindPublisher) -> None:
    for _ in range(3 * WINDOW):
        publisher.publish([message()])
    assert publisher.flush() == 0
    assert publisher.depth("behind") == 3 * WINDOW


def test_what_was_not_confirmed_when_the_connection_was_cut_is_sent_again(amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        through = proxy.url(amqp_url)
        publisher = BehindPublisher(through, Settings(BEHIND))
        direct = AmqpPublisher(amqp_url, Settings())
        publisher.publish([message()])
        assert publisher.flush() == 0
        proxy.stall()
        publisher.publish([message() for _ in range(20)])
        assert direct.depth("behind") == 1
        proxy.cut()
        proxy.resume()
        # Nobody calls the publisher again: its watcher notices.
        deadline = time.monotonic() + 10
        while direct.depth("behind") < 21 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert direct.depth("behind") == 21
        assert publisher.flush() == 0
        publisher.close()
        direct.close()


def test_a_broker_that_is_slow_to_confirm_is_not_sent_its_messages_twice(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with impatient(amqp_url) as (proxy, publisher):
        proxy.hold_replies()
        publisher.publish([message() for _ in range(20)])
        wait_until(lambda: "still waiting" in caplog.text, 10, lambda: TimeoutError("no warning"))
        proxy.resume()
        assert publisher.flush() == 0
        assert proxy.connections == 1
        assert publisher.depth("behind") == 21


def test_a_full_window_is_an_error_and_nothing_more_is_sent(amqp_url: str) -> None:
    with impatient(amqp_url) as (proxy, publisher):
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


def test_a_broker_that_reads_nothing_is_not_sent_its_messages_twice(amqp_url: str) -> None:
    large = [encode_task("t", new_id(), bytes(6 << 20), routing_key="behind") for _ in range(4)]
    with impatient(amqp_url) as (proxy, publisher):
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


def test_a_broker_that_is_away_is_the_callers_error_and_is_not_tried_again_behind_its_back(amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        through = proxy.url(amqp_url)
    publisher = BehindPublisher(through, Settings(BEHIND))
    with pytest.raises(FastqError):
        publisher.publish([message()])
    assert publisher.flush(0) == 0


def test_a_script_that_ends_at_once_has_its_messages_confirmed(amqp_url: str) -> None:
    script = (
        "from fastq import FastQ\n"
        f"app = FastQ('s', broker={amqp_url!r}, broker_transport_options={{'confirm_publish': 'behind'}})\n"
        "for _ in range(100): app.send_task('t', queue='behind')\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=30, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    direct = AmqpPublisher(amqp_url, Settings())
    assert direct.depth("behind") == 100
    direct.close()
