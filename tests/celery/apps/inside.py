"""What receivers and control commands find of the running worker."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from typing import Any

from celery import signals
from celery.worker import state as worker_state
from celery.worker.control import control_command, inspect_command
from celery.worker.state import active_requests, reserved_requests, total_count

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})
kept: dict[str, Any] = {}


@signals.worker_ready.connect
def look(sender: Any, **arguments: Any) -> None:
    kept["sender"] = sender
    before = [queue.name for queue in sender.task_consumer.queues]
    sender.add_task_queue("extra")
    sender.timer.call_after(0.1, note, ("fired",), {"by": "timer"})
    sender.hub.call_later(0.1, partial(note, "fired", by="hub"))
    sender.call_soon(note, "fired", by="call_soon")
    found = sender.controller.stats()
    note(
        "ready",
        before=before,
        extra=sender.task_consumer.consuming_from("extra"),
        processes=len(found["pool"]["processes"]),
        transport=found["broker"]["transport"],
        prefetch=sender.qos.value,
        strategies=[callable(sender.strategies["hold"]), set(sender.strategies) == set(sender.app.tasks)],
    )


@control_command(args=[("level", int)])
def set_level(state: Any, level: int) -> Any:
    state.level = level
    return {"ok": level}


@inspect_command()
def seen(state: Any) -> Any:
    return {
        "level": getattr(state, "level", None),
        "same": state.consumer is kept["sender"] and state.app is app,
        "hostname": state.hostname.partition("@")[0],
        "active": [request.id for request in active_requests],
        "reserved": sorted(request.id for request in reserved_requests),
        "scheduled": [request.id for request in getattr(worker_state, "scheduled_requests", ())],
        "requests": sorted(worker_state.requests),
        "prefetch": state.consumer.qos.value,
        "name": worker_state.requests["first"].name if "first" in worker_state.requests else None,
        "total": dict(total_count),
    }


@control_command(args=[("n", int)])
def hold_more(state: Any, n: int) -> Any:
    state.consumer.qos.increment_eventually(n)
    return {"ok": n}


@control_command()
def leave_extra(state: Any) -> Any:
    state.consumer.cancel_task_queue("extra")
    return {"ok": state.consumer.task_consumer.consuming_from("extra")}


@app.task(name="hold", acks_late=True)
def hold(gate: str) -> str:
    note("holding")
    deadline = time.monotonic() + 20
    while not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.02)
    return "opened"
