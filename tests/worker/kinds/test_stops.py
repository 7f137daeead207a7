"""Stops of a worker, in every kind of pool: what runs ends well or is given back, and nothing outlives the worker."""

from __future__ import annotations

import os
import signal

from tests.support.kinds import CALLS, PATIENCE_S, Field, central_and_solo_rows
from tests.support.stage import until


@central_and_solo_rows
def test_a_stop_waits_for_what_runs(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    results = field.call_many(field.kind.most + 2, "until", str(gate))
    field.wait_for_running(range(field.kind.most))
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown", PATIENCE_S)
    gate.touch()
    assert worker.wait() == 0
    worker.wait_for_no_leftovers()
    assert [result.get(timeout=PATIENCE_S) for result in results[: field.kind.most]] == [*range(field.kind.most)]
    assert field.ledger.done().keys() == {*range(field.kind.most)}
    until(lambda: field.stage.depth() == 2, PATIENCE_S, "what had not started is in the queue")


@central_and_solo_rows
def test_what_does_not_end_in_time_is_given_back(field: Field) -> None:
    worker = field.start_reliable("--grace", "1")
    gate = field.gate()
    results = field.call_many(field.kind.most, "until", str(gate))
    field.wait_for_running(range(field.kind.most))
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    until(lambda: field.stage.depth() == field.kind.most, PATIENCE_S, "all are in the queue")
    assert not field.ledger.done()
    assert "running tasks did not end within 1" in worker.log()
    gate.touch()
    field.start_reliable()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(field.kind.most)]
    field.stage.wait_for_settled()


def test_a_stop_does_not_wait_for_what_is_stuck_in_c(field: Field) -> None:
    worker = field.start_reliable("--grace", "1")
    field.send(1, "stuck", 60)
    field.wait_for_running([0])
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    until(lambda: field.stage.depth() == 1, PATIENCE_S, "it is in the queue")


def test_a_second_stop_gives_what_runs_back(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    results = field.call_many(CALLS, "until", str(gate))
    field.wait_for_running(range(CALLS))
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown", PATIENCE_S)
    worker.signal(signal.SIGTERM)
    assert worker.wait() != 0
    worker.wait_for_no_leftovers()
    until(lambda: field.stage.depth() == CALLS, PATIENCE_S, "all are in the queue")
    gate.touch()
    field.start_reliable()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(CALLS)]
    field.stage.wait_for_settled()


def test_stops_under_load_lose_nothing(field: Field) -> None:
    worker = field.start_reliable(calls=20)
    field.send(600, "work", 0.02)
    for _ in range(2):
        field.ledger.wait_for_done(len(field.ledger.done()) + 60, PATIENCE_S)
        assert worker.stop() == 0
        worker.wait_for_no_leftovers()
        assert not field.ledger.running()
        worker = field.start_reliable(calls=20)
    field.stage.wait_for(field.stage.sent, 2 * PATIENCE_S)
    field.stage.wait_for_settled()
    verdict = field.stage.verdict("stops under load")
    assert not verdict.lost
    assert not verdict.started_twice


def test_signals_to_a_process_that_runs_calls_do_nothing_to_them(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    results = field.call_many(CALLS, "until", str(gate))
    field.wait_for_running(range(CALLS))
    pids = {entry.pid for entry in field.ledger.entries()}
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    field.stays(lambda: len(field.ledger.running()) == CALLS, 0.5, "they run on")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(CALLS)]
    assert field.ledger.started() == dict.fromkeys(range(CALLS), 1)
    assert worker.exit_code is None
