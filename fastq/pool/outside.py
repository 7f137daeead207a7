"""Exceptions that are raised in a thread from outside, or by the handler of a signal: they arrive between two steps of
its Python code, and so perhaps where a lock has just been taken that nobody will give back.
"""

from __future__ import annotations

import _imp
import contextlib
import logging
from importlib import _bootstrap
from threading import get_ident
from typing import Any, cast
from weakref import WeakSet

#: Locks of others that are given back too, which who has one can take again (``threading.RLock``).
watched_locks: WeakSet[Any] = WeakSet()


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


def imports(thread: int) -> bool:
    """Return whether a thread imports a module, or waits for another one that does.

    Ended there, it would leave the others with a module that is half made, or waiting for ever.
    """
    importing: Any = _bootstrap
    if _imp.lock_held() or importing._blocking_on.get(thread):
        return True
    locks = [reference() for reference in list(importing._module_locks.values())]
    return any(lock is not None and lock.owner == thread for lock in locks)


def release_locks() -> None:
    """Give back the interpreter's own locks, and watched ones, that code left held which such an exception has ended.

    To be called in its thread, outside of any import and of any logging. All other threads would wait for them for
    ever: those of imports and of logging are taken in a step of their own, before what gives them back.
    """
    if _imp.lock_held():
        with contextlib.suppress(RuntimeError):  # it is another thread's, or nobody's any more
            while True:
                _imp.release_lock()
    importing: Any = _bootstrap
    log: Any = logging
    mine = get_ident()
    for module_lock in [reference() for reference in list(importing._module_locks.values())]:
        while module_lock is not None and module_lock.owner == mine:
            module_lock.release()
    handlers = [reference() for reference in list(log._handlerList)]
    # The set itself: another thread may add to it meanwhile, which an iteration in Python would see.
    watched = [reference() for reference in list(cast("Any", watched_locks).data)]
    for lock in (log._lock, *(getattr(handler, "lock", None) for handler in handlers), *watched):
        is_owned = getattr(lock, "_is_owned", None)  # a handler's may be of another kind
        while is_owned is not None and is_owned():
            lock.release()
