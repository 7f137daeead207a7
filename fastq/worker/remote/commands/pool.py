"""Commands about the pool: its size, its processes."""

from __future__ import annotations

from typing import Any, Final

from fastq.worker.remote.commands.command import Command, WorkerView, failed, ok

#: Chosen: more processes at once are a slip of the finger.
_MAX_STEP: Final = 1024


def pool_grow(view: WorkerView, n: int = 1, **_: object) -> dict[str, Any]:
    """Grow pool by n processes/threads."""
    count = _count(n)
    if view.autoscale is not None:
        return failed("pool_grow is not supported with autoscale. Adjust autoscale range instead.")
    view.pool.grow(count)
    return ok("pool will grow")


def pool_shrink(view: WorkerView, n: int = 1, **_: object) -> dict[str, Any]:
    """Shrink pool by n processes/threads."""
    count = _count(n)
    if view.autoscale is not None:
        return failed("pool_shrink is not supported with autoscale. Adjust autoscale range instead.")
    view.pool.shrink(count)
    return ok("pool will shrink")


def pool_restart(
    view: WorkerView, modules: list[str] | None = None, reload: bool = False, reloader: object = None, **_: object
) -> dict[str, Any]:
    """Restart execution pool."""
    if not view.settings.worker_pool_restarts:
        raise ValueError("Pool restarts not enabled")
    if modules or reload:
        raise ValueError("modules are not loaded again in a running worker; restart it (SIGHUP)")
    view.pool.restart()
    return ok("reload started")


def autoscale(view: WorkerView, max: int | None = None, min: int | None = None) -> dict[str, Any]:
    """Modify autoscale settings."""
    if view.autoscale is None:
        raise ValueError("Autoscale not enabled")
    high, low = view.autoscale.set(max, min)
    return ok(f"autoscale now max={high} min={low}")


def _count(n: object) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= _MAX_STEP:
        raise ValueError(f"{n!r} processes: expected 1 to {_MAX_STEP}")
    return n


COMMANDS: Final = (
    Command("control", pool_grow, "[N=1]", arguments=(("n", int),)),
    Command("control", pool_shrink, "[N=1]", arguments=(("n", int),)),
    Command("control", pool_restart),
    Command("control", autoscale, "[max [min]]", arguments=(("max", int), ("min", int))),
)
