"""Dead letters that say why: the worker itself moves what it rejects, where it knows the queue's dead-letter exchange.

RabbitMQ moves a rejected message too, but takes no word of who rejects it. It knows exchanges by policy as well; of
those no client is told, so that such messages are left to it. Source: RabbitMQ's page on dead lettering, ``x-death``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.headers import DELIVERY_COUNT, REJECTED
from fastq.brokers.on_loop import LoopPublisher
from fastq.brokers.rabbitmq.on_loop import open_line
from fastq.errors import FastqError
from fastq.printable import printable
from fastq.queues import Topology
from fastq.wire.amqp import decode_properties, encode_properties
from fastq.wire.message import Message

if TYPE_CHECKING:
    from fastq.brokers.rabbitmq.on_loop import AmqpLine
    from fastq.brokers.rabbitmq.url import AmqpUrl
    from fastq.link import Delivery
    from fastq.queues import QueueSpec
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.amqp")

EXCHANGE: Final = "x-dead-letter-exchange"
ROUTING_KEY: Final = "x-dead-letter-routing-key"
#: Chosen: properties have one frame, which holds a stack of calls besides, but not a page of text.
MAX_REASON: Final = 1000


class DeadLetters:
    """Moves rejected messages of one connection, with the reason as a header, by a connection of its own.

    Its own, because RabbitMQ ends a channel for an exchange that is missing or forbidden. What cannot be moved is
    left to the broker: ``buried`` is told of each delivery whether it was.
    """

    def __init__(self, url: AmqpUrl, settings: Settings, buried: Callable[[Delivery, bool], None]) -> None:
        self._url = url
        self._settings = settings
        self._buried = buried
        self._publisher = LoopPublisher(self._open, url, settings)
        self._moving: set[asyncio.Task[None]] = set()

    def take(self, delivery: Delivery, spec: QueueSpec, reason: str) -> bool:
        """Move a message if it can be known where to; return whether ``buried`` will be told."""
        message = dead_letter(delivery.describe(), spec, reason)
        if message is None:
            return False
        self._run(self._move(delivery, message))
        return True

    async def close(self) -> None:
        """Close the connection; what is not confirmed yet is the broker's."""
        await self._publisher.close()

    async def _open(self) -> AmqpLine:
        # It creates no queues: one that is missing may be so on purpose, and how to declare it is not known here.
        topology = Topology(self._settings)
        topology.create_missing = False
        return await open_line(self._url, self._settings, topology, "worker dead letters")

    async def _move(self, delivery: Delivery, message: Message) -> None:
        is_moved = False
        try:
            await self._publisher.publish([message])
            is_moved = True
        except FastqError as error:
            logger.debug("a dead letter is left to RabbitMQ, without its reason: %s", error)
        finally:
            self._buried(delivery, is_moved)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)


def dead_letter(found: Mapping[str, Any], spec: QueueSpec, reason: str) -> Message | None:
    """Return what RabbitMQ would make of a rejected delivery, and the reason; None where only RabbitMQ can."""
    exchange = spec.arguments.get(EXCHANGE)
    if exchange is None:
        return None
    try:
        properties = decode_properties(found["props"])
        headers = dict(properties.get("headers") or {})
        if "CC" in headers or "user_id" in properties:  # the one is routing, the other holds for its sender alone
            return None
        headers.pop(DELIVERY_COUNT, None)  # of the queue that it leaves: one put back starts anew
        deaths = _deaths(headers.get("x-death", []), _death(found, spec.name, properties.pop("expiration", None)))
        for name in ("exchange", "queue", "reason"):
            headers.setdefault(f"x-first-death-{name}", deaths[-1][name])
        headers |= {"x-death": deaths, REJECTED: printable(reason, MAX_REASON)}
        props = encode_properties({**properties, "headers": headers})
    except (FastqError, KeyError, TypeError, ValueError):
        return None
    routing_key = spec.arguments.get(ROUTING_KEY, found["routing_key"])
    return Message(exchange, routing_key, props, found["body"], properties.get("correlation_id", ""))


def _death(found: Mapping[str, Any], queue: str, expiration: str | None) -> dict[str, Any]:
    """Return a new entry of ``x-death``."""
    death = {
        "count": 1,
        "exchange": found["exchange"],
        "queue": queue,
        "reason": "rejected",
        "routing-keys": [found["routing_key"]],
        "time": datetime.now(timezone.utc),
    }
    return death if expiration is None else {**death, "original-expiration": expiration}


def _deaths(former: list[dict[str, Any]], death: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the deaths, the latest first: one entry for each queue and reason."""
    others = []
    for each in former:
        if (each["queue"], each["reason"]) == (death["queue"], death["reason"]):
            death = {**each, "count": each["count"] + 1}
        else:
            others.append(each)
    return [death, *others]
