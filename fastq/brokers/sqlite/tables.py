"""Every statement on the message tables: publish, claim, settle, give back. No transactions, threads or sockets.

Each function runs inside a transaction of its caller. They take whole batches: a statement costs more than a row, and
each one lets go of the interpreter's lock and has to get it back.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import orjson

from fastq.brokers.turns import Row, due_of, size_of

if TYPE_CHECKING:
    from fastq.wire.message import Message

#: A message as it is stored: queue, priority, due, props, body.
MessageRow: TypeAlias = tuple[int, int, float | None, bytes, bytes]

INSERT_MESSAGE: Final = "INSERT INTO messages (queue, priority, due, props, body) VALUES (?, ?, ?, ?, ?)"
#: Messages whose time has come are made ready in slices, so that a million of them do not hold the lock for seconds.
_DUE_SLICE: Final = 1000


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that has the file open."""

    id: int
    name: str
    host: str
    pid: int
    bell: str
    queues: tuple[str, ...]
    started: float  # unix time


class QueueIds:
    """The numbers that stand for queue names in one file. ``forget`` them after a rollback: it may have undone one."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def get(self, name: str) -> int | None:
        """Return a queue's number if it was asked for before."""
        return self._ids.get(name)

    def declare(self, cursor: sqlite3.Cursor, name: str) -> int:
        """Return a queue's number, creating the queue when it is missing."""
        found = self._ids.get(name)
        if found is None:
            cursor.execute("INSERT OR IGNORE INTO queues (name) VALUES (?)", (name,))
            (found,) = cursor.execute("SELECT id FROM queues WHERE name = ?", (name,)).fetchone()
            self._ids[name] = int(found)
        return int(found)

    def forget(self) -> None:
        """Drop what is known."""
        self._ids.clear()


def message_row(queue: int, message: Message) -> MessageRow:
    """Return what is stored of a message."""
    due = None if message.due is None else due_of(message)
    return (queue, message.priority, due, message.props, message.body)


# --- claim ------------------------------------------------------------------------------------------------------------


def claim(
    cursor: sqlite3.Cursor, owner: int, queue: int, name: bytes, limit: int, max_bytes: float = math.inf
) -> list[Row]:
    """Take up to ``limit`` ready messages of a queue for a worker: by priority, then oldest first.

    None after the one with which they have ``max_bytes``.
    """
    # Not UPDATE ... RETURNING: that rewrites every message and hands the rows out in no promised order.
    found = cursor.execute(
        "SELECT r.id, ?3, m.props, m.body, r.deliveries + 1 FROM ready r CROSS JOIN messages m ON m.id = r.id "
        "WHERE r.queue = ?1 ORDER BY r.rank, r.id LIMIT ?2",
        (queue, limit, name),
    )
    rows: list[Row] = []
    while max_bytes > 0 and (row := found.fetchone()) is not None:
        rows.append(row)
        max_bytes -= size_of(row)
    if rows:
        cursor.execute(
            "INSERT INTO claimed SELECT id, ?1, deliveries + 1 FROM ready WHERE queue = ?2 ORDER BY rank, id LIMIT ?3",
            (owner, queue, len(rows)),
        )
        cursor.execute(
            "DELETE FROM ready WHERE queue = ?1 AND (rank, id) <= ((SELECT -priority FROM messages WHERE id = ?2), ?2)",
            (queue, rows[-1][0]),
        )
    return rows


def claim_fairly(
    cursor: sqlite3.Cursor,
    owner: int,
    queues: Sequence[tuple[int, bytes]],
    limit: int,
    turn: int,
    max_bytes: float = math.inf,
) -> list[Row]:
    """Take up to ``limit`` messages: the same share of each queue that has any, the rest where there are more.

    None after the one with which they have ``max_bytes``.
    """
    if len(queues) == 1:
        return claim(cursor, owner, *queues[0], limit, max_bytes)
    ids = _json(queue for queue, _ in queues)
    found = cursor.execute(
        "SELECT value FROM json_each(?) WHERE EXISTS (SELECT 1 FROM ready WHERE ready.queue = value)", (ids,)
    ).fetchall()
    names = dict(queues)
    waiting = [queue for (queue,) in found]
    start = turn % len(waiting) if waiting else 0
    waiting = waiting[start:] + waiting[:start]
    rows: list[Row] = []
    while waiting and len(rows) < limit and max_bytes > 0:
        share = -(-(limit - len(rows)) // len(waiting))
        more = []
        for queue in waiting:
            taken = claim(cursor, owner, queue, names[queue], min(share, limit - len(rows)), max_bytes)
            rows += taken
            max_bytes -= sum(size_of(row) for row in taken)
            if len(taken) == share:
                more.append(queue)
        waiting = more
    return rows


def look(cursor: sqlite3.Cursor, queues: Sequence[tuple[int, bytes]]) -> tuple[float | None, bool]:
    """Return when the next delayed message is due (unix time), and whether any of the queues has a ready one."""
    due, has_ready = cursor.execute(
        "SELECT (SELECT min(due) FROM delayed), "
        "EXISTS (SELECT 1 FROM ready WHERE queue IN (SELECT value FROM json_each(?)))",
        (_json(queue for queue, _ in queues),),
    ).fetchone()
    return due, bool(has_ready)


def next_due(cursor: sqlite3.Cursor) -> float | None:
    """Return when the next delayed message is due (unix time); None without one."""
    (due,) = cursor.execute("SELECT min(due) FROM delayed").fetchone()
    return None if due is None else float(due)


def make_due_ready(cursor: sqlite3.Cursor, now: float) -> None:
    """Make the messages ready whose time has come, of all queues; at most a slice of them."""
    slice_ = cursor.execute(
        "SELECT due, id FROM delayed WHERE due <= ? ORDER BY due, id LIMIT ?", (now, _DUE_SLICE)
    ).fetchall()
    if not slice_:
        return
    cursor.execute(
        "INSERT INTO ready SELECT m.queue, -m.priority, m.id, 0 FROM delayed d JOIN messages m ON m.id = d.id "
        "WHERE (d.due, d.id) <= (?, ?)",
        slice_[-1],
    )
    cursor.execute("DELETE FROM delayed WHERE (due, id) <= (?, ?)", slice_[-1])


# --- settle -----------------------------------------------------------------------------------------------------------


def delete(cursor: sqlite3.Cursor, owner: int, tags: Sequence[int]) -> None:
    """Delete messages that are done. Only the owner's: one that was given to somebody else meanwhile stays."""
    first, last, count = min(tags), max(tags), len(tags)
    if last - first + 1 == count:
        # Claimed in order, they are mostly done in order: deleting a range costs a third (measured).
        cursor.execute(
            "DELETE FROM messages WHERE id BETWEEN ?1 AND ?2 AND "
            "(SELECT count(*) FROM claimed WHERE id BETWEEN ?1 AND ?2 AND owner = ?3) = ?4",
            (first, last, owner, count),
        )
        if cursor.rowcount == count:
            cursor.execute("DELETE FROM claimed WHERE id BETWEEN ? AND ?", (first, last))
            return
    parameters = (_json(tags), owner)
    cursor.execute(
        "DELETE FROM messages WHERE id IN "
        "(SELECT id FROM claimed WHERE id IN (SELECT value FROM json_each(?1)) AND owner = ?2)",
        parameters,
    )
    cursor.execute("DELETE FROM claimed WHERE id IN (SELECT value FROM json_each(?1)) AND owner = ?2", parameters)


def bury(cursor: sqlite3.Cursor, owner: int, tags: Sequence[int], reason: str) -> None:
    """Move messages to the dead letters."""
    cursor.execute(
        "INSERT INTO dead (queue, priority, deliveries, reason, died, props, body) "
        "SELECT m.queue, m.priority, c.deliveries, ?3, ?4, m.props, m.body "
        "FROM claimed c JOIN messages m ON m.id = c.id "
        "WHERE c.id IN (SELECT value FROM json_each(?1)) AND c.owner = ?2 ORDER BY c.id",
        (_json(tags), owner, reason, time.time()),
    )
    delete(cursor, owner, tags)


def give_back(cursor: sqlite3.Cursor, owner: int, tags: Iterable[int], uncounted: int = 0) -> None:
    """Put messages back to their old places; ``uncounted`` of the times they were handed out do not count."""
    parameters = (_json(tags), owner)
    cursor.execute(
        f"INSERT INTO ready SELECT m.queue, -m.priority, m.id, c.deliveries - {uncounted:d} "  # noqa: S608  a number
        "FROM claimed c JOIN messages m ON m.id = c.id "
        "WHERE c.id IN (SELECT value FROM json_each(?1)) AND c.owner = ?2",
        parameters,
    )
    cursor.execute("DELETE FROM claimed WHERE id IN (SELECT value FROM json_each(?1)) AND owner = ?2", parameters)


def give_back_all(cursor: sqlite3.Cursor, owner: int) -> int:
    """Put everything that a worker holds back and return how much it was."""
    cursor.execute(
        "INSERT INTO ready SELECT m.queue, -m.priority, m.id, c.deliveries "
        "FROM claimed c JOIN messages m ON m.id = c.id "
        "WHERE c.owner = ?",
        (owner,),
    )
    cursor.execute("DELETE FROM claimed WHERE owner = ?", (owner,))
    return cursor.rowcount


def _json(numbers: Iterable[int]) -> str:
    return orjson.dumps(list(numbers)).decode()


# --- queues and workers -----------------------------------------------------------------------------------------------


def depth(cursor: sqlite3.Cursor, queue: str) -> int:
    """Return how many messages wait in a queue, those that wait for their time included; 0 without such a queue."""
    number = _queue_id(cursor, queue)
    (ready,) = cursor.execute("SELECT count(*) FROM ready WHERE queue = ?", (number,)).fetchone()
    (delayed,) = cursor.execute(
        "SELECT count(*) FROM delayed d JOIN messages m ON m.id = d.id WHERE m.queue = ?", (number,)
    ).fetchone()
    return int(ready + delayed)


def purge(cursor: sqlite3.Cursor, queue: str) -> int:
    """Delete the messages that wait in a queue and return how many there were; claimed ones stay."""
    number = _queue_id(cursor, queue)
    cursor.execute("DELETE FROM messages WHERE queue = ? AND id NOT IN (SELECT id FROM claimed)", (number,))
    count = cursor.rowcount
    cursor.execute("DELETE FROM ready WHERE queue = ?", (number,))
    cursor.execute("DELETE FROM delayed WHERE id NOT IN (SELECT id FROM messages)")
    return count


def _queue_id(cursor: sqlite3.Cursor, name: str) -> int | None:
    found = cursor.execute("SELECT id FROM queues WHERE name = ?", (name,)).fetchone()
    return None if found is None else int(found[0])


def put_worker(cursor: sqlite3.Cursor, worker: int, info: WorkerInfo) -> int:
    """Write a worker into the file, again if it has a number, and return its number: no other worker ever had it."""
    cursor.execute(
        "INSERT OR REPLACE INTO workers (id, name, host, pid, bell, queues, started) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (worker or None, info.name, info.host, info.pid, info.bell, orjson.dumps(info.queues).decode(), info.started),
    )
    return int(cursor.lastrowid or 0)


def remove_worker(cursor: sqlite3.Cursor, worker: int) -> int:
    """Give back what a worker holds, forget it, and return how many messages it held."""
    count = give_back_all(cursor, worker)
    cursor.execute("DELETE FROM workers WHERE id = ?", (worker,))
    return count


def strays(cursor: sqlite3.Cursor) -> list[int]:
    """Return owners of claimed messages that are no workers any more: taken for dead, they went on for a moment."""
    found = cursor.execute("SELECT DISTINCT owner FROM claimed WHERE owner NOT IN (SELECT id FROM workers)")
    return [owner for (owner,) in found.fetchall()]


def all_workers(cursor: sqlite3.Cursor) -> list[WorkerInfo]:
    """Return the workers in the file, dead ones included."""
    rows = cursor.execute("SELECT id, name, host, pid, bell, queues, started FROM workers ORDER BY id").fetchall()
    return [
        WorkerInfo(number, name, host, pid, bell, tuple(orjson.loads(queues)), started)
        for number, name, host, pid, bell, queues, started in rows
    ]
