"""Commands about kinds of tasks: which are registered, and their limits."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Final

from fastq.worker.remote.commands.command import Command, WorkerView, failed, ok

logger = logging.getLogger("fastq.worker")

_SHOWN: Final = ("exchange", "routing_key", "rate_limit")
#: Chosen: of each task, and characters of each value; a task has some 60 attributes.
_MAX_SHOWN: Final = 100
_MAX_TEXT: Final = 1024
_PER_SECOND: Final = {"s": 1.0, "m": 1 / 60, "h": 1 / 3600}


def registered(
    view: WorkerView, taskinfoitems: list[str] | None = None, builtins: bool = False, **_: object
) -> list[str]:
    """List of registered tasks."""
    attributes = list(dict.fromkeys(name for name in taskinfoitems or _SHOWN if not name.startswith("_")))[:_MAX_SHOWN]
    names = sorted(view.registry)
    return [_line(view, name, attributes) for name in names if builtins or not name.startswith("celery.")]


def _line(view: WorkerView, name: str, attributes: list[str]) -> str:
    task = view.registry[name]
    values = {attribute: getattr(task, attribute, None) for attribute in attributes}
    text = " ".join(f"{attribute}={value!s:.{_MAX_TEXT}}" for attribute, value in values.items() if value is not None)
    return f"{name} [{text}]" if text else name


def rate_limit(view: WorkerView, task_name: str, rate_limit: str | float | None, **_: object) -> dict[str, Any]:
    """Tell worker(s) to modify the rate limit for a task by type."""
    try:
        rate = per_second(rate_limit)
    except ValueError as error:
        return failed(f"Invalid rate limit string: {error!r}")
    options = view.core.tasks.get(task_name.encode())
    if options is None:
        return failed("unknown task")
    options.rate_limit = rate
    _show(view, task_name, rate_limit=rate_limit)
    if not rate_limit:
        logger.info("Rate limits disabled for tasks of type %s", task_name)
        return ok("rate limit disabled successfully")
    logger.info("New rate limit for tasks of type %s: %s.", task_name, rate_limit)
    return ok("new rate limit set successfully")


def per_second(rate: str | float | None) -> float:
    """Return a rate such as ``"10/m"`` in tasks a second; 0 is no limit. Raises ValueError for what is no rate."""
    if not rate:
        return 0.0
    number, _, unit = str(rate).partition("/")
    if unit and unit not in _PER_SECOND:
        raise ValueError(f"{rate!r}: the unit is none of s, m, h")
    value = float(number) * _PER_SECOND[unit or "s"]
    if not 0 <= value < float("inf"):
        raise ValueError(f"{rate!r} is out of range")
    return value


def time_limit(
    view: WorkerView,
    task_name: str | None = None,
    hard: float | None = None,
    soft: float | None = None,
    **_: object,
) -> dict[str, Any]:
    """Tell worker(s) to modify the time limit for task by type."""
    options = view.core.tasks.get(str(task_name).encode())
    if options is None:
        return failed("unknown task")
    options.time_limit, options.soft_time_limit = _seconds(hard), _seconds(soft)
    _show(view, str(task_name), time_limit=hard, soft_time_limit=soft)
    logger.info("New time limits for tasks of type %s: soft=%s hard=%s", task_name, soft, hard)
    return ok("time limits set successfully")


def _seconds(value: float | None) -> float:
    seconds = float(value or 0)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{value!r} is no time limit; expected seconds >= 0")
    return seconds


def _show(view: WorkerView, task_name: str, **attributes: object) -> None:
    """Have ``registered`` show the new values; what counts is in the core."""
    task = view.registry.get(task_name)
    for name, value in attributes.items():
        with contextlib.suppress(AttributeError):
            setattr(task, name, value)


COMMANDS: Final = (
    Command("inspect", registered, "[attr1 [attr2 [... [attrN]]]]", variadic="taskinfoitems", alias="dump_tasks"),
    Command(
        "control",
        rate_limit,
        "<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
        arguments=(("task_name", str), ("rate_limit", str)),
    ),
    Command(
        "control",
        time_limit,
        "<task_name> <soft_secs> [hard_secs]",
        arguments=(("task_name", str), ("soft", float), ("hard", float)),
    ),
)
