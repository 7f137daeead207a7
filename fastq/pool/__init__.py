"""Pools: the processes that run calls. One table says what each name stands for; imports no pool.

A pool of somebody else's is a ``PoolKind`` too: named by ``module:NAME``, as in ``-P mypool:POOL``, or by an entry
point of the group ``fastq.pools``, whose name is the pool's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from fastq.errors import FastqError, SettingsError
from fastq.plugins import Target, find_plugin

#: The group of entry points in which other packages name their pools.
ENTRY_POINTS: Final = "fastq.pools"

#: What runs in a child: (socket, shared memory file, number) -> exit code. No two living children are born with the
#: same number; it is 0 or more.
ChildMain: TypeAlias = Callable[[int, int, int], int]
#: What runs in the companion, the one process beside the children that a program may want. SIGTERM asks it to
#: end; it is blocked until the companion is ready for it.
CompanionMain: TypeAlias = Callable[[], int]


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What a worker asks of its pool.

    ``on_lost(title, reason)`` is told of a death nobody asked for, ``on_fatal(error)`` when no child can be had.
    ``keeps_spare``: one more child than slots waits for its turn. ``overlaps``: a replacement may start while the child
    that it replaces still lives. A child that is not ready after ``start_timeout_s`` is killed (None: never).
    """

    concurrency: int
    on_lost: Callable[[str, str], None]
    on_fatal: Callable[[FastqError], None]
    keeps_spare: bool = False
    overlaps: bool = True
    start_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class PoolKind:
    """One kind of pool. Targets are objects, or where they are (``module:name``).

    ``prepare`` is called before any thread or event loop exists, with (child_main, on_start, companion): ChildMain,
    what to call in each process that forks others, CompanionMain or None. ``pool`` is called on the loop with (loop,
    what ``prepare`` has returned, PoolOptions) and returns an ``interfaces.Pool``.
    """

    names: tuple[str, ...]
    prepare: Target
    pool: Target


PREFORK: Final = PoolKind(
    names=("prefork", "processes"),
    prepare="fastq.pool.zygote:start_zygote",
    pool="fastq.pool.supervisor:Pool",
)

#: Every kind of pool that is built in.
POOLS: Final = (PREFORK,)
_OF_NAME: Final = {name: kind for kind in POOLS for name in kind.names}


def find_pool(name: str) -> PoolKind:
    """Return the pool that a name stands for. Raises SettingsError for one that is not known."""
    found = _OF_NAME.get(name) or find_plugin(ENTRY_POINTS, name, PoolKind)
    if found is None:
        raise SettingsError(f"no pool is known by the name {name!r}; known: {', '.join(_OF_NAME)}, module:NAME")
    return found
