"""Subscriptions to RabbitMQ's queues: how their limit is changed, and what they survive."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import RabbitMQ
from tests.support.stage import QUEUE, Stage, until

pytestmark = pytest.mark.rabbitmq


def stage_with(request: pytest.FixtureRequest, folder: Path, **queue: Any) -> Stage:
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    queues = [{"name": QUEUE, **queue}]
    opened = Stage("amqp", rabbitmq.url(rabbitmq.new_vhost()), folder, rabbitmq, task_queues=queues)
    request.addfinalizer(opened.close)
    return opened


def send_with_waiting_ones(stage: Stage, count: int) -> list[int]:
    """Send calls of which each second one has a countdown; return the numbers of those without."""
    at_once = []
    for _ in range(count // 2):
        at_once += stage.send(1)
        stage.send(1, eta=time.time() + random.uniform(0.5, 2.5))
    return at_once


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_queue_with_a_single_active_consumer_keeps_its_order(
    queue_type: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"x-single-active-consumer": True}
    if queue_type == "quorum":
        arguments["x-queue-type"] = queue_type
    stage = stage_with(request, tmp_path, queue_arguments=arguments)
    first = stage.start_worker("-c", "1")
    stage.start_worker("-c", "1")
    in_order = send_with_waiting_ones(stage, 400)
    stage.wait_for(stage.sent, 30)
    started = [entry for entry in stage.ledger.entries() if entry.what == "start"]
    assert [entry.number for entry in started if entry.number in set(in_order)] == in_order
    assert len(started) == 400
    assert len({entry.pid for entry in started}) == 1
    # The other one takes over.
    assert first.stop() == 0
    stage.wait_for(stage.send(10), 10)


def test_a_queue_that_goes_with_its_last_consumer_stays(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stage = stage_with(request, tmp_path, auto_delete=True)
    worker = stage.start_worker("-c", "2")
    send_with_waiting_ones(stage, 600)
    stage.wait_for(stage.sent, 30)
    assert len(stage.ledger.started()) == 600
    assert "cancelled the consumer" not in worker.log()


@pytest.mark.parametrize(
    "queue",
    [
        {"queue_arguments": {"x-queue-type": "stream"}},
        {"consumer_arguments": {"x-priority": 10}},
    ],
    ids=["stream", "priority"],
)
def test_what_waits_in_a_queue_of_a_rare_kind_runs_once(
    queue: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Calls with a countdown have the limit raised, past which nothing would come."""
    stage = stage_with(request, tmp_path, **queue)
    worker = stage.start_worker("-c", "2")
    send_with_waiting_ones(stage, 200)
    stage.wait_for(stage.sent, 30)
    assert len(stage.ledger.started()) == 200
    assert set(stage.ledger.started().values()) == {1}
    assert "cancelled the consumer" not in worker.log()
    assert "lost" not in worker.log()


def test_channels_that_nothing_is_left_of_are_closed(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stage = stage_with(request, tmp_path)
    rabbitmq = stage.rabbitmq
    assert rabbitmq is not None

    def channels() -> int:
        return int(rabbitmq.evaluate("length(rabbit_channel:list())"))

    stage.start_worker("-c", "2", "--compat")
    before = channels()
    most = 0
    for _ in range(3):
        numbers = stage.send(3000, eta=time.time() + 2)
        most = max(most, channels())
        stage.wait_for(numbers, 30)
    print(f"{before} channels before, {most} at most while tasks wait")
    until(lambda: channels() <= before + 2, 10, "the channels of what has run are closed")
