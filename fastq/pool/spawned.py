"""What a spawned child does first, in its fresh interpreter: what the zygote has done for forked ones.

The process is patched already where the pool wants it. Knows no application.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import pickle
import signal
import sys
from typing import Any

import fastq.pool
from fastq.errors import FastqError
from fastq.plugins import load
from fastq.pool.process import die_with_parent, set_name
from fastq.pool.starter import HELD
from fastq.pool.zygote import EX_INTERNAL, end_with, handle_signals


def main(birth: dict[str, Any], file: int, starter: int, sock: int, shared: int, number: int, group: int) -> None:
    """Become the child that is described; ends the process."""
    end_with(lambda: _be_child(birth, file, starter, sock, shared, number, group))


def _be_child(birth: dict[str, Any], file: int, starter: int, sock: int, shared: int, number: int, group: int) -> int:
    die_with_parent()
    if os.getppid() != starter:
        return 0  # it died before the kernel was asked to tell
    set_name(b"fastq-child")
    handle_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    os.close(file)
    for fd in (sock, shared):
        os.set_inheritable(fd, False)  # programs that tasks start get neither
    sys.argv[:] = birth["words"]
    fastq.pool.is_spawning = True
    if birth["program"]:
        _import_program(birth["program"])
    try:
        child_main = load(birth["main"])(**pickle.loads(birth["arguments"]))  # noqa: S301  from the starter
    except FastqError as error:  # it says by itself what is wrong
        logging.getLogger("fastq.worker").critical("a spawned child cannot start: %s", error)
        return EX_INTERNAL
    fastq.pool.is_spawning = False
    # As in forked children: the collector has nothing to do with what an import makes.
    gc.freeze()
    code: int = child_main(sock, shared, number, group)
    # Other than in a forked child, what was registered is this process's own.
    atexit._run_exitfuncs()
    return code


def _import_program(place: str) -> None:
    """Run the program that has started the worker, as multiprocessing's children do: not under its name ``__main__``.

    ``place`` is a file, or the name of a module that was run by ``python -m``.
    """
    from multiprocessing import spawn  # few need it

    if os.sep in place:
        os.environ["MP_MAIN_FILE"] = place  # by which Celery knows whose tasks are named after __main__
    spawn.prepare({"init_main_from_path" if os.sep in place else "init_main_from_name": place})
