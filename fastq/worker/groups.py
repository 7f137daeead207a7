"""Which children a worker has: the ones that ``-P`` and ``-c`` say, and those for coroutine functions beside them."""

from __future__ import annotations

from fastq.pool import ASYNCIO, POOLS, Group, PoolKind
from fastq.worker.options import WorkerOptions


def groups_of(options: WorkerOptions, kind: PoolKind, has_async: bool) -> tuple[Group, ...]:
    """Return the groups of children for resolved options. ``has_async``: some tasks are coroutine functions."""
    count = max(1, options.autoscale[1]) if options.autoscale else options.concurrency or 1
    if kind.calls == "one":
        first = Group("one", count)
    else:
        first = Group(kind.calls, options.processes or 1, options.concurrency or 1)
    # A pool of somebody else's has processes of one kind.
    mixes = kind in POOLS and kind is not ASYNCIO and not kind.runs_here
    if not (mixes and has_async and options.async_processes):
        return (first,)
    return first, Group("loop", options.async_processes, options.async_slots or 1)
