"""Two workers of one node name: both say so, and both answer remote control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastq.brokers import has_bus, open_blocking_bus
from tests.support.servers import RabbitMQ, wait_until
from tests.support.stage import Kind, open_stage
from tests.support.worker_process import WorkerProcess

WARNING = r"WARNING.*another worker is named twin@h too"


@pytest.mark.parametrize(
    ("kind", "mingles"),
    [
        pytest.param("amqp", True, marks=pytest.mark.rabbitmq),
        pytest.param("amqp", False, marks=pytest.mark.rabbitmq),
        pytest.param("redis", True, marks=pytest.mark.redis),
        pytest.param("redis", False, marks=pytest.mark.redis),
        ("sqlite", True),
    ],
)
def test_both_workers_of_a_name_say_so_and_can_be_reached(
    kind: Kind, mingles: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stage = open_stage(kind, request, tmp_path)
    arguments = ("-n", "twin@h", "-c", "1", *(() if mingles else ("--without-mingle",)))
    first = stage.start_worker(*arguments)
    other = stage.start_worker("-n", "other@h", *arguments[2:])
    if has_bus(stage.url):
        wait_for_nodes(stage.url, stage.client.conf, ["other@h", "twin@h"])
    assert "another worker" not in first.log()
    second = stage.start_worker(*arguments)
    for worker in (first, second):
        worker.wait_for_log(WARNING, 10)
    assert "another worker" not in other.log()
    if has_bus(stage.url):
        wait_for_nodes(stage.url, stage.client.conf, ["other@h", "twin@h", "twin@h"])
    third = stage.start_worker("-n", "alone@h", *arguments[2:])
    for worker in (first, second):
        assert worker.stop() == 0
        assert len(re.findall(WARNING, worker.log())) == 1
    assert third.stop() == 0
    assert "another worker" not in third.log()
    stage.close()


def wait_for_nodes(url: str, settings: Any, expected: list[str]) -> None:
    """Return when these nodes answer a ping."""
    found: list[str] = []

    def answered() -> bool:
        bus = open_blocking_bus(url, settings)
        found[:] = sorted(node for node, _ in bus.ask("ping", {}, 1.0))
        bus.close()
        return found == expected

    wait_until(answered, 15, lambda: TimeoutError(f"{found} answered"))


@pytest.mark.rabbitmq
def test_a_control_queue_that_two_may_share_is_left_to_the_first(
    rabbitmq: RabbitMQ, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stage = open_stage("amqp", request, tmp_path)
    shared = {"control_queue_exclusive": False}
    workers: list[WorkerProcess] = [stage.start_worker("-n", "twin@h", "-c", "1", **shared) for _ in range(2)]
    workers[1].wait_for_log(WARNING, 10)
    wait_for_nodes(stage.url, stage.client.conf, ["twin@h", "twin@h"])
    stage.close()
