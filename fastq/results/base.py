"""What is the same in the stores for which one waits by ``waiting``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from fastq.results.place import Place
from fastq.results.waiting import Waiting

if TYPE_CHECKING:
    from fastq.interfaces import Meta, Unwatch

T = TypeVar("T")


class WaitingStore(Generic[T]):
    """The part of a ResultStore that is the same for all: a store derives from it and adds ``save`` and ``forget``."""

    def __init__(self, place: Place[T]) -> None:
        self._place = place
        self._waiting = Waiting(place)

    def reply_address(self, deadline: float | None = None) -> str | None:
        """Return None: whoever stores a result need not know who waits for it."""
        return None

    def is_there(self) -> bool:
        """Return whether the place was reached: from then on those who wait look for it, not who begins to."""
        return self._waiting.was_there

    def load(self, task_id: str) -> Meta | None:
        """Return the stored meta, or None when nothing is known of the task. Raises ConnectionLost, DecodeError."""
        state = self._place.look([task_id]).get(task_id)
        return None if state is None else self._place.decode(state)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta. Raises ResultTimeout, DecodeError, ConnectionLost."""
        return self._waiting.wait(task_id, timeout_s)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from a background thread, when a final state is known; returns what ends the watch."""
        return self._waiting.watch(task_id, callback)

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back, from a background thread, with each state as it becomes known; returns what ends that."""
        return self._waiting.observe(task_id, callback)

    def close(self) -> None:
        """Release connections and the thread; a later call opens them again."""
        self._waiting.close()
