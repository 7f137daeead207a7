"""celery-aio-pool: a pool that awaits coroutine functions on a loop of its own, by a tracer of its own."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from celery import Celery, Task

app = Celery("aio_pool_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])


@app.task(name="awaited", bind=True)
async def awaited(self: Task, seconds: float) -> list[Any]:
    await asyncio.sleep(seconds)
    return [self.request.id, type(asyncio.get_running_loop()).__name__ != ""]


@app.task(name="plain")
def plain(x: int, y: int) -> int:
    return x + y


@app.task(name="failing")
async def failing(text: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(text)


def main() -> None:
    """Call each task, and print what came of it."""
    coroutine = awaited.delay(0.1)
    chained = (plain.s(1, 2) | plain.s(3)).delay()
    failed = failing.delay("no")
    error = failed.get(timeout=20, propagate=False)
    mine, has_loop = coroutine.get(timeout=20)
    print(json.dumps([mine == coroutine.id, has_loop, chained.get(timeout=20), [failed.state, repr(error)]]))


if __name__ == "__main__":
    main()
