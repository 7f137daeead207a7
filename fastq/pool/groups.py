"""A pool of children of several kinds, each kind with a supervisor of its own; they share one zygote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from fastq._child import Child
from fastq._core import Core
from fastq.errors import FastqError
from fastq.guard import guarded
from fastq.interfaces import ChildHooks
from fastq.pool import Pool, PoolOptions, supervisor
from fastq.pool.companion import Companion
from fastq.pool.zygote import Zygote


def make_pool(loop: asyncio.AbstractEventLoop, zygote: Zygote, options: PoolOptions) -> Pool:
    """Return the pool of the groups that the options name."""
    if len(options.groups) <= 1:
        return supervisor.Pool(loop, zygote, options)
    return Groups(loop, zygote, options)


@guarded(ChildHooks)
class Groups:
    """One supervisor for each group (the protocol is ``fastq.pool.Pool``). The size is the first one's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, zygote: Zygote, options: PoolOptions) -> None:
        self._loop = loop
        self._zygote = zygote
        told = replace(options, on_fatal=_once(options.on_fatal))
        self._pools = [
            supervisor.Pool(loop, zygote, told, index=index, shares=True) for index in range(len(options.groups))
        ]
        self._first = self._pools[0]

    @property
    def companion(self) -> Companion | None:
        """Return the one process beside the children."""
        return self._first.companion

    async def start(self, core: Core) -> None:
        """Return when calls of every group can run."""
        self._loop.add_reader(self._zygote.fd, self._on_reports)
        self._loop.add_reader(self._zygote.pidfd, self._on_end)
        await asyncio.gather(*(pool.start(core) for pool in self._pools))

    async def stop(self, deadline_s: float | None) -> None:
        """Ask every child to end after its calls; kill what is left at the deadline."""
        await asyncio.gather(*(pool.stop(deadline_s) for pool in self._pools))

    def kill(self) -> None:
        """Kill every child."""
        for pool in self._pools:
            pool.kill()

    def close(self) -> None:
        """End the zygote."""
        self._loop.remove_reader(self._zygote.fd)
        self._loop.remove_reader(self._zygote.pidfd)
        self._zygote.close()

    def grow(self, n: int = 1) -> None:
        """Have so many more calls of the first group run at a time."""
        self._first.grow(n)

    def shrink(self, n: int = 1) -> None:
        """Have so many fewer calls of the first group run at a time."""
        self._first.shrink(n)

    def restart(self) -> None:
        """Replace every child; each finishes the calls that it runs."""
        for pool in self._pools:
            pool.restart()

    @property
    def size(self) -> int:
        """Return how many calls of the first group run at a time."""
        return self._first.size

    @property
    def beside(self) -> int:
        """Return how many calls of the other groups run at a time."""
        return sum(pool.size for pool in self._pools[1:])

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the children that run calls, group by group."""
        return [pid for pool in self._pools for pid in pool.pids]

    def _of(self, child: Child) -> supervisor.Pool:
        return self._pools[child.group]

    def terminate(self, child: Child, signum: int) -> None:
        """Send a child a signal."""
        self._of(child).terminate(child, signum)

    def kill_child(self, child: Child) -> None:
        """Kill one child; another one takes its place."""
        self._of(child).kill_child(child)

    def dump_stack(self, child: Child) -> None:
        """Have a child write the stacks of its threads."""
        self._of(child).dump_stack(child)

    def stacks(self, child: Child) -> str:
        """Return the stacks that a child has written."""
        return self._of(child).stacks(child)

    def child_ready(self, child: Child) -> None:
        """A child takes calls."""
        self._of(child).child_ready(child)

    def child_full(self, child: Child) -> None:
        """A child was given its last call."""
        self._of(child).child_full(child)

    def child_drained(self, child: Child) -> None:
        """A child has finished its last call."""
        self._of(child).child_drained(child)

    def child_broken(self, child: Child, reason: str) -> None:
        """A child does not make sense any more."""
        self._of(child).child_broken(child, reason)

    def _on_reports(self) -> None:
        try:
            reports = self._zygote.reports()
        except EOFError:
            self._loop.remove_reader(self._zygote.fd)
            return
        for pool in self._pools:
            pool.take(reports)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._zygote.pidfd)
        for pool in self._pools:
            pool.lose()


def _once(tell: Callable[[FastqError], None]) -> Callable[[FastqError], None]:
    """Return a function that tells of the first error alone: it is the same for all groups."""
    told: list[FastqError] = []

    def tell_first(error: FastqError) -> None:
        told.append(error)
        if len(told) == 1:
            tell(error)

    return tell_first
