"""Single tasks: values, errors, retries, verdicts, times, limits, revoking, the request, task classes, logging."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery.exceptions import (
    MaxRetriesExceededError,
    NotRegistered,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
)
from celery.utils.serialization import UnpickleableExceptionWrapper

from tests.celery.conftest import OpenStage, stages
from tests.celery.proj.errors import Expected, PlainError, TwoArguments
from tests.celery.proj.tasks import Point
from tests.celery.stage import CeleryStage, Servers, counts, opened

TASKS = "tests.celery.proj.tasks"


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param) as stage:
        stage.start_worker("-E")
        yield stage  # the last test stops the worker


def without_times(notes: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Return the notes without what differs between runs."""
    left_out = {"at", "pid", "id", "retries", *keys}
    return [{key: value for key, value in note.items() if key not in left_out} for note in notes]


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_call_returns_the_value(stage: CeleryStage) -> None:
    result = stage.tasks.add.delay(2, 3)
    assert stage.get(result) == 5
    assert result.state == "SUCCESS"
    assert result.successful()
    assert result.ready()


def test_arguments_arrive_as_sent(stage: CeleryStage) -> None:
    args = [1, 2.5, None, True, "ä\x00", [1, [2]], {"a": {"b": []}}, 2**70, -1, ""]
    kwargs = {"key": "value", "ünicode": [None], "n": 10**30}
    assert stage.get(stage.send("echo", *args, kwargs=kwargs)) == {"args": args, "kwargs": kwargs}


def test_defaults_of_the_function_apply(stage: CeleryStage) -> None:
    assert stage.get(stage.tasks.add.apply_async(("x",), {"y": "y"})) == "xy"
    assert stage.get(stage.tasks.add.delay(4)) == 4


def test_none_is_a_result(stage: CeleryStage) -> None:
    result = stage.tasks.nothing.delay()
    assert stage.get(result) is None
    assert result.state == "SUCCESS"


def test_the_caller_chooses_the_id(stage: CeleryStage) -> None:
    result = stage.tasks.dump_request.apply_async(task_id="an id of one's own / 1")
    assert stage.get(result)["id"] == "an id of one's own / 1"


def test_a_megabyte_travels_both_ways(stage: CeleryStage) -> None:
    text = "x" * 1_000_000
    assert stage.get(stage.tasks.identity.delay(text)) == text


def test_a_result_that_json_cannot_say_is_a_failure(stage: CeleryStage) -> None:
    error = stage.error(stage.tasks.unserializable.delay())
    assert type(error).__name__ == "EncodeError"
    assert "is not JSON serializable" in str(error)


def test_results_know_what_their_call_sent(stage: CeleryStage) -> None:
    result = stage.tasks.call_other.delay(1)
    child = stage.get(result)
    assert [one.id for one in result.children] == [child]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("ValueError", ["bad", 2], ValueError),
        ("KeyError", ["key"], KeyError),
        ("PlainError", [], PlainError),
        ("PlainError", [[1, {"a": None}]], PlainError),
        ("TwoArguments", [5, "five"], TwoArguments),
    ],
)
def test_errors_are_rebuilt_by_type_and_arguments(
    stage: CeleryStage, name: str, args: list[Any], kind: type[Exception]
) -> None:
    result = stage.tasks.fail.delay(name, *args)
    error = stage.error(result)
    assert type(error) is kind
    assert list(error.args) == args
    assert result.state == "FAILURE"
    assert result.failed()


def test_get_raises_the_error(stage: CeleryStage) -> None:
    with pytest.raises(TwoArguments, match="five") as caught:
        stage.get(stage.tasks.fail.delay("TwoArguments", 5, "five"))
    assert caught.value.code == 5


def test_the_traceback_shows_the_users_lines_alone(stage: CeleryStage) -> None:
    result = stage.tasks.fail.delay("ValueError", "bad")
    stage.error(result)
    lines = result.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: bad"
    assert re.search(r'File ".*tests/celery/proj/tasks\.py", line \d+, in fail$', result.traceback, re.M)


def test_the_traceback_tells_the_cause(stage: CeleryStage) -> None:
    result = stage.tasks.fail_with_cause.delay()
    assert isinstance(stage.error(result), PlainError)
    assert "KeyError: 'missing'" in result.traceback
    assert "The above exception was the direct cause" in result.traceback


def test_an_error_that_cannot_be_rebuilt_keeps_its_name(stage: CeleryStage) -> None:
    error = stage.error(stage.tasks.fail_hiding_arguments.delay())
    assert "HidesArguments" in f"{type(error).__name__} {error!r}"


def test_arguments_of_an_error_that_json_cannot_say_become_text(stage: CeleryStage) -> None:
    error = stage.error(stage.tasks.fail_with_object.delay())
    assert type(error) is PlainError
    assert re.fullmatch(r"<object object at 0x[0-9a-f]+>", error.args[0])


def test_an_error_of_a_class_nobody_can_import_keeps_its_name(stage: CeleryStage) -> None:
    error = stage.error(stage.tasks.fail_with_local_class.delay())
    assert isinstance(error, UnpickleableExceptionWrapper)
    assert (error.exc_module, error.exc_cls_name, error.exc_args) == (f"{TASKS}", "Local", ("inside",))


def test_an_expected_error_is_logged_without_a_traceback(stage: CeleryStage) -> None:
    result = stage.tasks.fail_as_expected.delay()
    assert type(stage.error(result)) is Expected
    stage.worker.wait_for_log(rf"INFO/\S+\] Task {TASKS}\.fail_as_expected\[{result.id}\] raised expected: Expected")
    line = stage.worker.log().split(f"fail_as_expected[{result.id}] raised expected")[1].split("\n[")[0]
    assert "Traceback" not in line


def test_an_unexpected_error_is_logged_with_its_traceback(stage: CeleryStage) -> None:
    result = stage.tasks.fail.delay("ValueError", "logged")
    stage.error(result)
    stage.worker.wait_for_log(
        rf"ERROR/\S+\] Task {TASKS}\.fail\[{result.id}\] raised unexpected: ValueError\('logged'\)\nTraceback"
    )


def test_wrong_arguments_are_a_type_error(stage: CeleryStage) -> None:
    error = stage.error(stage.send("add", 1, 2, 3))
    assert isinstance(error, TypeError)
    assert "add() takes from 1 to 2 positional arguments but 3 were given" in str(error)


def test_an_unknown_task_is_a_failure_and_the_worker_lives(stage: CeleryStage) -> None:
    result = stage.send("nobody_knows")
    error = stage.error(result)
    assert isinstance(error, NotRegistered)
    assert error.args == (f"{TASKS}.nobody_knows",)
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    stage.worker.wait_for_log(r"Received unregistered task of type '.*nobody_knows'")


# --- retries ----------------------------------------------------------------------------------------------------------


def test_retry_runs_the_same_call_again(stage: CeleryStage) -> None:
    result = stage.tasks.retry_until.delay(2)
    assert stage.get(result) == 2
    attempts = stage.notes("attempt", id=result.id)
    assert [note["retries"] for note in attempts] == [0, 1, 2]
    assert {note["delivery"]["redelivered"] for note in attempts} <= {False, None}


def test_retry_waits_for_its_countdown(stage: CeleryStage) -> None:
    result = stage.tasks.retry_until.delay(1, countdown=1.0)
    stage.get(result)
    first, second = stage.notes("attempt", id=result.id)
    assert 1.0 <= second["at"] - first["at"] < 5.0


def test_too_many_retries_raise_the_given_error(stage: CeleryStage) -> None:
    result = stage.tasks.retry_until.delay(99)
    error = stage.error(result)
    assert type(error) is PlainError
    assert error.args == ("attempt 3",)
    assert len(stage.notes("attempt", id=result.id)) == 4


def test_too_many_retries_without_an_error_say_so(stage: CeleryStage) -> None:
    result = stage.tasks.retry_without_error.delay()
    error = stage.error(result)
    assert type(error) is MaxRetriesExceededError
    assert f"Can't retry {TASKS}.retry_without_error[{result.id}] args:() kwargs:{{}}" in str(error)
    assert len(stage.notes("attempt", id=result.id)) == 2


def test_retry_in_an_except_block_tells_that_error_in_the_traceback(stage: CeleryStage) -> None:
    result = stage.tasks.retry_from_except.delay()
    assert type(stage.error(result)) is MaxRetriesExceededError
    assert "TwoArguments: (5, 'five')" in result.traceback


def test_retry_may_change_the_arguments(stage: CeleryStage) -> None:
    value = stage.get(stage.tasks.retry_with_other_arguments.delay(1, other=2))
    assert value == {"args": [1, "more"], "kwargs": {"again": True}, "retries": 1}


def test_retry_without_throw_lets_the_call_end(stage: CeleryStage) -> None:
    result = stage.tasks.retry_without_throw.delay()
    stage.wait_for_notes("attempt", 2, id=result.id)
    assert stage.get(result) in {"first: Retry", "second"}
    stage.wait_for_empty()


def test_named_errors_are_retried_with_backoff(stage: CeleryStage) -> None:
    result = stage.tasks.autoretried.delay()
    assert stage.get(result) == "after 1"
    first, second = stage.notes("attempt", id=result.id)
    assert 1.0 <= second["at"] - first["at"] < 5.0  # 1 s times 2 to the 0


def test_errors_excepted_from_retrying_fail_at_once(stage: CeleryStage) -> None:
    result = stage.tasks.autoretried.delay("KeyError")
    assert isinstance(stage.error(result), KeyError)
    assert len(stage.notes("attempt", id=result.id)) == 1


def test_without_a_maximum_there_is_no_end_to_retries(stage: CeleryStage) -> None:
    assert stage.get(stage.tasks.retry_for_ever.delay(12)) == 12


def test_a_retry_is_logged_and_seen_as_a_state(stage: CeleryStage) -> None:
    result = stage.tasks.retry_until.delay(1, countdown=1.5)
    meta = stage.wait_for_state(result, "RETRY")
    assert isinstance(stage.client.backend.exception_to_python(meta["result"]), PlainError)
    assert stage.get(result) == 1
    stage.worker.wait_for_log(
        rf"Task {TASKS}\.retry_until\[{result.id}\] retry: Retry in 1\.5s: PlainError\('attempt 0'\)"
    )


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_ignore_leaves_no_state_and_is_acknowledged(stage: CeleryStage) -> None:
    result = stage.tasks.ignore.delay()
    stage.wait_for_notes("ran", id=result.id)
    stage.wait_for_empty()
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2  # so that what was to come has come
    assert result.state == "PENDING"
    stage.worker.wait_for_log(rf"Task {TASKS}\.ignore\[{result.id}\] ignored")


def test_ignore_keeps_the_state_that_the_task_set(stage: CeleryStage) -> None:
    result = stage.tasks.ignore_after_state.delay()
    assert stage.wait_for_state(result, "CUSTOM")["result"] == {"seen": True}
    stage.worker.wait_for_log(rf"Task {TASKS}\.ignore_after_state\[{result.id}\] ignored")


def test_reject_with_requeue_runs_again(stage: CeleryStage) -> None:
    result = stage.tasks.reject.delay(True)
    assert stage.get(result) == "second time"
    assert [note["redelivered"] for note in stage.notes("ran", id=result.id)] == [False, True]


@pytest.mark.since("5.7", "no result is stored for a call that was rejected")
def test_reject_without_requeue_is_a_failure(stage: CeleryStage) -> None:
    result = stage.tasks.reject.delay(False)
    error = stage.error(result)
    assert (type(error).__name__, error.args[:1]) == ("Reject", ("not now",))
    assert len(stage.notes("ran", id=result.id)) == 1
    stage.wait_for_empty()


def test_reject_comes_too_late_for_a_call_acknowledged_early(stage: CeleryStage) -> None:
    result = stage.tasks.reject_early.delay()
    stage.wait_for_notes("ran", id=result.id)
    stage.wait_for_empty()
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    assert len(stage.notes("ran", id=result.id)) == 1


# --- times ------------------------------------------------------------------------------------------------------------


def test_a_countdown_is_waited_for(stage: CeleryStage) -> None:
    began = time.time()
    result = stage.tasks.note_time.apply_async(countdown=1)
    assert 1.0 <= stage.get(result) - began < 5.0


@pytest.mark.parametrize("zone", [timezone.utc, timezone(timedelta(hours=-9, minutes=30))])
def test_an_eta_is_an_instant_in_any_zone(stage: CeleryStage, zone: timezone) -> None:
    eta = datetime.now(zone) + timedelta(seconds=1)
    result = stage.tasks.note_time.apply_async(eta=eta)
    assert 0.0 <= stage.get(result) - eta.timestamp() < 4.0


def test_an_eta_in_the_past_is_now(stage: CeleryStage) -> None:
    began = time.time()
    result = stage.tasks.note_time.apply_async(eta=datetime(2001, 1, 1, tzinfo=timezone.utc))
    assert 0.0 <= stage.get(result) - began < 10.0


def test_calls_with_an_eta_let_others_pass(stage: CeleryStage) -> None:
    later = [stage.tasks.note_time.apply_async((f"later {number}",), countdown=2) for number in range(30)]
    began = time.time()
    assert stage.get(stage.tasks.note_time.delay("now")) - began < 1.9
    assert all(stage.get(result) for result in later)


def test_a_call_expired_while_waiting_is_revoked(stage: CeleryStage) -> None:
    result = stage.tasks.note_time.apply_async(countdown=1, expires=0.3)
    error = stage.error(result)
    assert type(error) is TaskRevokedError
    assert error.args == ("expired",)
    assert result.state == "REVOKED"
    assert stage.notes("ran", id=result.id) == []
    stage.worker.wait_for_log(rf"Discarding revoked task: {TASKS}\.note_time\[{result.id}\]")


def test_a_call_in_time_does_not_expire(stage: CeleryStage) -> None:
    result = stage.tasks.note_time.apply_async(expires=datetime.now(timezone.utc) + timedelta(seconds=60))
    assert stage.get(result) > 0


def test_calls_are_limited_in_their_rate(stage: CeleryStage) -> None:
    results = [stage.tasks.rate_limited.delay(number) for number in range(6)]
    for result in results:
        stage.get(result)
    notes = sorted(stage.notes("limited"), key=lambda note: note["at"])
    assert len(notes) == 6
    # Five per second: the sixth starts a second after the first, when the bucket holds one token.
    assert 0.8 <= notes[-1]["at"] - notes[0]["at"] < 5.0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(("fastq", "amqp", "disabled"), id="amqp", marks=pytest.mark.rabbitmq),
        pytest.param(("fastq", "redis", "disabled"), id="redis", marks=pytest.mark.redis),
    ],
)
def test_what_is_beyond_the_limit_waits_at_the_broker(open_stage: OpenStage, kind: Any) -> None:
    """Celery keeps it in the worker, and takes nothing more meanwhile."""
    stage = open_stage(*kind, worker_eta_task_limit=20)
    stage.start_worker("-c", "1")
    for _ in range(100):
        stage.tasks.note_time.apply_async(countdown=3600)

    def here() -> int:
        answers = stage.client.control.inspect(timeout=5, limit=1).scheduled() or {}
        return sum(map(len, answers.values()))

    stage.until(lambda: stage.depth() == 20, "the others are postponed")
    assert here() == 20
    stage.tasks.note_time.delay()
    stage.wait_for_notes("ran")
    assert here() == 20


# --- time limits ------------------------------------------------------------------------------------------------------


def test_the_soft_limit_can_be_caught(stage: CeleryStage) -> None:
    result = stage.tasks.wait_for_soft_limit.apply_async((True,), soft_time_limit=0.5)
    assert stage.get(result) == "caught"
    stage.worker.wait_for_log(rf"Soft time limit \(0\.5s\) exceeded for {TASKS}\.wait_for_soft_limit\[{result.id}\]")


@pytest.mark.parametrize("by", ["call", "option"])
def test_the_soft_limit_is_an_error_in_the_task(stage: CeleryStage, by: str) -> None:
    if by == "call":
        result = stage.tasks.wait_for_soft_limit.apply_async((False,), soft_time_limit=0.5)
    else:
        result = stage.tasks.limited_by_option.delay()
    error = stage.error(result)
    assert type(error) is SoftTimeLimitExceeded
    assert "SoftTimeLimitExceeded" in result.traceback


def test_under_a_soft_limit_arguments_may_have_any_name(stage: CeleryStage) -> None:
    named = dict.fromkeys(("args", "call", "function", "kwargs", "limit", "plan", "task"), 1)
    assert stage.get(stage.tasks.name_the_named.apply_async((), named, soft_time_limit=60)) == list(named)


def test_the_hard_limit_ends_the_child_and_fails_the_call(stage: CeleryStage) -> None:
    result = stage.tasks.sleep_for.apply_async((30,), time_limit=0.5)
    (holding,) = stage.wait_for_notes("holding", id=result.id)
    error = stage.error(result)
    assert type(error) is TimeLimitExceeded
    assert error.args == (0.5,)
    stage.until(lambda: holding["pid"] not in stage.worker.children(), "the child is gone")
    stage.worker.wait_for_log(rf"Hard time limit \(0\.5s\) exceeded for {TASKS}\.sleep_for\[{result.id}\]")
    stage.until(lambda: len(stage.worker.children()) == 2, "there are two children again")


# --- revoking ---------------------------------------------------------------------------------------------------------


def test_a_call_can_be_revoked_before_it_runs(stage: CeleryStage) -> None:
    result = stage.tasks.note_time.apply_async(countdown=1.5)
    result.revoke()
    error = stage.error(result)
    assert type(error) is TaskRevokedError
    assert error.args == ("revoked",)
    assert result.state == "REVOKED"
    assert stage.notes("ran", id=result.id) == []
    stage.wait_for_empty()


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_running_call_can_be_terminated(stage: CeleryStage, signal: str) -> None:
    result = stage.tasks.sleep_for.delay(30)
    (holding,) = stage.wait_for_notes("holding", id=result.id)
    result.revoke(terminate=True, signal=signal)
    error = stage.error(result)
    assert type(error) is TaskRevokedError
    assert error.args == ("terminated",)
    assert result.state == "REVOKED"
    stage.until(lambda: holding["pid"] not in stage.worker.children(), "the child is gone")
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2


# --- states and results -----------------------------------------------------------------------------------------------


def test_a_tracked_call_is_seen_as_started(stage: CeleryStage) -> None:
    gate = stage.gate()
    result = stage.tasks.hold_tracked.delay(str(gate))
    info = stage.wait_for_state(result, "STARTED")["result"]
    assert info.keys() == {"pid", "hostname"}
    assert info["pid"] in stage.worker.children()
    assert info["hostname"] == f"celery@{socket.gethostname()}"
    gate.touch()
    assert stage.get(result) == "opened"


def test_a_task_reports_its_progress(stage: CeleryStage) -> None:
    gate = stage.gate()
    result = stage.tasks.report_progress.delay(str(gate))
    assert stage.wait_for_state(result, "PROGRESS")["result"] == {"done": 3, "of": 4}
    gate.touch()
    assert stage.get(result) == "done"


def test_an_ignored_result_is_not_stored(stage: CeleryStage) -> None:
    by_task = stage.tasks.ignored.delay(1)
    by_call = stage.tasks.note_time.apply_async(ignore_result=True)
    unstored = [by_task, by_call, stage.tasks.ignored_error.delay()]
    for result in unstored:
        stage.wait_for_notes("ran", id=result.id)
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    assert [result.state for result in unstored] == ["PENDING"] * 3


def test_a_call_may_ask_for_a_result_that_the_task_ignores(stage: CeleryStage) -> None:
    assert stage.get(stage.tasks.ignored.apply_async((5,), ignore_result=False)) == 5


def test_errors_may_be_stored_although_results_are_ignored(stage: CeleryStage) -> None:
    result = stage.client.AsyncResult(stage.tasks.ignored_but_errors.delay().id)
    assert type(stage.error(result)) is PlainError


def test_waiting_for_a_result_inside_a_task_is_refused(stage: CeleryStage) -> None:
    error = stage.error(stage.tasks.wait_inside.delay(1))
    assert isinstance(error, RuntimeError)
    assert "Never call result.get() within a task!" in str(error)


def test_waiting_for_a_result_inside_a_task_can_be_allowed(stage: CeleryStage) -> None:
    if stage.backend == "rpc":
        pytest.skip("stock Celery's rpc:// does not hear results inside a child")
    assert stage.get(stage.tasks.wait_inside_allowed.delay(1)) == 2


def test_tasks_run_other_tasks_in_place(stage: CeleryStage) -> None:
    assert stage.get(stage.tasks.run_inside.delay(1)) == {"direct": 2, "eager": True, "state": "SUCCESS", "run": 3}


# --- the request ------------------------------------------------------------------------------------------------------


def expected_request(stage: CeleryStage, task_id: str, **changed: Any) -> dict[str, Any]:
    """Return every field of the request of a plain call of dump_request(1, key="value")."""
    headers = {
        "lang": "py",
        "task": f"{TASKS}.dump_request",
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "(1,)",
        "kwargsrepr": "{'key': 'value'}",
        "origin": "gen@test",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    properties: dict[str, Any] = {
        "correlation_id": task_id,
        "reply_to": stage.client.thread_oid,
        "delivery_mode": 2,
        "priority": 0,
    }
    if stage.broker == "amqp":
        properties |= {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "application_headers": headers,
        }
    else:
        properties |= {
            "origin": "gen@test",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_tag": "set by the transport",
        }
    return {
        "_protected": 1,
        "args": [1],
        "argsrepr": "(1,)",
        "callbacks": None,
        "called_directly": False,
        "chain": None,
        "children": [],
        "chord": None,
        "correlation_id": task_id,
        "delivery_info": {
            "exchange": "",
            "routing_key": "celery",
            "priority": 0,
            "redelivered": False,
        },
        "errbacks": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "headers": None,
        "hostname": f"celery@{socket.gethostname()}",
        "id": task_id,
        "ignore_result": False,
        "is_eager": False,
        "kwargs": {"key": "value"},
        "kwargsrepr": "{'key': 'value'}",
        "lang": "py",
        "logfile": None,
        "loglevel": None,
        "origin": "gen@test",
        "parent_id": None,
        "properties": properties,
        "replaced_task_nesting": 0,
        "reply_to": stage.client.thread_oid,
        "retries": 0,
        "root_id": task_id,
        "shadow": None,
        "soft_time_limit": None,
        "stamped_headers": None,
        "stamps": {},
        "task": f"{TASKS}.dump_request",
        "taskset": None,
        "time_limit": None,
        "timelimit": [None, None],
        "utc": None,
        **changed,
    }


@pytest.mark.since("5.7", "the request has no time_limit and soft_time_limit of its own")
def test_the_request_has_every_field(stage: CeleryStage) -> None:
    result = stage.tasks.dump_request.apply_async((1,), {"key": "value"}, origin="gen@test")
    found = stage.get(result)
    if stage.broker == "redis":
        found["properties"]["delivery_tag"] = "set by the transport"
    assert found == expected_request(stage, result.id)


@pytest.mark.since("5.7", "the request has no time_limit of its own")
def test_options_of_a_call_arrive_in_its_request(stage: CeleryStage) -> None:
    eta = datetime.now(timezone.utc)
    expires = eta + timedelta(minutes=5)
    result = stage.tasks.dump_request.apply_async(
        (1,),
        {"key": "value"},
        eta=eta,
        expires=expires,
        priority=4,
        time_limit=60,
        soft_time_limit=50.5,
        shadow="another name",
        headers={"tenant": "a", "nested": {"b": [1, None]}},
        link=stage.tasks.nothing.si(),
        link_error=stage.tasks.nothing.si(),
        root_id="the root",
        parent_id="the parent",
        argsrepr="(hidden)",
        kwargsrepr="{hidden}",
    )
    found = stage.get(result)
    names = ("priority", "shadow", "tenant", "nested", "root_id", "parent_id", "timelimit", "time_limit")
    assert {name: found["delivery_info"].get(name, found.get(name)) for name in names} == {
        "priority": 4,
        "shadow": "another name",
        "tenant": "a",
        "nested": {"b": [1, None]},
        "root_id": "the root",
        "parent_id": "the parent",
        "timelimit": [60, 50.5],
        "time_limit": 60,
    }
    assert found["soft_time_limit"] == 50.5
    assert found["headers"] == {"tenant": "a", "nested": {"b": [1, None]}}
    assert (found["argsrepr"], found["kwargsrepr"]) == ("(hidden)", "{hidden}")
    assert datetime.fromisoformat(found["eta"]) == eta
    assert datetime.fromisoformat(found["expires"]) == expires
    assert [one["task"] for one in (*found["callbacks"], *found["errbacks"])] == [f"{TASKS}.nothing"] * 2
    stage.worker.wait_for_log(rf"Task another name\[{result.id}\] succeeded")


def test_a_call_from_a_task_knows_its_parent_and_root(stage: CeleryStage) -> None:
    parent = stage.tasks.call_other.apply_async((1,), root_id="the root")
    found = stage.get(stage.client.AsyncResult(stage.get(parent))) if stage.backend != "rpc" else None
    if found is None:
        pytest.skip("a result of rpc:// is for the process that sent the call")
    assert (found["parent_id"], found["root_id"], found["from"]) == (parent.id, "the root", "parent")
    assert re.fullmatch(r"gen\d+@\S+", found["origin"])


def test_a_task_knows_itself_and_its_application(stage: CeleryStage) -> None:
    found = stage.get(stage.tasks.dump_task.delay())
    assert found.pop("pid") in stage.worker.children()
    assert found.pop("argv0")
    assert found == {
        "name": f"{TASKS}.dump_task",
        "bound": True,
        "current_task": f"{TASKS}.dump_task",
        "app_current_task": f"{TASKS}.dump_task",
        "app_current_worker_task": f"{TASKS}.dump_task",
        "app": "proj",
        "request_is_mine": True,
        "hostname": f"celery@{socket.gethostname()}",
        "called_directly": False,
        "process_is_main": False,
    }


# --- task classes -----------------------------------------------------------------------------------------------------


def handlers(stage: CeleryStage, task_id: str, last: str = "after_return", count: int = 1) -> list[dict[str, Any]]:
    """Return what the handlers of one call noted, once the last of them has."""
    stage.wait_for_notes(last, count, id=task_id)
    return [note for note in stage.notes(id=task_id) if note["what"] not in {"annotated_success"}]


def called(notes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(note["what"], note["role"]) for note in notes]


def test_the_handlers_of_a_good_call_run_in_order(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("good", factor=2)
    assert stage.get(result) == 4
    notes = handlers(stage, result.id)
    assert called(notes) == [
        ("before_start", "child"),
        ("__call__", "child"),
        ("run", "child"),
        ("on_success", "child"),
        ("after_return", "child"),
    ]
    given = {"args": ["good"], "kwargs": {"factor": 2}}
    assert without_times([note for note in notes if note["what"] != "run"], "role") == [
        {"what": "before_start", **given},
        {"what": "__call__", **given},
        {"what": "on_success", **given, "retval": 4},
        {"what": "after_return", **given, "status": "SUCCESS", "retval": 4, "einfo": "NoneType"},
    ]


def test_an_overridden_apply_async_is_used(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("good")
    (note,) = stage.wait_for_notes("run", id=result.id)
    assert note["header"] == "apply_async"


def test_the_handlers_of_a_bad_call_get_the_error(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("fail")
    stage.error(result)
    *_, failure, after = handlers(stage, result.id)
    assert (failure["what"], failure["exc"], failure["einfo"]) == (
        "on_failure",
        "PlainError('failed')",
        "ExceptionInfo",
    )
    assert (after["what"], after["status"], after["retval"], after["einfo"]) == (
        "after_return",
        "FAILURE",
        "PlainError('failed')",
        "NoneType",
    )


def test_the_handlers_of_a_retried_call_run_for_each_attempt(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("retry")
    assert stage.get(result) == 2
    handlers(stage, result.id)
    stage.wait_for_notes("on_retry", id=result.id)
    # The second attempt may begin in another child before the first has ended.
    first, second = (stage.notes(id=result.id, retries=retries) for retries in (0, 1))
    assert [note["what"] for note in first] == ["before_start", "__call__", "run", "on_retry"]
    assert [note["what"] for note in second] == ["before_start", "__call__", "run", "on_success", "after_return"]
    assert (first[3]["exc"], first[3]["einfo"]) == ("PlainError('again')", "ExceptionInfo")


def test_no_handler_runs_after_an_ignored_call(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("ignore")
    stage.wait_for_notes("run", id=result.id)
    stage.wait_for_empty()
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    assert [note["what"] for note in stage.notes(id=result.id)] == ["before_start", "__call__", "run"]


@pytest.mark.since("5.7", "on_failure is not called for a hard limit")
def test_the_main_process_runs_the_handlers_of_a_call_that_its_hard_limit_ended(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.apply_async(("hard limit",), time_limit=0.5)
    assert type(stage.error(result)) is TimeLimitExceeded
    notes = handlers(stage, result.id, last="on_failure")
    assert ("on_failure", "main") in called(notes)
    (failure,) = [note for note in notes if note["what"] == "on_failure"]
    assert failure["exc"] == "TimeLimitExceeded(0.5)"


def test_no_handler_runs_for_a_call_whose_child_died(stage: CeleryStage) -> None:
    result = stage.tasks.recorded.delay("die")
    assert type(stage.error(result)).__name__ == "WorkerLostError"
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    assert called(stage.notes(id=result.id)) == [("before_start", "child"), ("__call__", "child"), ("run", "child")]


def test_an_instance_of_a_task_lives_as_long_as_its_process(stage: CeleryStage) -> None:
    assert all(stage.get(stage.tasks.keeping.delay()) for _ in range(5))


@pytest.mark.parametrize(
    ("name", "args", "value"),
    [
        ("proj.by_class", ("you",), "hello you"),
        ("named by hand", (), "named by hand"),
        ("tests.celery.proj.discovered.tasks.shared", (3,), {"x": 3, "main": "proj"}),
        ("renamed", (4,), {"x": 4, "name": "renamed", "max_retries": 5}),
    ],
)
def test_tasks_are_registered_in_every_way(stage: CeleryStage, name: str, args: tuple[Any, ...], value: Any) -> None:
    assert stage.get(stage.client.send_task(name, args)) == value


def test_annotations_change_a_tasks_attributes_and_handlers(stage: CeleryStage) -> None:
    result = stage.tasks.annotated.delay()
    assert stage.get(result) == 7
    (note,) = stage.wait_for_notes("annotated_success", id=result.id)
    assert (note["retval"], note["max_retries"]) == (7, 7)
    assert stage.get(stage.tasks.not_annotated.delay()) == 3


@pytest.mark.since(
    "5.7", "arguments that are models are not dumped, and before 5.6 annotations that are texts not read"
)
def test_pydantic_models_are_checked_and_built(stage: CeleryStage) -> None:
    assert stage.get(stage.send("mirror", {"x": 1}, kwargs={"label": "ab"})) == {"x": 7, "y": 3}
    assert stage.get(stage.tasks.mirror.delay(Point(x=1, y=2))) == {"x": 2, "y": 1}


@pytest.mark.since("5.6", "annotations that are texts are not read: models are not checked")
def test_wrong_input_for_a_pydantic_model_is_a_failure(stage: CeleryStage) -> None:
    error = stage.error(stage.send("mirror", {"x": "no number"}))
    assert "ValidationError" in f"{type(error).__name__} {error!r}"


def test_the_applications_own_signals_ran_once_in_the_main_process(stage: CeleryStage) -> None:
    stage.get(stage.tasks.add.delay(1, 1))
    configured = stage.notes("on_after_configure", role="main")
    finalized = stage.notes("on_after_finalize", role="main")
    assert without_times(configured) == [
        {"what": "on_after_configure", "role": "main", "arguments": ["signal", "source"], "settings": "celery"}
    ]
    assert without_times(finalized) == [
        {"what": "on_after_finalize", "role": "main", "arguments": ["signal"], "tasks": True}
    ]
    assert configured[0]["pid"] == stage.worker.pid


# --- logging ----------------------------------------------------------------------------------------------------------


def test_what_a_task_logs_and_prints_is_in_the_log_with_its_name_and_id(stage: CeleryStage) -> None:
    result = stage.tasks.log_and_print.delay("apple")
    stage.get(result)
    name = rf"{TASKS}\.log_and_print\[{result.id}\]"
    stage.worker.wait_for_log(rf"\[[^\]]+: INFO/\S+\] {name}: logged apple\n")
    stage.worker.wait_for_log(r"\[[^\]]+: WARNING/\S+\] warned apple\n")
    stage.worker.wait_for_log(r"\[[^\]]+: WARNING/\S+\] printed apple\n")


def test_the_log_tells_of_receiving_and_success(stage: CeleryStage) -> None:
    result = stage.tasks.add.delay(20, 22)
    stage.get(result)
    name = rf"Task {TASKS}\.add\[{result.id}\]"
    stage.worker.wait_for_log(rf"\[[^\]]+: INFO/MainProcess\] {name} received\n")
    stage.worker.wait_for_log(rf"\[[^\]]+: INFO/\S+\] {name} succeeded in [\d.e-]+s: 42\n")


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_both_children_work_at_the_same_time(stage: CeleryStage) -> None:
    gate = stage.gate()
    results = [stage.tasks.hold.delay(str(gate), "both") for _ in range(2)]
    notes = stage.wait_for_notes("holding", 2, mark="both")
    assert {note["pid"] for note in notes} == set(stage.worker.children())
    gate.touch()
    assert [stage.get(result) for result in results] == ["opened"] * 2


@pytest.mark.parametrize("kind", stages(("amqp", "rpc")))
def test_children_are_replaced_after_a_number_of_tasks(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind)
    stage.start_worker("-c", "1", "--max-tasks-per-child", "2")
    results = [stage.tasks.note_time.delay() for _ in range(6)]
    assert all(stage.get(result) for result in results)
    assert sorted(counts(stage.notes("ran"), "pid").values()) == [2, 2, 2]


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
def test_settings_that_every_task_takes(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(
        *kind, task_ignore_result=True, task_soft_time_limit=0.5, task_track_started=True, result_extended=True
    )
    stage.start_worker()
    ignored = stage.tasks.add.delay(1, 1)
    limited = stage.tasks.wait_for_soft_limit.apply_async((True,), ignore_result=False)
    assert stage.get(limited) == "caught"
    assert ignored.state == "PENDING"
    assert (limited.name, limited.args, limited.kwargs) == (f"{TASKS}.wait_for_soft_limit", [True], {})
    assert (limited.retries, limited.worker, limited.queue) == (0, f"celery@{socket.gethostname()}", "celery")
    gate = stage.gate()
    tracked = stage.tasks.hold.apply_async((str(gate),), ignore_result=False, soft_time_limit=60)
    assert stage.wait_for_state(tracked, "STARTED")["worker"] == f"celery@{socket.gethostname()}"
    gate.touch()


def test_the_worker_stops_in_order(stage: CeleryStage) -> None:
    stage.get(stage.tasks.add.delay(1, 1))
    assert stage.worker.stop() == 0
    stage.worker.wait_for_no_leftovers()
    assert "Traceback" not in stage.worker.log().split("Warm shutdown")[1]
