"""Publishing to and consuming from a real RabbitMQ, and what happens when it refuses, blocks, hangs or goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from fastq.brokers.rabbitmq.connection import BlockingConnection
from fastq.brokers.rabbitmq.consumer import AmqpConsumer
from fastq.brokers.rabbitmq.handshake import frame
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.rabbitmq.url import parse_amqp_url
from fastq.errors import ConnectionLost, FastqError, PublishError, SettingsError
from fastq.settings import Settings
from fastq.wire.amqp import METHODS, decode_properties, encode_properties, encode_table
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, free_ports

pytestmark = pytest.mark.rabbitmq

BASIC_DELIVER = METHODS["basic.deliver"]


def settings(url: str, **values: Any) -> Settings:
    """Settings with time-outs that a test can wait for; ``task_queues`` may hold what the check does not allow yet."""
    queues = values.pop("task_queues", None)
    made = Settings({"broker_url": url, "fastq_publish_timeout": 5.0, **values})
    object.__setattr__(made, "task_queues", queues)
    return made


def task(queue: str = "q", body: bytes = b"[[],{},{}]", **options: Any) -> Message:
    return encode_task("t.noop", new_id(), body, routing_key=queue, **options)


@pytest.fixture
def publisher(amqp_url: str) -> Iterator[AmqpPublisher]:
    made = AmqpPublisher(amqp_url, settings(amqp_url))
    yield made
    made.close()


def admin(publisher: AmqpPublisher, method: str, **fields: Any) -> dict[str, Any]:
    """Do one operation on the broker over the publisher's connection."""
    answer: dict[str, Any] = publisher._administer(lambda connection: connection.rpc(2, method, **fields))
    return answer


def fetch(publisher: AmqpPublisher, queue: str) -> Any:
    """Return the next message of a queue as an event with properties and body; None when it is empty."""

    def get(connection: BlockingConnection) -> Any:
        connection.transmit(frame("basic.get", 2, queue=queue, no_ack=True))
        event = connection.next_event(time.monotonic() + 5)
        assert event is not None
        return None if event.method_id == METHODS["basic.get-empty"] else event

    admin(publisher, "queue.declare", queue=queue, passive=True)  # opens the channel
    return publisher._administer(get)


# --- publishing


def test_published_messages_are_in_the_queue(publisher: AmqpPublisher) -> None:
    first = task(headers={"trace": "ü"}, priority=3)
    publisher.publish([first])
    publisher.publish([task(), task()])
    assert publisher.depth("q") == 3
    event = fetch(publisher, "q")
    assert (event.props, event.body) == (first.props, first.body)
    assert publisher.purge("q") == 2
    assert publisher.depth("q") == 0


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 1_000_000])
def test_bodies_of_any_size_arrive_whole(publisher: AmqpPublisher, size: int) -> None:
    body = os.urandom(size)
    publisher.publish([task(body=body)])
    assert fetch(publisher, "q").body == body


def test_a_large_batch_is_confirmed_as_one(publisher: AmqpPublisher) -> None:
    publisher.publish([task() for _ in range(3000)])
    assert publisher.depth("q") == 3000


def test_every_type_of_header_is_understood_by_the_broker(publisher: AmqpPublisher) -> None:
    headers = {"n": 2**40, "m": -(2**63), "f": 0.5, "b": b"\xff", "l": [1, [None]], "t": {"u": True}, "s": "ü"}
    props = encode_properties({"headers": headers, "timestamp": 2**40})
    publisher.declare("q")
    publisher.publish([Message("", "q", props, b"")])
    assert decode_properties(fetch(publisher, "q").props)["headers"] == headers


def test_the_queue_is_bound_to_an_exchange_of_its_name_as_with_celery(publisher: AmqpPublisher) -> None:
    publisher.declare("mail")
    admin(publisher, "exchange.declare", exchange="mail", type="direct", durable=True)
    publisher.publish([Message("mail", "mail", encode_properties({}), b"x")])
    assert publisher.depth("mail") == 1
    # What Celery declares: durable and without arguments. Anything else would be refused here.
    admin(publisher, "queue.declare", queue="mail", durable=True, arguments={})


def test_queues_are_declared_with_their_arguments(amqp_url: str) -> None:
    queues = [
        {"name": "safe", "queue_type": "quorum"},
        {"name": "fast", "max_priority": 9},
        {"name": "work", "dead_letter_exchange": "", "dead_letter_routing_key": "dead", "message_ttl_ms": 1},
        "dead",
    ]
    publisher = AmqpPublisher(amqp_url, settings(amqp_url, task_queues=queues))
    with contextlib.closing(publisher):
        publisher.declare("dead")
        publisher.publish([task("safe"), task("fast", priority=1), task("fast", priority=8), task("work")])
        assert publisher.depth("safe") == 1
        assert [decode_properties(fetch(publisher, "fast").props)["priority"] for _ in range(2)] == [8, 1]
        until(lambda: publisher.depth("dead") == 1)


def test_a_queue_with_other_arguments_is_an_error_with_the_remedy(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.declare("q")
    other = AmqpPublisher(amqp_url, settings(amqp_url, task_default_queue_type="quorum"))
    with contextlib.closing(other):
        with pytest.raises(SettingsError, match=r"inequivalent arg 'x-queue-type'.*task_queues.*delete_queue"):
            other.declare("q")
        with pytest.raises(SettingsError, match="inequivalent arg"):
            other.publish([task("q")])
        other.publish([task("new")])
        assert other.depth("new") == 1


def test_without_a_queue_a_message_is_refused_by_name(amqp_url: str) -> None:
    strict = AmqpPublisher(amqp_url, settings(amqp_url, task_create_missing_queues=False))
    with contextlib.closing(strict):
        with pytest.raises(PublishError, match=r"no queue for 1 message.*nowhere.*task_create_missing_queues"):
            strict.publish([task("nowhere")])
        with pytest.raises(PublishError, match=r"no queue for 2 message.*elsewhere, nowhere"):
            strict.publish([task("nowhere"), task("celery"), task("elsewhere")])
        strict.declare("nowhere")
        strict.publish([task("nowhere")])
        assert (strict.depth("nowhere"), strict.depth("celery")) == (1, 1)


def test_a_queue_that_was_deleted_is_declared_again_at_the_next_try(publisher: AmqpPublisher) -> None:
    publisher.publish([task()])
    admin(publisher, "queue.delete", queue="q")
    with pytest.raises(PublishError, match="no queue"):
        publisher.publish([task()])
    publisher.publish([task()])
    assert publisher.depth("q") == 1


def test_a_full_queue_refuses(amqp_url: str) -> None:
    queues = [{"name": "small", "arguments": {"x-max-length": 1, "x-overflow": "reject-publish"}}]
    publisher = AmqpPublisher(amqp_url, settings(amqp_url, task_queues=queues))
    with contextlib.closing(publisher):
        with pytest.raises(PublishError, match=r"refused .* message.*full"):
            publisher.publish([task("small") for _ in range(5)])
        with pytest.raises(PublishError, match="refused 1 message"):
            publisher.publish([task("small")])
        assert publisher.purge("small") == 1
        publisher.publish([task("small")])


def test_an_unknown_exchange_or_queue_is_named(publisher: AmqpPublisher) -> None:
    with pytest.raises(SettingsError, match="no exchange 'gone'"):
        publisher.publish([Message("gone", "k", encode_properties({}), b"")])
    with pytest.raises(SettingsError, match="no queue 'gone'"):
        publisher.depth("gone")
    with pytest.raises(SettingsError, match="no queue 'gone'"):
        publisher.purge("gone")
    publisher.publish([task()])


def test_unconfirmed_publishing_does_not_wait(amqp_url: str, publisher: AmqpPublisher) -> None:
    hasty = AmqpPublisher(amqp_url, settings(amqp_url, broker_transport_options={"confirm_publish": False}))
    with contextlib.closing(hasty):
        for _ in range(50):
            hasty.publish([task()])
        hasty.publish([task() for _ in range(50)])
        until(lambda: publisher.depth("q") == 100)


# --- brokers that are not there, refuse, or fail


def refused(url: str, **values: Any) -> FastqError:
    """Return the error of a first publish; it is one line and shows no password."""
    publisher = AmqpPublisher(url, settings(url, **values))
    with contextlib.closing(publisher), pytest.raises(FastqError) as caught:
        publisher.publish([task()])
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    return caught.value


def test_a_broker_that_is_down_is_one_clear_line() -> None:
    error = refused(f"amqp://u:sesame@127.0.0.1:{free_ports(1)}//")
    assert isinstance(error, ConnectionLost)
    assert "cannot connect" in str(error)
    assert "Is it running" in str(error)


def test_an_unknown_host_is_one_clear_line() -> None:
    error = refused("amqp://u:sesame@nowhere.invalid//")
    assert isinstance(error, ConnectionLost)
    assert "nowhere.invalid" in str(error)


def test_a_wrong_password_is_not_tried_again(rabbitmq: RabbitMQ) -> None:
    error = refused(f"amqp://guest:sesame@127.0.0.1:{rabbitmq.port}//")
    assert isinstance(error, SettingsError)
    assert "403" in str(error)
    assert "password in broker_url" in str(error)


def test_a_wrong_virtual_host_is_named(rabbitmq: RabbitMQ) -> None:
    error = refused(rabbitmq.url("nowhere"))
    assert isinstance(error, SettingsError)
    assert "rabbitmqctl add_vhost nowhere" in str(error)


def test_all_logins_work(amqp_url: str) -> None:
    for mechanism in ("plain", "amqplain"):
        url = f"{amqp_url}?auth_mechanism={mechanism}"
        with contextlib.closing(AmqpPublisher(url, settings(url))) as publisher:
            publisher.publish([task()])
    assert "EXTERNAL" in str(refused(f"{amqp_url}?auth_mechanism=external"))


def test_the_next_broker_takes_over(amqp_url: str, fault_proxy: Callable[[str, int], FaultProxy]) -> None:
    port = parse_amqp_url(amqp_url).port
    first, second = fault_proxy("127.0.0.1", port), fault_proxy("127.0.0.1", port)
    urls = [f"amqp://127.0.0.1:{free_ports(1)}//", first.url(amqp_url), second.url(amqp_url)]
    publisher = AmqpPublisher(";".join(urls), settings(amqp_url))
    with contextlib.closing(publisher):
        publisher.publish([task()])
        assert (first.connections, second.connections) == (1, 0)
        first.refuse()
        first.cut()
        time.sleep(0.2)  # longer than a connection may be idle without being looked at
        publisher.publish([task()])
        assert second.connections == 1
        assert publisher.depth("q") == 2


def test_when_no_broker_answers_each_is_named() -> None:
    ports = [free_ports(1), free_ports(1)]
    error = refused(";".join(f"amqp://127.0.0.1:{port}//" for port in ports))
    assert isinstance(error, ConnectionLost)
    assert all(str(port) in str(error) for port in ports)


def test_an_idle_connection_that_was_closed_is_replaced(publisher: AmqpPublisher, rabbitmq: RabbitMQ) -> None:
    publisher.publish([task()])
    rabbitmq.close_connections()
    time.sleep(0.2)
    publisher.publish([task()])
    assert publisher.depth("q") == 2


def test_a_connection_lost_before_the_confirm_leaves_the_fate_open(
    amqp_url: str, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)
    publisher = AmqpPublisher(proxy.url(amqp_url), settings(amqp_url))
    with contextlib.closing(publisher):
        publisher.publish([task()])
        for messages in ([task()], [task(), task()]):
            proxy.stall()
            cutting = threading.Timer(0.2, proxy.cut)
            cutting.start()
            with pytest.raises(PublishError, match="may or may not have been stored"):
                publisher.publish(messages)
            cutting.join()
            proxy.resume()
            publisher.publish([task()])


def test_a_broker_that_hangs_ends_in_an_error_on_time(
    amqp_url: str, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)
    publisher = AmqpPublisher(proxy.url(amqp_url), settings(amqp_url, fastq_publish_timeout=0.5))
    with contextlib.closing(publisher):
        for messages in ([task()], [task(), task()]):
            publisher.publish([task()])
            proxy.stall()
            started = time.monotonic()
            with pytest.raises(PublishError, match=r"did not confirm .* within fastq_publish_timeout"):
                publisher.publish(messages)
            assert 0.4 < time.monotonic() - started < 2
            proxy.resume()


def test_a_broker_that_takes_no_bytes_ends_in_an_error_on_time(
    amqp_url: str, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)
    publisher = AmqpPublisher(proxy.url(amqp_url), settings(amqp_url, fastq_publish_timeout=0.5))
    with contextlib.closing(publisher):
        publisher.publish([task()])
        proxy.stall()
        started = time.monotonic()
        with pytest.raises(PublishError):
            publisher.publish([task(body=bytes(20_000_000))])
        assert time.monotonic() - started < 3


def publish_until_refused(publisher: AmqpPublisher, messages: list[Message]) -> None:
    """Publish again and again: the alarm reaches the connections a moment after it was raised."""
    for _ in range(500):
        publisher.publish(messages)
        time.sleep(0.01)


def test_a_blocked_publisher_hears_so(publisher: AmqpPublisher, rabbitmq: RabbitMQ, amqp_url: str) -> None:
    impatient = AmqpPublisher(amqp_url, settings(amqp_url, fastq_publish_timeout=0.5))
    with contextlib.closing(impatient):
        impatient.publish([task()])
        rabbitmq.block_publishers()
        try:
            for messages in ([task()], [task(), task()]):
                with pytest.raises(PublishError, match=r"blocks publishers .*low on memory"):
                    publish_until_refused(impatient, messages)
            # Others wait, and go on when the alarm is over.
            done = threading.Event()
            waiting = threading.Thread(target=lambda: (publisher.publish([task("other")]), done.set()))
            waiting.start()
            assert not done.wait(0.3)
        finally:
            rabbitmq.unblock_publishers()
        waiting.join(5)
        assert done.is_set()
        impatient.publish([task()])


def test_a_restarted_broker_is_found_again(publisher: AmqpPublisher, rabbitmq: RabbitMQ) -> None:
    publisher.publish([task()])
    rabbitmq.restart()
    publisher.publish([task()])
    assert publisher.depth("q") == 2


class Scripted:
    """A server that answers whatever it reads with what it was told, then hangs up or keeps still."""

    def __init__(self, *answers: bytes, hangs_up: bool = True) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"amqp://127.0.0.1:{self._listener.getsockname()[1]}//"
        self._answers, self._hangs_up = answers, hangs_up
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    for answer in self._answers:
                        client.recv(65536)
                        client.sendall(answer)
                    if not self._hangs_up:
                        self._stopped.wait(10)

    def close(self) -> None:
        self._stopped.set()
        # A connection of our own ends accept(), closing the socket alone does not.
        with contextlib.suppress(OSError), socket.create_connection(self._listener.getsockname()):
            self._listener.close()
        self._listener.close()


START = frame(
    "connection.start",
    version_minor=9,
    mechanisms=b"PLAIN",
    locales=b"en_US",
    server_properties={"product": "scripted"},
)
TUNE = frame("connection.tune", channel_max=10, frame_max=131072, heartbeat=0)


@pytest.mark.parametrize(
    ("answers", "kind", "problem"),
    [
        ((), ConnectionLost, "closed the connection during the handshake"),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), SettingsError, "does not speak AMQP 0-9-1"),
        ((b"AMQP\x03\x01\x00\x00",), SettingsError, "does not speak AMQP 0-9-1"),
        ((b"\x01\0\0\xff\xff\xff\xff",), SettingsError, "does not speak AMQP 0-9-1"),
        ((START[:-1] + b"\0",), SettingsError, "does not speak AMQP 0-9-1"),
        ((START, b""), ConnectionLost, "closed the connection during the handshake"),
        ((START, frame("connection.secure", challenge=b"?")), SettingsError, "login in several steps"),
        ((START, frame("connection.tune", frame_max=100)), FastqError, "frames of 100 bytes"),
        ((START, frame("connection.close", reply_code=320, reply_text="bye")), ConnectionLost, "shutting down"),
        ((START, frame("queue.declare-ok")), FastqError, "during the handshake"),
        ((frame("connection.start", version_minor=8, mechanisms=b"PLAIN"),), FastqError, "AMQP 0-8"),
    ],
)
def test_servers_that_are_no_rabbitmq_are_told_apart(
    answers: tuple[bytes, ...], kind: type[FastqError], problem: str
) -> None:
    with contextlib.closing(Scripted(*answers)) as server:
        error = refused(server.url)
        assert isinstance(error, kind)
        assert problem in str(error)
        with pytest.raises(kind, match=problem):
            run(AmqpConsumer(server.url, settings(server.url)).open)


def test_a_server_that_says_nothing_ends_in_an_error_on_time() -> None:
    with contextlib.closing(Scripted(hangs_up=False)) as server:
        started = time.monotonic()
        error = refused(server.url, broker_connection_timeout=0.4)
        assert isinstance(error, ConnectionLost)
        with pytest.raises(ConnectionLost):
            run(AmqpConsumer(server.url, settings(server.url, broker_connection_timeout=0.4)).open)
        assert time.monotonic() - started < 3


def test_a_hostile_start_method_is_an_error() -> None:
    nested = encode_table({})
    for _ in range(1000):
        nested = (len(nested) + 3).to_bytes(4, "big") + b"\x01nF" + nested
    payload = (0x000A000A).to_bytes(4, "big") + b"\0\x09" + nested + b"\0\0\0\x05PLAIN" + b"\0\0\0\x05en_US"
    raw = b"\x01\0\0" + len(payload).to_bytes(4, "big") + payload + b"\xce"
    with contextlib.closing(Scripted(raw)) as server:
        assert "32 deep" in str(refused(server.url))


# --- consuming


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine on uvloop, as the worker does."""

    async def main() -> Any:
        return await asyncio.wait_for(work(), 60)

    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


class Received:
    """A consumer without a core: deliveries arrive here as (tag, properties, body)."""

    def __init__(self, url: str, **values: Any) -> None:
        self.consumer = AmqpConsumer(url, settings(url, **values))
        self.messages: list[tuple[int, bytes, bytes]] = []

    async def __aenter__(self) -> Received:
        await self.consumer.open()
        on_method = self.consumer.source.on_method
        assert on_method is not None

        def take(channel: int, method_id: int, arguments: Any) -> None:
            if method_id == BASIC_DELIVER:
                self.messages.append(arguments)
            else:
                on_method(channel, method_id, arguments)

        self.consumer.source.on_method = take
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.consumer.close()

    async def until(self, count: int) -> None:
        """Wait until so many messages are here, and a moment for those that should not come."""
        for _ in range(500):
            if len(self.messages) >= count:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(self.messages) == count


def until(is_true: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_prefetch_limit_holds_for_each_queue(amqp_url: str) -> None:
    queues = ["a", {"name": "b", "queue_type": "quorum"}]

    async def work() -> None:
        publisher = AmqpPublisher(amqp_url, settings(amqp_url, task_queues=queues))
        with contextlib.closing(publisher):
            publisher.publish([task(queue) for queue in ("a", "b") for _ in range(10)])
        async with Received(amqp_url, task_queues=queues) as received:
            await received.consumer.consume(["a", "b", "a"], 3)
            await received.until(6)

    run(work)


def test_without_a_limit_everything_comes(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.publish([task() for _ in range(500)])

    async def work() -> None:
        async with Received(amqp_url) as received:
            await received.consumer.consume(["q"], 0)
            await received.until(500)

    run(work)


def test_a_new_limit_counts_from_zero(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.publish([task() for _ in range(20)])

    async def work() -> None:
        async with Received(amqp_url) as received:
            await received.consumer.consume(["q"], 3)
            await received.until(3)
            await received.consumer.set_prefetch(5)
            await received.until(8)

    run(work)


def test_a_queue_that_is_deleted_is_declared_and_consumed_again(
    amqp_url: str, publisher: AmqpPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with Received(amqp_url) as received:
            await received.consumer.consume(["q", "r"], 10)
            admin(publisher, "queue.delete", queue="q")
            await asyncio.sleep(0.3)
            publisher.publish([task("q"), task("r")])
            await received.until(2)
            assert not received.consumer.lost.done()

    run(work)
    assert "cancelled the consumer of 'q'" in caplog.text


def test_an_unknown_queue_that_may_not_be_created_is_an_error(amqp_url: str) -> None:
    async def work() -> None:
        async with Received(amqp_url, task_create_missing_queues=False) as received:
            await received.consumer.consume(["celery"], 1)
            with pytest.raises(SettingsError, match="no queue 'nowhere'"):
                await received.consumer.consume(["nowhere"], 1)

    run(work)


def test_a_queue_with_other_arguments_stops_the_consumer(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.declare("q")

    async def work() -> None:
        async with Received(amqp_url, task_default_queue_type="quorum") as received:
            with pytest.raises(SettingsError, match="inequivalent arg 'x-queue-type'"):
                await received.consumer.consume(["q"], 1)

    run(work)


def test_follow_ups_are_published_on_the_other_connection(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.declare("q")

    async def work() -> None:
        async with Received(amqp_url) as received:
            received.consumer.outlet.publish([(number, task()) for number in range(50)])
            for _ in range(500):
                if publisher.depth("q") == 50:
                    break
                await asyncio.sleep(0.01)

    run(work)
    assert publisher.depth("q") == 50


def test_a_closed_connection_is_reported(amqp_url: str, rabbitmq: RabbitMQ) -> None:
    async def work() -> None:
        async with Received(amqp_url) as received:
            await received.consumer.consume(["q"], 1)
            await asyncio.to_thread(rabbitmq.close_connections, "maintenance")
            error = await asyncio.wait_for(received.consumer.lost, 5)
            assert isinstance(error, ConnectionLost)
            assert "maintenance" in str(error)
            with pytest.raises(ConnectionLost):
                await received.consumer.set_prefetch(2)

    run(work)


@pytest.mark.parametrize("fault", ["stall", "half_open", "cut"])
def test_a_dead_connection_is_noticed_within_two_heartbeats(
    fault: str, amqp_url: str, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)

    async def work() -> None:
        async with Received(proxy.url(amqp_url), broker_heartbeat=1.0) as received:
            await received.consumer.consume(["q"], 1)
            if fault == "stall":
                # Heartbeats keep an idle connection alive.
                await asyncio.sleep(3)
                assert not received.consumer.lost.done()
            started = time.monotonic()
            await asyncio.to_thread(getattr(proxy, fault))
            error = await asyncio.wait_for(received.consumer.lost, 5)
            assert isinstance(error, ConnectionLost)
            assert time.monotonic() - started < 3

    run(work)


def test_a_pause_of_this_process_is_not_taken_for_silence_of_the_broker(amqp_url: str) -> None:
    async def work() -> None:
        async with Received(amqp_url, broker_heartbeat=1.0) as received:
            await asyncio.sleep(0.1)
            connection, loop = received.consumer._consuming, asyncio.get_running_loop()
            # As after SIGSTOP: nothing was read for long, and the timer comes late. The bytes still wait in the socket.
            connection._heartbeat_s = 0.01
            connection._beat(loop.time() - 60)
            assert not received.consumer.lost.done()
            # The same silence while the timer is on time.
            connection._beat(loop.time())
            assert "was silent" in str(await asyncio.wait_for(received.consumer.lost, 1))

    run(work)


def test_a_blocked_connection_is_logged(
    amqp_url: str, publisher: AmqpPublisher, rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.declare("q")

    async def work() -> None:
        async with Received(amqp_url) as received:
            await received.consumer.consume(["q"], 0)
            await asyncio.to_thread(rabbitmq.block_publishers)
            published = 0
            try:
                # The alarm reaches the connection a moment after it was raised.
                while "blocks publishers" not in caplog.text and published < 500:
                    received.consumer.outlet.publish([(published, task())])
                    published += 1
                    await asyncio.sleep(0.01)
            finally:
                await asyncio.to_thread(rabbitmq.unblock_publishers)
            for _ in range(500):
                if "takes messages again" in caplog.text:
                    break
                await asyncio.sleep(0.01)
            assert "low on memory" in caplog.text
            assert "takes messages again" in caplog.text
            await received.until(published)

    run(work)


def test_the_consumer_takes_the_first_broker_that_answers(amqp_url: str, publisher: AmqpPublisher) -> None:
    publisher.publish([task()])

    async def work() -> None:
        async with Received(f"amqp://127.0.0.1:{free_ports(1)}//;{amqp_url}") as received:
            await received.consumer.consume(["q"], 1)
            await received.until(1)

    run(work)


def test_the_consumer_reports_refusals_as_settings(rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture) -> None:
    for url, problem in (
        (f"amqp://guest:sesame@127.0.0.1:{rabbitmq.port}//", "password in broker_url"),
        (rabbitmq.url("nowhere"), "add_vhost nowhere"),
        (f"{rabbitmq.url()}?auth_mechanism=external", "EXTERNAL"),
    ):
        with pytest.raises(SettingsError, match=problem) as caught:
            run(AmqpConsumer(url, settings(url)).open)
        assert "sesame" not in str(caught.value)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_consumer_reports_a_broker_that_is_down() -> None:
    url = f"amqp://u:sesame@127.0.0.1:{free_ports(1)}//"
    with pytest.raises(ConnectionLost, match=r"cannot connect .*Is it running"):
        run(AmqpConsumer(url, settings(url)).open)
