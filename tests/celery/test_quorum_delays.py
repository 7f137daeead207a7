"""Messages that Celery's senders delay in RabbitMQ, which they do where queues are quorum queues."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.celery.conftest import RUNNERS, OpenStage
from tests.celery.stage import CeleryStage
from tests.support.servers import RabbitMQ
from tests.support.worker_process import Program

pytestmark = pytest.mark.rabbitmq

SETTINGS = {
    "task_default_queue_type": "quorum",
    "task_default_exchange_type": "topic",
    "worker_detect_quorum_queues": True,
}
DIGITS = re.compile(r"([01]\.){28}celery")
#: One tuple of source, key, kind and name of the destination, and arguments for each binding.
BINDINGS = (
    "lists:sort([{{element(4, element(2, B)), element(3, B), element(3, element(4, B)), element(4, element(4, B)), "
    'element(5, B)}} || B <- rabbit_binding:list(<<"{vhost}">>)])'
)
QUEUES = (
    "lists:sort([{{element(4, amqqueue:get_name(Q)), amqqueue:is_durable(Q), lists:sort(amqqueue:get_arguments(Q))}} "
    '|| Q <- rabbit_amqqueue:list(<<"{vhost}">>)])'
)
EXCHANGES = (
    "lists:sort([{{element(4, element(2, X)), element(3, X), element(4, X), element(5, X), element(7, X)}} "
    '|| X <- rabbit_exchange:list(<<"{vhost}">>)])'
)
#: Of one run only: remote control, events, replies. And fastq's exchange for clients that give no address for a reply.
OTHERS = re.compile(r"pidbox|celeryev|reply|[0-9a-f]{8}-|celeryresults")


@pytest.fixture(params=RUNNERS, ids=[f"under_{runner}" for runner in RUNNERS])
def stage(request: pytest.FixtureRequest, open_stage: OpenStage) -> Iterator[CeleryStage]:
    """Quorum queues behind a topic exchange, and a worker that reads the default one."""
    stage = open_stage(request.param, "amqp", "rpc", **SETTINGS)
    stage.start_worker()
    return stage


def test_a_delayed_call_waits_in_the_broker_and_arrives(stage: CeleryStage) -> None:
    sent_at = time.time()
    result = stage.tasks.note_time.apply_async(("delayed",), countdown=3)
    assert stage.get(result) >= sent_at + 2.9
    (note,) = stage.notes("ran", mark="delayed")
    assert DIGITS.fullmatch(note["queue"])
    stage.wait_for_empty()


def test_a_retry_with_a_delay_waits_in_the_broker(stage: CeleryStage) -> None:
    assert stage.get(stage.tasks.retry_until.delay(2, countdown=1.0)) == 2
    keys = [note["delivery"]["routing_key"] for note in stage.notes("attempt")]
    assert keys[0] == "celery"
    assert [bool(DIGITS.fullmatch(key)) for key in keys[1:]] == [True, True]


def listed(rabbitmq: RabbitMQ, vhost: str, expression: str) -> list[str]:
    """Return the tuples of a listing as text, without those of single runs."""
    text = re.sub(r"\s+", "", rabbitmq.evaluate(expression.format(vhost=vhost)))
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "{" and depth == 1:
            start = at
        elif letter == "}" and depth == 0:
            found.append(text[start : at + 1])
    return [each for each in found if not OTHERS.search(each)]


def test_what_is_declared_is_what_celery_declares(open_stage: OpenStage, rabbitmq: RabbitMQ) -> None:
    found: dict[Program, list[list[str]]] = {}
    for runner in RUNNERS:
        stage = open_stage(runner, "amqp", "rpc", **SETTINGS)
        worker = stage.start_worker()
        stage.get(stage.tasks.add.delay(1, 2))  # Celery reads its queues before it has declared the delays
        stage.until(
            lambda stage=stage: '"#.celery"' in rabbitmq.evaluate(BINDINGS.format(vhost=stage.vhost)), "the bindings"
        )
        found[runner] = [listed(rabbitmq, stage.vhost, what) for what in (EXCHANGES, QUEUES, BINDINGS)]
        assert worker.stop() == 0
    exchanges, queues, bindings = found["celery"]
    assert (len(queues), sum("celery_delayed" in each for each in exchanges)) == (29, 29)
    assert len(bindings) > 56
    for ours, theirs in zip(found["fastq"], found["celery"], strict=True):
        assert set(ours) ^ set(theirs) == set()


def test_a_queue_that_is_added_later_is_reached_by_delayed_calls(open_stage: OpenStage) -> None:
    quorum = {"x-queue-type": "quorum"}
    queues = [
        {"name": name, "kind": "topic", "exchange": "work", "routing_key": name, "queue_arguments": quorum}
        for name in ("celery", "late")
    ]
    stage = open_stage("fastq", "amqp", "rpc", proj_queues=queues)
    stage.start_worker("-Q", "celery")
    assert len(stage.client.control.add_consumer("late", reply=True, timeout=5)) == 1
    stage.get(stage.tasks.note_time.apply_async(("late",), countdown=1, queue="late"))
    assert re.fullmatch(r"([01]\.){28}late", stage.notes("ran", mark="late")[0]["queue"])
