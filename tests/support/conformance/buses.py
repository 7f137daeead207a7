"""What every bus must do: requests, replies and events between workers and clients, over both of its sides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest
import uvloop

from fastq.brokers import open_blocking_bus, open_bus
from fastq.errors import ConnectionLost
from fastq.interfaces import BlockingBus, Bus
from fastq.settings import Settings
from fastq.worker.remote.clock import LamportClock
from tests.support.control_node import Node
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import free_ports, wait_until


def with_bus(url: str, body: Callable[[Bus, list[tuple[Mapping[str, Any], bytes]]], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine with an open bus and the list of requests that it has received."""
    requests: list[tuple[Mapping[str, Any], bytes]] = []

    async def main() -> None:
        bus = open_bus(url, Settings({"broker_url": url}), LamportClock())
        await bus.open("fastq@bus", lambda headers, data: requests.append((headers, data)))
        try:
            assert not bus.lost.done()
            await body(bus, requests)
        finally:
            await bus.close()
            assert bus.lost.done()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 30))
    finally:
        loop.close()


class BusConformance:
    """Fixture to provide: ``url``, of a broker that nobody else uses."""

    @pytest.fixture
    def client(self, url: str) -> Iterator[BlockingBus]:
        bus = open_blocking_bus(url, Settings({"broker_url": url}))
        yield bus
        bus.close()

    @pytest.fixture
    def node(self, url: str) -> Iterator[Node]:
        node = Node(url, "fastq@here").start()
        yield node
        node.stop()

    # --- commands

    def test_a_request_reaches_every_node_and_the_replies_come_back(
        self, url: str, client: BlockingBus, node: Node
    ) -> None:
        other = Node(url, "fastq@there").start()
        try:
            replies = dict(client.ask("ping", {}, 1.0))
        finally:
            other.stop()
        assert replies == {"fastq@here": {"ok": "pong"}, "fastq@there": {"ok": "pong"}}

    def test_asking_named_nodes_takes_no_longer_than_their_answers(self, client: BlockingBus, node: Node) -> None:
        start = time.monotonic()
        assert list(client.ask("ping", {}, 20.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]
        assert time.monotonic() - start < 10

    def test_nobody_answers_when_nobody_is_there(self, client: BlockingBus) -> None:
        assert list(client.ask("ping", {}, 0.2)) == []

    def test_one_client_asks_again_and_again(self, client: BlockingBus, node: Node) -> None:
        for _ in range(3):
            assert list(client.ask("ping", {}, 5.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]

    def test_a_told_command_is_done_without_a_reply(self, client: BlockingBus, node: Node) -> None:
        client.tell("heartbeat", {})
        assert node.view is not None
        events = node.view.events
        wait_until(lambda: events.heartbeats == 1, 10, lambda: AssertionError("the command was not done"))

    def test_a_pattern_chooses_nodes(self, client: BlockingBus, node: Node) -> None:
        assert list(client.ask("ping", {}, 0.3, pattern="celery@*", matcher="glob")) == []
        assert list(client.ask("ping", {}, 0.5, pattern="fastq@h*", matcher="glob")) == [("fastq@here", {"ok": "pong"})]

    def test_events_reach_who_has_subscribed_before(self, url: str, client: BlockingBus, node: Node) -> None:
        events = client.events()

        async def publish() -> None:
            assert node.control.bus is not None
            node.control.bus.publish_event(
                "worker.heartbeat", {"hostname": "fastq@here"}, b'{"type":"worker-heartbeat"}'
            )
            node.control.bus.publish_event("task.multi", {"hostname": "fastq@here"}, b"[1,2]")

        node.run(publish)
        (headers, first), (_, second) = next(events), next(events)
        assert (orjson.loads(first), second) == ({"type": "worker-heartbeat"}, b"[1,2]")
        assert headers["hostname"] == "fastq@here"
        assert headers["content_type"] == "application/json"

    def test_a_client_that_listens_can_still_tell(self, client: BlockingBus, node: Node) -> None:
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

    def test_a_worker_asks_the_others(self, url: str, node: Node) -> None:
        async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
            replies = dict(await bus.ask("ping", {}, 0.5))
            assert replies == {"fastq@here": {"ok": "pong"}}
            # Its own request came to it as well, with its clock.
            assert [headers["clock"] for headers, _ in requests] == [1]
            assert dict(await bus.ask("ping", {}, 0.3)) == {"fastq@here": {"ok": "pong"}}

        with_bus(url, body)

    def test_a_bus_that_does_not_listen_still_publishes(self, url: str, client: BlockingBus) -> None:
        quiet = Node(url, "fastq@quiet", worker_enable_remote_control=False).start()
        try:
            events = client.events()

            async def publish() -> None:
                assert quiet.control.bus is not None
                quiet.control.bus.publish_event("worker.online", {}, b"{}")

            quiet.run(publish)
            assert next(events)[1] == b"{}"
            asking = open_blocking_bus(url, Settings({"broker_url": url}))
            assert list(asking.ask("ping", {}, 0.3)) == []
            asking.close()
        finally:
            quiet.stop()

    def test_another_exchange_is_another_bus(self, url: str, node: Node) -> None:
        elsewhere = open_blocking_bus(url, Settings({"broker_url": url, "control_exchange": "other"}))
        assert list(elsewhere.ask("ping", {}, 0.3)) == []
        elsewhere.close()

    @pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle"])
    def test_requests_and_replies_use_the_task_serializer(self, url: str, serializer: str) -> None:
        options: dict[str, Any] = {"task_serializer": serializer, "accept_content": [serializer]}
        node = Node(url, "fastq@codec", **options).start()
        client = open_blocking_bus(url, Settings({"broker_url": url, **options}))
        try:
            assert list(client.ask("ping", {}, 5.0, ["fastq@codec"])) == [("fastq@codec", {"ok": "pong"})]
        finally:
            client.close()
            node.stop()

    def test_what_is_not_accepted_is_not_read(self, url: str, node: Node) -> None:
        pickling = {"broker_url": url, "task_serializer": "pickle", "accept_content": ["pickle", "json"]}
        client = open_blocking_bus(url, Settings(pickling))
        assert list(client.ask("ping", {}, 0.5)) == []
        assert node.control.malformed == 1
        client.close()

    def test_a_client_hears_its_own_replies_alone(self, url: str, client: BlockingBus, node: Node) -> None:
        with closing(open_blocking_bus(url, Settings({"broker_url": url}))) as other:
            theirs = other.ask("ping", {}, 1.0)
            assert next(theirs) == ("fastq@here", {"ok": "pong"})
            ((_, found),) = client.ask("clock", {}, 1.0, ["fastq@here"])
            assert found.keys() == {"clock"}
            assert list(theirs) == []

    def test_a_node_that_is_not_there_is_waited_for_no_longer_than_was_said(
        self, client: BlockingBus, node: Node
    ) -> None:
        begun = time.monotonic()
        assert list(client.ask("ping", {}, 0.5, ["fastq@here", "fastq@nowhere"])) == [("fastq@here", {"ok": "pong"})]
        assert 0.4 < time.monotonic() - begun < 5.0

    def test_a_closed_client_opens_again(self, client: BlockingBus, node: Node) -> None:
        for _ in range(2):
            assert list(client.ask("ping", {}, 5.0, ["fastq@here"])) == [("fastq@here", {"ok": "pong"})]
            client.close()

    def test_a_reply_to_somebody_who_has_gone_does_no_harm(self, url: str, node: Node) -> None:
        async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
            bus.reply("reply.celery.pidbox", "nobody", {}, b"{}")
            assert dict(await bus.ask("ping", {}, 0.5)) == {"fastq@here": {"ok": "pong"}}
            assert not bus.lost.done()

        with_bus(url, body)

    def test_events_of_clients_reach_who_listens(self, url: str, client: BlockingBus) -> None:
        events = client.events()
        with closing(open_blocking_bus(url, Settings({"broker_url": url}))) as teller:
            teller.publish_event("task.sent", {"hostname": "a client"}, '{"ü":1}'.encode())
            headers, found = next(events)
        assert (headers["hostname"], found.decode()) == ("a client", '{"ü":1}')

    def test_events_that_nobody_listens_to_are_dropped_by_the_broker(self, url: str, client: BlockingBus) -> None:
        async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
            for _ in range(100):
                bus.publish_event("worker.heartbeat", {}, b"{}")
            await asyncio.sleep(0.1)
            events = await asyncio.to_thread(client.events)
            bus.publish_event("worker.online", {}, b'"heard"')
            assert (await asyncio.to_thread(next, events))[1] == b'"heard"'
            assert bus.dropped == 0

        with_bus(url, body)

    # --- the connection

    def test_a_lost_connection_ends_the_bus_and_events_are_refused(self, url: str) -> None:
        parts = urlsplit(url)

        async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
            threading.Timer(0.1, proxy.cut).start()
            assert isinstance(await asyncio.wait_for(bus.lost, 10), ConnectionLost)
            with pytest.raises(ConnectionLost):
                bus.publish_event("worker.online", {}, b"{}")
            with pytest.raises(ConnectionLost):
                await bus.ask("ping", {}, 0.2)
            bus.reply("reply.celery.pidbox", "x", {}, b"{}")
            assert bus.dropped == 1

        with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
            with_bus(proxy.url(url), body)

    def test_a_lost_connection_ends_listening(self, url: str) -> None:
        parts = urlsplit(url)
        with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
            through = proxy.url(url)
            with closing(open_blocking_bus(through, Settings({"broker_url": through}))) as client:
                events = client.events()
                threading.Timer(0.1, proxy.cut).start()
                with pytest.raises(ConnectionLost):
                    next(events)

    def test_a_broker_that_is_away_is_worth_another_try(self, url: str) -> None:
        away = url.replace(f":{urlsplit(url).port}", f":{free_ports(1)}")
        with closing(open_blocking_bus(away, Settings({"broker_url": away}))) as client:
            with pytest.raises(ConnectionLost):
                client.tell("heartbeat", {})
            with pytest.raises(ConnectionLost):
                list(client.ask("ping", {}, 0.5))

        async def body(bus: Bus, requests: list[tuple[Mapping[str, Any], bytes]]) -> None:
            raise AssertionError("it has opened")

        with pytest.raises(ConnectionLost):
            with_bus(away, body)
