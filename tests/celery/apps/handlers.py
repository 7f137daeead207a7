"""Receivers of signals and a logging handler that start an event loop of their own, or block.

HANDLERS_GATE  file that a receiver waits for
HANDLERS_WAIT  the signal whose receiver does, if not worker_ready
HANDLERS_END   how a receiver of worker_ready ends: shutdown, or nothing
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import Any

from celery import signals
from celery.exceptions import WorkerShutdown

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note, role

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})
GATE = os.environ.get("HANDLERS_GATE")
WAITS = os.environ.get("HANDLERS_WAIT", "worker_ready")
NAMES = (
    *("worker_ready", "worker_shutting_down", "worker_shutdown", "heartbeat_sent"),
    *("task_received", "task_rejected", "task_unknown", "task_revoked"),
)
_kept: list[Any] = []


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


def run_a_loop() -> str:
    """Return what came of it."""
    coroutine = answer()
    try:
        return str(asyncio.run(coroutine))
    except RuntimeError as error:
        coroutine.close()
        return repr(error)


def connect(name: str) -> None:
    def receive(sender: Any = None, **arguments: Any) -> None:
        request = arguments.get("request")
        note("handler", name=name, came=run_a_loop(), id=getattr(request, "id", None))
        deadline = time.monotonic() + 20
        while name == WAITS and GATE and not os.path.exists(GATE) and time.monotonic() < deadline:
            time.sleep(0.02)

    _kept.append(receive)
    getattr(signals, name).connect(receive)


for each in NAMES:
    connect(each)


@signals.worker_ready.connect
def end(**arguments: Any) -> None:
    if os.environ.get("HANDLERS_END") == "shutdown":
        raise WorkerShutdown(0)
    note("ready_done")


class Sending(logging.Handler):
    """Sends records by asyncio, as handlers of log services do."""

    def emit(self, record: logging.LogRecord) -> None:
        if role() == "main":
            note("record", came=run_a_loop(), message=record.getMessage())


@signals.after_setup_logger.connect
def add_handler(logger: logging.Logger, **arguments: Any) -> None:
    logger.addHandler(Sending())


@app.task(name="echo", bind=True)
def echo(self: Any, value: Any) -> Any:
    note("ran", id=self.request.id)
    return value
