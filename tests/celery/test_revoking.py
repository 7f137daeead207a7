"""What `revoke` does to the stored state of a task that it does not end."""

from __future__ import annotations

import socket
import uuid
from functools import partial
from typing import Any

import celery
import pytest

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage


@pytest.mark.parametrize("kind", stages(("amqp", "redis"), ("redis", "redis")))
def test_revoke_leaves_the_state_of_a_task_that_a_worker_has_begun(open_stage: Any, kind: Any) -> None:
    if kind[0] == "celery" and celery.VERSION < (5, 7):
        pytest.skip("Celery before 5.7 overwrites it")
    stage: CeleryStage = open_stage(*kind)
    stage.start_worker("-c", "3", "-n", "running@%h")
    stage.start_worker("-c", "1", "-n", "other@%h", "-Q", "other")
    opening = stage.gate()
    gate = str(opening)
    tracked, silent = stage.tasks.hold_tracked.delay(gate), stage.tasks.hold.delay(gate)
    own = stage.tasks.report_progress.delay(gate)
    stage.until(lambda: [tracked.state, own.state] == ["STARTED", "PROGRESS"], "both have begun")
    stage.wait_for_notes("holding", id=silent.id)
    later = stage.tasks.add.apply_async((1, 2), countdown=60)
    for name in ("running", "other"):
        node = f"{name}@{socket.gethostname()}"
        stage.until(partial(stage.client.control.ping, [node], timeout=1), f"an answer of {node}")
        # Each in its turn; of the task that runs without a state only its own worker knows. The last one tells when
        # the ones before it were dealt with.
        ids = [tracked.id, own.id, later.id, *([silent.id] if name == "running" else [])]
        last = stage.client.AsyncResult(str(uuid.uuid4()))
        for task_id in (*ids, last.id):
            stage.client.control.revoke(task_id, destination=[node])
        stage.until(lambda result=last: result.state == "REVOKED", "the last one is revoked")
        assert [each.state for each in (tracked, own, silent, later)] == ["STARTED", "PROGRESS", "PENDING", "REVOKED"]
    opening.touch()
    assert [stage.get(each) for each in (tracked, own, silent)] == ["opened", "done", "opened"]
