"""``-P solo``: calls in the worker's own process, under Celery and under fastq."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage, Servers, opened

KINDS = (("amqp", "rpc"), ("redis", "redis"), ("redis", "database"))


@pytest.fixture(params=stages(*KINDS), scope="module")
def stage(request: Any, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param, extras=("signals",)) as found:
        found.start_worker("-P", "solo", "-c", "4")
        yield found


def test_calls_run_in_the_worker_itself(stage: CeleryStage) -> None:
    seen = stage.get(stage.tasks.dump_request.delay())
    assert seen["hostname"] == f"celery@{socket.gethostname()}"
    assert stage.get(stage.tasks.sleep_for.delay(0)) == "slept"
    assert {note["pid"] for note in stage.notes("holding")} == {stage.worker.pid}


def test_receivers_of_the_process_signal_are_called_once_in_it(stage: CeleryStage) -> None:
    stage.get(stage.tasks.add.delay(1, 2))
    (note,) = stage.notes("signal", name="worker_process_init")
    assert (note["pid"], note["sender"]) == (stage.worker.pid, "str:celery")


def test_ends_of_calls_are_as_in_children(stage: CeleryStage) -> None:
    assert isinstance(stage.error(stage.tasks.fail.delay("ValueError", "no")), ValueError)
    assert stage.get(stage.tasks.retry_until.delay(2)) == 2
    assert stage.get((stage.tasks.add.s(1, 2) | stage.tasks.add.s(3)).delay()) == 6


def test_statistics_show_the_process(stage: CeleryStage) -> None:
    (found,) = (stage.client.control.inspect(timeout=5).stats() or {}).values()
    pool = found["pool"]
    assert pool["implementation"].partition(":")[0] in ("celery.concurrency.solo", "fastq.pool.solo")
    assert {name: value for name, value in pool.items() if name != "implementation"} == {
        "max-concurrency": 1,
        "processes": [stage.worker.pid],
        "max-tasks-per-child": None,
        "put-guarded-by-semaphore": True,
        "timeouts": [],
    }


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
def test_the_setting_names_it_too_and_a_stop_lets_the_call_end(open_stage: Any, kind: Any) -> None:
    stage: CeleryStage = open_stage(*kind, worker_pool="solo")
    worker = stage.start_worker()
    opening = stage.gate()
    held = stage.tasks.hold.delay(str(opening))
    stage.wait_for_notes("holding", id=held.id)
    worker.signal(signal.SIGTERM)
    if kind[0] == "fastq":
        worker.wait_for_log("Warm shutdown")
    opening.touch()
    assert worker.wait() == 0
    assert stage.get(held) == "opened"
    assert {note["pid"] for note in stage.notes("holding")} == {worker.pid}


@pytest.mark.redis
@pytest.mark.rabbitmq
@pytest.mark.parametrize(("broker", "backend"), KINDS)
def test_limits_and_terminate_end_the_call_alone(open_stage: Any, broker: Any, backend: Any) -> None:
    """Celery's own has neither."""
    stage: CeleryStage = open_stage("fastq", broker, backend)
    worker = stage.start_worker("-P", "solo")
    assert stage.get(stage.tasks.wait_for_soft_limit.apply_async((True,), soft_time_limit=0.5))
    late = stage.tasks.sleep_for.apply_async((60,), time_limit=0.5)
    assert isinstance(stage.error(late), TimeLimitExceeded)
    revoked = stage.tasks.sleep_for.delay(60)
    stage.wait_for_notes("holding", id=revoked.id)
    stage.client.control.revoke(revoked.id, terminate=True)
    assert isinstance(stage.error(revoked), TaskRevokedError)
    assert stage.get(stage.tasks.add.delay(1, 2)) == 3
    assert worker.stop() == 0
    stage.wait_for_empty()


@pytest.mark.redis
def test_a_cold_stop_of_a_reliable_worker_gives_the_call_back(open_stage: Any) -> None:
    stage: CeleryStage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-P", "solo", "--reliable")
    held = stage.tasks.sleep_for.delay(60)
    stage.wait_for_notes("holding", id=held.id)
    began = time.monotonic()
    worker.signal(signal.SIGQUIT)
    assert worker.wait(15) == 1
    assert time.monotonic() - began < 8
    assert stage.depth() == 1
    assert held.state == "PENDING"


@pytest.mark.redis
def test_the_beat_runs_beside_it(open_stage: Any) -> None:
    beats = {"each": {"task": "tests.celery.proj.tasks.note_time", "schedule": 0.3}}
    stage: CeleryStage = open_stage("fastq", "redis", "redis", beat_schedule=beats)
    worker = stage.start_worker("-P", "solo", "-B")
    assert {note["pid"] for note in stage.wait_for_notes("ran", 3)} == {worker.pid}
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
