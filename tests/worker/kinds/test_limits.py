"""Limits and revocation, in every kind of pool: who is ended, and that nobody else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kinds import (
    CALLS,
    PATIENCE_S,
    Field,
    central_and_solo_rows,
    central_rows,
    rows,
    solo_too,
    some_and_solo_rows,
)
from tests.support.stage import until
from tests.support.tasks_for_kinds import STOPPED


def stops_seen(field: Field) -> list[int]:
    """Return the numbers of the calls that have seen their soft limit."""
    return [entry.number for entry in field.ledger.entries() if entry.what == STOPPED.rstrip(b"\0").decode()]


@central_rows
def test_a_soft_limit_can_be_caught(shared: Field) -> None:
    gate = shared.gate()
    other = shared.call("until", str(gate))
    results = shared.call_many(CALLS - 1, "stops_in_time", 60, soft_time_limit=1)
    for result in results:
        assert result.get(timeout=PATIENCE_S) == "stopped in time"
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == other_number(shared, CALLS)
    assert sorted(stops_seen(shared))[-CALLS + 1 :] == shared.last(CALLS - 1)


@central_and_solo_rows
def test_a_soft_limit_that_nobody_catches_is_a_failure(shared: Field) -> None:
    result = shared.call("work", 2, soft_time_limit=0.5)
    assert shared.error_of(result) == "SoftTimeLimitExceeded"
    assert result.state == "FAILURE"
    # Nothing of it is left for those that come after.
    assert [each.get(timeout=PATIENCE_S) for each in shared.call_many(CALLS, "work", 0.05)] == shared.last(CALLS)


@solo_too
def test_a_call_that_ends_at_its_soft_limit_harms_no_other(shared: Field) -> None:
    """It comes just before the end or just after it."""
    results = shared.call_many(60, "work", 0.1, soft_time_limit=0.1)
    ends = [result.get(timeout=2 * PATIENCE_S, propagate=False) for result in results]
    assert {type(end).__name__ for end in ends} <= {"int", "SoftTimeLimitExceeded"}
    assert [each.get(timeout=PATIENCE_S) for each in shared.call_many(CALLS, "work", 0.05)] == shared.last(CALLS)


@rows(lambda row: row.kind.name in ("threads", "hosted"))
def test_a_module_that_is_imported_is_made_whole(shared: Field, tmp_path: Path) -> None:
    """One that is half made would stay with the other calls of the process: a soft limit waits for its end."""
    steps = ["import time", *["time.sleep(0.05)"] * 20, "last = 7"]
    (tmp_path / "slow_module.py").write_text("\n".join(steps), encoding="utf-8")
    results = [shared.call("imports", str(tmp_path), soft_time_limit=0.1 * (1 + n)) for n in range(CALLS)]
    assert [result.get(timeout=PATIENCE_S) for result in results] == ["stopped with 7"] * CALLS


@central_rows
def test_a_hard_limit_ends_one_call(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    others = field.call_many(CALLS - 1, "until", str(gate))
    numbers = field.last(CALLS - 1)
    field.wait_for_running(numbers)
    limited = field.call("work", 60, time_limit=1)
    assert field.error_of(limited) == "TimeLimitExceeded"
    assert limited.state == "FAILURE"
    gate.touch()
    assert [other.get(timeout=PATIENCE_S) for other in others] == numbers
    assert [each.get(timeout=PATIENCE_S) for each in field.call_many(CALLS, "work")] == field.last(CALLS)
    field.stage.wait_for_settled()
    assert worker.exit_code is None


@some_and_solo_rows
def test_a_call_that_goes_on_after_its_soft_limit_meets_the_hard_one(field: Field) -> None:
    worker = field.start_reliable()
    limited = field.call("ignores_soft_limit", 30, soft_time_limit=0.5, time_limit=1.5)
    assert field.error_of(limited) == "TimeLimitExceeded"
    assert stops_seen(field) == [0]
    assert field.call("work").get(timeout=PATIENCE_S) == 1
    assert worker.exit_code is None


def test_a_call_that_is_stuck_in_c_does_not_stop_the_worker(field: Field) -> None:
    """On a loop the others wait meanwhile, and run again."""
    worker = field.start_reliable()
    results = field.call_many(CALLS - 1, "work", 0.2)
    numbers = field.last(CALLS - 1)
    stuck = field.call("stuck", 60, time_limit=1)
    assert field.error_of(stuck) == "TimeLimitExceeded"
    assert [result.get(timeout=PATIENCE_S) for result in results] == numbers
    assert [each.get(timeout=PATIENCE_S) for each in field.call_many(CALLS, "work")] == field.last(CALLS)
    field.stage.wait_for_settled()
    assert worker.exit_code is None


@rows(lambda row: row.kind.name == "threads")
def test_what_runs_on_beside_a_call_that_was_left_behind_runs_again_after_the_grace(field: Field) -> None:
    worker = field.start_reliable("--grace", "2")
    gate = field.gate()
    other = field.call("until", str(gate))
    (number,) = field.last(1)
    field.wait_for_running([number])
    stuck = field.call("stuck", 60, time_limit=1)
    assert field.error_of(stuck) == "TimeLimitExceeded"
    worker.wait_for_log(r"is killed: 1 calls? of it run.* 2 s after one was left behind", PATIENCE_S)
    until(lambda: field.ledger.started()[number] == 2, PATIENCE_S, "it runs again")
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == number
    field.stage.wait_for_settled()
    assert worker.exit_code is None


def test_more_stuck_calls_than_places_do_not_stop_the_worker(field: Field) -> None:
    field.start_reliable(calls=2)
    stuck = field.call_many(5, "stuck", 60, time_limit=1)
    good = field.call_many(5, "work")
    numbers = field.last(5)
    assert [result.get(timeout=2 * PATIENCE_S) for result in good] == numbers
    assert [field.error_of(each) for each in stuck] == ["TimeLimitExceeded"] * 5
    field.stage.wait_for_settled()


def test_a_waiting_call_can_be_revoked(shared: Field) -> None:
    gate = shared.gate()
    running = shared.call_many(CALLS, "until", str(gate))
    shared.wait_for_running(shared.last(CALLS))
    waiting = shared.call("work")
    shared.ask("revoke", task_id=waiting.id)
    gate.touch()
    assert shared.error_of(waiting) == "TaskRevoked"
    assert waiting.state == "REVOKED"
    for result in running:
        result.get(timeout=PATIENCE_S)
    assert shared.stage.sent[-1] not in shared.ledger.started()


@central_rows
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_running_call_can_be_revoked(field: Field, signal: str) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    others = field.call_many(CALLS - 1, "until", str(gate))
    numbers = field.last(CALLS - 1)
    revoked = field.call("work", 60)
    field.wait_for_running([*numbers, *field.last(1)])
    field.ask("revoke", task_id=revoked.id, terminate=True, signal=signal)
    assert field.error_of(revoked) == "TaskRevoked"
    assert revoked.state == "REVOKED"
    gate.touch()
    assert [other.get(timeout=PATIENCE_S) for other in others] == numbers
    assert [each.get(timeout=PATIENCE_S) for each in field.call_many(CALLS, "work")] == field.last(CALLS)
    field.stage.wait_for_settled()
    assert field.ledger.started()[CALLS - 1] == 1
    assert worker.exit_code is None


def test_calls_that_are_revoked_one_after_the_other_cost_nobody_anything(field: Field) -> None:
    """More of them than deaths that a call may see."""
    field.start_reliable()
    gate = field.gate()
    other = field.call("until", str(gate))
    for _ in range(4):
        revoked = field.call("work", 60)
        field.wait_for_running(field.last(1))
        field.ask("revoke", task_id=revoked.id, terminate=True)
        assert field.error_of(revoked) == "TaskRevoked"
    until(lambda: 0 in field.ledger.running(), PATIENCE_S, "the first call runs, or runs again")
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == 0


def other_number(field: Field, back: int) -> int:
    """Return the number of the call that was sent so many before the end."""
    return field.stage.sent[-back]
