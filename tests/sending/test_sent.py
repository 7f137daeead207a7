"""``task-sent`` events: what an application tells of the calls that it sends, and that this never disturbs sending."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from fastq import FastQ
from fastq.brokers import open_blocking_bus
from fastq.sending.sent import SentEvents
from fastq.settings import Settings
from fastq.wire.message import encode_task
from tests.support.servers import RabbitMQ, Redis

Event = dict[str, Any]
FIELDS = {
    *("hostname", "utcoffset", "pid", "clock", "timestamp", "type", "uuid", "name", "args", "kwargs"),
    *("root_id", "parent_id", "retries", "eta", "expires", "queue", "exchange", "routing_key"),
}


class Monitor:
    """Listens to the events of a broker."""

    def __init__(self, url: str) -> None:
        self._bus = open_blocking_bus(url, Settings({"broker_url": url}))
        self._messages = self._bus.events()

    def message(self) -> Any:
        """Return the body of the next message; the test's own time limit ends the wait."""
        _, body = next(self._messages)
        return orjson.loads(body)

    def close(self) -> None:
        self._bus.close()


@pytest.fixture(
    params=[pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
)
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "amqp":
        return str(request.getfixturevalue("amqp_url"))
    server: Redis = request.getfixturevalue("redis_server")
    return server.url(7)


@pytest.fixture
def monitor(url: str) -> Iterator[Monitor]:
    monitor = Monitor(url)
    yield monitor
    monitor.close()


@pytest.fixture
def sent(url: str) -> Iterator[SentEvents]:
    sent = SentEvents(url, Settings({"broker_url": url}))
    yield sent
    sent.close()


def call(number: int = 1, **options: Any) -> Any:
    return encode_task("proj.add", f"id-{number}", b"[[1,2],{},{}]", argsrepr="(1, 2)", **options)


def test_a_call_is_told_with_celery_s_fields(monitor: Monitor, sent: SentEvents) -> None:
    before = time.time()
    sent.tell([call(routing_key="fast", retries=1, eta=1.5e9, root_id="root", parent_id="parent")])
    event = monitor.message()
    assert event.keys() == FIELDS
    assert before <= event.pop("timestamp") <= time.time()
    assert event.pop("hostname").startswith(f"gen{os.getpid()}@")
    assert event == {
        "type": "task-sent",
        "uuid": "id-1",
        "name": "proj.add",
        "args": "(1, 2)",
        "kwargs": "{}",
        "root_id": "root",
        "parent_id": "parent",
        "retries": 1,
        "eta": "2017-07-14T02:40:00.000000+00:00",
        "expires": None,
        "queue": "fast",
        "exchange": "",
        "routing_key": "fast",
        "pid": os.getpid(),
        "clock": 1,
        "utcoffset": event["utcoffset"],
    }


def test_a_batch_is_told_in_one_message(monitor: Monitor, sent: SentEvents) -> None:
    sent.tell([call(number, exchange="topics", routing_key="a.b") for number in range(3)])
    sent.tell([])
    events = monitor.message()
    assert [(event["uuid"], event["clock"]) for event in events] == [("id-0", 1), ("id-1", 2), ("id-2", 3)]
    assert {(event["queue"], event["exchange"], event["routing_key"]) for event in events} == {(None, "topics", "a.b")}


def test_a_forked_process_tells_on_a_connection_of_its_own(monitor: Monitor, sent: SentEvents) -> None:
    sent.tell([call(1)])
    assert monitor.message()["uuid"] == "id-1"
    child = os.fork()
    if child == 0:
        sent.after_fork()
        sent.tell([call(2)])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    told = monitor.message()
    assert (told["uuid"], told["pid"]) == ("id-2", child)
    sent.tell([call(3)])
    assert monitor.message()["uuid"] == "id-3"


def test_without_a_broker_nothing_is_raised() -> None:
    url = "amqp://127.0.0.1:1//"
    sent = SentEvents(url, Settings({"broker_url": url}))
    sent.tell([call()])
    sent.close()


@pytest.mark.rabbitmq
def test_after_a_lost_connection_the_next_calls_are_told_again(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    sent = SentEvents(amqp_url, Settings({"broker_url": amqp_url}))
    sent.tell([call(1)])
    rabbitmq.close_connections()
    monitor = Monitor(amqp_url)
    try:
        for number in range(2, 4):  # the first finds the connection closed
            sent.tell([call(number)])
        assert monitor.message()["uuid"] in ("id-2", "id-3")
    finally:
        monitor.close()
        sent.close()


# -- through an application


@pytest.mark.rabbitmq
def test_an_application_tells_of_its_calls_when_the_setting_is_on(amqp_url: str) -> None:
    app = FastQ("proj", broker=amqp_url, task_send_sent_event=True)

    @app.task(name="proj.add")
    def add(x: int, y: int) -> int:
        return x + y

    monitor = Monitor(amqp_url)
    try:
        first = add.delay(1, 2)
        told = monitor.message()
        assert (told["type"], told["uuid"], told["name"], told["args"]) == ("task-sent", first.id, "proj.add", "(1, 2)")
        assert (told["root_id"], told["queue"]) == (first.id, "celery")
        with app.batch():
            ids = [add.delay(number, 0).id for number in range(3)]
        assert [event["uuid"] for event in monitor.message()] == ids
        assert app.publisher.depth("celery") == 4
    finally:
        app.close()
        monitor.close()


def test_without_the_setting_nothing_of_it_is_loaded(sqlite_url: str) -> None:
    app = FastQ("proj", broker=sqlite_url)
    app.finalize()
    assert app.sender._sent is None


def test_a_broker_without_events_is_no_error(sqlite_url: str) -> None:
    app = FastQ("proj", broker=sqlite_url, task_send_sent_event=True)
    app.send_task("proj.add", (1, 2))
    assert app.sender._sent is None
    app.close()
