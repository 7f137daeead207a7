"""One connection to RabbitMQ on an event loop: methods and their answers, declaring, heartbeats. No reconnecting.

What passes in mass, deliveries and messages, is ``link.AmqpLink``'s and never comes here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.rabbitmq.handshake import Handshake, closed_early, frame
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.brokers.rabbitmq.notices import Notices
from fastq.brokers.rabbitmq.refusal import refusal
from fastq.brokers.rabbitmq.tcp import unreachable
from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost, FastqError, RemoteProtocolError, SettingsError
from fastq.net.tcp import avoid, connect_first_on, peer_of, tune_socket
from fastq.net.tls import tls_context, tls_failed
from fastq.wire.amqp import METHODS, decode_method
from fastq.wire.frames import HEARTBEAT, PROTOCOL_HEADER

if TYPE_CHECKING:
    from fastq.queues import QueueSpec

CHANNEL: Final = 1  # the first: deliveries and acknowledgements on one connection, publishing on another
ADMIN_CHANNEL: Final = 2  # for declaring: a refusal closes this channel and leaves the other ones alone
CLOSE_TIMEOUT_S: Final = 1.0
RPC_TIMEOUT_S: Final = 10.0  # chosen: a broker that takes longer to answer is as good as gone


class AmqpConnection:
    """One connection on the event loop: methods and their answers, heartbeats. ``lost`` is done when it has ended."""

    def __init__(self, url: AmqpUrl, link: AmqpLink, heartbeat_s: float, purpose: str) -> None:
        self.url = url
        self.link = link
        self.blocked: str | None = None
        self.on_cancelled: Callable[[str], None] = lambda tag: None
        self.is_vital: Callable[[int], bool] = lambda channel: channel == CHANNEL
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Exception] = self._loop.create_future()
        self._opened: asyncio.Future[Exception | None] = self._loop.create_future()
        self._waiting: defaultdict[tuple[int, int], deque[asyncio.Future[dict[str, Any]]]] = defaultdict(deque)
        self._open_channels: set[int] = set()
        self._declaring = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._notices = Notices(url, self._loop)
        self._handshake = Handshake(url, heartbeat_s, f"fastq {purpose} {os.getpid()}@{socket.gethostname()}")
        self._heartbeat_s: float = self._handshake.heartbeat_s
        self._address: Any = None  # that has taken the connection

    async def open(self, timeout_s: float) -> None:
        """Connect and log in. Raises ConnectionLost (try again) or SettingsError (do not)."""
        self.link.on_method = self._on_method
        self.link.on_lost = self._on_lost
        try:
            await asyncio.wait_for(self._connect(), timeout_s)
        except asyncio.TimeoutError:
            avoid(self._address)
            self.link.abort()
            raise unreachable(self.url, TimeoutError()) from None
        except BaseException:
            self.link.abort()
            raise
        self._beat(self._loop.time())

    async def _connect(self) -> None:
        tls = self.url.tls
        try:
            sock = await connect_first_on(self._loop, self.url.host, self.url.port)
        except OSError as error:
            raise unreachable(self.url, error) from None
        self._address = peer_of(sock)
        try:
            transport, _ = await self._loop.create_connection(
                lambda: _protocol(self._loop, self.link),
                sock=sock,
                ssl=tls_context(tls) if tls else None,
                server_hostname=(tls.server_name or self.url.host) if tls else None,
            )
        except OSError as error:
            raise (tls_failed if tls else unreachable)(self.url, error) from None
        tune_transport(transport)
        self.link.write(PROTOCOL_HEADER)
        if (failure := await self._opened) is not None:
            raise failure

    # --- methods

    def send(self, method: str, channel: int, /, **fields: Any) -> None:
        """Send a method that has no answer."""
        self.link.write(frame(method, channel, **fields))

    async def rpc(self, channel: int, method: str, /, **fields: Any) -> dict[str, Any]:
        """Send a method and return the fields of its ``-ok`` answer. Raises ConnectionLost, or what a close means."""
        if channel not in self._open_channels and not method.startswith("channel."):
            await self.open_channel(channel)
        if self.lost.done():
            raise ConnectionLost(str(self.lost.result()))
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._waiting[channel, METHODS[f"{method}-ok"]].append(answer)
        self.send(method, channel, **fields)
        try:
            return await asyncio.wait_for(answer, RPC_TIMEOUT_S)
        except asyncio.TimeoutError:
            error = ConnectionLost(f"RabbitMQ at {self.url} did not answer {method} within {RPC_TIMEOUT_S:g} s")
            self._fail(error)
            raise error from None

    async def open_channel(self, channel: int) -> None:
        """Open a channel; ``rpc`` does so by itself."""
        await self.rpc(channel, "channel.open")
        self._open_channels.add(channel)

    async def close_channel(self, channel: int) -> None:
        """Close a channel that is of no use any more."""
        self._open_channels.discard(channel)
        await self.rpc(channel, "channel.close", reply_code=200, reply_text="bye")

    @property
    def channel_max(self) -> int:
        """How many channels there may be."""
        return self._handshake.channel_max

    async def declare(self, spec: QueueSpec) -> None:
        """Create a queue and its binding if they are missing. Raises SettingsError when they exist but differ."""
        await self.declare_steps(spec.steps())

    async def declare_steps(self, steps: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Carry out methods that declare, one after the other. Raises SettingsError for one that is refused."""
        # One at a time: a refusal closes the channel, and is not to hit others who wait on it.
        async with self._declaring:
            for method, fields in steps:
                await self.rpc(ADMIN_CHANNEL, method, **fields)

    def _on_method(self, channel: int, method_id: int, arguments: bytes) -> None:
        try:
            if not self._handshake.is_open:
                self._shake_hands(method_id, arguments)
            elif channel == 0:
                self._on_connection_method(*decode_method(method_id, arguments))
            else:
                self._on_channel_method(channel, method_id, *decode_method(method_id, arguments))
        except FastqError as error:
            self._fail(error)

    def _shake_hands(self, method_id: int, arguments: bytes) -> None:
        if answer := self._handshake.answer(method_id, arguments):
            self.link.write(answer)
        if self._handshake.is_open:
            self.link.frame_max = self._handshake.frame_max
            if not self._opened.done():
                self._opened.set_result(None)

    def _on_connection_method(self, name: str, fields: dict[str, Any]) -> None:
        if name == "connection.close":
            self.send("connection.close-ok", 0)
            raise refusal(self.url, fields)
        if name == "connection.blocked":
            self.blocked = str(fields["reason"])
            self._notices.tell(self.blocked)
        elif name == "connection.unblocked":
            self.blocked = None
            self._notices.tell(None)
        elif name == "connection.close-ok":
            raise ConnectionLost(f"the connection to {self.url} was closed")

    def _on_channel_method(self, channel: int, method_id: int, name: str, fields: dict[str, Any]) -> None:
        if name == "channel.close":
            self._on_channel_close(channel, fields)
        elif name == "basic.cancel":
            self.on_cancelled(fields["consumer_tag"])
        elif answers := self._waiting.get((channel, method_id)):
            answer = answers.popleft()
            if not answer.done():
                answer.set_result(fields)

    def _on_channel_close(self, channel: int, fields: dict[str, Any]) -> None:
        """The broker closed a channel: who waits on it hears why. Without a vital one the connection is of no use."""
        self.send("channel.close-ok", channel)
        self._open_channels.discard(channel)
        error = refusal(self.url, fields)
        if self.is_vital(channel):
            raise error
        self._fail_waiting(error, channel)

    # --- the end

    def _on_lost(self, reason: Exception | None) -> None:
        if not self._handshake.is_open:
            error: Exception = closed_early(self.url)
            if isinstance(reason, RemoteProtocolError):
                error = SettingsError(f"{self.url} does not speak AMQP 0-9-1: {reason}")
        elif isinstance(reason, FastqError):
            error = reason
        else:
            error = ConnectionLost(f"RabbitMQ at {self.url} closed the connection{f': {reason}' if reason else ''}")
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the connection; everybody who waits for something on it gets ``error``."""
        if self._timer is not None:
            self._timer.cancel()
        self._notices.close()
        self.link.on_lost = None
        self.link.abort()
        if not self._opened.done():
            self._opened.set_result(error)
        if not self.lost.done():
            self.lost.set_result(error)
        self._fail_waiting(error, None)
        # Nobody is told of anything any more, and nothing that is kept refers to itself.
        self.on_cancelled = lambda tag: None
        self.is_vital = lambda channel: False

    def _fail_waiting(self, error: Exception, channel: int | None) -> None:
        for (each, _), answers in self._waiting.items():
            if channel is None or each == channel:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                answers.clear()

    async def close(self) -> None:
        """Say goodbye, wait a moment for the answer, and close."""
        if not self.lost.done() and self._handshake.is_open:
            self.send("connection.close", 0, reply_code=200, reply_text="bye")
            await asyncio.wait([self.lost], timeout=CLOSE_TIMEOUT_S)
        self._fail(ConnectionLost(f"the connection to {self.url} was closed"))

    # --- heartbeats

    def _beat(self, due: float) -> None:
        """Send a heartbeat when nothing else was sent for half an interval; end when nothing came for two."""
        if not self._heartbeat_s or self.lost.done():
            return
        now = self._loop.time()
        silence_s = time.monotonic() - self.link.received_at
        # After a pause of this process (stopped, suspended) the broker's bytes are still waiting to be read.
        was_paused = now - due > self._heartbeat_s
        if silence_s > 2 * self._heartbeat_s and not was_paused and not self.link.is_paused:
            self._fail(ConnectionLost(f"RabbitMQ at {self.url} was silent for {silence_s:.0f} s (broker_heartbeat)"))
            return
        if time.monotonic() - self.link.sent_at >= self._heartbeat_s / 2:
            self.link.write(HEARTBEAT)
        due = now + self._heartbeat_s / 4
        self._timer = self._loop.call_at(due, self._beat, due)


class _Protocol(asyncio.BufferedProtocol):
    """A link as asyncio's own loop wants one: it asks for the class."""

    def __init__(self, link: AmqpLink) -> None:
        vars(self).update({name: getattr(link, name) for name in _PROTOCOL})


_PROTOCOL: Final = (
    *("connection_made", "connection_lost", "get_buffer", "buffer_updated", "eof_received"),
    *("pause_writing", "resume_writing"),
)


def _protocol(loop: asyncio.AbstractEventLoop, link: AmqpLink) -> Any:
    # uvloop takes whatever has the methods, and this is a worker's hot path.
    return _Protocol(link) if isinstance(loop, asyncio.BaseEventLoop) else link


def tune_transport(transport: asyncio.Transport) -> None:
    """Set the socket options of a connection that the loop has made."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as copy:
        tune_socket(copy)
