"""Savers without a worker: one on a loop of its own, and what every saver must do, whatever is behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from fastq.errors import ConnectionLost, SettingsError
from fastq.interfaces import ResultStore, SaveItem
from fastq.results import open_saver, open_store
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance import meta_of

T = TypeVar("T")
TIMEOUT_S = 10.0


def item(state: str = "SUCCESS", result: Any = None, token: int = 0, task_id: str = "") -> SaveItem:
    """Return a result to save."""
    task_id = task_id or new_id()
    return (task_id, state, meta_of(task_id, state, result), "", token)


class Saving:
    """An open saver on a loop of its own; keeps what it confirms."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.stored: list[int] = []
        self.refused: list[int] = []
        self.saver: Any = open_saver(url, settings, None)
        self.saver.name = "fastq@test"
        keeps = {
            "published": lambda source, tokens: self.stored.extend(tokens),
            "publish_failed": lambda source, tokens, reason: self.refused.extend(tokens),
        }
        self.saver.source_class = type("Source", (self.saver.source_class,), keeps)
        self._loop = uvloop.new_event_loop()
        try:
            self.run(self.saver.open())
        except BaseException:
            self._end_loop()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, TIMEOUT_S))

    def save(self, *batch: SaveItem) -> None:
        async def save() -> None:
            self.saver.source.save(list(batch))

        self.run(save())

    def until(self, done: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        async def wait() -> None:
            deadline = time.monotonic() + timeout_s
            while not done():
                assert time.monotonic() < deadline, f"stored {self.stored}, refused {self.refused}"
                await asyncio.sleep(0.002)

        self.run(wait())

    def lost(self) -> Exception:
        """Wait for the connection to be lost, and return why."""

        async def lost() -> Exception:
            error: Exception = await self.saver.lost
            return error

        return self.run(lost())

    def close(self) -> None:
        if not self._loop.is_closed():
            self.run(self.saver.close())
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class SaverConformance:
    """Fixtures to provide: ``url``, ``settings``, ``lose``.

    ``lose`` ends what savers at ``url`` stand on, and returns what brings it back. It is None where that cannot be.
    """

    @pytest.fixture
    def open_saving(self, url: str, settings: Settings) -> Iterator[Callable[[], Saving]]:
        opened: list[Saving] = []

        def open_saving() -> Saving:
            opened.append(Saving(url, settings))
            return opened[-1]

        yield open_saving
        for saving in opened:
            saving.close()

    @pytest.fixture
    def saving(self, open_saving: Callable[[], Saving]) -> Saving:
        return open_saving()

    @pytest.fixture
    def reader(self, url: str, settings: Settings) -> Iterator[ResultStore]:
        store = open_store(url, settings)
        yield store
        store.close()

    def test_results_are_stored_and_confirmed_in_order(self, saving: Saving, reader: ResultStore) -> None:
        states = ["SUCCESS", "FAILURE", "STARTED", "REVOKED"]
        batch = [item(state, number, token=number) for number, state in enumerate(states)]
        saving.save(*batch)
        saving.until(lambda: len(saving.stored) == 3)  # token 0 is none
        assert saving.stored == [1, 2, 3]
        metas = [reader.load(task_id) for task_id, *_ in batch]
        assert [(meta["status"], meta["result"]) for meta in metas if meta] == [(s, n) for n, s in enumerate(states)]

    def test_many_batches_are_confirmed_once_each_and_in_order(self, saving: Saving, reader: ResultStore) -> None:
        items = [item(result=number, token=number) for number in range(1, 601)]
        for start in range(0, len(items), 64):
            saving.save(*items[start : start + 64])
        saving.until(lambda: len(saving.stored) >= len(items))
        assert saving.stored == list(range(1, 601))
        assert all(reader.load(items[at][0]) for at in (0, 299, 599))

    def test_who_waits_is_served(self, saving: Saving, reader: ResultStore) -> None:
        sent = item(result=5)
        saving.save(sent)
        assert reader.wait(sent[0], TIMEOUT_S)["result"] == 5

    def test_later_states_replace_earlier_ones(self, saving: Saving, reader: ResultStore) -> None:
        started = item("STARTED", token=1)
        saving.save(started, item("RETRY", task_id=started[0]), item("FAILURE", token=2, task_id=started[0]))
        saving.until(lambda: saving.stored == [1, 2])
        assert reader.wait(started[0], TIMEOUT_S)["status"] == "FAILURE"

    def test_what_is_saved_again_is_confirmed_again(self, saving: Saving, reader: ResultStore) -> None:
        sent = item(result=1, token=1)
        saving.save(sent)
        saving.until(lambda: saving.stored == [1])
        saving.save((*sent[:4], 2))
        saving.until(lambda: saving.stored == [1, 2])
        assert reader.wait(sent[0], TIMEOUT_S)["result"] == 1

    def test_a_result_that_can_never_be_stored_is_confirmed_and_holds_up_no_other(
        self, saving: Saving, reader: ResultStore
    ) -> None:
        bad, good = ("\ud800", "SUCCESS", meta_of("bad"), "", 1), item(token=2)
        saving.save(bad, good)
        saving.until(lambda: len(saving.stored) == 2)
        assert sorted(saving.stored) == [1, 2]
        assert reader.load(good[0]) is not None

    def test_large_results_are_stored(self, saving: Saving, reader: ResultStore) -> None:
        batch = [item(result="x" * 3_000_000, token=token) for token in (1, 2, 3)]
        saving.save(*batch)
        saving.until(lambda: saving.stored == [1, 2, 3])
        assert len(reader.wait(batch[2][0], TIMEOUT_S)["result"]) == 3_000_000

    def test_closing_stores_what_was_handed_over(self, saving: Saving, reader: ResultStore) -> None:
        batch = [item(result="x" * 10_000, token=token) for token in range(1, 101)]
        saving.save(*batch)
        saving.close()
        assert all(reader.load(task_id) for task_id, *_ in batch)
        assert saving.stored in ([], list(range(1, 101)))  # the confirmations may be late for the loop

    def test_a_loss_is_told_and_what_was_not_confirmed_can_be_saved_again(
        self, open_saving: Callable[[], Saving], reader: ResultStore, lose: Callable[[], Callable[[], None]] | None
    ) -> None:
        if lose is None:
            pytest.skip("it cannot be lost")
        saving, first, second, third = open_saving(), item(token=1), item(token=2), item(token=3)
        saving.save(first)
        saving.until(lambda: saving.stored == [1])
        mend = lose()
        saving.save(second)
        assert isinstance(saving.lost(), (ConnectionLost, SettingsError))
        saving.save(third)
        saving.close()
        assert 3 not in saving.stored
        mend()
        again = open_saving()
        again.save(second, third)
        again.until(lambda: again.stored == [2, 3])
        assert reader.wait(third[0], TIMEOUT_S)["status"] == "SUCCESS"

    def test_what_is_not_there_cannot_be_opened(
        self, url: str, settings: Settings, lose: Callable[[], Callable[[], None]] | None
    ) -> None:
        if lose is None:
            pytest.skip("it is always there")
        mend = lose()
        with pytest.raises((ConnectionLost, SettingsError)):
            Saving(url, settings)
        mend()
        Saving(url, settings).close()
