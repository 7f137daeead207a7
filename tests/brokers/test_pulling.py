"""``brokers.pulling`` under turns that a test makes fail: what is repeated, what is given up, how it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from fastq.brokers import pulling
from fastq.brokers.pulling import PullThread
from fastq.brokers.turns import Outcome, Room, Row, TurnFailed, Turns, Work
from fastq.errors import ConnectionLost, SettingsError
from fastq.wire.message import Message
from tests.support.consumer_in_thread import TIMEOUT_S, within

MESSAGE = Message("", "queue", b"", b"")
FAILED = TurnFailed("nowhere is full")


class Scripted(Turns):
    """Raises ``error`` while there is one; brings a row, with ``size`` bytes, as long as there is room."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        self.error: Exception | None = None
        self.refuses_to_open: Exception | None = None
        self.has_messages = False
        self.size = 1
        self.calls: list[str] = []
        self.done = Work()
        self.closed = threading.Event()

    def open(self) -> None:
        if self.refuses_to_open:
            raise self.refuses_to_open

    def turn(self, work: Work, room: Room) -> Outcome:
        outcome = self._do("turn", work)
        while self.has_messages and room:
            outcome.rows.append((len(self.calls), b"queue", b"", b"x" * self.size, 1))
            room = room.after(outcome.rows[-1:])
        return outcome

    def leave(self, work: Work) -> Outcome:
        return self._do("leave", work)

    def close(self) -> None:
        self.closed.set()

    def _do(self, name: str, work: Work) -> Outcome:
        self.calls.append(name)
        if self.error:
            raise self.error
        self.done.add(work)
        return Outcome(stored=work.tokens(), next_look_s=3600.0)


class Heard:
    """What a thread has told its loop."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.refused: list[tuple[int, str]] = []
        self.rows: list[Row] = []
        self.errors: list[Exception] = []

    def report(self, outcome: Outcome) -> None:
        self.rows += outcome.rows
        self.stored += outcome.stored
        self.refused += [(token, outcome.refusal) for token in outcome.refused]


@pytest.fixture
def turns() -> Scripted:
    return Scripted()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def start(turns: Scripted, heard: Heard) -> Iterator[Callable[[], PullThread]]:
    started: list[PullThread] = []

    def start() -> PullThread:
        started.append(PullThread(turns, 0.2, heard.report, heard.errors.append))
        started[-1].start()
        return started[-1]

    yield start
    for thread in started:
        thread.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_a_turn_that_fails_is_repeated_with_all_that_has_come_meanwhile(
    turns: Scripted, heard: Heard, start: Callable[[], PullThread], caplog: pytest.LogCaptureFixture
) -> None:
    turns.error = FAILED
    thread = start()
    with caplog.at_level(logging.INFO, "fastq.pulling"):
        thread.post(Work(saves=[("id", "SUCCESS", b"{}", "", 1)]))
        assert within(TIMEOUT_S, lambda: turns.calls.count("turn") > 1)
        thread.post(Work(verdicts=[(7, 0)]))
        turns.error = None
        assert within(TIMEOUT_S, lambda: turns.done.verdicts == [(7, 0)])
    assert (turns.done.saves[0][0], heard.stored, heard.errors) == ("id", [1], [])
    assert within(TIMEOUT_S, lambda: len(caplog.messages) == 2)
    assert caplog.messages == [
        "nowhere is full. The worker keeps its work and tries again",
        "nowhere can be used again",
    ]


def test_messages_that_cannot_be_stored_in_time_are_refused_and_results_kept(
    turns: Scripted, heard: Heard, start: Callable[[], PullThread]
) -> None:
    turns.error = FAILED
    start().post(Work(saves=[("id", "SUCCESS", b"{}", "", 1)], messages=[(2, MESSAGE)]))
    assert within(TIMEOUT_S, lambda: heard.refused == [(2, "nowhere is full")])
    assert heard.stored == []
    turns.error = None
    assert within(TIMEOUT_S, lambda: heard.stored == [1])
    assert turns.done.messages == []


@pytest.mark.parametrize("error", [ConnectionLost("gone"), SettingsError("no such place"), ZeroDivisionError("oh")])
def test_any_other_error_ends_the_connection(
    error: Exception, turns: Scripted, heard: Heard, start: Callable[[], PullThread]
) -> None:
    turns.error = error
    thread = start()
    thread.ended.result(TIMEOUT_S)
    assert turns.closed.is_set()
    (told,) = heard.errors
    assert told is error or (isinstance(told, ConnectionLost) and "nowhere: ZeroDivisionError('oh')" in str(told))
    with pytest.raises(ConnectionLost, match="nowhere is closed"):
        thread.ask(thread.quiet).result(TIMEOUT_S)


def test_what_does_not_open_is_not_served(turns: Scripted, heard: Heard, start: Callable[[], PullThread]) -> None:
    turns.refuses_to_open = SettingsError("no such place")
    thread = start()
    with pytest.raises(SettingsError, match="no such place"):
        thread.opened.result(TIMEOUT_S)
    thread.ended.result(TIMEOUT_S)
    assert (turns.calls, heard.errors) == ([], [])


def test_the_last_turn_is_repeated_too_but_not_for_ever(
    turns: Scripted, heard: Heard, start: Callable[[], PullThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "LEAVE_S", 0.3)
    thread = start()
    thread.opened.result(TIMEOUT_S)
    turns.error = FAILED
    thread.post(Work(messages=[(1, MESSAGE)]))
    thread.stop()
    thread.ended.result(TIMEOUT_S)
    assert turns.calls.count("leave") > 2
    assert (turns.closed.is_set(), heard.stored, heard.errors) == (True, [], [])


def test_what_is_handed_over_last_is_stored_on_leaving(
    turns: Scripted, heard: Heard, start: Callable[[], PullThread]
) -> None:
    thread = start()
    thread.opened.result(TIMEOUT_S)
    thread.post(Work(messages=[(1, MESSAGE)]))
    thread.stop()
    thread.ended.result(TIMEOUT_S)
    assert (heard.stored, turns.calls[-1]) == ([1], "leave")


def test_it_sleeps_until_something_is_handed_over(turns: Scripted, start: Callable[[], PullThread]) -> None:
    thread = start()
    assert within(TIMEOUT_S, lambda: turns.calls == ["turn"])
    for count in range(2, 5):
        thread.post(Work(verdicts=[(count, 0)]))
        assert within(1.0, lambda count=count: len(turns.done.verdicts) == count - 1)  # type: ignore[misc]
    assert len(turns.calls) <= 8  # each once more at most: woken while it was awake


def test_no_more_is_taken_than_there_is_room_for(
    turns: Scripted, heard: Heard, start: Callable[[], PullThread]
) -> None:
    turns.has_messages = True
    thread = start()
    thread.allow(3, 1000)
    thread.ask(lambda: None).result(TIMEOUT_S)
    assert heard.rows == []
    thread.ask(lambda: thread.enter("name", ["queue"])).result(TIMEOUT_S)
    assert within(TIMEOUT_S, lambda: len(heard.rows) == 3)
    turns.size = 600
    thread.allow(13, 1000)
    assert within(TIMEOUT_S, lambda: len(heard.rows) == 5)  # the second goes beyond
    thread.ask(thread.quiet).result(TIMEOUT_S)
    thread.allow(100, 100_000)
    thread.ask(lambda: None).result(TIMEOUT_S)
    assert len(heard.rows) == 5
