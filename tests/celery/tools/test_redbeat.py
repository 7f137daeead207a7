"""celery-redbeat: `celery beat` with its scheduler feeds the worker from entries of the settings and of Redis."""

from __future__ import annotations

import json

import pytest
import redis

from tests.celery.tools.tool import APPS, Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def test_what_the_schedule_in_redis_says_is_run(tool: Tool) -> None:
    key = tool.client("redbeat_app")
    worker = tool.worker("redbeat_app")
    beat_log = tool.helper("-m", "celery", "-A", f"{APPS}.redbeat_app", "beat", "-S", "redbeat.RedBeatScheduler")
    with (
        redis.Redis.from_url(tool.environment["TOOL_RESULTS"], decode_responses=True) as counts,
        redis.Redis.from_url(tool.environment["TOOL_LOCKS"], decode_responses=True) as schedule,
    ):

        def both_ticked_twice() -> bool:
            ticks = counts.hgetall("ticks")
            return all(int(ticks.get(name, 0)) >= 2 for name in ("added", "configured"))

        wait_for(both_ticked_twice, 30.0, lambda: f"{counts.hgetall('ticks')}\n{beat_log()}\n{worker.log()}")
        assert json.loads(schedule.hget(key, "meta"))["total_run_count"] >= 2
