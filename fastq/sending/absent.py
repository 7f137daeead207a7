"""What Celery has and FastQ applications have not, and what to do instead: the words, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

C = TypeVar("C", bound="type[Any]")

_NEXT: Final = "signatures, chains, groups and chords are not there yet; have the task send the next one"
_CONTROL: Final = "control workers by `fastq control` and ask them by `fastq inspect`"
_SCHEDULER: Final = "there is no scheduler yet; let cron or a systemd timer run `fastq -A <module> call <task>`"
_BASE: Final = "give a base class that has it as a method: @app.task(base=...)"
_RUNS_AGAIN: Final = "a worker in reliable mode, the default, runs a call again whose process died"
_ACKED: Final = "a call that failed or ran too long is acknowledged"

#: Options of a task.
TASK_OPTIONS: Final = {
    "rate_limit": "give one to running workers: `fastq control rate_limit <task> 10/m`",
    "reject_on_worker_lost": _RUNS_AGAIN,
    "retry_on_worker_lost": _RUNS_AGAIN,
    "acks_on_failure_or_timeout": _ACKED,
    "acks_on_failure": _ACKED,
    "acks_on_timeout": _ACKED,
    "store_errors_even_if_ignored": "leave ignore_result alone where errors matter",
    "backend": "the setting result_backend holds for all tasks",
    "send_events": "a worker's -E holds for all tasks",
    "trail": "children of a call are always kept",
    "pydantic": "validate inside the task, and pass plain values: model.model_dump()",
    "delivery_mode": "the setting task_default_delivery_mode holds for all tasks",
    "resultrepr_maxsize": "it is 1,024",
    **dict.fromkeys(("before_start", "on_success", "on_failure", "on_retry", "after_return"), _BASE),
}

#: Options of a call.
SEND_OPTIONS: Final = {
    **dict.fromkeys(("link", "link_error", "chain", "chord", "group_id", "group_index", "root_id", "parent_id"), _NEXT),
    **dict.fromkeys(("connection", "producer", "publisher"), "a process has one connection of its own"),
    "delivery_mode": TASK_OPTIONS["delivery_mode"],
    "add_to_parent": TASK_OPTIONS["trail"],
    "throw": "it is an option of apply()",
}

#: Attributes of a task.
TASK_ATTRIBUTES: Final = {
    **dict.fromkeys(("s", "si", "signature", "subtask", "map", "starmap", "chunks", "replace", "add_to_chord"), _NEXT),
    "rate_limit": TASK_OPTIONS["rate_limit"],
    "backend": "the application has it: task.app.store",
    "apply_chain": _NEXT,
}

#: Attributes of an application.
APP_ATTRIBUTES: Final = {
    **dict.fromkeys(("signature", "canvas", "chain", "group", "chord"), _NEXT),
    **dict.fromkeys(("add_periodic_task", "on_after_configure", "on_after_finalize", "Beat"), _SCHEDULER),
    "control": _CONTROL,
    "worker_main": "start workers by `fastq -A <module> worker`, in a test with fastq.testing.worker(app)",
    "start": "use the command line: `fastq -A <module> ...`",
    "connection": "app.publisher is the connection to the broker",
    "backend": "app.store is where results are",
    "GroupResult": _NEXT,
}

#: Names of the package.
NAMES: Final = {
    **dict.fromkeys(("chain", "group", "chord", "chunks", "signature", "subtask", "maybe_signature"), _NEXT),
    **dict.fromkeys(("Signature", "GroupResult", "xmap", "xstarmap", "canvas"), _NEXT),
    "Celery": "the application is FastQ here; one of Celery's stays as it is and runs by `fastq -A <module> worker`",
    "signals": "there are none yet; a task class may have handlers (on_failure and others)",
    **dict.fromkeys(("crontab", "schedules", "beat"), _SCHEDULER),
}


def absent(where: str, name: str, table: Mapping[str, str]) -> str | None:
    """Return the words for something that Celery has; None for what it has not either."""
    hint = table.get(name)
    return None if hint is None else f"{where} {name!r}, which Celery has and fastq has not (yet): {hint}"


def lacking(table: Mapping[str, str], where: str) -> Callable[[C], C]:
    """Have who asks for a name of the table told what to do instead; ``where`` is a format for the object.

    Not by ``__getattr__``: with one, Python takes a slow path to every attribute, several times per call that is sent.
    """

    def present(instance: object) -> list[str]:
        return [name for name in object.__dir__(instance) if name not in table]

    def add(cls: C) -> C:
        for name, value in {"__dir__": present, **{name: _Absent(where, name, table) for name in table}}.items():
            setattr(cls, name, value)
        return cls

    return add


class _Absent:
    """An attribute that is not there."""

    def __init__(self, where: str, name: str, table: Mapping[str, str]) -> None:
        self._where = where
        self._name = name
        self._table = table

    def __get__(self, instance: object, owner: type) -> NoReturn:
        where = f"type object {owner.__name__!r} has no" if instance is None else self._where.format(instance)
        raise AttributeError(absent(where, self._name, self._table))
