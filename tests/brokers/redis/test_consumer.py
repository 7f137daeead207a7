"""Redis as a broker, against a real server, with kombu and Celery on the other side."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import celery
import kombu
import pytest
import redis as redis_py

from fastq.brokers import open_publisher
from fastq.brokers.redis import lease
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.replies import CLAIM_BYTES
from fastq.brokers.redis.scripts import RENEW
from fastq.brokers.redis.unacked import POSTPONED
from fastq.errors import ConnectionLost, PublishError, SettingsError
from fastq.interfaces import Publisher
from fastq.queues import QueueSpec
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.kombu import decode_envelope
from fastq.wire.message import Message, encode_task
from fastq.wire.properties import decode_properties
from tests.support.conformance import message
from tests.support.consumer_in_thread import ACK, REJECT, REQUEUE, TIMEOUT_S, Consuming, within
from tests.support.fault_proxy import FaultProxy
from tests.support.holder import Holder
from tests.support.servers import Redis
from tests.support.worker_process import WorkerProcess

pytestmark = pytest.mark.redis

RETURN = 3

#: redis-py's own types allow for its asynchronous client in every answer.
Client: TypeAlias = Any


@pytest.fixture
def url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(3)
    with redis_py.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def settings() -> Settings:
    return Settings({"fastq_publish_timeout": 5.0})


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with redis_py.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def publisher(url: str, settings: Settings) -> Iterator[Publisher]:
    publisher = open_publisher(url, settings)
    yield publisher
    publisher.close()


@pytest.fixture
def consume(url: str) -> Iterator[Callable[..., Consuming]]:
    """A function that opens a consumer of queues with settings; all are closed afterwards."""
    opened: list[Consuming] = []

    def consume(*queues: str, window: int = 100, at: str = url, **values: Any) -> Consuming:
        opened.append(Consuming(at, Settings(values), queues or ("celery",), window))
        return opened[-1]

    yield consume
    for consuming in opened:
        consuming.close()


# --- with kombu and Celery --------------------------------------------------------------------------------------------


def celery_app(url: str, **options: Any) -> celery.Celery:
    app = celery.Celery("tests", broker=url, set_as_current=False)
    app.conf.broker_transport_options = options
    app.conf.broker_connection_retry_on_startup = True
    return app


def test_a_message_of_celery_is_written_the_same_byte_for_byte(url: str, client: Client, publisher: Publisher) -> None:
    with celery_app(url) as app:
        for options in ({}, {"priority": 6, "expires": 60, "countdown": 5, "headers": {"x": [1.5, None, {"ü": True}]}}):
            app.send_task("tests.add", (1, "ü"), {"k": None}, **options)
            (theirs,) = [client.rpop(key) for key in client.keys("celery*")]
            envelope = json.loads(theirs)
            properties = envelope["properties"]
            sent = {name: properties.get(name) for name in ("correlation_id", "reply_to", "delivery_mode", "priority")}
            props, body, _ = decode_envelope(theirs)
            assert {name: decode_properties(props)[name] for name in sent} == sent
            publisher.publish([Message("", "celery", props, body, priority=properties["priority"])])
            (ours,) = [client.rpop(key) for key in client.keys("celery*")]
            tag = json.loads(ours)["properties"]["delivery_tag"]
            assert ours == theirs.replace(properties["delivery_tag"].encode(), tag.encode())


def test_messages_of_celery_are_received(url: str, consume: Callable[..., Consuming]) -> None:
    consumer = consume("celery", "other")
    with celery_app(url) as app:
        ids = [
            app.send_task("tests.add", (n,), queue=queue).id for n, queue in enumerate(("celery", "other", "celery"))
        ]
    rows = consumer.rows(3)
    assert sorted(decode_properties(row[2])["headers"]["id"] for row in rows) == sorted(ids)
    assert sorted(row[1] for row in rows) == [b"celery", b"celery", b"other"]
    assert {decode_properties(row[2])["headers"]["task"] for row in rows} == {"tests.add"}


CELERY_APP = """
import os, sys, time
import celery

app = celery.Celery("tests", broker=os.environ["BROKER"])
app.conf.broker_transport_options = {"visibility_timeout": 3600}
app.conf.broker_connection_retry_on_startup = True
app.conf.task_acks_late = True
app.conf.worker_prefetch_multiplier = 2

@app.task(name="tests.note", bind=True)
def note(self, text, seconds=0):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{text} {self.request.delivery_info['redelivered']}\\n")
    time.sleep(seconds)
"""


@pytest.fixture
def celery_worker(tmp_path: Path, url: str) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], Path]]]:
    """A function that starts a Celery worker; it returns the process, and the file its tasks write to."""
    workers: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[subprocess.Popen[bytes], Path]:
        (tmp_path / "capp.py").write_text(CELERY_APP)
        notes = tmp_path / "notes"
        notes.touch()
        with (tmp_path / "celery.log").open("wb") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "capp", "worker", "-P", "solo", "--without-gossip"],
                    cwd=tmp_path,
                    env={**os.environ, "BROKER": url, "NOTES": str(notes), "C_FORCE_ROOT": "1"},
                    stdout=log,
                    stderr=log,
                )
            )
        return workers[-1], notes

    yield start
    for worker in workers:
        worker.kill()
        worker.wait(TIMEOUT_S)


def note(text: str, seconds: float = 0, **options: Any) -> Message:
    return encode_task("tests.note", new_id(), json.dumps([[text, seconds], {}, {}]).encode(), **options)


def test_a_celery_worker_runs_what_is_published(
    publisher: Publisher, client: Client, celery_worker: Callable[[], tuple[subprocess.Popen[bytes], Path]]
) -> None:
    _, notes = celery_worker()
    publisher.publish([note("one"), note("two", priority=9), note("eta", eta=time.time() + 0.5)])
    assert within(20.0, lambda: len(notes.read_text().splitlines()) == 3)
    assert sorted(notes.read_text().splitlines()) == ["eta False", "one False", "two False"]
    assert within(TIMEOUT_S, lambda: client.hlen("unacked") == 0)


def test_a_celery_worker_takes_over_what_was_given_back(
    publisher: Publisher,
    client: Client,
    consume: Callable[..., Consuming],
    celery_worker: Callable[[], tuple[subprocess.Popen[bytes], Path]],
) -> None:
    publisher.publish([note("back"), note("unstarted")])
    consumer = consume()
    back, unstarted = (row[0] for row in consumer.rows(2))
    consumer.run(consumer.consumer.cancel())
    consumer.settle(REQUEUE, back)
    consumer.settle(RETURN, unstarted)
    _, notes = celery_worker()
    assert within(20.0, lambda: len(notes.read_text().splitlines()) == 2)
    # What never started was not delivered; what was marks itself as kombu does it.
    assert sorted(notes.read_text().splitlines()) == ["back True", "unstarted False"]


def test_what_a_dead_celery_worker_held_comes_back_after_the_visibility_timeout(
    publisher: Publisher,
    client: Client,
    consume: Callable[..., Consuming],
    celery_worker: Callable[[], tuple[subprocess.Popen[bytes], Path]],
) -> None:
    publisher.publish([note("held", 60), note("waiting", 60)])
    worker, _ = celery_worker()
    assert within(20.0, lambda: client.hlen("unacked") == 1)
    worker.kill()
    worker.wait(TIMEOUT_S)
    taken_at = min(score for _, score in client.zrange("unacked_index", 0, -1, withscores=True))
    timeout_s = time.time() - taken_at + 2.0
    rows = consume(broker_transport_options={"visibility_timeout": timeout_s}).rows(2, 20.0)
    assert time.time() - taken_at >= timeout_s
    assert {json.loads(row[3])[0][0]: row[4] for row in rows} == {"held": 2, "waiting": 1}
    assert client.zcard("unacked_index") == client.hlen("unacked") == 2


def test_kombu_restores_what_is_held_here(
    url: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    """A record of ours is one of kombu's: its own code can give it back."""
    publisher.publish([message("ü", priority=4)])
    consumer = consume()
    consumer.rows(1)
    consumer.run(consumer.consumer.cancel())
    (field,) = client.hkeys("unacked")
    with kombu.Connection(url) as connection:
        connection.default_channel.qos.restore_by_tag(field.decode())
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0
    assert json.loads(client.lindex("celery\x06\x163", 0))["headers"]["redelivered"] is True


# --- exchanges --------------------------------------------------------------------------------------------------------

QUEUES = {
    "all": {"exchange": "news", "exchange_type": "topic", "routing_key": "news.#"},
    "sport": {"exchange": "news", "exchange_type": "topic", "routing_key": "news.*.sport"},
    "mine": {"exchange": "direct", "routing_key": "to.me"},
    "everybody": {"exchange": "shout", "exchange_type": "fanout", "routing_key": ""},
}


def sent_to(exchange: str, routing_key: str, body: str) -> Message:
    return encode_task("tests.task", new_id(), body.encode(), exchange=exchange, routing_key=routing_key)


def test_an_exchange_sends_to_the_queues_that_are_bound_to_it(url: str, consume: Callable[..., Consuming]) -> None:
    settings = Settings({"task_queues": QUEUES})
    publisher = open_publisher(url, settings)
    for queue in ("all", "sport", "mine"):
        publisher.declare(queue)
    publisher.publish([sent_to("news", "news.uk.sport", "a"), sent_to("news", "news.uk", "b")])
    publisher.publish([sent_to("direct", "to.me", "c")])
    rows = consume("all", "sport", "mine").rows(4)
    publisher.close()
    assert sorted((row[1], row[3]) for row in rows) == [
        (b"all", b"a"),
        (b"all", b"b"),
        (b"mine", b"c"),
        (b"sport", b"a"),
    ]


def test_an_exchange_without_a_queue_is_an_error(publisher: Publisher, client: Client) -> None:
    with pytest.raises(PublishError, match="exchange 'nowhere' has no queue for routing key 'x'"):
        publisher.publish([sent_to("nowhere", "x", "a"), message("b")])
    assert client.keys("*") == []


def test_kombu_and_fastq_find_each_others_bindings(url: str, client: Client) -> None:
    publisher = open_publisher(url, Settings({"task_queues": QUEUES}))
    publisher.declare("sport")
    publisher.declare("mine")
    ours = {key: client.smembers(key) for key in client.keys("*")}
    client.flushdb()
    exchange = kombu.Exchange("news", "topic")
    with kombu.Connection(url) as connection:
        for queue in (
            kombu.Queue("sport", exchange, routing_key="news.*.sport"),
            kombu.Queue("mine", kombu.Exchange("direct", "direct"), routing_key="to.me"),
        ):
            queue(connection).declare()
    assert {key: client.smembers(key) for key in client.keys("*")} == ours
    publisher.publish([sent_to("news", "news.x.sport", "a")])
    publisher.close()
    assert client.llen("sport") == 1


def test_a_fanout_message_reaches_every_consumer_and_kombu(
    url: str, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher = open_publisher(url, Settings({"task_queues": QUEUES}))
    first, second = (consume("everybody", "celery", task_queues=QUEUES) for _ in range(2))
    heard: list[bytes] = []
    with kombu.Connection(url) as connection:
        queue = kombu.Queue("theirs", kombu.Exchange("shout", "fanout"), auto_delete=True)
        consumer = kombu.Consumer(connection, [queue], no_ack=True, on_message=lambda got: heard.append(got.body))

        def shout() -> bool:
            # Who has not subscribed yet does not hear.
            publisher.publish([sent_to("shout", "", "listen")])
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            return bool(heard and first.record.rows and second.record.rows)

        with consumer:
            assert within(TIMEOUT_S, shout)
            kombu.Producer(connection).publish(b"theirs", exchange=queue.exchange, routing_key="")
            assert within(TIMEOUT_S, lambda: first.record.rows[-1][3] == second.record.rows[-1][3] == b"theirs")
    publisher.close()
    assert first.record.rows[0][1] == b"everybody"
    first.settle(ACK, first.record.rows[0][0])
    first.fence()
    assert client.hlen("unacked") == 0


def test_follow_ups_go_through_exchanges(url: str, consume: Callable[..., Consuming]) -> None:
    consumer = consume("mine", "everybody", task_queues=QUEUES)
    consumer.publish((1, sent_to("direct", "to.me", "a")), (2, sent_to("direct", "to.nobody", "b")))
    assert consumer.bodies(1) == [b"a"]
    consumer.stored(1)
    consumer.record.wait(lambda: bool(consumer.record.refused))
    assert consumer.record.refused[0][0] == 2
    consumer.publish((3, sent_to("shout", "", "c")))
    consumer.stored(3)


def test_where_a_message_was_sent_to_is_what_kombu_says(url: str, consume: Callable[..., Consuming]) -> None:
    consumer = consume(*QUEUES, "celery", task_queues=QUEUES)
    seen: list[dict[str, Any]] = []
    sent = {"news": ("topic", "news.uk.x"), "direct": ("direct", "to.me"), "shout": ("fanout", "")}
    with kombu.Connection(url) as connection:
        exchanges = {name: kombu.Exchange(name, kind) for name, (kind, _) in sent.items()}
        theirs = [
            kombu.Queue(f"theirs-{name}", exchanges[name], routing_key=key, auto_delete=True)
            for name, (_, key) in sent.items()
        ]
        producer = kombu.Producer(connection)

        def is_heard(name: str, key: str) -> bool:
            # A fanout message is not heard by those who have not subscribed yet.
            producer.publish(b"{}", exchange=exchanges[name], routing_key=key)
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.5)
            return any(each["exchange"] == name for each in seen)

        with kombu.Consumer(connection, theirs, no_ack=True, on_message=lambda got: seen.append(got.delivery_info)):
            for name, (_, key) in sent.items():
                assert within(TIMEOUT_S, lambda: is_heard(name, key))  # noqa: B023
        producer.publish(b"{}", routing_key="celery")
    queues = {b"all", b"mine", b"everybody", b"celery"}
    assert within(TIMEOUT_S, lambda: {row[1] for row in consumer.record.rows} == queues)
    found = {row[1]: row[5:] for row in consumer.record.rows}
    assert found.pop(b"celery") == ()  # the default exchange, and the queue's name
    told = {each["exchange"]: (each["exchange"].encode(), each["routing_key"].encode()) for each in seen}
    assert found == {b"all": told["news"], b"mine": told["direct"], b"everybody": told["shout"]}


ROUTED_TASKS = """
import json, os
from fastq import FastQ

app = FastQ("tests", broker_url=os.environ["BROKER"], result_backend="disabled",
            task_queues={"all": {"exchange": "news", "exchange_type": "topic", "routing_key": "news.#"}})

@app.task(name="tests.note", bind=True, max_retries=1)
def note(self, text):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps([self.request.retries, self.request.delivery_info]) + "\\n")
    if not self.request.retries:
        raise self.retry(countdown=0)
"""


def test_a_task_sees_its_exchange_and_is_retried_through_it(
    url: str, tmp_path: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    notes = tmp_path / "notes"
    start_worker("-c", "1", "-Q", "all", source=ROUTED_TASKS, env={"BROKER": url, "NOTES": str(notes)})
    publisher = open_publisher(url, Settings({"task_queues": QUEUES}))
    body = json.dumps([["a"], {}, {}]).encode()
    publisher.publish([encode_task("tests.note", new_id(), body, exchange="news", routing_key="news.x")])
    publisher.close()
    assert within(20.0, lambda: notes.exists() and len(notes.read_text().splitlines()) == 2)
    info = {"exchange": "news", "routing_key": "news.x", "priority": 0, "redelivered": False}
    assert [json.loads(line) for line in notes.read_text().splitlines()] == [[0, info], [1, info]]


def test_queues_are_added_and_cancelled_while_it_runs(publisher: Publisher, consume: Callable[..., Consuming]) -> None:
    consumer = consume("celery")
    consumer.run(consumer.consumer.add_queue(QueueSpec("more", "more", "more")))
    publisher.publish([message("a", "more"), message("b")])
    assert sorted(consumer.bodies(2)) == [b"a", b"b"]
    assert [spec.name for spec in consumer.consumer.queue_specs] == ["celery", "more"]
    consumer.run(consumer.consumer.cancel_queue("celery"))
    publisher.publish([message("c"), message("d", "more")])
    consumer.rows(3)
    consumer.fence()
    assert [row[3] for row in consumer.record.rows[2:]] == [b"d"]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_every_key_has_the_global_prefix(url: str, client: Client, consume: Callable[..., Consuming]) -> None:
    options = {"global_keyprefix": "app1:"}
    publisher = open_publisher(url, Settings({"broker_transport_options": options}))
    publisher.declare("celery")
    publisher.publish([message(1), message(2, priority=9), message(3)])
    publisher.close()
    consumer = consume(broker_transport_options=options, window=2)
    consumer.rows(2)
    assert {key.decode() for key in client.keys("*")} == {
        "app1:celery\x06\x169", "app1:unacked", "app1:unacked_index", "app1:unacked_index.leases",
        "app1:_kombu.binding.celery", "app1:_kombu.binding_permanent.celery",
    }  # fmt: skip
    with celery_app(url, **options) as app:
        app.send_task("tests.add")
    assert client.llen("app1:celery") == 1


@pytest.mark.parametrize(
    ("priority", "key"), [(0, "q"), (2, "q"), (3, "q:3"), (5, "q:3"), (6, "q:6"), (9, "q:9"), (200, "q:9")]
)
def test_a_priority_has_its_list(url: str, client: Client, priority: int, key: str) -> None:
    publisher = open_publisher(url, Settings({"broker_transport_options": {"sep": ":"}}))
    publisher.publish([message(1, "q", priority=priority)])
    assert [name.decode() for name in client.keys("*")] == [key]
    assert (publisher.depth("q"), publisher.purge("q")) == (1, 1)
    publisher.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"visibility_timeout": 0}, "'visibility_timeout'] is 0; expected seconds above 0"),
        ({"visibility_timeout": "1h"}, "'visibility_timeout'] is '1h'"),
        ({"queue_order_strategy": "prio"}, "'prio'; expected one of round_robin, priority, sorted"),
        ({"queue_order_strategy": "no.such.Order"}, "'no.such:Order' cannot be"),
        ({"queue_order_strategy": "json:JSONDecoder"}, "a class with update(), consume() and rotate()"),
        ({"priority_steps": [3, 1]}, "expected rising integers from 0"),
        ({"global_keyprefix": 5}, "'global_keyprefix'] is of type int; expected text"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_layout(Settings({"broker_transport_options": options}), 0)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("round_robin", "b a c b a c b a c"),
        ("priority", "b b b a a a c c c"),
        ("sorted", "a a a b b b c c c"),
        ("kombu.utils.scheduling.sorted_cycle", "a a a b b b c c c"),
        ("kombu.utils.scheduling:priority_cycle", "b b b a a a c c c"),
        (f"{__name__}.Backwards", "c c c a a a b b b"),
    ],
)
def test_queues_are_read_in_the_order_that_was_asked_for(
    publisher: Publisher, consume: Callable[..., Consuming], strategy: str, expected: str
) -> None:
    for queue in ("a", "b", "c"):
        publisher.publish([message(queue, queue=queue)] * 3)
        publisher.publish([message(f"{queue}!", queue=queue, priority=9)])
    consumer = consume("b", "a", "c", window=3, broker_transport_options={"queue_order_strategy": strategy})
    for count in (3, 6, 9):
        consumer.rows(count)
        consumer.allow(3)
    order = [body.decode() for body in consumer.bodies(12)]
    # What is less urgent comes after all that is more urgent, as in kombu.
    queues = list(dict.fromkeys(expected.split()))
    if strategy == "round_robin":
        assert [sorted(order[:3]), sorted(order[3:6]), sorted(order[6:9])] == [sorted(queues)] * 3
        assert sorted(order[9:]) == sorted(f"{queue}!" for queue in queues)
    else:
        assert order == [*expected.split(), *(f"{queue}!" for queue in queues)]


class Backwards:
    """An order of an application's own: from the last queue to the first."""

    def update(self, queues: Iterable[str]) -> None:
        self._queues = list(queues)

    def consume(self, n: int) -> list[str]:
        return self._queues[::-1][:n]

    def rotate(self, last_used: str) -> None: ...


class OneByOne(Backwards):
    """Names one queue at a time, until it gives something."""

    def consume(self, n: int) -> list[str]:
        return self._queues[:1]

    def rotate(self, last_used: str) -> None:
        if last_used == self._queues[0]:
            self._queues.append(self._queues.pop(0))


class Repeating(OneByOne):
    """Names that queue more than once."""

    def consume(self, n: int) -> list[str]:
        return super().consume(n) * 3


class Broken(Backwards):
    def consume(self, n: int) -> list[str]:
        raise ZeroDivisionError


class BrokenAtOnce(Backwards):
    def update(self, queues: Iterable[str]) -> None:
        raise ZeroDivisionError


def test_an_order_of_the_applications_may_leave_queues_out(
    publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message("b1", queue="b"), message("c1", queue="c")])
    consumer = consume("a", "b", "c", window=3, broker_transport_options={"queue_order_strategy": OneByOne})
    with pytest.raises(AssertionError):
        consumer.rows(1, 0.5)  # it is the turn of the first one, which is empty
    publisher.publish([message("a1", queue="a")])
    assert consumer.bodies(3) == [b"a1", b"b1", b"c1"]


def test_a_queue_that_an_order_names_twice_does_not_stand_for_another(
    publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message("a1", queue="a"), message("b1", queue="b")])
    consumer = consume("a", "b", window=3, broker_transport_options={"queue_order_strategy": Repeating})
    assert consumer.bodies(2) == [b"a1", b"b1"]


class Unmade(Backwards):
    def __init__(self) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("order", [Broken, BrokenAtOnce, Unmade])
def test_an_order_that_fails_is_given_up(
    publisher: Publisher, consume: Callable[..., Consuming], caplog: pytest.LogCaptureFixture, order: type
) -> None:
    publisher.publish([message("1", queue="a"), message("2", queue="b")])
    consumer = consume("a", "b", broker_transport_options={"queue_order_strategy": order})
    assert consumer.bodies(2) == [b"1", b"2"]
    assert "queues are looked at in their order" in caplog.text
    assert "ZeroDivisionError" in caplog.text


# --- leases -----------------------------------------------------------------------------------------------------------


def test_what_a_killed_worker_held_is_back_within_15_s_in_order(
    url: str, publisher: Publisher, consume: Callable[..., Consuming], caplog: pytest.LogCaptureFixture
) -> None:
    publisher.publish([message(n) for n in range(120)])
    with Holder(url, 100) as holder:
        consumer = consume(window=200)
        assert consumer.bodies(20) == [str(n).encode() for n in range(100, 120)]
        holder.kill()
        killed_at = time.monotonic()
        rows = consumer.rows(120, 20.0)
    assert time.monotonic() - killed_at < 15.0
    assert [row[3] for row in rows[20:]] == [str(n).encode() for n in range(100)]
    assert {row[4] for row in rows[20:]} == {2}
    words = "gave back 100 messages of a worker that died, hangs or lost its connection (fastq-"
    assert within(TIMEOUT_S, lambda: words in caplog.text)


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.3)
    monkeypatch.setattr(lease, "GRACE_S", 0.3)


def test_a_worker_that_stood_still_is_fenced(
    url: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming], short_leases: None
) -> None:
    publisher.publish([message(n) for n in range(3)])
    with Holder(url, 3, lease_s=1.0) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        consumer = consume()
        rows = consumer.rows(3, 30.0)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.do("ack") == "acked"
        assert "lease" in holder.do("lost") or "dead" in holder.do("lost")
        assert [row[4] for row in rows] == [2, 2, 2]
        assert client.hlen("unacked") == client.zcard("unacked_index") == 3
    consumer.settle(ACK, *(row[0] for row in rows))
    consumer.fence()
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0


def test_a_worker_that_stood_still_goes_on_when_nobody_has_taken_over(
    url: str, publisher: Publisher, client: Client
) -> None:
    """Its lease has run out by its own clock and by that of Redis, and is taken up again."""
    publisher.publish([message(n) for n in range(3)])
    with Holder(url, 3, lease_s=1.0) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        (owner, _) = client.zrange("unacked_index.leases", 0, -1, withscores=True)[0]
        assert within(TIMEOUT_S, lambda: time.time() > client.zscore("unacked_index.leases", owner) + 0.5)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.do("ack") == "acked"
        assert holder.do("fence") == "done"
        assert client.hlen("unacked") == client.llen("celery") == 0
        assert client.zscore("unacked_index.leases", owner) > time.time()


def test_a_verdict_on_what_others_have_taken_over_does_nothing(
    url: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(n) for n in range(4)])
    first = consume(window=4)
    tags = [row[0] for row in first.rows(4)]
    with kombu.Connection(url) as connection:
        for field in client.hkeys("unacked"):
            connection.default_channel.qos.restore_by_tag(field.decode())
    second = consume(window=4)
    second.rows(4)
    for verdict, tag in zip((ACK, REJECT, REQUEUE, RETURN), tags, strict=True):
        first.settle(verdict, tag)
    first.fence()
    assert client.hlen("unacked") == client.zcard("unacked_index") == 4
    assert client.llen("celery") == client.llen("celery.dead") == 0


def test_what_is_held_for_long_does_not_look_overdue(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1)])
    options = {"visibility_timeout": 1.0}
    first, second = consume(broker_transport_options=options), consume(broker_transport_options=options)
    taken_at = client.zrange("unacked_index", 0, -1, withscores=True)[0][1] if first.record.rows else time.time()
    assert within(TIMEOUT_S, lambda: client.zrange("unacked_index", 0, -1, withscores=True)[0][1] > taken_at + 2.0)
    assert len(first.record.rows) + len(second.record.rows) == 1


def test_a_live_worker_is_never_taken_for_dead(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming], short_leases: None
) -> None:
    publisher.publish([message(1)])
    holder, other = consume(), consume("other")
    holder.rows(1)
    owner = holder.consumer.source.owner
    renewals: set[float] = set()

    def is_renewed_often() -> bool:
        renewals.add(client.zscore("unacked_index.leases", owner))
        return len(renewals) > 8

    assert within(TIMEOUT_S, is_renewed_often)
    assert min(renewals) > 0
    assert client.hlen("unacked") == 1
    assert not other.consumer.lost.done()


def test_a_lease_that_ran_out_because_the_server_hung_is_not_the_end(client: Client) -> None:
    """Three steps: run out, suspect, buried. An owner who is only late is trusted again."""
    renew = client.register_script(RENEW)
    keys = ["leases", "index"]

    def score(owner: str) -> float:
        return float(client.zscore("leases", owner))

    client.zadd("leases", {"late": time.time() - 5, "dead": time.time() - 5})
    assert renew(keys, ["first", 8, 0.2, 3600, 1]) == [1, [], []]
    assert score("late") < 0
    assert score("dead") < 0
    assert renew(keys, ["late", 8, 0.2, 3600, 0]) == [1, [], []]
    assert score("late") > time.time() + 7
    assert within(5.0, lambda: renew(keys, ["first", 8, 0.2, 3600, 0]) == [1, [b"dead"], []])
    assert score("dead") == 0
    assert renew(keys, ["dead", 8, 0.2, 3600, 0]) == [0, [], []]
    assert renew(keys, ["late", 8, 0.2, 3600, 0]) == [1, [b"dead"], []]


def test_a_buried_worker_takes_nothing_any_more(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    consumer = consume()
    client.zadd("unacked_index.leases", {consumer.consumer.source.owner: 0})
    publisher.publish([message(1)])
    assert "was taken for dead" in str(consumer.lost())
    assert client.llen("celery") == 1
    assert consumer.record.rows == []


@pytest.mark.parametrize(("count", "words"), [(1, "1 message"), (5, "5 messages")])
def test_after_a_lost_connection_the_same_process_takes_its_messages_back_at_once(
    publisher: Publisher,
    client: Client,
    consume: Callable[..., Consuming],
    caplog: pytest.LogCaptureFixture,
    count: int,
    words: str,
) -> None:
    publisher.publish([message(n) for n in range(count)])
    first = consume()
    first.rows(count)
    for each in client.client_list():
        if each["name"] == "fastq-worker":
            client.client_kill(each["addr"])
    assert isinstance(first.lost(), ConnectionLost)
    first.close()
    began = time.monotonic()
    rows = consume().rows(count)
    assert time.monotonic() - began < 2.0
    assert [(row[3], row[4]) for row in rows] == [(str(n).encode(), 2) for n in range(count)]
    words = f"gave back {words} that this process held when it lost its connection"
    assert within(TIMEOUT_S, lambda: words in caplog.text)
    assert client.zcard("unacked_index.leases") == 1


def test_nothing_of_a_closed_worker_is_left(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(n) for n in range(3)])
    consumer = consume()
    consumer.settle(ACK, consumer.rows(3)[0][0])
    consumer.close()
    assert client.llen("celery") == 2
    assert client.exists("unacked", "unacked_index", "unacked_index.leases") == 0


# --- waiting for their time -------------------------------------------------------------------------------------------


def postponed(consumer: Consuming, row: Any, due: float, place: str = "celery") -> Message:
    """Return the order to have a message that was taken wait for its time."""
    field = f"{consumer.consumer.source.owner}:{row[0]}"
    return Message(POSTPONED, place, b"", field.encode(), due=due)


def test_what_is_postponed_waits_in_redis_and_comes_back_to_its_list_in_order(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(n, priority=n % 2 * 9) for n in range(6)])
    whole = {key: client.lrange(key, 0, -1) for key in (b"celery", b"celery\x06\x169")}
    first = consume()
    rows = sorted(first.rows(6), key=lambda row: row[3])
    now = time.time()
    places = ["celery", "celery\x06\x169"]
    first.publish(*((n + 1, postponed(first, row, now + 7 + n / 10, places[n % 2])) for n, row in enumerate(rows)))
    first.stored(6)
    assert client.hlen("unacked") == client.zcard("unacked_index") == client.llen("celery") == 0
    assert [client.zcard(f"{place}.delayed") for place in places] == [3, 3]
    assert client.zrange("unacked_index.delayed", 0, -1, withscores=True) == [
        (b"celery", pytest.approx(now + 7)), (b"celery\x06\x169", pytest.approx(now + 7.1)),
    ]  # fmt: skip
    # The verdict that follows finds nothing any more.
    first.settle(ACK, *(row[0] for row in rows))
    first.run(first.consumer.cancel())
    assert (publisher.depth("celery"), first.record.rows[6:]) == (6, [])
    # Whoever is there brings them back, in good time, before what came later.
    publisher.publish([message("later")])
    with consume("other", at=first.consumer._url):
        assert within(TIMEOUT_S, lambda: client.exists("unacked_index.delayed") == 0)
    assert now + 1 < time.time() < now + 7
    assert client.lrange("celery", 1, -1) == whole[b"celery"]
    assert client.lrange("celery\x06\x169", 0, -1) == whole[b"celery\x06\x169"]
    assert client.exists("celery.delayed", "celery\x06\x169.delayed") == 0


def test_what_somebody_else_has_taken_over_is_not_postponed(
    url: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1)])
    consumer = consume()
    (row,) = consumer.rows(1)
    consumer.run(consumer.consumer.cancel())
    with kombu.Connection(url) as connection:
        connection.default_channel.qos.restore_by_tag(client.hkeys("unacked")[0].decode())
    consumer.publish((1, postponed(consumer, row, time.time() + 60)))
    consumer.stored(1)
    assert client.llen("celery") == 1
    assert client.exists("celery.delayed", "unacked_index.delayed") == 0


def test_the_same_text_twice_waits_twice(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1)])
    client.lpush("celery", client.lindex("celery", 0))
    consumer = consume()
    one, two = consumer.rows(2)
    consumer.publish((1, postponed(consumer, one, time.time() + 60)), (2, postponed(consumer, two, time.time() + 60)))
    consumer.stored(2)
    assert client.zcard("celery.delayed") == 2


def test_purge_drops_what_waits_for_its_time(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1), message(2, priority=6)])
    consumer = consume()
    one, two = consumer.rows(2)
    consumer.publish(
        (1, postponed(consumer, one, time.time() + 60)),
        (2, postponed(consumer, two, time.time() + 60, "celery\x06\x166")),
    )
    consumer.stored(2)
    publisher.publish([message(3, "other")])
    consumer.run(consumer.consumer.cancel())
    assert (publisher.depth("celery"), publisher.purge("celery"), publisher.depth("celery")) == (2, 2, 0)
    assert publisher.depth("other") == 1


def test_a_full_server_still_moves_what_waits(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    queue = 'odd", "", "ü'
    publisher.publish([message(1, queue)])
    whole = client.lrange(queue, 0, -1)
    consumer = consume(queue)
    (row,) = consumer.rows(1)
    client.config_set("maxmemory", 1)
    try:
        consumer.publish((1, postponed(consumer, row, time.time() + 6, queue)))
        consumer.stored(1)
        assert client.hlen("unacked") == 0
        consumer.run(consumer.consumer.cancel())
        assert within(TIMEOUT_S, lambda: client.llen(queue) == 1)
        assert client.lrange(queue, 0, -1) == whole
    finally:
        client.config_set("maxmemory", 0)


@pytest.mark.parametrize("key", ["celery.delayed", "unacked_index.delayed"])
def test_where_nothing_can_be_postponed_it_stays_taken(
    key: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    consumer = consume()
    client.set(key, "text")
    publisher.publish([message(1)])
    (row,) = consumer.rows(1)
    assert consumer.consumer.source.postpone is not None
    consumer.publish((1, postponed(consumer, row, time.time() + 60)))
    consumer.record.wait(lambda: bool(consumer.record.refused))
    assert "WRONGTYPE" in consumer.record.refused[0][1]
    assert client.hlen("unacked") == client.zcard("unacked_index") == 1
    assert consumer.consumer.source.postpone is None


def test_a_list_that_is_none_does_not_hold_up_the_others(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1), message(2, "other")])
    consumer = consume("celery", "other")
    rows = consumer.rows(2)
    due = time.time() + 6
    consumer.publish(*((n, postponed(consumer, row, due + n, row[1].decode())) for n, row in enumerate(rows, 1)))
    consumer.stored(2)
    consumer.run(consumer.consumer.cancel())
    client.set("celery", "text")
    with consume("third"):
        assert within(TIMEOUT_S, lambda: client.llen("other") == 1)
    assert client.zcard("celery.delayed") == 1
    client.delete("celery")
    with consume("third"):
        assert within(TIMEOUT_S, lambda: client.llen("celery") == 1)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_what_is_rejected_goes_to_the_dead_letters_when_reliable(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1), message(2)])
    client.lpush("celery", b"not json")
    whole = client.lrange("celery", 0, -1)
    consumer = consume()
    consumer.settle(REJECT, *(row[0] for row in consumer.rows(3)))
    consumer.fence()
    unreadable, *dead = client.lrange("celery.dead", 0, -1)
    assert unreadable == whole[0]
    assert [raw.replace(b', "x-rejected": "rejected"', b"") for raw in dead] == whole[1:]
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0


def test_what_is_rejected_is_dropped_as_kombu_does_when_not_reliable(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(1)])
    consumer = consume(fastq_reliable=False)
    consumer.settle(REJECT, consumer.rows(1)[0][0])
    consumer.fence()
    assert client.hlen("unacked") == client.zcard("unacked_index") == client.exists("celery.dead") == 0


def test_what_was_never_started_goes_back_as_it_came(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(n, priority=n) for n in range(10)])
    before = {key: client.lrange(key, 0, -1) for key in client.keys("celery*")}
    consumer = consume()
    tags = [row[0] for row in consumer.rows(10)]
    consumer.run(consumer.consumer.cancel())
    consumer.settle(RETURN, *tags)
    consumer.fence()
    assert {key: client.lrange(key, 0, -1) for key in client.keys("celery*")} == before


def test_deliveries_are_counted_on(publisher: Publisher, consume: Callable[..., Consuming]) -> None:
    publisher.publish([message(1)])
    consumer = consume()
    for count in range(1, 6):
        row = consumer.rows(count)[-1]
        assert row[4] == count
        consumer.settle(REQUEUE, row[0])
        consumer.allow(100)


def test_thousands_are_settled_at_once(publisher: Publisher, client: Client, consume: Callable[..., Consuming]) -> None:
    publisher.publish([message(n) for n in range(3000)])
    consumer = consume(window=3000)
    consumer.settle(ACK, *(row[0] for row in consumer.rows(3000)))
    consumer.fence()
    assert client.hlen("unacked") == client.zcard("unacked_index") == client.llen("celery") == 0


def test_large_messages_come_a_few_at_a_time(url: str, publisher: Publisher, consume: Callable[..., Consuming]) -> None:
    for _ in range(6):
        publisher.publish([message("x" * (4 << 20))])
    consumer = consume(window=100)
    assert len(consumer.rows(6)) == 6
    assert max(consumer.record.batches) * (4 << 20) <= CLAIM_BYTES


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_scripts_that_the_server_has_forgotten_are_sent_again_on_the_same_connection(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming], short_leases: None
) -> None:
    """All of them, each as the first one that is asked for."""
    consumer = consume()

    def forget() -> None:
        client.script_flush("SYNC")

    forget()
    publisher.publish([message(n) for n in range(5)])
    rows = {row[3]: row[0] for row in consumer.rows(5)}  # CLAIM
    forget()
    consumer.settle(ACK, rows[b"0"])  # SETTLE
    consumer.fence()
    assert client.hlen("unacked") == client.zcard("unacked_index") == 4
    forget()
    consumer.settle(REJECT, rows[b"1"])  # READ and MOVE
    consumer.fence()
    assert client.llen("celery.dead") == 1
    forget()
    consumer.publish((1, postponed(consumer, (rows[b"2"],), time.time() - 1)))  # POSTPONE
    consumer.stored(1)
    assert client.zcard("celery.delayed") == 1
    forget()
    consumer.run(consumer.consumer._bring_back())  # BRING_BACK
    assert client.exists("celery.delayed") == 0
    owner = consumer.consumer.source.owner
    forget()
    until = client.zscore("unacked_index.leases", owner)
    assert within(TIMEOUT_S, lambda: client.zscore("unacked_index.leases", owner) > until)  # RENEW
    forget()
    consumer.run(consumer.consumer.cancel())
    forget()
    consumer.settle(RETURN, rows[b"3"], rows[b"4"])
    consumer.run(consumer.consumer.settled())
    assert not consumer.consumer.lost.done()
    assert client.llen("celery") + client.hlen("unacked") == 3


def test_what_arrives_by_a_forgotten_script_has_arrived_when_it_is_cancelled(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming]
) -> None:
    consumer = consume()
    client.script_flush("SYNC")
    publisher.publish([message(1)])
    consumer.run(consumer.consumer.cancel())
    count = len(consumer.record.rows)
    publisher.publish([message(2)])
    time.sleep(0.3)
    assert len(consumer.record.rows) == count
    assert client.llen("celery") == 2 - count


def test_a_settle_that_is_refused_for_now_is_told_again(
    publisher: Publisher, client: Client, consume: Callable[..., Consuming], caplog: pytest.LogCaptureFixture
) -> None:
    publisher.publish([message(n) for n in range(1200)])
    consumer = consume(window=2000)
    rows = consumer.rows(1200)
    # A key of another type stands for whatever Redis may answer with.
    client.rename("unacked", "kept")
    client.set("unacked", "no hash")
    consumer.settle(ACK, *(row[0] for row in rows))
    assert within(TIMEOUT_S, lambda: "cannot be settled for now" in caplog.text)
    client.rename("kept", "unacked")
    assert within(TIMEOUT_S, lambda: client.hlen("unacked") == 0)
    assert within(TIMEOUT_S, lambda: client.zcard("unacked_index") == 0)
    assert not consumer.consumer.lost.done()


def test_a_server_that_is_busy_with_a_script_is_waited_for(
    url: str, publisher: Publisher, client: Client, consume: Callable[..., Consuming], short_leases: None
) -> None:
    publisher.publish([message(n) for n in range(20)])
    consumer = consume(window=10)
    rows = consumer.rows(10)
    client.config_set("busy-reply-threshold", 50)
    try:
        with redis_py.Redis.from_url(url) as other:
            spinning = threading.Thread(target=spin, args=(other,))
            spinning.start()
            assert within(TIMEOUT_S, lambda: is_busy(client))
            consumer.settle(ACK, *(row[0] for row in rows))
            consumer.allow(10)
            time.sleep(1.0)
            client.script_kill()
            spinning.join(TIMEOUT_S)
        assert len(consumer.rows(20)) == 20
        assert within(TIMEOUT_S, lambda: client.hlen("unacked") == 10)
        assert not consumer.consumer.lost.done()
    finally:
        client.config_set("busy-reply-threshold", 5000)


def spin(client: Client) -> None:
    with contextlib.suppress(redis_py.ResponseError):
        client.eval("while true do end", 0)


def is_busy(client: Client) -> bool:
    try:
        client.ping()
    except redis_py.exceptions.ResponseError as error:
        return "BUSY" in str(error)
    return False


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00\xff", b"{}", b"[" * 100_000, b'{"body": 5}', b'{"body": "YQ==", "headers": []}', b"x" * (3 << 20)],
    ids=["empty", "bytes", "no body", "deep", "number", "headers", "huge"],
)
def test_a_malformed_envelope_is_handed_over_to_be_refused(
    raw: bytes, client: Client, publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    client.lpush("celery", raw)
    publisher.publish([message("good")])
    consumer = consume(fastq_max_message_bytes=1 << 20)
    bad, good = consumer.rows(2)
    assert (bad[1], bad[2], bad[4]) == (b"celery", b"", 1)
    assert raw.startswith(bad[3])
    assert good[3] == b"good"
    consumer.settle(REQUEUE, bad[0])
    consumer.allow(10)
    assert raw.startswith(consumer.rows(3)[2][3])
    consumer.settle(REJECT, consumer.record.rows[2][0])
    consumer.fence()
    assert client.lrange("celery.dead", 0, -1) == [raw]


TASKS = """
import os
from fastq import FastQ

app = FastQ("tests", broker_url=os.environ["BROKER"], result_backend="disabled")

@app.task(name="tests.note")
def note(text, seconds=0):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(text + "\\n")
"""


def test_malformed_envelopes_do_not_stop_a_worker(
    url: str, client: Client, publisher: Publisher, tmp_path: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    notes = tmp_path / "notes"
    worker = start_worker("-c", "1", source=TASKS, env={"BROKER": url, "NOTES": str(notes)})
    for number, raw in enumerate(
        (b"", b"\x00\xff", b"null", b'{"body": 5}', b"[" * 100_000, b'{"headers": {"task": 1}}')
    ):
        client.lpush("celery", raw)
        publisher.publish([note(f"good {number}")])
    assert within(20.0, lambda: notes.exists() and len(notes.read_text().splitlines()) == 6)
    assert within(TIMEOUT_S, lambda: client.hlen("unacked") == 0)
    assert client.llen("celery.dead") == 6
    assert worker.log().count("Rejected malformed message: class=") == 6
    assert worker.stop() == 0


def test_a_key_that_is_no_list_does_not_hold_up_the_other_queues(
    client: Client, publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    client.set("broken", "text")
    consumer = consume("broken", "celery")
    publisher.publish([message(1)])
    assert consumer.bodies(1) == [b"1"]
    with pytest.raises(PublishError, match="WRONGTYPE"):
        publisher.publish([message(2, "broken")])
    consumer.publish((5, message(3, "broken")), (6, message(4)))
    consumer.stored(6)
    assert consumer.record.refused[0][0] == 5
    assert not consumer.consumer.lost.done()


def test_a_full_server_refuses_to_store_and_still_hands_out(
    client: Client, publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    publisher.publish([message(n) for n in range(10)])
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(PublishError, match=r"OOM.*raise maxmemory"):
            publisher.publish([message(10)])
    finally:
        client.config_set("maxmemory", 0)
    consumer = consume(window=5)
    rows = consumer.rows(5)
    client.config_set("maxmemory", 1)
    try:
        consumer.settle(ACK, *(row[0] for row in rows))
        consumer.allow(5)
        assert len(consumer.rows(10)) == 10
        consumer.fence()
        assert client.hlen("unacked") == 5
    finally:
        client.config_set("maxmemory", 0)


def test_a_full_server_does_not_lose_its_workers(
    client: Client, publisher: Publisher, consume: Callable[..., Consuming], short_leases: None
) -> None:
    first = consume("celery", "other")
    publisher.publish([message(n) for n in range(10)])
    owner = first.consumer.source.owner
    client.config_set("maxmemory", 1)
    try:
        renewed = client.zscore("unacked_index.leases", owner)
        assert within(TIMEOUT_S, lambda: client.zscore("unacked_index.leases", owner) > renewed + 1.5)
        assert not first.consumer.lost.done()
        first.settle(ACK, *(row[0] for row in first.rows(10)))
        # One that starts now, with a lost connection behind it, is none the worse.
        first.consumer.fail(ConnectionLost("cut"))
        consume("third").fence()
    finally:
        client.config_set("maxmemory", 0)
    assert client.hlen("unacked") == client.llen("celery") == 0


def test_a_restarted_server_ends_the_connection_and_takes_a_new_one(tmp_path: Path) -> None:
    server = Redis(tmp_path)
    server.start()
    try:
        settings = Settings({"fastq_publish_timeout": 5.0})
        consumer = Consuming(server.url(), settings)
        publisher = open_publisher(server.url(), settings)
        publisher.publish([message(1)])
        consumer.rows(1)
        server.restart()
        assert isinstance(consumer.lost(), ConnectionLost)
        consumer.close()
        with Consuming(server.url(), settings) as again:

            def published() -> bool:
                try:
                    publisher.publish([message(2)])
                except (ConnectionLost, PublishError):
                    return False
                return True

            assert within(TIMEOUT_S, published)
            assert again.bodies(1) == [b"2"]
        publisher.close()
    finally:
        server.close()


def test_a_stalled_connection_is_given_up(
    url: str,
    redis_server: Redis,
    fault_proxy: Callable[[str, int], FaultProxy],
    consume: Callable[..., Consuming],
    short_leases: None,
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    consumer = consume(at=proxy.url(url), broker_connection_timeout=2.0)
    publisher = open_publisher(proxy.url(url), Settings({"fastq_publish_timeout": 0.5}))
    publisher.publish([message(1)])
    consumer.rows(1)
    proxy.stall()
    began = time.monotonic()
    with pytest.raises(PublishError, match="may still be stored"):
        publisher.publish([message(2)])
    assert time.monotonic() - began < 3.0
    assert isinstance(consumer.lost(20.0), ConnectionLost)
    consumer.close()
    proxy.resume()
    publisher.close()


def test_without_tracking_the_queues_are_looked_at(
    url: str, client: Client, publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    client.acl_setuser(
        "modest", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-client|tracking"]
    )
    try:
        consumer = consume(at=url.replace("redis://", "redis://modest:x@"))
        publisher.publish([message(1)])
        assert consumer.bodies(1, 3.0) == [b"1"]
        publisher.publish([message(2)])
        assert consumer.bodies(2, 3.0) == [b"1", b"2"]
        consumer.close()
    finally:
        client.acl_deluser("modest")


def test_an_idle_consumer_hears_of_a_message_at_once_and_does_not_look_meanwhile(
    client: Client, publisher: Publisher, consume: Callable[..., Consuming]
) -> None:
    consumer = consume("celery", "other")
    consumer.fence()
    spans = []
    for count in range(1, 51):
        began = time.perf_counter()
        publisher.publish([message(count, "other" if count % 2 else "celery", priority=count % 10)])
        consumer.rows(count)
        spans.append(time.perf_counter() - began)
    assert sorted(spans)[25] < 0.02
    calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    time.sleep(0.5)
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - calls <= 2


def test_one_publish_is_one_command(client: Client, publisher: Publisher) -> None:
    publisher.publish([message(0)])
    before = client.info("commandstats")
    publisher.publish([message(1)])
    after = client.info("commandstats")
    changed = {
        name.removeprefix("cmdstat_"): after[name]["calls"] - before.get(name, {"calls": 0})["calls"]
        for name in after
        if after[name]["calls"] != before.get(name, {"calls": 0})["calls"]
    }
    assert changed == {"lpush": 1, "info": 1}


def test_nothing_is_sent_to_a_server_that_is_not_there() -> None:
    publisher = open_publisher("redis://127.0.0.1:1/0", Settings({"fastq_publish_timeout": 1.0}))
    with pytest.raises(ConnectionLost, match="cannot connect to Redis"):
        publisher.publish([message(1)])
