"""celery-redbeat: a schedule that lives in Redis."""

from __future__ import annotations

import json
import os
from datetime import timedelta

import redis
from celery import Celery
from redbeat import RedBeatSchedulerEntry

app = Celery("redbeat_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
app.conf.update(
    redbeat_redis_url=os.environ["TOOL_LOCKS"],
    redbeat_lock_timeout=10,
    beat_max_loop_interval=0.5,
    beat_schedule={"configured": {"task": "tick", "schedule": 0.5, "args": ["configured"]}},
)


@app.task(name="tick")
def tick(name: str) -> None:
    with redis.Redis.from_url(os.environ["TOOL_RESULTS"]) as counts:
        counts.hincrby("ticks", name)


def main() -> None:
    """Add an entry while nothing runs."""
    entry = RedBeatSchedulerEntry("added", "tick", timedelta(seconds=0.5), args=["added"], app=app)
    entry.save()
    print(json.dumps(entry.key))


if __name__ == "__main__":
    main()
