"""Waiting for results, once for all stores: one of those who wait leads, the others follow, a thread serves watchers.

No protocol: what is asked and heard is up to a store's ``Place``. Who leads opens the place, hears it, and looks for
everybody. There is no thread except one while somebody watches.
"""

from __future__ import annotations

import atexit
import copy
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from fastq.errors import ConnectionLost, FastqError, ResultTimeout
from fastq.net import forks
from fastq.results.agenda import Agenda, Outcome, Waiter
from fastq.results.leading import Lead, Signal
from fastq.results.patience import Patience
from fastq.results.place import Place
from fastq.results.watching import Watchers
from fastq.states import READY_STATES

if TYPE_CHECKING:
    from fastq.interfaces import Meta, Unwatch

T = TypeVar("T")

#: Chosen: the place is opened once in so long, should the other side take connections and end them.
REOPEN_S: Final = 1.0
LOOK_SLICE: Final = 500
#: Chosen: where states are looked for, who observes is looked for so often.
OBSERVE_S: Final = 0.1
FOREVER_S: Final = 1e9


class Waiting(Generic[T]):
    """Everybody in this process who waits for results of one place. Thread-safe; a forked child begins anew."""

    def __init__(self, place: Place[T]) -> None:
        self._place = place
        # What a place keeps it tells of when asked to. What it does not keep comes unasked, and is looked for here.
        self._listens_first = place.hears_all and place.keeps
        self._start_over()
        forks.register(self)
        _everywhere.add(self)

    def _start_over(self) -> None:
        # Taken in this order. The first is held while the place is talked to, never while anybody waits.
        self._io = threading.Lock()
        self._lock = threading.Lock()
        self._lead = Lead()
        self._waiting: dict[str, list[Waiter]] = {}
        # Whom to look for: by the clock, and at once.
        self._agenda = Agenda()
        self._unsure: set[str] = set()
        # What the place was asked to tell of, and what of it nobody waits for any more.
        self._listened: set[str] = set()
        self._stale: set[str] = set()
        # The place.
        self._is_open = False
        self._is_behind = False  # something may have come that no poll tells of
        self._patience = Patience(self._place.patience_s)
        self._closes = 0
        self._opened_at = self._open_at = -math.inf
        self._watchers = Watchers(self._lead, self._place.thread_name, self._place.logger, self._serve_watchers)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta.

        Raises ResultTimeout, DecodeError, ConnectionLost when the place is away for longer than its patience.
        """
        until = time.monotonic() + (FOREVER_S if timeout_s is None else timeout_s)
        waiter = Waiter(task_id, Signal(), self._place.first_look_s)
        is_done = lambda: waiter.outcome is not None  # noqa: E731  # twice below
        try:
            # In this order: what is stored before the look is seen by it, what comes later is heard.
            if not self._enter(waiter) and self._listens_first:
                self._listen([task_id])
            self._look([task_id])
            while waiter.outcome is None:
                now = time.monotonic()
                if now >= until:
                    raise ResultTimeout(f"task {task_id} has not ended within {timeout_s} s")
                if waiter.look_at <= now and self._lead.is_taken:
                    self._look_as_planned(now)
                else:
                    if not self._is_open:
                        self._lead.tell_leader()
                    lead = partial(self._serve_all, until, is_done)
                    self._lead.lead_or_follow(waiter.signal, min(until, waiter.look_at), is_done, lead)
        except BaseException as error:
            self._make_good(error)
            raise
        finally:
            self._remove(waiter)
        if isinstance(waiter.outcome, FastqError):
            raise waiter.outcome
        return waiter.outcome

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from the thread, when a final state is known or cannot come; returns what ends the watch.

        Raises ConnectionLost if the place was never there.
        """
        return self._serve(Waiter(task_id, self._watchers.signal, self._place.first_look_s, callback))

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Do as ``watch`` does for each state, the one that is known already included, the last one last."""
        return self._serve(Waiter(task_id, self._watchers.signal, self._place.first_look_s, callback, observes=True))

    def _serve(self, waiter: Waiter) -> Unwatch:
        """Have the thread wait for somebody."""
        watchers, task_id = self._watchers, waiter.task_id
        watchers.add(waiter)
        try:
            self._enter(waiter)
            if not (self._place.keeps and self._patience.was_there):
                self._look([task_id])
            is_told = self._listen([task_id]) if self._listens_first else self._is_open and not self._place.keeps
        except BaseException as error:
            self._unwatch(waiter)
            self._make_good(error)
            raise
        watchers.start()
        if not is_told:
            self._doubt([task_id])
            watchers.tell()
        return partial(self._unwatch, waiter)

    def _unwatch(self, waiter: Waiter) -> None:
        """Make no callback and keep nothing of it. What the place knows of it the thread takes back: it may block."""
        waiter.callback = None
        if waiter.outcome is None and self._leave(waiter):
            self._watchers.discard(waiter)
            if self._stale and not self._place.hears_all:
                self._watchers.tell()

    @property
    def was_there(self) -> bool:
        """Whether the place was reached."""
        return self._patience.was_there

    def deliver(self, states: Mapping[str, T]) -> None:
        """Give states to those who wait for them: final ones, and others to those who observe."""
        for task_id, state in states.items():
            if task_id in self._waiting:
                self._end(task_id, partial(self._read, state))

    def refresh(self, until: float) -> None:
        """Have the place open and take in what has come, unless a thread leads that does so anyway.

        Raises FastqError when it cannot be opened by then (monotonic).
        """
        is_done = False

        def catch_up() -> None:
            nonlocal is_done
            if self._is_open:
                self._take()
            while not self._is_open and (now := time.monotonic()) < until:
                if self._open_at <= now:
                    self._open(until)
                else:
                    self._turn(min(until, self._open_at), lambda: self._is_open)
            is_done = self._is_open

        if not self._is_open:
            self._open_at = -math.inf
            self._lead.tell_leader()
        signal = Signal()
        try:
            while not is_done and not (self._is_open and self._lead.is_taken):
                if time.monotonic() >= until:
                    why = self._patience.failure or "no attempt has ended yet"
                    raise ConnectionLost(f"the result store could not be reached in time: {why}")
                self._lead.lead_or_follow(signal, until, lambda: is_done, catch_up)
        except BaseException as error:
            self._make_good(error)
            raise

    def close(self) -> None:
        """Close the place: who waits or watches is told ConnectionLost. A later call opens it again."""
        self._closes += 1
        self._fail_all(ConnectionLost("the result store was closed"))
        self._shut()
        self._watchers.stop()

    def after_fork(self) -> None:
        """In a forked child: nobody waits here, and the place is the parent's."""
        self._start_over()
        self._place.forget()

    # --- who waits

    def _enter(self, waiter: Waiter) -> bool:
        """Start to wait; return whether the place was asked already to tell of this task."""
        with self._lock:
            self._waiting.setdefault(waiter.task_id, []).append(waiter)
            self._stale.discard(waiter.task_id)
            if not self._place.hears_all:
                self._agenda.plan(waiter, time.monotonic() + waiter.pause_s)
            return waiter.task_id in self._listened

    def _leave(self, waiter: Waiter) -> bool:
        """Wait no longer; return whether the waiter was still waiting."""
        with self._lock:
            waiter.look_at = math.inf
            waiters = self._waiting.get(waiter.task_id, [])
            if waiter not in waiters:
                return False
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[waiter.task_id]
                if waiter.task_id in self._listened:
                    self._stale.add(waiter.task_id)
            return True

    def _remove(self, waiter: Waiter) -> None:
        if waiter.outcome is None and self._leave(waiter) and not self._place.hears_all:
            self._drop_stale()

    def _end(self, task_id: str, make: Callable[[], Outcome]) -> None:
        """Give those who wait for a task an outcome each, as values and errors are theirs to change."""
        first = make()
        if not isinstance(first, FastqError) and first["status"] not in READY_STATES:
            self._pass_on(task_id, first, make)
            return
        outcome: Outcome | None = first
        with self._lock:
            waiters = self._waiting.get(task_id, ())
            for waiter in waiters:
                waiter.look_at = math.inf
                waiter.outcome, outcome = waiter.outcome or outcome or make(), None
                if waiter.signal is self._watchers.signal:
                    self._watchers.end(waiter)
            if not self._place.hears_all:
                self._listened.discard(task_id)  # it was asked to tell once
            elif task_id in self._listened:
                self._stale.add(task_id)
            # Last: until then whoever is interrupted here may be made good for by the next one.
            self._waiting.pop(task_id, None)
        for waiter in waiters:
            self._lead.tell(waiter.signal)

    def _pass_on(self, task_id: str, meta: Meta, make: Callable[[], Outcome]) -> None:
        """Give those who observe a state that is not the last one, a meta each; ``meta`` stays as it is."""
        with self._lock:
            told = [each for each in self._waiting.get(task_id, ()) if each.observes and each.seen != meta]
            for waiter in told:
                waiter.seen = meta
                self._watchers.pass_on(waiter, cast("Meta", make()))
        for waiter in told[:1]:
            self._lead.tell(waiter.signal)

    def _fail_all(self, error: FastqError) -> None:
        for task_id in list(self._waiting):
            self._end(task_id, partial(copy.copy, error))

    def _read(self, state: T) -> Outcome:
        """Return a state's meta, or why it cannot be read: who waits shall hear of that."""
        try:
            return self._place.decode(state)
        except FastqError as error:
            return error

    def _serve_watchers(self, until: float) -> None:
        """Wait for all watched results, on the watchers' thread."""
        now, is_needed = time.monotonic(), self._watchers.is_needed
        if not self._place.hears_all:
            self._drop_stale()
        if self._unsure:
            self._look_for_unsure()
        if self._agenda.next_at <= now and self._lead.is_taken:
            self._look_as_planned(now)
        follow_until = min(until, self._agenda.next_at)
        lead = partial(self._serve_all, until, is_needed)
        self._lead.lead_or_follow(self._watchers.signal, follow_until, is_needed, lead)

    # --- with the lead

    def _serve_all(self, until: float, is_done: Callable[[], bool]) -> None:
        while not is_done() and time.monotonic() < until:
            self._turn(until, is_done)

    def _turn(self, until: float, is_done: Callable[[], bool]) -> None:
        """Do one thing that is to be done for all, or sleep until there is one."""
        if self._unsure:
            self._look_for_unsure()
        elif self._has_to_open():
            self._open(until)
        elif self._agenda.next_at <= (now := time.monotonic()):
            self._look_as_planned(now)
        elif (self._is_behind and self._is_open) or self._sleep(until, is_done):
            self._take()

    def _has_to_open(self) -> bool:
        # A place that nobody waits for stays closed; whoever comes tells the leader.
        return not self._is_open and bool(self._waiting) and self._open_at <= time.monotonic()

    def _sleep(self, until: float, is_done: Callable[[], bool]) -> bool:
        """Return whether something has come that can be taken, at the latest at ``until``."""
        descriptor, wake_at = -1, self._open_at if self._waiting else math.inf
        try:
            with self._io:
                if self._is_open:
                    wake_at, descriptor = self._place.check(), self._place.fileno()
        except FastqError as error:
            self._on_lost(error)
            return False
        wake_at = min(until, wake_at, self._agenda.next_at)
        return self._lead.sleep(descriptor, wake_at, lambda: is_done() or bool(self._unsure) or self._has_to_open())

    def _take(self) -> None:
        """Take in what has come, for all."""
        self._is_behind = True
        try:
            with self._io:
                heard = self._place.take() if self._is_open else []
            for task_id, state in heard:
                if task_id is None:
                    self._doubt(list(self._waiting))
                elif task_id not in self._waiting:
                    continue
                elif state is None:
                    self._doubt([task_id])
                else:
                    self._end(task_id, partial(self._read, state))
        except FastqError as error:
            self._on_lost(error)
        self._is_behind = False

    def _open(self, until: float) -> None:
        """Have the place open, and be told by it of all that somebody waits for."""
        closes, place = self._closes, self._place
        try:
            lost = place.open(until)
        except FastqError as error:
            try:
                self._open_at = self._patience.endure(error)
            except FastqError as final:
                if not place.keeps:
                    text = f"{final}; results that were due are lost" if self._patience.was_there else str(final)
                    self._fail_all(ConnectionLost(text))
                raise
            return
        try:
            with self._lock:
                self._is_open = self._is_behind = True
                self._opened_at = self._open_at = time.monotonic()
                self._listened.clear()
                self._stale.clear()
            self._patience.renew()
            if closes != self._closes:
                self._shut()
                return
            if lost is not None:
                self._fail_all(lost)
            self._listen_for_all()
        except BaseException:
            self._shut()  # interrupted: nobody knows what is listened for
            raise
        self._lead.tell_followers()  # some wait for this alone

    def _listen_for_all(self) -> None:
        place = self._place
        if place.hears_all:
            if place.keeps:
                self._listen(list(self._waiting))
            return
        with self._lock:
            # Those who have been looked for by the clock were to be listened for then.
            late = [
                task_id
                for task_id, waiters in self._waiting.items()
                if any(waiter.pause_s > place.first_look_s for waiter in waiters)
            ]
        if late:
            self._listen(late)
            self._doubt(late)

    # --- looking: anybody

    def _doubt(self, task_ids: Iterable[str]) -> None:
        """Look for tasks as soon as somebody leads."""
        with self._lock:
            self._unsure.update(task_ids)

    def _make_good(self, error: BaseException) -> None:
        """See that nobody waits in vain for what somebody had in hand who was interrupted."""
        if isinstance(error, FastqError):
            return
        now = time.monotonic()
        with self._lock:
            self._unsure.update(self._waiting)
            for waiters in self._waiting.values() if not self._place.hears_all else ():
                for waiter in waiters:
                    waiter.pause_s = self._place.first_look_s  # as if new: it may not be listened for
                    self._agenda.plan(waiter, now + waiter.pause_s)
        self._lead.tell_leader()
        self._lead.tell_followers()

    def _look_for_unsure(self) -> None:
        with self._lock:
            task_ids = [each for each in self._unsure if each in self._waiting]
            self._unsure.clear()
        self._look(task_ids)

    def _look_as_planned(self, now: float) -> None:
        """Look for all that are due by the clock."""
        place = self._place
        with self._lock:
            due = self._agenda.take_due(now)
            for waiter in due if not place.hears_all else ():
                last_s = OBSERVE_S if waiter.observes else place.last_look_s
                waiter.pause_s = min(waiter.pause_s * place.look_growth, last_s)
                self._agenda.plan(waiter, now + waiter.pause_s)
        task_ids = list({waiter.task_id: None for waiter in due})
        if task_ids and not place.hears_all:
            self._listen(task_ids)
        self._look(task_ids)

    def _look(self, task_ids: Sequence[str]) -> None:
        """Give what is known of tasks to those who wait for them. Raises ConnectionLost when patience is at its end."""
        for start in range(0, len(task_ids), LOOK_SLICE):
            part = task_ids[start : start + LOOK_SLICE]
            try:
                found = self._place.look(part)
            except ConnectionLost as error:
                self._look_later(task_ids[start:], self._patience.endure(error))
                return
            except FastqError as error:
                if len(part) == 1:
                    self._end(part[0], partial(copy.copy, error))
                for task_id in part if len(part) > 1 else ():
                    self._look([task_id])  # it is the fault of one of them
            else:
                if self._place.keeps:
                    self._patience.renew()
                self.deliver(found)

    def _look_later(self, task_ids: Sequence[str], when: float) -> None:
        with self._lock:
            for task_id in task_ids:
                for waiter in self._waiting.get(task_id, ()):
                    self._agenda.plan(waiter, when)

    # --- the place

    def _listen(self, task_ids: Sequence[str]) -> bool:
        """Ask the place to tell of tasks; return False if it is not open: who opens it does so."""
        try:
            with self._io:
                if not self._is_open:
                    return False
                with self._lock:
                    fresh = [each for each in task_ids if self._place.hears_all or each not in self._listened]
                    dropped, self._stale = self._stale, set()
                    self._listened.difference_update(dropped)
                self._place.listen(fresh, dropped)
                self._is_behind = self._listens_first  # the answer comes at once: worth a look before a poll
                with self._lock:
                    self._listened.update(fresh)
                    self._stale.update(each for each in fresh if each not in self._waiting)
        except FastqError as error:
            self._on_lost(error)
            return False
        return True

    def _drop_stale(self) -> None:
        """Have the place tell no more of what nobody waits for."""
        if self._stale:
            self._listen(())

    def _on_lost(self, error: FastqError) -> None:
        """Close the place: whoever leads opens it again, soon. Raises what another connection would not mend."""
        self._shut()
        self._open_at = self._opened_at + REOPEN_S
        if not isinstance(error, ConnectionLost) and self._place.keeps:
            raise error
        self._place.logger.debug("results are awaited on a new connection: %s", error)

    def _shut(self) -> None:
        with self._io:
            if self._is_open:
                self._is_open = False
                self._place.close()


_everywhere: weakref.WeakSet[Waiting[Any]] = weakref.WeakSet()


def _close_all() -> None:
    """At exit: without a goodbye RabbitMQ logs an error for each connection."""
    for waiting in list(_everywhere):
        waiting.close()


atexit.register(_close_all)
