"""What a forked child makes of itself before it takes calls, and what it leaves running at its end. No calls.

A signal that reaches a child through its group, as systemd sends TERM to everybody, is the main process's affair; one
that a program gets which a task has started is that program's own.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from fastq.pool import zygote
from fastq.pool.process import STACKS_SIGNAL
from fastq.wire.pipe import FLAG_RECYCLE, ChildPipe, shared_size

#: Programs that tasks start inherit that: they live through the Ctrl-C of a warm stop, and as a child's group is not
#: the terminal's, they would stand still for ever where they read from or write to it.
_IGNORED: Final = (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU)

#: Time for threads that flush what they hold (QueueListener, statsd, spans): as much as Celery's children have.
_THREADS_S: Final = 1.0


class ChildSetup(Protocol):
    """What surrounds the calls of a child and goes by its number, 1 or more."""

    def prepare(self) -> None:
        """Do what can be done once for all children: in the process that forks them, before the first one."""

    def __call__(self, number: int) -> None:
        """Begin with the number that the child is born with."""

    def renumber(self, before: int, number: int) -> None:
        """Go on with the number of the slot that the child takes its calls in."""

    def here(self) -> None:
        """Begin in the worker's own process, which has no number."""


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """What every child of a pool is told at its birth."""

    hostname: str
    max_memory_kib: int = 0
    track_started: bool = False
    is_amqp: bool = False  # messages come from a broker that speaks AMQP
    program: str = "fastq"  # what the process's title begins with
    setup: ChildSetup | None = None  # logging and the like
    calls: str = "one"  # how it runs them (``calls.way_of``)
    slots: int = 1  # how many at a time
    awaits: bool = False  # coroutine functions are among its calls, one at a time and without a loop of the child's
    keeps_streams: bool = False  # a debugger is to find the terminal there: what is printed does not become records


class Signals:
    """The handlers of a child. What a task forks has the defaults again."""

    of_process: ClassVar[Signals | None] = None

    def __init__(self, pipe: ChildPipe) -> None:
        self._pipe = pipe
        self._pid = os.getpid()
        # The zygote has set them; to set them again would write to some thirty pages of memory.
        self._handlers: dict[int, Callable[[int, object], None]] = dict.fromkeys(zygote.LEFT_TO_MAIN, zygote.on_signal)
        zygote.child_handler = self._on_signal
        # Not signal.getsignal: it looks for an enum's member, which raises an exception inside, for each.
        module: Any = sys.modules["_signal"]
        if any(module.getsignal(signum) is not handler for signum, handler in self._handlers.items()):
            self.install()  # somebody's hook for forks has set others
        Signals.of_process = self

    def install(self) -> None:
        """Set all handlers, over those of the user's code too: without ours, systemd's TERM would end the call."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        for signum in _IGNORED:
            signal.signal(signum, signal.SIG_IGN)

    def handle(self, signum: int, handler: Callable[[int, object], None]) -> None:
        """Set one more handler that is this process's alone."""
        self._handlers[signum] = handler
        signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        """End the process if the main process has revoked the call that runs; else leave it to the main process."""
        if os.getpid() != self._pid:  # it came between the fork and `restore`
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self._pipe.is_terminated:
            raise SystemExit(-signum)

    def restore(self) -> None:
        """Set the defaults where the handlers are ours still."""
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == handler:  # not one that the task has put there
                signal.signal(signum, signal.SIG_DFL)


def _after_fork() -> None:
    if Signals.of_process is not None:
        Signals.of_process.restore()


os.register_at_fork(after_in_child=_after_fork)


def write_stacks_to(shared: int, slots: int = 1) -> None:
    """Have the stacks of all threads written behind the shared memory when the main process asks for them."""
    os.lseek(shared, shared_size(slots), os.SEEK_SET)
    faulthandler.register(STACKS_SIGNAL, file=shared, all_threads=True, chain=False)


class MemoryLimit:
    """Looks at this process's peak after each call; ``warn`` is told, once, when it is beyond the limit (0: none)."""

    def __init__(self, limit_kib: int, warn: Callable[[str], None]) -> None:
        self.limit_kib = limit_kib
        self._warn = warn
        self._is_beyond = False

    def flag(self) -> int:
        """Return what tells the main process that this child wants replacing, or 0."""
        if not self.limit_kib:
            return 0
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if peak_kib <= self.limit_kib:
            return 0
        if not self._is_beyond:
            self._is_beyond = True
            # billiard's words: log readers look for them.
            self._warn(f"child process exiting after exceeding memory limit ({peak_kib}KiB / {self.limit_kib}KiB)")
        return FLAG_RECYCLE


def wait_for_threads() -> None:
    """Return when this is the only thread, after a second at the latest."""
    if threading.active_count() == 1:
        return
    deadline = time.monotonic() + _THREADS_S
    for thread in threading.enumerate():
        # Nobody can join those that Python has not started: a library has, or they are greenlets.
        if thread is not threading.current_thread() and not isinstance(thread, threading._DummyThread):
            thread.join(max(0.0, deadline - time.monotonic()))
