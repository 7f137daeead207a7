"""celery-redbeat: its scheduler, in `celery beat` or `worker -B`, feeds the worker from the settings and from Redis."""

from __future__ import annotations

import json

import pytest
import redis

from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


@pytest.mark.parametrize("is_inside", [False, True], ids=["beat", "worker -B"])
def test_what_the_schedule_in_redis_says_is_run(tool: Tool, is_inside: bool) -> None:
    key = tool.client("redbeat_app")
    worker, beat_log = tool.worker_and_beat("redbeat_app", "redbeat.RedBeatScheduler", is_inside)
    with (
        redis.Redis.from_url(tool.environment["TOOL_RESULTS"], decode_responses=True) as counts,
        redis.Redis.from_url(tool.environment["TOOL_LOCKS"], decode_responses=True) as schedule,
    ):

        def both_ticked_twice() -> bool:
            ticks = counts.hgetall("ticks")
            return all(int(ticks.get(name, 0)) >= 2 for name in ("added", "configured"))

        wait_for(both_ticked_twice, 30.0, lambda: f"{counts.hgetall('ticks')}\n{beat_log()}\n{worker.log()}")
        assert json.loads(schedule.hget(key, "meta"))["total_run_count"] >= 2
