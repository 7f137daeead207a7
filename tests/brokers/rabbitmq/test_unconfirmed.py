"""Publishing to RabbitMQ without confirms: nothing waits, and a lost connection is noticed at the next message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.errors import ConnectionLost
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import wait_until

pytestmark = pytest.mark.rabbitmq

UNCONFIRMED = {"broker_transport_options": {"confirm_publish": False}}


def message(body: bytes = b"[[],{},{}]") -> Message:
    return encode_task("t", new_id(), body, routing_key="unconfirmed")


@pytest.fixture
def direct(amqp_url: str) -> Iterator[AmqpPublisher]:
    """A publisher that sees what has arrived."""
    opened = AmqpPublisher(amqp_url, Settings())
    opened.declare("unconfirmed")
    yield opened
    opened.close()


def arrived(direct: AmqpPublisher, count: int) -> None:
    wait_until(lambda: direct.depth("unconfirmed") == count, 10, lambda: TimeoutError(f"no {count} messages"))


def test_messages_arrive_without_a_confirm(amqp_url: str, direct: AmqpPublisher) -> None:
    publisher = AmqpPublisher(amqp_url, Settings(UNCONFIRMED))
    for _ in range(100):
        publisher.publish([message()])
    publisher.publish([message(b"x" * 1_000_000)])
    arrived(direct, 101)
    publisher.close()


def test_nothing_is_waited_for(
    amqp_url: str, direct: AmqpPublisher, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    parts = urlsplit(amqp_url)
    proxy = fault_proxy(parts.hostname or "", parts.port or 0)
    publisher = AmqpPublisher(proxy.url(amqp_url), Settings(UNCONFIRMED))
    publisher.publish([message()])
    arrived(direct, 1)
    proxy.stall()
    publisher.publish([message()])  # with a confirm this would end in a time-out
    proxy.resume()
    arrived(direct, 2)
    publisher.close()


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_lost_connection_is_noticed_at_the_next_message(
    amqp_url: str, direct: AmqpPublisher, fault_proxy: Callable[[str, int], FaultProxy], reset: bool
) -> None:
    parts = urlsplit(amqp_url)
    proxy = fault_proxy(parts.hostname or "", parts.port or 0)
    publisher = AmqpPublisher(proxy.url(amqp_url), Settings(UNCONFIRMED))
    publisher.publish([message()])
    arrived(direct, 1)
    proxy.cut(reset)
    publisher.publish([message()])
    arrived(direct, 2)
    assert proxy.connections == 2
    publisher.close()


def test_without_a_broker_nothing_has_been_sent() -> None:
    publisher = AmqpPublisher("amqp://127.0.0.1:9//", Settings(UNCONFIRMED))
    with pytest.raises(ConnectionLost):
        publisher.publish([message()])
