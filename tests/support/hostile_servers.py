"""Brokers that mean harm.

``HostileBroker`` speaks as much AMQP as a worker needs to start consuming, then sends what it is told. ``HostileRedis``
stands before a real Redis and spoils its replies.

Blocking sockets, a thread for each connection. Every rule it keeps it keeps by ``fastq.wire``; what it breaks, the test
has spelled out in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastq.wire.amqp import METHODS, decode_method, encode_method
from fastq.wire.frames import PROTOCOL_HEADER, FrameReader, method_frame
from tests.support.fault_proxy import Direction, FaultProxy

FRAME_METHOD, FRAME_HEADER, FRAME_BODY = 1, 2, 3
TIMEOUT_S = 20.0

#: Answers to what a client asks for, beside "<method>-ok" without fields.
ANSWERS: dict[str, dict[str, Any]] = {
    "queue.declare": {"queue": "celery", "message_count": 0, "consumer_count": 0},
    "basic.consume": {"consumer_tag": "tag"},
    "basic.cancel": {"consumer_tag": "tag"},
}
START = {
    "version_major": 0,
    "version_minor": 9,
    "server_properties": {"product": "RabbitMQ", "capabilities": {"publisher_confirms": True}},
    "mechanisms": b"PLAIN",
    "locales": b"en_US",
}
TUNE = {"channel_max": 2047, "frame_max": 131072, "heartbeat": 0}


def frame(kind: int, channel: int, payload: bytes, size: int | None = None, end: int = 0xCE) -> bytes:
    """Return a frame; ``size`` and ``end`` are what it claims instead of the truth."""
    return struct.pack(">BHI", kind, channel, len(payload) if size is None else size) + payload + bytes([end])


def method(name: str, channel: int = 0, /, **fields: Any) -> bytes:
    """Return a method as a frame."""
    return method_frame(channel, METHODS[name], encode_method(METHODS[name], **fields))


def deliver(props: bytes, body: bytes, tag: int = 1, body_size: int | None = None) -> bytes:
    """Return a delivery on channel 1; ``body_size`` is what its header claims instead of the truth."""
    size = len(body) if body_size is None else body_size
    header = struct.pack(">HHQ", 60, 0, size & 0xFFFFFFFFFFFFFFFF) + props
    where = {"consumer_tag": "tag", "delivery_tag": tag, "redelivered": False, "exchange": "", "routing_key": "celery"}
    content = frame(FRAME_HEADER, 1, header) + (frame(FRAME_BODY, 1, body) if body else b"")
    return method("basic.deliver", 1, **where) + content


@dataclass
class HostileBroker:
    """Listens on ``port``. ``attacks`` has the bytes for each subscription to tasks in turn, sent once it stands.

    A connection is served until the client closes it. ``replies`` replaces the answer to a method, by name, once: on
    the connection that brings tasks, or on the next one while it is not known yet which that will be.
    """

    attacks: list[bytes] = field(default_factory=list)
    replies: dict[str, bytes] = field(default_factory=dict)
    port: int = 0
    subscriptions: int = 0
    connections: int = 0
    settled: list[tuple[str, int]] = field(default_factory=list)
    ended: int = 0
    _listener: socket.socket | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> HostileBroker:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._run(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._listener is not None
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def send_all(self, data: bytes) -> None:
        """Send bytes on every connection that stands."""
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.sendall(data)

    def drop_connections(self) -> None:
        """Close every connection without a word."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=function, args=args, name="hostile-broker", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(connection)
            self._run(self._serve, Peer(connection))

    def _serve(self, peer: Peer) -> None:
        with peer.socket, contextlib.suppress(OSError):
            self._talk(peer)
        self.ended += 1

    def _talk(self, peer: Peer) -> None:
        reader = FrameReader()
        if _receive_exactly(peer.socket, 8) != PROTOCOL_HEADER:
            return
        peer.socket.sendall(self._reply(peer, "connection.start", method("connection.start", **START)))
        while data := peer.socket.recv(65536):
            for kind, channel, payload in reader.feed(data):
                if kind == FRAME_METHOD:
                    self._answer(peer, channel, int.from_bytes(payload[:4], "big"), payload[4:])

    def _answer(self, peer: Peer, channel: int, method_id: int, arguments: bytes) -> None:
        name, fields = decode_method(method_id, arguments)
        if name in ("basic.ack", "basic.nack", "basic.reject"):
            self.settled.append((name, fields["delivery_tag"]))
        elif name == "connection.start-ok":
            peer.brings_tasks = fields["client_properties"]["connection_name"].startswith("fastq worker ") and (
                "publisher" not in fields["client_properties"]["connection_name"]
            )
            peer.socket.sendall(self._reply(peer, "connection.tune", method("connection.tune", **TUNE)))
        elif name not in ("connection.tune-ok", "basic.publish", "connection.close-ok", "channel.close-ok"):
            answer = self._reply(peer, name, method(f"{name}-ok", channel, **ANSWERS.get(name, {})))
            if name == "basic.consume" and peer.brings_tasks:
                # In one piece with the answer: the worker has not heard yet that it is subscribed.
                attack = self.attacks[self.subscriptions] if self.subscriptions < len(self.attacks) else b""
                self.subscriptions += 1
                answer += attack
            peer.socket.sendall(answer)

    def _reply(self, peer: Peer, name: str, usual: bytes) -> bytes:
        return self.replies.pop(name, usual) if peer.brings_tasks else usual


@dataclass
class Peer:
    """A connection."""

    socket: socket.socket
    brings_tasks: bool = True  # until it has said what it is for


class HostileRedis(FaultProxy):
    """A proxy before a real Redis. ``spoil`` gets each piece of replies and returns what the client is sent instead."""

    spoil: Callable[[bytes], bytes] | None = None

    def altered(self, direction: Direction, chunk: bytes) -> bytes:
        return self.spoil(chunk) if self.spoil is not None and direction == "to_client" else chunk

    def flood(self, head: bytes, piece: bytes, total: int) -> list[int]:
        """Send a head and then a piece again and again, at most ``total`` bytes, on one connection after the other.

        Returns how many were taken before the client closed it.
        """
        return asyncio.run_coroutine_threadsafe(self._flood(head, piece, total), self._loop).result(60)

    async def _flood(self, head: bytes, piece: bytes, total: int) -> list[int]:
        taken = []
        for pair in list(self._pairs):
            sent = 0
            with contextlib.suppress(OSError, RuntimeError):  # closed meanwhile, by either side
                pair.client.write(head)
                while sent < total and not pair.client.is_closing():
                    pair.client.write(piece)
                    await pair.client.drain()
                    sent += len(piece)
            taken.append(sent)
        return taken


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (chunk := connection.recv(size - len(data))):
        data += chunk
    return data
