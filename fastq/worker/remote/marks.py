"""Storing REVOKED for tasks that were revoked before any worker has begun them, so that their callers need not wait.

Stores may block, so this happens in a thread of its own, one task after the other. A task that has begun meanwhile
keeps its state: whoever runs it tells how it ends.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fastq.codecs.meta import encode_meta
from fastq.errors import FastqError, TaskRevoked
from fastq.results import open_store, try_store
from fastq.states import PENDING, REJECTED, RETRY, REVOKED

if TYPE_CHECKING:
    from fastq.interfaces import ResultStore
    from fastq.settings import Settings

logger = logging.getLogger("fastq.worker")

#: States from which a task may still become REVOKED.
_OPEN: Final = frozenset({PENDING, "RECEIVED", RETRY, REJECTED})
_MAX_WAITING: Final = 100_000  # chosen: twice what a worker remembers


class RevocationMarks:
    """Marks tasks as revoked in a result store; nothing happens where there is none."""

    def __init__(self, backend: str, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._ids: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None

    def mark(self, ids: Sequence[str]) -> None:
        """Mark these tasks, later; too many at a time are let go."""
        store = try_store(self._backend)
        if store is not None and not store.keeps:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="revocations", daemon=True)
            self._thread.start()
        try:
            for each in ids:
                self._ids.put_nowait(each)
        except queue.Full:
            logger.warning("%s tasks wait to be marked as revoked; others are not", _MAX_WAITING)

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread after what it does now, and wait a moment for it."""
        if self._thread is None:
            return
        while not self._ids.empty():
            self._ids.get_nowait()
        self._ids.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            store = open_store(self._backend, self._settings)
        except FastqError as error:
            logger.warning("tasks cannot be marked as revoked: %s", error)
            return
        try:
            while (task_id := self._ids.get()) is not None:
                self._mark(store, task_id)
        finally:
            store.close()

    def _mark(self, store: ResultStore, task_id: str) -> None:
        try:
            meta = store.load(task_id)
            if meta is None or meta.get("status") in _OPEN:
                store.save(task_id, REVOKED, encode_meta(task_id, REVOKED, TaskRevoked("revoked")))
        except FastqError as error:
            logger.warning("task %s cannot be marked as revoked: %s", task_id, error)
