"""The bus: requests, replies and events between workers and clients on a real RabbitMQ and a real Redis."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import orjson
import pytest
import uvloop

from fastq.brokers import has_bus, open_blocking_bus, open_bus
from fastq.errors import ConnectionLost, SettingsError
from fastq.interfaces import BlockingBus, Bus
from fastq.settings import Settings
from fastq.worker.remote.clock import LamportClock
from tests.support.control_node import Node
from tests.support.servers import RabbitMQ, Redis, wait_until

_databases = itertools.count(1)


@pytest.fixture(
    params=[pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
)
def bus_url(request: pytest.FixtureRequest) -> str:
    """The URL of a broker that nobody else uses."""
    if request.param == "amqp":
        url: str = request.getfixturevalue("amqp_url")
        return url
    server: Redis = request.getfixturevalue("redis_server")
    return server.url(next(_databases) % 16)


@pytest.fixture
def client(bus_url: str) -> Iterator[BlockingBus]:
    bus = open_blocking_bus(bus_url, Settings({"broker_url": bus_url}))
    yield bus
    bus.close()


@pytest.fixture
def node(bus_url: str) -> Iterator[Node]:
    node = Node(bus_url, "fastq@here").start()
    yield node
    node.stop()


def with_bus(url: str, body: Callable[[Bus, list[tuple[Mapping[str, Any], bytes]]], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine with an open bus and the list of requests that it has received."""
    requests: list[tuple[Mapping[str, Any], bytes]] = []

    async def main() -> None:
        bus = open_bus(url, Settings({"broker_url": url}), LamportClock())
        await bus.open("fastq@bus", lambda headers, data: requests.append((headers, data)))
        try:
            await body(bus, requests)
        finally:
            await bus.close()
            assert bus.lost.done()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 30))
    finally:
        loop.close()


def test_a_request_reaches_every_node_and_the_replies_come_back(bus_url: str, client: BlockingBus, node: Node) -> None:
    other = Node(bus_url, "fastq@there").start()
    try:
        replies = dict(client.ask("ping", {}, 1.0))
    finally:
        other.stop()
    assert replies == {"fastq@here": {"ok": "pong"}, "fastq@there": {"ok": "pong"}}


def test_asking_named_nodes_takes_no_longer_than_their_answers(client: BlockingBus, node: Node) -> None:
    start = time.monotonic()
    assert list(client.ask("ping", {}, 20.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]
    assert time.monotonic() - start < 10


def test_nobody_answers_when_nobody_is_there(client: BlockingBus) -> None:
    assert list(client.ask("ping", {}, 0.2)) == []


def test_one_client_asks_again_and_again(client: BlockingBus, node: Node) -> None:
    for _ in range(3):
        assert list(client.ask("ping", {}, 5.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]


def test_a_told_command_is_done_without_a_reply(client: BlockingBus, node: Node) -> None:
    client.tell("heartbeat", {})
    assert node.view is not None
    events = node.view.events
    wait_until(lambda: events.heartbeats == 1, 10, lambda: AssertionError("the command was not done"))


def test_a_pattern_chooses_nodes(client: BlockingBus, node: Node) -> None:
    assert list(client.ask("ping", {}, 0.3, pattern="celery@*", matcher="glob")) == []
    assert list(client.ask("ping", {}, 0.5, pattern="fastq@h*", matcher="glob")) == [("fastq@here", {"ok": "pong"})]


def test_events_reach_who_has_subscribed_before(bus_url: str, client: BlockingBus, node: Node) -> None:
    events = client.events()

    async def publish() -> None:
        assert node.control.bus is not None
        node.control.bus.publish_event("worker.heartbeat", {"hostname": "fastq@here"}, b'{"type":"worker-heartbeat"}')
        node.control.bus.publish_event("task.multi", {"hostname": "fastq@here"}, b"[1,2]")

    node.run(publish)
    (headers, first), (_, second) = next(events), next(events)
    assert (orjson.loads(first), second) == ({"type": "worker-heartbeat"}, b"[1,2]")
    assert headers["hostname"] == "fastq@here"
    assert headers["content_type"] == "application/json"


def test_a_client_that_listens_can_still_tell(client: BlockingBus, node: Node) -> None:
    events = client.events()
    client.tell("heartbeat", {})
    assert node.view is not None
    view = node.view
    wait_until(lambda: view.events.heartbeats == 1, 10, lambda: AssertionError("the command was not done"))

    async def publish() -> None:
        assert node.control.bus is not None
        node.control.bus.publish_event("worker.online", {}, b"{}")

    node.run(publish)
    assert next(events)[1] == b"{}"


def test_a_worker_asks_the_others(bus_url: str, node: Node) -> None:
    async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
        replies = dict(await bus.ask("ping", {}, 0.5))
        assert replies == {"fastq@here": {"ok": "pong"}}
        # Its own request came to it as well, with its clock.
        assert [headers["clock"] for headers, _ in requests] == [1]
        assert dict(await bus.ask("ping", {}, 0.3)) == {"fastq@here": {"ok": "pong"}}

    with_bus(bus_url, body)


def test_a_bus_that_does_not_listen_still_publishes(bus_url: str, client: BlockingBus) -> None:
    quiet = Node(bus_url, "fastq@quiet", worker_enable_remote_control=False).start()
    try:
        events = client.events()

        async def publish() -> None:
            assert quiet.control.bus is not None
            quiet.control.bus.publish_event("worker.online", {}, b"{}")

        quiet.run(publish)
        assert next(events)[1] == b"{}"
        asking = open_blocking_bus(bus_url, Settings({"broker_url": bus_url}))
        assert list(asking.ask("ping", {}, 0.3)) == []
        asking.close()
    finally:
        quiet.stop()


def test_another_exchange_is_another_bus(bus_url: str, node: Node) -> None:
    elsewhere = open_blocking_bus(bus_url, Settings({"broker_url": bus_url, "control_exchange": "other"}))
    assert list(elsewhere.ask("ping", {}, 0.3)) == []
    elsewhere.close()


@pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle"])
def test_requests_and_replies_use_the_task_serializer(bus_url: str, serializer: str) -> None:
    options: dict[str, Any] = {"task_serializer": serializer, "accept_content": [serializer]}
    node = Node(bus_url, "fastq@codec", **options).start()
    client = open_blocking_bus(bus_url, Settings({"broker_url": bus_url, **options}))
    try:
        assert list(client.ask("ping", {}, 5.0, ["fastq@codec"])) == [("fastq@codec", {"ok": "pong"})]
    finally:
        client.close()
        node.stop()


def test_what_is_not_accepted_is_not_read(bus_url: str, node: Node) -> None:
    pickling = {"broker_url": bus_url, "task_serializer": "pickle", "accept_content": ["pickle", "json"]}
    client = open_blocking_bus(bus_url, Settings(pickling))
    assert list(client.ask("ping", {}, 0.5)) == []
    assert node.control.malformed == 1
    client.close()


def test_a_broker_without_a_bus_is_named() -> None:
    assert not has_bus("sqlite:///x.db")
    with pytest.raises(SettingsError, match="memory:// carries no remote control"):
        open_blocking_bus("memory://", Settings())


@pytest.mark.rabbitmq
def test_losing_rabbitmq_ends_the_bus_and_events_are_refused(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
        threading.Thread(target=rabbitmq.close_connections, daemon=True).start()
        assert isinstance(await asyncio.wait_for(bus.lost, 10), ConnectionLost)
        with pytest.raises(ConnectionLost):
            bus.publish_event("worker.online", {}, b"{}")
        bus.reply("reply.celery.pidbox", "x", {}, b"{}")
        assert bus.dropped == 1

    with_bus(amqp_url, body)


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
def test_losing_redis_ends_the_bus(redis_server: Redis) -> None:
    async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
        await asyncio.to_thread(redis_server.restart)
        assert isinstance(await asyncio.wait_for(bus.lost, 10), ConnectionLost)
        with pytest.raises(ConnectionLost):
            bus.publish_event("worker.online", {}, b"{}")

    with_bus(redis_server.url(0), body)


@pytest.mark.redis
def test_nothing_is_left_in_redis_after_asking(redis_server: Redis) -> None:
    url = redis_server.url(15)
    node = Node(url, "fastq@here").start()
    client = open_blocking_bus(url, Settings({"broker_url": url}))
    try:
        assert list(client.ask("ping", {}, 5.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]
    finally:
        client.close()
        node.stop()
    from fastq.brokers.redis.blocking import BlockingRedis
    from fastq.brokers.redis.url import parse_redis_url

    redis = BlockingRedis(parse_redis_url(url, Settings()), 5)
    assert redis.call("KEYS", "*pidbox*") == []
    redis.close()
