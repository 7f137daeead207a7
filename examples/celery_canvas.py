"""A plain Celery application with workflows, under either worker.

    python -m examples.celery_canvas --with celery
    python -m examples.celery_canvas --with fastq
    python -m examples.celery_canvas --with fastq --broker redis://localhost/0

Both print the same. The application is Celery's alone and knows nothing of fastq: by hand, its worker is started with
`celery -A examples.celery_canvas worker` or with `fastq -A examples.celery_canvas worker`, on the same broker, with the
same options. Both may also run at once and share the queue. A broker that is no Redis needs EXAMPLE_RESULTS beside it,
the URL of a result store that has chords.

What it shows: a chain passes each value on; a group runs side by side and keeps its order; a chord gives all the
values to its body; a callback runs after a success and an errback after a failure; a task that fails now and then is
retried; a task goes on as another one; a failed step ends its chain. Results are kept in the broker's Redis.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from celery import Celery, Task, chain, chord, group
from celery.result import AsyncResult

from examples.celery_worker import broker, parse_options, worker, working_folder

TIMEOUT_S = 30.0

app = Celery("examples.celery_canvas")
app.conf.broker_url = os.environ.get("EXAMPLE_BROKER", "redis://localhost/0")
app.conf.result_backend = os.environ.get("EXAMPLE_RESULTS", app.conf.broker_url)
app.conf.broker_connection_retry_on_startup = True


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def remember(value: Any, name: str) -> None:
    """Keep a value where the caller finds it: as the result of a call with a known id."""
    app.backend.store_result(name, value, "SUCCESS")


@app.task
def explain(request: Any, error: Exception, traceback: str, name: str) -> None:
    """Errbacks get the failed call's request, its error and its traceback."""
    app.backend.store_result(name, f"{request.task.rpartition('.')[2]} failed: {error}", "SUCCESS")


@app.task
def divide(x: int, y: int) -> float:
    return x / y


class NotYet(Exception):
    """Something elsewhere is not ready."""


@app.task(bind=True, autoretry_for=(NotYet,), max_retries=5, default_retry_delay=0)
def third_time_lucky(self: Task) -> str:
    if self.request.retries < 2:
        raise NotYet
    return f"done at attempt {self.request.retries + 1}"


@app.task(bind=True)
def factorial(self: Task, n: int, product: int = 1) -> int:
    if n <= 1:
        return product
    raise self.replace(factorial.s(n - 1, product * n))


def get(result: AsyncResult) -> Any:
    return result.get(timeout=TIMEOUT_S)


def show() -> None:
    """Send each workflow and print what comes back."""
    print("chain      ", get(chain(add.s(1, 2), add.s(3), add.s(4))()))
    print("group      ", get(group(add.s(n, n) for n in range(5))()))
    print("chord      ", get(chord((add.s(n, n) for n in range(10)), total.s())()))
    steps = chain(add.s(1, 1), group(add.s(n) for n in range(3)), total.s(), add.s(100))()
    print("all of them", get(steps.parent.parent), "then", get(steps))
    add.apply_async((20, 22), link=remember.s("callback"))
    print("callback   ", get(app.AsyncResult("callback")))
    divide.apply_async((1, 0), link_error=explain.s(name="errback"))
    print("errback    ", get(app.AsyncResult("errback")))
    print("retry      ", get(third_time_lucky.delay()))
    print("replace    ", get(factorial.delay(10)))
    failing = chain(divide.s(1, 0), add.s(1))()
    print("failed step", type(failing.get(timeout=TIMEOUT_S, propagate=False)).__name__)


def main() -> int:
    options = parse_options(__doc__)
    with working_folder() as folder, broker(options.broker, folder) as url:
        app.conf.broker_url = url
        app.conf.result_backend = os.environ.get("EXAMPLE_RESULTS", url)
        environment = {"EXAMPLE_BROKER": url, "EXAMPLE_RESULTS": app.conf.result_backend}
        with worker(options.program, "examples.celery_canvas", folder, environment):
            show()
        # Celery waits for steps that nobody asked for until they are collected, and unsubscribes then: let that be now.
        for waiting in app.backend._pending_results:
            waiting.clear()
        gc.collect()
        app.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
