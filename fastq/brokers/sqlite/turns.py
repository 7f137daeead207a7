"""A worker's turns on the SQLite file: each is one transaction, so a result is never less durable than the verdict.

Between two of them it sleeps until a bell rings or something is due. The statements are in ``tables`` and ``results``,
the other workers in ``neighbours``.
"""

from __future__ import annotations

import logging
import math
import select
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from fastq.brokers.sqlite import database, tables
from fastq.brokers.sqlite.client import OpenFile
from fastq.brokers.sqlite.neighbours import Neighbours
from fastq.brokers.sqlite.results import Announcer, Notices, collect_notices, sweep, write_results
from fastq.brokers.sqlite.tables import QueueIds
from fastq.brokers.turns import Outcome, Room, TurnFailed, Turns, Work, size_of
from fastq.errors import ConnectionLost, SettingsError
from fastq.interfaces import SaveItem
from fastq.link import ACK, REQUEUE, RETURN

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")

CHECK_EVERY_S: Final = 1.0  # specified: what a dead worker held runs again within 5 s
FIRST_UPKEEP_S: Final = 5.0
UPKEEP_EVERY_S: Final = 60.0
UPKEEP_SLICE_S: Final = 0.05
LOOK_AFTER_S: Final = 0.02
LOCK_WAIT_S: Final = 1.0


@dataclass(slots=True)
class Written(Outcome):
    """What a transaction has to tell, also to others than the loop."""

    notices: Notices = field(default_factory=dict)
    rings: bool = False


class SqliteTurns(Turns):
    """One worker's, or those of one that only stores results."""

    thread_name = "fastq-sqlite"
    logger = logging.getLogger("fastq.transport.sqlite_thread")

    def __init__(self, url: str, settings: Settings) -> None:
        self._location = database.parse_url(url)
        super().__init__(self._location.path)
        self._expires_s = settings.result_expires
        self._file: OpenFile
        self._announcer: Announcer
        self._neighbours: Neighbours
        self._poll = select.poll()
        self._poll.register(self.waker, select.POLLIN)
        self._queue_ids = QueueIds()
        self._queues: list[tuple[int, bytes]] = []
        self._count = 0  # turns
        self._is_full_sync = False
        self._is_rung = False
        self._drained = False  # the last claim got less than it wanted: only a bell or the clock brings more
        self._next_due: float | None = None
        self._look_at = math.inf  # when to see whether there is an earlier one
        self._next_check = 0.0
        self._next_upkeep = time.monotonic() + FIRST_UPKEEP_S

    def open(self) -> None:
        """Open the file."""
        self._file = OpenFile(self._location, "NORMAL", LOCK_WAIT_S)
        self._announcer = Announcer(self._file.folder)
        self._neighbours = Neighbours(self._file, self.place)

    def enter(self, name: str, queues: Sequence[str]) -> None:
        """Join the file's workers and claim from these queues from now on."""

        def declare() -> list[tuple[int, bytes]]:
            return [(self._queue_ids.declare(self._file.cursor, queue), queue.encode()) for queue in queues]

        try:
            self._queues = self._transaction(declare)
            self._poll.register(self._neighbours.join(name, queues), select.POLLIN)
        except sqlite3.Error as error:
            raise database.refusal(self.place, error) from error
        self._drained = False

    def turn(self, work: Work, room: Room) -> Outcome:
        """Do what the clock brings, and a transaction if there is anything for one."""
        try:
            outcome = self._do_what_is_due(work, room)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        outcome.next_look_s = self._idle_s(room)
        return outcome

    def leave(self, work: Work) -> Outcome:
        """Store what was handed over, give back the rest, and sign off."""
        if not work and not self._neighbours.me:
            return Outcome()
        try:
            return self._carry_out(work, Room(), signs_off=True)
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # --- when ---------------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float, wants: bool) -> None:
        """Return when it was woken, the time is up, or a bell rings while messages are wanted."""
        repeat_s = self._announcer.repeat()
        if repeat_s is not None:
            timeout_s = min(timeout_s, repeat_s)
        bell = self._neighbours.bell
        if bell is None or not wants:
            super().wait(timeout_s, wants)
            return
        for fd, _ in self._poll.poll(timeout_s * 1000):
            if fd == self.waker.fileno():
                self.waker.clear()
            else:
                bell.hear()
                self._drained = False
                self._is_rung = True
                self._look_soon()

    def _idle_s(self, room: Room) -> float:
        """Return how long nothing is to be done after a turn with this room, as far as is known now."""
        now = time.monotonic()
        until = min(self._next_check, self._next_upkeep)
        if room and self._drained:
            until = min(until, self._look_at)
            if self._next_due is not None:
                until = min(until, now + self._next_due - time.time())
        else:
            self._drained = False  # the room is used up: bells are not heard now
        return until - now

    def _look_soon(self) -> None:
        """Look for delayed messages in a moment: not now, when something is on its way to be run."""
        if self._look_at == math.inf:
            self._look_at = time.monotonic() + LOOK_AFTER_S

    def _is_due(self) -> bool:
        return self._next_due is not None and self._next_due <= time.time()

    # --- a turn -------------------------------------------------------------------------------------------------------

    def _do_what_is_due(self, work: Work, room: Room) -> Outcome:
        now = time.monotonic()
        if now >= self._next_check:
            self._check()
            self._next_check = now + CHECK_EVERY_S
        if now >= self._next_upkeep:
            has_more = self._upkeep()
            self._next_upkeep = now + (UPKEEP_SLICE_S if has_more else UPKEEP_EVERY_S)
        if now >= self._look_at:
            self._next_due, self._look_at = tables.next_due(self._file.cursor), math.inf
        return self._carry_out(work, room) if work or self._something_to_claim(room) else Outcome()

    def _something_to_claim(self, room: Room) -> bool:
        """Return whether a claim would find anything: looking takes no lock, for which other workers may wait."""
        is_rung, self._is_rung = self._is_rung, False
        if not room:
            return False
        if is_rung and self._neighbours.is_alone:
            return True
        self._next_due, has_ready = tables.look(self._file.cursor, self._queues)
        self._look_at = math.inf
        self._drained = not has_ready
        return has_ready or self._is_due()

    def _carry_out(self, work: Work, room: Room, signs_off: bool = False) -> Written:
        """Do one transaction, then tell clients and other workers what it has done."""
        self._set_full_sync(bool(work.messages))
        try:
            written = self._transaction(partial(self._write, work, room, signs_off, one_by_one=False))
        except database.UNSTORABLE:  # something cannot be stored: find out what
            written = self._transaction(partial(self._write, work, room, signs_off, one_by_one=True))
        self._count += 1
        if written.notices:
            self._announcer.send(written.notices)
        if written.rings:
            self._file.folder.ring_workers(besides=self._neighbours.bell)
        return written

    def _write(self, work: Work, room: Room, signs_off: bool, one_by_one: bool) -> Written:
        written = Written()
        if work.saves:
            self._save(work.saves, one_by_one, written)
        if work.messages:
            self._publish(work.messages, one_by_one, written)
        if work.verdicts:
            self._settle(work, written)
        if signs_off:
            tables.remove_worker(self._file.cursor, self._neighbours.me)
            written.rings = True
        elif room and (self._is_due() or not self._drained):
            self._claim(room, written)
        return written

    def _save(self, saves: list[SaveItem], one_by_one: bool, written: Written) -> None:
        # Those that cannot be stored too: neither another attempt nor another run of the task would help.
        written.stored += [item[4] for item in saves if item[4]]
        if one_by_one:
            saves = [item for item in saves if self._is_storable(item)]
        write_results(self._file.cursor, saves)
        written.notices = collect_notices(self._file.cursor, saves)

    def _is_storable(self, item: SaveItem) -> bool:
        try:
            write_results(self._file.cursor, [item])
            item[0].encode()
        except database.UNSTORABLE as error:
            self.logger.error("the result of task %r cannot be stored: %s", item[0], error)
            return False
        return True

    def _publish(self, messages: list[tuple[int, Message]], one_by_one: bool, written: Written) -> None:
        cursor = self._file.cursor
        declare = partial(self._queue_ids.declare, cursor)
        written.rings = True
        self._drained = False
        self._look_soon()
        if not one_by_one:
            rows = [tables.message_row(declare(message.routing_key), message) for _, message in messages]
            cursor.executemany(tables.INSERT_MESSAGE, rows)
            written.stored += [token for token, _ in messages]
            return
        for token, message in messages:
            try:
                cursor.execute(tables.INSERT_MESSAGE, tables.message_row(declare(message.routing_key), message))
                written.stored.append(token)
            except database.UNSTORABLE as error:
                written.refused.append(token)
                written.refusal = f"the message cannot be stored: {error}"

    def _settle(self, work: Work, written: Written) -> None:
        cursor, me = self._file.cursor, self._neighbours.me
        done = work.tags(ACK)
        if done:
            tables.delete(cursor, me, done)
        if len(done) == len(work.verdicts):
            return
        for reason, tags in work.rejected:
            tables.bury(cursor, me, tags, reason)
        for verdict, uncounted in ((REQUEUE, 0), (RETURN, 1)):
            tags = work.tags(verdict)
            if tags:
                tables.give_back(cursor, me, tags, uncounted)
                written.rings = True
                self._drained = False

    def _claim(self, room: Room, written: Written) -> None:
        cursor = self._file.cursor
        if self._is_due():
            tables.make_due_ready(cursor, time.time())
            self._next_due = tables.next_due(cursor)
        me = self._neighbours.me
        written.rows = tables.claim_fairly(cursor, me, self._queues, room.messages, self._count, room.size)
        is_full = sum(map(size_of, written.rows)) >= room.size
        self._drained = len(written.rows) < room.messages and not is_full

    def _explained(self, error: sqlite3.Error) -> Exception:
        """Return the error for one of the file's: it says what happened and what helps."""
        if isinstance(error, database.UNSTORABLE):
            return RuntimeError(f"a statement is wrong: {error}")  # values were tried one by one before
        text = database.explain(self.place, error)
        return SettingsError(text) if database.is_damaged(error) else TurnFailed(text)

    def _transaction(self, write: Callable[[], T]) -> T:
        """Write, commit and return what ``write`` returns; nothing of it remains when anything is raised."""
        try:
            return self._file.transaction(write)
        except BaseException:
            self._queue_ids.forget()
            raise

    def _set_full_sync(self, wanted: bool) -> None:
        # A publish is confirmed when it is on the disk. A verdict that a power cut takes only runs a task again.
        wanted = wanted and self._location.synchronous == "FULL"
        if wanted != self._is_full_sync:
            self._file.cursor.execute(f"PRAGMA synchronous={'FULL' if wanted else 'NORMAL'}")
            self._is_full_sync = wanted

    # --- what the clock brings ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        """See that the file is still the one we know, and which other workers have died."""
        if self._file.is_replaced():
            raise ConnectionLost(f"{self.place} was removed or replaced while it was in use")
        if self._neighbours.check():
            self._drained = False

    def _upkeep(self) -> bool:
        """Remove what has expired or was left behind; return whether there may be more."""
        file = self._file
        file.folder.sweep()
        older_than = None if self._expires_s is None else time.time() - self._expires_s
        return file.transaction(partial(sweep, file.cursor, file.folder, older_than))
