"""A call's states reach its caller in their order, by `rpc://` too, where each is a message."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage

APP = "tests.celery.apps.states"
CALLS = 25

RUN = ["STARTED", "PROGRESS 0", "PROGRESS 1", "PROGRESS 2"]
STATES = {"well": [*RUN, "SUCCESS"], "fail": [*RUN, "FAILURE"], "retry": [*RUN, "RETRY", *RUN, "SUCCESS"]}


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "rpc")))
def test_replies_come_in_the_order_of_the_states(open_stage: Any, kind: Any) -> None:
    stage: CeleryStage = open_stage(*kind)
    stage.start_worker("-c", "2", app=APP)
    with stage.client.connection_for_write() as connection:
        connection.SimpleQueue("replies").close()
    wanted = {}
    for _ in range(CALLS):
        for end, states in STATES.items():
            # With a follow-up a call runs through Celery's tracer.
            for link in (None, stage.client.signature("nothing", ignore_result=True)):
                call = stage.client.send_task("steps", (end,), reply_to="replies", link=link, ignore_result=False)
                wanted[call.id] = states
    found = defaultdict(list)
    for message in stage.take("replies", sum(map(len, wanted.values()))):
        meta = message.payload
        assert message.properties["correlation_id"] == meta["task_id"]
        done = f" {meta['result']['done']}" if meta["status"] == "PROGRESS" else ""
        found[meta["task_id"]].append(meta["status"] + done)
    assert found == wanted
