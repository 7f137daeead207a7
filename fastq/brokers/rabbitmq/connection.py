"""One AMQP connection over a plain blocking socket, for one thread at a time. What is sent over it is not decided here.

Every wait has a deadline. Heartbeats are off (nobody could send them while the program does something else): dead
peers are found by TCP keepalive and TCP_USER_TIMEOUT.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from fastq.brokers.rabbitmq.handshake import Handshake, closed_early, frame
from fastq.brokers.rabbitmq.refusal import refusal
from fastq.brokers.rabbitmq.tcp import connect_socket, lost
from fastq.brokers.rabbitmq.url import AmqpUrl, Endpoints
from fastq.errors import ConnectionLost, RemoteProtocolError, SettingsError
from fastq.net.tcp import avoid, none_reachable, peer_of
from fastq.queues import QueueSpec
from fastq.wire.amqp import METHODS, decode_method
from fastq.wire.frames import PROTOCOL_HEADER, FrameReader

if TYPE_CHECKING:
    from fastq.settings import Settings

FRAME_METHOD, FRAME_HEADER, FRAME_BODY = 1, 2, 3
CONTENT_METHODS = (METHODS["basic.deliver"], METHODS["basic.return"], METHODS["basic.get-ok"])
ADMIN_CHANNEL = 2  # for what may fail: its errors close this channel and leave the working one alone
RECEIVE_BYTES = 65536
MAX_REFRESH = 64  # reads; a peer that never stops sending must not hold us
MAX_WAIT_S = 3600.0  # of one system call, which takes milliseconds as a C int


class Event(NamedTuple):
    """A method that arrived, with its content if it has one."""

    channel: int
    method_id: int
    arguments: bytes
    props: bytes = b""
    body: bytes = b""


class BlockingConnection:
    """An open connection. ``send`` and ``recv`` are the socket's own, for hot paths; their time-out is an OSError."""

    def __init__(
        self, url: AmqpUrl, name: str, connect_timeout_s: float, io_timeout_s: float, max_message_bytes: int
    ) -> None:
        """Connect and log in. Raises ConnectionLost, or SettingsError where trying again cannot help."""
        self.url = url
        self.blocked: str | None = None
        self.frame_max = 0
        self.used_at = 0.0
        self.declared: set[str] = set()
        self.published = 0
        self._io_timeout_s = max(io_timeout_s, 0.001)  # 0 would mean for ever
        self._max_message_bytes = max_message_bytes
        self._is_open = False
        self._inbox: deque[Event] = deque()
        self._content: Event | None = None  # the method whose content is arriving
        self._props = b""
        self._parts: list[bytes] = []
        self._parts_left = 0
        self._open_channels: set[int] = set()
        self._reader = FrameReader()
        self._poll = select.poll()
        deadline = time.monotonic() + connect_timeout_s
        self.sock = connect_socket(url, deadline)
        self.send, self.recv = self.sock.send, self.sock.recv
        self._poll.register(self.sock, select.POLLIN)
        try:
            self._set_timeouts()
            self._shake_hands(name, deadline)
        except BaseException:
            self.sock.close()
            raise

    @property
    def io_timeout_s(self) -> float:
        """How long single calls may take."""
        return self._io_timeout_s

    def limit(self, io_timeout_s: float) -> None:
        """Have single calls take at most so long from now on; a few per cent are let pass."""
        if abs(io_timeout_s - self._io_timeout_s) > 0.05 * self._io_timeout_s:
            self._io_timeout_s = max(io_timeout_s, 0.1)
            self._set_timeouts()

    def _set_timeouts(self) -> None:
        """Set the deadline of single calls once, in the kernel, so that the hot path needs no settimeout."""
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(self._io_timeout_s)
            return
        self.sock.settimeout(None)
        span = struct.pack("ll", int(self._io_timeout_s), int(self._io_timeout_s % 1 * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)

    def _shake_hands(self, name: str, deadline: float) -> None:
        handshake = Handshake(self.url, 0, name)
        self.transmit(PROTOCOL_HEADER)
        while not handshake.is_open:
            try:
                event = self.next_event(deadline)
            except ConnectionLost:
                raise closed_early(self.url) from None
            except RemoteProtocolError as error:
                raise SettingsError(f"{self.url} does not speak AMQP 0-9-1: {error}") from None
            if event is None:
                avoid(peer_of(self.sock))
                raise ConnectionLost(f"{self.url} did not finish the handshake within broker_connection_timeout")
            if reply := handshake.answer(event.method_id, event.arguments):
                self.transmit(reply)
        self.frame_max = handshake.frame_max
        self._reader.set_limit(handshake.frame_max)
        self._is_open = True

    # --- bytes

    def transmit(self, data: bytes) -> None:
        """Send all bytes. Raises ConnectionLost, also when the peer takes none of them for longer than the time-out."""
        try:
            sent = self.send(data)
            rest = memoryview(data)[sent:]
            while rest:
                rest = rest[self.send(rest) :]
        except (OSError, ValueError) as error:
            raise lost(self.url, error, "sending") from None

    def receive(self, timeout_s: float) -> bytes:
        """Return what the socket has, b"" when nothing came in time. Raises ConnectionLost."""
        timeout_s = min(max(timeout_s, 0), MAX_WAIT_S)
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                data = self._receive_tls(self.sock, timeout_s)
            elif self._poll.poll(timeout_s * 1000):
                data = self.recv(RECEIVE_BYTES)
            else:
                return b""
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return b""
        except (OSError, ValueError) as error:
            raise lost(self.url, error, "receiving") from None
        if not data:
            raise ConnectionLost(f"RabbitMQ at {self.url} closed the connection")
        return data

    def _receive_tls(self, sock: ssl.SSLSocket, timeout_s: float) -> bytes:
        # A readable socket does not mean that data has come, it may be TLS's own: so the wait is inside the read.
        sock.settimeout(timeout_s)
        try:
            return sock.recv(RECEIVE_BYTES)
        finally:
            sock.settimeout(self._io_timeout_s)

    # --- methods

    def feed(self, data: bytes) -> None:
        """Take received bytes; whole methods go to the inbox.

        Raises RemoteProtocolError, and what a connection.close means.
        """
        for kind, channel, payload in self._reader.feed(data):
            if kind == FRAME_METHOD:
                self._on_method(channel, payload)
            elif kind == FRAME_HEADER:
                self._on_header(channel, payload)
            elif kind == FRAME_BODY:
                self._on_body(channel, payload)

    def _on_method(self, channel: int, payload: bytes) -> None:
        if len(payload) < 4:
            raise RemoteProtocolError(f"method frame of {len(payload)} bytes from {self.url}")
        event = Event(channel, int.from_bytes(payload[:4], "big"), payload[4:])
        if event.method_id in CONTENT_METHODS:
            self._content = event
        elif channel == 0 and self._is_open:
            self._on_connection_method(event)
        else:
            self._inbox.append(event)

    def _on_connection_method(self, event: Event) -> None:
        name, fields = decode_method(event.method_id, event.arguments)
        if name == "connection.blocked":
            self.blocked = str(fields["reason"])
        elif name == "connection.unblocked":
            self.blocked = None
        elif name == "connection.close":
            with contextlib.suppress(ConnectionLost):
                self.transmit(frame("connection.close-ok"))
            raise refusal(self.url, fields)

    def _on_header(self, channel: int, payload: bytes) -> None:
        if self._content is None or self._content.channel != channel or len(payload) < 14:
            raise RemoteProtocolError(f"content header without its method from {self.url}")
        self._props, self._parts = payload[12:], []
        self._parts_left = int.from_bytes(payload[4:12], "big")
        if self._parts_left > self._max_message_bytes:
            raise RemoteProtocolError(
                f"a message of {self._parts_left} bytes is over fastq_max_message_bytes ({self._max_message_bytes})"
            )
        self._finish_content()

    def _on_body(self, channel: int, payload: bytes) -> None:
        if self._content is None or self._content.channel != channel or len(payload) > self._parts_left:
            raise RemoteProtocolError(f"body frame that no header announced from {self.url}")
        self._parts.append(payload)
        self._parts_left -= len(payload)
        self._finish_content()

    def _finish_content(self) -> None:
        if self._parts_left == 0 and self._content is not None:
            channel, method_id, arguments, _, _ = self._content
            self._inbox.append(Event(channel, method_id, arguments, self._props, b"".join(self._parts)))
            self._content = None

    def next_event(self, deadline: float) -> Event | None:
        """Return the next method, None at the deadline. Raises ConnectionLost, or what a connection.close means."""
        while not self._inbox:
            left_s = deadline - time.monotonic()
            if data := self.receive(left_s):
                self.feed(data)
            if left_s <= 0 and not self._inbox:
                return None
        return self._inbox.popleft()

    def take_events(self) -> list[Event]:
        """Return the methods that have been read, without waiting."""
        events = list(self._inbox)
        self._inbox.clear()
        return events

    def rpc(self, channel: int, method: str, /, **fields: Any) -> dict[str, Any]:
        """Send a method and return the fields of its ``-ok`` answer; what else comes meanwhile stays in the inbox.

        Raises what a channel.close means, ConnectionLost when no answer comes in time.
        """
        if channel not in self._open_channels and method != "channel.open":
            self.open_channel(channel)
        deadline = time.monotonic() + self._io_timeout_s
        self.transmit(frame(method, channel, **fields))
        others: list[Event] = []
        try:
            while time.monotonic() < deadline and (event := self.next_event(deadline)):
                if event.channel == channel and event.method_id == METHODS[f"{method}-ok"]:
                    return decode_method(event.method_id, event.arguments)[1]
                self.check_channel(event)
                others.append(event)
        finally:
            self._inbox.extendleft(reversed(others))
        raise ConnectionLost(f"RabbitMQ at {self.url} did not answer {method} within {self._io_timeout_s:g} s")

    def open_channel(self, channel: int) -> None:
        """Open a channel; ``rpc`` does so by itself."""
        self.rpc(channel, "channel.open")
        self._open_channels.add(channel)

    def check_channel(self, event: Event) -> None:
        """Raise what a channel.close means; other methods pass."""
        if event.method_id != METHODS["channel.close"]:
            return
        self._open_channels.discard(event.channel)
        with contextlib.suppress(ConnectionLost):
            self.transmit(frame("channel.close-ok", event.channel))
        raise refusal(self.url, decode_method(event.method_id, event.arguments)[1])

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed nor sent what nobody has read; one system call."""
        return not self._inbox and not self._poll.poll(0)

    def has_news(self) -> bool:
        """Whether there is something to read, or the peer has hung up. Any thread may ask, whoever reads."""
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLIN)
        except ValueError:  # closed by another thread
            return True
        return bool(poll.poll(0))

    def refresh(self) -> None:
        """Take in what came while nobody read, such as a close of the broker. Raises ConnectionLost."""
        for _ in range(MAX_REFRESH):
            if not (data := self.receive(0)):
                return
            self.feed(data)

    def drain(self) -> list[Event]:
        """Return the methods that have come; what is left makes the socket readable. Never waits.

        Raises ConnectionLost.
        """
        if isinstance(self.sock, ssl.SSLSocket):
            self.refresh()  # TLS holds bytes back that no poll tells of
            return self.take_events()
        try:
            data = self.sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self.take_events()
        except (OSError, ValueError) as error:
            raise lost(self.url, error, "receiving") from None
        if not data:
            raise ConnectionLost(f"RabbitMQ at {self.url} closed the connection")
        self.feed(data)
        return self.take_events()

    def wait_unblocked(self, timeout_s: float | None = None) -> bool:
        """Return whether the broker takes messages (again) in time, by default in that of a single call."""
        deadline = time.monotonic() + (self._io_timeout_s if timeout_s is None else timeout_s)
        while self.blocked is not None and (left := deadline - time.monotonic()) > 0:
            if data := self.receive(left):
                self.feed(data)
        return self.blocked is None

    def declare(self, spec: QueueSpec) -> None:
        """Create a queue and its binding if they are missing."""
        for method, fields in spec.steps():
            self.rpc(ADMIN_CHANNEL, method, **fields)
        self.declared.add(spec.name)

    def close(self) -> None:
        """Say goodbye and close; never waits, never raises."""
        with contextlib.suppress(OSError, ValueError):
            self.sock.settimeout(0)
            self.sock.send(frame("connection.close", reply_code=200, reply_text="bye"))
        self.sock.close()

    def interrupt(self) -> None:
        """End the connection for another thread that waits in ``receive``: it gets ConnectionLost."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close this process's copy of the socket after a fork; the parent's connection goes on."""
        self.sock.close()


def connect_any(
    endpoints: Endpoints, settings: Settings, purpose: str, io_timeout_s: float, deadline: float | None = None
) -> BlockingConnection:
    """Return a connection to the first broker that takes one, by the deadline (monotonic) if there is one.

    Raises the only error, or one that names them all.
    """
    failures: list[ConnectionLost] = []
    name = f"fastq {purpose} {os.getpid()}@{socket.gethostname()}"
    connect_timeout_s, max_bytes = settings.broker_connection_timeout, settings.fastq_max_message_bytes
    for url in endpoints:
        try:
            if deadline is not None:
                connect_timeout_s = min(connect_timeout_s, max(deadline - time.monotonic(), 0.1))
            return BlockingConnection(url, name, connect_timeout_s, io_timeout_s, max_bytes)
        except ConnectionLost as error:
            failures.append(error)
    raise none_reachable(failures)
