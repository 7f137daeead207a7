"""A child: a process of the pool from its birth to its exit code. Takes calls from the main process; runs none itself.

The seam between taking and running is ``serve``: it takes calls from the pipe and hands each to a ``CallRunner``. The
one here does so one at a time; others are found by ``calls.way_of``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

from fastq.plugins import load
from fastq.pool.process import set_name
from fastq.pool.titles import process_name, set_title
from fastq.running.birth import ChildOptions, Signals, wait_for_threads, write_stacks_to
from fastq.running.calls import CallRunner, way_of
from fastq.wire.pipe import ChildPipe

#: Exit code of a child that was asked to end, as Celery's recycled children have.
EX_RECYCLE: Final = 155


def serve(pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls, each to its end before the next one is taken, until the pipe ends."""
    runner.begin(pipe)
    pipe.ready()
    run, take = runner.run, pipe.next
    while (call := take()) is not None:
        run(call)


class ChildProcess:
    """What the zygote calls in each child it forks. All that children share is prepared before, at its making.

    A kind of application derives its own, which says what else happens at each stage of a child's life, in a module of
    its own: those of one kind import nothing of the other.
    """

    def __init__(self, options: ChildOptions, runner: CallRunner) -> None:
        self._options = options
        self._runner = runner
        self._serve: Callable[[ChildPipe, CallRunner], None] = load(way_of(options.calls).serve)

    def prepare(self) -> None:
        """Do what can be done once for all children, in the process that forks them."""
        if self._options.setup is not None:
            self._options.setup.prepare()

    def __call__(self, sock: int, shared: int, slot: int, group: int = 0) -> int:
        """Run calls until the main process says stop or goes away; returns the exit code."""
        slots = self._options.slots
        pipe = ChildPipe(sock, shared, slots)
        write_stacks_to(shared, slots)
        set_name(b"fastq-child")
        self.handle_signals(pipe)
        pipe.on_slot = lambda taken: self.renumber(slot + 1, taken + 1)
        self.begin(pipe, slot + 1)
        code = EX_RECYCLE
        try:
            self.serve(pipe)
        except SystemExit as exit_:  # the call was terminated
            code = exit_.code if isinstance(exit_.code, int) else 1
        self.end(code)
        if not pipe.is_terminated:
            wait_for_threads()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code & 0xFF

    def begin_here(self, is_main: bool) -> None:
        """Get ready to run calls in the worker's own process; ``is_main``: in its main thread."""
        if is_main and self._options.setup is not None:
            self._options.setup.here()

    def attach_here(self, pipe: ChildPipe) -> Callable[[], None]:
        """Have what tasks of this thread send and store go through the pipe; return what undoes it."""
        return lambda: None

    def handle_signals(self, pipe: ChildPipe) -> None:
        """Set the handlers of signals, before any code of the application runs."""
        Signals(pipe)

    def begin(self, pipe: ChildPipe, number: int) -> None:
        """Become the child of that number."""
        self.entitle(number)
        if self._options.setup is not None:
            self._options.setup(number)

    def serve(self, pipe: ChildPipe) -> None:
        """Run calls until the pipe ends."""
        self._serve(pipe, self._runner)

    def end(self, code: int) -> None:
        """Have the application hear of the end, before its threads are waited for."""

    def renumber(self, before: int, number: int) -> None:
        """Go by the number of the slot that this process takes its calls in."""
        self.entitle(number)
        if self._options.setup is not None:
            self._options.setup.renumber(before, number)

    def entitle(self, number: int) -> None:
        """Show the number where processes are listed."""
        set_title(self._options.program, self._options.hostname, process_name(number, self._options.calls))


class Children:
    """What the zygote calls where children differ: those of each group have their own."""

    def __init__(self, mains: Sequence[ChildProcess]) -> None:
        self._mains = mains

    @property
    def first(self) -> ChildProcess:
        """Return those of the first group."""
        return self._mains[0]

    def prepare(self) -> None:
        """Do what can be done once for all children."""
        self.first.prepare()

    def __call__(self, sock: int, shared: int, number: int, group: int = 0) -> int:
        """Run calls; returns the exit code."""
        return self._mains[group](sock, shared, number, group)
