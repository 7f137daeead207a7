"""Results in the SQLite file: write them, and tell whoever waits for them. Both ends of a result use it.

Nothing here commits: ``write_results`` runs inside the caller's transaction, ``Announcer`` afterwards.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Final, TypeAlias

from fastq.brokers.sqlite.bells import CLIENT, NAME, BellFolder, pack_results
from fastq.interfaces import SaveItem
from fastq.states import READY_STATES

#: For each client's bell: the finished results to send there, meta by task id.
Notices: TypeAlias = dict[str, dict[str, bytes]]

_SWEEP_SLICE: Final = 1000
_FIRST_REPEAT_S: Final = 0.001
#: Chosen: together about a quarter of a second. A client that hears none of these reads nothing at present, and will
#: look into the file before it waits.
_REPEATS: Final = 8


def write_results(cursor: sqlite3.Cursor, results: Iterable[SaveItem]) -> None:
    """Store results, each in the place of an earlier one of its task."""
    now = time.time()
    cursor.executemany(
        "INSERT OR REPLACE INTO results (id, state, meta, saved) VALUES (?, ?, ?, ?)",
        [(task_id, state, meta, now) for task_id, state, meta, _, _ in results],
    )


def collect_notices(cursor: sqlite3.Cursor, results: Iterable[SaveItem]) -> Notices:
    """Return who is to hear of which results; takes the waiters that it finds out of the file."""
    notices: Notices = {}
    finished: dict[str, bytes] = {}
    for task_id, state, meta, reply_to, _ in results:
        if state in READY_STATES:
            finished[task_id] = meta
            if is_client_bell(reply_to):
                notices.setdefault(reply_to, {})[task_id] = meta
    if finished and cursor.execute("SELECT EXISTS (SELECT 1 FROM waiters)").fetchone()[0]:
        ids = (json.dumps(list(finished)),)
        waiting = cursor.execute(
            "SELECT id, bell FROM waiters WHERE id IN (SELECT value FROM json_each(?))", ids
        ).fetchall()
        cursor.execute("DELETE FROM waiters WHERE id IN (SELECT value FROM json_each(?))", ids)
        for task_id, bell in waiting:
            if task_id in finished and is_client_bell(bell):
                notices.setdefault(bell, {})[task_id] = finished[task_id]
    return notices


def find_results(cursor: sqlite3.Cursor, task_ids: Iterable[str]) -> dict[str, bytes]:
    """Return the metas by task id, of those tasks that have one."""
    found = cursor.execute(
        "SELECT id, meta FROM results WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(task_ids)),)
    )
    return dict(found.fetchall())


def put_waiters(cursor: sqlite3.Cursor, task_ids: Iterable[str], bell: str) -> None:
    """Have the results of these tasks announced to a bell, whatever reply address their messages carry."""
    ids = json.dumps(list(task_ids))
    cursor.execute("INSERT OR IGNORE INTO waiters SELECT value, ?2 FROM json_each(?1)", (ids, bell))


def forget_waiters(cursor: sqlite3.Cursor, task_ids: Iterable[str], bell: str) -> None:
    """Announce the results of these tasks to a bell no longer."""
    ids = json.dumps(list(task_ids))
    cursor.execute("DELETE FROM waiters WHERE id IN (SELECT value FROM json_each(?1)) AND bell = ?2", (ids, bell))


def is_client_bell(name: str) -> bool:
    """Return whether a reply address has the form of a client's bell; anything else is another program's."""
    return name.startswith(CLIENT) and NAME.fullmatch(name) is not None


def sweep(cursor: sqlite3.Cursor, folder: BellFolder, older_than: float | None) -> bool:
    """Delete results saved before a time, a slice of them, and waiters that died; return whether there may be more."""
    for (bell,) in cursor.execute("SELECT DISTINCT bell FROM waiters").fetchall():
        if not is_client_bell(bell) or not folder.is_alive(bell):
            cursor.execute("DELETE FROM waiters WHERE bell = ?", (bell,))
    if older_than is None:
        return False
    # They lie in the order of saving: no index on the time.
    cursor.execute(
        "DELETE FROM results WHERE seq IN (SELECT seq FROM results ORDER BY seq LIMIT ?) AND saved < ?",
        (_SWEEP_SLICE, older_than),
    )
    return cursor.rowcount == _SWEEP_SLICE


class Announcer:
    """Sends results to clients' bells, and repeats "look into the file" to those that had no room."""

    def __init__(self, folder: BellFolder) -> None:
        self._folder = folder
        self._deaf: dict[str, tuple[float, float]] = {}  # bell -> (when to try again, pause after that)

    def send(self, notices: Notices) -> None:
        """Send each client its results: one datagram, or a few when they are large."""
        for bell, results in notices.items():
            if bell in self._deaf:
                continue  # the repeat makes it read the file: these results as well
            if not all(self._folder.ring(bell, datagram) for datagram in pack_results(results.items())):
                self._deaf[bell] = (time.monotonic() + _FIRST_REPEAT_S, 2 * _FIRST_REPEAT_S)

    def repeat(self) -> float | None:
        """Try the clients again that had no room; return in how many seconds to come back, None when none is left."""
        if not self._deaf:
            return None
        now = time.monotonic()
        for bell, (when, pause_s) in list(self._deaf.items()):
            if when > now:
                continue
            if self._folder.ring(bell) or pause_s > _FIRST_REPEAT_S * 2**_REPEATS:
                del self._deaf[bell]
            else:
                self._deaf[bell] = (now + pause_s, 2 * pause_s)
        return max(0.0, min(when for when, _ in self._deaf.values()) - now) if self._deaf else None
