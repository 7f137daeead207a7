"""celery-once: its Task class locks when a task is sent and unlocks in the worker."""

from __future__ import annotations

import pytest
import redis

from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def test_a_task_is_queued_once_until_it_has_run(tool: Tool) -> None:
    assert tool.client("once", "queue") == [[False, True, False], ["PENDING", "REJECTED"], ["PENDING"]]
    with redis.Redis.from_url(tool.environment["TOOL_LOCKS"]) as locks:
        assert sorted(locks.keys()) == [
            b"qo_failing_order-1",
            b"qo_once_order-1",
            b"qo_once_order-2",
            b"qo_unlocked_again-True",
        ]
        worker = tool.worker("once")
        wait_for(lambda: not locks.keys(), 20.0, lambda: f"still locked: {locks.keys()}\n{worker.log()}")
    assert tool.client("once", "again") == [[True, "SUCCESS"], [True, "FAILURE"]]
