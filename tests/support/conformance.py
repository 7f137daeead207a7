"""What every publisher, every result store and every pull-type consumer must do, whatever is behind it.

A test file derives a class from each suite and provides its fixtures. ``url`` names a fresh broker or store.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq.brokers import open_publisher
from fastq.errors import PublishError, ResultTimeout
from fastq.interfaces import Publisher, ResultStore
from fastq.results import open_store
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.consumer_in_thread import ACK, REJECT, REQUEUE, TIMEOUT_S, Consuming


def message(body: object, queue: str = "celery", **options: Any) -> Message:
    """Return a task message whose body is a text of the test's choice."""
    return encode_task("tests.task", new_id(), str(body).encode(), routing_key=queue, **options)


def meta_of(task_id: str, state: str = "SUCCESS", result: object = None) -> bytes:
    return json.dumps(
        {"task_id": task_id, "status": state, "result": result, "traceback": None, "children": []}
    ).encode()


def in_child(work: Callable[[], object]) -> str:
    """Fork, work in the child, and return what it returned or raised, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, f"returned {work()!r}".encode())
        except BaseException as error:
            os.write(writer, f"raised {type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


class PublisherConformance:
    """Fixtures to provide: ``url``, ``settings``."""

    @pytest.fixture
    def publisher(self, url: str, settings: Settings) -> Iterator[Publisher]:
        publisher = open_publisher(url, settings)
        yield publisher
        publisher.close()

    def test_published_messages_wait_in_their_queue(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        publisher.declare("other")
        publisher.publish([message(1), message(2), message(3, "other")])
        assert (publisher.depth("celery"), publisher.depth("other")) == (2, 1)

    def test_an_empty_batch_is_published(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        publisher.publish([])
        assert publisher.depth("celery") == 0

    def test_declaring_twice_changes_nothing(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        publisher.publish([message(1)])
        publisher.declare("celery")
        assert publisher.depth("celery") == 1

    def test_purge_drops_what_waits_in_one_queue_and_counts_it(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        publisher.declare("other")
        publisher.publish([message(1), message(2), message(3, "other")])
        assert publisher.purge("celery") == 2
        assert (publisher.depth("celery"), publisher.depth("other")) == (0, 1)
        assert publisher.purge("celery") == 0

    def test_a_message_beyond_the_limit_is_refused(self, url: str, publisher: Publisher) -> None:
        publisher.declare("celery")
        strict = open_publisher(url, Settings({"fastq_max_message_bytes": 1000}))
        try:
            with pytest.raises(PublishError, match="fastq_max_message_bytes allows 1000"):
                strict.publish([message("fits"), message("x" * 1000)])
        finally:
            strict.close()
        assert publisher.depth("celery") == 0

    def test_a_closed_publisher_opens_again(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        publisher.close()
        publisher.publish([message(1)])
        assert publisher.depth("celery") == 1

    def test_threads_publish_side_by_side(self, publisher: Publisher) -> None:
        publisher.declare("celery")
        threads = [
            threading.Thread(target=lambda: [publisher.publish([message(n)]) for n in range(25)], daemon=True)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert publisher.depth("celery") == 100


class StoreConformance:
    """Fixtures to provide: ``url``, ``settings``."""

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

    def test_nothing_is_known_of_an_unknown_task(self, store: ResultStore) -> None:
        assert store.load(new_id()) is None

    def test_what_is_stored_is_loaded(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        other.save(task_id, "SUCCESS", meta_of(task_id, result=[1, "zwölf"]))
        meta = store.load(task_id)
        assert meta is not None
        assert (meta["status"], meta["result"], meta["task_id"]) == ("SUCCESS", [1, "zwölf"], task_id)

    def test_a_later_state_replaces_an_earlier_one(self, store: ResultStore, other: ResultStore) -> None:
        task_id = new_id()
        for state in ("STARTED", "PROGRESS", "FAILURE"):
            other.save(task_id, state, meta_of(task_id, state))
        meta = store.load(task_id)
        assert meta is not None
        assert meta["status"] == "FAILURE"

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
        store.forget(task_id)
        store.forget(task_id)
        assert store.load(task_id) is None

    def test_a_closed_store_opens_again(self, store: ResultStore) -> None:
        task_id = new_id()
        store.save(task_id, "SUCCESS", meta_of(task_id))
        store.close()
        assert store.wait(task_id, TIMEOUT_S)["task_id"] == task_id


class ConsumerConformance:
    """For consumers whose source is a BatchSource. Fixtures to provide: ``url``, ``settings``."""

    @pytest.fixture
    def publisher(self, url: str, settings: Settings) -> Iterator[Publisher]:
        publisher = open_publisher(url, settings)
        yield publisher
        publisher.close()

    @pytest.fixture
    def store(self, url: str, settings: Settings) -> Iterator[ResultStore]:
        store = open_store(url, settings)
        yield store
        store.close()

    @pytest.fixture
    def open_consumer(self, url: str, settings: Settings) -> Iterator[Callable[..., Consuming]]:
        opened: list[Consuming] = []

        def open_consumer(*queues: str, window: int = 100) -> Consuming:
            opened.append(Consuming(url, settings, queues or ("celery",), window))
            return opened[-1]

        yield open_consumer
        for consuming in opened:
            consuming.close()

    @pytest.fixture
    def consumer(self, open_consumer: Callable[..., Consuming]) -> Consuming:
        return open_consumer()

    def test_a_delivery_is_the_message_as_it_was_published(self, publisher: Publisher, consumer: Consuming) -> None:
        sent = message("body")
        publisher.publish([sent])
        (row,) = consumer.rows(1)
        assert row[1:] == (b"celery", sent.props, sent.body, 1)

    def test_messages_come_in_the_order_of_publishing(self, publisher: Publisher, consumer: Consuming) -> None:
        publisher.publish([message(n) for n in range(30)])
        for n in range(30, 40):
            publisher.publish([message(n)])
        assert consumer.bodies(40) == [str(n).encode() for n in range(40)]

    def test_higher_priorities_come_first(self, publisher: Publisher, open_consumer: Callable[..., Consuming]) -> None:
        for priority in (0, 9, 5, 0, 9):
            publisher.publish([message(priority, priority=priority)])
        publisher.publish([message("none")])
        assert open_consumer().bodies(6) == [b"9", b"9", b"5", b"0", b"0", b"none"]

    def test_priorities_hold_across_claims(self, publisher: Publisher, open_consumer: Callable[..., Consuming]) -> None:
        publisher.publish([message(f"{n % 3}", priority=n % 3) for n in range(9)])
        consumer = open_consumer(window=2)
        for count in (4, 6, 8, 9):
            consumer.rows(count - 2)
            consumer.allow(2)
            consumer.rows(count)
        assert consumer.bodies(9) == [b"2"] * 3 + [b"1"] * 3 + [b"0"] * 3

    def test_no_more_come_than_are_allowed(self, publisher: Publisher, open_consumer: Callable[..., Consuming]) -> None:
        publisher.publish([message(n) for n in range(10)])
        consumer = open_consumer(window=3)
        consumer.rows(3)
        consumer.fence()
        assert len(consumer.record.rows) == 3
        consumer.allow(2)
        consumer.rows(5)
        consumer.fence()
        assert len(consumer.record.rows) == 5
        assert publisher.depth("celery") == 5

    def test_only_listed_queues_are_received(
        self, publisher: Publisher, open_consumer: Callable[..., Consuming]
    ) -> None:
        publisher.publish([message("a", "alpha"), message("b", "beta"), message("c", "gamma")])
        consumer = open_consumer("alpha", "gamma")
        assert {row[1]: row[3] for row in consumer.rows(2)} == {b"alpha": b"a", b"gamma": b"c"}
        consumer.fence()
        assert len(consumer.record.rows) == 2

    def test_a_long_queue_does_not_hold_up_a_short_one(
        self, publisher: Publisher, open_consumer: Callable[..., Consuming]
    ) -> None:
        publisher.publish([message("long", "long") for _ in range(200)] + [message("short", "short") for _ in range(5)])
        rows = open_consumer("long", "short", window=20).rows(20)
        assert sum(row[1] == b"short" for row in rows) == 5
        assert sum(row[1] == b"long" for row in rows) == 15

    def test_what_is_done_is_gone(self, publisher: Publisher, open_consumer: Callable[..., Consuming]) -> None:
        publisher.publish([message(1), message(2)])
        first = open_consumer()
        first.settle(ACK, *(row[0] for row in first.rows(2)))
        first.close()
        assert publisher.depth("celery") == 0

    def test_what_is_given_back_comes_again_in_its_old_place_and_counted(
        self, publisher: Publisher, open_consumer: Callable[..., Consuming]
    ) -> None:
        publisher.publish([message(n) for n in range(4)])
        consumer = open_consumer(window=2)
        tags = [row[0] for row in consumer.rows(2)]
        consumer.settle(REQUEUE, tags[1])
        consumer.allow(3)
        rows = consumer.rows(5)
        assert [(row[3], row[4]) for row in rows[2:]] == [(b"1", 2), (b"2", 1), (b"3", 1)]

    def test_what_is_rejected_does_not_come_again(
        self, publisher: Publisher, open_consumer: Callable[..., Consuming]
    ) -> None:
        publisher.publish([message(1)])
        first = open_consumer()
        first.settle(REJECT, first.rows(1)[0][0])
        first.close()
        publisher.publish([message(2)])
        assert open_consumer().bodies(1) == [b"2"]

    def test_a_delayed_message_comes_when_it_is_due(self, publisher: Publisher, consumer: Consuming) -> None:
        due = time.time() + 0.3
        publisher.publish([message("later", eta=due), message("now")])
        assert consumer.bodies(1) == [b"now"]
        assert publisher.depth("celery") == 1
        assert consumer.bodies(2) == [b"now", b"later"]
        assert 0.0 <= time.time() - due < 0.5

    def test_a_delayed_message_that_expires_first_comes_when_it_expires(
        self, publisher: Publisher, consumer: Consuming
    ) -> None:
        expires = time.time() + 0.2
        publisher.publish([message("never", eta=expires + 3600, expires=expires)])
        assert consumer.bodies(1) == [b"never"]
        assert time.time() >= expires

    def test_an_eta_in_the_past_is_due(self, publisher: Publisher, consumer: Consuming) -> None:
        publisher.publish([message(1, eta=time.time() - 5)])
        assert consumer.bodies(1, 2.0) == [b"1"]

    def test_nothing_new_comes_after_cancel(self, publisher: Publisher, consumer: Consuming) -> None:
        publisher.publish([message(1)])
        tag = consumer.rows(1)[0][0]
        consumer.run(consumer.consumer.cancel())
        publisher.publish([message(2)])
        consumer.settle(ACK, tag)
        consumer.allow(100)
        consumer.fence()
        assert len(consumer.record.rows) == 1
        assert publisher.depth("celery") == 1

    def test_what_is_not_settled_goes_back_on_close(
        self, publisher: Publisher, open_consumer: Callable[..., Consuming]
    ) -> None:
        publisher.publish([message(1), message(2)])
        first = open_consumer()
        first.settle(ACK, first.rows(2)[0][0])
        first.close()
        (row,) = open_consumer().rows(1)
        assert (row[3], row[4]) == (b"2", 2)

    def test_follow_ups_are_published_and_confirmed(self, publisher: Publisher, consumer: Consuming) -> None:
        publisher.declare("next")
        consumer.publish((7, message("a", "next")), (8, message("b", "next")))
        consumer.stored(7)
        consumer.stored(8)
        assert publisher.depth("next") == 2

    def test_follow_ups_to_an_own_queue_are_received(self, consumer: Consuming) -> None:
        consumer.publish((1, message("again")))
        assert consumer.bodies(1) == [b"again"]

    def test_results_are_stored(self, consumer: Consuming, store: ResultStore) -> None:
        ids = [str(uuid.uuid4()) for _ in range(3)]
        consumer.save(*((task_id, "SUCCESS", meta_of(task_id, result=n), "", 0) for n, task_id in enumerate(ids)))
        assert [store.wait(task_id, TIMEOUT_S)["result"] for task_id in ids] == [0, 1, 2]

    def test_a_result_with_a_token_is_confirmed(self, consumer: Consuming, store: ResultStore) -> None:
        task_id = new_id()
        consumer.save((task_id, "SUCCESS", meta_of(task_id), "", 42))
        consumer.stored(42)
        assert store.load(task_id) is not None

    def test_a_consumer_without_queues_stores_results_and_publishes(
        self, url: str, settings: Settings, publisher: Publisher, store: ResultStore
    ) -> None:
        publisher.publish([message(1)])
        with Consuming(url, settings, queues=()) as consumer:
            consumer.allow(10)
            consumer.save(("some-task", "SUCCESS", meta_of("some-task"), "", 1))
            consumer.publish((2, message(2)))
            consumer.stored(1)
            consumer.stored(2)
            assert consumer.record.rows == []
        assert publisher.depth("celery") == 2
        assert store.wait("some-task", TIMEOUT_S)["status"] == "SUCCESS"

    def test_two_consumers_share_a_queue(self, publisher: Publisher, open_consumer: Callable[..., Consuming]) -> None:
        first, second = open_consumer(window=30), open_consumer(window=30)
        publisher.publish([message(n) for n in range(60)])
        bodies = first.bodies(30) + second.bodies(30)
        assert sorted(bodies, key=int) == [str(n).encode() for n in range(60)]
