"""Soft and hard time limits on real workers: what the task sees, what is stored, what the log says, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq.errors import SoftTimeLimitExceeded, TimeLimitExceeded
from tests.support.stage import Stage, open_stage, until

pytestmark = pytest.mark.rabbitmq

MARGIN_S = 0.5  # reliability goals, scenario 20: the kill comes at the limit + 0.5 s at the latest


@pytest.fixture(params=["amqp", "sqlite"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def started_at(stage: Stage, number: int) -> float:
    return next(entry.at_unix for entry in stage.ledger.entries() if entry.number == number and entry.what == "start")


@pytest.mark.parametrize(("mode", "call"), [("--reliable", "read"), ("--compat", "read"), ("--reliable", "usleep")])
def test_the_hard_limit_ends_a_child_that_is_stuck_in_c(stage: Stage, mode: str, call: str) -> None:
    worker = stage.start_worker("-c", "1", mode)
    children = worker.children()
    result = stage.call("stuck_in_c", call, time_limit=1)
    good = stage.call("work")
    with pytest.raises(TimeLimitExceeded) as raised:
        result.get(timeout=10)
    took = time.time() - started_at(stage, 0)
    print(f"limit 1 s: FAILURE was here {took:.3f} s after the start")
    assert raised.value.args == (1.0,)
    assert result.state == "FAILURE"
    assert 1.0 <= took <= 1.0 + MARGIN_S
    assert good.get(timeout=10) == 1
    log = worker.log()
    limit = log.find(f"Hard time limit (1.0s) exceeded for stuck_in_c[{result.id}]")
    # Where it was stuck: the child's own stack, written although the interpreter's lock was never free.
    assert -1 < limit < log.find(" in stuck_in_c\n"), log[-3000:]
    until(lambda: worker.children() not in (children, []), 5, "another child is there")
    # It has ended for good: not run again, not lost.
    stage.wait_for_settled()
    assert stage.ledger.started() == {0: 1, 1: 1}


def test_the_workers_own_limit_applies_where_the_task_has_none(stage: Stage) -> None:
    stage.start_worker("-c", "1", "--time-limit", "0.5")
    with pytest.raises(TimeLimitExceeded):
        stage.call("work", 20).get(timeout=10)
    assert time.time() - started_at(stage, 0) <= 0.5 + MARGIN_S


def test_the_soft_limit_raises_in_the_task_and_the_child_goes_on(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1")
    [pid] = worker.children()
    sent_at = time.time()
    stopped = stage.call("stops_in_time", 20, soft_time_limit=0.3)
    assert stopped.get(timeout=10) == "stopped in time"
    ended_at = time.time()
    assert ended_at - started_at(stage, 0) <= 0.3 + MARGIN_S
    assert ended_at - sent_at >= 0.3  # the limit begins before the task can write down that it has started
    with pytest.raises(SoftTimeLimitExceeded):
        stage.call("work", 20, soft_time_limit=0.3).get(timeout=10)
    assert "Soft time limit (0.3s) exceeded for work[" in worker.log()
    assert stage.call("work").get(timeout=10) == 2
    assert worker.children() == [pid]


def test_the_hard_limit_ends_a_task_that_ignores_the_soft_one(stage: Stage) -> None:
    stage.start_worker("-c", "1")
    with pytest.raises(TimeLimitExceeded):
        stage.call("ignores_soft_limit", 20, soft_time_limit=0.3, time_limit=1).get(timeout=10)
    assert [entry.what for entry in stage.ledger.entries()] == ["start", "stopped"]
    assert time.time() - started_at(stage, 0) <= 1 + MARGIN_S


def test_a_task_within_its_limits_is_left_alone(stage: Stage) -> None:
    stage.start_worker("-c", "2", "--time-limit", "0.4", "--soft-time-limit", "0.3")
    # Together far longer than a limit: each call's clock starts with the call.
    numbers = stage.send(40, "work", 0.05)
    stage.wait_for(numbers, 20)
    verdict = stage.verdict("40 tasks of 50 ms under limits of 300 and 400 ms")
    assert not verdict.lost
    assert not verdict.started_twice
