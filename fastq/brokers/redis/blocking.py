"""One blocking connection to Redis: commands, pipelines, and messages of subscriptions. Not thread-safe.

It connects at its first use, and again after it was lost: a lost connection is one ConnectionLost, never a silent
repetition of a command. After a fork the child makes a connection of its own; the parent's is left alone. Subscriptions
are not renewed: whoever made them knows which ones still matter.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NoReturn, cast

import hiredis

from fastq.brokers.redis import login
from fastq.brokers.redis.login import Command
from fastq.brokers.redis.replies import MAX_MESSAGE_BYTES, ReplyReader, Shape, fits
from fastq.brokers.redis.tcp import connect_socket
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import ConnectionLost, FastqError, LocalProtocolError, RedisError, RemoteProtocolError
from fastq.net.tcp import avoid, peer_of

REPLY_BYTES: Final = 1 << 13  # most replies are a few bytes; for longer ones it is asked again
RECEIVE_BYTES: Final = 1 << 16
#: Chosen: the connection is looked at before use when nobody has used it for so long; a server may have hung up.
IDLE_CHECK_S: Final = 0.1
#: Chosen: a subscription that hears nothing asks for a sign of life so often.
PING_EVERY_S: Final = 10.0
FOREVER_S: Final = 1e9


class BlockingRedis:
    """A connection to the first of several servers that takes one. ``timeout_s`` bounds connecting, and each reply."""

    def __init__(
        self,
        urls: Sequence[RedisUrl],
        timeout_s: float,
        name: str = "",
        connect_timeout_s: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._urls = list(urls)
        self._timeout_s = max(timeout_s, 0.001) if timeout_s else FOREVER_S
        self._connect_timeout_s = connect_timeout_s or min(self._timeout_s, 10.0)
        self._name = name
        self._pid = 0
        self._sock: socket.socket | None = None
        self._url = self._urls[0]
        self._max_message_bytes = max_message_bytes
        self._reader = ReplyReader(max_message_bytes)
        self._replies: deque[Any] = deque()
        self._is_subscribed = False
        self._used_at = 0.0
        self._heard_at = 0.0
        self._pinged_at = 0.0
        _CONNECTIONS.add(self)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection of this process; the server may have ended it meanwhile."""
        return self._sock is not None

    @property
    def url(self) -> RedisUrl:
        """The server that is, or was last, connected to."""
        return self._url

    def open(self, deadline: float | None = None) -> None:
        """Connect if there is no connection. Raises ConnectionLost, or SettingsError where a repetition cannot help.

        From now on connecting and each reply take until about the ``deadline`` (monotonic) at most, if there is one.
        """
        now = time.monotonic()
        if deadline is not None:
            self.limit(deadline - now)
        if self._sock is not None:
            if now - self._used_at <= IDLE_CHECK_S or self._is_subscribed or self._is_healthy():
                return
            self.close()
        self._connect_any()
        if deadline is not None:
            self.limit(deadline - time.monotonic())

    def _connect_any(self) -> None:
        failures: list[ConnectionLost] = []
        until = time.monotonic() + self._timeout_s
        for url in list(self._urls):
            try:
                self._connect(url, min(until, time.monotonic() + self._connect_timeout_s))
            except ConnectionLost as error:
                failures.append(error)
                # The next attempt begins with another one.
                self._urls.append(self._urls.pop(0))
            else:
                return
        raise login.none_reachable(failures)

    def limit(self, timeout_s: float) -> None:
        """Have connecting and each reply take at most so long from now on; a few per cent are let pass."""
        if abs(timeout_s - self._timeout_s) > 0.05 * self._timeout_s:
            self._timeout_s = max(timeout_s, 0.1)
            if self._sock is not None:
                self._set_time_outs(self._sock)

    def call(self, *command: str | bytes | float) -> Any:
        """Return the reply to a command. Raises RedisError for an error reply, ConnectionLost, SettingsError."""
        self.open()
        return self.ask(pack_one(command))

    def ask(self, packed: bytes) -> Any:
        """Return the reply to a packed command on the open connection. Raises as ``call`` does.

        The hot path: one write, and one read, which nearly always brings the whole reply.
        """
        sock = self._sock
        if sock is None or self._is_subscribed or isinstance(sock, ssl.SSLSocket):
            (reply,) = self.pipeline([packed])
            if isinstance(reply, RedisError):
                raise reply
            return reply
        try:
            sock.sendall(packed)
            if not (data := sock.recv(REPLY_BYTES)):
                self._fail(self._lost(None))
            replies = self._reader.take(data)
        except (TimeoutError, BlockingIOError):
            self._fail(login.silent(self._url, self._timeout_s))
        except (OSError, ValueError) as error:
            self._fail(self._lost(error))
        except RemoteProtocolError as error:
            self._fail(login.no_redis(self._url, error))
        except BaseException:
            # A reply that comes later would be taken for that of another command.
            self.close()
            raise
        self._used_at = self._heard_at = time.monotonic()
        if not replies:
            replies = self._await_replies(1, self._used_at + self._timeout_s)
        elif len(replies) > 1:
            self._fail(login.odd_reply(self._url, replies[1]))
        reply = replies[0]
        if isinstance(reply, RedisError):
            if login.is_away(reply):
                self._fail(login.went_away(self._url, reply))
            raise reply
        return reply

    def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write and return their replies, error replies as RedisError objects."""
        if not commands:
            return []
        self.open()
        if self._is_subscribed:
            raise LocalProtocolError(f"{commands[0][0]!r} on a connection that listens to channels; open another one")
        replies = self._exchange(commands, time.monotonic() + self._timeout_s)
        self._used_at = time.monotonic()
        if RedisError in set(map(type, replies)):
            for reply in replies:
                if login.is_away(reply):
                    self._fail(login.went_away(self._url, reply))
        return replies

    def expect(self, reply: Any, shape: Shape) -> Any:
        """Return a reply that its command can have; for another one end the connection and raise ConnectionLost."""
        if type(reply) is not shape and not fits(reply, shape):
            self._fail(login.odd_reply(self._url, reply))
        return reply

    # --- replies that nobody waits for

    def send(self, packed: bytes) -> bytes:
        """Write packed commands on the open connection; ``replies`` brings the answers, in order.

        Returns what the socket has not taken within the time-out, to be written before anything else. Raises
        ConnectionLost.
        """
        if self._sock is None:
            raise ConnectionLost(f"there is no connection to Redis at {self._url}")
        try:
            if isinstance(self._sock, ssl.SSLSocket):
                self._sock.settimeout(max(self._timeout_s, 0.001))
            while packed:
                packed = packed[self._sock.send(packed) :]
        except (TimeoutError, BlockingIOError):
            return packed
        except (OSError, ValueError) as error:
            self._fail(self._lost(error))
        return packed

    def replies(self, timeout_s: float = 0.0) -> list[Any]:
        """Return the answers that have come to what was sent, waiting at most so long for the first.

        Error replies are RedisError objects. Raises ConnectionLost.
        """
        if not self._replies:
            self.receive(timeout_s)
        found = list(self._replies)
        self._replies.clear()
        return found

    # --- subscriptions

    def subscribe(self, *channels: str | bytes, instead_of: Collection[str | bytes] = ()) -> None:
        """Ask for the messages of channels, and for no more of others; ``read_push`` brings them and confirmations."""
        self._listen("SUBSCRIBE", channels, instead_of)

    def psubscribe(self, *patterns: str | bytes) -> None:
        """Ask for the messages of all channels that match a pattern."""
        self._listen("PSUBSCRIBE", patterns, ())

    def unsubscribe(self, *channels: str | bytes) -> None:
        """Ask for no more messages of channels; nothing to do when there is no connection."""
        if self.is_open and self._is_subscribed:
            self._listen("UNSUBSCRIBE", channels, ())

    def read_push(self, deadline: float) -> list[Any] | None:
        """Return the next message, such as ``[b"message", channel, payload]``; None at the deadline (monotonic).

        Asks a silent server for a sign of life. Raises ConnectionLost: also when there is no connection.
        """
        while True:
            push = self.take_push()
            if push is not None:
                return push
            now = time.monotonic()
            left_s = min(deadline, self.check_alive()) - now
            if not self.receive(max(left_s, 0.0)) and time.monotonic() >= deadline:
                return None

    def take_push(self) -> list[Any] | None:
        """Return the next message that was received, None when there is none; never waits.

        Raises SettingsError when a channel may not be listened to.
        """
        while self._replies:
            push = self._replies.popleft()
            if isinstance(push, RedisError):
                make = login.may_not_listen if push.code == "NOPERM" else login.went_away
                self._fail(make(self._url, push))
            if login.is_push(push):
                assert isinstance(push, list)
                return push
            self.expect(push, list)
        return None

    def receive(self, timeout_s: float) -> bool:
        """Take in what the socket has, waiting at most so long; False when nothing came. Raises ConnectionLost."""
        data = self._receive(timeout_s)
        if data:
            self._feed(data)
        return bool(data)

    def drain(self) -> None:
        """Take in all that has come, or much of it; never waits. What is left makes the socket readable."""
        while self.receive(0.0) and isinstance(self._sock, ssl.SSLSocket):
            pass  # TLS holds bytes back that no poll tells of

    def check_alive(self) -> float:
        """Ask a silent server for a sign of life; return when (monotonic) to do so again. Raises ConnectionLost."""
        if not self.is_open:
            raise ConnectionLost(f"there is no connection to Redis at {self._url}")
        now = time.monotonic()
        if self._pinged_at > self._heard_at:
            if now - self._pinged_at >= PING_EVERY_S:
                self._fail(login.silent(self._url, now - self._heard_at))
            return self._pinged_at + PING_EVERY_S
        if now - self._heard_at < PING_EVERY_S:
            return self._heard_at + PING_EVERY_S
        self._send([("PING",)], now + PING_EVERY_S)
        self._pinged_at = time.monotonic()
        return self._pinged_at + PING_EVERY_S

    def fileno(self) -> int:
        """Return the socket's descriptor, to be polled with others. Raises ConnectionLost when there is none."""
        if self._sock is None:
            raise ConnectionLost(f"there is no connection to Redis at {self._url}")
        return self._sock.fileno()

    def interrupt(self) -> None:
        """End the connection for another thread that waits on it: that one gets ConnectionLost."""
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; a later call opens a new one. Never raises."""
        self._abandon()

    # --- inside

    def _listen(self, command: str, names: Collection[str | bytes], instead_of: Collection[str | bytes]) -> None:
        self.open()
        self._is_subscribed = True
        commands: list[Command] = [("UNSUBSCRIBE", *instead_of)] if instead_of else []
        if names:
            commands.append((command, *names))
        if commands:
            self._send(commands, time.monotonic() + self._timeout_s)

    def _connect(self, url: RedisUrl, deadline: float) -> None:
        if url.sentinels:
            url = self._find_master(url, deadline)
        self._url = url
        self._reader, self._is_subscribed = ReplyReader(self._max_message_bytes), False
        self._replies.clear()
        self._sock, self._pid = connect_socket(url, deadline), os.getpid()
        address = peer_of(self._sock)
        try:
            self._set_time_outs(self._sock)
            commands = login.login_commands(url, self._name)
            login.check_login(url, commands, self._log_in(url, commands, deadline))
        except BaseException:
            if time.monotonic() >= deadline:
                avoid(address)
            self.close()
            raise
        self._used_at = self._heard_at = time.monotonic()

    def _log_in(self, url: RedisUrl, commands: Sequence[Command], deadline: float) -> list[Any]:
        try:
            return self._exchange(commands, deadline)
        except ConnectionLost:
            if self._replies and isinstance(self._replies[-1], RedisError):
                raise login.turned_away(url, self._replies[-1]) from None
            raise

    def _find_master(self, url: RedisUrl, deadline: float) -> RedisUrl:
        """Return the master that the first Sentinel to answer names."""
        failures: list[ConnectionLost] = []
        for sentinel in url.sentinels:
            left_s = max(deadline - time.monotonic(), 0.1) / max(len(url.sentinels) - len(failures), 1)
            until = time.monotonic() + left_s
            asked = BlockingRedis([sentinel], left_s, self._name, max_message_bytes=self._max_message_bytes)
            try:
                asked.open()
                asked.limit(until - time.monotonic())
                (reply,) = asked.pipeline([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.service)])
                if isinstance(reply, list):
                    return login.at_master(url, sentinel, reply)
                error = login.no_master(sentinel, reply)
                if not isinstance(error, ConnectionLost):
                    raise error
                failures.append(error)
            except ConnectionLost as error:
                failures.append(error)
            finally:
                asked.close()
        raise login.none_reachable(failures)

    def _set_time_outs(self, sock: socket.socket) -> None:
        """Bound single system calls in the kernel, so that the hot path needs no settimeout; TLS cannot have that."""
        if not isinstance(sock, ssl.SSLSocket):
            sock.settimeout(None)
            span_s = min(self._timeout_s, 1e6)
            span = struct.pack("ll", int(span_s), int(span_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)

    def _exchange(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        """Return the replies to commands. Anything but all of them ends the connection."""
        try:
            self._send(commands, deadline)
            return self._await_replies(len(commands), deadline)
        except BaseException:
            # A reply that comes later would be taken for that of another command.
            self.close()
            raise

    def _await_replies(self, count: int, deadline: float) -> list[Any]:
        try:
            while len(self._replies) < count:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    self._fail(login.silent(self._url, self._timeout_s))
                data = self._receive(left_s, is_bounded=left_s > 0.9 * self._timeout_s)
                if data:
                    self._feed(data)
            found = list(self._replies)
            self._replies.clear()
            if len(found) > count:
                self._fail(login.odd_reply(self._url, found[count]))
            return found
        except BaseException:
            # A reply that comes later would be taken for that of another command.
            self.close()
            raise

    def _send(self, commands: Sequence[Command], deadline: float) -> None:
        self._write(pack(commands), deadline - time.monotonic())

    def _write(self, data: bytes, timeout_s: float) -> None:
        assert self._sock is not None
        try:
            if isinstance(self._sock, ssl.SSLSocket):
                self._sock.settimeout(max(timeout_s, 0.001))
            self._sock.sendall(data)
        except (OSError, ValueError) as error:
            self._fail(self._lost(error))
        except BaseException:
            # Nobody knows how much of it was sent.
            self.close()
            raise

    def _receive(self, timeout_s: float, is_bounded: bool = False) -> bytes:
        """Return what the socket has, b"" when nothing came in time.

        ``is_bounded``: the time that the kernel bounds single reads by will do, which saves a system call.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionLost(f"there is no connection to Redis at {self._url}")
        try:
            if isinstance(sock, ssl.SSLSocket):
                # A readable socket does not mean that data has come, it may be TLS's own: the wait is inside the read.
                sock.settimeout(min(timeout_s, 1e6))
                data = sock.recv(RECEIVE_BYTES)
            elif is_bounded:
                data = sock.recv(REPLY_BYTES)
            elif timeout_s > 0 and not _is_readable(sock, timeout_s):
                return b""
            else:
                data = sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return b""
        except (OSError, ValueError) as error:
            self._fail(self._lost(error))
        if not data:
            self._fail(self._lost(None))
        return data

    def _feed(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        try:
            self._replies += self._reader.take(data)
        except RemoteProtocolError as error:
            self._fail(login.no_redis(self._url, error))

    def _is_healthy(self) -> bool:
        """Whether an unused connection still stands: nothing has come, and it was not closed."""
        try:
            return not self._receive(0.0)
        except ConnectionLost:
            return False

    def _lost(self, error: Exception | None) -> ConnectionLost:
        return login.lost(self._url, error) if self._used_at else login.closed_early(self._url)

    def _fail(self, error: FastqError) -> NoReturn:
        self.close()
        raise error

    def _abandon(self) -> None:
        """Close this process's copy of the socket; after a fork the parent's connection goes on."""
        sock, self._sock = self._sock, None
        self._is_subscribed = False
        self._pinged_at = self._used_at = 0.0
        if sock is not None:
            if self._pid == os.getpid():
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # else another thread that polls it would not be woken
            sock.close()


def _is_readable(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(min(timeout_s, 1e6) * 1000))


#: Return one command as bytes of the protocol. (The library's stub takes tuples of one item only.)
pack_one: Callable[[tuple[str | bytes | float, ...]], bytes] = cast("Any", hiredis.pack_command)


def pack(commands: Sequence[Command]) -> bytes:
    """Return commands as bytes of the protocol."""
    return b"".join([command if isinstance(command, bytes) else pack_one(command) for command in commands])


#: Every connection of this process.
_CONNECTIONS: weakref.WeakSet[BlockingRedis] = weakref.WeakSet()


def _forget_after_fork() -> None:
    """In a forked child: close its copies of the sockets. To ask before each use whose they are is a system call."""
    for connection in list(_CONNECTIONS):
        connection.close()


os.register_at_fork(after_in_child=_forget_after_fork)
