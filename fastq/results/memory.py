"""Results in this process: for tests, examples, and a worker whose loop runs in a thread beside its callers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fastq.brokers.memory.space import find_space
from fastq.codecs.meta import decode_meta
from fastq.errors import ResultTimeout

if TYPE_CHECKING:
    from fastq.interfaces import Meta, Unwatch
    from fastq.settings import Settings


class MemoryStore:
    """ResultStore for memory:// (the protocol is ``interfaces.ResultStore``)."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._space = find_space(url)
        self._expires_s = settings.result_expires

    def reply_address(self, deadline: float | None = None) -> None:
        """Return None: whoever stores a result is in this process and finds who waits."""

    def is_there(self) -> bool:
        """Return True."""
        return True

    def load(self, task_id: str) -> Meta | None:
        """Return the stored meta, or None when nothing is known of the task."""
        meta = self._space.load(task_id)
        return None if meta is None else decode_meta(meta)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta. Raises ResultTimeout."""
        ended = threading.Event()
        metas: list[bytes] = []

        def on_ready(meta: bytes) -> None:
            metas.append(meta)
            ended.set()

        meta = self._space.when_ready(task_id, on_ready)
        if meta is None:
            try:
                ended.wait(timeout_s)
            finally:
                self._space.not_waiting(task_id, on_ready)
            if not metas:
                raise ResultTimeout(f"task {task_id} has not ended within {timeout_s} s")
            meta = metas[0]
        return decode_meta(meta)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from a background thread, when a final state is known; returns what ends the watch."""

        def on_ready(meta: bytes) -> None:
            self._space.in_background(lambda: callback(decode_meta(meta)))

        meta = self._space.when_ready(task_id, on_ready)
        if meta is not None:
            on_ready(meta)
        return partial(self._space.not_waiting, task_id, on_ready)

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back, from a background thread, with each state as it is stored; returns what ends that."""

        def on_state(meta: bytes) -> None:
            self._space.in_background(lambda: callback(decode_meta(meta)))

        meta = self._space.observe(task_id, on_state)
        if meta is not None:
            on_state(meta)
        return partial(self._space.not_observing, task_id, on_state)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Store an encoded meta."""
        self._space.save(task_id, state, meta, self._expires_s)

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""
        self._space.forget(task_id)

    def close(self) -> None:
        """Do nothing: what was stored stays."""
