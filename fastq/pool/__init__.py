"""Pools: the processes that run calls; their seam, and one table of what each name stands for. Imports no pool.

A pool of somebody else's is a ``PoolKind`` too: named by ``module:NAME``, as in ``-P mypool:POOL``, or by an entry
point of the group ``fastq.pools``, whose name is the pool's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from fastq.errors import FastqError, SettingsError
from fastq.interfaces import ChildHooks
from fastq.plugins import Target, find_plugin, load

if TYPE_CHECKING:
    from fastq._child import Child
    from fastq._core import Core

#: The group of entry points in which other packages name their pools.
ENTRY_POINTS: Final = "fastq.pools"

#: Whether this process is a spawned child that imports the application.
is_spawning = False

#: What runs in the companion, the one process beside the children that a program may want. SIGTERM asks it to
#: end; it is blocked until the companion is ready for it.
CompanionMain: TypeAlias = Callable[[], int]


class ChildMain(Protocol):
    """What runs in a child. ``group`` says of which of the worker's children it is one."""

    def __call__(self, sock: int, shared: int, number: int, group: int = 0, /) -> int:
        """Run calls and return the exit code. No two living children are born with the same number, 0 or more."""


@dataclass(frozen=True, slots=True)
class Group:
    """Children that are alike: how many, and how each runs its calls.

    ``calls``: "one" at a time, or several by "threads", an event "loop", "gevent" or "eventlet", or in a pool that was
    written for Celery, a ``module:Class``. ``slots``: so many.
    """

    calls: str
    processes: int
    slots: int = 1

    @property
    def is_many(self) -> bool:
        """Return whether a process runs several calls at a time, if only it is let."""
        return self.calls != "one"

    @property
    def places(self) -> int:
        """Return for how many calls at a time the memory is made that a process shares with the main one."""
        return max(2, self.slots) if self.is_many else 1

    @property
    def patch(self) -> str:
        """Return the library that patches a process before all else, "" for none."""
        return self.calls if self.calls in ("gevent", "eventlet") else ""

    @property
    def gives_up(self) -> bool:
        """Return whether a call that does not end can be left behind: a thread; else its process has to go."""
        return self.calls == "threads"

    @property
    def has_loop(self) -> bool:
        """Return whether all calls of a process wait when one of them does not give way."""
        return self.calls in ("loop", "gevent", "eventlet")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a fresh interpreter needs to make what runs in a child.

    ``main`` is the ``module:name`` of a function that gives the ChildMain; it is called with ``arguments``, whose
    values can be pickled. ``program``: the file or module that is run before, where the application is in a program
    that starts the worker itself. ``patch``: "gevent" or "eventlet", which patches the process before all else.
    """

    main: str
    arguments: Mapping[str, Any]
    program: str = ""
    patch: str = ""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What a worker asks of its pool.

    ``on_lost(title, reason)`` is told of a death nobody asked for, ``on_fatal(error)`` when no child can be had.
    ``keeps_spare``: one more child than slots waits for its turn. ``overlaps``: a replacement may start while the child
    that it replaces still lives. A child that is not ready after ``start_timeout_s`` is killed (None: never).
    ``groups``: the children that are wanted, those of ``concurrency`` first; ``stall_s``: how long an event loop of
    theirs may stand still.
    """

    concurrency: int
    on_lost: Callable[[str, str], None]
    on_fatal: Callable[[FastqError], None]
    keeps_spare: bool = False
    overlaps: bool = True
    start_timeout_s: float | None = None
    groups: tuple[Group, ...] = ()
    stall_s: float = 0


class Companion(Protocol):
    """The one process beside the children that a program may want; it is started again when it ends."""

    def start(self) -> None:
        """Ask for the process."""

    def ask_stop(self) -> None:
        """Ask the process to end, and do not start it again; does not wait."""

    async def stop(self) -> None:
        """End the process; what it keeps has been written when this returns."""


class Pool(ChildHooks, Protocol):
    """The processes that run calls, as the main process sees them: which runs where, never which call.

    It makes a ``Child`` for each process, gives it to the message loop (``Core.add_child``), lets it have calls
    (``Child.activate``) and reports its end (``Core.remove_child``).
    """

    @property
    def companion(self) -> Companion | None:
        """Return the one process beside the children, where a program wants one."""

    async def start(self, core: Core) -> None:
        """Return when this message loop's calls can run."""

    async def stop(self, deadline_s: float | None) -> None:
        """Ask every child to end after its call; kill what is left at the deadline (None: wait)."""

    def kill(self) -> None:
        """Kill every child."""

    def close(self) -> None:
        """Give back what the pool itself has."""

    def grow(self, n: int = 1) -> None:
        """Have so many more calls run at a time."""

    def shrink(self, n: int = 1) -> None:
        """Have so many fewer calls run at a time; those that run are finished. One place stays."""

    def restart(self) -> None:
        """Replace every child; each finishes the call that it runs."""

    @property
    def size(self) -> int:
        """Return how many calls run at a time."""

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the children that run calls."""

    def terminate(self, child: Child, signum: int) -> None:
        """Send a child a signal; no harm when it has ended."""

    def kill_child(self, child: Child) -> None:
        """Kill one child; another one takes its place."""

    def dump_stack(self, child: Child) -> None:
        """Have a child write the stacks of its threads, for ``stacks``."""

    def stacks(self, child: Child) -> str:
        """Return the stacks that a child has written; "" when it has not, or has ended."""


class Serving(Protocol):
    """What runs the calls of a pool without children, in the thread that calls it."""

    @property
    def is_stuck(self) -> bool:
        """Return whether the call that runs was told to end and has not: ``serve`` will not return."""

    def serve(self) -> None:
        """Run calls until ``close``."""

    def close(self) -> None:
        """Have ``serve`` return, after the call that runs; from any thread."""


@dataclass(frozen=True, slots=True)
class PoolKind:
    """One kind of pool. Targets are objects, or where they are (``module:name``).

    ``calls`` says how a process runs them, as ``Group.calls``.

    ``prepare`` is called before any thread or event loop exists, with (child_main, on_start, companion): ChildMain,
    what to call in each process that forks others, CompanionMain or None. ``pool`` is called on the loop with (loop,
    what ``prepare`` has returned, PoolOptions) and returns a ``Pool``. ``spawn`` is called instead of ``prepare`` where
    children are to be spawned, with ChildSpecs, one for each group, instead of the ChildMain. Where one of the two is
    None, this pool's children are never forked, or never spawned.

    ``runs_here``: calls run in the worker's own process, one at a time. What ``prepare`` has returned is a ``Serving``,
    and the loop has a thread of its own.
    """

    names: tuple[str, ...]
    prepare: Target | None
    pool: Target
    calls: str = "one"
    spawn: Target | None = None
    runs_here: bool = False


PREFORK: Final = PoolKind(
    names=("prefork", "processes"),
    prepare="fastq.pool.zygote:start_zygote",
    pool="fastq.pool.groups:make_pool",
    spawn="fastq.pool.starter:start_starter",
)
THREADS: Final = replace(PREFORK, names=("threads",), calls="threads")
ASYNCIO: Final = replace(PREFORK, names=("asyncio",), calls="loop")
# Patched before the application is imported, so that its processes cannot be forked from one that has it.
GEVENT: Final = replace(PREFORK, names=("gevent",), calls="gevent", prepare=None)
EVENTLET: Final = replace(PREFORK, names=("eventlet",), calls="eventlet", prepare=None)

SOLO: Final = PoolKind(
    names=("solo",),
    prepare="fastq.pool.solo:Solo",
    pool="fastq.pool.solo:Pool",
    runs_here=True,
)

#: Every kind of pool that is built in.
POOLS: Final = (PREFORK, THREADS, ASYNCIO, GEVENT, EVENTLET, SOLO)
_OF_NAME: Final = {name: kind for kind in POOLS for name in kind.names}
#: The names of those that are built in.
POOL_NAMES: Final = tuple(_OF_NAME)


def find_pool(name: str) -> PoolKind:
    """Return the pool that a name stands for. Raises SettingsError for one that is not known."""
    found = _OF_NAME.get(name) or _hosted(name) or find_plugin(ENTRY_POINTS, name, PoolKind)
    if found is None:
        raise SettingsError(f"no pool is known by the name {name!r}; known: {', '.join(_OF_NAME)}, module:NAME")
    return found


def _hosted(name: str) -> PoolKind | None:
    """Return the kind of children in each of which there is a pool that was written for Celery; None for another name.

    Raises SettingsError for one whose way to run calls goes with no child.
    """
    found = load(name) if ":" in name else None
    bases = {f"{base.__module__}:{base.__qualname__}" for base in getattr(found, "__mro__", ())}
    if "celery.concurrency.base:BasePool" not in bases:
        return None
    other = next((other for base, other in _OF_CELERYS.items() if base in bases), "")
    if other:
        raise SettingsError(
            f"the pool {name} is one of Celery's {other} with something added, which cannot be hosted in a child; "
            f"use -P {other}"
        )
    return replace(PREFORK, names=(name,), calls=name)


#: What only the worker's own process can run, or a process that was patched before all else.
_OF_CELERYS: Final = {
    "celery.concurrency.prefork:TaskPool": "prefork",
    "celery.concurrency.gevent:TaskPool": "gevent",
    "celery.concurrency.eventlet:TaskPool": "eventlet",
}
