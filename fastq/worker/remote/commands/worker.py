"""Commands about the worker as a whole: signs of life, what it is and has done, events, shutting down."""

from __future__ import annotations

import logging
import os
import resource
import time
from typing import Any, Final

from fastq.bus import NAMESAKE
from fastq.pool import find_pool
from fastq.worker.remote.commands.command import Command, WorkerView, failed, ok
from fastq.worker.remote.commands.revoking import publish
from fastq.worker.report import broker_info

logger = logging.getLogger("fastq.worker")


def ping(view: WorkerView | None, from_node: object = None, instance: object = None, **_: object) -> dict[str, Any]:
    """Ping worker(s)."""
    if view is not None and from_node == view.hostname:
        _warn_of_namesake(view, instance)
    return ok("pong")


def clock(view: WorkerView, **_: object) -> dict[str, Any]:
    """Get current logical clock value."""
    return {"clock": view.clock.value}


def report(view: WorkerView) -> dict[str, Any]:
    """Information about the installation for bug reports."""
    return ok(view.report())


def conf(view: WorkerView, with_defaults: bool = False, **_: object) -> dict[str, Any]:
    """List configuration."""
    return view.configuration(with_defaults)


def hello(
    view: WorkerView, from_node: str, revoked: object = None, instance: object = None, **_: object
) -> dict[str, Any] | None:
    """Request mingle sync-data."""
    if from_node == view.hostname:
        _warn_of_namesake(view, instance)
        return None
    logger.info("sync with %s", from_node)
    if isinstance(revoked, (list, tuple, dict)):
        view.revocations.update(each for each in revoked if isinstance(each, str))
        publish(view)
    view.revocations.purge()
    return {"revoked": list(view.revocations), "clock": view.clock.forward()}


def _warn_of_namesake(view: WorkerView, instance: object) -> None:
    """Warn when a worker of our name has asked; it may as well have been this one."""
    if instance != view.instance:
        logger.warning(NAMESAKE, view.hostname)


# --- statistics


def stats(view: WorkerView, **_: object) -> dict[str, Any]:
    """Request worker statistics/information."""
    found: dict[str, Any] = {
        "total": {task.name: task.runs for task in view.core.tasks.values() if task.runs},
        "pid": os.getpid(),
        "clock": str(view.clock.value),
        "uptime": round(time.time() - view.started_unix),
        "pool": _pool(view),
        "broker": broker_info(view.settings),
        "prefetch_count": view.core.prefetch,
        "rusage": _usage(),
    }
    if view.autoscale is not None:
        bounds = {"max": view.autoscale.max, "min": view.autoscale.min}
        found["autoscaler"] = {**bounds, "current": view.pool.size, "qty": len(view.core.reserved())}
    return found


def _pool(view: WorkerView) -> dict[str, Any]:
    options = view.options
    runs = sum(task.runs for task in view.core.tasks.values())
    base = {
        "implementation": f"{type(view.pool).__module__}:{type(view.pool).__name__}",
        # Pools with children of one kind have none beside.
        "max-concurrency": view.pool.size + getattr(view.pool, "beside", 0),
        "processes": view.pool.pids,
    }
    if view.core.stalls:
        base["stalls"] = view.core.stalls  # of event loops; Celery has no such number
    if find_pool(options.pool).runs_here:
        return {**base, "max-tasks-per-child": None, "put-guarded-by-semaphore": True, "timeouts": []}
    share = f"{1 / view.pool.size:.2f}" if view.pool.size else "0.00"
    return {
        **base,
        "max-tasks-per-child": options.max_tasks_per_child or "N/A",
        "put-guarded-by-semaphore": False,
        "timeouts": [options.soft_time_limit or 0, options.time_limit or 0],
        # What each child was given is not counted; any free one takes the next call.
        "writes": {
            "total": runs,
            "avg": share,
            "all": "",
            "raw": "",
            "strategy": "fair",
            "inqueues": {"total": view.pool.size, "active": len(view.core.active())},
        },
    }


def _usage() -> dict[str, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {name.removeprefix("ru_"): getattr(usage, name) for name in dir(usage) if name.startswith("ru_")}


# --- events


def enable_events(view: WorkerView) -> dict[str, Any]:
    """Tell worker(s) to send task-related events."""
    if view.events is None:
        return failed("event dispatcher unavailable")
    return ok("task events enabled" if view.events.enable() else "task events already enabled")


def disable_events(view: WorkerView) -> dict[str, Any]:
    """Tell worker(s) to stop sending task-related events."""
    if view.events is None:
        return failed("event dispatcher unavailable")
    return ok("task events disabled" if view.events.disable() else "task events already disabled")


def heartbeat(view: WorkerView) -> None:
    """Tell worker(s) to send event heartbeat immediately."""
    if view.events is not None:
        view.events.heartbeat()


def election(view: WorkerView, id: str, topic: str, action: object = None, **_: object) -> None:
    """Hold election."""
    # Who does not vote is not counted: Celery's workers elect among themselves.
    logger.debug("election %s on %s is left to others", id, topic)


def shutdown(view: WorkerView, msg: str = "Got shutdown from remote", **_: object) -> None:
    """Shutdown worker(s)."""
    logger.warning("%s", str(msg)[:1000])
    view.stop("warm")


def switch(text: str) -> bool:
    """Return what a word on the command line says. Raises ValueError for one that is neither yes nor no."""
    word = text.lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


COMMANDS: Final = (
    Command("inspect", ping),
    Command("inspect", clock),
    Command("inspect", report),
    Command("inspect", conf, "[include_defaults=False]", arguments=(("with_defaults", switch),), alias="dump_conf"),
    Command("inspect", hello, is_visible=False),
    Command("inspect", stats),
    Command("control", enable_events),
    Command("control", disable_events),
    Command("control", heartbeat),
    Command("control", election),
    Command("control", shutdown),
)
