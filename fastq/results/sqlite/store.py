"""Results in the SQLite file of the embedded broker, for callers. What a worker stores goes through its consumer.

Waiting is pushed: a message carries the name of this process's bell, and whoever stores its result rings it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastq.brokers.sqlite import database
from fastq.brokers.sqlite.client import FileClient, OpenFile
from fastq.brokers.sqlite.results import (
    Announcer,
    collect_notices,
    find_results,
    forget_waiter,
    put_waiters,
    write_results,
)
from fastq.codecs.meta import decode_meta
from fastq.errors import FastqError, ResultTimeout
from fastq.net import forks
from fastq.results.sqlite.listener import Listener, Waiter
from fastq.states import READY_STATES

if TYPE_CHECKING:
    from fastq.interfaces import Meta, Unwatch
    from fastq.settings import Settings

T = TypeVar("T")


class SqliteStore:
    """ResultStore for sqlite:// (the protocol is ``interfaces.ResultStore``)."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._client = FileClient(database.parse_url(url), "NORMAL", settings.fastq_publish_timeout)
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        forks.register(self)

    def reply_address(self, deadline: float | None = None) -> str:
        """Return the name of this process's bell."""
        return self._listening().address

    def load(self, task_id: str) -> Meta | None:
        """Return the stored meta, or None when nothing is known of the task."""
        query = "SELECT meta FROM results WHERE id = ?"
        found = self._use(lambda file: file.execute(query, (task_id,)).fetchone())
        return None if found is None else decode_meta(found[0])

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta. Raises ResultTimeout."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        listener = self._listening()
        waiter = listener.add(Waiter(task_id))
        try:
            # In this order: what is stored after the look rings a bell that is heard.
            meta = self._find([task_id], None).get(task_id) or listener.wait(waiter, deadline)
        finally:
            listener.remove(waiter)
        if meta is None:
            raise ResultTimeout(f"task {task_id} has not ended within {timeout_s} s")
        return decode_meta(meta)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from a background thread, when a final state is known; returns what ends the watch."""
        return self._listening().watch(task_id, lambda meta: callback(decode_meta(meta)))

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Store an encoded meta and tell who waits for it."""
        item = (task_id, state, meta, "", 0)

        def save(file: OpenFile) -> None:
            def write() -> None:
                write_results(file.cursor, [item])
                notices.update(collect_notices(file.cursor, [item]))

            notices: dict[str, dict[str, bytes]] = {}
            file.transaction(write)
            Announcer(file.folder).send(notices)

        self._use(save)
        if self._listener is not None and state in READY_STATES:
            self._listener.deliver({task_id: meta})

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""
        self._use(lambda file: file.execute("DELETE FROM results WHERE id = ?", (task_id,)))

    def close(self) -> None:
        """Release the file, the bell and the thread; a later call opens them again."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        self._client.close()

    def _listening(self) -> Listener:
        listener = self._listener
        if listener is not None:
            return listener
        with self._lock:
            if self._listener is None:
                self._use(lambda file: None)  # the file first: the bells are its owner's
                self._listener = Listener(self._client.path, self._find, self._unregister)
            return self._listener

    def _find(self, task_ids: Iterable[str], address: str | None) -> dict[str, bytes]:
        """Return the final metas that are stored; with an address, have the other results announced there."""

        def find(file: OpenFile) -> dict[str, bytes]:
            if address is not None:
                with contextlib.suppress(
                    sqlite3.Error
                ):  # a full disk: the file is looked into now and then all the same
                    file.transaction(partial(put_waiters, file.cursor, task_ids, address))
            return find_results(file.cursor, task_ids)

        return self._use(find)

    def _unregister(self, task_id: str, address: str) -> None:
        with contextlib.suppress(FastqError):  # a worker sweeps what is left
            self._use(lambda file: file.transaction(partial(forget_waiter, file.cursor, task_id, address)))

    def _use(self, action: Callable[[OpenFile], T]) -> T:
        """Return what the action returns. Raises SettingsError or ConnectionLost with the remedy."""
        try:
            return self._client.use(action)
        except sqlite3.Error as error:
            raise database.refusal(self._client.path, error) from error

    def after_fork(self) -> None:
        """In a forked child: the listener is the parent's."""
        self._lock = threading.Lock()
        self._listener = None
