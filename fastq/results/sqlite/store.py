"""Results in the SQLite file of the embedded broker, for callers. What a worker stores goes through its consumer.

Waiting is pushed: a message carries the name of this process's bell, and whoever stores its result rings it.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from fastq.brokers.sqlite import database
from fastq.brokers.sqlite.bells import CLIENT, Bell, BellFolder, unpack_results
from fastq.brokers.sqlite.client import FileClient, OpenFile
from fastq.brokers.sqlite.results import (
    Announcer,
    collect_notices,
    find_results,
    forget_waiters,
    put_waiters,
    write_results,
)
from fastq.errors import FastqError
from fastq.results.base import WaitingStore
from fastq.results.place import Heard, Place
from fastq.results.waiting import FOREVER_S
from fastq.states import READY_STATES

if TYPE_CHECKING:
    from fastq.settings import Settings

T = TypeVar("T")

#: Heard at once, so many datagrams may mean that the bell's buffer (10 or more) was full and some were refused.
MAYBE_LOST: Final = 10


class SqlitePlace(Place[bytes]):
    """The file, and a bell of this process. Who waits for long is noted in the file: the message may be another's."""

    first_look_s, look_growth, last_look_s = 0.05, 100.0, 5.0
    logger = logging.getLogger("fastq.results.listener")

    def __init__(self, url: str, settings: Settings) -> None:
        self._client = FileClient(database.parse_url(url), "NORMAL", settings.fastq_publish_timeout)
        self._folder: BellFolder | None = None
        self._bell: Bell | None = None

    @property
    def address(self) -> str | None:
        """The bell's name, None while there is no bell."""
        bell = self._bell
        return None if bell is None else bell.name

    def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
        """Return the states that the file has."""
        return self.use(lambda file: find_results(file.cursor, task_ids))

    def use(self, action: Callable[[OpenFile], T]) -> T:
        """Return what the action returns. Raises SettingsError or ConnectionLost with the remedy."""
        try:
            return self._client.use(action)
        except sqlite3.Error as error:
            raise database.refusal(self._client.path, error) from error

    def open(self, until: float) -> None:
        """Bind the bell."""
        self.use(lambda file: None)  # the file first: the bells are its owner's
        self._folder = self._folder or BellFolder(self._client.path)
        self._bell = self._bell or self._folder.bind(CLIENT)

    def listen(self, task_ids: Sequence[str], dropped: Collection[str]) -> None:
        """Have results announced to the bell, whatever address their messages carry."""
        assert self._folder is not None
        assert self._bell is not None
        if task_ids:
            self._folder.restore(self._bell)
            self._note(put_waiters, task_ids, self._bell.name)
        if dropped:
            self._note(forget_waiters, dropped, self._bell.name)

    def _note(
        self, change: Callable[[sqlite3.Cursor, Collection[str], str], None], ids: Collection[str], bell: str
    ) -> None:
        # A full disk: the file is looked into now and then all the same, and a worker sweeps what is left.
        with contextlib.suppress(FastqError):
            self.use(lambda file: file.transaction(partial(change, file.cursor, ids, bell)))

    def take(self) -> list[Heard[bytes]]:
        """Return the results that were rung; large ones are to be read from the file."""
        assert self._bell is not None
        datagrams = self._bell.hear()
        heard: list[Heard[bytes]] = [pair for datagram in datagrams for pair in unpack_results(datagram)]
        if len(datagrams) >= MAYBE_LOST or not all(datagrams):
            heard.append((None, None))
        return heard

    def fileno(self) -> int:
        """Return the bell's socket."""
        return -1 if self._bell is None else self._bell.fileno()

    def close(self) -> None:
        """Unbind the bell."""
        folder, self._folder, self._bell = self._folder, None, None
        if folder is not None:
            folder.close()

    def close_file(self) -> None:
        """Close the file; a later use opens it again."""
        self._client.close()

    def forget(self) -> None:
        """Leave the bell to the parent."""
        folder, self._folder, self._bell = self._folder, None, None
        if folder is not None:
            folder.after_fork()


class SqliteStore(WaitingStore[bytes]):
    """ResultStore for sqlite:// (the protocol is ``interfaces.ResultStore``)."""

    _place: SqlitePlace

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(SqlitePlace(url, settings))

    def reply_address(self, deadline: float | None = None) -> str:
        """Return the name of this process's bell."""
        while (address := self._place.address) is None:
            self._waiting.refresh(time.monotonic() + FOREVER_S)
        return address

    def is_there(self) -> bool:
        """Return whether the file was opened, and this process has its bell."""
        return self._place.address is not None and super().is_there()

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

        self._place.use(save)
        if state in READY_STATES:
            self._waiting.deliver({task_id: meta})

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""
        self._place.use(lambda file: file.execute("DELETE FROM results WHERE id = ?", (task_id,)))

    def close(self) -> None:
        """Release the file, the bell and the thread; a later call opens them again."""
        super().close()
        self._place.close_file()
