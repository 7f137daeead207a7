"""What every result store must do for those who wait for results, whatever is behind it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq.errors import ConnectionLost, ResultTimeout, SettingsError
from fastq.interfaces import Meta, ResultStore
from fastq.results import find_store, leading, open_store
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance import TIMEOUT_S, in_child, meta_of
from tests.support.consumer_in_thread import within


class StoreConformance:
    """Fixtures to provide: ``url``, ``settings``; ``other`` where results are not stored by another of its kind."""

    #: Whether results are there for whoever knows the task's id; else they come to this store alone.
    keeps = True

    @pytest.fixture
    def store(self, url: str, settings: Settings) -> Iterator[ResultStore]:
        store = open_store(url, settings)
        yield store
        store.close()

    @pytest.fixture
    def other(self, url: str, settings: Settings) -> Iterator[ResultStore]:
        """The same place, opened once more: where results are stored from."""
        store = open_store(url, settings)
        yield store
        store.close()

    def loaded(self, store: ResultStore, task_id: str, state: str) -> Meta:
        """Return what is known of a task: at once where it is kept, else as soon as it has come."""
        if not self.keeps:
            assert within(TIMEOUT_S, lambda: (store.load(task_id) or {}).get("status") == state)
        meta = store.load(task_id)
        assert meta is not None
        assert meta["status"] == state
        return meta

    def test_nothing_is_known_of_an_unknown_task(self, store: ResultStore) -> None:
        assert store.load(new_id()) is None

    def test_what_is_stored_is_loaded(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        other.save(task_id, "SUCCESS", meta_of(task_id, result=[1, "zwölf"]))
        meta = self.loaded(store, task_id, "SUCCESS")
        assert (meta["result"], meta["task_id"]) == ([1, "zwölf"], task_id)

    def test_a_later_state_replaces_an_earlier_one(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        for state in ("STARTED", "PROGRESS", "FAILURE"):
            other.save(task_id, state, meta_of(task_id, state))
        self.loaded(store, task_id, "FAILURE")

    def test_wait_returns_at_once_what_is_there(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        other.save(task_id, "SUCCESS", meta_of(task_id, result=5))
        assert store.wait(task_id, TIMEOUT_S)["result"] == 5

    def test_wait_ends_when_the_result_is_stored(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        threading.Timer(0.15, other.save, (task_id, "SUCCESS", meta_of(task_id, result=6))).start()
        began = time.monotonic()
        assert store.wait(task_id, TIMEOUT_S)["result"] == 6
        assert time.monotonic() - began < 2.0, "a result is pushed, not found by looking now and then"

    def test_wait_is_not_ended_by_a_state_that_is_not_final(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        other.save(task_id, "STARTED", meta_of(task_id, "STARTED"))
        with pytest.raises(ResultTimeout, match=task_id):
            store.wait(task_id, 0.2)

    def test_wait_times_out(self, store: ResultStore) -> None:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            store.wait(new_id(), 0.1)
        assert 0.1 <= time.monotonic() - began < 2.0

    def test_many_threads_wait_for_results_of_their_own(self, store: ResultStore, other: ResultStore) -> None:
        ids = [new_id() for _ in range(20)]
        found: dict[str, Any] = {}
        threads = [
            threading.Thread(
                target=lambda key=key: found.update({key: store.wait(key, TIMEOUT_S)["result"]}), daemon=True
            )
            for key in ids
        ]
        for thread in threads:
            thread.start()
        for number, task_id in reversed(list(enumerate(ids))):
            other.save(task_id, "SUCCESS", meta_of(task_id, result=number))
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert found == {task_id: number for number, task_id in enumerate(ids)}

    def test_two_threads_wait_for_the_same_result(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        results: list[Any] = []
        threads = [
            threading.Thread(target=lambda: results.append(store.wait(task_id, TIMEOUT_S)["result"]), daemon=True)
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        other.save(task_id, "SUCCESS", meta_of(task_id, result=8))
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert results == [8, 8]

    def test_observe_tells_every_state_from_another_thread(self, store: ResultStore, other: ResultStore) -> None:
        task_id, never = new_id(), new_id()
        seen: list[tuple[str, Any, threading.Thread]] = []

        def on_state(meta: Any) -> None:
            seen.append((meta["status"], meta["result"], threading.current_thread()))

        def states() -> list[Any]:
            return [(state, result) for state, result, _ in seen]

        other.save(task_id, "STARTED", meta_of(task_id, "STARTED"))
        store.observe(task_id, on_state)
        store.observe(never, on_state)()
        ended = store.observe(task_id, lambda meta: None)
        ended()
        ended()
        expected = [("STARTED", None), ("PROGRESS", 1), ("PROGRESS", 2), ("FAILURE", 3)]
        assert within(TIMEOUT_S, lambda: states() == expected[:1])
        for number, (state, result) in enumerate(expected[1:], 2):
            other.save(task_id, state, meta_of(task_id, state, result))
            assert within(TIMEOUT_S, lambda number=number: states() == expected[:number]), states()
        other.save(never, "SUCCESS", meta_of(never))
        assert within(TIMEOUT_S, store.is_there)
        assert threading.current_thread() not in [thread for _, _, thread in seen]
        assert not within(0.2, lambda: len(seen) > 4)

    def test_who_waits_and_who_watches_hear_of_the_last_state_alone(
        self, store: ResultStore, other: ResultStore
    ) -> None:
        task_id = new_id()
        watched: list[str] = []
        observed: list[str] = []
        store.watch(task_id, lambda meta: watched.append(meta["status"]))
        store.observe(task_id, lambda meta: observed.append(meta["status"]))
        other.save(task_id, "PROGRESS", meta_of(task_id, "PROGRESS"))
        assert within(TIMEOUT_S, lambda: observed == ["PROGRESS"])
        threading.Timer(0.1, other.save, (task_id, "SUCCESS", meta_of(task_id))).start()
        assert store.wait(task_id, TIMEOUT_S)["status"] == "SUCCESS"
        assert within(TIMEOUT_S, lambda: (watched, observed) == (["SUCCESS"], ["PROGRESS", "SUCCESS"]))

    def test_watch_calls_back_once_from_another_thread(self, store: ResultStore, other: ResultStore) -> None:
        early, late = new_id(), new_id()
        calls: list[tuple[str, threading.Thread]] = []
        done = threading.Event()

        def on_result(meta: Any) -> None:
            calls.append((meta["task_id"], threading.current_thread()))
            if len(calls) == 2:
                done.set()

        other.save(early, "SUCCESS", meta_of(early))
        store.watch(early, on_result)
        store.watch(late, on_result)
        assert not done.wait(0.05)
        other.save(late, "FAILURE", meta_of(late, "FAILURE"))
        assert done.wait(TIMEOUT_S)
        assert [task_id for task_id, _ in calls] == [early, late]
        assert threading.current_thread() not in [thread for _, thread in calls]

    def test_watchers_and_waiters_do_not_hinder_each_other(self, store: ResultStore, other: ResultStore) -> None:
        watched, awaited = new_id(), new_id()
        called = threading.Event()
        store.watch(watched, lambda meta: called.set())
        threading.Timer(0.1, other.save, (awaited, "SUCCESS", meta_of(awaited))).start()
        assert store.wait(awaited, TIMEOUT_S)["task_id"] == awaited
        other.save(watched, "SUCCESS", meta_of(watched))
        assert called.wait(2.0)

    def test_a_watch_that_was_ended_is_not_kept(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        called = threading.Event()
        seen: list[str] = []

        def callback(meta: Any) -> None:
            seen.append(meta["task_id"])

        unwatch, kept = store.watch(task_id, callback), weakref.ref(callback)
        store.watch(task_id, lambda meta: called.set())
        unwatch()
        unwatch()
        del unwatch, callback
        deadline = time.monotonic() + TIMEOUT_S
        while kept() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread lets go of it when it comes round
        assert kept() is None
        other.save(task_id, "SUCCESS", meta_of(task_id))
        assert called.wait(TIMEOUT_S)
        assert seen == []

    def test_what_is_forgotten_is_gone(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        other.save(task_id, "SUCCESS", meta_of(task_id))
        self.loaded(store, task_id, "SUCCESS")
        store.forget(task_id)
        store.forget(task_id)
        assert store.load(task_id) is None

    def test_a_state_can_be_stored_from_here_or_is_refused(self, store: ResultStore) -> None:
        task_id = new_id()
        if self.keeps:
            store.save(task_id, "PROGRESS", meta_of(task_id, "PROGRESS"))
            self.loaded(store, task_id, "PROGRESS")
        else:
            with pytest.raises(SettingsError, match=task_id):
                store.save(task_id, "PROGRESS", meta_of(task_id, "PROGRESS"))

    def test_a_closed_store_opens_again(self, store: ResultStore, other: ResultStore) -> None:
        before, after = new_id(), new_id()
        other.save(before, "SUCCESS", meta_of(before))
        assert store.wait(before, TIMEOUT_S)["task_id"] == before
        store.close()
        assert store.wait(before, TIMEOUT_S)["task_id"] == before
        store.reply_address()
        other.save(after, "SUCCESS", meta_of(after))
        assert store.wait(after, TIMEOUT_S)["task_id"] == after

    def test_its_row_says_whether_it_keeps_results(self, url: str) -> None:
        assert find_store(url).keeps == self.keeps

    def test_threads_store_side_by_side(self, store: ResultStore, other: ResultStore) -> None:
        ids = [[new_id() for _ in range(10)] for _ in range(4)]
        store.reply_address()
        threads = [
            threading.Thread(
                target=lambda own=own: [other.save(each, "SUCCESS", meta_of(each)) for each in own], daemon=True
            )
            for own in ids
        ]
        for thread in threads:
            thread.start()
        for each in (each for own in ids for each in own):
            assert store.wait(each, TIMEOUT_S)["task_id"] == each
        for thread in threads:
            thread.join(TIMEOUT_S)


class Interruption(BaseException):
    """What Ctrl-C raises in one thread of several."""


def interrupted_after(events: int, work: Callable[[], object]) -> bool:
    """Do some work in a thread, and interrupt it where Python looks for signals; False when it had ended before."""
    struck = threading.Event()
    left = events

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and "/fastq/results/" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                struck.set()
                sys.setprofile(None)
                raise Interruption

    def run() -> None:
        with contextlib.suppress(Interruption):
            sys.setprofile(profile)
            try:
                work()
            finally:
                sys.setprofile(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    return struck.is_set()


class WaitingConformance(StoreConformance):
    """For stores for which one waits by ``fastq.results.waiting``: all that keep results outside of this process."""

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_an_interrupted_wait_leaves_nobody_without_a_leader(
        self, store: ResultStore, other: ResultStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leading, "FOLLOW_S", 0.05)
        store.reply_address()
        is_interrupted, events = True, 0
        while is_interrupted:
            events += 1
            first, second = new_id(), new_id()
            waits = threading.Timer(0.002, store.wait, (second, TIMEOUT_S))  # mostly behind a leader
            waits.start()
            saving = threading.Timer(0.006, other.save, (first, "SUCCESS", meta_of(first)))
            saving.start()
            is_interrupted = interrupted_after(events, lambda first=first: store.wait(first, TIMEOUT_S))  # type: ignore[misc]
            saving.join()
            other.save(second, "SUCCESS", meta_of(second))
            waits.join(2.0)
            assert not waits.is_alive(), f"interrupted at event {events}"
        assert events > 20

    def test_a_result_that_is_there_is_seen_at_once_while_another_is_watched(
        self, store: ResultStore, other: ResultStore
    ) -> None:
        task_id, called = new_id(), threading.Event()
        store.watch(new_id(), lambda meta: None)
        other.save(task_id, "SUCCESS", meta_of(task_id))
        time.sleep(0.2)  # the thread sleeps until something happens
        store.watch(task_id, lambda meta: called.set())
        assert called.wait(2.0)

    def test_closing_tells_those_who_wait_and_watch(self, store: ResultStore) -> None:
        seen: list[Any] = []
        errors: list[Exception] = []

        def wait() -> None:
            try:
                store.wait(new_id(), TIMEOUT_S)
            except ConnectionLost as error:
                errors.append(error)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        store.watch(new_id(), seen.append)
        time.sleep(0.1)
        store.close()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert [str(error) for error in errors] == ["the result store was closed"] * 2
        assert [meta["result"]["exc_type"] for meta in seen] == ["ConnectionLost"]

    def test_a_result_is_not_shared_by_those_who_wait_for_it(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(store.wait(task_id, TIMEOUT_S)["result"])) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        other.save(task_id, "SUCCESS", meta_of(task_id, result=[1]))
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert found == [[1], [1]]
        assert found[0] is not found[1]

    def test_a_forked_child_waits_by_itself(self, store: ResultStore, other: ResultStore) -> None:
        task_id, second, third = new_id(), new_id(), new_id()
        waiting = threading.Thread(target=lambda: store.wait(task_id, TIMEOUT_S))
        waiting.start()
        called = threading.Event()
        store.watch(second, lambda meta: called.set())
        time.sleep(0.1)  # one leads

        def work() -> object:
            threading.Timer(0.1, store.save, (third, "SUCCESS", meta_of(third, result=3))).start()
            return store.wait(third, TIMEOUT_S)["result"]

        assert in_child(work) == "returned 3"
        other.save(task_id, "SUCCESS", meta_of(task_id))
        other.save(second, "SUCCESS", meta_of(second))
        waiting.join(2.0)
        assert not waiting.is_alive()
        assert called.wait(2.0)

    def test_waiting_starts_no_thread_and_many_watches_start_one(self, store: ResultStore, other: ResultStore) -> None:
        before = threading.active_count()
        with pytest.raises(ResultTimeout):
            store.wait(new_id(), 0.1)
        assert threading.active_count() == before
        for _ in range(3):
            store.watch(new_id(), lambda meta: None)
        assert threading.active_count() == before + 1
