"""Where results are: what a store writes so that ``waiting`` can wait for what it keeps. No locks and no threads."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from fastq.codecs.meta import decode_meta
from fastq.states import FAILURE

if TYPE_CHECKING:
    from fastq.errors import FastqError
    from fastq.interfaces import Meta

T = TypeVar("T")

#: What a place has told: of which task, and its state. Without a state: look for it. Without a task: look for all.
Heard: TypeAlias = "tuple[str | None, T | None]"


class Place(Generic[T]):
    """Where results are, as one store knows it; ``T`` is a state as it lies there.

    ``look`` is all that must be written: then tasks that somebody waits for are looked for again and again. A place
    that can be heard writes the rest too. ``look`` comes from any thread, ``open`` from one at a time, and so do
    ``listen``, ``take``, ``check`` and ``close``, none of which waits.
    """

    #: Who waits is looked for after so long (s), then again after a pause that grows up to the last.
    first_look_s: float = 0.01
    look_growth: float = 1.5
    last_look_s: float = 1.0
    #: All that is listened for is told in time, so that nobody has to be looked for by the clock.
    hears_all: bool = False
    #: States stay where they can be looked for. If not, they come unasked, ``look`` finds those that have come, and the
    #: others are lost with the connection that should have brought them.
    keeps: bool = True
    #: For so long (s) the place may be away from those who wait, once it was there.
    patience_s: float = 0.0
    thread_name: str = "fastq-results"
    logger: logging.Logger = logging.getLogger("fastq.results")

    def look(self, task_ids: Sequence[str]) -> Mapping[str, T]:
        """Return the states that are known, by task id; final ones at least. Raises ConnectionLost, SettingsError."""
        raise NotImplementedError

    def decode(self, state: T) -> Meta:
        """Return a state's meta. Raises DecodeError."""
        return decode_meta(state)  # type: ignore[arg-type]  # bytes, where this is not written anew

    def open(self, until: float) -> FastqError | None:
        """Get ready to listen, by a time (monotonic). Raises ConnectionLost, SettingsError.

        Returns why what was due so far will not come, where the place does not keep it and it is lost.
        """
        return None

    def listen(self, task_ids: Sequence[str], dropped: Collection[str]) -> None:
        """Ask to be told of tasks, and of others no more. Raises ConnectionLost.

        Where all is told, ``take`` brings each without a state as soon as it will be: somebody looks for it then.
        """

    def take(self) -> list[Heard[T]]:
        """Return all that has come. Raises ConnectionLost."""
        return []

    def check(self) -> float:
        """See whether the other side is alive; return when (monotonic) to see again. Raises ConnectionLost."""
        return math.inf

    def fileno(self) -> int:
        """Return what is readable when something has come, -1 where nothing does."""
        return -1

    def close(self) -> None:
        """Let go of what ``open`` has made; it may be opened again. Never raises."""

    def forget(self) -> None:
        """In a forked child: let go of it without touching what is the parent's."""


def lost_meta(task_id: str, error: FastqError) -> Meta:
    """Return a meta that raises ``error`` where the result is asked for; ``lost``: it says nothing of the task."""
    stored = {"exc_type": type(error).__name__, "exc_message": [str(error)], "exc_module": "fastq.errors"}
    return {"task_id": task_id, "status": FAILURE, "result": stored, "traceback": None, "children": [], "lost": True}
