"""Remote control, the worker's side: answers what Celery's and fastq's clients broadcast. The only command is ``ping``.

It has a connection of its own, so that nothing that comes in here can disturb the tasks. It never ends the worker: a
message that is no request is counted and dropped, a lost connection is made again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from fastq.amqp.url import Endpoints
from fastq.errors import DecodeError, FastqError
from fastq.link import AmqpLink
from fastq.settings import Settings
from fastq.transport.amqp import ADMIN_CHANNEL, CHANNEL, AmqpConnection
from fastq.wire.amqp import METHODS
from fastq.wire.frames import publish_frames
from fastq.worker.pidbox import Request, decode_request, encode_reply, node_queue, node_steps

logger = logging.getLogger(__name__)

_DELIVER: Final = METHODS["basic.deliver"]
_FIRST_RETRY_S: Final = 0.1  # reliability rules, section 6.2: 0.1 s to 30 s with full jitter
_LAST_RETRY_S: Final = 30.0
_MAX_REQUEST_BYTES: Final = 1024 * 1024  # chosen: a revoke of ten thousand ids fits

#: A command takes the request's arguments by name and returns the reply.
Command = Callable[..., object]


def ping() -> dict[str, str]:
    """Return the sign of life that ``status`` and ``inspect ping`` wait for."""
    return {"ok": "pong"}


COMMANDS: Final[Mapping[str, Command]] = {"ping": ping}


class Control:
    """Answers requests for one node until ``serve`` is cancelled. ``ready`` is set while it listens."""

    def __init__(self, settings: Settings, hostname: str, commands: Mapping[str, Command] = COMMANDS) -> None:
        self.ready = asyncio.Event()
        self.malformed = 0
        self._settings = settings
        self._hostname = hostname
        self._commands = commands
        self._endpoints = Endpoints(str(settings.broker_url), settings)
        self._clock = 0

    async def serve(self) -> None:
        """Stay connected and answer; when cancelled, close the connection."""
        attempt = 0
        while True:
            for url in self._endpoints:
                connection = AmqpConnection(url, AmqpLink(None), self._settings.broker_heartbeat, "control")
                try:
                    await self._listen(connection)
                    attempt = 0
                    reason: Exception = await connection.lost
                except FastqError as error:
                    reason = error
                finally:
                    self.ready.clear()
                    await connection.close()
                attempt += 1
                level = logging.WARNING if attempt == 1 else logging.DEBUG
                logger.log(level, "remote control of %s is away: %s", self._hostname, reason)
                longest = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(attempt, 10))
                await asyncio.sleep(random.uniform(_FIRST_RETRY_S, longest))  # noqa: S311  jitter, not a secret

    async def _listen(self, connection: AmqpConnection) -> None:
        connection.link.max_message_bytes = _MAX_REQUEST_BYTES
        await connection.open(self._settings.broker_connection_timeout)
        others = connection.link.on_method

        def on_method(channel: int, method_id: int, arguments: Any) -> None:
            if method_id == _DELIVER:
                _, props, body = arguments
                self._on_message(connection, props, body)
            elif others is not None:
                others(channel, method_id, arguments)

        connection.link.on_method = on_method
        for method, fields in node_steps(self._hostname):
            await connection.rpc(ADMIN_CHANNEL, method, **fields)
        await connection.rpc(CHANNEL, "basic.consume", queue=node_queue(self._hostname), no_ack=True)
        self.ready.set()

    def _on_message(self, connection: AmqpConnection, props: bytes, body: bytes) -> None:
        try:
            request = decode_request(props, body)
        except DecodeError as error:
            self.malformed += 1
            logger.warning("remote control: %s", error)
            return
        self._clock = max(self._clock, request.clock) + 1
        if not request.is_for(self._hostname):
            return
        reply = self._answer(request)
        if request.reply_to:
            message = encode_reply(request, self._hostname, reply, self._clock)
            connection.link.write(publish_frames(CHANNEL, message, connection.link.frame_max))

    def _answer(self, request: Request) -> object:
        """Run the command and return its reply; what goes wrong is the reply, in Celery's form."""
        command = self._commands.get(request.method)
        if command is None:
            return {"error": repr(KeyError(request.method))}
        try:
            return command(**request.arguments)
        except TypeError as error:  # arguments that the command does not take
            return {"error": repr(error)}
