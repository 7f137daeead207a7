"""Every remote control command of Celery, done natively: what the replies say is Celery's, how it is done is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastq.worker.remote.commands import memory, pool, queues, requests, revoking, tasks, worker
from fastq.worker.remote.commands.command import Command

_ALL: Final = tuple(
    command for group in (worker, requests, tasks, revoking, pool, queues, memory) for command in group.COMMANDS
)

#: Every command by its name and by its second name.
COMMANDS: Final[Mapping[str, Command]] = {
    name: command for command in _ALL for name in (command.name, command.alias) if name
}


def commands_of(kind: str) -> dict[str, Command]:
    """Return the commands of a kind, "inspect" or "control", that the help shows, in order."""
    shown = {command.name: command for command in _ALL if command.kind == kind and command.is_visible}
    return dict(sorted(shown.items()))
