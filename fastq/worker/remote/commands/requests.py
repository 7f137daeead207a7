"""Commands that list the messages a worker holds."""

from __future__ import annotations

from typing import Any, Final

from fastq.worker.remote.commands.command import Command, WorkerView
from fastq.worker.remote.commands.describe import Room, described, info, safe_info, schedule_info


async def active(view: WorkerView, safe: bool = False, **_: object) -> list[dict[str, Any]]:
    """List of tasks currently being executed."""
    return await described(view.core.active(), view.hostname, safe_info if safe else info)


async def reserved(view: WorkerView, **_: object) -> list[dict[str, Any]]:
    """List of currently reserved tasks, not including scheduled/active."""
    return await described(view.core.reserved(), view.hostname, info)


async def scheduled(view: WorkerView, **_: object) -> list[dict[str, Any]]:
    """List of currently scheduled ETA/countdown tasks."""
    return await described(view.core.scheduled(), view.hostname, schedule_info)


async def query_task(view: WorkerView, ids: str | list[str], **_: object) -> dict[str, list[Any]]:
    """Query for task information by id."""
    wanted = {ids} if isinstance(ids, str) else set(ids)
    core = view.core
    room = Room()
    found: dict[str, list[Any]] = {}
    for state, rows in (("scheduled", core.scheduled()), ("reserved", core.reserved()), ("active", core.active())):
        asked_for = [row for row in rows if row["id"] in wanted]
        for each in await described(asked_for, view.hostname, info, room):
            found[each["id"]] = [state, each]
    return found


COMMANDS: Final = (
    Command("inspect", active, takes_turns=True, alias="dump_active"),
    Command("inspect", reserved, takes_turns=True, alias="dump_reserved"),
    Command("inspect", scheduled, takes_turns=True, alias="dump_schedule"),
    Command("inspect", query_task, "[id1 [id2 [... [idN]]]]", takes_turns=True, variadic="ids"),
)
