"""What a broker says of taking no messages, in the log: each change, but no flood of them. Runs on an event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

logger = logging.getLogger("fastq.transport.notices")

#: Chosen: the next change is told so long after the last one at the earliest, as it is by then.
PAUSE_S: Final = 5.0


class Notices:
    """Of one connection to ``place``."""

    def __init__(self, place: object, loop: asyncio.AbstractEventLoop) -> None:
        self._place = place
        self._loop = loop
        self._reason: str | None = None
        self._told: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, reason: str | None) -> None:
        """Log why publishers are blocked now, or (None) that they are not."""
        self._reason = reason
        if self._timer is None:
            self._log()

    def close(self) -> None:
        """Say no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _log(self) -> None:
        self._timer = None
        if (self._reason is None) == (self._told is None):
            return
        self._told = self._reason
        if self._reason is None:
            logger.warning("RabbitMQ at %s takes messages again", self._place)
        else:
            logger.warning("RabbitMQ at %s blocks publishers: %s. What tasks send waits", self._place, self._reason)
        self._timer = self._loop.call_later(PAUSE_S, self._log)
