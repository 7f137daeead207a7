"""Tasks that tell of several states while they run, and end in each way."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.celery.proj.app import make_app

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})


@app.task(name="steps", bind=True, track_started=True, max_retries=1)
def steps(self: Any, end: str) -> str:
    for number in range(3):
        self.update_state(state="PROGRESS", meta={"done": number})
    if end == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if end == "fail":
        raise ValueError(end)
    return end


@app.task(name="nothing")
def nothing(*args: Any) -> None:
    """Stands behind another task."""
