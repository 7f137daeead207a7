"""Tasks with a Strategy or a Request class of their own: what of theirs is called, and what the broker is told."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, WorkerLostError

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage, Servers, opened

APP = "tests.celery.apps.strategies"


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param, worker_prefetch_multiplier=20) as stage:
        stage.start_worker("-c", "2", "-n", "strategies@%h", app=APP)
        yield stage


def send(stage: CeleryStage, name: str, *args: Any, **options: Any) -> Any:
    return stage.client.send_task(name, args, **options)


def told(stage: CeleryStage, task_id: str) -> list[dict[str, Any]]:
    """Return what a request has noted, without what differs from run to run."""
    left_out = ("at", "pid", "by", "id")
    return [{key: value for key, value in each.items() if key not in left_out} for each in stage.notes(id=task_id)]


def said(what: str, **fields: Any) -> dict[str, Any]:
    return {"what": what, "role": "main", **fields}


# --- requests


def test_a_request_hears_that_its_call_was_accepted_by_the_child_that_runs_it(stage: CeleryStage) -> None:
    call = send(stage, "good", 1)
    assert stage.get(call) == 2
    stage.wait_for_empty()
    (accepted,) = stage.wait_for_notes("accepted", id=call.id)
    assert accepted["by"] in [run["pid"] for run in stage.wait_for_notes("run")]
    # on_success is not called: Celery puts its own over it.
    assert told(stage, call.id) == [said("accepted", acknowledged=True)]


def test_a_late_call_is_acknowledged_when_it_has_ended(stage: CeleryStage) -> None:
    call = send(stage, "late", 1)
    assert stage.get(call) == 2
    stage.wait_for_empty()
    assert told(stage, call.id) == [said("accepted", acknowledged=False)]


@pytest.mark.parametrize(("name", "early"), [("bad", True), ("late_bad", False)])
def test_a_request_hears_of_a_failure(stage: CeleryStage, name: str, early: bool) -> None:
    call = send(stage, name)
    assert isinstance(stage.error(call), ValueError)
    stage.wait_for_notes("failure", id=call.id)
    stage.wait_for_empty()
    assert told(stage, call.id) == [
        said("accepted", acknowledged=early),
        said("failure", error="ValueError", return_ok=True, acknowledged=True),
    ]


def test_a_request_hears_of_a_retry(stage: CeleryStage) -> None:
    call = send(stage, "again")
    assert stage.get(call) == 7
    stage.wait_for_notes("accepted", 2, id=call.id)
    stage.wait_for_notes("failure", id=call.id)
    notes = told(stage, call.id)
    assert said("retry", error="KeyError('first')") in notes
    assert [note["what"] for note in notes].count("accepted") == 2


@pytest.mark.since("5.7", "no result is stored for a call that was rejected")
def test_a_message_that_the_task_rejects_is_a_failure_to_the_request(stage: CeleryStage) -> None:
    call = send(stage, "refuse")
    stage.error(call)
    stage.wait_for_notes("failure", id=call.id)
    assert told(stage, call.id)[1:] == [said("failure", error="Reject", return_ok=True, acknowledged=True)]
    stage.wait_for_empty()


def test_a_request_hears_of_the_soft_time_limit(stage: CeleryStage) -> None:
    call = send(stage, "slow", soft_time_limit=1)
    assert type(stage.error(call)).__name__ == "SoftTimeLimitExceeded"
    stage.wait_for_notes("failure", id=call.id)
    stage.wait_for_notes("timeout", id=call.id)
    assert told(stage, call.id)[1:] == [
        said("timeout", soft=True, limit=1),
        said("failure", error="SoftTimeLimitExceeded", return_ok=True, acknowledged=True),
    ]


def test_a_request_hears_of_the_hard_time_limit(stage: CeleryStage) -> None:
    call = send(stage, "slow", time_limit=1)
    assert type(stage.error(call)).__name__ == "TimeLimitExceeded"
    stage.wait_for_notes("timeout", id=call.id)
    stage.wait_for_notes("failure", id=call.id)
    assert said("timeout", soft=False, limit=1) in told(stage, call.id)
    assert said("failure", error="TimeLimitExceeded", return_ok=False, acknowledged=True) in told(stage, call.id)


def test_a_request_hears_that_the_child_died(stage: CeleryStage) -> None:
    call = send(stage, "die")
    assert isinstance(stage.error(call), WorkerLostError)
    stage.wait_for_notes("failure", id=call.id)
    assert told(stage, call.id)[1:] == [said("failure", error="WorkerLostError", return_ok=False, acknowledged=True)]
    stage.wait_for_empty()


def test_an_expired_call_is_announced_by_its_request(stage: CeleryStage) -> None:
    call = send(stage, "good", 1, countdown=1, expires=0.2)
    assert isinstance(stage.error(call), TaskRevokedError)
    stage.wait_for_notes("revoked", id=call.id)
    assert told(stage, call.id) == [said("revoked", reason="expired", terminated=False, expired=True)]
    stage.wait_for_empty()


def test_a_call_waits_for_its_time(stage: CeleryStage) -> None:
    call = send(stage, "good", 1, countdown=1)
    assert stage.get(call) == 2
    assert told(stage, call.id) == [said("accepted", acknowledged=True)]


def test_a_running_call_can_be_terminated(stage: CeleryStage) -> None:
    call = send(stage, "slow")
    stage.wait_for_notes("accepted", id=call.id)
    stage.client.control.revoke(call.id, terminate=True)
    assert isinstance(stage.error(call), TaskRevokedError)
    notes = stage.wait_for_notes("revoked", id=call.id)
    assert (notes[0]["reason"], notes[0]["terminated"]) == ("terminated", True)


def test_a_running_call_is_inspected_under_its_own_name(stage: CeleryStage) -> None:
    call = send(stage, "slow", soft_time_limit=5)
    stage.wait_for_notes("accepted", id=call.id)
    (calls,) = stage.client.control.inspect(timeout=10, limit=1).active().values()
    assert [(each["name"], each["id"]) for each in calls] == [("slow", call.id)]
    stage.client.control.revoke(call.id, terminate=True)
    stage.error(call)


# --- strategies


def test_celerys_strategy_can_be_wrapped(stage: CeleryStage) -> None:
    calls = [send(stage, "counted", n, countdown=n) for n in range(3)]
    assert [stage.get(call) for call in calls] == [0, 2, 4]
    for call in calls:
        assert [note["role"] for note in stage.notes("message", id=call.id)] == ["main"]
    made = stage.notes("strategy")[-1]
    assert (made["role"], made["consumer"], made["hostname"]) == ("main", "Consumer", "strategies")
    stage.wait_for_empty()


def test_strategies_are_made_anew_when_the_consumer_is_asked_to(stage: CeleryStage) -> None:
    assert [stage.get(send(stage, name, 1)) for name in ("counted", "good")] == [2, 2]
    before = len(stage.notes("strategy"))
    assert stage.client.control.broadcast("renew_strategies", reply=True, timeout=10, limit=1)
    call, loud = send(stage, "counted", 1), send(stage, "good", 1)
    assert stage.get(call) == 2
    assert len(stage.notes("strategy")) == before + 1
    assert stage.notes("message", id=call.id)
    # The request class of a task without a strategy of its own still has its messages.
    assert stage.get(loud) == 2
    stage.wait_for_notes("accepted", id=loud.id)


def test_messages_are_held_until_the_strategy_acknowledges_them(stage: CeleryStage) -> None:
    before = len(stage.notes("done"))
    for value in (1, 2, 3):
        send(stage, "gathered", value)
    done = stage.wait_for_notes("done", before + 1)[before]
    assert (done["role"], done["result"][1]) == ("main", 6)
    taken = stage.notes("taken")[-1]
    assert (taken["role"], taken["by"], taken["recent"]) == ("main", done["result"][0], True)
    stage.wait_for_empty()


def test_a_strategy_has_a_timer(stage: CeleryStage) -> None:
    before = len(stage.notes("done"))
    send(stage, "gathered", 4)
    send(stage, "gathered", 5)
    assert stage.wait_for_notes("done", before + 1)[before]["result"][1] == 9
    stage.wait_for_empty()


@pytest.mark.parametrize(("value", "error"), [("boom", "LookupError"), ("lambda", "MaybeEncodingError")])
def test_a_failing_call_of_the_pool_is_told_to_its_strategy(stage: CeleryStage, value: str, error: str) -> None:
    before = len(stage.notes("failed"))
    send(stage, "gathered", value)
    failed = stage.wait_for_notes("failed", before + 1)[before]
    assert (failed["role"], failed["error"]) == ("main", error)
    stage.wait_for_empty()


def test_a_strategy_can_reject_a_message(stage: CeleryStage) -> None:
    send(stage, "gathered", "reject")
    stage.wait_for_notes("refused")
    stage.wait_for_empty()


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_what_a_strategy_holds_when_the_worker_stops_goes_back(open_stage: Any, kind: Any) -> None:
    stage = open_stage(*kind, worker_prefetch_multiplier=20)
    worker = stage.start_worker("-c", "1", app=APP)
    for _ in range(2):
        send(stage, "gathered", "keep")
    stage.wait_for_notes("held", 2)
    assert worker.stop() == 0
    stage.until(lambda: stage.depth() == 2, "two messages in the queue")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_brokers_message_cannot_pass_for_a_call_of_the_main_process(open_stage: Any, tmp_path: Path) -> None:
    stage = open_stage("fastq", "redis", "redis")
    stage.start_worker("-c", "1", app=APP)
    body = pickle.dumps((print, (Touch(tmp_path / "run"),), {}))
    with stage.client.producer_pool.acquire() as producer:
        producer.publish(
            body,
            routing_key="celery",
            exchange="",
            headers={"task": "fastq.apply", "id": "forged", "lang": "py"},
            content_type="application/x-python-serialize",
            content_encoding="binary",
        )
    stage.worker.wait_for_log("unregistered task of type 'fastq.apply'")
    stage.wait_for_empty()
    assert not (tmp_path / "run").exists()
