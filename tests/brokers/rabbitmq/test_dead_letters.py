"""What is rejected on RabbitMQ: which dead letters there are, what stands in them, and what they must not do to queues.

A queue that cannot add to a message's ``x-death`` ends, comes back with the message, and ends of it again; after a few
times it stays away, with all that is in it. Seen with RabbitMQ 3.10, classic and quorum queues, whoever rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.brokers.rabbitmq.dead_letters import dead_letter
from fastq.queues import ARGUMENTS, QueueSpec
from fastq.wire.amqp import decode_properties, encode_properties
from fastq.wire.ids import new_id
from fastq.wire.message import Message
from tests.support.attacked_worker import Attacked, Program
from tests.support.malformed_messages import headers
from tests.support.servers import RabbitMQ
from tests.support.stage import DEAD, QUEUE, Kind, Stage, open_stage, until

pytestmark = pytest.mark.rabbitmq

DEATH = {"count": 1, "reason": "rejected", "queue": QUEUE, "exchange": "", "routing-keys": [QUEUE]}
FATAL: list[Any] = [[7], [None], [DEATH, "x"], [{**DEATH, "count": "1"}], [{**DEATH, "count": 1.5}]]


def message(**changes: Any) -> Message:
    """Return a message that outlives its queue's process."""
    found = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2}
    return Message("", QUEUE, encode_properties({**found, "headers": headers(**changes)}), b"[[1000000], {}, {}]")


@pytest.mark.parametrize("program", ["fastq", "celery"])
@pytest.mark.parametrize("kind", ["amqp", "quorum"])
def test_no_message_ends_its_queue_by_becoming_a_dead_letter(
    kind: Kind, program: Program, rabbitmq: RabbitMQ, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stage = open_stage(kind, request, tmp_path)
    before = rabbitmq.log().count("crasher:")
    try:
        attacked = Attacked(stage, program)
        for deaths in FATAL:
            later = {"eta": "2999-01-01T00:00:00+00:00"}
            for change in ({}, later, {"task": 7}, {"task": "nobody.knows"}, {"timelimit": 5}):
                stage.publish([message(**change, **{"x-death": deaths})])
        attacked.send_good(10)
        until(lambda: stage.depth() == 0, 5, "all are settled")
        assert stage.dead_letters(0) == []
        stage.publish([message(**{"task": "nobody.knows", "x-death": [DEATH]})])
        assert len(stage.dead_letters()) == 1
        assert attacked.worker.log().count("class=x-death") == 3 * len(FATAL)
        assert rabbitmq.log().count("crasher:") == before
    finally:
        stage.close()


UNKNOWN = "nobody.knows"
#: Where what a worker rejects goes by the arguments of its queue, which it knows, and by policy.
MOVED_HERE = {"name": QUEUE, "dead_letter_exchange": "", "dead_letter_routing_key": DEAD}


@pytest.fixture
def attacked(rabbitmq: RabbitMQ, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Attacked]]:
    """A function that starts a worker whose queue has these options."""
    stages: list[Stage] = []

    def start(program: Program = "fastq", **queue: Any) -> Attacked:
        options = {**MOVED_HERE, **queue}
        stages.append(open_stage("amqp", request, tmp_path, task_queues=[options]))
        return Attacked(stages[-1], program, task_queues=[options] if program == "fastq" else celerys(options))

    yield start
    for stage in stages:
        stage.close()


def celerys(options: dict[str, Any]) -> dict[str, Any]:
    """Return a queue as ``task_queues`` of a Celery application describes it."""
    arguments = {ARGUMENTS[name]: value for name, value in options.items() if name != "name"}
    return {QUEUE: {"exchange": QUEUE, "routing_key": QUEUE, "queue_arguments": arguments}}


@pytest.mark.parametrize("program", ["fastq", "celery"])
def test_a_dead_letter_says_why_in_either_kind_of_application(
    attacked: Callable[..., Attacked], program: Program
) -> None:
    worker = attacked(program)
    unknown, nameless = new_id(), new_id()
    worker.stage.publish(
        [
            message(task=UNKNOWN, id=unknown),
            Message("", QUEUE, encode_properties({"headers": {"task": 7, "id": nameless}}), b"\xff"),
        ]
    )
    assert {each["headers"]["x-rejected"] for each in letters(worker, 2)} == {
        f"{UNKNOWN}[{unknown}]: unregistered",
        f"?[{nameless}]: class=task",
    }


def letters(attacked: Attacked, count: int = 1) -> list[dict[str, Any]]:
    """Return the properties of so many dead letters."""
    return [decode_properties(props) for props, _ in attacked.stage.dead_letters(count)]


def test_the_death_of_a_message_reads_as_if_rabbitmq_had_written_it(
    attacked: Callable[..., Attacked], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    here = attacked()
    mortal = {"task": UNKNOWN, "id": new_id(), "root_id": new_id(), "mine": {"a": [1, 2.5, None, 2**40]}}
    (tmp_path / "policy").mkdir()
    stage = open_stage("amqp", request, tmp_path / "policy")
    try:
        there = Attacked(stage, "fastq")
        found = []
        for each in (here, there):
            each.stage.publish([message(**mortal)])
            [properties] = letters(each)
            death = properties["headers"]["x-death"][0]
            found.append((properties, death.pop("time")))
        (ours, our_time), (brokers, brokers_time) = found
        assert ours["headers"].pop("x-rejected") == f"{UNKNOWN}[{mortal['id']}]: unregistered"
        brokers["headers"] = {name: value for name, value in brokers["headers"].items() if "x-last-death" not in name}
        assert ours == brokers
        assert abs((our_time - brokers_time).total_seconds()) < 10
    finally:
        stage.close()


def test_a_message_that_dies_again_has_one_death_counted_twice(attacked: Callable[..., Attacked]) -> None:
    worker = attacked()
    stage = worker.stage
    stage.publish([message(task=UNKNOWN)])
    [(props, body)] = stage.dead_letters()
    stage.publish([Message("", QUEUE, encode_properties({**decode_properties(props), "expiration": "60000"}), body)])
    [again] = letters(worker)
    [death] = again["headers"]["x-death"]
    assert death["count"] == 2
    assert "expiration" not in again  # it would die once more
    assert again["headers"]["x-rejected"].endswith(": unregistered")


@pytest.mark.parametrize(
    "change",
    [{"headers": headers(task=UNKNOWN, CC=["elsewhere"])}, {"user_id": "guest", "headers": headers(task=UNKNOWN)}],
)
def test_what_only_rabbitmq_can_move_is_left_to_it(attacked: Callable[..., Attacked], change: dict[str, Any]) -> None:
    worker = attacked()
    properties = {"content_type": "application/json", "content_encoding": "utf-8", **change}
    worker.stage.publish([Message("", QUEUE, encode_properties(properties), b"[[1], {}, {}]")])
    [found] = letters(worker)
    assert found["headers"]["x-death"][0]["reason"] == "rejected"
    assert "x-rejected" not in found["headers"]


@pytest.mark.parametrize("options", [{"dead_letter_exchange": "not.there"}, {"dead_letter_routing_key": "not.there"}])
def test_letters_that_have_no_place_to_go_to_stop_nothing(
    attacked: Callable[..., Attacked], options: dict[str, str]
) -> None:
    worker = attacked(**options)
    worker.stage.publish([message(task=UNKNOWN) for _ in range(20)])
    worker.send_good(10)
    until(lambda: worker.stage.depth() == 0, 10, "all are settled")
    assert worker.worker.log().count("Connected to") == 1
    assert worker.stage.dead_letters(0) == []


def test_a_flood_of_letters_is_moved(attacked: Callable[..., Attacked]) -> None:
    worker = attacked()
    worker.stage.publish([message(task=UNKNOWN, number=number) for number in range(2000)])
    worker.send_good(10)
    found = letters(worker, 2000)
    assert sorted(each["headers"]["number"] for each in found) == list(range(2000))
    assert all("x-rejected" in each["headers"] for each in found)
    until(lambda: worker.stage.depth() == 0, 10, "all are settled")


def test_a_letter_that_is_put_back_has_all_its_deliveries_before_it() -> None:
    props = encode_properties({"headers": {"x-delivery-count": 2, "own": 1}})
    found = {"props": props, "body": b"", "exchange": "", "routing_key": "main"}
    spec = QueueSpec("main", "", "main", arguments={"x-dead-letter-exchange": "dead"})
    letter = dead_letter(found, spec, "why")
    assert letter is not None
    left = decode_properties(letter.props)["headers"]
    assert "x-delivery-count" not in left
    assert left["own"] == 1
