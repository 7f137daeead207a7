"""The FastQ application of workers under attack: its task takes what comes. Settings: ``support.tasks_for_faults``."""

from __future__ import annotations

import json
import os

from fastq import FastQ
from tests.support.task_ledger import record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")

app = FastQ("attacked", **json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}")))


@app.task(name="work")
def work(number: int, *ignored: object, **also_ignored: object) -> int:
    """Return the number."""
    record_start(LEDGER, number)
    record_done(LEDGER, number)
    return number
