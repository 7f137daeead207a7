"""Queues in which messages wait for their time on RabbitMQ, so that a worker need not hold them. Data only, no I/O.

A message in a queue of that kind goes back, after the span of the queue, to the queue that it came from. The spans are
powers of two: what is due in an hour waits 2,048 s, is looked at by a worker, waits 1,024 s, and so on; the last
seconds it waits in a worker. In each queue all messages wait equally long, as RabbitMQ only looks at the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastq.wire.message import Message

#: Exchange and queue of a span are named so, followed by its seconds.
PREFIX = "fastq.delayed."
#: Chosen: what comes back has so long to go. Thousands at once take RabbitMQ and the worker up to a second.
SPARE_S = 2.0
LONGEST_S = 1 << 22  # 48 days; RabbitMQ takes times to live below 2**32 ms


class DelayQueues:
    """The spans of one connection: those that are known to exist, and those that were asked for."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.asked: set[int] = set()

    def span(self, delay_s: float) -> int | None:
        """Return the longest span, in seconds, that is over a little before the delay; None when that is too short."""
        whole = min(int(delay_s - SPARE_S), LONGEST_S)
        return 1 << (whole.bit_length() - 1) if whole > 0 else None

    def steps(self, seconds: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the methods that create the queue of a span, each with its fields."""
        name = f"{PREFIX}{seconds}"
        # Back by the default exchange: under the message's own routing key, which is its queue's name.
        arguments = {"x-message-ttl": seconds * 1000, "x-dead-letter-exchange": ""}
        yield "exchange.declare", {"exchange": name, "type": "fanout", "durable": True}
        yield "queue.declare", {"queue": name, "durable": True, "arguments": arguments}
        yield "queue.bind", {"queue": name, "exchange": name, "routing_key": ""}

    def message(self, found: Mapping[str, Any], queue: str, seconds: int) -> Message:
        """Return the copy of a delivery that comes back to its queue after the span."""
        return Message(f"{PREFIX}{seconds}", queue, found["props"], found["body"], found["id"])
