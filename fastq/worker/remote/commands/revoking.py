"""Commands that keep tasks from running, or end them: by id, or by stamps."""

from __future__ import annotations

import logging
import signal as signals
from collections.abc import Mapping
from typing import Any, Final

from fastq.worker.remote.commands.command import Command, WorkerView, ok
from fastq.worker.remote.commands.describe import stamps_of, texts

logger = logging.getLogger("fastq.worker")

_DEFAULT_SIGNAL: Final = "SIGTERM"


def revoked(view: WorkerView, **_: object) -> list[str]:
    """List of revoked task-ids."""
    return list(view.revocations)


def revoke(
    view: WorkerView, task_id: str | list[str], terminate: bool = False, signal: str | int | None = None, **_: object
) -> dict[str, Any]:
    """Revoke task by task id (or list of ids)."""
    ids = _ids(task_id)
    signum = signal_number(signal)
    view.revocations.update(ids)
    publish(view)
    if not terminate:
        # What runs here goes on.
        running = {row["id"] for row in view.core.active()}
        view.mark_revoked([each for each in ids if each not in running])
        logger.info("Tasks flagged as revoked: %s", ", ".join(ids))
        return ok(f"tasks {_as_set(ids)} flagged as revoked")
    terminated = _end(view, set(ids), signum)
    view.mark_revoked([each for each in ids if each not in terminated])
    waiting = {row["id"] for row in (*view.core.reserved(), *view.core.scheduled())}
    known = [*terminated, *(each for each in ids if each in waiting)]
    return ok(f"terminate: {', '.join(known)}" if known else "terminate: tasks unknown")


def terminate(view: WorkerView, signal: str | int, task_id: str | list[str], **_: object) -> dict[str, Any]:
    """Terminate task by task id (or list of ids)."""
    return revoke(view, task_id, terminate=True, signal=signal)


def revoke_by_stamped_headers(
    view: WorkerView,
    headers: Mapping[str, Any] | list[str],
    terminate: bool = False,
    signal: str | int | None = None,
    **_: object,
) -> dict[str, Any]:
    """Revoke task by header (or list of headers)."""
    signum = signal_number(signal)
    wanted = _headers(headers)
    view.revocations.add_stamps({name: texts(values) for name, values in wanted.items()})
    # What is here already is revoked by its id; what comes is looked at when it comes.
    for row in (*view.core.reserved(), *view.core.scheduled()):
        view.revocations.see(row["id"], row["props"])
    publish(view)
    if not terminate:
        return ok(f"headers {dict(wanted)} flagged as revoked, but not terminated")
    matching: dict[str, set[str]] = {}
    ids: set[str] = set()
    for row in view.core.active():
        carried = stamps_of(row["props"])
        for name, values in wanted.items():
            if common := carried.get(name, set()) & texts(values):
                matching.setdefault(name, set()).update(common)
                ids.add(row["id"])
    if not ids:
        return ok(f"headers {dict(wanted)} were not terminated")
    _end(view, ids, signum)
    return ok(f"headers {matching} revoked")


def publish(view: WorkerView) -> None:
    """Have the core ask for every task whether it is revoked; nothing is asked while nothing is revoked."""
    view.core.revoked = view.revocations if view.revocations else None


def signal_number(name: str | int | None) -> int:
    """Return a signal's number by its name, with or without SIG. Raises ValueError for a name that no signal has."""
    if isinstance(name, int) and not isinstance(name, bool):
        return signals.Signals(name)
    text = str(name or _DEFAULT_SIGNAL)
    full = text if text.startswith("SIG") else f"SIG{text}"
    try:
        return signals.Signals[full]
    except KeyError:
        raise ValueError(f"no signal is called {text!r}; expected for example TERM, INT, KILL, USR1") from None


def _end(view: WorkerView, ids: set[str], signum: int) -> list[str]:
    """End what of these runs here, say so, and return which did."""
    terminated = view.core.terminate(ids, signum)
    for each in terminated:
        logger.info("Terminating %s (%s)", each, signum)
    return terminated


def _ids(task_id: object) -> list[str]:
    several = task_id if isinstance(task_id, (list, tuple, set)) else () if task_id is None else (task_id,)
    ids: dict[str, None] = {}
    for each in several:
        if not isinstance(each, str):
            raise TypeError(f"{each!r} is no task id: ids are text")
        ids[each] = None
    return list(ids)


def _headers(headers: object) -> Mapping[str, Any]:
    if isinstance(headers, Mapping):
        return headers
    if isinstance(headers, (list, tuple)) and all(isinstance(each, str) and "=" in each for each in headers):
        return dict(each.split("=", 1) for each in headers)
    raise TypeError(f"{headers!r} names no stamps: expected a mapping, or a list of name=value")


def _as_set(ids: list[str]) -> str:
    return repr(set(ids)) if ids else "set()"


COMMANDS: Final = (
    Command("inspect", revoked, alias="dump_revoked"),
    Command("control", revoke, "[id1 [id2 [... [idN]]]]", variadic="task_id", least=1),
    Command(
        "control",
        terminate,
        "<signal> [id1 [id2 [... [idN]]]]",
        arguments=(("signal", str),),
        variadic="task_id",
        least=1,
    ),
    Command(
        "control",
        revoke_by_stamped_headers,
        "[key1=value1 [key2=value2 [... [keyN=valueN]]]]",
        variadic="headers",
        least=1,
    ),
)
