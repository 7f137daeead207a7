"""A worker's side of a broker whose client blocks: the thread that takes its ``turns``, and the loop's half.

Under load a turn grows with what has gathered during the one before. What the event loop is to know goes there once per
turn. Knows no broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from fastq.brokers.fixed import FixedQueues
from fastq.brokers.turns import Outcome, Room, TurnFailed, Turns, Work, size_of
from fastq.errors import ConnectionLost, FastqError
from fastq.interfaces import SaveItem
from fastq.link import REJECT, BatchSource

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 5.0
LEAVE_S: Final = 3.0
LONGEST_S: Final = 3600.0  # poll takes no infinity


# --- the thread -------------------------------------------------------------------------------------------------------


class PullThread(threading.Thread):
    """Serves one consumer, which calls ``post``, ``allow``, ``ask`` and ``stop`` on its loop's thread.

    ``report`` is called after every turn that has something to tell, ``fail`` at most once; both on this thread.
    """

    def __init__(
        self,
        turns: Turns,
        publish_timeout_s: float,
        report: Callable[[Outcome], None],
        fail: Callable[[Exception], None],
    ) -> None:
        super().__init__(name=turns.thread_name, daemon=True)
        self._turns = turns
        self._publish_timeout_s = publish_timeout_s
        self._report = report
        self._fail = fail
        #: Done when the broker is open; raises SettingsError or ConnectionLost.
        self.opened: Future[None] = Future()
        #: Done when the thread has let go of everything.
        self.ended: Future[None] = Future()

        # Shared with the loop's thread: single references and deques, so the interpreter's lock is enough.
        self._inbox: deque[Work] = deque()
        self._questions: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._allowance = Allowance()
        self._asleep = False
        self._stopping = False

        # This thread's own.
        self._work = Work()
        self._look_at = 0.0
        self._had_room = False  # at the end of the last turn
        self._outage = Outage()

    # --- called on the loop's thread

    def post(self, work: Work) -> None:
        """Hand over a batch."""
        self._inbox.append(work)
        # The thread says that it goes to sleep before it looks into the inbox a last time: no batch is overlooked.
        if self._asleep:
            self._turns.wake()

    def allow(self, messages: int, size: float) -> None:
        """Set how many messages may be taken in all since the start, and up to how many bytes."""
        was_full = not self._allowance
        self._allowance.messages, self._allowance.size = messages, size
        if was_full and self._asleep:
            self._turns.wake()

    def ask(self, action: Callable[[], None]) -> Future[None]:
        """Have something done by this thread, between two turns."""
        answer: Future[None] = Future()
        self._questions.append((action, answer))
        self._turns.wake()
        if self.ended.done():
            self._refuse_questions()
        return answer

    def stop(self) -> None:
        """Store what has been handed over, give back what is not settled, and end."""
        self._stopping = True
        self._turns.wake()

    # --- to be asked for

    def enter(self, name: str, queues: Sequence[str]) -> None:
        """Take messages from these queues from now on."""
        self._turns.enter(name, queues)
        self._allowance.takes = True

    def quiet(self) -> None:
        """Take nothing more."""
        self._allowance.takes = False

    # --- the thread

    def run(self) -> None:
        """Open the broker; then sleep and work until stopped."""
        # From here on neither can be cancelled by somebody who has stopped waiting for it.
        is_awaited = self.opened.set_running_or_notify_cancel()
        self.ended.set_running_or_notify_cancel()
        if is_awaited:
            try:
                self._turns.open()
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
                if not self._outage or time.monotonic() >= self._outage.until:
                    self._turn()
            self._leave()
        except FastqError as error:
            self._fail(error)
        except Exception as error:
            self._turns.logger.exception("the thread for %s failed", self._turns.place)
            self._fail(ConnectionLost(f"{self._turns.place}: {error!r}"))
        finally:
            self._turns.close()

    def _sleep(self) -> None:
        """Return when there is something to do."""
        self._asleep = True
        try:
            has_room = bool(self._allowance)
            # Also when there is enough to do: what wakes it may mean more.
            self._turns.wait(min(self._idle_s(has_room), LONGEST_S), has_room and not self._outage)
        finally:
            self._asleep = False

    def _idle_s(self, has_room: bool) -> float:
        """Return how long nothing is to be done, as far as is known now."""
        if self._stopping or self._questions:
            return 0.0
        if self._outage:
            return max(0.0, self._outage.until - time.monotonic())
        if self._inbox or self._work or (has_room and not self._had_room):
            return 0.0
        return max(0.0, self._look_at - time.monotonic())

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

    def _turn(self) -> None:
        """Do what is to be done, and see to it that a failure is tried again later with nothing lost."""
        room = self._allowance.room()
        try:
            outcome = self._turns.turn(self._work, room)
        except TurnFailed as error:
            self._on_failure(error)
            return
        self._work = Work()
        if outcome.rows:
            left = room.after(outcome.rows)
            self._allowance.take(room.messages - left.messages, room.size - left.size)
            room = left
        self._had_room, self._look_at = bool(room), time.monotonic() + outcome.next_look_s
        if self._outage:
            self._turns.logger.info("%s can be used again", self._turns.place)
            self._outage = Outage()
        # Last: the loop wakes while this thread goes to sleep, and finds the interpreter's lock free.
        self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.rows or outcome.stored or outcome.refused:
            self._report(outcome)

    def _on_failure(self, error: TurnFailed) -> None:
        """Keep all work for the next attempt; messages are refused once the publish time-out has passed."""
        if not self._outage:
            self._turns.logger.error("%s. The worker keeps its work and tries again", error)
        now = time.monotonic()
        self._outage.go_on(now)
        if self._work.messages and now - self._outage.since >= self._publish_timeout_s:
            refused = [token for token, _ in self._work.messages]
            self._work.messages = []
            self._report(Outcome(refused=refused, refusal=str(error)))

    def _leave(self) -> None:
        """Do the last turn."""
        self._take_inbox()
        deadline = time.monotonic() + LEAVE_S
        while True:
            try:
                self._tell(self._turns.leave(self._work))
                return
            except TurnFailed as error:
                if time.monotonic() > deadline:
                    self._turns.logger.error("%s. What this worker held is given back by another one", error)
                    return
                time.sleep(FIRST_PAUSE_S)

    def _refuse_questions(self) -> None:
        with contextlib.suppress(IndexError):  # both threads may be here
            while True:
                _, answer = self._questions.popleft()
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(ConnectionLost(f"{self._turns.place} is closed"))


@dataclass(slots=True)
class Allowance:
    """How much may be taken and how much was, since the start: so what is on its way counts on both sides."""

    messages: int = 0
    size: float = 0.0
    taken: int = 0
    taken_size: float = 0.0
    takes: bool = False

    def __bool__(self) -> bool:
        return self.takes and self.messages > self.taken and self.size > self.taken_size

    def room(self) -> Room:
        """Return how much may be taken now."""
        return Room(self.messages - self.taken, self.size - self.taken_size) if self.takes else Room()

    def take(self, messages: int, size: float) -> None:
        """Count what was taken."""
        self.taken += messages
        self.taken_size += size


@dataclass(slots=True)
class Outage:
    """Turns fail: since when, and when to try again (monotonic). False while they do not."""

    since: float = 0.0
    until: float = 0.0
    pause_s: float = FIRST_PAUSE_S

    def __bool__(self) -> bool:
        return self.since > 0

    def go_on(self, now: float) -> None:
        """Another turn has failed."""
        self.since = self.since or now
        self.until = now + self.pause_s
        self.pause_s = min(2 * self.pause_s, LAST_PAUSE_S)


# --- on the loop ------------------------------------------------------------------------------------------------------


class PullingSource(BatchSource):
    """The hot half: batches from the core to the thread and back."""

    def __init__(self, thread: PullThread) -> None:
        super().__init__()
        self._thread = thread
        self._taken = self._taken_bytes = 0

    def pull(self, n: int) -> None:
        """Allow ``n`` more deliveries, those included that are on their way here."""
        self._thread.allow(self._taken + n, self._taken_bytes + self.max_held_bytes - self.held_bytes)

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Tell the verdicts on deliveries."""
        rejected = self.take_reasons([tag for tag, verdict in batch if verdict == REJECT])
        self._thread.post(Work(verdicts=batch, rejected=list(rejected.items())))

    def save(self, batch: list[SaveItem]) -> None:
        """Store results."""
        self._thread.post(Work(saves=batch))

    def publish(self, batch: list[tuple[int, Message]]) -> None:
        """Store messages."""
        self._thread.post(Work(messages=batch))

    def take(self, outcome: Outcome) -> None:
        """Hand what a turn has brought to the core."""
        if self.dead:
            return
        if outcome.stored:
            self.published(outcome.stored)
        if outcome.refused:
            self.publish_failed(outcome.refused, outcome.refusal)
        if outcome.rows:
            self._taken += len(outcome.rows)
            self._taken_bytes += sum(map(size_of, outcome.rows))
            self.receive(outcome.rows)


class PullingConsumer(FixedQueues):
    """The cold half. One that does not ``consume`` still publishes, and stores results where ``saves_results``."""

    source: PullingSource
    outlet: PullingSource
    lost: asyncio.Future[Exception]
    source_class = PullingSource
    saves_results = False
    replies = None

    def __init__(self, turns: Turns, settings: Settings) -> None:
        self._turns = turns
        self._publish_timeout_s = settings.fastq_publish_timeout
        #: Under this name the worker is listed; set it before ``consume``.
        self.name = f"fastq@{socket.gethostname()}"
        self._thread: PullThread

    async def open(self) -> None:
        """Start the thread and have it connect."""
        loop = asyncio.get_running_loop()
        self.lost = loop.create_future()
        self._thread = PullThread(
            self._turns, self._publish_timeout_s,
            report=lambda outcome: _tell(loop, self.source.take, outcome),
            fail=lambda error: _tell(loop, _set, self.lost, error),
        )  # fmt: skip
        self.source = self.outlet = self.source_class(self._thread)
        self._thread.start()
        try:
            await asyncio.wrap_future(self._thread.opened)
        except BaseException:
            self._thread.stop()
            raise

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Receive from the queues, which are created when missing."""
        self.source.window = prefetch
        await asyncio.wrap_future(self._thread.ask(partial(self._thread.enter, self.name, tuple(queues))))
        self.source.pull(prefetch)

    async def set_prefetch(self, prefetch: int) -> None:
        """Change how many unsettled messages may be here; the core asks for them by itself."""
        self.source.window = prefetch

    async def cancel(self) -> None:
        """Stop receiving; what was taken has been received when this returns."""
        await asyncio.wrap_future(self._thread.ask(self._thread.quiet))

    async def close(self) -> None:
        """Settle what was handed over, give back the rest, let go of the connection."""
        self._thread.stop()
        await asyncio.wrap_future(self._thread.ended)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
        loop.call_soon_threadsafe(callback, *args)


def _set(future: asyncio.Future[Exception], error: Exception) -> None:
    if not future.done():
        future.set_result(error)
