"""Children that are alike, as the main process sees them: slots, the one in each, replacements ready in time.

It decides which process runs where, never which call. Children are forked by the zygote; their end is reported by it.
Every child starts as a spare: a slot takes the first one that is ready, so one that hangs or dies at its start holds
up nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastq._child import Child, ManyChild
from fastq._core import Core
from fastq.errors import FastqError, PoolLost
from fastq.guard import guarded
from fastq.interfaces import ChildHooks
from fastq.pool import Group, PoolOptions
from fastq.pool.companion import Companion
from fastq.pool.members import Member, Slot, lives, wait_for_end, worth
from fastq.pool.process import DUMP_SIGNAL, STACKS_SIGNAL
from fastq.pool.zygote import Exited, Failed, Spawned, Zygote
from fastq.wire.pipe import RingReader

logger = logging.getLogger("fastq.worker")

#: Pauses after failed starts, doubled from one to the next. Chosen: a crash loop costs little, and is soon over.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 10.0
#: After how many rounds of failed starts the pool gives up, when no child was ever ready.
MAX_ROUNDS = 5
#: How long the other children are waited for once the first one is ready; alike, they are ready within moments.
TOGETHER_S = 1.0
#: When a child that is not ready is worth a line. Chosen: most starts take well under a second.
SLOW_START_S = 10.0
#: How long a child may take from its last call to its end.
SLOW_END_S = 60.0
#: How long processes that were killed are waited for. Chosen: a few milliseconds, but for one in the kernel's hands.
KILLED_S = 1.0
_REMEDY = (
    "Start the worker again, and have its supervisor do so; if nobody has killed it, look for the kernel's memory "
    "killer in dmesg"
)
#: Requests to the zygote under way: a few hundred fill its socket, and writing there must not block.
MAX_ASKED = 16


@guarded(ChildHooks)
@dataclass(slots=True)
class Pool:
    """Keeps as many slots filled as its group says (the protocol is ``fastq.pool.Pool``).

    ``index`` is that of its group among the options' groups; ``shares`` the zygote with others: whoever made them all
    hands on its reports, by ``take`` and ``lose``, and closes it.
    """

    loop: asyncio.AbstractEventLoop
    zygote: Zygote
    options: PoolOptions
    index: int = 0
    shares: bool = False
    group: Group = field(init=False)
    companion: Companion | None = field(init=False)
    core: Core = field(init=False)
    slots: list[Slot] = field(default_factory=list)
    spares: list[Member] = field(default_factory=list)  # starting, or ready and in no slot
    _members: dict[int, Member] = field(default_factory=dict)  # by pid
    _requests: dict[int, Member] = field(default_factory=dict)
    _by_child: dict[Child, Member] = field(default_factory=dict)
    _dropped: list[Member] = field(default_factory=list)  # their slot is gone or another's, their last calls still run
    _next_request: int = field(init=False)
    _step: int = field(init=False)
    _failed_starts: int = 0
    _rounds: int = 0  # pauses in a row
    _pause: asyncio.TimerHandle | None = None
    _was_ready: bool = False  # some child was, at some time
    _zygote_is_slow: bool = False
    _stopping: bool = False
    _killing: bool = False
    _first: asyncio.Event = field(default_factory=asyncio.Event)
    _complete: asyncio.Event = field(default_factory=asyncio.Event)
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        groups = self.options.groups or (Group("one", self.options.concurrency),)
        self.group = groups[self.index]
        self._step = len(groups)
        self._next_request = 1 + self.index  # those of one group are told from those of another one
        has_companion = self.zygote.has_companion and self.index == 0
        self.companion = Companion(self.loop, self.zygote, "beat") if has_companion else None

    # --- start and stop

    async def start(self, core: Core) -> None:
        """Return when this message loop's calls can run: every slot has its child, or some have and others are late."""
        self.core = core
        if not self.shares:
            self.loop.add_reader(self.zygote.fd, self._on_reports)
            self.loop.add_reader(self.zygote.pidfd, self.lose)
        self.slots += [Slot() for _ in range(self.group.processes)]
        self._fill()
        await self._first.wait()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._complete.wait(), TOGETHER_S)

    async def stop(self, deadline_s: float | None) -> None:
        """Ask every child to end after its call; kill what is left at the deadline."""
        self._begin_stop()
        for member in list(self._members.values()):
            if member.child is not None and not member.is_leaving:
                member.is_leaving = True
                member.child.stop()
        if not self._members and not self._requests:
            self._empty.set()
        try:
            await asyncio.wait_for(self._empty.wait(), deadline_s)
        except (TimeoutError, asyncio.TimeoutError):
            self.kill()
            try:
                await asyncio.wait_for(self._empty.wait(), 10)
            except (TimeoutError, asyncio.TimeoutError):
                logger.error("the process that forks children, pid:%d, does not answer; it is killed", self.zygote.pid)

    def kill(self) -> None:
        """Kill every child."""
        self._begin_stop()
        self._killing = True
        for member in self._members.values():
            self._signal(member, signal.SIGKILL)

    def close(self) -> None:
        """End the zygote, unless it is shared."""
        if self.shares:
            return
        self.loop.remove_reader(self.zygote.fd)
        self.loop.remove_reader(self.zygote.pidfd)
        self.zygote.close()

    def _begin_stop(self) -> None:
        self._stopping = True
        if self._pause is not None:
            self._pause.cancel()
        for member in [*self._members.values(), *self._requests.values()]:
            member.set_timer(None)

    # --- size

    def grow(self, n: int = 1) -> None:
        """Add slots: as many as so many more calls need."""
        for _ in range(-(-n // self.group.slots)):
            # A child that was dropped and still runs a call goes on counting: never more calls at once than slots.
            running = self._dropped.pop() if self._dropped and not self.group.is_many else None
            self.slots.append(Slot(running))
        self._fill()

    def shrink(self, n: int = 1) -> None:
        """Remove slots, empty and idle ones first; the calls in them are finished. The last slot stays."""
        for _ in range(min(n // self.group.slots, len(self.slots) - 1)):
            slot = min(reversed(self.slots), key=worth)
            self.slots.remove(slot)
            if slot.member is not None and (not slot.is_due or self.group.is_many):
                self._dismiss(slot.member)
        self._fill()

    @property
    def size(self) -> int:
        """Return how many calls run at a time."""
        return len(self.slots) * self.group.slots

    @property
    def pids(self) -> list[int]:
        """Process ids by slot."""
        return [slot.member.pid for slot in self.slots if slot.member is not None]

    # --- what the core reports; a child may have ended when its last records are read

    def child_ready(self, child: Child) -> None:
        """The child can take calls."""
        member = self._by_child.get(child)
        if member is None:
            return
        member.is_ready = True
        member.set_timer(None)
        self._was_ready = True
        self._failed_starts = self._rounds = 0
        self._fill()
        self._first.set()

    def child_full(self, child: Child) -> None:
        """The child has been given its last call. While others run, its replacement may start."""
        member = self._by_child.get(child)
        if not child.busy:
            self.child_drained(child)
        elif self.group.is_many and member is not None and len(self._dropped) < len(self.slots):
            # Not without bound: those that end slowly do not pile up.
            slot = self._slot_of(member)
            if slot is not None:
                slot.is_due = True
                self._fill()

    def child_drained(self, child: Child) -> None:
        """The child has finished its last call: a spare takes its place."""
        member = self._by_child.get(child)
        if member is None:
            return
        self._dismiss(member)
        slot = self._slot_of(member)
        if slot is not None and not slot.is_due:
            slot.is_due = True
            self._fill()

    def child_broken(self, child: Child, reason: str) -> None:
        """The child does not make sense any more."""
        logger.critical("%s; it is killed", reason)
        self.kill_child(child)

    def dump_stack(self, child: Child) -> None:
        """Have the child write the stacks of its threads, for ``stacks``."""
        member = self._by_child.get(child)
        if member is not None and member.reader is not None:
            member.reader.clear_stacks()
        self.terminate(child, STACKS_SIGNAL)

    def stacks(self, child: Child) -> str:
        """Return the stacks that the child has written; "" when it has not, or has ended."""
        member = self._by_child.get(child)
        return member.reader.stacks() if member is not None and member.reader is not None else ""

    def terminate(self, child: Child, signum: int) -> None:
        """Send one child a signal of the user's choice."""
        member = self._by_child.get(child)
        if member is not None:
            self._signal(member, signum)

    def kill_child(self, child: Child) -> None:
        """Kill one child; its slot is filled again."""
        self.terminate(child, signal.SIGKILL)

    def restart(self) -> None:
        """Replace every child; each finishes the call that it runs."""
        for slot in self.slots:
            if slot.member is not None and slot.member.child is not None and not slot.member.is_leaving:
                slot.member.child.retire()
                self.child_full(slot.member.child)

    # --- slots and spares

    def _needs_child(self, slot: Slot) -> bool:
        return slot.member is None or (slot.is_due and self.options.overlaps)

    def _fill(self) -> None:
        """Put ready children where one is needed, send away those that are too many, order those that are missing."""
        if self._stopping:
            return
        needing = [slot for slot in self.slots if self._needs_child(slot)]
        ready = [member for member in self.spares if member.is_ready]
        placed = list(zip(needing, ready, strict=False))
        for slot, member in placed:
            self.spares.remove(member)
            if slot.member is not None and slot.member.child is not None and slot.member.child.busy:
                self._dropped.append(slot.member)
            slot.member, slot.is_due = None, False
            member.number = self._number_in_slot(member)
            slot.member = member
        kept = int(self.options.keeps_spare)
        for member in ready[len(needing) + kept :]:
            self.spares.remove(member)
            self._dismiss(member)
        if len(placed) == len(needing):
            self._complete.set()
        # The first children have the first numbers: the spare is ordered when they are ready.
        ordered = kept if self._complete.is_set() else 0
        for _ in range(len(needing) - len(placed) + ordered - len(self.spares)):
            if self._pause is not None or self._is_giving_up or len(self._requests) >= MAX_ASKED:
                break  # it goes on when the pause is over, or with the zygote's next report
            if len(self._members) + len(self._requests) - len(self._dropped) >= 2 * len(self.slots) + kept:
                break  # children that take long to end do not pile up
            self._spawn()
        for _, member in placed:
            assert member.child is not None
            member.child.activate(member.number)

    def _dismiss(self, member: Member) -> None:
        """Have a child end after the calls that it holds."""
        assert member.child is not None
        if not member.is_leaving:
            member.is_leaving = True
            member.child.stop()
        if member in self._dropped:
            self._dropped.remove(member)
        if member.child.busy:
            if self._slot_of(member) is None:
                self._dropped.append(member)
        elif member.timer is None and not self._stopping:
            member.set_timer(self.loop.call_later(SLOW_END_S, self._end_is_slow, member))

    def _number_in_slot(self, member: Member) -> int:
        """Return the number with which a spare runs its calls: its own, if that is one of a slot and free."""
        at_work = [slot.member for slot in self.slots if slot.member is not None and not slot.is_due]
        taken = {each.number for each in [*at_work, *self._dropped]}
        if member.number < len(self.slots) and member.number not in taken:
            return member.number
        return next(number for number in itertools.count() if number not in taken)

    def _slot_of(self, member: Member) -> Slot | None:
        return next((slot for slot in self.slots if slot.member is member), None)

    def _signal(self, member: Member, signum: int) -> None:
        if member.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(member.pidfd, signum)

    # --- starting children

    def _spawn(self) -> None:
        number = self._free_number()
        member = Member(number, number, self.group.calls)
        try:
            member.sock, member.reader = self.zygote.spawn(
                self._next_request, member.number, self.index, self.group.places
            )
        except OSError as error:
            self._start_failed(member, f"could not be started: {error}")
            return
        self.spares.append(member)
        self._requests[self._next_request] = member
        self._next_request += self._step
        self._watch_start(member)

    def _watch_start(self, member: Member) -> None:
        member.since = self.loop.time()
        member.set_timer(self.loop.call_later(self._slow_start_s, self._start_is_slow, member))

    def _free_number(self) -> int:
        living = [*self._members.values(), *self._requests.values()]
        taken = {number for member in living for number in (member.number, member.born)}
        return next(number for number in itertools.count() if number not in taken)

    @property
    def _slow_start_s(self) -> float:
        return (
            SLOW_START_S
            if self.options.start_timeout_s is None
            else min(SLOW_START_S, self.options.start_timeout_s / 2)
        )

    @property
    def _is_giving_up(self) -> bool:
        return self._rounds >= MAX_ROUNDS and not self._was_ready

    def _start_failed(self, member: Member, how: str) -> None:
        """Another child is started, after a pause that grows from one failure to the next."""
        if member.sock is not None:
            member.sock.close()
        self._failed_starts += 1
        if self._pause is None:
            self._rounds += 1
            if not self._is_giving_up:
                pause_s = min(FIRST_PAUSE_S * 2 ** (self._rounds - 1), LAST_PAUSE_S)
                self._pause = self.loop.call_later(pause_s, self._end_pause)
        if self._pause is not None:
            after_s = max(0.0, self._pause.when() - self.loop.time())
            logger.error("%s %s; another one is started in %.1f s%s", member.title, how, after_s, self._hint())
            return
        logger.error("%s %s", member.title, how)
        if not self.spares:
            failed = f"{self._failed_starts} children failed to start and none was ever ready, the last one {how}"
            self.options.on_fatal(FastqError(failed))

    def _hint(self) -> str:
        """Return what may be wrong when only the spare cannot start: the others hold what it wants."""
        if not self.options.keeps_spare or any(self._needs_child(slot) for slot in self.slots):
            return ""
        return ". If children hold a port, a lock or a GPU, set fastq_keeps_spare = False"

    def _end_pause(self) -> None:
        self._pause = None
        self._fill()

    def _start_is_slow(self, member: Member) -> None:
        waited_s, limit_s = self.loop.time() - member.since, self.options.start_timeout_s
        is_over = limit_s is not None and waited_s > limit_s - 0.01  # the loop's clock counts milliseconds
        if not member.pid:
            self._zygote_hangs(waited_s, is_over)
        elif is_over:
            logger.error(
                "%s was not ready after %.3g s (fastq_child_start_timeout) and is killed", member.title, limit_s
            )
            self._signal(member, signal.SIGKILL)
            return
        else:
            logger.warning(
                "%s is not ready after %.3g s: what it does (handlers of worker_process_init, hooks of "
                "os.register_at_fork, a spawned one's import) takes long or hangs; it is killed after %s. Its stack:",
                member.title,
                waited_s,
                "fastq_child_start_timeout, which is not set" if limit_s is None else f"{limit_s:.3g} s",
            )
            self._signal(member, DUMP_SIGNAL)
        if limit_s is not None or not member.pid:
            again_s = self._slow_start_s if limit_s is None or is_over else limit_s - waited_s
            member.set_timer(self.loop.call_later(again_s, self._start_is_slow, member))

    def _zygote_hangs(self, waited_s: float, is_over: bool) -> None:
        """No child can be started or replaced; those that there are go on."""
        if not self._zygote_is_slow:
            self._zygote_is_slow = True
            logger.warning(
                "the process that forks children, pid:%d, has not done so for %.3g s: a hook that a library has set "
                "for forks may hang. Its stack:",
                self.zygote.pid,
                waited_s,
            )
            os.kill(self.zygote.pid, DUMP_SIGNAL)
        # Nobody reports ends any more: look for them.
        if is_over and not any(member.is_ready and lives(member) for member in self._members.values()):
            hangs = f"the process that forks children hangs: none was started for {waited_s:.3g} s, and none is left"
            self.options.on_fatal(PoolLost(f"{hangs}. {_REMEDY}"))

    def _end_is_slow(self, member: Member) -> None:
        logger.warning("%s has not ended %g s after its last call and is killed", member.title, SLOW_END_S)
        self._signal(member, signal.SIGKILL)

    # --- reports of the zygote

    def _on_reports(self) -> None:
        try:
            reports = self.zygote.reports()
        except EOFError:
            self.loop.remove_reader(self.zygote.fd)
            return
        self.take(reports)

    def take(self, reports: Sequence[Spawned | Failed | Exited]) -> None:
        """Deal with those of the zygote's reports that are about this pool's processes."""
        self._zygote_is_slow = False
        for report in reports:
            if self.companion is not None and self.companion.take(report):
                continue
            if isinstance(report, Exited):
                self._on_exit(report)
            elif report.request not in self._requests:
                continue
            elif isinstance(report, Failed):
                self._on_failed(self._requests.pop(report.request), report.reason)
            else:
                self._on_spawned(self._requests.pop(report.request), report.pid)
        if self._stopping and not self._members and not self._requests:
            self._empty.set()
        else:
            self._fill()

    def lose(self) -> None:
        """The zygote has ended.

        Nobody can fork any more, as this process has a loop and threads: give back what runs, and stop.
        """
        self.loop.remove_reader(self.zygote.pidfd)
        if not self._stopping or self._members or self._requests:
            how = self.zygote.reap()
            text = f"the process that forks children, pid:{self.zygote.pid}, has ended ({how}), so the worker ends"
            self.options.on_fatal(PoolLost(f"{text}. {_REMEDY}"))
        # The kernel has killed the children with it, all but those that hang at their fork.
        if self.companion is not None:
            self.companion.lose()
        self.kill()
        until = time.monotonic() + KILLED_S
        for member in self._members.values():
            wait_for_end(member, until)
        self.core.give_back_running(forget=False)
        for pid in list(self._members):
            self._on_exit(Exited(pid, signal.SIGKILL))
        for member in self._requests.values():
            if member.sock is not None:
                member.sock.close()
        self._requests.clear()
        self._empty.set()

    def _on_failed(self, member: Member, reason: str) -> None:
        member.set_timer(None)
        self.spares.remove(member)
        if not self._stopping:
            self._start_failed(member, f"could not be forked: {reason}")

    def _on_spawned(self, member: Member, pid: int) -> None:
        assert member.reader is not None
        assert member.sock is not None
        member.pid = pid
        self._members[pid] = member
        try:
            member.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it has ended already; the report is on its way
        child = member.child = self._make_child(member, pid, member.reader)
        self._by_child[child] = member
        self.core.add_child(child)
        # The transport is made on the next turn of the loop; nothing is sent to the child before it reports ready.
        self.loop.create_task(self._connect(child, member.sock))
        if self._killing:
            self._signal(member, signal.SIGKILL)
        elif self._stopping:
            member.is_leaving = True
            child.stop()
        else:
            self._watch_start(member)

    def _make_child(self, member: Member, pid: int, reader: RingReader) -> Child:
        group = self.group
        if not group.is_many:
            return Child(self.core, member.number, pid, reader, group=self.index)
        return ManyChild(
            self.core,
            member.number,
            pid,
            reader,
            slots=group.slots,
            group=self.index,
            gives_up=group.gives_up,
            stall_s=self.options.stall_s if group.has_loop else 0,
        )

    async def _connect(self, child: Child, sock: socket.socket) -> None:
        if not child.gone:
            await self.loop.create_unix_connection(lambda: child, sock=sock)

    def _on_exit(self, report: Exited) -> None:
        member = self._members.pop(report.pid, None)
        if member is None:
            return
        member.set_timer(None)
        if member.pidfd >= 0:
            os.close(member.pidfd)
            member.pidfd = -1
        slot = self._slot_of(member)
        if slot is not None:
            slot.member, slot.is_due = None, False
        if member in self.spares:
            self.spares.remove(member)
        if member in self._dropped:
            self._dropped.remove(member)
        child = member.child
        is_expected = self._stopping or member.is_leaving
        if child is not None:
            is_expected = is_expected or (child.retiring and not child.busy)
            child.retire()
            del self._by_child[child]
        if not member.is_ready and not is_expected:
            self._start_failed(member, f"exited with {report.reason!r} before it was ready")
        # Before the core decides about its calls: the replacement is on its way while they are recorded.
        self._fill()
        if child is not None:
            self.core.remove_child(child, report.reason)
            child.close()
        if member.sock is not None:
            member.sock.close()
        if child is not None and child.terminated_by:
            logger.info("%s was terminated (%s)", member.title, report.reason)
        elif member.is_ready and not is_expected:
            self.options.on_lost(member.title, report.reason)
