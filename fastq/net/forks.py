"""What a process that is forked does with what its parent has open: one hook of ``os.register_at_fork`` for all.

An object that holds a lock, a thread or a connection registers itself at the end of its constructor. A fork that comes
from C code and does not tell Python (uWSGI without threads) runs no hooks; where ``os.getpid`` costs nothing beside the
call, as with Redis, the object compares it by itself.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Final, Protocol

logger = logging.getLogger("fastq.forks")


class Forked(Protocol):
    """An object that is its parent's in a forked child."""

    def after_fork(self) -> None:
        """In a forked child: be as new, and leave the parent's connections alone. There are no other threads."""


_forked: Final[dict[weakref.ref[Forked], None]] = {}


def register(thing: Forked) -> None:
    """Have ``thing.after_fork`` called in every forked child, oldest first, for as long as somebody holds it."""
    # A dict, not a WeakSet: it keeps the order, and each step is one for the interpreter's lock, in any thread.
    _forked[weakref.ref(thing, _forget)] = None


def _forget(reference: weakref.ref[Forked]) -> None:
    _forked.pop(reference, None)


def _after_fork() -> None:
    for reference in list(_forked):
        thing = reference()
        if thing is None:
            continue
        try:
            thing.after_fork()
        except BaseException:  # the others have to be told all the same
            logger.exception("%r may still use what is its parent's in process %d", thing, os.getpid())


os.register_at_fork(after_in_child=_after_fork)
