"""What a process that is forked does with what its parent has open: one hook for all.

An object that holds a lock, a thread or a connection registers itself at the end of its constructor. A fork in C code
that tells nobody is not noticed.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

logger = logging.getLogger("fastq.forks")


class Forked(Protocol):
    """An object that is its parent's in a forked child.

    With methods ``before_fork`` and ``after_fork_in_parent`` it hears of a fork before it, and after it in the parent.
    """

    def after_fork(self) -> None:
        """In a forked child: be as new, and leave the parent's connections alone. There are no other threads."""


_forked: Final[dict[weakref.ref[Forked], None]] = {}
_pid = os.getpid()


def register(thing: Forked) -> None:
    """Have ``thing.after_fork`` called in every forked child, oldest first, for as long as somebody holds it."""
    # A dict, not a WeakSet: it keeps the order, and each step is one for the interpreter's lock, in any thread.
    _forked[weakref.ref(thing, _forget)] = None


def _forget(reference: weakref.ref[Forked]) -> None:
    _forked.pop(reference, None)


def _before_fork() -> None:
    for reference in reversed(list(_forked)):
        _tell(reference(), "before_fork")


def _after_fork_in_parent() -> None:
    for reference in list(_forked):
        _tell(reference(), "after_fork_in_parent")


def _tell(thing: Forked | None, name: str) -> None:
    method = getattr(thing, name, None)
    if method is None:
        return
    try:
        method()
    except BaseException:  # the others have to be told all the same
        logger.exception("%r is not ready for a fork of process %d", thing, _pid)


def _after_fork() -> None:
    global _pid
    _pid = os.getpid()
    for reference in list(_forked):
        thing = reference()
        if thing is None:
            continue
        try:
            thing.after_fork()
        except BaseException:  # the others have to be told all the same
            logger.exception("%r may still use what is its parent's in process %d", thing, _pid)


def _hear_of_uwsgi(uwsgi: Any) -> None:
    """Have uWSGI tell too: it runs no hooks but its own (2.0.31, and ``py-call-uwsgi-fork-hooks`` is off)."""

    def after_fork() -> None:
        if _pid != os.getpid():  # not where Python's hook came before
            _after_fork()

    try:
        from uwsgidecorators import postfork  # type: ignore[import-untyped,unused-ignore]  # sets the hook, for many
    except Exception:  # not installed, or unusable: it needs a master process
        earlier: Callable[[], object] | None = getattr(uwsgi, "post_fork_hook", None)

        def hook() -> None:
            after_fork()
            if earlier is not None:
                earlier()

        uwsgi.post_fork_hook = hook
    else:
        postfork(after_fork)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
if "uwsgi" in sys.modules:  # there in its processes only, from their start
    _hear_of_uwsgi(sys.modules["uwsgi"])
