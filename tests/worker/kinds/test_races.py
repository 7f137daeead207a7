"""Ends that come at the same moment, and calls that do not want to end, in every kind of pool."""

from __future__ import annotations

import psutil
import pytest

from tests.support.kinds import CALLS, PATIENCE_S, Field
from tests.support.stage import until


def check_quiet(field: Field) -> None:
    """Raise when the worker does not do as at first: as many calls at a time as were asked for, in living processes."""
    gate = field.gate()
    results = field.call_many(2 * CALLS, "until", str(gate))
    numbers = field.last(2 * CALLS)
    field.wait_for_running(numbers[:CALLS])
    field.stays(lambda: len({*numbers} & field.ledger.running().keys()) == CALLS, 0.3, "as many run as were asked for")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == numbers
    field.stage.wait_for_settled()
    took_part = {entry.pid for entry in field.ledger.entries()}
    until(
        lambda: took_part & {*psutil.pids()} <= {*field.processes()}, PATIENCE_S, "those that were replaced have ended"
    )
    assert field.stage.workers[0].exit_code is None


def test_calls_that_end_at_their_hard_limit(field: Field) -> None:
    field.start_reliable()
    results = field.call_many(24, "work", 0.3, time_limit=0.3)
    ends = {field.error_of(result) for result in results}
    assert ends <= {"", "TimeLimitExceeded"}
    check_quiet(field)


def test_calls_that_end_as_they_are_revoked(field: Field) -> None:
    field.start_reliable()
    results = field.call_many(40, "work", 0.05)
    for result in results:
        field.ask("revoke", task_id=result.id, terminate=True)
    ends = {field.error_of(result) for result in results}
    assert ends <= {"", "TaskRevoked"}
    check_quiet(field)


def test_all_that_run_can_be_revoked_at_once(field: Field) -> None:
    field.start_reliable()
    results = field.call_many(CALLS, "work", 60)
    field.wait_for_running(range(CALLS))
    field.ask("revoke", task_id=[result.id for result in results], terminate=True)
    assert [field.error_of(result) for result in results] == ["TaskRevoked"] * CALLS
    check_quiet(field)


@pytest.mark.parametrize("how", ["limit", "revoke"])
def test_calls_that_go_on_whatever_is_raised_are_ended_and_cost_no_other(field: Field, how: str) -> None:
    """More of them than deaths that a call may see."""
    field.start_reliable()
    gate = field.gate()
    other = field.call("until", str(gate))
    for _ in range(4):
        stubborn = field.call("stubborn", 60, **({"time_limit": 0.5} if how == "limit" else {}))
        if how == "revoke":
            field.wait_for_running(field.last(1))
            field.ask("revoke", task_id=stubborn.id, terminate=True)
        assert field.error_of(stubborn) == ("TimeLimitExceeded" if how == "limit" else "TaskRevoked")
    until(lambda: 0 in field.ledger.running(), PATIENCE_S, "the first call runs, or runs again")
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == 0
    check_quiet(field)


def test_a_stop_does_not_wait_for_calls_that_go_on_whatever_is_raised(field: Field) -> None:
    worker = field.start_reliable("--grace", "0.5")
    field.send(CALLS, "stubborn", 60)
    field.wait_for_running(range(CALLS))
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    until(lambda: field.stage.depth() == CALLS, PATIENCE_S, "all are in the queue")
    assert not field.ledger.done()


def test_a_stop_while_limits_strike_loses_nothing(field: Field) -> None:
    worker = field.start_reliable("--grace", "1")
    limited = field.call_many(12, "work", 60, time_limit=0.4)
    free = field.send(60, "work", 0.1)
    assert field.error_of(limited[0]) == "TimeLimitExceeded"
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    field.start_reliable()
    field.stage.wait_for(free, 2 * PATIENCE_S)
    assert [field.error_of(result) for result in limited] == ["TimeLimitExceeded"] * 12
    field.stage.wait_for_settled()
