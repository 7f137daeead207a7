"""Frames and the compiled half of an AMQP connection: whole, byte by byte, trailing bytes, and a hostile broker."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.errors import RemoteProtocolError
from fastq.wire.frames import HEARTBEAT, FrameReader, ack_frame, method_frame, publish_frames
from fastq.wire.message import Message, encode_task

DELIVER = 0x003C003C
MESSAGE = encode_task("tasks.add", "id-1", b"[[1],{},{}]")


def frame(kind: int, channel: int, payload: bytes, end: int = 0xCE) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + bytes([end])


def deliver_frames(
    tag: int, props: bytes = MESSAGE.props, body: bytes = MESSAGE.body, frame_max: int = 131072
) -> bytes:
    """basic.deliver, header and body as a broker sends them."""
    arguments = b"\x02ct" + struct.pack(">QB", tag, 0) + b"\x00" + b"\x06celery"
    parts = [body[at : at + frame_max - 8] for at in range(0, len(body), frame_max - 8)]
    return (
        frame(1, 1, struct.pack(">I", DELIVER) + arguments)
        + frame(2, 1, struct.pack(">HHQ", 60, 0, len(body)) + props)
        + b"".join(frame(3, 1, part) for part in parts)
    )


class Transport:
    """Stands in for a socket transport: keeps what is written. The link under test is the real one."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        self.is_aborted = True


class Peer:
    """A link without a core: everything it understands comes out as methods."""

    def __init__(self) -> None:
        self.link = AmqpLink()
        self.transport = Transport()
        self.methods: list[tuple[int, int, Any]] = []
        self.lost: list[Exception | None] = []
        self.link.on_method = lambda *method: self.methods.append(method)
        self.link.on_lost = self.lost.append
        self.link.connection_made(self.transport)

    def feed(self, data: bytes) -> None:
        while data and not self.transport.is_aborted:
            view = self.link.get_buffer(-1)
            size = min(len(view), len(data))
            view[:size] = data[:size]
            data = data[size:]
            self.link.buffer_updated(size)

    @property
    def bodies(self) -> list[bytes]:
        return [content[2] for _, method, content in self.methods if method == DELIVER]


def test_frames_are_read_whole_byte_by_byte_and_with_trailing_bytes() -> None:
    data = publish_frames(3, MESSAGE) + HEARTBEAT + method_frame(1, 0x000A000B, b"arguments")
    whole = FrameReader().feed(data)
    assert [kind for kind, _, _ in whole] == [1, 2, 3, 8, 1]
    reader = FrameReader()
    assert [each for byte in data for each in reader.feed(bytes([byte]))] == whole
    reader = FrameReader()
    assert reader.feed(data + data[:9]) == whole
    assert reader.feed(data[9:]) == whole


@pytest.mark.parametrize(
    "data", [frame(1, 0, b"x" * 200), struct.pack(">BHI", 1, 0, 0xFFFFFFFF), frame(1, 0, b"", end=0)]
)
def test_a_false_size_or_end_byte_is_refused_before_more_is_awaited(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        FrameReader(frame_max=128).feed(data)


def test_a_body_is_cut_into_frames_of_the_agreed_size() -> None:
    body = bytes(range(256)) * 100
    data = publish_frames(1, Message("", "q", MESSAGE.props, body), frame_max=4096)
    parts = [payload for kind, _, payload in FrameReader(4096).feed(data) if kind == 3]
    assert b"".join(parts) == body
    assert max(map(len, parts)) == 4088


@pytest.mark.parametrize("size", [0, 1, 4088, 4089, 300_000])
def test_deliveries_are_understood_whole_and_byte_by_byte(size: int) -> None:
    body = b"x" * size
    data = b"".join(deliver_frames(tag, body=body, frame_max=4096) for tag in (1, 2))
    whole = Peer()
    whole.feed(data)
    assert whole.bodies == [body, body]
    if size <= 4089:
        slow = Peer()
        for at in range(len(data)):
            slow.feed(data[at : at + 1])
        assert slow.bodies == whole.bodies


def _truncated_deliver(size: int) -> bytes:
    arguments = b"\x02ct" + struct.pack(">QB", 1, 0) + b"\x00" + b"\x06celery"
    return frame(1, 1, struct.pack(">I", DELIVER) + arguments[:size])


@pytest.mark.parametrize(
    "data",
    [
        frame(1, 0, b"x" * 131073),
        struct.pack(">BHI", 1, 0, 0xFFFFFFFF),
        frame(1, 0, b"abc"),
        frame(9, 0, b""),
        frame(1, 0, b"", end=1),
        frame(2, 1, struct.pack(">HHQ", 60, 0, 5) + MESSAGE.props),
        frame(3, 1, b"body"),
        deliver_frames(1)[:30] + frame(1, 1, b"abcd"),
        _truncated_deliver(0),
        *[_truncated_deliver(size) for size in (1, 5, 11, 12, 14, 18)],
        frame(1, 1, struct.pack(">I", DELIVER) + b"\x00" + bytes(9) + b"\x00\x00") + frame(2, 1, b"short"),
        frame(1, 1, struct.pack(">I", DELIVER) + b"\x00" + bytes(9) + b"\x00\x00")
        + frame(2, 1, struct.pack(">HHQ", 60, 0, 2**63) + b"\0\0"),
        frame(1, 1, struct.pack(">I", DELIVER) + b"\x00" + bytes(9) + b"\x00\x00")
        + frame(2, 1, struct.pack(">HHQ", 60, 0, 2) + b"\0\0")
        + frame(3, 1, b"three"),
    ],
)
def test_a_broker_that_breaks_the_protocol_is_left_with_one_clear_error(data: bytes) -> None:
    peer = Peer()
    peer.feed(data)
    [error] = peer.lost
    assert isinstance(error, RemoteProtocolError)
    assert str(error)
    assert peer.transport.is_aborted
    assert not peer.bodies


def test_confirms_of_what_was_never_published_are_refused() -> None:
    peer = Peer()
    peer.link.start_confirms(1)
    peer.feed(ack_frame(1, 5))
    assert isinstance(peer.lost[0], RemoteProtocolError)


def test_what_was_not_confirmed_can_be_taken_back_in_order() -> None:
    peer = Peer()
    peer.link.start_confirms(1)
    messages = [Message("", "q", MESSAGE.props, str(number).encode()) for number in range(5)]
    peer.link.publish([(0, message) for message in messages])
    peer.feed(ack_frame(1, 2, multiple=True) + ack_frame(1, 4))
    assert [message.body for message, _ in peer.link.take_unconfirmed()] == [b"2", b"4"]
    kinds = [kind for data in peer.transport.written for kind, _, _ in FrameReader().feed(data)]
    assert kinds == [1, 2, 3] * 5
