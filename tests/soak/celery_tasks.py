"""The Celery application of a soak: SOAK_SETTINGS has its settings as JSON, FASTQ_TEST_LEDGER the ledger's path."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace
from typing import Any

from celery import Celery

from tests.support.task_ledger import record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")


def make_app(settings: dict[str, Any], **options: Any) -> Celery:
    """Return the application without its tasks: what a sender needs."""
    made = Celery("soak", **options)
    made.config_from_object(SimpleNamespace(**settings))
    return made


app = make_app(json.loads(os.environ.get("SOAK_SETTINGS", "{}")), set_as_current=False)


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
def retry_once(self: Any, number: int, countdown_s: float) -> None:
    record_start(LEDGER, number)
    if not self.request.retries:
        raise self.retry(countdown=countdown_s)
    record_done(LEDGER, number)


@app.task(name="collect")
def collect(values: list[int], number: int) -> int:
    """The body of a chord."""
    record_start(LEDGER, number)
    assert sorted(values) == [number - 2, number - 1]
    record_done(LEDGER, number)
    return number
