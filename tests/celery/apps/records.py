"""An application that sets logging up by itself, for Celery's loggers alone, and writes each record as JSON.

RECORDS_FILE  where to
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from typing import Any

from celery import Celery, signals

app = Celery("records", broker=os.environ["RECORDS_BROKER"], backend=os.environ["RECORDS_BACKEND"])
app.conf.broker_connection_retry_on_startup = True


class _ToFile(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        entry = {
            "logger": record.name,
            "level": record.levelname,
            "message": record.getMessage(),
            "data": getattr(record, "data", None),
        }
        with open(os.environ["RECORDS_FILE"], "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=repr) + "\n")


@signals.setup_logging.connect
def _set_up(**_: Any) -> None:
    logger = logging.getLogger("celery")
    logger.setLevel(logging.INFO)
    logger.addHandler(_ToFile())
    logger.propagate = False


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(time_limit=1)
def endless() -> None:
    time.sleep(60)
