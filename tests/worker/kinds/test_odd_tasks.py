"""Tasks that do what few do, in every kind of pool: the call ends, its caller hears of it, and all others go on."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.kinds import CALLS, PATIENCE_S, Field, rows, solo_too
from tests.support.stage import until
from tests.support.tasks_for_kinds import SENT_BY_TASKS


def test_large_results_of_many_calls_arrive_whole(shared: Field) -> None:
    size = 1 << 20
    results = shared.call_many(3 * CALLS, "large", size)
    for number, result in zip(shared.last(3 * CALLS), results, strict=True):
        assert result.get(timeout=PATIENCE_S) == str(number % 10) * size


def test_states_lines_and_calls_of_many_calls_do_not_mix(shared: Field) -> None:
    results = shared.call_many(2 * CALLS, "chatters", 300)
    numbers = shared.last(2 * CALLS)
    assert [result.get(timeout=2 * PATIENCE_S) for result in results] == numbers
    sent = [number + SENT_BY_TASKS for number in numbers]
    shared.stage.wait_for(sent, PATIENCE_S)
    until(lambda: all(shared.ledger.done()[each] == 30 for each in sent), PATIENCE_S, "all have run")


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "Own"])
def test_what_is_no_exception_ends_one_call(field: Field, name: str) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    others = field.call_many(CALLS - 1, "until", str(gate))
    field.wait_for_running(range(CALLS - 1))
    assert field.error_of(field.call("raises", name)) != ""
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in others] == [*range(CALLS - 1)]
    assert field.call("work").get(timeout=PATIENCE_S) == CALLS
    assert max(field.ledger.started()[number] for number in range(CALLS - 1)) == 1
    field.stage.wait_for_settled()
    assert worker.exit_code is None


@solo_too
@pytest.mark.parametrize("what", ["object", "generator", "error", "depth"])
def test_what_cannot_be_told_is_a_failure(shared: Field, what: str) -> None:
    result = shared.call("strange", what)
    assert shared.error_of(result) != ""
    assert result.state == "FAILURE"
    assert shared.call("work").get(timeout=PATIENCE_S) == shared.stage.sent[-1]


def test_the_start_of_a_call_is_told(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(CALLS, "tracked", str(gate))
    for result in results:
        until(lambda result=result: result.state == "STARTED", PATIENCE_S, "it has started")  # type: ignore[misc]
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == shared.last(CALLS)


# Celery's own prefork forbids it; in a fork of eventlet's the green threads of all calls run on.
# A process that was forked in a thread of concurrent.futures, as hosted's are, joins itself at its end, and fails.
@rows(lambda row: row.kind.name not in ("eventlet", "hosted") and (row.kind.shares or row.program == "fastq"))
def test_a_task_can_fork(shared: Field) -> None:
    results = shared.call_many(CALLS, "forks")
    for number, result in zip(shared.last(CALLS), results, strict=True):
        assert result.get(timeout=PATIENCE_S) == [number, 0, [3, 7]]


def test_later_and_expired_calls(shared: Field) -> None:
    gate = shared.gate()
    running = shared.call_many(CALLS, "until", str(gate))
    shared.wait_for_running(shared.last(CALLS))
    expired = shared.call("work", expires=1)
    later = shared.call("work", countdown=1)
    over_unix = time.time() + 1.2
    until(lambda: time.time() > over_unix, PATIENCE_S, "it has expired")
    gate.touch()
    assert shared.error_of(expired) == "TaskRevoked"
    assert later.get(timeout=PATIENCE_S) == shared.stage.sent[-1]
    for result in running:
        result.get(timeout=PATIENCE_S)


@rows(lambda row: row.kind.shares)
def test_a_hundred_started_calls_survive_a_death(field: Field) -> None:
    field.start_reliable(calls=100)
    gate = field.gate()
    field.send(100, "until", str(gate))
    field.wait_for_running(range(100))
    (pid,) = set(field.ledger.running().values())
    os.kill(pid, signal.SIGKILL)
    gate.touch()
    field.stage.wait_for(field.stage.sent, PATIENCE_S)
    field.stage.wait_for_settled()
    assert not field.stage.verdict("kill -9 with 100 started calls").lost


def test_the_pool_scales_by_itself(field: Field) -> None:
    worker = field.start_reliable("--autoscale", f"{2 * CALLS},1")
    gate = field.gate()
    results = field.call_many(2 * CALLS, "until", str(gate))
    until(lambda: len(field.ledger.running()) >= CALLS, 2 * PATIENCE_S, "it has grown")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(2 * CALLS)]
    assert worker.exit_code is None
