"""Waiting by ``fastq.results.waiting``: for a place that can only be looked into, and one that tells and loses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastq.errors import ConnectionLost, DecodeError, FastqError, ResultTimeout, SettingsError
from fastq.results import watching
from fastq.results.place import Heard, Place
from fastq.results.waiting import Waiting
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance import meta_of
from tests.support.conformance.stores import WaitingConformance
from tests.support.consumer_in_thread import TIMEOUT_S, within
from tests.toys.folder_store import FolderStore


@pytest.fixture
def settings() -> Settings:
    settings = Settings({})
    settings.freeze()
    return settings


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "results").mkdir()
    return f"tests.toys.folder_store:STORE://{tmp_path}/results"


class TestFolder(WaitingConformance):
    """A store of which only ``look`` was written."""


@pytest.fixture
def store(url: str, settings: Settings) -> Any:
    store = FolderStore(url, settings)
    yield store
    store.close()


# --- a place that is looked into


class Counting(Place[bytes]):
    """Keeps results here, counts looks, and is away when told."""

    patience_s = 1.0

    def __init__(self) -> None:
        self.states: dict[str, bytes] = {}
        self.looks: list[tuple[float, list[str]]] = []
        self.error: FastqError | None = None

    def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
        self.looks.append((time.monotonic(), list(task_ids)))
        if self.error is not None:
            raise self.error
        return {each: self.states[each] for each in task_ids if each in self.states}

    def store(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self.states[task_id] = meta_of(task_id)


def in_threads(work: Any, arguments: Sequence[Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in arguments]
    for thread in threads:
        thread.start()
    return threads


def test_looks_become_rarer_while_one_waits() -> None:
    place = Counting()
    with pytest.raises(ResultTimeout):
        Waiting(place).wait("x", 2.5)
    times = [when for when, _ in place.looks]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses[0] < 0.2
    assert max(pauses) < 1.5
    assert pauses[-1] > 0.3
    assert 8 <= len(times) <= 16


def test_those_who_wait_are_looked_for_together() -> None:
    place, ids = Counting(), [new_id() for _ in range(20)]
    waits = Waiting(place)
    threads = in_threads(lambda each: waits.wait(each, TIMEOUT_S), ids)
    assert within(TIMEOUT_S, lambda: any(len(task_ids) == len(ids) for _, task_ids in place.looks))
    place.store(*ids)
    for thread in threads:
        thread.join(3.0)
        assert not thread.is_alive()


def test_a_place_that_was_never_there_is_an_error_at_once() -> None:
    place = Counting()
    place.error = ConnectionLost("refused")
    waits = Waiting(place)
    with pytest.raises(ConnectionLost, match="refused"):
        waits.wait("x", None)
    with pytest.raises(ConnectionLost, match="refused"):
        waits.watch("x", print)
    assert len(place.looks) == 2


def test_a_place_that_goes_away_is_waited_for_while_patience_lasts() -> None:
    place, found, errors = Counting(), [], []
    waits = Waiting(place)

    def wait(task_id: str) -> None:
        try:
            found.append(waits.wait(task_id, TIMEOUT_S)["task_id"])
        except ConnectionLost as error:
            errors.append(error)

    threads = in_threads(wait, ["a", "b"])
    assert within(TIMEOUT_S, lambda: len(place.looks) > 3)
    place.error = ConnectionLost("gone")
    time.sleep(0.3)
    place.error = None
    place.store("a")
    assert within(TIMEOUT_S, lambda: found == ["a"])
    place.error = ConnectionLost("gone for good")
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [str(error) for error in errors] == ["gone for good"]


def test_one_task_that_cannot_be_looked_for_does_not_harm_the_others() -> None:
    class Refusing(Counting):
        def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
            if "bad" in task_ids and len(self.looks) > 3:
                raise SettingsError("no such place for 'bad'")
            return super().look(task_ids)

    place, ended = Refusing(), dict[str, object]()
    waits = Waiting(place)

    def wait(task_id: str) -> None:
        try:
            ended[task_id] = waits.wait(task_id, TIMEOUT_S)["status"]
        except FastqError as error:
            ended[task_id] = error

    threads = in_threads(wait, ["good", "bad"])
    assert within(TIMEOUT_S, lambda: "bad" in ended)
    place.store("good")
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert ended["good"] == "SUCCESS"
    assert isinstance(ended["bad"], SettingsError)


def test_what_cannot_be_read_is_told_to_who_waits_and_watches() -> None:
    place, seen = Counting(), []
    place.states["x"] = b"nonsense"
    waits = Waiting(place)
    with pytest.raises(DecodeError):
        waits.wait("x", TIMEOUT_S)
    waits.watch("x", seen.append)
    assert within(TIMEOUT_S, lambda: bool(seen))
    assert (seen[0]["status"], seen[0]["result"]["exc_type"]) == ("FAILURE", "DecodeError")


def test_who_waited_is_not_kept() -> None:
    place = Counting()
    waits = Waiting(place)
    for _ in range(100):
        with pytest.raises(ResultTimeout):
            waits.wait(new_id(), 0.0)
    assert waits._waiting == {}
    assert len(waits._agenda._plans) <= 1


def test_the_thread_ends_when_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LINGER_S", 0.1)
    place = Counting()
    waits = Waiting(place)
    for task_id in ("a", "b"):
        seen: list[Any] = []
        waits.watch(task_id, seen.append)
        place.store(task_id)
        assert within(TIMEOUT_S, lambda seen=seen: bool(seen))  # type: ignore[misc]
        assert within(TIMEOUT_S, lambda: not waits._watchers.is_served)


# --- a place that tells


class Telling(Place[bytes]):
    """Tells of results through a pipe, until it is cut; looks are told of too."""

    hears_all = True
    patience_s = 1.0

    def __init__(self, keeps: bool = True) -> None:
        self.keeps = keeps
        self.states: dict[str, bytes] = {}
        self.news: list[Heard[bytes]] = []
        self.listened: list[str] = []
        self.looked: list[str] = []
        self.is_away = False
        self.lost: FastqError | None = None
        self.opened = 0
        self._pipe: tuple[int, int] | None = None

    def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
        self.looked += task_ids
        return {each: self.states[each] for each in task_ids if each in self.states}

    def open(self, until: float) -> FastqError | None:
        if self.is_away:
            raise ConnectionLost("refused")
        self._pipe = os.pipe()
        self.opened += 1
        lost, self.lost = self.lost, None
        return lost

    def listen(self, task_ids: Sequence[str], dropped: Collection[str]) -> None:
        self.listened += task_ids
        self.tell(*((each, None) for each in task_ids))

    def take(self) -> list[Heard[bytes]]:
        assert self._pipe is not None
        if b"x" in os.read(self._pipe[0], 1000):
            raise ConnectionLost("cut")
        news, self.news = self.news, []
        return news

    def fileno(self) -> int:
        return -1 if self._pipe is None else self._pipe[0]

    def close(self) -> None:
        pipe, self._pipe = self._pipe, None
        for descriptor in pipe or ():
            os.close(descriptor)

    # What tests do.

    def tell(self, *news: Heard[bytes], word: bytes = b".") -> None:
        self.news += news
        if self._pipe is not None:
            os.write(self._pipe[1], word)

    def store(self, task_id: str) -> None:
        self.states[task_id] = meta_of(task_id)
        self.tell((task_id, self.states[task_id]))

    def cut(self) -> None:
        self.tell(word=b"x")


@pytest.fixture
def place() -> Telling:
    return Telling()


@pytest.fixture
def waits(place: Telling) -> Any:
    waits = Waiting(place)
    yield waits
    waits.close()


def test_nobody_is_looked_for_by_the_clock_where_all_is_told(place: Telling, waits: Waiting[bytes]) -> None:
    with pytest.raises(ResultTimeout):
        waits.wait("x", 0.5)
    assert place.looked == ["x", "x"]  # at once, and when the place has begun to tell


def test_a_leader_that_runs_out_of_time_hands_over(place: Telling, waits: Waiting[bytes]) -> None:
    found: list[Any] = []

    def run_out(task_id: str) -> None:
        with pytest.raises(ResultTimeout):
            waits.wait(task_id, 0.3)

    leader = in_threads(run_out, ["x"])
    time.sleep(0.1)
    follower = in_threads(lambda each: found.append(waits.wait(each, TIMEOUT_S)), ["y"])
    leader[0].join(TIMEOUT_S)
    place.store("y")
    follower[0].join(2.0)
    assert [meta["task_id"] for meta in found] == ["y"]


def test_what_is_stored_while_the_connection_is_lost_is_found(place: Telling, waits: Waiting[bytes]) -> None:
    found: list[Any] = []
    threads = in_threads(lambda each: found.append(waits.wait(each, TIMEOUT_S)["task_id"]), ["a", "b"])
    seen: list[Any] = []
    waits.watch("c", seen.append)
    assert within(TIMEOUT_S, lambda: {"a", "b", "c"} <= set(place.listened))
    place.is_away = True
    place.cut()
    assert within(TIMEOUT_S, lambda: not waits._is_open)
    place.states.update({each: meta_of(each) for each in "abc"})  # told to nobody
    place.is_away = False
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(found) == ["a", "b"]
    assert within(TIMEOUT_S, lambda: len(seen) == 1)
    assert place.opened == 2


def test_a_deadline_holds_while_the_place_is_away(place: Telling, waits: Waiting[bytes]) -> None:
    place.patience_s = 60.0
    slow = Waiting(place)
    with pytest.raises(ResultTimeout):
        slow.wait("x", 0.01)
    place.is_away = True
    place.cut()
    began = time.monotonic()
    with pytest.raises(ResultTimeout):
        slow.wait("x", 0.4)
    assert time.monotonic() - began < 1.5


def test_what_is_lost_with_the_connection_is_told_and_the_place_goes_on() -> None:
    place = Telling(keeps=False)
    waits, seen, errors = Waiting(place), [], []
    waits.watch("a", seen.append)

    def wait(task_id: str) -> None:
        try:
            waits.wait(task_id, TIMEOUT_S)
        except ConnectionLost as error:
            errors.append(error)

    threads = in_threads(wait, ["b", "c"])
    assert within(TIMEOUT_S, lambda: waits._is_open and len(waits._waiting) == 3)
    place.lost = ConnectionLost("the queue went with it")
    place.cut()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [str(error) for error in errors] == ["the queue went with it"] * 2
    assert errors[0] is not errors[1]
    assert within(TIMEOUT_S, lambda: bool(seen))
    assert seen[0]["result"]["exc_message"] == ["the queue went with it"]
    place.store("d")
    assert waits.wait("d", TIMEOUT_S)["task_id"] == "d"
    waits.close()


def test_results_are_told_as_lost_when_the_place_does_not_come_back() -> None:
    place = Telling(keeps=False)
    waits, seen = Waiting(place), []
    waits.watch("a", seen.append)
    assert within(TIMEOUT_S, lambda: waits._is_open)
    place.is_away = True
    place.cut()
    with pytest.raises(ConnectionLost, match="refused; results that were due are lost"):
        waits.wait("b", TIMEOUT_S)
    assert within(TIMEOUT_S, lambda: bool(seen))
    assert seen[0]["result"]["exc_type"] == "ConnectionLost"
    waits.close()


def test_a_place_that_was_closed_stays_so_until_somebody_waits(place: Telling, waits: Waiting[bytes]) -> None:
    seen: list[Any] = []
    waits.watch("x", seen.append)
    assert within(TIMEOUT_S, lambda: place.listened == ["x"])
    waits.close()
    assert [meta["result"]["exc_type"] for meta in seen] == ["ConnectionLost"]
    waits.watch("y", seen.append)()  # the thread lingers, for nobody
    time.sleep(0.2)
    assert (place.opened, place.fileno()) == (1, -1)
    place.states["z"] = meta_of("z")
    waits.watch("z", seen.append)
    assert within(2.0, lambda: len(seen) == 2)
    with pytest.raises(ResultTimeout):
        waits.wait("w", 0.3)
    assert place.listened[-1] == "w"


def test_refreshing_opens_the_place_and_takes_in_what_has_come(place: Telling, waits: Waiting[bytes]) -> None:
    seen: list[Any] = []
    waits.refresh(time.monotonic() + 1.0)
    assert place.opened == 1
    waits.refresh(time.monotonic() + 1.0)
    assert place.opened == 1
    waits.watch("x", seen.append)
    waits.refresh(time.monotonic() + 1.0)
    place.is_away = True
    place.cut()
    assert within(TIMEOUT_S, lambda: not waits._is_open)
    with pytest.raises(ConnectionLost, match="refused"):
        waits.refresh(time.monotonic() + 2.0)
