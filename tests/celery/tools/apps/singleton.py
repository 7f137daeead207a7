"""celery-singleton: a second call of a waiting task is the first one's result."""

from __future__ import annotations

import json
import os
import sys

from celery import Celery
from celery_singleton import Singleton

app = Celery("singleton_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
app.conf.singleton_backend_url = os.environ["TOOL_LOCKS"]


@app.task(name="single", base=Singleton)
def single(order: int) -> int:
    return order


@app.task(name="failing", base=Singleton)
def failing(order: int) -> None:
    raise ValueError(order)


def main() -> None:
    """Call each task twice and print the ids; with ids as arguments, print what became of them."""
    if ids := sys.argv[1:]:
        results = [app.AsyncResult(task_id) for task_id in ids]
        print(json.dumps([[str(result.get(timeout=20, propagate=False)), result.state] for result in results]))
    else:
        print(json.dumps([call.delay(1).id for call in (single, single, failing, failing)]))


if __name__ == "__main__":
    main()
