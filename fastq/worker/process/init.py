"""A worker that is the first process of a container, with no init before it: the kernel gives it every orphan there is.

What waits for orphans in general would also take the exit statuses of programs that user code has started and waits
for. So the worker moves into a child, and this process does nothing but wait, and hand on signals.
"""

from __future__ import annotations

import os
import signal
from typing import Final, NoReturn

from fastq.pool.process import die_with_parent, is_subreaper

#: What a process gets for its own faults, and what cannot be waited for.
_NOT_WAITED_FOR: Final = {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
    *(signal.SIGKILL, signal.SIGSTOP),
}
_FROM_KERNEL: Final = 0x80  # SI_KERNEL


def leave_init() -> None:
    """Go on in a child if orphans come to this process; it stays behind for them. Call it before any thread exists."""
    if os.getpid() != 1 and not is_subreaper():
        return
    waited_for = signal.valid_signals() - _NOT_WAITED_FOR
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    pid = os.fork()
    if pid:
        _serve(pid, waited_for)
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(worker: int, waited_for: set[signal.Signals]) -> NoReturn:
    """Hand on signals and wait for whatever ends; end as the worker does."""
    while True:
        found = signal.sigwaitinfo(waited_for)
        if found.si_signo == signal.SIGCHLD:
            _bury(worker)
        elif found.si_code != _FROM_KERNEL:  # keys at the terminal: the worker has got that itself
            os.kill(worker, found.si_signo)


def _bury(worker: int) -> None:
    """Wait for every process that has ended; end with the worker's exit code if it was that."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            os._exit(128 - code if code < 0 else code)
