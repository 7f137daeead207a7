"""Headers that brokers add to messages, and what stands in for them where a broker adds none. Names only."""

from __future__ import annotations

from typing import Final

#: How often a message had been handed out when it went back; RabbitMQ's name for it, which the core knows.
DELIVERY_COUNT: Final = "x-delivery-count"

#: Of a dead letter: the task, its id, and why it is there.
REJECTED: Final = "x-rejected"
