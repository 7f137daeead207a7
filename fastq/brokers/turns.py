"""What a broker whose client blocks does for a worker: everything in turns, in one thread. ``pulling`` has the thread.

A turn saves results, publishes follow-ups, settles and takes messages, in this order. Derive from ``Turns``, and lend
them to a ``pulling.PullingConsumer``: nothing of it is to know of loops and threads.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from fastq.errors import ConnectionLost
from fastq.interfaces import SaveItem
from fastq.net.waker import Waker

if TYPE_CHECKING:
    from fastq.wire.message import Message

#: A delivery as the core takes it: tag, queue, props, body, how often it was handed out (this time included).
Row: TypeAlias = tuple[int, bytes, bytes, bytes, int]

LOOK_EVERY_S: Final = 1.0  # chosen: what asking costs nearly nothing, and nobody minds to wait for


class TurnFailed(ConnectionLost):
    """Nothing of a turn has happened, and the same one may succeed later on the same connection."""


@dataclass(slots=True)
class Work:
    """What the loop has handed over and no turn has stored yet."""

    saves: list[SaveItem] = field(default_factory=list)
    #: (token for the confirmation, message)
    messages: list[tuple[int, Message]] = field(default_factory=list)
    #: (tag of the delivery, what becomes of it: a verdict of ``fastq.link``)
    verdicts: list[tuple[int, int]] = field(default_factory=list)
    #: The tags of those that are rejected, by reason.
    rejected: list[tuple[str, list[int]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.saves or self.messages or self.verdicts)

    def add(self, more: Work) -> None:
        """Append what was handed over later."""
        self.saves += more.saves
        self.messages += more.messages
        self.verdicts += more.verdicts
        self.rejected += more.rejected

    def tags(self, verdict: int) -> list[int]:
        """Return the tags of the deliveries with this verdict."""
        return [tag for tag, each in self.verdicts if each == verdict]

    def tokens(self) -> list[int]:
        """Return the tokens of all that is to be confirmed."""
        return [item[4] for item in self.saves if item[4]] + [token for token, _ in self.messages]


class Room(NamedTuple):
    """How much may be taken: none after the message with which there are so many, or ``size`` bytes."""

    messages: int = 0
    size: float = 0.0

    def __bool__(self) -> bool:
        return self.messages > 0 and self.size > 0

    def after(self, rows: Sequence[Row]) -> Room:
        """Return what is left when these are taken."""
        return Room(self.messages - len(rows), self.size - sum(map(size_of, rows)))


@dataclass(slots=True)
class Outcome:
    """What a turn has to tell."""

    rows: list[Row] = field(default_factory=list)
    #: Tokens of what is stored now; a message that never will be is refused instead, for a reason.
    stored: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    refusal: str = ""
    #: When the next turn is to be if nothing calls for one before. 0: there may be more to take at once.
    next_look_s: float = LOOK_EVERY_S


def size_of(row: Row) -> int:
    """Return how many bytes a delivery holds."""
    return len(row[2]) + len(row[3])


def due_of(message: Message) -> float:
    """Return when a message is to come out of its queue (unix time); 0: as soon as it can.

    One that expires before its ETA comes when it expires: the worker is to say so, and not as late as it was to run.
    """
    due = message.due or 0.0
    return due if message.expires is None else min(due, message.expires)


class Turns:
    """What a broker does, all of it in the one thread. Only ``turn`` has to be written.

    Who raises TurnFailed is given the same work again, with what has come meanwhile. Who cannot take back what is half
    done raises ConnectionLost: the worker opens another connection and sends again what was not confirmed.
    """

    thread_name = "fastq-broker"
    logger = logging.getLogger("fastq.pulling")

    def __init__(self, place: str) -> None:
        #: Names the broker in logs: no passwords.
        self.place = place
        self.waker = Waker()
        self._waking = select.poll()
        self._waking.register(self.waker, select.POLLIN)

    def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""

    def enter(self, name: str, queues: Sequence[str]) -> None:
        """Create the queues that are missing and take messages from these from now on, for the worker of that name."""

    def turn(self, work: Work, room: Room) -> Outcome:
        """Store all of the work, then take messages if there is room."""
        raise NotImplementedError

    def leave(self, work: Work) -> Outcome:
        """Store everything, then give back what is not settled: the last turn, repeated as others when it fails."""
        return self.turn(work, Room())

    def close(self) -> None:
        """Let go of the connection; also after an error."""

    def wait(self, timeout_s: float, wants: bool) -> None:
        """Return after ``wake``, when the time is up, or when there may be messages and they are wanted.

        Derive it where a broker tells of new messages; until then ``next_look_s`` says how often to ask.
        """
        if self._waking.poll(timeout_s * 1000):
            self.waker.clear()

    def wake(self) -> None:
        """Have ``wait`` return, this time or the next. From any thread."""
        self.waker.wake()
