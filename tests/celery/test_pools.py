"""Pools in which calls share a process, Celery's own and those written for it, under Celery and under fastq."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from tests.celery.stage import CeleryStage, Servers, opened
from tests.support.worker_process import WorkerProcess

CUSTOM = "CELERY_CUSTOM_WORKER_POOL"
OWN = "tests.support.hosted_pools:Threads"
CALLS = 4
PAUSE_S = 1.0

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def start(stage: CeleryStage, pool: str, *options: str, custom: str = OWN) -> WorkerProcess:
    """Return a worker with the pool."""
    return stage.start_worker("-P", pool, "-c", str(CALLS), *options, env={CUSTOM: custom})


@pytest.fixture(params=["threads", "gevent", "eventlet", "custom"], scope="module")
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[pytest.param("celery", id="under_celery"), pytest.param("fastq", id="under_fastq")], scope="module"
)
def stage(
    request: pytest.FixtureRequest, pool: str, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, request.param, "amqp", "redis", extras=("signals",)) as found:
        start(found, pool)
        yield found


def test_calls_run_at_the_same_time_in_one_process(stage: CeleryStage) -> None:
    began = time.monotonic()
    results = [stage.tasks.sleep_for.delay(PAUSE_S) for _ in range(CALLS)]
    assert [stage.get(result) for result in results] == ["slept"] * CALLS
    assert time.monotonic() - began < CALLS * PAUSE_S
    held = stage.notes("holding")[-CALLS:]
    assert len({note["pid"] for note in held}) == 1


def test_ends_of_calls_are_as_in_prefork(stage: CeleryStage) -> None:
    assert isinstance(stage.error(stage.tasks.fail.delay("ValueError", "no")), ValueError)
    assert stage.get(stage.tasks.retry_until.delay(2)) == 2
    assert stage.get((stage.tasks.add.s(1, 2) | stage.tasks.add.s(3)).delay()) == 6
    assert stage.get(stage.tasks.autoretried.delay()) == "after 1"


def test_what_runs_beside_a_call_that_was_left_behind_runs_again_after_the_grace(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with opened(servers, tmp_path_factory, "fastq", "redis", "redis") as stage:
        stage.start_worker("-P", "threads", "-c", "2", "--grace", "1")
        beside = stage.client.tasks["proj.acks.late"].delay("hang")
        stage.wait_for_notes("run", id=beside.id)
        assert isinstance(stage.error(stage.tasks.sleep_for.apply_async((60,), time_limit=1)), TimeLimitExceeded)
        assert stage.get(beside) == "lived"


def test_each_call_has_its_own_request(stage: CeleryStage) -> None:
    results = [stage.tasks.dump_task.delay() for _ in range(3 * CALLS)]
    for result in results:
        seen = stage.get(result)
        assert (seen["request_is_mine"], seen["bound"]) == (True, True)
        assert seen["current_task"].endswith(".dump_task")


def test_signals_of_calls_are_sent(stage: CeleryStage) -> None:
    result = stage.tasks.add.delay(1, 2)
    assert stage.get(result) == 3
    names = {note["name"] for note in stage.wait_for_notes("signal", id=result.id) if note["name"].startswith("task_p")}
    stage.wait_for_notes("signal", name="task_postrun", id=result.id)
    assert "task_prerun" in names


def test_a_call_is_revoked_before_it_starts(stage: CeleryStage) -> None:
    result = stage.tasks.add.apply_async((1, 2), countdown=3)
    stage.client.control.revoke(result.id)
    assert isinstance(stage.error(result), TaskRevokedError)


def test_a_rate_limit_holds_and_stops_nothing(stage: CeleryStage) -> None:
    """celery#425: with greenlets the worker once hung."""
    name = stage.tasks.ignored.name
    stage.client.control.rate_limit(name, "10/s", reply=True, timeout=10, limit=1)
    began = time.monotonic()
    results = [stage.tasks.ignored.apply_async((n,), ignore_result=False) for n in range(8)]
    assert [stage.get(result) for result in results] == list(range(8))
    assert time.monotonic() - began > 0.5
    stage.client.control.rate_limit(name, 0, reply=True, timeout=10, limit=1)
    assert stage.get(stage.tasks.add.delay(1, 2)) == 3


@pytest.mark.reference
@pytest.mark.parametrize("name", ["threads", "custom"])
def test_celery_lets_calls_in_threads_end_at_a_warm_stop(open_stage: Any, name: str) -> None:
    lets_calls_end(open_stage("celery", "redis", "redis"), name)


def test_calls_end_at_a_warm_stop(open_stage: Any, pool: str) -> None:
    """With greenlets Celery's worker does not: celery#6111."""
    lets_calls_end(open_stage("fastq", "redis", "redis"), pool)


def lets_calls_end(stage: CeleryStage, name: str) -> None:
    worker = start(stage, name)
    gate = stage.gate()
    held = [stage.tasks.hold.delay(str(gate)) for _ in range(CALLS)]
    stage.wait_for_notes("holding", CALLS)
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    gate.touch()
    assert worker.wait() == 0
    assert [stage.get(each) for each in held] == ["opened"] * CALLS


# What Celery's pools cannot do.


@pytest.fixture
def alone(open_stage: Any, pool: str) -> CeleryStage:
    """A stage with a fastq worker of its own."""
    stage: CeleryStage = open_stage("fastq", "amqp", "redis")
    start(stage, pool)
    return stage


def test_a_hard_limit_ends_one_call_and_not_the_worker(alone: CeleryStage) -> None:
    """celery#1177: with gevent it stops the worker; with threads there is none."""
    late = alone.tasks.sleep_for.apply_async((60,), time_limit=0.5)
    assert isinstance(alone.error(late), TimeLimitExceeded)
    assert alone.get(alone.tasks.add.delay(1, 2)) == 3
    assert alone.worker.exit_code is None
    alone.wait_for_empty()


def test_a_soft_limit_is_raised_in_the_call(alone: CeleryStage) -> None:
    """celery#5786, celery#3747: there is none with greenlets and threads. A thread in C hears it at its end."""
    assert isinstance(alone.error(alone.tasks.spin.apply_async((20,), soft_time_limit=0.5)), SoftTimeLimitExceeded)
    assert alone.get(alone.tasks.add.delay(1, 2)) == 3


def test_terminate_ends_the_call_alone(alone: CeleryStage) -> None:
    """celery#4019, celery#9440: with threads it is an error, with gevent the result stays PENDING."""
    gate = alone.gate()
    other = alone.tasks.hold.delay(str(gate))
    revoked = alone.tasks.spin.delay(60)
    alone.wait_for_notes("holding", id=other.id)
    alone.wait_for_notes("spinning", id=revoked.id)
    alone.client.control.revoke(revoked.id, terminate=True)
    assert isinstance(alone.error(revoked), TaskRevokedError)
    gate.touch()
    assert alone.get(other) == "opened"
    assert len(alone.notes("holding", id=other.id)) == 1
    alone.wait_for_empty()


# A pool that is written for Celery.


@pytest.mark.parametrize("name", ["tests.support.hosted_pools:Threads", "tests.support.hosted_pools.Threads"])
def test_the_setting_names_a_pool(open_stage: Any, name: str) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis", worker_pool=name)
    worker = stage.start_worker()
    result = stage.tasks.add.delay(1, 2)
    assert stage.get(result) == 3
    assert f"applies tests.celery.proj.tasks.add {result.id}" in worker.log()


def test_a_pool_that_runs_calls_where_they_are_handed_over_has_the_others_wait(open_stage: Any) -> None:
    """What waits has not started: its limit does not run, and when the process dies it is not to blame."""
    stage: CeleryStage = open_stage("fastq", "amqp", "redis")
    start(stage, "custom", "--reliable", custom="tests.support.hosted_pools:AtOnce")
    results = [stage.tasks.sleep_for.apply_async((0.7,), time_limit=1.5) for _ in range(CALLS)]
    assert [stage.get(result) for result in results] == ["slept"] * CALLS
    stage.wait_for_empty()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_nothing_is_lost_with_the_process(open_stage: Any, how: int) -> None:
    stage: CeleryStage = open_stage("fastq", "amqp", "redis")
    worker = start(stage, "custom", "--reliable")
    gate = stage.gate()
    held = [stage.tasks.hold.delay(str(gate)) for _ in range(3 * CALLS)]
    stage.wait_for_notes("holding", CALLS)
    if how == signal.SIGKILL:
        os.kill(stage.notes("holding")[0]["pid"], how)
        stage.wait_for_notes("holding", 2 * CALLS)
    else:
        worker.signal(how)
        worker.wait_for_log("Warm shutdown")
        gate.touch()
        assert worker.wait() == 0
        start(stage, "custom", "--reliable")
    gate.touch()
    assert [stage.get(each) for each in held] == ["opened"] * len(held)
    stage.wait_for_empty()


def test_a_call_that_the_pool_gives_up_has_an_end(open_stage: Any) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis")
    start(stage, "custom", custom="tests.support.hosted_pools:Drops")
    assert isinstance(stage.error(stage.tasks.add.delay(1, 2)), WorkerLostError)
    stage.wait_for_empty()


def test_a_stop_does_not_wait_for_a_pool_that_does_not_stop(open_stage: Any) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis")
    worker = start(stage, "custom", custom="tests.support.hosted_pools:StopsLate")
    assert stage.get(stage.tasks.add.delay(1, 2)) == 3
    assert worker.stop() == 0


def test_a_pool_that_fails_is_named(open_stage: Any) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis")
    worker = start(stage, "custom", custom="tests.support.hosted_pools:Unwilling")
    stage.tasks.add.delay(1, 2)
    worker.wait_for_log("no more calls")
    worker.kill9()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.support.hosted_pools:Processes", "use -P prefork"),
        ("tests.support.hosted_pools:Greenlets", "use -P gevent"),
        ("tests.support.hosted_pools:OWN", "has no attribute 'OWN'"),
        ("", "CELERY_CUSTOM_WORKER_POOL names none"),
    ],
)
def test_what_cannot_be_hosted_says_what_to_do(open_stage: Any, name: str, said: str) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-P", "custom", env={CUSTOM: name}, await_ready=False)
    assert worker.wait() == 78
    assert said in worker.log()
