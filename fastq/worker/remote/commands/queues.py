"""Commands about the queues that a worker reads."""

from __future__ import annotations

import logging
from typing import Any, Final

from fastq.errors import ConnectionLost, SettingsError
from fastq.queues import QueueSpec, Topology
from fastq.worker.remote.commands.command import Command, ConsumerView, WorkerView, ok

logger = logging.getLogger("fastq.worker")

MAX_NAME_BYTES: Final = 255  # AMQP 0-9-1, shortstr; more than anybody needs with other brokers


def active_queues(view: WorkerView) -> list[dict[str, Any]]:
    """List the task queues a worker is currently consuming from."""
    return [_described(spec) for spec in view.consumer.queue_specs] if view.consumer is not None else []


async def add_consumer(
    view: WorkerView,
    queue: str,
    exchange: str | None = None,
    exchange_type: str | None = None,
    routing_key: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Tell worker(s) to consume from task queue by name."""
    consumer = _connected(view)
    topology = Topology(view.settings)
    names = {"queue": queue, "exchange": exchange, "exchange_type": exchange_type, "routing_key": routing_key}
    for what, name in names.items():
        _check_name(what, name)
    if queue in {spec.name for spec in consumer.queue_specs}:
        return ok(f"add consumer {queue}")
    spec = topology.spec(queue)
    if exchange or routing_key or exchange_type not in (None, "direct"):
        spec = _spec(spec, exchange, exchange_type, routing_key, options)
    await consumer.add_queue(spec)
    logger.info("Started consuming from %s", queue)
    return ok(f"add consumer {queue}")


async def cancel_consumer(view: WorkerView, queue: str, **_: object) -> dict[str, Any]:
    """Tell worker(s) to stop consuming from task queue by name."""
    consumer = _connected(view)
    if queue in {spec.name for spec in consumer.queue_specs}:
        logger.info("Canceling queue %s", queue)
        await consumer.cancel_queue(queue)
    return ok(f"no longer consuming from {queue}")


def _connected(view: WorkerView) -> ConsumerView:
    if view.consumer is None:
        raise ConnectionLost("the broker of the tasks is away; ask again when the worker is connected")
    return view.consumer


def _check_name(what: str, name: object) -> None:
    """Raise SettingsError for what no broker takes as a name; None is none."""
    if name is None:
        return
    if not isinstance(name, str):
        raise SettingsError(f"{what} is {name!r}, not a text")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise SettingsError(f"{what} is {name!r}, which UTF-8 cannot express") from None
    if size > MAX_NAME_BYTES:
        raise SettingsError(f"{what} has {size} bytes; at most {MAX_NAME_BYTES} are allowed: {name[:40]!r}…")


def _spec(
    known: QueueSpec,
    exchange: str | None,
    exchange_type: str | None,
    routing_key: str | None,
    options: dict[str, Any],
) -> QueueSpec:
    return QueueSpec(
        known.name,
        exchange=exchange or known.name,
        exchange_type=exchange_type or "direct",
        routing_key=routing_key or "",
        durable=bool(options.get("durable", known.durable)),
        auto_delete=bool(options.get("auto_delete", known.auto_delete)),
        arguments=dict(options.get("queue_arguments") or known.arguments),
    )


def _described(spec: QueueSpec) -> dict[str, Any]:
    """Return a queue as kombu describes its own; what our queues do not have is None."""
    return {
        "name": spec.name,
        "exchange": {
            "name": spec.exchange,
            "type": spec.exchange_type,
            "arguments": dict(spec.exchange_arguments) or None,
            "durable": spec.durable if spec.exchange_durable is None else spec.exchange_durable,
            "passive": spec.exchange_passive,
            "auto_delete": spec.exchange_auto_delete,
            "delivery_mode": None,
            "no_declare": spec.exchange_no_declare,
        },
        "routing_key": spec.routing_key,
        "queue_arguments": dict(spec.arguments) or None,
        "binding_arguments": dict(spec.binding_arguments) or None,
        "consumer_arguments": dict(spec.consumer_arguments) or None,
        "durable": spec.durable,
        "exclusive": spec.exclusive,
        "auto_delete": spec.auto_delete,
        "no_ack": False,
        "alias": spec.alias or None,
        "bindings": [{"exchange": each.exchange, "routing_key": each.routing_key} for each in spec.bindings],
        "no_declare": spec.no_declare or None,
        "expires": None,
        "message_ttl": None,
        "max_length": None,
        "max_length_bytes": None,
        "max_priority": None,
    }


COMMANDS: Final = (
    Command("inspect", active_queues),
    Command(
        "control",
        add_consumer,
        "<queue> [exchange [type [routing_key]]]",
        arguments=(("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)),
    ),
    Command("control", cancel_consumer, "<queue>", arguments=(("queue", str),)),
)
