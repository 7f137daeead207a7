"""The process that starts children from a fresh interpreter: what the zygote is to forked ones, and its protocol.

For what does not survive a fork: CUDA, gRPC, libraries of macOS's kind, applications whose import starts threads. The
starter itself is forked from the main process and forks the companion; a child shares no memory with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from fastq.errors import SettingsError
from fastq.pool import ChildSpec, CompanionMain
from fastq.pool.process import DUMP_SIGNAL, LIMIT_SIGNAL, STACKS_SIGNAL, Timer
from fastq.pool.zygote import LEFT_TO_MAIN, Order, Zygote, start_parent

#: They wait until the child has handlers: its start is not to end by one of them.
HELD: Final = {*LEFT_TO_MAIN, signal.SIGUSR1, DUMP_SIGNAL, LIMIT_SIGNAL, STACKS_SIGNAL}

#: What the interpreter does first. Not in a module: fastq and all that it imports come after the patching.
_FIRST: Final = (
    "import os, pickle, sys; fd, *numbers = map(int, sys.argv[1:]); "
    "birth = pickle.loads(os.pread(fd, os.fstat(fd).st_size, 0)); sys.path[:] = birth['path']; "
)
_PATCHES: Final = {
    "": "",
    "gevent": "from gevent.monkey import patch_all; patch_all(); ",
    "eventlet": "from eventlet import monkey_patch; monkey_patch(); ",
}
_THEN: Final = "from fastq.pool.spawned import main; main(birth, fd, *numbers)"


def start_starter(
    specs: Sequence[ChildSpec], on_start: Callable[[], None] = lambda: None, companion: CompanionMain | None = None
) -> Zygote:
    """Fork the starter of children of each group. Call it where ``start_zygote`` is to be called.

    Threads do no harm to the children, as those are fresh.

    Raises SettingsError where there is no interpreter to start.
    """
    commands = [command_of(spec) for spec in specs]
    births = [_description(spec) for spec in specs]

    def bear(order: Order, alarm: Timer, closes: Callable[[], Iterable[int]]) -> int:
        birth = births[order.group]
        for fd in (birth, order.sock, order.shared):
            os.set_inheritable(fd, True)
        numbers = (birth, os.getpid(), order.sock, order.shared, order.number, order.group)
        return os.posix_spawn(
            sys.executable,
            [*commands[order.group], *map(str, numbers)],
            os.environ,
            setpgroup=0,
            setsigmask=HELD,
        )

    try:
        return start_parent(bear, on_start, companion, b"fastq-starter", may_have_threads=True)
    finally:
        for birth in births:
            os.close(birth)


def command_of(spec: ChildSpec) -> list[str]:
    """Return the words that start an interpreter like this one and have it patched first."""
    if not sys.executable:
        raise SettingsError("children cannot be spawned: this program does not know its Python (sys.executable)")
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    return [sys.executable, *flags, "-c", _FIRST + _PATCHES[spec.patch] + _THEN]


def _description(spec: ChildSpec) -> int:
    """Return a file of what the command reads: built-in types alone, as nothing of the path is there yet."""
    description = {
        "path": [str(each) for each in sys.path],
        "words": list(sys.argv),
        "main": spec.main,
        "program": spec.program,
        "arguments": pickle.dumps(dict(spec.arguments)),
    }
    birth = os.memfd_create("fastq-birth", os.MFD_CLOEXEC)
    with open(birth, "wb", closefd=False) as file:
        pickle.dump(description, file)
    return birth
