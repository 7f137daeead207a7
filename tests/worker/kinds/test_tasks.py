"""What tasks do, in every kind of pool: retries, states, errors, calls of their own, lines in the log, subprocesses."""

from __future__ import annotations

import re

from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.kinds import CALLS, PATIENCE_S, Field, rows, solo_too, some_and_solo_rows
from tests.support.stage import until
from tests.support.tasks_for_kinds import SENT_BY_TASKS


@solo_too
def test_an_error_reaches_the_caller_with_its_traceback(shared: Field) -> None:
    results = shared.call_many(2 * CALLS, "fail")
    for number, result in zip(shared.last(2 * CALLS), results, strict=True):
        error = result.get(timeout=PATIENCE_S, propagate=False)
        assert (type(error), str(error)) == (ValueError, f"number {number} is bad")
        assert "raise ValueError" in (result.traceback or "")
        assert (result.traceback or "").rstrip().endswith(f"ValueError: number {number} is bad")


@solo_too
def test_a_call_with_wrong_arguments_fails(shared: Field) -> None:
    result = shared.call("work", 0, "one", "too", "many")
    assert shared.error_of(result) == "TypeError"


@solo_too
def test_a_task_can_retry(shared: Field) -> None:
    results = shared.call_many(CALLS, "again")
    assert [result.get(timeout=PATIENCE_S) for result in results] == [2] * CALLS
    started = shared.ledger.started()
    assert [started[number] for number in shared.last(CALLS)] == [3] * CALLS


@solo_too
def test_errors_are_retried_by_themselves(shared: Field) -> None:
    good, bad = shared.call("again_by_itself", 2), shared.call("again_by_itself", 9)
    assert good.get(timeout=PATIENCE_S) == 2
    assert shared.error_of(bad) == "OSError"
    assert shared.ledger.started()[shared.stage.sent[-1]] == 3


@some_and_solo_rows
def test_a_rejected_message_is_not_run_again(field: Field) -> None:
    field.start_reliable()
    field.send(CALLS, "rejects")
    assert len(field.stage.dead_letters(CALLS, PATIENCE_S)) == CALLS
    assert field.ledger.started() == dict.fromkeys(range(CALLS), 1)
    field.stage.wait_for_settled()


@solo_too
def test_a_call_that_ignores_its_end_leaves_its_state(shared: Field) -> None:
    result = shared.call("ignores")
    until(lambda: result.state == "BY_HAND", PATIENCE_S, "the state is that which the task has set")
    assert result.result == {"number": shared.stage.sent[-1]}
    gate = shared.gate()
    gate.touch()
    assert shared.call("until", str(gate)).get(timeout=PATIENCE_S) == shared.stage.sent[-1]
    assert result.state == "BY_HAND"


def test_states_that_a_task_sets_reach_the_caller(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(CALLS, "progresses", str(gate))
    for number, result in zip(shared.last(CALLS), results, strict=True):
        until(lambda result=result: result.state == "PROGRESS", PATIENCE_S, "the call has told of its progress")  # type: ignore[misc]
        assert result.result == {"number": number}
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == shared.last(CALLS)


@solo_too
def test_a_task_can_send_calls(shared: Field) -> None:
    result = shared.call("sends", 3)
    number = shared.stage.sent[-1]
    assert len(result.get(timeout=PATIENCE_S)) == 3
    shared.stage.wait_for([number + SENT_BY_TASKS * index for index in (1, 2, 3)], PATIENCE_S)


@rows(lambda row: row.broker == "amqp")  # what a dead worker had on Redis waits for its lease to end
def test_what_a_task_sends_is_sent_before_the_task_is_settled(field: Field) -> None:
    worker = field.start_reliable()
    numbers = field.send(200, "sends", 2)
    field.ledger.wait_for_done(60, PATIENCE_S)
    worker.kill9()
    field.start_reliable()
    field.stage.wait_for([*numbers, *(number + SENT_BY_TASKS * n for n in (1, 2) for number in numbers)], 60)


@some_and_solo_rows
def test_a_malformed_message_ends_nothing(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    results = field.call_many(field.kind.most - 1, "until", str(gate))
    field.wait_for_running(range(field.kind.most - 1))
    name = field.kind.task("work")
    bodies = (b"[[1], 5, {}]", b"no json", b"null", b"[]", b"[5, {}, {}]", b'[["x' + b'"' * 9)
    ids = [new_id() for _ in bodies]
    field.stage.publish([encode_task(name, task_id, body) for task_id, body in zip(ids, bodies, strict=True)])
    field.stage.publish([encode_task("no.such.task", new_id(), b"[[], {}, {}]")])
    assert len(field.stage.dead_letters(len(bodies) + 1, PATIENCE_S)) == len(bodies) + 1
    if field.row.broker == "redis":  # its answers need no queue to go to
        for task_id in ids:
            assert field.stage.client.AsyncResult(task_id).state == "FAILURE", task_id
    gate.touch()
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(field.kind.most - 1)]
    assert field.call("work").get(timeout=PATIENCE_S) == field.kind.most - 1
    assert field.ledger.started() == dict.fromkeys(range(field.kind.most), 1)
    field.stage.wait_for_settled()
    assert worker.exit_code is None


def test_the_process_is_a_good_place_for_a_task(shared: Field) -> None:
    found = shared.call("where").get(timeout=PATIENCE_S)
    assert found["stdin"] == "/dev/null"
    assert found["subprocess"] == ["SIG_DFL", "0"]
    assert found["pid"] != shared.stage.workers[0].pid


@solo_too
def test_lines_of_the_log_name_their_calls_while_others_run(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(shared.kind.most, "logs", str(gate))
    numbers = shared.last(shared.kind.most)
    shared.wait_for_running(numbers)
    gate.touch()
    for result in results:
        result.get(timeout=PATIENCE_S)
    log = shared.stage.workers[0].log()
    name = re.escape(shared.kind.task("logs"))
    for number, result in zip(numbers, results, strict=True):
        for line in (f"number {number} is here", f"number {number} goes"):
            assert re.search(rf"{name}\[{result.id}\]: {line}", log), re.findall(f".*{line}.*", log)


@solo_too
def test_what_runs_is_listed(shared: Field) -> None:
    gate = shared.gate()
    results = shared.call_many(shared.kind.most, "until", str(gate))
    numbers = shared.last(shared.kind.most)
    shared.wait_for_running(numbers)
    active = shared.ask("active")
    stats = shared.ask("stats")["pool"]
    gate.touch()
    assert {each["id"] for each in active} == {result.id for result in results}
    assert {each["name"] for each in active} == {shared.kind.task("until")}
    running = {entry.pid for entry in shared.ledger.entries() if entry.number in numbers}
    assert {each["worker_pid"] for each in active} == running
    assert running <= {*stats["processes"]}
    assert stats["max-concurrency"] == shared.kind.most + shared.kind.others
    for result in results:
        result.get(timeout=PATIENCE_S)
    until(lambda: shared.ask("active") == [], PATIENCE_S, "nothing runs")
