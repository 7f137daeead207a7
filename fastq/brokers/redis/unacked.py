"""Taken messages in Redis: forgotten when they are done, moved back to their queues, or to their dead letters, or put
away until nearer their time. Each moves in one step: it is never in two places, and never in none.

Nothing here knows whether the one who took a message is a fastq or a Celery worker, or alive.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fastq.brokers.redis import scripts
from fastq.brokers.redis.digests import run_script
from fastq.brokers.redis.records import Record, read_record
from fastq.brokers.redis.replies import CLAIM_BYTES, longest_envelope
from fastq.wire.message import Message

if TYPE_CHECKING:
    from fastq.brokers.redis.aio import AsyncRedis
    from fastq.brokers.redis.layout import Layout

CHUNK: Final = 50  # chosen: messages that are read and written in one step when they go back
#: An envelope and the lists that it goes to.
Placed: TypeAlias = "tuple[bytes, list[str]]"

#: Exchange of what is no message to send but one that is taken, and is to wait in Redis: the routing key is the list it
#: goes back to, the body its field.
POSTPONED: Final = "fastq.delayed"
AHEAD_S: Final = 5  # chosen: less than what is worth postponing, more than the time between two looks
BROUGHT_BACK: Final = 500  # chosen: messages that one call brings back, as the server does nothing else meanwhile

FIELDS: Final = 1000  # chosen: fields in one call; Lua takes up to 8,000 values
SCRIPTS: Final = (
    scripts.CLAIM,
    scripts.SETTLE,
    scripts.READ,
    scripts.MOVE,
    scripts.POSTPONE,
    scripts.BRING_BACK,
    scripts.RENEW,
)


class Unacked:
    """The taken messages of one database."""

    def __init__(self, redis: AsyncRedis, layout: Layout, max_message_bytes: int) -> None:
        self._redis = redis
        self._layout = layout
        self._longest = longest_envelope(max_message_bytes)
        self._keys = (layout.unacked, layout.unacked_index)

    async def load_scripts(self) -> None:
        """Make the scripts known to the server. Raises RedisError where it runs none."""
        for text in SCRIPTS:
            await self._redis.call("SCRIPT", "LOAD", text)

    def settle(self, fields: Sequence[str], done: Callable[[list[Any]], None]) -> None:
        """Forget messages; ``done`` gets how many of each thousand were still there."""
        self._redis.send(
            [run_script(scripts.SETTLE, self._keys, *fields[at : at + FIELDS]) for at in range(0, len(fields), FIELDS)],
            done,
        )

    def postpone(self, orders: Sequence[Message], done: Callable[[list[Any]], None]) -> None:
        """Put messages away until nearer their time; ``done`` gets how many were still there."""
        arguments: list[str | bytes | float] = []
        for order in orders:
            arguments += [order.body, order.routing_key, f"{order.due:.6f}"]
        keys = (*self._keys, self._layout.schedule)
        self._redis.send([run_script(scripts.POSTPONE, keys, *arguments)], done)

    async def bring_back(self) -> str:
        """Put what is due soon back into its queue; return the key of one that cannot take it, or ""."""
        while True:
            bring_back = run_script(scripts.BRING_BACK, [self._layout.schedule], AHEAD_S, BROUGHT_BACK)
            moved, broken = self._redis.expect(await self._redis.call(*bring_back), [int, bytes])
            if moved < BROUGHT_BACK:
                return str(broken, "utf-8", "replace")

    async def give_back(self, fields: Sequence[str], counted: bool) -> int:
        """Put messages back where they will be taken next, the last one first; return how many were still there.

        ``counted``: this delivery counts, and the next one is marked as another. Raises ConnectionLost or RedisError.
        """

        async def place(record: Record) -> Placed:
            return record.redelivered() if counted else record.envelope, await self._lists_of(record)

        return await self._move("RPUSH", fields, place)

    async def bury(self, fields: Sequence[str], reason: str) -> int:
        """Move messages to the dead letters of their queues, the first one first; return how many were still there."""

        async def place(record: Record) -> Placed:
            return record.rejected(reason), [self._layout.dead_letters_of(record.routing_key)]

        return await self._move("LPUSH", fields, place)

    async def fields_of(self, owner: str) -> list[str]:
        """Return the fields of all messages that an owner has taken, the last one first."""
        cursor, numbers = b"0", set[int]()
        while True:
            scan = ("ZSCAN", self._layout.unacked_index, cursor, "MATCH", f"{owner}:*", "COUNT", 1000)
            cursor, found = self._redis.expect(await self._redis.call(*scan), [bytes, [bytes, ...]])
            numbers.update(int(field.rpartition(b":")[2]) for field in found[::2])
            if cursor == b"0":
                return [f"{owner}:{number}" for number in sorted(numbers, reverse=True)]

    async def _move(self, command: str, fields: Sequence[str], place: Callable[[Record], Awaitable[Placed]]) -> int:
        moved = at = 0
        while at < len(fields):
            read = run_script(scripts.READ, self._keys[:1], CLAIM_BYTES, self._longest, *fields[at : at + CHUNK])
            values = self._redis.expect(await self._redis.call(*read), [(bytes, type(None)), ...])
            chunk = fields[at : at + len(values)]
            at += max(len(values), 1)
            arguments: list[str | bytes | int] = []
            for field, value in zip(chunk, values, strict=True):
                envelope, lists = (b"", []) if value is None else await place(read_record(value))
                arguments += [field, envelope, len(lists), *lists]
            move = run_script(scripts.MOVE, self._keys, command, *arguments)
            moved += self._redis.expect(await self._redis.call(*move), int)
        return moved

    async def _lists_of(self, record: Record) -> list[str]:
        """Return the lists that a message goes back to; a Celery worker's may have come through an exchange."""
        queues = [record.routing_key]
        if record.exchange:
            members = await self._redis.call("SMEMBERS", self._layout.bindings_of(record.exchange))
            bindings = self._redis.expect(members, [bytes, ...])
            queues = self._layout.queues_for(bindings, record.routing_key)
        return [self._layout.list_of(queue, record.priority) for queue in queues]
