"""A Django project in one module: django-celery-results as result store, django-celery-beat as schedule, SQLite."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import django
from celery import Celery, chord, group
from django.conf import settings
from django.core.management import call_command

settings.configure(
    SECRET_KEY="for tests",
    INSTALLED_APPS=["django_celery_results", "django_celery_beat"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": str(Path(os.environ["TOOL_FOLDER"], "site.db")),
            # As Django's manual has it for several writers: one that reads before it writes would not be let wait.
            "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL"},
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    TIME_ZONE="UTC",
)
django.setup()

app = Celery("site", broker=os.environ["TOOL_BROKER"], backend="django-db")
app.conf.update(result_extended=True, task_track_started=True, beat_max_loop_interval=1)


@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="crash")
def crash(*, order: int) -> None:
    raise ValueError(f"order {order} has no items")


@app.task(name="flaky", bind=True, max_retries=1)
def flaky(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "second time"


@app.task(name="progress", bind=True)
def progress(self: Any) -> None:
    self.update_state(state="PROGRESS", meta={"done": 1})
    Path(os.environ["TOOL_FOLDER"], "seen").write_text(self.AsyncResult(self.request.id).state, encoding="utf-8")


@app.task(name="total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(name="ignored", ignore_result=True)
def ignored() -> str:
    return "nobody asks"


@app.task(name="tick")
def tick(name: str) -> str:
    return f"ticked {name}"


def call_tasks() -> list[Any]:
    """Send every kind of task; return their values or errors."""
    ignored.delay()
    results = [
        add.delay(2, 3),
        crash.delay(order=7),
        flaky.delay(),
        progress.delay(),
        chord([add.s(1, 1), add.s(2, 2)], total.s()).delay(),
    ]
    members = group(add.s(5, 5), add.s(6, 6)).delay()
    members.save()
    values = [result.get(timeout=20, propagate=False) for result in results] + [members.get(timeout=20)]
    restored = app.GroupResult.restore(members.id)
    return [str(value) for value in values] + [restored.join()]


def plan() -> None:
    """Have a task run every second, once more at most, and one that is off."""
    from django_celery_beat.models import IntervalSchedule, PeriodicTask

    second = IntervalSchedule.objects.create(every=1, period=IntervalSchedule.SECONDS)
    PeriodicTask.objects.create(name="each second", task="tick", interval=second, args='["regular"]')
    PeriodicTask.objects.create(name="once", task="tick", interval=second, one_off=True, kwargs='{"name": "single"}')
    PeriodicTask.objects.create(name="off", task="tick", interval=second, args='["never"]', enabled=False)


if __name__ == "__main__":
    if sys.argv[1] == "migrate":
        call_command("migrate", verbosity=0)
    print(json.dumps(call_tasks() if sys.argv[1] == "call" else plan() if sys.argv[1] == "plan" else None))
