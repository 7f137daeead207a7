"""Queues as Celery declares them on RabbitMQ, so that both can use the same ones. Data and settings only, no I/O.

Celery's rule: a durable queue, bound with its own name to a durable direct exchange of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.settings import Settings

# Our words for the arguments that are used most.
ARGUMENTS = {
    "queue_type": "x-queue-type",
    "max_priority": "x-max-priority",
    "dead_letter_exchange": "x-dead-letter-exchange",
    "dead_letter_routing_key": "x-dead-letter-routing-key",
    "message_ttl_ms": "x-message-ttl",
    "max_length": "x-max-length",
}
PLAIN_OPTIONS = ("exchange", "exchange_type", "routing_key", "durable", "auto_delete")


@dataclass(frozen=True)
class QueueSpec:
    """A queue, the exchange that feeds it, and the binding between them."""

    name: str
    exchange: str
    routing_key: str
    exchange_type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the methods that create it, each with its fields; each is answered by the method with ``-ok``."""
        yield (
            "queue.declare",
            {"queue": self.name, "durable": self.durable, "auto_delete": self.auto_delete, "arguments": self.arguments},
        )
        if not self.exchange:
            return
        yield "exchange.declare", {"exchange": self.exchange, "type": self.exchange_type, "durable": self.durable}
        yield "queue.bind", {"queue": self.name, "exchange": self.exchange, "routing_key": self.routing_key}


class Topology:
    """How each queue is to be declared: as ``task_queues`` says, else in Celery's way with the default queue type."""

    def __init__(self, settings: Settings) -> None:
        self._type = settings.task_default_queue_type
        self._max_priority = settings.task_queue_max_priority
        self.create_missing: bool = settings.task_create_missing_queues
        self._specs = {name: self._spec(name, options) for name, options in named_options(settings.task_queues)}
        self._default: str = settings.task_default_queue

    def spec(self, name: str) -> QueueSpec:
        """Return how to declare a queue."""
        return self._specs.get(name) or self._spec(name, {})

    def may_create(self, name: str) -> bool:
        """Whether a queue is to be created when it is used and missing."""
        return self.create_missing or name in self._specs or name == self._default

    def _spec(self, name: str, options: Mapping[str, Any]) -> QueueSpec:
        known = {*ARGUMENTS, *PLAIN_OPTIONS, "arguments", "queue_arguments"}
        if unknown := sorted(set(options) - known):
            raise SettingsError(f"task_queues: {name!r} has the unknown option {unknown[0]!r}; known: {sorted(known)}")
        arguments = {ARGUMENTS[key]: value for key, value in options.items() if key in ARGUMENTS}
        arguments |= options.get("queue_arguments") or options.get("arguments") or {}
        # As Celery does: an explicit "classic" would be an argument that queues declared without one do not have.
        if self._type != "classic":
            arguments.setdefault("x-queue-type", self._type)
        if self._max_priority is not None:
            arguments.setdefault("x-max-priority", self._max_priority)
        return QueueSpec(
            name,
            exchange=options.get("exchange", name),
            routing_key=options.get("routing_key", name),
            exchange_type=options.get("exchange_type", "direct"),
            durable=options.get("durable", True),
            auto_delete=options.get("auto_delete", False),
            arguments=arguments,
        )


def named_options(queues: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, options) of a ``task_queues`` setting: names, dicts with ``name``, or a dict of name to options."""
    if isinstance(queues, Mapping):
        yield from ((str(name), dict(options or {})) for name, options in queues.items())
        return
    if isinstance(queues, str) or not isinstance(queues, Iterable):
        queues = [] if queues is None else [queues]
    for entry in queues:
        if isinstance(entry, Mapping) and "name" in entry:
            yield str(entry["name"]), {key: value for key, value in entry.items() if key != "name"}
        elif isinstance(entry, str):
            yield entry, {}
        else:
            raise SettingsError(f"task_queues: {entry!r} is neither a queue name nor a dict with 'name'")
