"""Tasks whose messages the test catches: they send to a queue that no worker consumes."""

from __future__ import annotations

from typing import Any

from celery import Task

from tests.celery.proj.app import app
from tests.celery.proj.errors import PlainError
from tests.celery.proj.tasks import add, nothing

CAUGHT = "caught"


@app.task(bind=True)
def publish(self: Task, **options: Any) -> str:
    """Send one call to the caught queue."""
    return str(add.apply_async((1,), {"y": "ä"}, queue=CAUGHT, origin="gen@test", **options).id)


@app.task(bind=True, max_retries=3)
def publish_retry(self: Task, x: int) -> None:
    """Retry, with the next attempt going to the caught queue."""
    raise self.retry(exc=PlainError("again"), countdown=60, queue=CAUGHT)


@app.task(bind=True)
def publish_replacement(self: Task) -> None:
    raise self.replace(add.s(5, 5).set(queue=CAUGHT))


@app.task
def fail_for_errback() -> None:
    raise PlainError("for the errback")


@app.task(bind=True)
def publish_in_formats(self: Task, serializer: str, compression: str | None) -> None:
    """Send a call in another format, to be run by a worker."""
    nothing.apply_async(serializer=serializer, compression=compression)
