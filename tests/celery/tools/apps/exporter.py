"""The application that celery-exporter watches: the exporter reads the worker's events, and asks it what it does."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery

app = Celery("exporter_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
app.conf.update(task_send_sent_event=True, worker_send_task_events=True)


@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="crash")
def crash() -> None:
    raise ValueError("no luck")


@app.task(name="flaky", bind=True, max_retries=1)
def flaky(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(exc=ConnectionError("not yet"), countdown=0)
    return "second time"


def main() -> None:
    """Send every task; print the states."""
    results = [add.delay(1, 2), add.delay(3, 4), crash.delay(), flaky.delay()]
    for result in results:
        result.get(timeout=20, propagate=False)
    add.apply_async((5, 6), expires=-1)
    print(json.dumps([result.state for result in results]))


if __name__ == "__main__":
    main()
