"""Exceptions that are raised in a thread from outside: they arrive before its next step of Python code."""

from __future__ import annotations

import contextlib


def raise_in(thread: int, error: type[BaseException]) -> None:
    """Have an exception arrive in a thread, given by its ident. Once that has ended its work it has to ``absorb``."""
    import ctypes  # of no use to children

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def absorb() -> None:
    """Have an exception arrive that was raised in this thread from outside and comes too late: here it harms nobody.

    Python's own way to take it back leaves a flag set that has every step of code look for such exceptions, for ever;
    and where a profiler is set, as coverage does, no thread takes another step.
    """
    with contextlib.suppress(BaseException):
        _step()


def _step() -> None:
    for _ in range(8):
        pass
