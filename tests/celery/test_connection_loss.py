"""What becomes of running calls when the broker's connection is lost, by the setting that ends them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.celery.conftest import OpenStage, stages
from tests.support.fault_proxy import FaultProxy

#: With Redis, Celery's worker has what it lost again after the visibility timeout only.
KINDS = [*stages(("amqp", "redis")), *[kind for kind in stages(("redis", "redis")) if kind.values[0][0] == "fastq"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_call_whose_connection_is_lost_is_ended_and_runs_again(
    open_stage: OpenStage, fault_proxy: Callable[[str, int], FaultProxy], kind: Any
) -> None:
    stage = open_stage(*kind, worker_cancel_long_running_tasks_on_connection_loss=True)
    target = urlsplit(stage.broker_url)
    proxy = fault_proxy(target.hostname or "", target.port or 0)
    stage.start_worker("-c", "2", settings={"broker_url": proxy.url(stage.broker_url)})
    # With 1 the second run returns at once; the first would last half a minute.
    late = stage.client.send_task("proj.acks.late", ("hang", 1))
    early = stage.client.send_task("proj.acks.early", ("hang", 1))
    for result in (late, early):
        stage.wait_for_notes("run", id=result.id)
    stage.until(lambda: stage.depth() == 1, "one is acknowledged")
    began = time.monotonic()
    proxy.cut()
    assert stage.get(late) == "lived"
    assert time.monotonic() - began < 20
    assert len(stage.notes("run", id=late.id)) == 2
    # What was acknowledged goes on: nobody would run it again.
    assert len(stage.notes("run", id=early.id)) == 1
    assert not early.ready()


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_a_child_keeps_nothing_of_the_connections_that_it_has_lost(
    open_stage: OpenStage, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    """kombu leaves them to the garbage collector, which comes to old objects hardly ever."""
    stage = open_stage("fastq", "amqp", "redis")
    target = urlsplit(stage.broker_url)
    proxy = fault_proxy(target.hostname or "", target.port or 0)
    worker = stage.start_worker("-c", "1", settings={"broker_url": proxy.url(stage.broker_url)})
    (child,) = map(psutil.Process, worker.children())
    stage.get(stage.tasks.stop_collecting.delay())
    counts = []
    for _ in range(12):
        proxy.cut(reset=False)
        assert stage.get((stage.tasks.add.s(1, 2) | stage.tasks.add.s(3)).delay()) == 6
        counts.append(child.num_fds())
    assert max(counts[2:]) <= counts[1] + 1, counts
