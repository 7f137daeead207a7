"""The pool as the main process sees it: slots, the child in each, and replacements ready before they are needed.

It decides which process runs where, never which call. Children are forked by the zygote; their end is reported by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from fastq._child import Child
from fastq._core import Core
from fastq.pool.zygote import Exited, Zygote
from fastq.wire.pipe import SHARED_SIZE, RingReader

#: Respawns of children that died before they were ready, in a row, before the pool gives up.
MAX_FAILED_STARTS = 5


@dataclass(eq=False, slots=True)
class Member:
    """One process of the pool, from the request to fork it to the report of its end."""

    child: Child | None = None
    pid: int = 0
    slot: int = -1  # -1: a spare
    is_ready: bool = False
    sock: socket.socket | None = None
    reader: RingReader | None = None
    pidfd: int = -1


@dataclass(slots=True)
class Slot:
    """A place for one running call at a time."""

    member: Member | None = None
    #: The member has finished all it may run: a spare takes its place as soon as one is ready.
    wants_spare: bool = False


@dataclass(slots=True)
class Pool:
    """Keeps ``concurrency`` slots filled.

    ``on_lost(pid, reason)`` is told of a death nobody asked for, ``on_fatal(text)`` when no child can be had any more.
    """

    loop: asyncio.AbstractEventLoop
    core: Core
    zygote: Zygote
    concurrency: int
    keeps_spare: bool
    on_lost: Callable[[int, str], None]
    on_fatal: Callable[[str], None]
    slots: list[Slot] = field(default_factory=list)
    spares: list[Member] = field(default_factory=list)
    _members: dict[int, Member] = field(default_factory=dict)  # by pid
    _requests: dict[int, Member] = field(default_factory=dict)
    _by_child: dict[Child, Member] = field(default_factory=dict)
    _next_request: int = 1
    _failed_starts: int = 0
    _stopping: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    # --- start and stop

    async def start(self) -> None:
        """Return when every slot has a child that takes calls."""
        self.loop.add_reader(self.zygote.fd, self._on_reports)
        for number in range(self.concurrency):
            slot = Slot()
            self.slots.append(slot)
            slot.member = self._spawn(number)
        if self.keeps_spare:
            self.spares.append(self._spawn(-1))
        await self._ready.wait()

    async def stop(self, deadline_s: float | None) -> None:
        """Ask every child to end after its call; kill what is left at the deadline."""
        self._stopping = True
        for member in list(self._members.values()):
            if member.child is not None:
                member.child.stop()
        if not self._members and not self._requests:
            self._empty.set()
        try:
            await asyncio.wait_for(self._empty.wait(), deadline_s)
        except (TimeoutError, asyncio.TimeoutError):
            self.kill()
            await asyncio.wait_for(self._empty.wait(), 10)

    def kill(self) -> None:
        """Kill every child."""
        self._stopping = True
        for member in self._members.values():
            self._signal(member, signal.SIGKILL)

    def close(self) -> None:
        """End the zygote."""
        self.loop.remove_reader(self.zygote.fd)
        self.zygote.close()

    # --- size

    def grow(self, n: int = 1) -> None:
        """Add slots."""
        for _ in range(n):
            self._add_slot()

    def shrink(self, n: int = 1) -> None:
        """Remove slots; the calls in them are finished first. The last slot stays."""
        for _ in range(min(n, len(self.slots) - 1)):
            self._drop_slot()

    def _add_slot(self) -> None:
        self.concurrency += 1
        slot = Slot()
        self.slots.append(slot)
        slot.member = self._spawn(len(self.slots) - 1)

    def _drop_slot(self) -> None:
        self.concurrency -= 1
        slot = self.slots.pop()
        if slot.member is not None and slot.member.child is not None:
            slot.member.slot = -2
            slot.member.child.stop()

    @property
    def size(self) -> int:
        """Return the number of slots."""
        return len(self.slots)

    @property
    def pids(self) -> list[int]:
        """Process ids by slot."""
        return [slot.member.pid for slot in self.slots if slot.member is not None and slot.member.pid]

    # --- what the core reports

    def child_ready(self, child: Child) -> None:
        """The child takes calls."""
        member = self._by_child[child]
        member.is_ready = True
        self._failed_starts = 0
        if self._stopping:
            child.stop()
        elif member.slot >= 0:
            child.activate()
        else:
            self._use_spares()
        if all(slot.member is not None and slot.member.is_ready for slot in self.slots):
            self._ready.set()

    def child_full(self, child: Child) -> None:
        """The child has been given its last call."""
        if not child.busy:
            self.child_drained(child)

    def child_drained(self, child: Child) -> None:
        """The child has finished its last call: a spare takes its place."""
        member = self._by_child[child]
        child.stop()
        slot = self._slot_of(member)
        if slot is not None and not self._stopping:
            slot.wants_spare = True
            self._use_spares()

    def child_broken(self, child: Child, reason: str) -> None:
        """The child does not make sense any more."""
        self._signal(self._by_child[child], signal.SIGKILL)

    def dump_stack(self, child: Child) -> None:
        """Have the child write the stacks of its threads to the log."""
        self._signal(self._by_child[child], signal.SIGUSR1)

    def terminate(self, child: Child, signum: int) -> None:
        """Send one child a signal of the user's choice."""
        member = self._by_child.get(child)
        if member is not None:
            self._signal(member, signal.Signals(signum))

    def restart(self) -> None:
        """Replace every child; each finishes the call that it runs."""
        for slot in self.slots:
            if slot.member is not None and slot.member.child is not None and not slot.wants_spare:
                slot.member.child.retire()
                self.child_full(slot.member.child)

    def kill_child(self, child: Child) -> None:
        """Kill one child; its slot is filled again."""
        member = self._by_child.get(child)
        if member is not None:
            self._signal(member, signal.SIGKILL)

    # --- spawning

    def _spawn(self, slot: int) -> Member:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        shared = os.memfd_create("fastq-child", os.MFD_CLOEXEC)
        member = Member(slot=slot)
        try:
            os.ftruncate(shared, SHARED_SIZE)
            member.reader = RingReader(shared)
            member.sock = ours
            self._requests[self._next_request] = member
            self.zygote.spawn(self._next_request, slot, theirs.fileno(), shared)
            self._next_request += 1
        finally:
            theirs.close()
            os.close(shared)
        return member

    def _use_spares(self) -> None:
        """Put ready spares where one is wanted and order new ones."""
        for number, slot in enumerate(self.slots):
            if not slot.wants_spare:
                continue
            spare = next((each for each in self.spares if each.is_ready), None)
            if spare is None:
                if not self.spares:
                    self.spares.append(self._spawn(-1))
                return
            self.spares.remove(spare)
            spare.slot, slot.member, slot.wants_spare = number, spare, False
            if self.keeps_spare:
                self.spares.append(self._spawn(-1))
            assert spare.child is not None
            spare.child.activate()

    def _slot_of(self, member: Member) -> Slot | None:
        return next((slot for slot in self.slots if slot.member is member), None)

    def _signal(self, member: Member, signum: signal.Signals) -> None:
        if member.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(member.pidfd, signum)

    # --- reports of the zygote

    def _on_reports(self) -> None:
        try:
            reports = self.zygote.reports()
        except EOFError as error:
            self.loop.remove_reader(self.zygote.fd)
            self.on_fatal(f"{error}; no child can be started any more")
            return
        for report in reports:
            if isinstance(report, Exited):
                self._on_exit(report)
            else:
                self._on_spawned(self._requests.pop(report.request), report.pid)

    def _on_spawned(self, member: Member, pid: int) -> None:
        assert member.reader is not None
        assert member.sock is not None
        member.pid = pid
        self._members[pid] = member
        try:
            member.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it has ended already; the report is on its way
        child = Child(self.core, member.slot, pid, member.reader)
        member.child = child
        self._by_child[child] = member
        self.core.add_child(child)
        # The transport is made on the next turn of the loop; nothing is sent to the child before it reports ready.
        self.loop.create_task(self._connect(child, member.sock))

    async def _connect(self, child: Child, sock: socket.socket) -> None:
        await self.loop.create_unix_connection(lambda: child, sock=sock)

    def _on_exit(self, report: Exited) -> None:
        member = self._members.pop(report.pid, None)
        if member is None:
            return
        if member.pidfd >= 0:
            os.close(member.pidfd)
            member.pidfd = -1  # the core may still find fault with what the child left behind
        slot = self._slot_of(member)
        if member in self.spares:
            self.spares.remove(member)
        expected = self._stopping or slot is None or slot.wants_spare
        if member.child is not None:
            was_retired = member.child.retiring and not member.child.busy
            expected = expected or was_retired
            # Before the core decides about its calls: the replacement is on its way while they are recorded.
            self._replace(member, slot)
            self.core.remove_child(member.child, report.reason)
            del self._by_child[member.child]
        else:
            self._replace(member, slot)
        if not expected:
            self.on_lost(report.pid, report.reason)
        if self._stopping and not self._members and not self._requests:
            self._empty.set()

    def _replace(self, member: Member, slot: Slot | None) -> None:
        if slot is None or self._stopping:
            return
        if slot.wants_spare:
            slot.member = None
            self._use_spares()
            return
        if not member.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.on_fatal(f"{self._failed_starts} children ended before they were ready")
                return
        slot.member = self._spawn(self.slots.index(slot))
