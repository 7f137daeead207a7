"""The bus: remote control and events between workers and clients, beside the tasks, on a connection of its own.

What its messages look like (``pidbox``) and whom they are for (``patterns``); both sides are ``interfaces.Bus`` and
``BlockingBus``, which brokers implement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

#: What a worker says when it finds another one under its node name.
NAMESAKE = (
    "another worker is named %s too: commands to that name reach both, and monitors take them for one. "
    "Give each worker a name of its own (-n)"
)


class LosableBus:
    """What every worker's side has in common: it ends once, for one reason, and counts what was dropped."""

    def __init__(self) -> None:
        import asyncio  # a worker imports this module before it forks, and children have no use for a loop

        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.dropped = 0

    def _on_lost(self, lost: asyncio.Future[Exception]) -> None:
        self._lose(lost.result())

    def _lose(self, reason: Exception) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
