"""The application object and its settings, which the test hands over by the environment. No tasks.

PROJ_SETTINGS  JSON with Celery's settings, as far as JSON can say them
PROJ_JOURNAL   file in which tasks, handlers and signals note what happened; see journal.py
PROJ_EXTRAS    comma list of what only some workers have: signals, broadcast, auth
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from celery import Celery
from kombu import Exchange, Queue
from kombu.common import Broadcast

from tests.celery.proj.journal import note

TASK_MODULES = (
    "tests.celery.proj.tasks",
    "tests.celery.proj.canvas",
    "tests.celery.proj.acks",
    "tests.celery.proj.wire",
)


def make_app(settings: Mapping[str, Any], **options: Any) -> Celery:
    """Return an application; in a test process each stage has one, all with the tasks of TASK_MODULES."""
    app = Celery("proj", **options)
    app.on_after_configure.connect(_on_after_configure, weak=False)
    app.on_after_finalize.connect(_on_after_finalize, weak=False)
    app.config_from_object(SimpleNamespace(**_with_objects(settings)))
    return app


def _with_objects(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those that JSON cannot say: queue names become kombu's queues, annotations get code."""
    known = {
        "include": TASK_MODULES,
        "task_annotations": {
            "tests.celery.proj.tasks.annotated": {"max_retries": 7, "on_success": _annotated_success},
            "tests.celery.proj.tasks.*": {"max_retries": 99},  # no pattern: only "*" alone stands for every task
        },
        **settings,
    }
    queues = known.pop("proj_queues", None)
    if queues is not None:
        known["task_queues"] = [_queue(**queue) for queue in queues]
    return known


def _queue(name: str, kind: str = "direct", **arguments: Any) -> Queue:
    if kind == "topic":
        arguments["exchange"] = Exchange(arguments["exchange"], type="topic")
    return Broadcast(name) if kind == "broadcast" else Queue(name, **arguments)


def _annotated_success(self: Any, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
    note("annotated_success", id=task_id, retval=retval, max_retries=self.max_retries)


def _on_after_configure(sender: Celery, **arguments: Any) -> None:
    note("on_after_configure", arguments=sorted(arguments), settings=sender.conf.task_default_queue)
    sender.add_periodic_task(3600.0, sender.signature("tests.celery.proj.tasks.add", (1, 1)), name="hourly add")


def _on_after_finalize(sender: Celery, **arguments: Any) -> None:
    note("on_after_finalize", arguments=sorted(arguments), tasks="tests.celery.proj.tasks.add" in sender.tasks)


extras = tuple(filter(None, os.environ.get("PROJ_EXTRAS", "").split(",")))

if "signals" in extras:
    from tests.celery.proj.signals import connect_all

    connect_all()

app = make_app(json.loads(os.environ.get("PROJ_SETTINGS", "{}")))
app.autodiscover_tasks(["tests.celery.proj.discovered"])

if "auth" in extras:
    app.setup_security()
