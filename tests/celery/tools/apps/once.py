"""celery-once: a task that is queued once at a time, by locks in Redis."""

from __future__ import annotations

import json
import os

from celery import Celery
from celery_once import AlreadyQueued, QueueOnce

app = Celery("once_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
app.conf.ONCE = {
    "backend": "celery_once.backends.Redis",
    "settings": {"url": os.environ["TOOL_LOCKS"], "default_timeout": 60},
}


@app.task(name="once", base=QueueOnce)
def once(order: int) -> int:
    return order


@app.task(name="failing", base=QueueOnce, once={"graceful": True})
def failing(order: int) -> None:
    raise ValueError(order)


@app.task(name="unlocked", base=QueueOnce, once={"unlock_before_run": True, "graceful": True})
def unlocked(again: bool) -> str:
    """Queue itself while it runs: allowed, as the lock went before."""
    return unlocked.delay(again=False).state if again else "ran"


def refused(order: int) -> bool:
    try:
        once.delay(order)
    except AlreadyQueued:
        return True
    return False


def queue() -> list[object]:
    """Queue each task twice while no worker runs."""
    return [
        [refused(1), refused(1), refused(2)],
        [failing.delay(1).state, failing.delay(1).state],
        [unlocked.delay(again=True).state],
    ]


def again() -> list[object]:
    """Queue them again after they have run, successfully or not."""
    results = [once.delay(1), failing.delay(1)]
    return [[result.get(timeout=20, propagate=False) is not None, result.state] for result in results]


if __name__ == "__main__":
    import sys

    print(json.dumps(queue() if sys.argv[1] == "queue" else again()))
