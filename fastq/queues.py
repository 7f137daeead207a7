"""Queues as Celery declares them on RabbitMQ, so that both can use the same ones. Data and settings only, no I/O.

Celery's rule: a durable queue, bound with its own name to a durable direct exchange of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
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
#: Options of a queue under the name of QueueSpec's field, and of the exchange that it is bound to.
PLAIN_OPTIONS = (
    *("exchange", "exchange_type", "routing_key", "durable", "auto_delete", "exclusive", "no_declare", "alias"),
    *("exchange_durable", "exchange_auto_delete", "exchange_passive", "exchange_no_declare"),
    *("exchange_arguments", "binding_arguments", "consumer_arguments"),
)
#: An option that says nothing to the broker: whether a worker reads the queue when it is not told which ones to read.
CONSUME = "consume"

DIRECT_EXCHANGE = "C.dq2"
DIRECT_SUFFIX = ".dq2"


@dataclass(frozen=True)
class Binding:
    """One way into a queue: an exchange, how that is declared, and the key and arguments of the binding."""

    exchange: str
    routing_key: str = ""
    exchange_type: str = "direct"
    exchange_durable: bool = True
    exchange_auto_delete: bool = False
    exchange_passive: bool = False
    exchange_no_declare: bool = False
    exchange_arguments: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def steps(self, queue: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the methods that make the exchange, unless it is the broker's own or not ours to make, and bind."""
        if not self.exchange:
            return
        if not self.exchange_no_declare and not self.exchange.startswith("amq."):
            yield (
                "exchange.declare",
                {
                    "exchange": self.exchange,
                    "type": self.exchange_type,
                    "passive": self.exchange_passive,
                    "durable": self.exchange_durable,
                    "auto_delete": self.exchange_auto_delete,
                    "arguments": self.exchange_arguments,
                },
            )
        yield (
            "queue.bind",
            {
                "queue": queue,
                "exchange": self.exchange,
                "routing_key": self.routing_key,
                "arguments": self.arguments,
            },
        )


@dataclass(frozen=True)
class QueueSpec:
    """A queue, the exchange that feeds it, and the bindings between them.

    ``bindings`` are ways in beside the one of ``exchange`` and ``routing_key``; an empty ``exchange`` is none.
    """

    name: str
    exchange: str
    routing_key: str
    exchange_type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    no_declare: bool = False
    alias: str = ""
    exchange_durable: bool | None = None  # None: as the queue
    exchange_auto_delete: bool = False
    exchange_passive: bool = False
    exchange_no_declare: bool = False
    exchange_arguments: dict[str, Any] = field(default_factory=dict)
    binding_arguments: dict[str, Any] = field(default_factory=dict)
    consumer_arguments: dict[str, Any] = field(default_factory=dict)
    bindings: tuple[Binding, ...] = ()

    @property
    def all_bindings(self) -> tuple[Binding, ...]:
        """Every way into the queue, the one of ``exchange`` first."""
        if not self.exchange:
            return self.bindings
        first = Binding(
            self.exchange,
            self.routing_key,
            self.exchange_type,
            exchange_durable=self.durable if self.exchange_durable is None else self.exchange_durable,
            exchange_auto_delete=self.exchange_auto_delete,
            exchange_passive=self.exchange_passive,
            exchange_no_declare=self.exchange_no_declare,
            exchange_arguments=self.exchange_arguments,
            arguments=self.binding_arguments,
        )
        return (first, *self.bindings)

    @property
    def is_lasting(self) -> bool:
        """Whether a subscription is not to be given up: with it goes its place, or the order of the messages."""
        return bool(self.arguments.get("x-single-active-consumer")) or self.arguments.get("x-queue-type") == "stream"

    @property
    def needs_consumer(self) -> bool:
        """Whether it is to have a subscription at every moment: else it is deleted, or others come first."""
        return self.auto_delete or "x-priority" in self.consumer_arguments

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the methods that create it, each with its fields; each is answered by the method with ``-ok``."""
        if self.no_declare:
            return
        yield (
            "queue.declare",
            {
                "queue": self.name,
                "durable": self.durable,
                "exclusive": self.exclusive,
                "auto_delete": self.auto_delete,
                "arguments": self.arguments,
            },
        )
        for binding in self.all_bindings:
            yield from binding.steps(self.name)


class Topology:
    """How each queue is to be declared: as ``task_queues`` says, else in Celery's way with the default queue type."""

    def __init__(self, settings: Settings) -> None:
        self._type = settings.task_default_queue_type
        self._missing_type = settings.task_create_missing_queue_type or self._type
        self._missing_exchange_type = settings.task_create_missing_queue_exchange_type or "direct"
        self._max_priority = settings.task_queue_max_priority
        self._has_direct = settings.worker_direct
        self.create_missing: bool = settings.task_create_missing_queues
        self._default: str = settings.task_default_queue
        self._specs = {
            name: self._spec(name, options, self._type) for name, options in named_options(settings.task_queues)
        }
        self._aliases = {spec.alias: spec for spec in self._specs.values() if spec.alias}

    def spec(self, name: str) -> QueueSpec:
        """Return how to declare a queue, given its name or its alias."""
        declared = self._aliases.get(name) or self._specs.get(name)
        if declared is not None:
            return declared
        if self._is_direct(name):
            return QueueSpec(name, DIRECT_EXCHANGE, name.removesuffix(DIRECT_SUFFIX))
        if name == self._default:
            return self._spec(name, {}, self._type)
        return self._spec(name, {"exchange_type": self._missing_exchange_type}, self._missing_type)

    def spec_of(self, options: Mapping[str, Any]) -> QueueSpec:
        """Return how to declare a queue that is described as an entry of ``task_queues`` is."""
        [(name, others)] = named_options([options])
        return self._spec(name, others, self._type)

    @property
    def has_quorum_queues(self) -> bool:
        """Whether one of the queues that the settings name is a quorum queue, or each that they do not name."""
        return self._type == "quorum" or any(
            spec.arguments.get("x-queue-type") == "quorum" for spec in self._specs.values()
        )

    def may_create(self, name: str) -> bool:
        """Whether a queue is to be created when it is used and missing."""
        return self.create_missing or name in self._specs or name == self._default or self._is_direct(name)

    def _is_direct(self, name: str) -> bool:
        return self._has_direct and name.endswith(DIRECT_SUFFIX)

    def _spec(self, name: str, options: Mapping[str, Any], queue_type: str) -> QueueSpec:
        known = {*ARGUMENTS, *PLAIN_OPTIONS, "arguments", "queue_arguments", "bindings", CONSUME}
        if unknown := sorted(set(options) - known):
            raise SettingsError(f"task_queues: {name!r} has the unknown option {unknown[0]!r}; known: {sorted(known)}")
        arguments = {ARGUMENTS[key]: value for key, value in options.items() if key in ARGUMENTS}
        arguments |= options.get("queue_arguments") or options.get("arguments") or {}
        # As Celery does: an explicit "classic" would be an argument that queues declared without one do not have.
        if queue_type != "classic":
            arguments.setdefault("x-queue-type", queue_type)
        if self._max_priority is not None:
            arguments.setdefault("x-max-priority", self._max_priority)
        said = {key: options[key] for key in PLAIN_OPTIONS if options.get(key) is not None}
        bindings = tuple(_binding(name, each) for each in options.get("bindings") or ())
        return QueueSpec(
            name,
            exchange=said.pop("exchange", "" if bindings else name),
            routing_key=said.pop("routing_key", name),
            arguments=arguments,
            bindings=bindings,
            **said,
        )


def _binding(queue: str, options: Mapping[str, Any]) -> Binding:
    known = {each.name for each in fields(Binding)}
    if unknown := sorted(set(options) - known):
        raise SettingsError(
            f"task_queues: a binding of {queue!r} has the unknown option {unknown[0]!r}; known: {sorted(known)}"
        )
    if "exchange" not in options:
        raise SettingsError(f"task_queues: a binding of {queue!r} names no exchange: {dict(options)!r}")
    return Binding(**{key: value for key, value in options.items() if value is not None})


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


def read_by_default(queues: Any) -> Iterator[str]:
    """Yield the names in a ``task_queues`` setting, without those that a worker reads only when it is told to."""
    yield from (name for name, options in named_options(queues) if options.get(CONSUME, True))


def names_by_alias(queues: Any) -> dict[str, str]:
    """Return the names of the queues in a ``task_queues`` setting that have another one, by that one."""
    return {str(options["alias"]): name for name, options in named_options(queues) if options.get("alias")}


def direct_queue(hostname: str) -> str:
    """Return the name of a worker's own queue (``worker_direct``), bound to Celery's exchange for such queues."""
    return f"{hostname}{DIRECT_SUFFIX}"
