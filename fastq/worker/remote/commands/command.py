"""What a remote control command is, and what it may use of the worker. No command is here, and no message.

A command is a function of the worker's view and the request's arguments, by name; what it returns is the reply, what
it raises the reply ``{"error": repr}``. A coroutine function is awaited. Celery's conventions: ``{"ok": …}`` and
``{"error": …}`` where there is no better form.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from fastq._child import TaskRules
    from fastq.queues import QueueSpec
    from fastq.settings import Settings
    from fastq.worker.options import WorkerOptions
    from fastq.worker.remote.clock import LamportClock
    from fastq.worker.remote.revoked import Revoked


class CoreView(Protocol):
    """The message loop. A row is a dict that ``describe.Row`` names the fields of."""

    tasks: dict[bytes, TaskRules]
    revoked: Container[str] | None

    @property
    def prefetch(self) -> int:
        """How many messages the worker may hold."""

    @property
    def stalls(self) -> int:
        """How many times an event loop of a child has taken no turn for long."""

    def active(self) -> list[dict[str, Any]]:
        """Return the calls that run."""

    def reserved(self) -> list[dict[str, Any]]:
        """Return the messages that wait for a child."""

    def scheduled(self) -> list[dict[str, Any]]:
        """Return the messages that wait for their time."""

    def terminate(self, ids: set[str], signum: int) -> list[str]:
        """Signal the children that run these tasks and return the ids of those."""


class PoolView(Protocol):
    """The processes that run tasks."""

    @property
    def pids(self) -> list[int]:
        """Process ids."""

    @property
    def size(self) -> int:
        """How many calls can run at a time."""

    def grow(self, n: int = 1) -> None:
        """Add processes."""

    def shrink(self, n: int = 1) -> None:
        """Remove processes."""

    def restart(self) -> None:
        """Replace every process after its call."""


class ConsumerView(Protocol):
    """The connection that tasks come over."""

    @property
    def queue_specs(self) -> Sequence[QueueSpec]:
        """The queues that are read."""

    async def add_queue(self, spec: QueueSpec) -> None:
        """Declare a queue and read it too."""

    async def cancel_queue(self, name: str) -> None:
        """Read a queue no longer."""


class EventsView(Protocol):
    """``fastq.worker.remote.events.Events``."""

    def enable(self) -> bool:
        """Switch task events on; False when they were on already."""

    def disable(self) -> bool:
        """Switch task events off; False when they were off already."""

    def heartbeat(self) -> None:
        """Send a heartbeat now."""


class AutoscaleView(Protocol):
    """What keeps the pool's size between two bounds."""

    min: int
    max: int

    def set(self, max: int | None, min: int | None) -> tuple[int, int]:
        """Change the bounds that are given and return both, the upper one first."""


class WindowView(Protocol):
    """How many messages are held in advance."""

    def widen(self, n: int) -> None:
        """Hold so many messages more from now on, or fewer."""


class WorkerView(Protocol):
    """A worker as commands see it."""

    @property
    def hostname(self) -> str:
        """The node name."""

    @property
    def instance(self) -> str:
        """What tells this worker from another one of its name."""

    @property
    def started_unix(self) -> float:
        """When the worker started."""

    @property
    def settings(self) -> Settings:
        """The application's settings."""

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        """The settings that were changed, or all, without secrets; every value has a JSON form."""

    def report(self) -> str:
        """What a bug report should say of this installation."""

    @property
    def options(self) -> WorkerOptions:
        """What the worker was asked to do."""

    @property
    def core(self) -> CoreView:
        """The message loop."""

    @property
    def pool(self) -> PoolView:
        """The processes."""

    @property
    def consumer(self) -> ConsumerView | None:
        """The connection that tasks come over; None while the broker is away."""

    @property
    def events(self) -> EventsView | None:
        """What sends events; None when the broker carries none."""

    @property
    def window(self) -> WindowView:
        """The prefetch."""

    @property
    def autoscale(self) -> AutoscaleView | None:
        """What scales the pool; None without ``--autoscale``."""

    @property
    def revocations(self) -> Revoked:
        """The revoked tasks."""

    @property
    def clock(self) -> LamportClock:
        """The clock shared with events."""

    @property
    def registry(self) -> Mapping[str, Any]:
        """The application's task objects by name, for their attributes."""

    @property
    def custom_commands(self) -> Mapping[str, Callable[..., Any]]:
        """Commands of the application's own; called in a thread, with the view and the arguments by name."""

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Store the state REVOKED for tasks of which no worker has begun one; does not wait."""

    def stop(self, how: str) -> None:
        """Stop the worker, "warm" or "cold"."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command, with what the command line needs to know of it."""

    kind: Literal["inspect", "control"]
    function: Callable[..., Any]
    #: How the arguments look in the help, those that it cannot do without in ``<>``, and the name and type of each that
    #: stands on the command line.
    signature: str = ""
    arguments: tuple[tuple[str, Callable[[str], Any]], ...] = ()
    #: The name of the argument that takes all further words, as a list.
    variadic: str = ""
    #: How many words it needs at least there, whatever Celery's help says.
    least: int = 0
    #: A second name, of older clients.
    alias: str = ""
    is_visible: bool = True
    #: One of these is answered at a time: its reply may be large.
    takes_turns: bool = False

    @property
    def name(self) -> str:
        """Return the name that requests use."""
        return self.function.__name__

    @property
    def help(self) -> str:
        """Return one line."""
        return (self.function.__doc__ or "").partition("\n")[0].rstrip(".")


def ok(value: object) -> dict[str, object]:
    """Return the reply of a command that did what it was asked to."""
    return {"ok": value}


def failed(value: object) -> dict[str, object]:
    """Return the reply of a command that could not."""
    return {"error": value}
