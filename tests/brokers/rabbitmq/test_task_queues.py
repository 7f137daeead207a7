"""Queues of a task's own: declared so that the clients' own declarations agree, before or after ours."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq.brokers.rabbitmq.connection import BlockingConnection
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.rabbitmq.task_queues import RESULT_EXCHANGE, TaskQueues
from fastq.brokers.rabbitmq.url import parse_amqp_url
from fastq.codecs.meta import encode_meta
from fastq.errors import SettingsError
from fastq.settings import Settings
from fastq.wire.amqp import METHODS
from fastq.wire.properties import decode_properties
from tests.support.servers import RabbitMQ

CHANNEL = 1
DAY_MS = 86_400_000
TASK_ID = "a5f5cc6e-b5a5-4d1c-8d0f-2d5a7f4f3c11"
NAME = TASK_ID.replace("-", "")
CELERY_NODE = {"durable": True, "auto_delete": True, "arguments": {"x-expires": DAY_MS}}
CELERY_PHP: dict[str, Any] = {"durable": True, "auto_delete": True, "arguments": {}}


def queues(**values: Any) -> TaskQueues:
    return TaskQueues(Settings(values))


def connect(url: str) -> BlockingConnection:
    return BlockingConnection(parse_amqp_url(url), "test", 5.0, 5.0, 1 << 20)


@pytest.fixture
def broker(amqp_url: str) -> Iterator[BlockingConnection]:
    connection = connect(amqp_url)
    yield connection
    connection.close()


@pytest.fixture
def send_result(amqp_url: str) -> Iterator[Callable[[TaskQueues, str, Any], None]]:
    """What a worker does for a task that came without an address."""
    connection = connect(amqp_url)
    publisher = AmqpPublisher(amqp_url, Settings({"broker_url": amqp_url, "task_create_missing_queues": False}))

    def send(made: TaskQueues, task_id: str, result: Any) -> None:
        method, fields = made.exchange()
        connection.rpc(CHANNEL, method, **fields)
        spec = made.spec(task_id)
        assert spec is not None
        with contextlib.suppress(SettingsError):  # the client was first
            connection.declare(spec)
        publisher.publish([made.message(spec, task_id, encode_meta(task_id, "SUCCESS", result))])

    yield send
    publisher.close()
    connection.close()


def test_the_queue_is_named_after_the_task_without_dashes() -> None:
    spec = queues().spec(TASK_ID)
    assert spec is not None
    [(method, fields)] = spec.steps()
    assert method == "queue.declare"
    assert fields.items() >= {"queue": NAME, **CELERY_NODE}.items()


def test_it_expires_when_results_do() -> None:
    for result_expires, arguments in [(None, {}), (0, {}), (3600, {"x-expires": 3_600_000}), (0.5, {"x-expires": 500})]:
        spec = queues(result_expires=result_expires).spec("php_5fb3.117")
        assert spec is not None
        assert (spec.name, spec.arguments) == ("php_5fb3.117", arguments)


@pytest.mark.parametrize("task_id", ["", "-", "amq.gen-x", "x" * 256, "é" * 128])
def test_an_id_that_no_queue_can_have_gets_none(task_id: str) -> None:
    assert queues().spec(task_id) is None


def test_the_result_is_a_persistent_json_message_correlated_by_the_full_id() -> None:
    made = queues()
    spec = made.spec(TASK_ID)
    assert spec is not None
    message = made.message(spec, TASK_ID, b"{}")
    properties = decode_properties(message.props)
    assert (message.exchange, message.routing_key, message.body) == ("", NAME, b"{}")
    assert properties["correlation_id"] == TASK_ID
    assert (properties["content_type"], properties["content_encoding"]) == ("application/json", "utf-8")
    assert properties["delivery_mode"] == 2


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    ("result_expires", "declared"), [(86400, CELERY_NODE), (None, CELERY_PHP)], ids=["node", "php"]
)
@pytest.mark.parametrize("client_is_first", [True, False])
def test_a_client_may_declare_the_queue_before_or_after_the_worker(
    result_expires: int | None,
    declared: dict[str, Any],
    client_is_first: bool,
    broker: BlockingConnection,
    send_result: Callable[..., None],
) -> None:
    made = queues(result_expires=result_expires)
    if client_is_first:
        broker.rpc(CHANNEL, "queue.declare", queue=NAME, **declared)
    send_result(made, TASK_ID, 5)
    broker.rpc(CHANNEL, "queue.declare", queue=NAME, **declared)
    broker.rpc(CHANNEL, "queue.bind", queue=NAME, exchange=RESULT_EXCHANGE, routing_key=NAME)
    assert get(broker, NAME)["result"] == 5


@pytest.mark.rabbitmq
def test_a_queue_that_the_client_declared_in_another_way_is_filled_all_the_same(
    broker: BlockingConnection, send_result: Callable[..., None]
) -> None:
    broker.rpc(CHANNEL, "queue.declare", queue=NAME, durable=False, auto_delete=False, arguments={"x-expires": 60_000})
    send_result(queues(), TASK_ID, "found")
    assert get(broker, NAME)["result"] == "found"


@pytest.mark.rabbitmq
def test_the_queue_goes_with_the_client_that_consumed_from_it(
    rabbitmq: RabbitMQ, amqp_vhost: str, broker: BlockingConnection, send_result: Callable[..., None]
) -> None:
    send_result(queues(), TASK_ID, 5)
    broker.rpc(CHANNEL, "basic.consume", queue=NAME, consumer_tag="c", no_ack=True)
    broker.rpc(CHANNEL, "basic.cancel", consumer_tag="c")
    assert rabbitmq.queue_depth(amqp_vhost, NAME) == -1


def get(connection: BlockingConnection, queue: str) -> dict[str, Any]:
    """Return the document in the queue."""
    connection.rpc(CHANNEL, "basic.consume", queue=queue, consumer_tag="test", no_ack=True)
    event = connection.next_event(time.monotonic() + 10.0)
    assert event is not None, "nothing was delivered"
    assert event.method_id == METHODS["basic.deliver"]
    document: dict[str, Any] = json.loads(event.body)
    return document
