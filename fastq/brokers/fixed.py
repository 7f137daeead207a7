"""What brokers without a wire of their own say to a worker that asks for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.queues import QueueSpec


class FixedQueues:
    """A consumer whose queues are those it began with."""

    @property
    def queue_specs(self) -> Sequence[QueueSpec]:
        """Return nothing: there is no remote control here that could add or cancel one."""
        return ()

    async def add_queue(self, spec: QueueSpec) -> None:
        """Refuse: queues are fixed when consuming starts."""
        raise SettingsError(f"queue {spec.name!r} cannot be added while running; name it with -Q")

    async def cancel_queue(self, name: str) -> None:
        """Refuse: queues are fixed when consuming starts."""
        raise SettingsError(f"queue {name!r} cannot be left while running; leave it out with -X")
