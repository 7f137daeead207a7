"""The application of proj, the first of whose children that sends the body of a chord dies of it: DEATHS_MARK."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery.signals import before_task_publish

from tests.celery.proj import app

__all__ = ["app"]


@before_task_publish.connect(sender="tests.celery.proj.canvas.total", weak=False)
def die_once(**message: Any) -> None:
    mark = Path(os.environ["DEATHS_MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
