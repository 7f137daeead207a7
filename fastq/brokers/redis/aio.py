"""One connection to Redis on an event loop: commands are pipelined freely, replies come in order. No reconnecting.

Who owns it watches ``lost`` and makes a new one. Not for use across a fork: loops are not either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias, cast

from fastq.brokers.redis import digests as scripts
from fastq.brokers.redis import login
from fastq.brokers.redis.blocking import pack
from fastq.brokers.redis.login import Command
from fastq.brokers.redis.replies import MAX_MESSAGE_BYTES, ReplyReader, Shape, fits
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import ConnectionLost, LocalProtocolError, RedisError, RemoteProtocolError
from fastq.net.tcp import avoid, connect_first_on, peer_of, tune_socket
from fastq.net.tls import tls_context

#: Chosen: a server that says nothing is asked for a sign of life after so long, and given up after as long again.
HEALTH_CHECK_S: Final = 10.0

Done: TypeAlias = "Callable[[list[Any]], None]"


class AsyncRedis:
    """A connection to the first of several servers that takes one; ``url`` says which it was.

    ``lost`` ends with the reason when the connection does; ``on_push`` gets each message of a subscription, such as
    ``[b"message", channel, payload]``; ``on_refused``, if there is one, that a subscription was refused, which ends the
    connection otherwise. A command that blocks in the server must do so for less than
    ``health_check_interval_s``: meanwhile the server answers nothing else.
    """

    lost: asyncio.Future[Exception]

    def __init__(
        self,
        urls: Sequence[RedisUrl],
        name: str = "",
        health_check_interval_s: float = HEALTH_CHECK_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.url = urls[0]
        self.on_push: Callable[[list[Any]], None] = _ignore
        self.on_refused: Callable[[RedisError], None] | None = None
        self._urls = list(urls)
        self._name = name
        self._interval_s = health_check_interval_s or HEALTH_CHECK_S
        self._max_message_bytes = max_message_bytes
        self._timeout_s = 0.0
        self._loop: asyncio.AbstractEventLoop
        self._wire: _Wire | None = None
        self._reader = ReplyReader(max_message_bytes)
        self._batches: deque[_Batch] = deque()
        self._spelled_out = 0  # batches that are sent again with the scripts in them
        self._is_open = False
        self._is_subscribed = False
        self._has_pinged = False
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._address: Any = None  # that has taken the connection

    # --- life

    async def open(self, timeout_s: float) -> None:
        """Connect and log in, at each server within the time.

        Raises ConnectionLost (try again) or SettingsError (do not).
        """
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        failures: list[ConnectionLost] = []
        for url in self._urls:
            self.lost = self._loop.create_future()
            self._address = None
            try:
                await asyncio.wait_for(self._open(url), timeout_s)
            except asyncio.TimeoutError:
                avoid(self._address)
                failures.append(login.unreachable(self.url, TimeoutError()))
            except ConnectionLost as error:
                failures.append(error)
            else:
                return
            finally:
                if not self._is_open:
                    self._fail(ConnectionLost(f"not connected to Redis at {self.url}"))
        raise login.none_reachable(failures)

    async def close(self) -> None:
        """Send what was written, then close. ``lost`` ends too."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.transport.close()
        self._end(ConnectionLost(f"the connection to Redis at {self.url} was closed"))

    @property
    def is_open(self) -> bool:
        """Whether the connection stands."""
        return self._is_open

    # --- commands

    async def call(self, *command: str | bytes | float) -> Any:
        """Return the reply to a command. Raises RedisError for an error reply, ConnectionLost when none will come."""
        (reply,) = await self.pipeline([command])
        if isinstance(reply, RedisError):
            raise reply
        return reply

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write and return their replies, error replies as RedisError. Raises ConnectionLost."""
        if not self._is_open:
            raise ConnectionLost(str(self.lost.result()) if self.lost.done() else f"no connection to {self.url}")
        return await self._ask(commands)

    def send(self, commands: Sequence[Command], done: Done) -> None:
        """Send commands in one write; ``done`` gets their replies, error replies as RedisError objects.

        On a lost connection nothing is sent and ``done`` is never called: ``lost`` has the reason.
        """
        if not self._is_open or not commands:
            return
        if self._is_subscribed:
            raise LocalProtocolError(f"{commands[0][0]!r} on a connection that listens to channels; open another one")
        self._write(commands, done)

    def expect(self, reply: Any, shape: Shape) -> Any:
        """Return a reply that its command can have; for another one end the connection and raise ConnectionLost."""
        if not fits(reply, shape):
            self.refuse(reply)
        return reply

    def refuse(self, reply: Any) -> NoReturn:
        """End the connection because of a reply that its command cannot have. Raises ConnectionLost."""
        error = login.odd_reply(self.url, reply)
        self._fail(error)
        raise error

    async def fence(self) -> None:
        """Return when everything that was sent so far has been answered. Raises ConnectionLost."""
        await self.call("PING")
        while self._spelled_out:
            await self.call("PING")

    def subscribe(self, *channels: str | bytes) -> None:
        """Ask for the messages of channels; from now on this connection takes no other commands."""
        self._listen("SUBSCRIBE", channels)

    def psubscribe(self, *patterns: str | bytes) -> None:
        """Ask for the messages of all channels that match a pattern; as ``subscribe``."""
        self._listen("PSUBSCRIBE", patterns)

    def unsubscribe(self, *channels: str | bytes) -> None:
        """Ask for no more messages of channels."""
        self._listen("UNSUBSCRIBE", channels)

    # --- inside: connecting

    async def _open(self, url: RedisUrl) -> None:
        self.url = await self._find_master(url) if url.sentinels else url
        await self._connect(self.url)
        commands = login.login_commands(self.url, self._name)
        login.check_login(self.url, commands, await self._ask(commands))
        self._is_open = True
        self._heard_at = self._loop.time()
        self._check_alive_at(self._heard_at + self._interval_s)

    async def _connect(self, url: RedisUrl) -> None:
        tls = url.tls
        make: Any = partial(_Wire, self)
        try:
            if url.path:
                await self._loop.create_unix_connection(make, url.path)
                return
            context, name = (tls_context(tls), tls.server_name or url.host) if tls else (None, None)
            sock = await connect_first_on(self._loop, url.host, url.port)
        except OSError as error:
            raise login.unreachable(url, error) from None
        self._address = peer_of(sock)
        try:
            await self._loop.create_connection(make, sock=sock, ssl=context, server_hostname=name)
        except OSError as error:
            raise (login.tls_failed if tls else login.unreachable)(url, error) from None
        if self._wire is None:  # it was closed at once
            raise ConnectionLost(str(self.lost.result()))
        tune_socket(self._wire.transport.get_extra_info("socket"))

    async def _find_master(self, url: RedisUrl) -> RedisUrl:
        """Return the master that the first Sentinel to answer names."""
        failures: list[ConnectionLost] = []
        for sentinel in url.sentinels:
            asked = AsyncRedis([sentinel], self._name, max_message_bytes=self._max_message_bytes)
            try:
                await asked.open(self._timeout_s / len(url.sentinels))
                (reply,) = await asked.pipeline([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.service)])
                if isinstance(reply, list):
                    return login.at_master(url, sentinel, reply)
                error = login.no_master(sentinel, reply)
                if not isinstance(error, ConnectionLost):
                    raise error
                failures.append(error)
            except ConnectionLost as error:
                failures.append(error)
            finally:
                await asked.close()
        raise login.none_reachable(failures)

    # --- inside: bytes

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        if self.lost.done():
            raise ConnectionLost(str(self.lost.result()))
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self._write(commands, lambda replies: None if answer.done() else answer.set_result(replies), answer)
        return await answer

    def _write(self, commands: Sequence[Command], done: Done, waiting: asyncio.Future[list[Any]] | None = None) -> None:
        assert self._wire is not None
        if not self._batches:
            # Silence counts from the question on, not from the last answer.
            self._heard_at = self._loop.time()
        kept = commands if any(map(scripts.is_script, commands)) else ()
        self._batches.append(_Batch(len(commands), done, waiting, kept))
        self._wire.transport.write(pack(commands))

    def _spell_out(self, batch: _Batch) -> None:
        """Run again, on the same connection, those scripts that the server does not know."""
        places = [place for place, reply in enumerate(batch.replies) if scripts.is_unknown(reply)]

        def done(replies: list[Any]) -> None:
            self._spelled_out -= 1
            for place, reply in zip(places, replies, strict=True):
                batch.replies[place] = reply
            batch.done(batch.replies)

        self._spelled_out += 1
        self._write([scripts.spelled_out(batch.commands[place]) for place in places], done, batch.waiting)

    def _listen(self, command: str, names: Sequence[str | bytes]) -> None:
        self._is_subscribed = True
        if self._wire is not None and names:
            self._wire.transport.write(pack([(command, *names)]))

    def _on_data(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._has_pinged = False
        try:
            for reply in self._reader.take(data):
                if self._wire is None:
                    return
                self._on_reply(reply)
        except RemoteProtocolError as error:
            self._fail(login.no_redis(self.url, error))
        except ConnectionLost as error:  # a reply that its command cannot have
            self._fail(error)

    def _on_reply(self, reply: Any) -> None:
        if login.is_away(reply) and self._is_open:
            self._fail(login.went_away(self.url, reply))
        elif self._batches:
            batch = self._batches[0]
            batch.replies.append(reply)
            if len(batch.replies) == batch.count:
                self._batches.popleft()
                if batch.commands and any(map(scripts.is_unknown, batch.replies)):
                    self._spell_out(batch)
                else:
                    batch.done(batch.replies)
        elif isinstance(reply, RedisError) and self._is_subscribed and self.on_refused is not None:
            self.on_refused(reply)
        elif isinstance(reply, RedisError) and self._is_subscribed and reply.code == "NOPERM":
            self._fail(login.may_not_listen(self.url, reply))
        elif isinstance(reply, RedisError):
            self._fail((login.went_away if self._is_open else login.turned_away)(self.url, reply))
        elif not self._is_subscribed or not fits(reply, list):
            self._fail(login.odd_reply(self.url, reply))
        elif login.is_push(reply):
            self.on_push(reply)

    # --- inside: signs of life

    def _check_alive_at(self, due: float) -> None:
        self._timer = self._loop.call_at(due, self._check_alive, due)

    def _check_alive(self, due: float) -> None:
        """Ask a silent server for a sign of life; give it up when it does not answer."""
        now = self._loop.time()
        if now - due > self._interval_s:
            # This process was stopped or suspended: what the server has said meanwhile still waits to be read.
            self._heard_at, self._has_pinged = now, False
        if now - self._heard_at < self._interval_s:
            self._check_alive_at(self._heard_at + self._interval_s)
            return
        if self._has_pinged:
            self._fail(login.silent(self.url, now - self._heard_at))
            return
        if self._wire is not None:
            if not self._is_subscribed:
                self._batches.append(_Batch(1, _ignore))
            self._wire.transport.write(pack([("PING",)]))
        self._has_pinged = True
        self._check_alive_at(now + self._interval_s)

    # --- inside: the end

    def _on_lost(self, wire: _Wire, error: Exception | None) -> None:
        if wire is self._wire:
            self._wire = None
            self._end(login.lost(self.url, error) if self._is_open else self._lost_early())

    def _lost_early(self) -> Exception:
        replies = self._batches[0].replies if self._batches else []
        if replies and isinstance(replies[-1], RedisError):
            return login.turned_away(self.url, replies[-1])
        return login.closed_early(self.url)

    def _fail(self, error: Exception) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.transport.abort()
        self._end(error)

    def _end(self, error: Exception) -> None:
        """Everybody who waits gets the error."""
        self._is_open = self._has_pinged = False
        self._reader = ReplyReader(self._max_message_bytes)
        self._spelled_out = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batches, self._batches = self._batches, deque()
        if not self.lost.done():
            self.lost.set_result(error)
        for batch in batches:
            if batch.waiting is not None and not batch.waiting.done():
                batch.waiting.set_exception(ConnectionLost(str(error)))


class _Wire(asyncio.Protocol):
    """The loop's end of one attempt to connect; a later attempt has another one."""

    transport: asyncio.Transport

    def __init__(self, owner: AsyncRedis) -> None:
        self._owner = owner
        self.data_received = owner._on_data  # type: ignore[method-assign]  # one call less for each read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._owner._wire = self

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner._on_lost(self, exc)


class _Batch:
    """Commands of one write and the replies to them so far."""

    __slots__ = ("commands", "count", "done", "replies", "waiting")

    def __init__(
        self,
        count: int,
        done: Done,
        waiting: asyncio.Future[list[Any]] | None = None,
        commands: Sequence[Command] = (),
    ) -> None:
        #: Kept where one is a script, which the server may not know.
        self.commands = commands
        self.count = count
        self.done = done
        self.waiting = waiting
        self.replies: list[Any] = []


def _ignore(replies: list[Any]) -> None:
    pass
