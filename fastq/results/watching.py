"""Those who watch for results, and the thread that calls them back. It is there while somebody watches, and a little
longer; how it waits is not its own: it calls a function for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fastq.errors import FastqError
from fastq.results.agenda import Waiter
from fastq.results.leading import Lead
from fastq.results.place import lost_meta

if TYPE_CHECKING:
    from fastq.interfaces import Meta

#: Chosen: the thread stays for so long, as the next watcher is likely to come soon.
LINGER_S: Final = 5.0
RETRY_S: Final = 1.0
CLOSE_S: Final = 2.0


class Watchers:
    """Waiters with a callback. They share one signal, the thread's. Thread-safe.

    ``serve`` waits for their results until a time (monotonic), or until ``is_needed``.
    """

    def __init__(self, lead: Lead, name: str, logger: logging.Logger, serve: Callable[[float], None]) -> None:
        self.signal = lead.favourite
        self._lead = lead
        self._name = name
        self._logger = logger
        self._serve = serve
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._watching: set[Waiter] = set()
        self._news: deque[tuple[Waiter, Meta | None]] = deque()  # with a state on the way, or without: it has ended
        self._has_news = self._is_closing = False

    @property
    def is_served(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def add(self, waiter: Waiter) -> None:
        """Keep a waiter; ``start`` has it served."""
        self._watching.add(waiter)

    def discard(self, waiter: Waiter) -> None:
        """Keep a waiter no longer."""
        self._watching.discard(waiter)

    def end(self, waiter: Waiter) -> None:
        """A waiter has its outcome: have it called back; the signal is the caller's to set."""
        self._news.append((waiter, None))

    def pass_on(self, waiter: Waiter, meta: Meta) -> None:
        """There is a state on the way, for a waiter that observes: as ``end``."""
        self._news.append((waiter, meta))

    def start(self) -> None:
        """Have a thread, if there is none."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def tell(self) -> None:
        """Have the thread come round."""
        self._has_news = True
        self._lead.tell(self.signal)

    def is_needed(self) -> bool:
        """Whether the thread has to come round."""
        return bool(self._news) or self._has_news or (self._is_closing and not self._watching)

    def stop(self) -> None:
        """Wait for the thread to end; for as long as anybody watches it goes on."""
        with self._lock:
            thread = self._thread
        self._is_closing = True
        self.tell()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
        self._is_closing = False

    # --- the thread

    def _run(self) -> None:
        leave_at = time.monotonic() + LINGER_S
        try:
            while True:
                self._has_news = False
                self._call_back()
                now = time.monotonic()
                with self._lock:
                    if self._watching:
                        leave_at = now + LINGER_S
                    elif self._is_closing or now >= leave_at:
                        self._thread = None
                        return
                try:
                    self._serve(leave_at)
                except (FastqError, OSError) as error:
                    if self._watching and not self._news:
                        self._logger.error("cannot look for results, trying again: %s", error)
                        self.signal.clear()
                        self.signal.wait(RETRY_S)
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _call_back(self) -> None:
        while self._news:
            waiter, meta = self._news.popleft()
            if meta is None:
                self.discard(waiter)
            callback, outcome = waiter.callback, meta or waiter.outcome
            if callback is None or outcome is None:
                continue
            if meta is None:
                waiter.callback = None
            try:
                callback(lost_meta(waiter.task_id, outcome) if isinstance(outcome, FastqError) else outcome)
            except Exception:
                self._logger.exception("a callback for the result of task %s failed", waiter.task_id)
