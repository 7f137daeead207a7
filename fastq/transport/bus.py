"""The bus: remote control and events between workers and clients, beside the tasks, on a connection of its own.

Protocols of both sides, and what opens the one that a URL names. Messages are headers and a body that is not decoded
here; a received message's content type stands among its headers as ``content_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from fastq.errors import SettingsError

if TYPE_CHECKING:
    import asyncio

    from fastq.settings import Settings

_AMQP: Final = "fastq.transport.amqp_bus"
_REDIS: Final = "fastq.transport.redis_bus"

#: The module with ``open_bus`` and ``open_blocking_bus`` for each scheme.
BUSES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("amqp", "amqps", "pyamqp", "librabbitmq"), _AMQP),
    **dict.fromkeys(("redis", "rediss", "redis+socket", "unix", "sentinel"), _REDIS),
}

#: A message as it arrives: headers, with the content type, and body.
Message: TypeAlias = "tuple[Mapping[str, Any], bytes]"
#: A node's name and its reply.
Reply: TypeAlias = "tuple[str, Any]"
OnRequest: TypeAlias = "Callable[[Mapping[str, Any], bytes], None]"


class Clock(Protocol):
    """The worker's Lamport clock; ``fastq.worker.clock.LamportClock`` is one."""

    def forward(self) -> int:
        """Count one step, before something is sent, and return the new value."""


class Bus(Protocol):
    """The worker's side. One connection, on the running loop; it is not made again: see ``lost``."""

    lost: asyncio.Future[Exception]
    #: Events and replies that were dropped because the broker took nothing.
    dropped: int

    async def open(self, hostname: str, on_request: OnRequest | None) -> None:
        """Connect, declare, and listen for requests unless ``on_request`` is None.

        Raises ConnectionLost (try again) or SettingsError.
        """

    def reply(self, exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send a worker's reply to the queue that a request has named."""

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send an event, or a list of them, to whoever listens; never waits. Raises ConnectionLost."""

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[Reply]:
        """Ask every node and return the replies that come in time, our own among them. Raises ConnectionLost."""

    async def close(self) -> None:
        """Send what was written and close; ``lost`` ends too."""


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


class BlockingBus(Protocol):
    """The client's side, for one thread; it connects at its first use."""

    def ask(
        self,
        method: str,
        arguments: Mapping[str, Any],
        timeout_s: float,
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> Iterator[Reply]:
        """Send a command and yield each node's reply, until the time is up or all of the destination have replied."""

    def tell(
        self,
        method: str,
        arguments: Mapping[str, Any],
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> None:
        """Send a command that nobody need reply to."""

    def events(self) -> Iterator[Message]:
        """Subscribe to every event, at once, and return an iterator over what is published from now on.

        It blocks until something comes, and raises ConnectionLost at the end.
        """

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send an event, or a list of them, to whoever listens; nobody confirms it. Raises ConnectionLost."""

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""


def open_bus(url: str, settings: Settings, clock: Clock) -> Bus:
    """Return the worker's side of the bus at a broker; ``open`` connects it. Raises SettingsError."""
    bus: Bus = import_module(_module(url)).open_bus(url, settings, clock)
    return bus


def open_blocking_bus(url: str, settings: Settings) -> BlockingBus:
    """Return the client's side of the bus at a broker. Raises SettingsError."""
    bus: BlockingBus = import_module(_module(url)).open_blocking_bus(url, settings)
    return bus


def has_bus(url: str) -> bool:
    """Return whether the broker of a URL carries remote control and events."""
    return _scheme(url) in BUSES


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _module(url: str) -> str:
    module = BUSES.get(_scheme(url))
    if module is None:
        raise SettingsError(f"{_scheme(url)}:// carries no remote control and no events; use amqp:// or redis://")
    return module
