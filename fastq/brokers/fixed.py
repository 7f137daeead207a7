"""What brokers without a wire of their own, or without RabbitMQ's replies, say to a worker that asks for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.queues import QueueSpec


class NoAnswers:
    """A consumer where no sender waits for a reply in a queue of the task's own."""

    async def prepare_answers(self) -> None:
        """Do nothing: replies are RabbitMQ's."""

    async def answer(self, task_id: str, meta: bytes) -> None:
        """Do nothing: replies are RabbitMQ's."""


class FixedQueues(NoAnswers):
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
