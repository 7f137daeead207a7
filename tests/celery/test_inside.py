"""What users' code in the main process finds of the running worker: its consumer, its state, its event loop."""

from __future__ import annotations

from typing import Any

import celery.worker.state
import pytest

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage

APP = "tests.celery.apps.inside"


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_receivers_and_commands_see_the_running_worker(open_stage: Any, kind: Any) -> None:
    stage: CeleryStage = open_stage(*kind)
    worker = stage.start_worker("-c", "1", "-n", "inside@%h", app=APP)
    (ready,) = stage.wait_for_notes("ready")
    assert ready["before"] == ["celery"]
    assert ready["extra"] is True
    assert (ready["processes"], ready["strategies"]) == (1, [True, True])
    assert ready["transport"] in ("amqp", "redis")
    assert ready["prefetch"] in (4, 5)  # before and after an even share in Celery
    for by in ("timer", "hub", "call_soon"):
        stage.wait_for_notes("fired", by=by)

    def ask(command: str, **arguments: Any) -> Any:
        found: list[Any] = []

        def asked() -> bool:
            found[:] = stage.client.control.broadcast(command, arguments=arguments, reply=True, timeout=5, limit=1)
            return bool(found)

        stage.until(asked, f"an answer to {command}")
        (answer,) = found[0].values()
        return answer

    gate = stage.gate()
    calls = [
        stage.client.send_task("hold", (str(gate),), task_id=task_id, queue=queue)
        for task_id, queue in (("first", "extra"), ("second", "celery"))
    ]
    stage.wait_for_notes("holding")
    assert ask("set_level", level=7) == {"ok": 7}
    stage.client.send_task("hold", (str(gate),), task_id="third", countdown=600)
    stage.until(lambda: len(ask("seen")["requests"]) == 3, "all calls are here")
    seen = ask("seen")
    assert seen["active"] in (["first"], ["second"])
    assert seen.pop("active") != []
    prefetch = seen.pop("prefetch")
    assert ask("hold_more", n=7) == {"ok": 7}
    stage.until(lambda: ask("seen")["prefetch"] >= prefetch + 7, "more messages are held in advance")
    reserved = seen.pop("reserved")  # Celery counts what waits for its time, or not
    assert [each for each in reserved if each != "third"] == ["first", "second"]
    is_known = hasattr(celery.worker.state, "scheduled_requests")  # since Celery 5.7
    assert seen.pop("scheduled") == (["third"] if is_known else [])
    assert seen == {
        "level": 7,
        "same": True,
        "hostname": "inside",
        "requests": ["first", "second", "third"],
        "name": "hold",
        "total": {"hold": seen["total"]["hold"]},
    }
    gate.touch()
    assert [stage.get(call) for call in calls] == ["opened", "opened"]
    stage.until(lambda: ask("seen")["total"] == {"hold": 2}, "both are counted")
    assert ask("leave_extra") == {"ok": False}
    held = stage.depth("extra")  # with what waits for its time, on Redis
    stage.client.send_task("hold", (str(gate),), queue="extra")
    assert stage.get(stage.client.send_task("hold", (str(gate),))) == "opened"
    assert stage.depth("extra") == held + 1
    assert worker.stop() == 0
