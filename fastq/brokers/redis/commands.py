"""Messages as Redis commands: to a queue's list, through an exchange's bindings, or to whoever listens. No I/O.

Source: kombu 5.7, ``basic_publish``, ``_put`` and ``_put_fanout`` of its Redis transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastq.errors import PublishError, RedisError
from fastq.queues import QueueSpec, Topology, named_options
from fastq.wire.ids import new_id
from fastq.wire.kombu import encode_envelope, encode_push

if TYPE_CHECKING:
    from fastq.brokers.redis.layout import Layout
    from fastq.brokers.redis.login import Command
    from fastq.settings import Settings
    from fastq.wire.message import Message


def to_envelope(message: Message) -> bytes:
    """Return what kombu would put into a list for this message. Raises EncodeError."""
    return encode_envelope(message.exchange, message.routing_key, message.props, message.body, new_id())


def push_command(layout: Layout, message: Message) -> bytes:
    """Return the packed command that sends a message to the queue that its routing key names. Raises EncodeError."""
    return encode_push(layout.list_of(message.routing_key, message.priority), message, new_id())


def fanouts_of(settings: Settings, topology: Topology) -> frozenset[str]:
    """Return the exchanges that are declared as fanout."""
    specs = (topology.spec(name) for name, _ in named_options(settings.task_queues))
    return frozenset(spec.exchange for spec in specs if spec.exchange_type == "fanout")


def bind_commands(layout: Layout, spec: QueueSpec) -> list[Command]:
    """Return the commands that let producers find a queue by its exchange."""
    if not spec.exchange:
        return []
    member = layout.binding(spec.name, spec.routing_key, spec.exchange_type)
    places = (layout.bindings_of(spec.exchange), layout.lasting_bindings_of(spec.exchange))
    return [("SADD", place, member) for place in places]


def routed(layout: Layout, message: Message, members: Sequence[bytes]) -> list[Command]:
    """Return the commands that send a message through an exchange with these bindings. Raises PublishError."""
    queues = layout.queues_for(members, message.routing_key)
    if not queues:
        raise PublishError(
            f"not published: exchange {message.exchange!r} has no queue for routing key {message.routing_key!r}. "
            "Declare it, or start a worker for it"
        )
    envelope = to_envelope(message)
    return [("LPUSH", layout.list_of(queue, message.priority), envelope) for queue in queues]


def fanout_command(layout: Layout, message: Message) -> Command:
    """Return the command that sends a message to everybody who listens to a fanout exchange now."""
    return ("PUBLISH", layout.channel(message.exchange, message.routing_key), to_envelope(message))


def refused(error: RedisError) -> PublishError:
    """Return the error for messages that Redis did not take."""
    remedy = {
        "OOM": "It is full: raise maxmemory, or let workers drain the queues",
        "WRONGTYPE": "A key of the queue's name holds something else: choose another queue name or database",
        "NOPERM": "Allow the URL's user to write to the queues",
    }.get(error.code, "See the server's log")
    return PublishError(f"not published: Redis answered {error}. {remedy}")


def check(replies: list[Any]) -> list[Any]:
    """Return the replies. Raises the first RedisError among them."""
    if RedisError in set(map(type, replies)):
        raise next(reply for reply in replies if isinstance(reply, RedisError))
    return replies
