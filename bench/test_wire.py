"""Micro-benchmarks of the codecs: what one message costs, beside librabbitmq and py-amqp on the same bytes.

`pytest bench`. Each round handles MESSAGES messages unless its name says "one". Compare lines of one run, not of two.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq import FastQ
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.wire import amqp
from fastq.wire.frames import FrameReader, publish_frames
from fastq.wire.head import scan
from fastq.wire.message import Message, encode_task
from fastq.wire.pipe import SHARED_SIZE, ChildPipe, RingReader, call_record
from tests.support.recording import RecordingPublisher

Benchmark = Callable[..., Any]

MESSAGES = 100
TASK_ID = "7c0f6e0e-1c1c-4d6c-8b57-0a8a5b3f2a11"
BODY = b'[[1],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'


@pytest.fixture(scope="module")
def message() -> Message:
    """A no-op task's message."""
    return encode_task("bench.noop", TASK_ID, BODY, argsrepr="(1,)", origin="gen12345@benchmark")


@pytest.fixture(scope="module")
def deliveries(message: Message) -> bytes:
    """The bytes with which a broker delivers MESSAGES such messages: method, header and body frame each."""
    content = b"".join(encode_frame(kind, payload) for kind, _, payload in contents(message))
    stream = []
    for tag in range(1, MESSAGES + 1):
        arguments = amqp.encode_method(
            amqp.METHODS["basic.deliver"],
            consumer_tag="ctag1",
            delivery_tag=tag,
            redelivered=False,
            exchange="",
            routing_key="celery",
        )
        stream += [encode_frame(1, struct.pack(">I", amqp.METHODS["basic.deliver"]) + arguments), content]
    return b"".join(stream)


def contents(message: Message) -> list[tuple[int, int, bytes]]:
    """Return the header and body frames of a message, without its method."""
    return FrameReader().feed(publish_frames(1, message))[1:]


def encode_frame(kind: int, payload: bytes) -> bytes:
    """Return one frame on channel 1."""
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def test_scan_delivery_frames_in_place(benchmark: Benchmark, deliveries: bytes) -> None:
    """What a RabbitMQ connection does with what it reads, up to the finished delivery."""
    link = AmqpLink(None)
    taken = 0

    def take(channel: int, method: int, arguments: object) -> None:
        nonlocal taken
        taken += 1

    link.on_method = take

    def receive() -> None:
        buffer = link.get_buffer(-1)
        buffer[: len(deliveries)] = deliveries
        link.buffer_updated(len(deliveries))

    benchmark(receive)
    assert taken > 0
    assert taken % MESSAGES == 0


def test_split_into_frames(benchmark: Benchmark, deliveries: bytes) -> None:
    """The same bytes through the reader of the cold paths, which makes a tuple of every frame."""
    reader = FrameReader()
    assert len(benchmark(reader.feed, deliveries)) == 3 * MESSAGES


def test_decode_one_header_by_scan(benchmark: Benchmark, message: Message) -> None:
    assert benchmark(scan, message.props)["id"] == TASK_ID


def test_decode_one_header_by_librabbitmq(benchmark: Benchmark, message: Message) -> None:
    assert benchmark(amqp.decode_properties, message.props)["headers"]["id"] == TASK_ID


def test_decode_one_header_by_py_amqp(benchmark: Benchmark, message: Message) -> None:
    basic_message = pytest.importorskip("amqp.basic_message", reason="py-amqp comes with the extra bench")

    def decode() -> Any:
        decoded = basic_message.Message()
        decoded._load_properties(60, message.props, 0)
        return decoded.headers

    assert benchmark(decode)["id"] == TASK_ID


def test_encode_one_task(benchmark: Benchmark) -> None:
    """Headers and properties of one message from its fields."""
    encoded = benchmark(encode_task, "bench.noop", TASK_ID, BODY, argsrepr="(1,)", origin="gen12345@benchmark")
    assert scan(encoded.props)["id"] == TASK_ID


def test_encode_one_header_by_librabbitmq(benchmark: Benchmark, message: Message) -> None:
    properties = amqp.decode_properties(message.props)
    assert benchmark(amqp.encode_properties, properties) == message.props


def test_encode_one_header_by_py_amqp(benchmark: Benchmark, message: Message) -> None:
    basic_message = pytest.importorskip("amqp.basic_message", reason="py-amqp comes with the extra bench")
    properties = amqp.decode_properties(message.props)
    headers = properties.pop("headers")

    def encode() -> Any:
        return basic_message.Message(BODY, application_headers=headers, **properties)._serialize_properties()

    assert len(benchmark(encode)) > 300


def test_encode_one_publish(benchmark: Benchmark, message: Message) -> None:
    """The three frames of basic.publish."""
    assert benchmark(publish_frames, 1, message).endswith(b"\xce")


def test_delay_one_task(benchmark: Benchmark) -> None:
    """delay() up to the publisher: everything but the broker."""
    app = FastQ("bench", broker="memory://", backend="disabled")
    publisher = RecordingPublisher()
    app.publisher = publisher

    @app.task
    def noop(number: int) -> int:
        return number

    benchmark(noop.delay, 1)
    assert amqp.decode_properties(publisher.messages[0].props)["headers"]["task"].endswith("noop")


@pytest.fixture
def pipe() -> Iterator[tuple[socket.socket, ChildPipe, RingReader]]:
    """Both ends of the pipe between main process and child, in one process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    shared = os.memfd_create("bench")
    try:
        os.ftruncate(shared, SHARED_SIZE)
        yield ours, ChildPipe(theirs.fileno(), shared), RingReader(shared)
    finally:
        ours.close()
        theirs.close()
        os.close(shared)


def test_hand_calls_over_and_take_outcomes_back(
    benchmark: Benchmark, message: Message, pipe: tuple[socket.socket, ChildPipe, RingReader]
) -> None:
    """The pipe without a task and without a second process: write, read, finish, collect."""
    ours, child, ring = pipe
    sequence = 0

    def hand_over() -> int:
        nonlocal sequence
        records = []
        for _ in range(MESSAGES):
            sequence += 1
            records.append(call_record(sequence, "", "celery", message.props, message.body))
        ours.sendall(b"".join(records))
        for _ in range(MESSAGES):
            call = child.next()
            assert call is not None
            child.finish(call, 0)
        taken = 0
        while ring.take() is not None:
            taken += 1
        ours.setblocking(False)
        while bell(ours):
            pass
        ours.setblocking(True)
        return taken

    assert benchmark(hand_over) >= MESSAGES


def bell(connection: socket.socket) -> bool:
    """Take what a child wrote to wake its parent; return whether there was anything."""
    try:
        return bool(connection.recv(4096))
    except BlockingIOError:
        return False
