"""RabbitMQ's answers to messages: which are still due, what went wrong, and what is to be sent again. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost, PublishError
from fastq.wire.amqp import METHODS, decode_method
from fastq.wire.frames import publish_frames

if TYPE_CHECKING:
    from fastq.wire.message import Message

CHANNEL = 1
BASIC_ACK, BASIC_NACK, BASIC_RETURN = METHODS["basic.ack"], METHODS["basic.nack"], METHODS["basic.return"]
WINDOW = 512  # chosen: messages under way before the oldest are waited for; their confirms fit any socket buffer
WINDOW_BYTES = 1 << 20


class Publishing(Protocol):
    """A connection that messages are published on."""

    @property
    def url(self) -> AmqpUrl:
        """The broker."""

    @property
    def blocked(self) -> str | None:
        """Why the broker takes no messages, None when it does."""

    @property
    def declared(self) -> set[str]:
        """Queues that are known to be there."""

    #: How many messages were published.
    published: int


class Confirms:
    """The broker's answers to a run of messages: which are still due, and what went wrong."""

    def __init__(self, connection: Publishing, messages: Sequence[Message]) -> None:
        self.connection: Publishing = connection
        self.due: set[int] = set()
        self.unroutable: list[str] = []
        self._messages = messages
        self._tags: list[int] = []  # of the messages that were sent, in their order
        self._refused: set[int] = set()  # tags
        self._returned: set[bytes] = set()  # properties

    def expect(self, count: int) -> range:
        """Count messages that are sent now and return their tags; the broker numbers them the same way."""
        first = self.connection.published + 1
        self.connection.published += count
        tags = range(first, first + count)
        self.expect_tags(tags)
        return tags

    def expect_tags(self, tags: Iterable[int]) -> None:
        """Count messages that are sent with these tags."""
        self._tags += tags
        self.due.update(tags)

    @property
    def sent(self) -> int:
        """How many have been sent."""
        return len(self._tags)

    def again(self) -> list[Message]:
        """Return what the broker has not confirmed, or had no place for; and what was not sent."""
        bad = self.due | self._refused
        return [
            message
            for message, tag in zip_longest(self._messages, self._tags)
            if tag is None or tag in bad or message.props in self._returned
        ]

    def settle(self, tag: int, is_stored: bool) -> None:
        """Count the confirm of a message, or its refusal."""
        self.due.discard(tag)
        if not is_stored:
            self._refused.add(tag)

    def give_back(self, arguments: bytes, props: bytes) -> None:
        """Count a returned message, by the arguments of basic.return and the message's properties."""
        _, fields = decode_method(BASIC_RETURN, arguments)
        self.unroutable.append(f"{fields['exchange']}/{fields['routing_key']}".lstrip("/"))
        self._returned.add(props)

    def late(self) -> PublishError:
        """Return the error for confirms that did not come in time."""
        due = len(self.due)
        return not_confirmed(self.connection, self.sent - due, due, len(self._messages) - self.sent)

    def check(self) -> None:
        """Raise PublishError when the broker refused or returned a message."""
        where = f"RabbitMQ at {self.connection.url}"
        if self.unroutable:
            # The next try declares them again.
            self.connection.declared.difference_update(self.unroutable)
            names = ", ".join(sorted(set(self.unroutable)))
            raise PublishError(
                f"{where} has no queue for {len(self.unroutable)} message(s) to {names}. "
                "Declare it, start a worker for it, or set task_create_missing_queues = True",
                again=self.again(),
            )
        if self._refused:
            raise PublishError(
                f"{where} refused {len(self._refused)} message(s): a queue is full (x-overflow) or has failed",
                again=self.again(),
            )


def read_confirm(method_id: int, arguments: bytes) -> tuple[int, bool]:
    """Return the tag of a basic.ack or basic.nack, and whether it is for all up to it. Raises RemoteProtocolError."""
    if len(arguments) != 9:
        fields = decode_method(method_id, arguments)[1]
        return fields["delivery_tag"], fields["multiple"]
    return int.from_bytes(arguments[:8], "big"), arguments[8] & 1 == 1


def windows(messages: Sequence[Message], frame_max: int, mandatory: bool) -> Iterator[tuple[int, bytes]]:
    """Yield the messages as frames, in pieces to be sent at once: (how many messages, bytes)."""
    parts: list[bytes] = []
    size = 0
    for message in messages:
        parts.append(publish_frames(CHANNEL, message, frame_max, mandatory))
        size += len(parts[-1])
        if len(parts) == WINDOW or size >= WINDOW_BYTES:
            yield len(parts), b"".join(parts)
            parts, size = [], 0
    if parts:
        yield len(parts), b"".join(parts)


def blocked(connection: Publishing) -> PublishError:
    """Return the error for a broker that takes no messages."""
    return PublishError(
        f"RabbitMQ at {connection.url} blocks publishers ({connection.blocked}) for longer than fastq_publish_timeout. "
        "Free its memory or disk, or let workers drain the queues"
    )


def not_confirmed(connection: Publishing, confirmed: int, due: int, unsent: int) -> PublishError:
    """Return the error for confirms that did not come in time: how many came, how many are due, what was not sent."""
    if connection.blocked is not None:
        why = f"RabbitMQ at {connection.url} blocks publishers ({connection.blocked}) and"
    else:
        why = f"RabbitMQ at {connection.url}"
    known = [f"{confirmed} were confirmed before"] if confirmed else []
    known += [f"{unsent} were not sent"] if unsent else []
    return PublishError(
        f"{why} did not confirm {due} message(s) within fastq_publish_timeout; they may still arrive, so they are not "
        f"sent again{''.join(f'; {each}' for each in known)}. Raise fastq_publish_timeout if the broker is only slow",
        again=(),
    )


def unknown_fate(error: ConnectionLost, again: Sequence[Message] | None = None) -> PublishError:
    """Return the error for a connection lost between sending and confirm; ``again``: what was not confirmed, or all."""
    return PublishError(f"{error}; what was just sent may or may not have been stored", again=again)
