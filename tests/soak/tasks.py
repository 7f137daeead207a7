"""The FastQ application of a soak. Its environment is that of tests.support.tasks_for_faults."""

from __future__ import annotations

import json
import os
import time

from fastq import FastQ, Task
from tests.support.task_ledger import record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")

app = FastQ("soak", **json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}")))


@app.task(name="work", ignore_result=True)
def work(number: int, seconds: float = 0.0) -> None:
    record_start(LEDGER, number)
    if seconds:
        time.sleep(seconds)
    record_done(LEDGER, number)


@app.task(name="answer")
def answer(number: int) -> int:
    record_start(LEDGER, number)
    record_done(LEDGER, number)
    return number


@app.task(name="fail", ignore_result=True)
def fail(number: int) -> None:
    record_start(LEDGER, number)
    record_done(LEDGER, number)
    raise ValueError(number)


@app.task(name="retry_once", bind=True, ignore_result=True)
def retry_once(self: Task[..., None], number: int, countdown_s: float) -> None:
    record_start(LEDGER, number)
    if not self.request.retries:
        self.retry(countdown=countdown_s)
    record_done(LEDGER, number)


@app.task(name="send_next", ignore_result=True)
def send_next(number: int) -> None:
    """Send the next number from inside a task."""
    record_start(LEDGER, number)
    work.delay(number + 1)
    record_done(LEDGER, number)
