"""The same as ``tests.support.tasks_under_attack`` as a Celery application."""

from __future__ import annotations

import json
import os

import celery

from tests.support.task_ledger import record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")

app = celery.Celery(
    "attacked", broker=os.environ.get("FASTQ_BROKER_URL"), backend=os.environ.get("FASTQ_RESULT_BACKEND", "rpc://")
)
app.conf.update(json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}")))


@app.task(name="work")
def work(number: int, *ignored: object, **also_ignored: object) -> int:
    """Return the number."""
    record_start(LEDGER, number)
    record_done(LEDGER, number)
    return number
