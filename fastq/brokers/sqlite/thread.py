"""The one thread of a worker that touches the SQLite file: it sleeps until something happens, then does it in a turn.

A turn is one transaction: save results, publish follow-ups, settle, claim. So a result is never less durable than the
verdict on its message, and under load a turn grows with what has gathered during the one before. Nothing here runs on
the event loop; what the loop is to know goes there once per turn.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from fastq.brokers.sqlite import database, tables
from fastq.brokers.sqlite.bells import WORKER, Bell, BellFolder
from fastq.brokers.sqlite.database import Location, patiently
from fastq.brokers.sqlite.results import Announcer, Notices, SaveItem, collect_notices, sweep, write_results
from fastq.brokers.sqlite.tables import QueueIds, Row, WorkerInfo
from fastq.bus import NAMESAKE
from fastq.errors import ConnectionLost, FastqError, SettingsError

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")

logger = logging.getLogger("fastq.transport.sqlite_thread")

ACK, REJECT, REQUEUE, RETURN = range(4)  # fastq.link's verdicts

CHECK_EVERY_S: Final = 1.0  # specified: what a dead worker held runs again within 5 s
FIRST_UPKEEP_S: Final = 5.0
UPKEEP_EVERY_S: Final = 60.0
UPKEEP_SLICE_S: Final = 0.05
FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 5.0
LOOK_AFTER_S: Final = 0.02
LOCK_WAIT_S: Final = 1.0
LEAVE_S: Final = 3.0

#: What a value can be refused for by itself, whatever the state of the file.
UNSTORABLE = (UnicodeError, OverflowError, TypeError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError,
              sqlite3.ProgrammingError)  # fmt: skip


@dataclass(slots=True)
class Work:
    """What the loop has handed over and no transaction has stored yet."""

    saves: list[SaveItem] = field(default_factory=list)
    messages: list[tuple[int, Message]] = field(default_factory=list)
    verdicts: list[tuple[int, int]] = field(default_factory=list)
    rejected: list[tuple[str, list[int]]] = field(default_factory=list)  # those of them, by reason

    def __bool__(self) -> bool:
        return bool(self.saves or self.messages or self.verdicts)

    def add(self, more: Work) -> None:
        """Append what was handed over later."""
        self.saves += more.saves
        self.messages += more.messages
        self.verdicts += more.verdicts
        self.rejected += more.rejected


@dataclass(slots=True)
class Outcome:
    """What a committed turn has to tell: to the loop, to clients, to other workers."""

    rows: list[Row] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    refusal: str = ""
    notices: Notices = field(default_factory=dict)
    rings: bool = False


class SqliteThread(threading.Thread):
    """Serves one consumer, which calls ``post``, ``allow``, ``ask`` and ``stop`` on its loop's thread.

    ``report`` is called after every turn that has something to tell, ``fail`` at most once; both on this thread.
    """

    def __init__(
        self,
        location: Location,
        settings: Settings,
        report: Callable[[Outcome], None],
        fail: Callable[[Exception], None],
    ) -> None:
        super().__init__(name="fastq-sqlite", daemon=True)
        self._location = location
        self._publish_timeout_s = settings.fastq_publish_timeout
        self._expires_s = settings.result_expires
        self._report = report
        self._fail = fail
        #: Done when the file is open; raises SettingsError or ConnectionLost.
        self.opened: Future[None] = Future()
        #: Done when the thread has let go of everything.
        self.ended: Future[None] = Future()

        # Shared with the loop's thread: single references and deques, so the interpreter's lock is enough.
        self._inbox: deque[Work] = deque()
        self._questions: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._limit = 0
        self._max_bytes = math.inf
        self._asleep = False
        self._stopping = False
        self._waker = Waker()
        self._poll_waker, self._poll_all = select.poll(), select.poll()
        for poll in (self._poll_waker, self._poll_all):
            poll.register(self._waker, select.POLLIN)

        # This thread's own.
        self._connection: sqlite3.Connection
        self._cursor: sqlite3.Cursor
        self._queue_ids = QueueIds()
        self._folder: BellFolder
        self._announcer: Announcer
        self._bell: Bell | None = None
        self._me = 0
        self._queues: list[tuple[int, bytes]] = []
        self._work = Work()
        self._claimed = self._claimed_bytes = 0
        self._turns = 0
        self._is_alone = False  # no other worker was there at the last check
        self._is_rung = False
        self._drained = False  # the last claim got less than it wanted: only a bell or the clock brings more
        self._next_due: float | None = None
        self._look_at = math.inf  # when to see whether there is an earlier one
        self._namesakes: set[int] = set()  # workers that have our name
        self._missing: set[int] = set()  # workers whose bell was not there at the last check
        self._is_full_sync = False
        self._one_by_one = False  # something in the work cannot be stored: find out what
        self._failing_since = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._retry_at = 0.0
        self._next_check = 0.0
        self._next_upkeep = time.monotonic() + FIRST_UPKEEP_S
        self._identity = (0, 0)

    # --- called on the loop's thread ----------------------------------------------------------------------------------

    def post(self, work: Work) -> None:
        """Hand over a batch."""
        self._inbox.append(work)
        # The thread says that it goes to sleep before it looks into the inbox a last time: no batch is overlooked.
        if self._asleep:
            self._waker.wake()

    def allow(self, limit: int, max_bytes: float = math.inf) -> None:
        """Set how many messages may be claimed in all since the start, and up to how many bytes."""
        was_stuck = not self._has_room()
        self._limit, self._max_bytes = limit, max_bytes
        if was_stuck and self._asleep:
            self._waker.wake()

    def ask(self, action: Callable[[], None]) -> Future[None]:
        """Have something done by this thread, between two turns."""
        answer: Future[None] = Future()
        self._questions.append((action, answer))
        self._waker.wake()
        if self.ended.done():
            self._refuse_questions()
        return answer

    def stop(self) -> None:
        """Store what has been handed over, give back what is not settled, and end."""
        self._stopping = True
        self._waker.wake()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Open the file; then sleep and work until stopped."""
        # From here on neither can be cancelled by somebody who has stopped waiting for it.
        is_awaited = self.opened.set_running_or_notify_cancel()
        self.ended.set_running_or_notify_cancel()
        if is_awaited:
            try:
                self._open()
            except BaseException as error:
                self.opened.set_exception(error)
            else:
                self.opened.set_result(None)
                self._serve()
        self.ended.set_result(None)
        self._refuse_questions()

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._sleep()
                self._take_inbox()
                if time.monotonic() >= self._retry_at:
                    self._work_once()
            self._leave()
        except FastqError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the SQLite thread failed")
            self._fail(ConnectionLost(f"{self._location.path}: {error!r}"))
        finally:
            self._close()

    def enter(self, info: WorkerInfo, queues: Sequence[str]) -> None:
        """Join the file's workers and claim from these queues from now on. To be asked for."""
        if self._bell is None:
            self._bell = self._folder.bind(WORKER)
            self._poll_all.register(self._bell, select.POLLIN)
        info = replace(info, bell=self._bell.name, queues=tuple(queues))

        def write() -> tuple[int, list[tuple[int, bytes]]]:
            ids = [(self._queue_ids.declare(self._cursor, name), name.encode()) for name in queues]
            return tables.put_worker(self._cursor, self._me, info), ids

        try:
            self._me, self._queues = self._transaction(write)
            self._look_after_others()
        except sqlite3.Error as error:
            raise database.refusal(self._location.path, error) from error
        self._drained = False

    def quiet(self) -> None:
        """Claim nothing more. To be asked for."""
        self._queues = []

    def _open(self) -> None:
        path = self._location.path
        self._connection = database.connect(path, "NORMAL", LOCK_WAIT_S)
        self._cursor = self._connection.cursor()
        self._identity = database.identity(path)
        try:
            self._folder = BellFolder(path)
        except BaseException:
            self._connection.close()
            raise
        self._announcer = Announcer(self._folder)

    def _sleep(self) -> None:
        """Return when there is something to do."""
        self._asleep = True
        try:
            # Also when there is enough to do: the bell may mean more.
            self._poll(max(0.0, self._idle_s()))
        finally:
            self._asleep = False

    def _poll(self, timeout_s: float) -> None:
        hears = self._bell is not None and not self._failing_since and self._wanted() > 0
        for fd, _ in (self._poll_all if hears else self._poll_waker).poll(timeout_s * 1000):
            if fd == self._waker.fileno():
                self._waker.clear()
            elif self._bell is not None:
                self._bell.hear()
                self._drained = False
                self._is_rung = True
                self._look_soon()

    def _idle_s(self) -> float:
        """Return how long nothing is to be done, as far as is known now."""
        repeat_s = self._announcer.repeat()
        if self._stopping or self._questions:
            return 0.0
        now = time.monotonic()
        if self._failing_since:
            return self._retry_at - now
        if self._inbox or self._work:
            return 0.0
        until = min(self._next_check, self._next_upkeep)
        if self._wanted():
            if not self._drained:
                return 0.0
            until = min(until, self._look_at)
            if self._next_due is not None:
                until = min(until, now + self._next_due - time.time())
        else:
            self._drained = False  # bells are not heard now
        return (until if repeat_s is None else min(until, now + repeat_s)) - now

    def _wanted(self) -> int:
        return self._limit - self._claimed if self._queues and self._has_room() else 0

    def _has_room(self) -> bool:
        return self._limit > self._claimed and self._max_bytes > self._claimed_bytes

    def _take_inbox(self) -> None:
        while self._questions:
            action, answer = self._questions.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                action()
            except Exception as error:
                answer.set_exception(error)
            else:
                answer.set_result(None)
        while self._inbox:
            self._work.add(self._inbox.popleft())

    # --- a turn -------------------------------------------------------------------------------------------------------

    def _work_once(self) -> None:
        """Do what is to be done, and see to it that a failure is tried again later with nothing lost."""
        try:
            now = time.monotonic()
            if now >= self._next_check:
                self._check()
                self._next_check = now + CHECK_EVERY_S
            if now >= self._next_upkeep:
                has_more = self._upkeep()
                self._next_upkeep = now + (UPKEEP_SLICE_S if has_more else UPKEEP_EVERY_S)
            if now >= self._look_at:
                self._next_due, self._look_at = tables.next_due(self._cursor), math.inf
            if self._work or self._something_to_claim():
                self._turn()
        except UNSTORABLE:
            if self._one_by_one:
                raise
            self._one_by_one = True
        except sqlite3.Error as error:
            self._on_error(error)
        else:
            self._one_by_one = False
            if self._failing_since:
                logger.info("%s can be used again", self._location.path)
                self._failing_since, self._pause_s = 0.0, FIRST_PAUSE_S

    def _turn(self) -> None:
        """Do one transaction, then tell everybody what it has done."""
        work, outcome = self._work, Outcome()
        self._set_full_sync(bool(work.messages))
        self._transaction(lambda: self._write(work, outcome))
        self._work = Work()
        self._claimed += len(outcome.rows)
        self._claimed_bytes += sum(map(tables.size_of, outcome.rows))
        self._turns += 1
        if outcome.notices:
            self._announcer.send(outcome.notices)
        if outcome.rings:
            self._folder.ring_workers(besides=self._bell)
        # Last: the loop wakes while this thread goes to sleep, and finds the interpreter's lock free.
        if outcome.rows or outcome.stored or outcome.refused:
            self._report(outcome)

    def _write(self, work: Work, outcome: Outcome) -> None:
        if work.saves:
            self._save(work.saves, outcome)
        if work.messages:
            self._publish(work.messages, outcome)
        if work.verdicts:
            self._settle(work.verdicts, work.rejected, outcome)
        wanted = self._wanted()
        if wanted and (self._is_due() or not self._drained):
            self._claim(wanted, outcome)

    def _save(self, saves: list[SaveItem], outcome: Outcome) -> None:
        if self._one_by_one:
            saves = [item for item in saves if self._is_storable(item)]
        write_results(self._cursor, saves)
        outcome.notices = collect_notices(self._cursor, saves)
        outcome.stored += [item[4] for item in saves if item[4]]

    def _is_storable(self, item: SaveItem) -> bool:
        try:
            write_results(self._cursor, [item])
            item[0].encode()
        except UNSTORABLE as error:
            logger.error("the result of task %r cannot be stored: %s", item[0], error)
            return False
        return True

    def _publish(self, messages: list[tuple[int, Message]], outcome: Outcome) -> None:
        declare = partial(self._queue_ids.declare, self._cursor)
        outcome.rings = True
        self._drained = False
        self._look_soon()
        if not self._one_by_one:
            rows = [tables.message_row(declare(message.routing_key), message) for _, message in messages]
            self._cursor.executemany(tables.INSERT_MESSAGE, rows)
            outcome.stored += [token for token, _ in messages]
            return
        for token, message in messages:
            try:
                self._cursor.execute(tables.INSERT_MESSAGE, tables.message_row(declare(message.routing_key), message))
                outcome.stored.append(token)
            except UNSTORABLE as error:
                outcome.refused.append(token)
                outcome.refusal = f"the message cannot be stored: {error}"

    def _settle(self, verdicts: list[tuple[int, int]], rejected: list[tuple[str, list[int]]], outcome: Outcome) -> None:
        cursor, me = self._cursor, self._me
        done = [tag for tag, verdict in verdicts if verdict == ACK]
        if done:
            tables.delete(cursor, me, done)
        if len(done) == len(verdicts):
            return
        for reason, tags in rejected:
            tables.bury(cursor, me, tags, reason)
        for verdict, uncounted in ((REQUEUE, 0), (RETURN, 1)):
            tags = [tag for tag, each in verdicts if each == verdict]
            if tags:
                tables.give_back(cursor, me, tags, uncounted)
                outcome.rings = True
                self._drained = False

    def _claim(self, wanted: int, outcome: Outcome) -> None:
        cursor = self._cursor
        if self._is_due():
            tables.make_due_ready(cursor, time.time())
            self._next_due = tables.next_due(cursor)
        room = self._max_bytes - self._claimed_bytes
        outcome.rows = tables.claim_fairly(cursor, self._me, self._queues, wanted, self._turns, room)
        is_full = sum(map(tables.size_of, outcome.rows)) >= room
        self._drained = len(outcome.rows) < wanted and not is_full

    def _something_to_claim(self) -> bool:
        """Return whether a claim would find anything: looking takes no lock, for which other workers may wait."""
        is_rung, self._is_rung = self._is_rung, False
        if not self._wanted():
            return False
        if is_rung and self._is_alone:
            return True
        self._next_due, has_ready = tables.look(self._cursor, self._queues)
        self._look_at = math.inf
        self._drained = not has_ready
        return has_ready or self._is_due()

    def _look_soon(self) -> None:
        """Look for delayed messages in a moment: not now, when something is on its way to be run."""
        if self._look_at == math.inf:
            self._look_at = time.monotonic() + LOOK_AFTER_S

    def _is_due(self) -> bool:
        return self._next_due is not None and self._next_due <= time.time()

    def _transaction(self, write: Callable[[], T]) -> T:
        """Write, commit and return what ``write`` returns; nothing of it remains when anything is raised."""
        cursor = self._cursor
        patiently(partial(cursor.execute, "BEGIN IMMEDIATE"), LOCK_WAIT_S)
        try:
            result = write()
            cursor.execute("COMMIT")
        except BaseException:
            self._queue_ids.forget()
            if self._connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise
        return result

    def _set_full_sync(self, wanted: bool) -> None:
        # A publish is confirmed when it is on the disk. A verdict that a power cut takes only runs a task again.
        wanted = wanted and self._location.synchronous == "FULL"
        if wanted != self._is_full_sync:
            self._cursor.execute(f"PRAGMA synchronous={'FULL' if wanted else 'NORMAL'}")
            self._is_full_sync = wanted

    # --- failures -----------------------------------------------------------------------------------------------------

    def _on_error(self, error: sqlite3.Error) -> None:
        """Keep all work for the next attempt; messages are refused once the publish time-out has passed."""
        text = database.explain(self._location.path, error)
        if database.is_damaged(error):
            raise SettingsError(text) from error
        now = time.monotonic()
        if not self._failing_since:
            self._failing_since = now
            logger.error("%s. The worker keeps its work and tries again", text)
        self._retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        if self._work.messages and now - self._failing_since >= self._publish_timeout_s:
            refused = [token for token, _ in self._work.messages]
            self._work.messages = []
            self._report(Outcome(refused=refused, refusal=text))

    # --- what the clock brings ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        """See that the file and our bell are still the ones we know, and which other workers have died."""
        if database.identity(self._location.path) != self._identity:
            raise ConnectionLost(f"{self._location.path} was removed or replaced while it was in use")
        if self._bell is not None:
            self._folder.restore(self._bell)
            self._look_after_others()

    def _look_after_others(self) -> None:
        """Give back what dead workers hold, and warn of one that has come under our name."""
        workers = tables.all_workers(self._cursor)
        mine = next((worker.name for worker in workers if worker.id == self._me), None)
        if mine is None:
            raise ConnectionLost(
                f"another worker took this one for dead and gave its messages back ({self._location.path})"
            )
        self._is_alone = len(workers) == 1
        dead = [worker for worker in workers if worker.id != self._me and self._is_dead(worker)]
        for worker in dead:
            count = self._transaction(partial(tables.remove_worker, self._cursor, worker.id))
            self._folder.unlink(worker.bell)
            level = logging.WARNING if count else logging.INFO
            logger.log(level, "worker %s (pid %s) has died; %s messages are given back", worker.name, worker.pid, count)
        namesakes = {each.id for each in workers if each.name == mine and each.id != self._me and each not in dead}
        if namesakes - self._namesakes:
            logger.warning(NAMESAKE, mine)
        self._namesakes = namesakes
        strays = tables.strays(self._cursor)
        for owner in strays:
            self._transaction(partial(tables.give_back_all, self._cursor, owner))
        if dead or strays:
            self._drained = False
            self._folder.ring_workers(besides=self._bell)

    def _is_dead(self, worker: WorkerInfo) -> bool:
        alive = self._folder.is_alive(worker.bell)
        if alive is None and worker.id not in self._missing:
            # Somebody may have removed a living worker's bell: it binds it again at its next check.
            self._missing.add(worker.id)
            return False
        if alive is not None:
            self._missing.discard(worker.id)
        return not alive

    def _upkeep(self) -> bool:
        """Remove what has expired or was left behind; return whether there may be more."""
        self._folder.sweep()
        older_than = None if self._expires_s is None else time.time() - self._expires_s
        return self._transaction(partial(sweep, self._cursor, self._folder, older_than))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Store what was handed over, give back the rest, and sign off."""
        self._queues = []
        self._take_inbox()
        deadline = time.monotonic() + LEAVE_S
        while True:
            try:
                if self._work:
                    self._turn()
                if self._me:
                    self._transaction(partial(tables.remove_worker, self._cursor, self._me))
                    self._folder.ring_workers(besides=self._bell)
                return
            except UNSTORABLE:
                if self._one_by_one:
                    raise
                self._one_by_one = True
            except sqlite3.Error as error:
                if time.monotonic() > deadline:
                    logger.error(
                        "%s. What this worker held is given back by another one",
                        database.explain(self._location.path, error),
                    )
                    return
                time.sleep(FIRST_PAUSE_S)

    def _close(self) -> None:
        self._folder.close()
        self._connection.close()

    def _refuse_questions(self) -> None:
        with contextlib.suppress(IndexError):  # both threads may be here
            while True:
                _, answer = self._questions.popleft()
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(ConnectionLost(f"{self._location.path} is closed"))


class Waker:
    """Wakes a thread that polls it."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Return what to poll for reading."""
        return self._fd

    def wake(self) -> None:
        """Make the next poll return, or the one that waits."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Let the next poll wait again; call it when a poll has returned."""
        os.eventfd_read(self._fd)
