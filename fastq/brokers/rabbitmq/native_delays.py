"""The exchanges and queues in which Celery has messages wait for their time when queues are quorum queues. No I/O.

A sender writes the delay in seconds as 28 binary digits in front of the routing key. Each level looks at one digit: a
message waits in the level's queue, 2**level seconds, where it is 1, and goes on at once where it is 0. What has passed
all of them reaches ``celery_delayed_delivery``, and from there the exchange it was meant for.
Source: what Celery 5.7 declares with kombu 5.7, listed on a live RabbitMQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastq.queues import Binding, QueueSpec

LEVELS = 28
DELIVERY_EXCHANGE = "celery_delayed_delivery"

Step = tuple[str, dict[str, Any]]


def level_name(level: int) -> str:
    """Return what exchange and queue of a level are called."""
    return f"celery_delayed_{level}"


def delay_steps(queue_type: str) -> Iterator[Step]:
    """Yield the methods that create all levels, each with its fields. ``queue_type``: "classic" or "quorum"."""
    for level in reversed(range(LEVELS)):
        name = level_name(level)
        yield "exchange.declare", {"exchange": name, "type": "topic", "durable": True}
        arguments = {
            "x-queue-type": queue_type,
            "x-overflow": "reject-publish",
            "x-message-ttl": 2**level * 1000,
            "x-dead-letter-exchange": _next_exchange(level),
        }
        if queue_type == "quorum":
            arguments["x-dead-letter-strategy"] = "at-least-once"
        yield "queue.declare", {"queue": name, "durable": True, "arguments": arguments}
        yield "queue.bind", {"queue": name, "exchange": name, "routing_key": _digit_key(level, "1")}
    yield "exchange.declare", {"exchange": DELIVERY_EXCHANGE, "type": "topic", "durable": True}
    for level in reversed(range(LEVELS)):
        yield (
            "exchange.bind",
            {
                "destination": _next_exchange(level),
                "source": level_name(level),
                "routing_key": _digit_key(level, "0"),
            },
        )


def binding_steps(spec: QueueSpec) -> Iterator[Step]:
    """Yield the methods that lead delayed messages to a declared queue; nothing where Celery has none delayed.

    That is: a direct exchange, which compares the whole routing key, digits and all, and a broadcast, where Celery
    leaves them out.
    """
    if is_broadcast(spec):
        return
    for binding in spec.all_bindings[:1] if spec.exchange else spec.bindings:
        if binding.exchange and binding.exchange_type != "direct":
            yield from _binding_steps(spec.name, binding)


def is_broadcast(spec: QueueSpec) -> bool:
    """Return whether a queue is a worker's own copy of a broadcast, as kombu declares it."""
    return bool(spec.alias) and spec.auto_delete and spec.exchange_type == "fanout"


def _binding_steps(queue: str, binding: Binding) -> Iterator[Step]:
    key = binding.routing_key if binding.routing_key.startswith("#") else f"#.{binding.routing_key}"
    yield (
        "exchange.bind",
        {"destination": binding.exchange, "source": DELIVERY_EXCHANGE, "routing_key": key},
    )
    yield "queue.bind", {"queue": queue, "exchange": binding.exchange, "routing_key": key}


def _next_exchange(level: int) -> str:
    return level_name(level - 1) if level else DELIVERY_EXCHANGE


def _digit_key(level: int, digit: str) -> str:
    return "*." * (LEVELS - 1 - level) + f"{digit}.#"
