"""When a message is acknowledged, given back or dropped: tasks that fail, hang, are rejected, children and workers
that die. Source of the expectations: celery/worker/request.py of Celery 5.7, and running it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.celery.conftest import OpenStage, stages
from tests.celery.stage import QUEUE, TIMEOUT_S, CeleryStage, Servers, opened

DEAD = "dead"

# Redis gives back what a dead worker held when this time is over; the rest makes Celery look for it every second.
SOON = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


@pytest.fixture(scope="module", params=stages(("amqp", "redis"), ("redis", "redis")))
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param) as stage:
        keep_dead_letters(stage)
        stage.start_worker("-c", "8")
        yield stage


def keep_dead_letters(stage: CeleryStage) -> None:
    """Let RabbitMQ keep what is rejected; Redis knows no dead letters."""
    if stage.rabbitmq is None:
        return
    options = f'[{{<<"dead-letter-exchange">>, <<"">>}}, {{<<"dead-letter-routing-key">>, <<"{DEAD}">>}}]'
    stage.rabbitmq.evaluate(
        f'rabbit_policy:set(<<"{stage.vhost}">>, <<"dlx">>, <<"^{QUEUE}$">>, {options}, 0, <<"queues">>, <<"test">>)'
    )
    with stage.client.connection_for_write() as connection:
        connection.SimpleQueue(DEAD).close()


def dead_letters(stage: CeleryStage) -> list[str]:
    """Return the ids of the calls among the dead letters and forget these; None when the broker keeps none."""
    return [message.headers["id"] for message in stage.take(DEAD, stage.depth(DEAD))] if stage.rabbitmq else []


def end(stage: CeleryStage, variant: str, *args: Any, **options: Any) -> AsyncResult:
    return stage.client.tasks[f"proj.acks.{variant}"].apply_async(args, **options)


def runs(stage: CeleryStage, result: AsyncResult) -> list[tuple[bool, int]]:
    """Return (redelivered, retries) of each run of the call."""
    return [(note["redelivered"], note["retries"]) for note in stage.notes("run", id=result.id)]


ONCE = [(False, 0)]
AGAIN = [(False, 0), (True, 0)]
RETRIED = [(False, 0), (False, 1)]


# --- the child dies ---------------------------------------------------------------------------------------------------


DEATHS = {
    # variant, how it dies, how often: how the call ends, its runs
    ("early", "kill", 1): ("WorkerLostError", ONCE),
    ("early", "exit", 1): ("WorkerLostError", ONCE),
    ("early", "SystemExit", 1): ("WorkerLostError", ONCE),
    ("early_requeue", "kill", 1): ("WorkerLostError", ONCE),
    ("early_retry", "kill", 1): ("lived", RETRIED),
    ("late", "kill", 1): ("WorkerLostError", ONCE),
    ("late", "exit", 1): ("WorkerLostError", ONCE),
    ("late", "SystemExit", 1): ("WorkerLostError", ONCE),
    ("late_requeue", "kill", 1): ("lived", AGAIN),
    ("late_requeue", "kill", 3): ("lived", [(False, 0), *[(True, 0)] * 3]),
    ("late_requeue", "exit", 1): ("lived", AGAIN),
    ("late_requeue", "SystemExit", 1): ("lived", AGAIN),
    ("late_requeue", "die after success", 0): ("lived", ONCE),
    ("late_retry", "kill", 1): ("lived", RETRIED),
    ("late_retry", "kill", 9): ("WorkerLostError", RETRIED),  # no more often than max_retries allows
    ("late_no_failure", "kill", 1): ("WorkerLostError", ONCE),
}


@pytest.fixture(scope="module")
def deaths(stage: CeleryStage) -> dict[tuple[str, str, int], AsyncResult]:
    """The calls of DEATHS, all sent at once: Celery looks for dead children every five seconds only."""
    return {death: end(stage, *death) for death in DEATHS}


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"{death[0]}-{death[1]}-{death[2]}".replace(" ", "-"))
def test_a_child_that_dies(
    stage: CeleryStage, deaths: dict[tuple[str, str, int], AsyncResult], death: tuple[str, str, int]
) -> None:
    ended, expected_runs = DEATHS[death]
    value = stage.get(deaths[death], 2 * TIMEOUT_S, propagate=False)
    assert (value if isinstance(value, str) else type(value).__name__) == ended
    assert runs(stage, deaths[death]) == expected_runs


def test_no_message_is_left_after_the_deaths(
    stage: CeleryStage, deaths: dict[tuple[str, str, int], AsyncResult]
) -> None:
    stage.wait_for_empty()
    dropped = [deaths["late_no_failure", "kill", 1].id] if stage.rabbitmq else []
    assert dead_letters(stage) == dropped
    assert deaths["late_requeue", "die after success", 0].state == "SUCCESS"


# --- the task fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "how", "ended", "is_dead"),
    [
        ("early", "error", "PlainError", False),
        ("late", "error", "PlainError", False),
        ("late_requeue", "error", "PlainError", False),
        ("late_no_ack", "error", "PlainError", True),
        ("late_no_failure", "error", "PlainError", True),
        ("late_no_timeout", "error", "PlainError", False),
        ("early", "reject", "Reject", False),
        ("late", "reject", "Reject", True),
        ("late_no_ack", "reject", "Reject", True),
    ],
)
def test_a_task_that_fails(stage: CeleryStage, variant: str, how: str, ended: str, is_dead: bool) -> None:
    result = end(stage, variant, how)
    assert type(stage.error(result)).__name__ == ended
    stage.wait_for_empty()
    assert dead_letters(stage) == ([result.id] if is_dead and stage.rabbitmq else [])
    assert runs(stage, result) == ONCE


@pytest.mark.parametrize("variant", ["late", "late_no_ack"])
def test_a_task_that_rejects_to_be_called_again(stage: CeleryStage, variant: str) -> None:
    result = end(stage, variant, "reject and requeue", 3)
    assert stage.get(result) == "lived"
    assert runs(stage, result) == [(False, 0), *[(True, 0)] * 3]
    stage.wait_for_empty()
    assert dead_letters(stage) == []


@pytest.mark.parametrize("variant", ["early", "late", "late_no_ack"])
def test_a_task_that_is_ignored_is_acknowledged(stage: CeleryStage, variant: str) -> None:
    result = end(stage, variant, "ignore")
    stage.wait_for_notes("run", id=result.id)
    stage.wait_for_empty()
    assert dead_letters(stage) == []
    assert result.state == "PENDING"


# --- the hard limit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["early", "late", "late_no_failure"])
def test_a_task_over_its_hard_limit_fails(stage: CeleryStage, variant: str) -> None:
    result = end(stage, variant, "hang", time_limit=0.5)
    assert type(stage.error(result)).__name__ == "TimeLimitExceeded"
    stage.wait_for_empty()
    assert dead_letters(stage) == []
    assert runs(stage, result) == ONCE


@pytest.mark.parametrize("variant", ["late_no_timeout", "late_no_ack"])
def test_a_task_over_its_hard_limit_may_run_again(stage: CeleryStage, variant: str) -> None:
    result = end(stage, variant, "hang", time_limit=0.5)
    stage.wait_for_notes("run", 2, id=result.id)
    stage.wait_for_empty()
    stage.until(lambda: stage.client.AsyncResult(result.id).state == "SUCCESS", "the second run has succeeded")
    assert runs(stage, result) == AGAIN


# --- the worker dies or stops -----------------------------------------------------------------------------------------


every_broker = pytest.mark.parametrize("kind", stages(("amqp", "redis"), ("redis", "redis")))


def open_with_calls(open_stage: OpenStage, kind: tuple[Any, ...], variant: str) -> tuple[CeleryStage, list[Any]]:
    """Return a stage whose one child runs the first of four calls that hang, and these calls."""
    options = {"broker_transport_options": SOON} if kind[1] == "redis" else {}
    stage = open_stage(*kind, **options)
    stage.start_worker("-c", "1")
    calls = [end(stage, variant, "hang") for _ in range(4)]
    stage.wait_for_notes("run", id=calls[0].id)
    stage.worker.wait_for_log(r"Task \S+ received", count=4)
    # An early acknowledgement is on its way for a few milliseconds.
    stage.until(lambda: stage.depth() == (3 if variant.startswith("early") else 4), "the broker knows what runs")
    return stage, calls


@every_broker
@pytest.mark.parametrize(("variant", "lost"), [("early", 1), ("late", 0)])
def test_a_killed_worker_loses_what_it_had_acknowledged(
    open_stage: OpenStage, kind: tuple[Any, ...], variant: str, lost: int
) -> None:
    stage, calls = open_with_calls(open_stage, kind, variant)
    stage.worker.kill9()
    kept = calls[lost:]
    for call in kept:
        call_again = stage.folder / f"runs-{call.id}"
        call_again.write_text("x")  # the next run is not its first: it returns
    stage.start_worker("-c", "1")
    assert [stage.get(call, 2 * TIMEOUT_S) for call in kept] == ["lived"] * len(kept)
    assert [len(runs(stage, call)) for call in calls] == ([1, 1, 1, 1] if lost else [2, 1, 1, 1])
    assert all(redelivered for redelivered, _ in runs(stage, calls[-1]))
    stage.wait_for_empty()


@every_broker
def test_a_warm_stop_ends_what_runs_and_gives_back_the_rest(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "1")
    gate = stage.gate()
    running, *others = [stage.tasks.hold.delay(str(gate)) for _ in range(4)]
    stage.wait_for_notes("holding", id=running.id)
    worker.wait_for_log(r"Task \S+ received", count=4)
    worker.signal(signal.SIGTERM)
    worker.wait_for_log(r"Warm shutdown \(MainProcess\)")
    gate.touch()
    assert worker.wait() == 0
    assert stage.get(running) == "opened"
    assert stage.depth() == 3
    assert len(stage.notes("holding")) == 1
    stage.start_worker("-c", "1")
    assert [stage.get(other) for other in others] == ["opened"] * 3


@every_broker
@pytest.mark.parametrize(("variant", "left"), [("early", 3), ("late", 4)])
def test_a_cold_stop_gives_back_what_is_not_acknowledged(
    open_stage: OpenStage, kind: tuple[Any, ...], variant: str, left: int
) -> None:
    stage, _ = open_with_calls(open_stage, kind, variant)
    worker = stage.worker
    worker.signal(signal.SIGQUIT)
    worker.wait_for_log(r"Cold shutdown \(MainProcess\)")
    worker.wait()
    worker.wait_for_no_leftovers()
    assert stage.depth() == left


@pytest.mark.parametrize("kind", stages(("amqp", "redis")))
def test_a_redelivered_call_with_a_stored_success_is_not_run_again(
    open_stage: OpenStage, kind: tuple[Any, ...]
) -> None:
    stage = open_stage(*kind, worker_deduplicate_successful_tasks=True)
    stage.start_worker("-c", "1")
    call = end(stage, "late_requeue", "wait after success")
    stage.wait_for_notes("waiting", id=call.id)
    stage.worker.kill9()
    stage.start_worker("-c", "1")
    stage.wait_for_empty()
    assert stage.get(call) == "lived"
    assert runs(stage, call) == ONCE
