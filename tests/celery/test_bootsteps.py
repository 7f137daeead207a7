"""Steps that an application adds to the worker and to its consumer: made, started and stopped as under Celery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import bootsteps

from fastq.celery.worker.bootsteps import in_order
from tests.celery.conftest import stages
from tests.celery.herald import Capture
from tests.celery.stage import CeleryStage, Servers, opened

APP = "tests.celery.apps.steps"


def did(stage: CeleryStage, *steps: str) -> list[tuple[str, str]]:
    """Return what steps did, in order; all that were noted unless some are named."""
    notes = stage.notes("step")
    return [(note["step"], note["did"]) for note in notes if not steps or note["step"] in steps]


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def ended(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    """A stage whose worker has run, received a letter and ended."""
    with opened(servers, tmp_path_factory, *request.param) as stage:
        with Capture(stage.client) as listener:
            worker = stage.start_worker("-c", "1", "-n", "steps@%h", app=APP)
            stage.get(stage.client.send_task("echo", (1,), task_id="echoed"))
            stage.wait_for_notes("step", step="Letters", did="consumers")
            with stage.client.producer_pool.acquire() as producer:
                producer.publish({"dear": "reader"}, exchange="letters", routing_key="letters", retry=True)
            for step, what in (("Letters", "letter"), ("Third", "tick"), ("Third", "later"), ("Beside", "after")):
                stage.wait_for_notes("step", step=step, did=what)
            stage.settings["events"] = listener.until("worker-custom")
        assert worker.stop() == 0
        yield stage


def test_steps_are_started_behind_those_that_they_require_and_stopped_the_other_way_round(ended: CeleryStage) -> None:
    chain = ("Zeroth", "Second", "Third")
    notes = did(ended, *chain)
    for what in ("made", "start"):
        assert [step for step, done in notes if done == what] == ["Zeroth", "Third", "Second"], what
    assert [step for step, done in notes if done == "stop"] == ["Second", "Third", "Zeroth"]
    assert {step for step, done in notes if done == "close"} == set(chain)
    for step in chain:
        order = [done for name, done in notes if name == step and done not in ("tick", "later")]
        assert order == ["made", "create", "start", "close", "stop"]


def test_all_steps_are_made_before_one_is_started(ended: CeleryStage) -> None:
    whats = [what for _, what in did(ended)]
    assert max(i for i, what in enumerate(whats) if what == "made") < whats.index("start")


def test_steps_live_in_the_main_process(ended: CeleryStage) -> None:
    assert {note["role"] for note in ended.notes("step")} == {"main"}


def test_each_step_gets_its_blueprints_object(ended: CeleryStage) -> None:
    made = {note["step"]: note["parent"] for note in ended.notes("step", did="made")}
    assert made == {
        **dict.fromkeys(("Zeroth", "Second", "Third", "Left", "Failing", "Stopping"), "Worker"),
        "Beside": "Consumer",
    }


def test_a_step_that_does_not_want_to_be_included_is_not_started(ended: CeleryStage) -> None:
    assert did(ended, "Left") == [("Left", "made")]


def test_a_step_sees_the_worker_and_its_timer(ended: CeleryStage) -> None:
    (tick,) = ended.notes("step", did="tick")
    left_out = ("what", "role", "pid", "at", "step", "did")
    assert {key: value for key, value in tick.items() if key not in left_out} == {
        "hostname": "steps",
        "app": True,
        "processes": 1,
        "concurrency": 1,
        "consumer": "Consumer",
    }


def test_what_a_step_connects_when_it_is_made_is_called_in_children(ended: CeleryStage) -> None:
    assert [note["role"] for note in ended.notes("prerun", id="echoed")] == ["child"]


def test_a_step_of_the_consumer_receives_messages_of_its_own(ended: CeleryStage) -> None:
    (letter,) = ended.notes("step", did="letter")
    assert letter["body"] == {"dear": "reader"}
    assert ended.depth("letters") <= 0


def test_a_step_of_the_consumer_is_stopped_and_shut_down(ended: CeleryStage) -> None:
    assert did(ended, "Beside") == [
        ("Beside", what) for what in ("made", "create", "start", "after", "close", "stop", "shutdown")
    ]


def test_a_step_can_send_an_event(ended: CeleryStage) -> None:
    (event,) = ended.settings["events"]
    assert (event["type"], event["note"], event["hostname"].partition("@")[0]) == (
        "worker-custom",
        "from a step",
        "steps",
    )


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
def test_a_step_that_raises_worker_shutdown_ends_the_worker(open_stage: Any, kind: Any) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "1", app=APP, env={"STEPS_FAIL": "Stopping"}, await_ready=False)
    assert worker.wait() == 0
    assert ("Stopping", "start") in did(stage)


def test_a_step_that_cannot_start_is_named_and_the_worker_goes_on(open_stage: Any) -> None:
    # Celery's worker ends, with a traceback.
    stage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-c", "1", app=APP, env={"STEPS_FAIL": "Failing"})
    assert stage.get(stage.client.send_task("echo", (1,))) == 1
    found = worker.wait_for_log(r"Could not start the step tests\.celery\.apps\.steps\.Failing: (.*)\n")
    assert found[1] == "ValueError('this step cannot start'). The worker goes on without it"
    assert worker.stop() == 0
    assert ("Failing", "stop") not in did(stage)
    assert ("Third", "stop") in did(stage)


@pytest.mark.rabbitmq
def test_steps_of_the_consumer_are_started_again_when_the_broker_comes_back(open_stage: Any, servers: Servers) -> None:
    stage = open_stage("fastq", "amqp", "rpc")
    worker = stage.start_worker("-c", "1", app=APP)
    stage.wait_for_notes("step", step="Letters", did="consumers")
    stage.rabbitmq.close_connections()
    stage.wait_for_notes("step", 2, step="Letters", did="consumers")
    with stage.client.producer_pool.acquire() as producer:
        producer.publish({"dear": "again"}, exchange="letters", routing_key="letters", retry=True)
    stage.wait_for_notes("step", step="Letters", did="letter")
    assert worker.stop() == 0


def test_steps_that_require_each_other_are_refused() -> None:
    class One(bootsteps.Step):
        pass

    class Other(bootsteps.Step):
        requires = (One,)

    One.requires = (Other,)
    with pytest.raises(ValueError, match=r"require each other: .*One -> .*Other -> .*One\. Remove"):
        list(in_order([One, Other]))
