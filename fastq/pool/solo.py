"""Calls in the worker's own process, one at a time: for debuggers, and for what a process can have only once.

Two halves. ``Solo`` runs calls, in the thread that calls ``serve``: the main one, or in a test one of its own. ``Pool``
is what the message loop sees, in the loop's thread. To it the other thread is one child, over the same socket and ring
as a forked one. A child that is killed elsewhere ends here by an exception in its call; the next one is the same thread
with another socket and ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final

from fastq._child import Child
from fastq._core import Core
from fastq.errors import CallEnded, FastqError, PoolLost
from fastq.guard import guarded
from fastq.interfaces import ChildHooks
from fastq.pool import ChildMain, CompanionMain, PoolOptions
from fastq.pool.companion import Companion
from fastq.pool.outside import absorb, raise_in, release_locks
from fastq.pool.zygote import EX_INTERNAL, Zygote, start_zygote
from fastq.wire.pipe import SHARED_SIZE, RingReader

logger = logging.getLogger("fastq.worker")

#: Interrupts the call that runs in the main thread. Nobody's but ours; ``fastq.pool.process`` has the ones before.
END_SIGNAL: Final = signal.SIGRTMAX - 4
#: The thread that runs calls handles the process's signals, too: it looks for them so often while it waits, as one that
#: comes just before, or to another thread, does not wake it.
SIGNALS_EVERY_S: Final = 0.25
_TIMEVAL: Final = struct.pack("ll", 0, int(SIGNALS_EVERY_S * 1e6))
#: How long a call may take to end once it was told to. Chosen: time to close a file, not to finish the work.
END_S: Final = 1.0


class Place:
    """What a child is elsewhere: one socket and ring, from the first call that comes through them to the last."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
        self.shared = os.memfd_create("fastq-solo", os.MFD_CLOEXEC)
        os.ftruncate(self.shared, SHARED_SIZE)
        self.reader = RingReader(self.shared)
        self.child: Child
        self.on_end: Callable[[int], None]
        self.is_leaving = False  # it was asked to end
        self.is_ready = False
        self.signum = 0  # what its call was told to end by; 0: nothing
        self.is_struck = False  # the exception was raised

    def close(self) -> None:
        """Give back the side of the thread that runs calls."""
        self.theirs.close()
        os.close(self.shared)


class Solo:
    """Runs calls in the thread that calls ``serve``. A program's companion is forked at its making, by a zygote."""

    def __init__(
        self,
        child_main: ChildMain,
        on_start: Callable[[], None] = lambda: None,
        companion: CompanionMain | None = None,
    ) -> None:
        self.zygote: Zygote | None = None
        if companion is not None:
            self.zygote = start_zygote(child_main, on_start, companion)
        #: The call that ran was told to end and has not: its thread cannot be waited for.
        self.is_stuck = False
        self._main = child_main
        self._places: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._current: Place | None = None
        self._thread = 0
        self._by_signal = False
        self._is_struck = False  # from outside, not by a signal
        self._lock = threading.Lock()

    # --- in the thread that runs calls

    def serve(self) -> None:
        """Run calls until ``close``."""
        self._thread = threading.get_ident()
        self._by_signal = threading.current_thread() is threading.main_thread()
        before = signal.signal(END_SIGNAL, self._on_signal) if self._by_signal else None
        try:
            while (place := self._next()) is not None:
                code = self._run(place)
                place.close()
                place.on_end(code)
        finally:
            if self._by_signal:
                signal.signal(END_SIGNAL, before)

    def _next(self) -> Place | None:
        """Wait for the next place; None when there will be none."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._places.get(timeout=SIGNALS_EVERY_S)

    def _run(self, place: Place) -> int:
        """Run the calls of one place; returns what would be its exit code."""
        try:
            self._current = place
            try:
                return 0 if place.signum else self._main(place.theirs.fileno(), place.shared, 0)
            finally:
                self._leave()
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else 1
        except KeyboardInterrupt:
            return 130
        except Exception:
            logger.critical("no call can run because of an internal error", exc_info=True)
            return EX_INTERNAL

    def _leave(self) -> None:
        """Have no exception come any more."""
        while True:
            try:
                with self._lock:
                    place, self._current = self._current, None
                    is_struck, self._is_struck = self._is_struck, False
                if is_struck:
                    absorb()
                if is_struck or (place is not None and place.is_struck):
                    release_locks()
                return
            except CallEnded:  # it came just now
                continue

    def _on_signal(self, signum: int, frame: object) -> None:
        place = self._current
        if place is not None and place.signum and not place.is_struck:
            place.is_struck = True
            raise CallEnded(-place.signum)

    # --- in any other thread

    def put(self, place: Place) -> None:
        """Have the calls of this place run."""
        self._places.put(place)

    def strike(self, place: Place, signum: int) -> None:
        """Raise CallEnded in the call that runs. Another thread than the main one hears of it after what blocks it."""
        place.signum = signum
        with self._lock:
            if self._current is not place:
                return
            if self._by_signal:
                signal.pthread_kill(self._thread, END_SIGNAL)
            else:
                self._is_struck = True
                raise_in(self._thread, CallEnded)

    def stack(self) -> str:
        """Return the stack of the thread that runs calls."""
        return "".join(traceback.format_stack(sys._current_frames().get(self._thread)))

    def close(self) -> None:
        """Have ``serve`` return, after the call that runs."""
        self._places.put(None)


@guarded(ChildHooks)
class Pool:
    """One place for calls, in another thread of this process (the protocol is ``fastq.pool.Pool``)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, solo: Solo, options: PoolOptions) -> None:
        self.loop, self.solo, self.options = loop, solo, options
        zygote = solo.zygote
        self.companion = Companion(loop, zygote, "beat") if zygote is not None else None
        self.size = 1
        self.core: Core
        self._place: Place | None = None
        self._stacks: tuple[Child, str] | None = None
        self._is_stopping = False
        self._ready = asyncio.Event()
        self._empty = asyncio.Event()

    # --- start and stop

    async def start(self, core: Core) -> None:
        """Return when this message loop's calls can run."""
        self.core = core
        if self.solo.zygote is not None:
            self.loop.add_reader(self.solo.zygote.fd, self._on_reports)
        self._begin()
        await self._ready.wait()

    async def stop(self, deadline_s: float | None) -> None:
        """Have the running call end; at the deadline by an exception, which it has END_S for."""
        self._is_stopping = True
        place = self._place
        if place is None:
            return
        self._dismiss(place)
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), deadline_s)
        if self._place is None:
            return
        if not place.signum:
            self.kill()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), END_S)
        self._lose(place)

    def kill(self) -> None:
        """End the running call by an exception."""
        self._is_stopping = True
        if self._place is not None:
            self._strike(self._place, signal.SIGKILL)

    def close(self) -> None:
        """Have the other thread leave."""
        if self.solo.zygote is not None:
            self.loop.remove_reader(self.solo.zygote.fd)
            self.solo.zygote.close()
        self.solo.close()

    # --- size

    def grow(self, n: int = 1) -> None:
        """Say that there is one place only."""
        logger.warning("the pool is solo: one call runs at a time. For more of them, start the worker with -P prefork")

    def shrink(self, n: int = 1) -> None:
        """The last place stays."""

    def restart(self) -> None:
        """Say that there is no process to replace."""
        logger.warning("the pool is solo: there is no child to replace. Restart the worker with SIGHUP")

    @property
    def pids(self) -> list[int]:
        """Return this process's id, as long as calls can run."""
        return [os.getpid()] if self._place is not None else []

    # --- what the message loop tells

    def child_ready(self, child: Child) -> None:
        """The other thread can take calls."""
        place = self._place
        if place is not None and place.child is child:
            place.is_ready = True
            child.activate(child.slot)
            self._ready.set()

    def child_full(self, child: Child) -> None:
        """The child has been given its last call."""
        if not child.busy:
            self.child_drained(child)

    def child_drained(self, child: Child) -> None:
        """The child has finished its last call."""
        if self._place is not None and self._place.child is child:
            self._dismiss(self._place)

    def child_broken(self, child: Child, reason: str) -> None:
        """The child does not make sense any more."""
        logger.critical("%s; its call is ended", reason)
        self.kill_child(child)

    def terminate(self, child: Child, signum: int) -> None:
        """End the call by an exception, whatever the signal."""
        if self._place is not None and self._place.child is child:
            self._strike(self._place, signum)

    def kill_child(self, child: Child) -> None:
        """End the call by an exception; where that does not help, the worker ends."""
        place = self._place
        if place is not None and place.child is child:
            self._strike(place, signal.SIGKILL)
            self.loop.call_later(END_S, self._give_up, place)

    def dump_stack(self, child: Child) -> None:
        """Write down where the thread is that runs calls, for ``stacks``."""
        self._stacks = child, self.solo.stack()

    def stacks(self, child: Child) -> str:
        """Return what was written down."""
        return self._stacks[1] if self._stacks is not None and self._stacks[0] is child else ""

    # --- inside

    def _begin(self) -> None:
        self._empty.clear()
        place = self._place = Place()
        place.child = Child(self.core, 0, os.getpid(), place.reader)
        place.on_end = lambda code: self._tell_end(place, code)
        self.core.add_child(place.child)
        self.loop.create_task(self._connect(place))
        self.solo.put(place)

    async def _connect(self, place: Place) -> None:
        if not place.child.gone:
            await self.loop.create_unix_connection(lambda: place.child, sock=place.ours)

    def _dismiss(self, place: Place) -> None:
        """Have the place end after the calls that it holds."""
        if not place.is_leaving:
            place.is_leaving = True
            place.child.stop()

    def _strike(self, place: Place, signum: int) -> None:
        self._dismiss(place)
        if not place.signum:
            self.solo.strike(place, signum)

    def _give_up(self, place: Place) -> None:
        """The call goes on whatever is raised in it: a process cannot be rid of it but by its own end."""
        if self._place is not place or self._is_stopping:
            return
        running = place.child.running_tasks
        what = "task {}[{}]".format(*running[0]) if running else "the call"
        self._lose(place)
        text = f"{what} does not end, and it runs in the worker's own process (-P solo), so the worker ends"
        self.options.on_fatal(
            PoolLost(f"{text}. Start it again, and have its supervisor do so; see what the task does")
        )

    def _lose(self, place: Place) -> None:
        self.solo.is_stuck = True
        self._bury(place, "it did not end")

    def _tell_end(self, place: Place, code: int) -> None:
        """Pass on, from the other thread, that the place's last call has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._on_end, place, code)

    def _on_end(self, place: Place, code: int) -> None:
        if self._place is not place:
            self.solo.is_stuck = False  # it was given up
            return
        child = place.child
        is_expected = self._is_stopping or place.is_leaving
        is_failed = not place.is_ready and not is_expected
        self._bury(place, f"exitcode {code}")
        if child.terminated_by:
            logger.info("The running call was terminated (exitcode %d)", code)
        elif not is_expected:
            self.options.on_lost("Process 'MainProcess'", f"exitcode {code}")
        if is_failed:
            self.options.on_fatal(FastqError("no call can run here: what is to be done before the first one failed"))
        elif not self._is_stopping:
            self._begin()

    def _bury(self, place: Place, reason: str) -> None:
        self._place = None
        place.child.retire()
        self.core.remove_child(place.child, reason)
        place.child.close()
        place.ours.close()
        self._empty.set()

    def _on_reports(self) -> None:
        assert self.solo.zygote is not None
        assert self.companion is not None
        try:
            reports = self.solo.zygote.reports()
        except EOFError:
            self.loop.remove_reader(self.solo.zygote.fd)
            if not self._is_stopping:
                logger.error("the process that starts the beat has ended, and the beat with it: restart the worker")
            self.companion.lose()
            return
        for report in reports:
            self.companion.take(report)
