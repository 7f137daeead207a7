"""The processes of the pool and the places that they take calls in, as the supervisor keeps them. Decides nothing."""

from __future__ import annotations

import asyncio
import select
import time
from dataclasses import dataclass
from socket import socket

from fastq._child import Child
from fastq.pool.titles import process_name
from fastq.wire.pipe import RingReader


@dataclass(eq=False, slots=True)
class Member:
    """One process of the pool, from the request to fork it to the report of its end.

    ``number`` is at first the lowest that no living one has or was born with. Where a spare takes its slot, it becomes
    one below the pool's size that nobody else has who runs calls; the one that it replaces may still be about to end.
    """

    number: int
    born: int
    calls: str = "one"
    child: Child | None = None
    pid: int = 0
    is_ready: bool = False
    is_leaving: bool = False  # it was asked to end
    since: float = 0.0  # when it was asked for, then when it was forked
    sock: socket | None = None
    reader: RingReader | None = None
    pidfd: int = -1
    timer: asyncio.TimerHandle | None = None  # for a start or an end that takes too long

    @property
    def title(self) -> str:
        """Return what the log calls it."""
        name = process_name(self.number + 1, self.calls)
        return f"Process {name!r}" + (f" pid:{self.pid}" if self.pid else "")

    def set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        """Watch over something else from now on, or over nothing."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one running call at a time."""

    member: Member | None = None
    #: The member has finished all it may run: a spare takes its place as soon as one is ready.
    is_due: bool = False


def lives(member: Member) -> bool:
    """Whether the process has not ended."""
    return not wait_for_end(member, 0)


def wait_for_end(member: Member, until: float) -> bool:
    """Return whether the process has ended, at that time by the monotonic clock at the latest."""
    if member.pidfd < 0:
        return True
    poll = select.poll()
    poll.register(member.pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


def worth(slot: Slot) -> tuple[int, int]:
    """Return what would be lost with the slot: nothing, a child that is ready, or one that is at work.

    And among those the lowest number, so that as a rule those that stay have the numbers of slots.
    """
    if slot.member is None or slot.member.child is None or slot.is_due:
        return 0, 0
    return 2 if slot.member.child.busy else 1, -slot.member.number
