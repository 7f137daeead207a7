"""Calls that run at the same time, in every kind of pool: how many, which is which, whose outcome is whose."""

from __future__ import annotations

from pathlib import Path

from tests.support.kinds import (
    CALLS,
    PATIENCE_S,
    Field,
    central_and_solo_rows,
    central_rows,
    rows,
    sharing_rows,
    some_and_solo_rows,
)
from tests.support.stage import until


@central_and_solo_rows
def test_as_many_calls_run_at_a_time_as_were_asked_for(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(2 * shared.kind.most, "until", str(gate))
    numbers = shared.last(2 * shared.kind.most)
    shared.wait_for_running(numbers[: shared.kind.most])
    shared.stays(lambda: len(shared.ledger.running()) == shared.kind.most, 0.5, "no more run than were asked for")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == numbers


@central_rows
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


@central_and_solo_rows
def test_each_call_is_itself_while_others_run(shared: Field) -> None:
    """Request, running task, context variables."""
    gate = shared.gate()
    results = shared.call_many(shared.kind.most, "who", str(gate))
    numbers = shared.last(shared.kind.most)
    shared.wait_for_running(numbers)
    gate.touch()
    name = shared.kind.task("who")
    for number, result in zip(numbers, results, strict=True):
        assert result.get(timeout=PATIENCE_S) == {
            "before": None,
            "seen": [[result.id, result.id, name, number, number]],
        }


@some_and_solo_rows
def test_calls_of_one_place_run_in_the_order_in_which_they_were_sent(field: Field) -> None:
    field.start(calls=1)
    numbers = field.send(40, "work", 0.01)
    field.stage.wait_for(numbers, PATIENCE_S)
    entries = sorted(field.ledger.entries(), key=lambda entry: entry.at_unix)
    assert [entry.number for entry in entries if entry.what == "start"] == numbers


@sharing_rows  # where calls come one after the other, a variable stays as Celery's does
def test_a_context_variable_of_an_ended_call_is_gone(shared: Field) -> None:
    gate: Path = shared.gate()
    gate.touch()
    for _ in range(2 * CALLS):
        assert shared.call("who", str(gate)).get(timeout=PATIENCE_S)["before"] is None


@sharing_rows
def test_every_process_has_that_many_places(field: Field) -> None:
    processes = "--async-processes" if field.kind.others else "--processes"
    worker = field.start(processes, "2", calls=2)
    gate = field.gate()
    results = field.call_many(6, "until", str(gate))
    until(lambda: len(field.ledger.running()) == 4, PATIENCE_S, "as many run as both have places")
    field.stays(lambda: len(field.ledger.running()) == 4, 0.3, "no more run than both have places")
    pids = [*field.ledger.running().values()]
    pool = field.ask("stats")["pool"]
    gate.touch()
    assert sorted(map(pids.count, {*pids})) == [2, 2]
    assert pool["max-concurrency"] == 4 + field.kind.others
    assert {*pids} <= {*pool["processes"]}
    assert len(pool["processes"]) == 2 + field.kind.others
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(6)]
    assert worker.exit_code is None


@rows(lambda row: row.kind.name in ("gevent", "eventlet"))
def test_sockets_are_patched_before_the_application_is_imported_and_not_in_the_main_process(field: Field) -> None:
    worker = field.start()
    at_import, now = field.call("sockets").get(timeout=PATIENCE_S)
    assert at_import == now
    assert now.partition(".")[0] == field.kind.name
    assert worker.stop() == 0
    worker.wait_for_log(f"sockets of {worker.pid}: socket, socket\n", PATIENCE_S)
