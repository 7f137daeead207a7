"""celery-batches: tasks are gathered in the worker and run together, by the task class's own Strategy."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence

from celery import Celery
from celery_batches import Batches, SimpleRequest

app = Celery("batches_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
# It holds more messages than there are children, until a batch is complete.
app.conf.worker_prefetch_multiplier = 20


def answer(requests: Sequence[SimpleRequest]) -> None:
    """Answer each call with the size of its batch."""
    for request in requests:
        app.backend.mark_as_done(request.id, [len(requests), *request.args], request=request)


@app.task(name="by_count", base=Batches, flush_every=3, flush_interval=60)
def by_count(requests: Sequence[SimpleRequest]) -> None:
    answer(requests)


@app.task(name="by_time", base=Batches, flush_every=100, flush_interval=2)
def by_time(requests: Sequence[SimpleRequest]) -> None:
    answer(requests)


@app.task(name="plain")
def plain() -> str:
    return "at once"


def main() -> None:
    """Send a full batch, a part of one, one for later, and a task of the usual kind beside them."""
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=4.5)
    calls = [by_count.delay(n) for n in range(3)]
    calls += [by_time.delay(3), by_time.delay(4), by_time.apply_async((5,), eta=later), plain.delay()]
    print(json.dumps([call.get(timeout=20) for call in calls]))


if __name__ == "__main__":
    main()
