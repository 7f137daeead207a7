"""What a worker prints when it starts, in Celery's shape because people parse it. Passwords in URLs are masked."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fastq.queues import QueueSpec

_ART: Final = (
    " -------------- ",
    "--- =====> ---- ",
    "-- =====> ----- ",
    "- =====> ------ ",
    "- ====> ------- ",
    "- ===> -------- ",
    "- ====> ------- ",
    "- =====> ------ ",
    "- ====> ------- ",
    "-- =====> ----- ",
    "--- =====> ---- ",
    " -------------- ",
)
_NO_EVENTS: Final = "not with this broker (RabbitMQ and Redis carry them)"
_EVENTS_OFF: Final = "OFF (enable -E to monitor tasks in this worker)"


@dataclass(frozen=True, slots=True)
class Banner:
    """The facts of the banner; URLs as they may be shown."""

    hostname: str
    version: str
    app: str
    transport: str
    results: str
    concurrency: str | int
    queues: Iterable[QueueSpec]
    tasks: Iterable[str] = ()
    mode: str = "reliable"
    pool: str = "prefork"
    events: bool | None = False  # None: the broker carries none

    def text(self) -> str:
        """Return the banner with the queues."""
        started = f"{platform.platform()} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        facts = (
            f"{self.hostname} v{self.version}",
            "",
            started,
            "[config]",
            f".> app:         {self.app}",
            f".> transport:   {self.transport}",
            f".> results:     {self.results}",
            f".> concurrency: {self.concurrency} ({self.pool})",
            f".> task events: {_NO_EVENTS if self.events is None else 'ON' if self.events else _EVENTS_OFF}",
            f".> mode:        {self.mode}",
            "",
            "[queues]",
        )
        lines = [f"{art}{fact}".rstrip() for art, fact in zip(_ART, facts, strict=True)]
        return "\n".join(["", *lines, *map(_queue_line, self.queues), ""])

    def task_list(self) -> str:
        """Return the names of the tasks, one a line."""
        return "\n".join(["[tasks]", *(f"  . {name}" for name in sorted(self.tasks)), ""])


def _queue_line(queue: QueueSpec) -> str:
    exchange = f"{queue.exchange}({queue.exchange_type})"
    return f"{'':16}.> {queue.name:<16} exchange={exchange} key={queue.routing_key}"
