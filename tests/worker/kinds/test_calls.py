"""Calls that run at the same time, in every kind of pool: how many, which is which, whose outcome is whose."""

from __future__ import annotations

from pathlib import Path

from tests.support.kinds import CALLS, PATIENCE_S, Field, sharing_rows


def test_as_many_calls_run_at_a_time_as_were_asked_for(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(2 * CALLS, "until", str(gate))
    numbers = shared.last(2 * CALLS)
    shared.wait_for_running(numbers[:CALLS])
    shared.stays(lambda: len(shared.ledger.running()) == CALLS, 0.5, "no more run than were asked for")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == numbers


def test_outcomes_reach_their_callers_in_any_order(shared: Field) -> None:
    gates = [shared.gate() for _ in range(CALLS)]
    results = [shared.call("until", str(gate)) for gate in gates]
    numbers = shared.last(CALLS)
    shared.wait_for_running(numbers)
    for gate, result, number in reversed([*zip(gates, results, numbers, strict=True)]):
        gate.touch()
        assert result.get(timeout=PATIENCE_S) == number
        # Those that began before go on.
        assert set(shared.ledger.running()) == {each for each in numbers if each < number}


def test_each_call_is_itself_while_others_run(shared: Field) -> None:
    """Request, running task, context variables."""
    gate = shared.gate()
    results = shared.call_many(CALLS, "who", str(gate))
    numbers = shared.last(CALLS)
    shared.wait_for_running(numbers)
    gate.touch()
    name = shared.kind.task("who")
    for number, result in zip(numbers, results, strict=True):
        assert result.get(timeout=PATIENCE_S) == {
            "before": None,
            "seen": [[result.id, result.id, name, number, number]],
        }


@sharing_rows  # where calls come one after the other, a variable stays as Celery's does
def test_a_context_variable_of_an_ended_call_is_gone(shared: Field) -> None:
    gate: Path = shared.gate()
    gate.touch()
    for _ in range(2 * CALLS):
        assert shared.call("who", str(gate)).get(timeout=PATIENCE_S)["before"] is None
