"""Asking every worker on a RabbitMQ at once, Celery's included: the client's side of remote control."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastq.amqp.connection import BlockingConnection, Event, connect_any
from fastq.amqp.url import Endpoints
from fastq.errors import DecodeError
from fastq.wire.amqp import METHODS
from fastq.wire.frames import publish_frames
from fastq.wire.message import new_id
from fastq.worker.pidbox import Request, decode_reply, encode_request, reply_queue, reply_steps

if TYPE_CHECKING:
    from fastq.settings import Settings

_CHANNEL = 1
_DELIVER = METHODS["basic.deliver"]

Reply = tuple[str, dict[str, Any]]


def broadcast(settings: Settings, method: str, timeout_s: float, destination: Sequence[str] = ()) -> Iterator[Reply]:
    """Send a command and yield each node's reply, until the time is up or all nodes of the destination have replied."""
    endpoints = Endpoints(str(settings.broker_url), settings)
    connection = connect_any(endpoints, settings, "control", settings.broker_connection_timeout)
    address = new_id()
    request = Request(method, {}, destination, ticket=new_id(), reply_to=address)
    try:
        for step, fields in reply_steps(address):
            connection.rpc(_CHANNEL, step, **fields)
        connection.rpc(_CHANNEL, "basic.consume", queue=reply_queue(address), no_ack=True)
        message = encode_request(request, expires=time.time() + timeout_s)
        connection.transmit(publish_frames(_CHANNEL, message, connection.frame_max))
        yield from _collect(connection, request, time.monotonic() + timeout_s)
    finally:
        connection.close()


def _collect(connection: BlockingConnection, request: Request, deadline: float) -> Iterator[Reply]:
    missing = set(request.destination)
    while event := connection.next_event(deadline):
        connection.check_channel(event)
        for node, reply in _replies_in(event, request.ticket):
            yield node, reply
            missing.discard(node)
        if request.destination and not missing:
            return


def _replies_in(event: Event, ticket: str) -> list[Reply]:
    """Return the replies that a method carries if it is a message that answers the question of that ticket."""
    if event.method_id != _DELIVER:
        return []
    try:
        answered, replies = decode_reply(event.props, event.body)
    except DecodeError:
        return []
    return [(node, reply) for node, reply in replies.items() if isinstance(reply, dict)] if answered == ticket else []
