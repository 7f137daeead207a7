"""Results for clients that wait in a queue of the task's own, on RabbitMQ: what to declare and send.

Some clients (celery.node, celery-php) send no address for the reply. They await the result in a queue named after the
task's id, as Celery 3 and 4 filled it with the result store ``amqp://``. Source: the AMQP calls of celery-node 0.5.9
(dist/backends/amqp.js) and of celery-php's connectors.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fastq.errors import SettingsError
from fastq.queues import QueueSpec
from fastq.wire.message import Message, encode_properties

if TYPE_CHECKING:
    from fastq.brokers.rabbitmq.aio import AmqpConnection
    from fastq.settings import Settings

#: celery-php binds its queue to it, and gives up when it does not exist.
RESULT_EXCHANGE = "celeryresults"
MAX_NAME_BYTES = 255  # a short string of AMQP
RESERVED = "amq."  # names that the broker keeps for itself
PERSISTENT = 2


class TaskQueues:
    """How the queue of a task is declared, so that it is equivalent to what the clients declare themselves.

    They differ in one argument, ``x-expires``: it follows ``result_expires`` as it did in Celery. celery-node uses the
    default of a day; celery-php's manual asks for ``result_expires = None``, or its ``result_expire`` must agree.
    """

    def __init__(self, settings: Settings) -> None:
        expires_s = settings.result_expires
        self._arguments: dict[str, Any] = {"x-expires": int(expires_s * 1000)} if expires_s else {}

    def exchange(self) -> tuple[str, dict[str, Any]]:
        """Return the method that creates the exchange, and its fields; once per connection, before a client binds."""
        return "exchange.declare", {"exchange": RESULT_EXCHANGE, "type": "direct", "durable": True}

    def spec(self, task_id: str) -> QueueSpec | None:
        """Return how to declare the queue of a task; None when no queue can have the name.

        A refusal with 406 means that the client was first and declared it in another way: it exists, send to it.
        """
        name = task_id.replace("-", "")
        if not name or name.startswith(RESERVED) or len(name.encode()) > MAX_NAME_BYTES:
            return None
        # It goes with its last consumer. Without one, as with a client that polls, it lives until it expires.
        return QueueSpec(
            name, exchange="", routing_key=name, durable=True, auto_delete=True, arguments=dict(self._arguments)
        )

    def message(
        self,
        spec: QueueSpec,
        task_id: str,
        meta: bytes,
        content_type: str = "application/json",
        encoding: str = "utf-8",
    ) -> Message:
        """Return what to publish once the queue exists. ``meta``: the stored form of a final state.

        Final only: these clients take the first message they find for the result.
        """
        properties = {
            "content_type": content_type,
            "content_encoding": encoding,
            "headers": {},
            "delivery_mode": PERSISTENT,
            "priority": 0,
            "correlation_id": task_id,
        }
        # Without an id, as a reply: when the client has deleted its queue meanwhile, nobody misses it.
        return Message("", spec.name, encode_properties(properties), meta)


class TaskQueueReplies:
    """ReplySaver for such clients (the protocol is ``interfaces.ReplySaver``), over a connection that publishes."""

    def __init__(self, connection: AmqpConnection, settings: Settings) -> None:
        self._connection = connection
        self._queues = TaskQueues(settings)

    async def prepare(self) -> None:
        """Declare the exchange that such clients look for before they wait."""
        with contextlib.suppress(SettingsError):
            await self._connection.declare_steps([self._queues.exchange()])

    async def save(self, task_id: str, meta: bytes) -> None:
        """Publish a result to the queue of the task's own."""
        spec = self._queues.spec(task_id)
        if spec is None:
            return
        # The client may have been first, and have declared it in another way: it exists, that is enough.
        with contextlib.suppress(SettingsError):
            await self._connection.declare(spec)
        self._connection.link.publish([(0, self._queues.message(spec, task_id, meta))])
