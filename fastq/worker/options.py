"""What a worker was asked to do, as one value, and how it meets the settings. It starts nothing.

``None`` and an empty tuple mean "as the settings say". Names and units are those of Celery's worker command.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastq.errors import SettingsError
from fastq.pool import find_pool
from fastq.queues import direct_queue, named_options, names_by_alias, read_by_default
from fastq.settings import Settings

NODE_NAME = "fastq"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of ``fastq worker``. Raises SettingsError when a number is out of range."""

    concurrency: int | None = None
    pool: str = ""  # a name of fastq.pool.POOLS, module:NAME, an entry point of fastq.pools; empty: as the settings say
    pool_start_method: str | None = None  # fork, forkserver (the same) or spawn; None: what the application needs
    queues: tuple[str, ...] = ()
    exclude_queues: tuple[str, ...] = ()
    hostname: str = ""
    loglevel: str = "WARNING"
    logfile: str = ""
    pidfile: str = ""
    prefetch_multiplier: int | None = None
    adapts_prefetch: bool = True  # hold more in advance while tasks are short; not when a multiplier was asked for
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None  # KiB of resident memory
    time_limit: float | None = None  # seconds, as the next two
    soft_time_limit: float | None = None
    grace_s: float | None = None
    optimization: str = "default"  # accepted for unit files: both profiles dispatch fairly here
    include: tuple[str, ...] = ()
    purge: bool = False
    task_events: bool | None = None
    autoscale: tuple[int, int] | None = None  # most and least children
    disable_prefetch: bool | None = None  # take a message only when a child is free
    statedb: str = ""
    heartbeat_interval: float | None = None  # seconds between two events that say that the worker lives
    without_mingle: bool = False
    without_gossip: bool = False
    without_heartbeat: bool = False
    reliable: bool | None = None
    beat: bool = False  # send periodic tasks too, in a process beside
    schedule_filename: str = ""
    scheduler: str = ""
    processes: int | None = None  # of threads or greenlets; prefork has as many as `concurrency`
    async_processes: int | None = None  # for tasks that are coroutine functions; 0: they run among the others
    async_slots: int | None = None  # coroutines at a time in each of those
    color: bool | None = field(default=None, compare=False)  # None: as the terminal and NO_COLOR say
    quiet: bool = field(default=False, compare=False)
    given_name: str = field(default="", compare=False)  # the node name as it was given; empty: the default one
    user: Mapping[str, Any] = field(default_factory=dict, compare=False)  # options that the application has added

    def __post_init__(self) -> None:
        object.__setattr__(self, "given_name", self.given_name or self.hostname)
        object.__setattr__(self, "hostname", node_name(self.hostname))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                option = "--" + name.removesuffix("_s").replace("_", "-")
                raise SettingsError(f"{option} is {value}; it must be {least} or more")

    def named(self, node: str) -> WorkerOptions:
        """Return the options with this as the first part of the node name, if none was given."""
        full = self.changed()
        object.__setattr__(full, "hostname", node_name(self.given_name, node=node))
        return full

    def changed(self, **values: Any) -> WorkerOptions:
        """Return the options with other values; the node name stays as it is."""
        full = replace(self, **values)
        # It was expanded once already; a literal "%" in it stays one.
        object.__setattr__(full, "hostname", self.hostname)
        object.__setattr__(full, "given_name", self.given_name)
        return full

    def resolved(self, settings: Settings) -> WorkerOptions:
        """Return the options with every ``None`` filled in from the settings and the queues chosen.

        What is ``None`` after that has no limit.
        """
        reliable = settings.fastq_reliable if self.reliable is None else self.reliable
        # Celery waits for running tasks without end; so does compat, unless somebody asked for a deadline.
        is_patient = not reliable and "fastq_grace_s" not in settings.changes()
        concurrency = _first(self.concurrency, settings.worker_concurrency, available_cpus())
        pool = self.pool or settings.worker_pool
        if find_pool(pool).runs_here:
            concurrency = 1
        if not concurrency:
            raise SettingsError(f"--concurrency is {concurrency}; it must be 1 or more")
        return self.changed(
            concurrency=concurrency,
            pool=pool,
            pool_start_method=_first(self.pool_start_method, settings.worker_pool_start_method),
            queues=chosen_queues(self.queues, self.exclude_queues, settings, self.hostname),
            prefetch_multiplier=_first(self.prefetch_multiplier, settings.worker_prefetch_multiplier),
            adapts_prefetch=self.prefetch_multiplier is None and "worker_prefetch_multiplier" not in settings.changes(),
            max_tasks_per_child=_first(self.max_tasks_per_child, settings.worker_max_tasks_per_child),
            max_memory_per_child=_first(self.max_memory_per_child, settings.worker_max_memory_per_child),
            time_limit=_first(self.time_limit, settings.task_time_limit),
            soft_time_limit=_first(self.soft_time_limit, settings.task_soft_time_limit),
            reliable=reliable,
            task_events=_first(self.task_events, settings.worker_send_task_events),
            statedb=self.statedb or settings.worker_state_db or "",
            async_processes=_first(self.async_processes, settings.fastq_async_processes),
            async_slots=_first(self.async_slots, settings.fastq_async_slots),
            grace_s=_first(self.grace_s, None if is_patient else settings.fastq_grace_s),
        )


_LEAST = {
    "concurrency": 0,  # to a Celery application: as its settings say
    "prefetch_multiplier": 0,  # 0: no limit, as in Celery
    "max_tasks_per_child": 1,
    "max_memory_per_child": 1,
    "time_limit": 0,  # 0: no limit
    "soft_time_limit": 0,
    "grace_s": 0,
    "processes": 1,
    "async_processes": 0,
    "async_slots": 1,
}


def _first(*values: _T | None) -> _T | None:
    return next((value for value in values if value is not None), None)


def chosen_queues(
    asked: tuple[str, ...], excluded: tuple[str, ...], settings: Settings, hostname: str = ""
) -> tuple[str, ...]:
    """Return the queues to consume: those asked for, else those declared, else the default one; without the excluded.

    A queue's alias stands for its name. With ``worker_direct`` the node's own queue is one more. Raises SettingsError
    when none is left, and for one not declared when missing queues are not to be created.
    """
    names = names_by_alias(settings.task_queues)
    asked = tuple(names.get(name, name) for name in asked)
    declared = [name for name, _ in named_options(settings.task_queues)] or [settings.task_default_queue]
    unknown = [name for name in asked if name not in declared]
    if unknown and not settings.task_create_missing_queues:
        raise SettingsError(
            f"unknown queue {unknown[0]!r}; declared: {', '.join(declared)}. "
            "Add it to task_queues, or set task_create_missing_queues to create it"
        )
    left_out = {names.get(name, name) for name in excluded}
    queues = tuple(name for name in dict.fromkeys(asked or declared_queues(settings)) if name not in left_out)
    if not queues:
        raise SettingsError(f"no queue is left: -X excludes {', '.join(excluded)}. Leave one of them out of -X")
    return (*queues, direct_queue(hostname)) if settings.worker_direct and hostname else queues


def declared_queues(settings: Settings) -> tuple[str, ...]:
    """Return the names in ``task_queues`` that are read by default, or the default queue's when there are none."""
    return tuple(read_by_default(settings.task_queues)) or (settings.task_default_queue,)


def node_name(name: str = "", host: str = "", node: str = NODE_NAME) -> str:
    """Return the worker's node name, with %h, %n, %d and %% expanded. Parts not given are ``node`` and the host."""
    host = host or socket.gethostname()
    given, _, place = name.rpartition("@")
    full = f"{given or node}@{place or host}"
    short, _, domain = host.partition(".")
    return expand(full, {"h": host, "n": short, "d": domain})


def expand_path(path: str, hostname: str, index: int = 0) -> str:
    """Return a log or pid file path with its abbreviations replaced.

    %p is the node name, %n its name part, %h, %d the host, %i the child's number (0: parent), %I the same after a dash.
    """
    name, _, host = hostname.partition("@")
    values = {"p": hostname, "n": name, "h": host, "d": host.partition(".")[2], "i": str(index)}
    values["I"] = f"-{index}" if index else ""
    return expand(path, values)


def expand(text: str, values: Mapping[str, str]) -> str:
    """Return the text with each ``%x`` that has a value replaced; ``%%`` is a percent sign; others stay."""
    return re.sub(r"%(.)", lambda match: {"%": "%", **values}.get(match[1], match[0]), text)


def available_cpus() -> int:
    """Return how many processors this process may use: its affinity, and its control group's quota rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, _quota_cpus() or count))


def _quota_cpus(path: str = "/sys/fs/cgroup/cpu.max") -> int | None:
    """Return the quota of control group version 2 in whole processors; None when there is none."""
    try:
        with open(path, encoding="ascii") as file:
            quota, period = file.read().split()[:2]
    except (OSError, ValueError):
        return None
    return None if quota == "max" else -(-int(quota) // int(period))
