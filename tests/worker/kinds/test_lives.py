"""Processes that are replaced, more of them and fewer, in every kind of pool: what runs there ends well."""

from __future__ import annotations

import re

import psutil

from tests.support.kinds import CALLS, PATIENCE_S, Field, central_rows, rows, sharing_rows
from tests.support.stage import until


@central_rows
def test_a_process_is_replaced_after_so_many_calls(field: Field) -> None:
    worker = field.start_reliable("--max-tasks-per-child", "7")
    gate = field.gate()
    gate.touch()
    field.send(50, "logs", str(gate))
    field.stage.wait_for(field.stage.sent, 2 * PATIENCE_S)
    field.stage.wait_for_settled()
    verdict = field.stage.verdict("--max-tasks-per-child 7")
    assert not verdict.lost
    assert not verdict.started_twice
    entries = [entry for entry in field.ledger.entries() if entry.what == "start"]
    counts = {pid: sum(entry.pid == pid for entry in entries) for pid in {entry.pid for entry in entries}}
    assert max(counts.values()) <= 7, counts
    assert worker.exit_code is None
    named = {int(number) for number in re.findall(r"PoolWorker-(\d+)\] logs\S*: number", worker.log())}
    # Those that take calls while the ones before them end have numbers of their own.
    assert named <= set(range(1, CALLS + len(field.processes()) + 1))
    until(lambda: not {*counts} - {*field.processes()} & {*psutil.pids()}, PATIENCE_S, "those that were replaced ended")


@sharing_rows
def test_a_long_call_in_a_process_that_is_replaced_ends_there(field: Field) -> None:
    field.start_reliable("--max-tasks-per-child", "5")
    gate = field.gate()
    long = field.call("until", str(gate))
    field.wait_for_running([0])
    others = field.call_many(30, "work", 0.01)
    assert [result.get(timeout=PATIENCE_S) for result in others] == field.last(30)
    gate.touch()
    assert long.get(timeout=PATIENCE_S) == 0
    assert max(field.ledger.started().values()) == 1


def test_no_more_calls_run_while_processes_are_replaced(field: Field) -> None:
    field.start_reliable("--max-tasks-per-child", str(CALLS))
    gate = field.gate()
    results = field.call_many(4 * CALLS, "until", str(gate))
    field.wait_for_running(range(CALLS))
    field.stays(lambda: len(field.ledger.running()) == CALLS, 1, "no more run than were asked for")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(4 * CALLS)]


def test_a_process_that_has_grown_is_replaced(field: Field) -> None:
    field.start_reliable("--max-memory-per-child", "250000")
    gate = field.gate()
    long = field.call("until", str(gate))
    field.wait_for_running([0])
    pids = []
    for _ in range(3):
        pids.append(field.call("grow", 250).get(timeout=PATIENCE_S))
        # Celery's receivers of signals run between the result and the end.
        until(lambda: pids[-1] not in field.processes(), PATIENCE_S, "another one takes its place")
    assert len(set(pids)) == 3
    assert field.call("work").get(timeout=PATIENCE_S) == 4
    gate.touch()
    assert long.get(timeout=PATIENCE_S) == 0
    assert field.ledger.started()[0] == 1
    until(lambda: not {*pids} & {*psutil.pids()}, PATIENCE_S, "those that have grown have ended")


@rows(lambda row: not row.kind.others)
def test_the_pool_grows_and_shrinks(field: Field) -> None:
    field.start_reliable()
    field.ask("pool_grow", n=CALLS)
    gate = field.gate()
    results = field.call_many(3 * CALLS, "until", str(gate))
    until(lambda: len(field.ledger.running()) == 2 * CALLS, PATIENCE_S, "twice as many run")
    assert field.ask("stats")["pool"]["max-concurrency"] == 2 * CALLS
    field.ask("pool_shrink", n=CALLS)
    assert field.ask("stats")["pool"]["max-concurrency"] == CALLS
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(3 * CALLS)]
    assert max(field.ledger.started().values()) == 1
    gate = field.gate()
    results = field.call_many(2 * CALLS, "until", str(gate))
    field.wait_for_running(field.last(2 * CALLS)[:CALLS])
    field.stays(lambda: len(field.ledger.running()) == CALLS, 0.3, "no more run than are left")
    gate.touch()
    for result in results:
        result.get(timeout=PATIENCE_S)


@rows(lambda row: bool(row.kind.others))
def test_the_children_for_other_tasks_grow_and_shrink(field: Field) -> None:
    field.start_reliable()
    before = field.ask("stats")["pool"]["max-concurrency"]
    field.ask("pool_grow", n=2)
    until(lambda: field.ask("stats")["pool"]["max-concurrency"] == before + 2, PATIENCE_S, "it has grown")
    field.stage.send(3, "plain_beside", 0.5)
    until(lambda: len(field.ledger.running()) == 3, PATIENCE_S, "three run")
    field.ask("pool_shrink", n=2)
    assert field.ask("stats")["pool"]["max-concurrency"] == before
    field.stage.wait_for(field.stage.sent, PATIENCE_S)


def test_all_processes_can_be_replaced_at_once(field: Field) -> None:
    worker = field.start_reliable(worker_pool_restarts=True)
    gate = field.gate()
    results = field.call_many(CALLS, "until", str(gate))
    field.wait_for_running(range(CALLS))
    before = {*field.ledger.running().values()}
    field.ask("pool_restart")
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(CALLS)]
    assert field.ledger.started() == dict.fromkeys(range(CALLS), 1)
    until(lambda: not before & {*psutil.pids()}, PATIENCE_S, "they have ended")
    assert field.call("work").get(timeout=PATIENCE_S) == CALLS
    assert worker.exit_code is None
