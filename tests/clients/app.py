"""The Celery application whose tasks the clients call. Not changed in any way for fastq."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

app = Celery("clients", broker=os.environ["CLIENTS_BROKER"], backend=os.environ["CLIENTS_RESULTS"])
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
# As celery-php's manual asks for, where a test says so.
if "CLIENTS_RESULT_EXPIRES_S" in os.environ:
    app.conf.result_expires = float(os.environ["CLIENTS_RESULT_EXPIRES_S"]) or None


@app.task(name="add")
def add(x: float, y: float) -> float:
    return x + y


@app.task(name="greet")
def greet(name: str, *, greeting: str = "Hello") -> str:
    return f"{greeting}, {name}!"


@app.task(name="echo")
def echo(value: Any) -> Any:
    return value


@app.task(name="fail")
def fail(text: str) -> None:
    raise ValueError(text)


@app.task(name="ignored", ignore_result=True)
def ignored() -> str:
    return "nobody asks"
