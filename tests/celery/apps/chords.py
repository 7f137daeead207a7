"""A Celery application with a chord whose last part dies after it has claimed the body, and before that is sent."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import signals

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import role

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})


@app.task(name="part")
def part(number: int) -> int:
    return number


@app.task(name="body")
def body(values: list[int], gate: str, way: str) -> list[int]:
    return values


def _die_once(sender: str, body: Any, **options: Any) -> None:
    """Die before the body of a chord is sent, or hang there, unless the gate says that this was done."""
    if sender != "body" or role() != "child":
        return
    gate, way = body[0][1:3]
    if way and not Path(gate).exists():
        Path(gate).touch()
        if way == "under_another":
            # As if a worker of Celery's had claimed the body: by a random word, here for a short time.
            group = app.current_task.request.group
            app.backend.client.set(app.backend.get_key_for_group(group, ".c"), "5e1f", ex=3)
        if way != "hang":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


signals.before_task_publish.connect(_die_once)
