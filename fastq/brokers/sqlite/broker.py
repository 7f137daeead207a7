"""The embedded broker: messages in a SQLite file, for any number of producers and workers on one machine.

What a worker does with the file is in ``turns``, the statements are in ``tables``, the file itself in ``database``. A
message's queue is its routing key; exchanges mean nothing here.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastq.brokers.limits import check_sizes
from fastq.brokers.pulling import PullingConsumer
from fastq.brokers.sqlite import database, tables
from fastq.brokers.sqlite.bells import BellFolder
from fastq.brokers.sqlite.client import FileClient, OpenFile
from fastq.brokers.sqlite.database import patiently
from fastq.brokers.sqlite.tables import QueueIds, WorkerInfo
from fastq.brokers.sqlite.turns import SqliteTurns
from fastq.errors import ConnectionLost, PublishError, SettingsError

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")


class SqlitePublisher:
    """Publishes from any thread. A publish returns when its transaction is on the disk."""

    def __init__(self, url: str, settings: Settings) -> None:
        location = database.parse_url(url)
        self._client = FileClient(location, location.synchronous, settings.fastq_publish_timeout)
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._queue_ids = QueueIds()
        self._file: OpenFile | None = None

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Store the messages in one transaction and wake the workers."""
        check_sizes(messages, self._max_message_bytes)
        self._use(partial(self._insert, messages))

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing."""
        self._use(lambda file: file.transaction(partial(self._queue_ids.declare, file.cursor, queue)))

    def purge(self, queue: str) -> int:
        """Drop the messages that wait in a queue, delayed ones too, and return how many there were."""
        return self._use(lambda file: file.transaction(partial(tables.purge, file.cursor, queue)))

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, delayed ones too."""
        return self._use(lambda file: tables.depth(file.cursor, queue))

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        self._client.close()

    def _insert(self, messages: Sequence[Message], file: OpenFile) -> None:
        queue = self._queue_ids.get(messages[0].routing_key) if len(messages) == 1 else None
        if queue is not None:
            file.execute(tables.INSERT_MESSAGE, tables.message_row(queue, messages[0]))
        else:
            file.transaction(partial(self._insert_all, messages, file))
        file.folder.ring_workers()

    def _insert_all(self, messages: Sequence[Message], file: OpenFile) -> None:
        declare = partial(self._queue_ids.declare, file.cursor)
        rows = [tables.message_row(declare(message.routing_key), message) for message in messages]
        file.cursor.executemany(tables.INSERT_MESSAGE, rows)

    def _use(self, action: Callable[[OpenFile], T]) -> T:
        """Return what the action returns; every failure becomes a PublishError with the remedy."""
        try:
            return self._client.use(partial(self._with_queue_ids, action))
        except sqlite3.Error as error:
            raise PublishError(f"not published: {database.explain(self._client.path, error)}") from error
        except database.UNSTORABLE as error:
            raise PublishError(f"not published: the message cannot be stored ({error})") from error
        except (ConnectionLost, SettingsError) as error:
            raise PublishError(f"not published: {error}") from error

    def _with_queue_ids(self, action: Callable[[OpenFile], T], file: OpenFile) -> T:
        """Return what the action returns; queue numbers hold for one file, and a rollback may have undone a new one."""
        if file is not self._file:
            self._file = file
            self._queue_ids.forget()
        try:
            return action(file)
        except BaseException:
            self._queue_ids.forget()
            raise


class SqliteConsumer(PullingConsumer):
    """A worker's side of the file, and that of one which only stores results there."""

    saves_results = True

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        super().__init__(SqliteTurns(url, settings), settings)


def live_workers(url: str) -> list[WorkerInfo]:
    """Return the workers that have the file open, by start. Raises SettingsError or ConnectionLost."""
    location = database.parse_url(url)
    if not os.path.exists(location.path):
        return []
    connection = database.connect(location.path, "NORMAL")
    try:
        folder = BellFolder(location.path)
        try:
            workers = patiently(lambda: tables.all_workers(connection.cursor()), 10.0)
            return [worker for worker in workers if folder.is_alive(worker.bell)]
        finally:
            folder.close()
    except sqlite3.Error as error:
        raise database.refusal(location.path, error) from error
    finally:
        connection.close()
