"""celery-singleton: its Task class locks when a task is sent and unlocks on success and on failure in the worker."""

from __future__ import annotations

import pytest
import redis

from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def test_a_second_call_is_the_first_one_until_it_has_run(tool: Tool) -> None:
    single, same_single, failing, same_failing = tool.client("singleton")
    assert (single, failing) == (same_single, same_failing)
    with redis.Redis.from_url(tool.environment["TOOL_LOCKS"]) as locks:
        assert len(locks.keys()) == 2
        worker = tool.worker("singleton")
        wait_for(lambda: not locks.keys(), 20.0, lambda: f"still locked: {locks.keys()}\n{worker.log()}")
    assert tool.client("singleton", single, failing) == [["1", "SUCCESS"], ["1", "FAILURE"]]
    again, *_ = tool.client("singleton")
    assert again != single
