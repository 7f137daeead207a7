"""The SQLite file in a process that has it open; producers and callers are lent it, and a new one when it will not do.

No statements: what is written and read is up to ``broker``, ``turns`` and ``fastq.results.sqlite``.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from fastq.brokers.sqlite import database
from fastq.brokers.sqlite.bells import BellFolder
from fastq.brokers.sqlite.database import Location, patiently
from fastq.net import forks

T = TypeVar("T")

_STALE_S: Final = 1.0

logger = logging.getLogger("fastq.sqlite")


class OpenFile:
    """A connection and its bells, in the process that opened them. Not thread-safe."""

    def __init__(self, location: Location, synchronous: str, timeout_s: float) -> None:
        self._pid = os.getpid()
        self._path = location.path
        self._timeout_s = timeout_s
        self._checked_at = time.monotonic()
        self.connection = database.connect(location.path, synchronous, timeout_s)
        try:
            self.folder = BellFolder(location.path)
        except BaseException:
            self.connection.close()
            raise
        self._identity = database.identity(location.path)
        self.cursor = self.connection.cursor()

    def execute(self, statement: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """Execute one statement, a transaction by itself, waiting for the lock if it must."""
        return patiently(partial(self.cursor.execute, statement, parameters), self._timeout_s)

    def transaction(self, write: Callable[[], T]) -> T:
        """Write, commit and return what ``write`` returns; nothing of it remains when anything is raised."""
        patiently(partial(self.cursor.execute, "BEGIN IMMEDIATE"), self._timeout_s)
        try:
            result = write()
            self.cursor.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.cursor.execute("ROLLBACK")
            raise
        return result

    def is_stale(self) -> bool:
        """Return whether the path leads to another file by now; looked at once a second."""
        now = time.monotonic()
        if now - self._checked_at < _STALE_S:
            return False
        self._checked_at = now
        return self.is_replaced()

    def is_replaced(self) -> bool:
        """Return whether the path leads to another file, or to none."""
        return database.identity(self._path) != self._identity

    def close(self) -> None:
        """Close the connection and the bells."""
        if self._pid != os.getpid():
            _inherited.append(self)
            return
        self.folder.close()
        self.connection.close()


class FileClient:
    """Lends the open file to one thread at a time.

    Opens it at the first use; and again after a fork, after a failure, and when another file has taken its place.
    """

    def __init__(self, location: Location, synchronous: str, timeout_s: float) -> None:
        self.path = location.path
        self._location = location
        self._synchronous = synchronous
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._file: OpenFile | None = None
        forks.register(self)

    def use(self, action: Callable[[OpenFile], T]) -> T:
        """Return what the action returns. Raises sqlite3.Error, SettingsError or ConnectionLost."""
        with self._lock:
            file = self._file
            if file is None or file.is_stale():
                self.close()
                file = self._file = self._open()
            try:
                return action(file)
            except sqlite3.OperationalError as error:
                if not database.is_busy(error):
                    self.close()
                raise

    def _open(self) -> OpenFile:
        is_new = not os.path.exists(self.path)
        file = OpenFile(self._location, self._synchronous, self._timeout_s)
        if is_new:
            # A relative path means another file in another folder: calls that nobody will ever run.
            logger.warning(
                "%s did not exist; it is new and empty now. A worker must use the same file: start both in one folder, "
                "or name it from its root, sqlite:////folder/fastq.db",
                self.path,
            )
        return file

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def before_fork(self) -> None:
        """Have nothing open: SQLite's locks do not come over a fork, and the child would believe that it had them."""
        self._lock.acquire()
        self.close()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork(self) -> None:
        """In a forked child: open an own connection when it is needed."""
        self._lock = threading.RLock()
        file, self._file = self._file, None
        if file is not None:
            file.close()


# Neither used nor closed: SQLite forbids both with a connection that has come over a fork.
_inherited: list[OpenFile] = []
