"""What keeps a worker on Redis longer than its lease lasts: nothing of what it holds runs twice.

In compat mode, where what has begun is acknowledged already.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from fastq.brokers.redis.lease import GRACE_S, LEASE_S
from tests.celery.conftest import OpenStage
from tests.celery.stage import counts

pytestmark = [pytest.mark.redis, pytest.mark.slow]

#: The lease has run out by then, and whoever looks has seen it.
TOO_LONG_S = LEASE_S + GRACE_S + 2


@pytest.mark.parametrize("name", ["worker_ready", "task_received"])
def test_a_receiver_that_blocks_longer_than_a_lease_has_nothing_run_twice(open_stage: OpenStage, name: str) -> None:
    stage = open_stage("fastq", "redis", "redis")
    # It gives back what the dead have held.
    other = stage.start_worker("-c", "1", "-Q", "other")
    calls = [stage.client.send_task("echo", (number,)) for number in range(6)]
    gate = stage.gate()
    worker = stage.start_worker(
        *("-c", "1"),
        app="tests.celery.apps.handlers",
        env={"HANDLERS_GATE": str(gate), "HANDLERS_WAIT": name},
        await_ready=False,
    )
    stage.wait_for_notes("handler", name=name)
    time.sleep(TOO_LONG_S)
    assert not stage.notes("ran")
    gate.touch()
    assert [stage.get(call) for call in calls] == list(range(6))
    stage.wait_for_empty()
    assert counts(stage.notes("ran"), "id") == {call.id: 1 for call in calls}
    assert "gave back" not in other.log()
    assert "Connection to broker lost" not in worker.log()


def test_a_main_process_that_stands_still_longer_than_a_lease_has_nothing_run_twice(open_stage: OpenStage) -> None:
    """Its lease has run out, but nobody else has taken over."""
    stage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-c", "2")
    calls = [stage.tasks.sleep_for.delay(0.3) for _ in range(20)]
    stage.wait_for_notes("holding", 4)
    worker.signal(signal.SIGSTOP)
    try:
        time.sleep(TOO_LONG_S)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert [stage.get(call) for call in calls] == ["slept"] * 20
    stage.wait_for_empty()
    assert counts(stage.notes("holding"), "id") == {call.id: 1 for call in calls}
    assert "Connection to broker lost" not in worker.log()
