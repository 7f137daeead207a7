"""rpc:// against a real RabbitMQ: replies as a worker would send them, published here by hand."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fastq import FastQ
from fastq.brokers.rabbitmq.connection import BlockingConnection
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.rabbitmq.url import parse_amqp_url
from fastq.codecs.meta import encode_meta
from fastq.errors import ConnectionLost, ContentDisallowed, DecodeError, ResultTimeout, SettingsError
from fastq.interfaces import Meta
from fastq.results import rpc, watching
from fastq.results.rpc import RpcStore
from fastq.settings import Settings
from fastq.wire.amqp import encode_properties
from fastq.wire.ids import new_id
from fastq.wire.message import Message
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, free_ports
from tests.support.stage import until

pytestmark = pytest.mark.rabbitmq


def settings(url: str, **values: Any) -> Settings:
    return Settings({"broker_url": url, "result_backend": "rpc://", "fastq_publish_timeout": 3.0, **values})


@pytest.fixture
def store(amqp_url: str) -> Iterator[RpcStore]:
    made = RpcStore("rpc://", settings(amqp_url))
    yield made
    made.close()


class Worker:
    """Sends replies, as Celery's and our workers do: to the default exchange, correlation_id is the task's id."""

    def __init__(self, url: str) -> None:
        self.publisher = AmqpPublisher(url, settings(url, task_create_missing_queues=False))

    def reply(self, queue: str, task_id: str, result: Any = None, state: str = "SUCCESS") -> None:
        self.reply_raw(queue, task_id, encode_meta(task_id, state, result))

    def reply_raw(self, queue: str, task_id: str | None, body: bytes, content_type: str = "application/json") -> None:
        properties = {"content_type": content_type, "content_encoding": "utf-8", "delivery_mode": 1, "headers": {}}
        if task_id is not None:
            properties["correlation_id"] = task_id
        self.publisher.publish([Message("", queue, encode_properties(properties), body)])


@pytest.fixture
def worker(amqp_url: str) -> Iterator[Worker]:
    made = Worker(amqp_url)
    yield made
    made.publisher.close()


def test_a_reply_is_returned_and_stays_until_it_is_forgotten(store: RpcStore, worker: Worker) -> None:
    task_id = new_id()
    assert store.load(task_id) is None
    queue = store.reply_address()
    worker.reply(queue, task_id, {"sum": 5})
    meta = store.wait(task_id, 5)
    assert (meta["status"], meta["result"], meta["task_id"]) == ("SUCCESS", {"sum": 5}, task_id)
    assert store.wait(task_id, 0) == meta
    assert store.load(task_id) == meta
    store.forget(task_id)
    assert store.load(task_id) is None
    assert store.reply_address() == queue


def test_the_queue_is_declared_as_celery_does(store: RpcStore, amqp_url: str) -> None:
    queue = store.reply_address()
    connection = BlockingConnection(parse_amqp_url(amqp_url), "test", 5, 5, 1 << 20)
    with contextlib.closing(connection):
        # Seen on Celery 5.7: any other way to declare it is refused.
        arguments = {"x-expires": 86_400_000}
        found = connection.rpc(1, "queue.declare", queue=queue, durable=True, auto_delete=True, arguments=arguments)
        assert found["consumer_count"] == 1
        with pytest.raises(SettingsError, match="inequivalent"):
            connection.rpc(1, "queue.declare", queue=queue, durable=True, auto_delete=True)


def test_results_that_do_not_expire_have_a_queue_that_does_not(amqp_url: str) -> None:
    store = RpcStore("rpc://", settings(amqp_url, result_expires=None))
    connection = BlockingConnection(parse_amqp_url(amqp_url), "test", 5, 5, 1 << 20)
    with contextlib.closing(store), contextlib.closing(connection):
        queue = store.reply_address()
        found = connection.rpc(1, "queue.declare", queue=queue, durable=True, auto_delete=True)
        assert found["consumer_count"] == 1


def test_a_state_on_the_way_does_not_end_the_wait(store: RpcStore, worker: Worker) -> None:
    task_id = new_id()
    queue = store.reply_address()
    worker.reply(queue, task_id, {"pid": 1}, "STARTED")
    with pytest.raises(ResultTimeout, match=task_id):
        store.wait(task_id, 0.2)
    started = store.load(task_id)
    assert started is not None
    assert started["status"] == "STARTED"
    worker.reply(queue, task_id, 1)
    assert store.wait(task_id, 5)["status"] == "SUCCESS"


def test_a_wait_without_a_reply_ends_on_time(store: RpcStore) -> None:
    started = time.monotonic()
    with pytest.raises(ResultTimeout):
        store.wait(new_id(), 0.3)
    assert 0.2 < time.monotonic() - started < 1
    with pytest.raises(ResultTimeout):
        store.wait(new_id(), 0)


def test_a_reply_of_any_size_arrives(store: RpcStore, worker: Worker) -> None:
    task_id = new_id()
    worker.reply(store.reply_address(), task_id, "x" * 1_000_000)
    assert len(store.wait(task_id, 5)["result"]) == 1_000_000


def test_many_threads_wait_at_once(store: RpcStore, worker: Worker) -> None:
    ids = [new_id() for _ in range(30)]
    queue = store.reply_address()
    answers: dict[str, Any] = {}

    def wait(task_id: str) -> None:
        answers[task_id] = store.wait(task_id, 10)["result"]

    threads = [threading.Thread(target=wait, args=(task_id,)) for task_id in ids]
    for thread in threads:
        thread.start()
    for task_id in random.sample(ids, len(ids)):
        worker.reply(queue, task_id, task_id)
    for thread in threads:
        thread.join()
    assert answers == {task_id: task_id for task_id in ids}


def test_who_waits_takes_over_when_the_leader_has_its_result(store: RpcStore, worker: Worker) -> None:
    first, second = new_id(), new_id()
    queue = store.reply_address()
    results: list[str] = []

    def wait(task_id: str) -> None:
        results.append(store.wait(task_id, 10)["task_id"])

    threads = [threading.Thread(target=wait, args=(task_id,)) for task_id in (first, second)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    worker.reply(queue, first)
    threads[0].join(5)
    assert results == [first]
    worker.reply(queue, second)
    threads[1].join(5)
    assert results == [first, second]


class Seen:
    """A callback that keeps what it was given."""

    def __init__(self) -> None:
        self.metas: list[Meta] = []
        self.threads: set[str] = set()
        self._came = threading.Semaphore(0)

    def __call__(self, meta: Meta) -> None:
        self.metas.append(meta)
        self.threads.add(threading.current_thread().name)
        self._came.release()

    def wait(self) -> Meta:
        assert self._came.acquire(timeout=5)
        return self.metas[-1]


def test_watchers_are_called_once_from_one_thread(store: RpcStore, worker: Worker) -> None:
    queue = store.reply_address()
    seen = Seen()
    ids = [new_id() for _ in range(5)]
    for task_id in ids:
        store.watch(task_id, seen)
    for task_id in ids:
        worker.reply(queue, task_id, None, "STARTED")
        worker.reply(queue, task_id, task_id)
        worker.reply(queue, task_id, task_id)
    for _ in ids:
        seen.wait()
    time.sleep(0.1)
    assert [meta["result"] for meta in seen.metas] == ids
    assert seen.threads == {"fastq-rpc-results"}


def test_a_result_that_is_here_already_is_seen_at_once(store: RpcStore, worker: Worker) -> None:
    task_id = new_id()
    worker.reply(store.reply_address(), task_id, 7)
    store.wait(task_id, 5)
    seen = Seen()
    store.watch(task_id, seen)
    assert seen.wait()["result"] == 7


def test_the_thread_of_watches_ends_when_nobody_watches(
    store: RpcStore, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_S", 0.2)
    queue, seen = store.reply_address(), Seen()
    unwatch = store.watch(new_id(), seen)
    thread = store._waiting._watchers._thread
    assert thread is not None
    time.sleep(0.6)
    assert thread.is_alive()
    unwatch()
    thread.join(5.0)
    assert not thread.is_alive()
    # The next one makes another.
    task_id = new_id()
    store.watch(task_id, seen)
    worker.reply(queue, task_id, 1)
    seen.wait()


def test_a_watch_that_was_ended_is_not_kept(store: RpcStore, worker: Worker) -> None:
    queue, task_id = store.reply_address(), new_id()
    ended, seen = Seen(), Seen()
    unwatch, kept = store.watch(task_id, ended), weakref.ref(ended)
    store.watch(task_id, seen)
    unwatch()
    unwatch()
    del ended, unwatch
    assert kept() is None
    worker.reply(queue, task_id, 7)
    assert seen.wait()["result"] == 7


def test_the_address_after_a_lost_connection_is_that_of_a_queue_that_is_there(
    store: RpcStore, rabbitmq: RabbitMQ, amqp_vhost: str
) -> None:
    """However short ago it was used: the first call after a restart must not wait for ever."""
    queue = store.reply_address()
    for _ in range(3):
        rabbitmq.close_connections()
        until(lambda: rabbitmq.queue_depth(amqp_vhost, queue) == -1, 5, "the queue is gone")
        assert store.reply_address() == queue
        assert rabbitmq.queue_depth(amqp_vhost, queue) == 0


def test_a_call_that_is_sent_again_is_answered(amqp_url: str, rabbitmq: RabbitMQ, amqp_vhost: str) -> None:
    """The broker restarts between the first attempt and the second: the reply queue went with it."""
    app = FastQ("test", broker=amqp_url, backend="rpc://")
    publisher = app.publisher
    depths: list[int] = []

    class Restarting:
        """The publisher, with a broker that restarts under the first message."""

        def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
            queue = app.store.reply_address()
            if not depths:
                rabbitmq.close_connections()
                until(lambda: rabbitmq.queue_depth(amqp_vhost, str(queue)) == -1, 5, "the queue is gone")
                depths.append(-1)
                raise ConnectionLost("restarted")
            depths.append(rabbitmq.queue_depth(amqp_vhost, str(queue)))
            publisher.publish(messages, deadline)

        def __getattr__(self, name: str) -> Any:
            return getattr(publisher, name)

    app.publisher = Restarting()
    app.send_task("x")
    app.close()
    assert depths == [-1, 0]


def test_waiting_works_while_the_thread_reads(store: RpcStore, worker: Worker) -> None:
    queue = store.reply_address()
    never = Seen()
    store.watch(new_id(), never)
    time.sleep(0.1)
    task_id = new_id()
    worker.reply(queue, task_id, 7)
    assert store.wait(task_id, 5)["result"] == 7
    # And the thread reads again after a waiter has led.
    seen = Seen()
    watched = new_id()
    store.watch(watched, seen)
    worker.reply(queue, watched, 8)
    assert seen.wait()["result"] == 8
    assert never.metas == []


def test_a_failing_callback_is_logged_and_harms_no_other(
    store: RpcStore, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    queue = store.reply_address()
    task_id = new_id()
    seen = Seen()
    store.watch(task_id, lambda meta: 1 / 0)
    store.watch(task_id, seen)
    worker.reply(queue, task_id, 7)
    assert seen.wait()["result"] == 7
    assert "ZeroDivisionError" in caplog.text


def test_replies_that_are_none_are_dropped_or_blamed_on_their_task(
    store: RpcStore, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    queue = store.reply_address()
    broken, foreign, pickled, good = new_id(), new_id(), new_id(), new_id()
    worker.reply_raw(queue, None, b"{}")
    worker.reply_raw(queue, broken, b"no json")
    worker.reply_raw(queue, foreign, b"[1]")
    worker.reply_raw(queue, pickled, b"\x80\x04.", "application/x-python-serialize")
    worker.reply(queue, good, 7)
    assert store.wait(good, 5)["result"] == 7
    for task_id in (broken, foreign):
        with pytest.raises(DecodeError):
            store.wait(task_id, 1)
        with pytest.raises(DecodeError):
            store.load(task_id)
    with pytest.raises(ContentDisallowed):
        store.wait(pickled, 1)
    assert "a reply was dropped" in caplog.text
    seen = Seen()
    store.watch(broken, seen)
    assert seen.wait()["result"]["exc_type"] == "DecodeError"


def test_unfetched_results_are_bounded(
    store: RpcStore, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rpc, "MAX_REPLIES", 3)
    monkeypatch.setattr(rpc, "MAX_REPLY_BYTES", 1000)
    queue = store.reply_address()
    small, large = [new_id() for _ in range(6)], [new_id() for _ in range(6)]
    for task_id in small:
        worker.reply(queue, task_id)
    store.wait(small[-1], 5)
    # Many, but together they are small.
    assert all(store.load(task_id) is not None for task_id in small[-4:])
    for task_id in large:
        worker.reply(queue, task_id, "x" * 1000)
    store.wait(large[-1], 5)
    assert [task_id for task_id in small + large if store.load(task_id) is not None] == large[-3:]
    assert caplog.text.count("the oldest are dropped") == 1


def test_states_cannot_be_stored_from_here(store: RpcStore) -> None:
    with pytest.raises(SettingsError, match=r"rpc:// cannot store .*sqlite://"):
        store.save("id", "SUCCESS", b"{}")


def test_another_broker_than_rabbitmq_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"needs an amqp:// broker.*; set result_backend to 'sqlite:///x.db'"):
        RpcStore("rpc://", Settings({"broker_url": "sqlite:///x.db", "result_backend": "rpc://"}))


def test_a_broker_that_is_down_is_told_to_the_caller() -> None:
    url = f"amqp://u:sesame@127.0.0.1:{free_ports(1)}//"
    store = RpcStore("rpc://", settings(url))
    with pytest.raises(ConnectionLost, match="cannot connect") as caught:
        store.reply_address()
    assert "sesame" not in str(caught.value)
    with pytest.raises(ConnectionLost, match="cannot connect"):
        store.wait(new_id(), 1)
    seen = Seen()
    store.watch(new_id(), seen)
    assert seen.wait()["result"]["exc_type"] == "ConnectionLost"
    assert store.load(new_id()) is None
    store.close()


def test_a_closed_store_opens_again(store: RpcStore, worker: Worker) -> None:
    store.reply_address()
    store.close()
    task_id = new_id()
    worker.reply(store.reply_address(), task_id, 7)
    assert store.wait(task_id, 5)["result"] == 7


def test_closing_ends_waits_and_watches(store: RpcStore) -> None:
    store.reply_address()
    seen = Seen()
    store.watch(new_id(), seen)
    failures: list[Exception] = []

    def wait() -> None:
        try:
            store.wait(new_id(), 20)
        except ConnectionLost as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    store.close()
    thread.join(5)
    assert [str(error) for error in failures] == ["the result store was closed"]
    assert seen.wait()["result"]["exc_type"] == "ConnectionLost"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_has_a_queue_of_its_own(store: RpcStore, worker: Worker) -> None:
    queue = store.reply_address()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(Exception):
            own = store.reply_address()
            task_id = new_id()
            worker.reply(own, task_id, 7)
            if own != queue and store.wait(task_id, 5)["result"] == 7:
                status = 0
            store.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    task_id = new_id()
    worker.reply(queue, task_id, 8)
    assert store.wait(task_id, 5)["result"] == 8


def test_results_that_went_with_the_queue_are_reported(
    amqp_url: str, worker: Worker, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)
    store = RpcStore("rpc://", settings(proxy.url(amqp_url)))
    with contextlib.closing(store):
        queue = store.reply_address()
        seen = Seen()
        store.watch(new_id(), seen)
        timer = threading.Timer(0.2, proxy.cut)
        timer.start()
        with pytest.raises(ConnectionLost, match="the reply queue went with it"):
            store.wait(new_id(), 10)
        timer.join()
        assert "reply queue" in seen.wait()["result"]["exc_message"][0]
        # The store goes on under the same address.
        task_id = new_id()
        worker.reply(store.reply_address(), task_id, 7)
        assert store.wait(task_id, 5)["result"] == 7
        assert store.reply_address() == queue


def test_a_queue_that_outlives_the_connection_is_read_on(
    amqp_url: str, worker: Worker, fault_proxy: Callable[[str, int], FaultProxy], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = fault_proxy("127.0.0.1", parse_amqp_url(amqp_url).port)
    store = RpcStore("rpc://", settings(proxy.url(amqp_url)))
    second = BlockingConnection(parse_amqp_url(amqp_url), "test", 5, 5, 1 << 20)
    with contextlib.closing(store), contextlib.closing(second):
        queue = store.reply_address()
        # A second consumer keeps the queue alive, as the dead connection itself does while the broker has not noticed.
        second.rpc(1, "basic.qos", prefetch_count=1)
        task_id = new_id()

        def cut_and_reply() -> None:
            second.rpc(1, "basic.consume", queue=queue)
            proxy.cut()
            time.sleep(0.2)
            worker.reply(queue, new_id())  # goes to the other consumer, which holds one and takes no more
            worker.reply(queue, new_id())
            worker.reply(queue, task_id, 7)

        timer = threading.Timer(0.1, cut_and_reply)
        timer.start()
        assert store.wait(task_id, 10)["result"] == 7
        timer.join()
    assert "the reply queue is still there" in caplog.text


def test_a_deleted_queue_is_declared_again(store: RpcStore, worker: Worker) -> None:
    queue = store.reply_address()
    worker.publisher._administer(lambda connection: connection.rpc(2, "queue.delete", queue=queue))
    with pytest.raises(ConnectionLost, match="was deleted on the broker"):
        store.wait(new_id(), 5)
    task_id = new_id()
    worker.reply(queue, task_id, 7)
    assert store.wait(task_id, 5)["result"] == 7


def test_a_connection_lost_while_idle_is_replaced_before_the_next_task(
    store: RpcStore, worker: Worker, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "IDLE_CHECK_S", 0.05)
    store.reply_address()
    rabbitmq.close_connections()
    time.sleep(0.2)
    task_id = new_id()
    worker.reply(store.reply_address(), task_id, 7)
    assert store.wait(task_id, 5)["result"] == 7
