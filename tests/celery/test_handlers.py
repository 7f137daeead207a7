"""Receivers of signals and logging handlers in the main process may block, and start event loops of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage, Servers, opened
from tests.conftest import OwnRedis
from tests.support.fault_proxy import FaultProxy

APP = "tests.celery.apps.handlers"


def send(stage: CeleryStage, value: int, **options: Any) -> AsyncResult:
    return stage.client.send_task("echo", (value,), **options)


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def played(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    """A stage whose worker has had every kind of message and has ended."""
    with opened(servers, tmp_path_factory, *request.param) as stage:
        worker = stage.start_worker("-c", "1", app=APP)
        calls = [send(stage, number, task_id=f"echo-{number}") for number in range(20)]
        stage.send("nobody_knows")
        send(stage, 1, task_id="late", countdown=2.5, expires=2)
        with stage.client.producer_pool.acquire() as producer:
            producer.publish({"neither": "protocol"}, routing_key="celery", exchange="")
        for call in calls:
            stage.get(call)
        for name in ("task_rejected", "task_unknown", "task_revoked", "heartbeat_sent"):
            stage.wait_for_notes("handler", name=name)
        assert worker.stop() == 0
        yield stage


def test_every_receiver_can_run_an_event_loop_of_its_own(played: CeleryStage) -> None:
    notes = played.notes("handler")
    assert {note["came"] for note in notes} == {"42"}
    assert {note["name"] for note in notes} == {
        *("worker_ready", "worker_shutting_down", "worker_shutdown", "heartbeat_sent"),
        *("task_received", "task_rejected", "task_unknown", "task_revoked"),
    }


def test_receivers_of_the_workers_life_are_called_once_and_in_order(played: CeleryStage) -> None:
    names = [note["name"] for note in played.notes("handler") if note["name"].startswith("worker_")]
    assert names == ["worker_ready", "worker_shutting_down", "worker_shutdown"]


def test_task_received_is_over_when_the_task_begins(played: CeleryStage) -> None:
    for number in range(20):
        found = [(note["what"], note.get("name")) for note in played.notes(id=f"echo-{number}")]
        assert found == [("handler", "task_received"), ("ran", None)]


def test_a_logging_handler_of_the_applications_can_run_an_event_loop(played: CeleryStage) -> None:
    notes = played.notes("record")
    assert {note["came"] for note in notes} == {"42"}
    messages = [note["message"] for note in notes]
    # In order, and up to the last one.
    ready = next(i for i, message in enumerate(messages) if message.endswith(" ready."))
    received = [i for i, message in enumerate(messages) if message.startswith("Task echo[echo-")]
    assert ready < received[0]
    assert len([message for message in messages if message.endswith("received")]) == 21


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_worker_ready_is_over_when_the_first_task_begins(open_stage: Any, kind: Any) -> None:
    stage: CeleryStage = open_stage(*kind)
    call = send(stage, 1, task_id="first")
    gate = stage.gate()
    worker = stage.start_worker("-c", "1", app=APP, env={"HANDLERS_GATE": str(gate)}, await_ready=False)
    stage.wait_for_notes("handler", name="worker_ready")
    if kind[0] == "fastq":
        # The loop goes on meanwhile; Celery's worker is deaf.
        assert stage.client.control.ping(timeout=5, limit=1)
    gate.touch()
    assert stage.get(call) == 1
    assert [note["what"] for note in stage.notes() if note["what"] in ("ready_done", "ran")] == ["ready_done", "ran"]
    assert worker.stop() == 0


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
def test_a_receiver_that_raises_worker_shutdown_ends_the_worker(open_stage: Any, kind: Any) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "1", app=APP, env={"HANDLERS_END": "shutdown"}, await_ready=False)
    assert worker.wait() == 0
    assert stage.notes("handler", name="worker_shutdown")


@pytest.mark.parametrize("fault", ["cut", "restarted"])
@pytest.mark.parametrize("broker", [pytest.param("amqp", marks=pytest.mark.rabbitmq), "redis"])
def test_worker_ready_is_told_once_in_a_workers_life(
    open_stage: Any, own_redis: OwnRedis, fault_proxy: Callable[[str, int], FaultProxy], broker: Any, fault: str
) -> None:
    # Celery tells it again with each connection.
    stage: CeleryStage = open_stage("fastq", broker, "disabled")
    server = stage.rabbitmq or own_redis().start()
    proxy = fault_proxy("127.0.0.1", server.port)
    url = stage.broker_url if stage.rabbitmq else server.url()
    worker = stage.start_worker("-c", "1", app=APP, settings={"broker_url": proxy.url(url)})
    if fault == "cut":
        proxy.cut()
    else:
        server.restart()
    worker.wait_for_log(r"Connection to broker lost[^§]* ready\.", 60)
    assert worker.stop() == 0
    assert len(stage.notes("handler", name="worker_ready")) == 1
