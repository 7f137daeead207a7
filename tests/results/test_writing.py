"""Savers over a client that blocks, in memory and in a file: the conformance suite, and the bounds of the thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastq.errors import ConnectionLost, EncodeError, SettingsError
from fastq.interfaces import SaveItem
from fastq.results import Store, writing
from fastq.results.writing import Writer, WritingSaver, parts_of
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance.savers import SaverConformance, Saving, item


@pytest.fixture
def settings() -> Settings:
    settings = Settings({})
    settings.freeze()
    return settings


class TestFolder(SaverConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        (tmp_path / "results").mkdir()
        return f"tests.toys.folder_store:STORE://{tmp_path}/results"

    @pytest.fixture
    def lose(self, tmp_path: Path) -> Callable[[], Callable[[], None]]:
        here, away = tmp_path / "results", tmp_path / "away"

        def lose() -> Callable[[], None]:
            here.rename(away)
            return lambda: (away.rename(here), None)[1]

        return lose


class TestMemory(SaverConformance):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{new_id()}"

    @pytest.fixture
    def lose(self) -> None:
        return None


class TestSqlite(SaverConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        (tmp_path / "results").mkdir()
        return f"sqlite:///{tmp_path}/results/results.db"

    @pytest.fixture
    def lose(self, tmp_path: Path) -> Callable[[], Callable[[], None]]:
        here, away = tmp_path / "results", tmp_path / "away"

        def lose() -> Callable[[], None]:
            here.rename(away)
            return lambda: (away.rename(here), None)[1]

        return lose


# --- the thread


class Slow(Writer):
    """Stores when it is let, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[SaveItem]] = []
        self.let = threading.Event()
        self.let.set()
        self.error: Exception | None = None
        self.threads: set[threading.Thread] = set()
        self.closed = threading.Event()

    def open(self) -> None:
        self.threads.add(threading.current_thread())

    def store_many(self, results: Sequence[SaveItem]) -> None:
        self.threads.add(threading.current_thread())
        assert self.let.wait(10.0)
        if self.error is not None:
            raise self.error
        if any(task_id == "bad" for task_id, *_ in results):
            raise EncodeError("cannot be stored")
        self.batches.append(list(results))

    def close(self) -> None:
        self.threads.add(threading.current_thread())
        self.closed.set()


WRITERS: list[Slow] = []
SLOW = Store(schemes=("slow",), store="", saver=lambda url, settings, core: WritingSaver(WRITERS[-1]))


@pytest.fixture
def writer() -> Slow:
    WRITERS[:] = [Slow()]
    return WRITERS[0]


@pytest.fixture
def saving(writer: Slow, settings: Settings) -> Iterator[Saving]:
    saving = Saving(f"{__name__}:SLOW://", settings)
    yield saving
    saving.close()


def test_what_gathers_while_the_store_is_busy_is_written_at_once(saving: Saving, writer: Slow) -> None:
    writer.let.clear()
    began = time.monotonic()
    for token in range(1, 1201):
        saving.save(item(token=token))
    assert time.monotonic() - began < 5.0, "the loop waits for no store"
    assert saving.stored == []
    writer.let.set()
    saving.until(lambda: len(saving.stored) == 1200)
    assert saving.stored == list(range(1, 1201))
    sizes = [len(batch) for batch in writer.batches]
    assert max(sizes) <= writing.MAX_BATCH
    assert len(sizes) <= 7


def test_all_is_called_from_one_thread_that_ends(saving: Saving, writer: Slow) -> None:
    saving.save(item(token=1))
    saving.until(lambda: saving.stored == [1])
    saving.close()
    assert len(writer.threads) == 1
    (thread,) = writer.threads
    thread.join(5.0)
    assert not thread.is_alive()
    assert writer.closed.is_set()


def test_one_that_cannot_be_stored_is_named_and_confirmed(
    saving: Saving, writer: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    saving.save(item(token=1), item(token=2, task_id="bad"), item(token=3))
    saving.until(lambda: saving.stored == [1, 2, 3])
    assert "the result of task 'bad' cannot be stored, and is lost" in caplog.text
    assert sum(map(len, writer.batches)) == 2


@pytest.mark.parametrize("error", [ConnectionLost("gone"), ValueError("a fault of the client")])
def test_a_store_that_fails_confirms_nothing_more(saving: Saving, writer: Slow, error: Exception) -> None:
    saving.save(item(token=1))
    saving.until(lambda: saving.stored == [1])
    writer.error = error
    saving.save(item(token=2))
    assert str(error) in str(saving.lost())
    assert isinstance(saving.lost(), ConnectionLost)
    saving.save(item(token=3))
    saving.close()
    assert saving.stored == [1]
    assert writer.closed.is_set()


def test_a_store_that_hangs_does_not_keep_a_worker_from_stopping(
    saving: Saving, writer: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CLOSE_S", 0.2)
    writer.let.clear()
    saving.save(item(token=1))
    began = time.monotonic()
    saving.close()
    assert time.monotonic() - began < 2.0
    writer.let.set()


def test_a_store_that_cannot_be_opened_says_so(writer: Slow, settings: Settings, monkeypatch: Any) -> None:
    def refuse() -> None:
        raise SettingsError("wrong password")

    monkeypatch.setattr(writer, "open", refuse)
    with pytest.raises(SettingsError, match="wrong password"):
        Saving(f"{__name__}:SLOW://", settings)


def test_parts_are_bounded_in_number_and_size() -> None:
    small = [item(token=token) for token in range(1, 1101)]
    assert [len(part) for part in parts_of(small)] == [500, 500, 100]
    large = [item(result="x" * (1 << 20)) for _ in range(9)]
    assert [len(part) for part in parts_of(large)] == [3, 3, 3]
    huge = [item(result="x" * (5 << 20)) for _ in range(2)]
    assert [len(part) for part in parts_of(huge)] == [1, 1]
    assert list(parts_of([])) == []
