"""Steps of one's own in the worker's and the consumer's blueprint; each note says what the worker called.

STEPS_FAIL  name of a step whose start fails, by an ordinary error or by WorkerShutdown
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from celery import bootsteps, signals
from celery.exceptions import WorkerShutdown
from kombu import Consumer, Exchange, Queue

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})
LETTERS = Queue("letters", Exchange("letters", type="direct"), "letters")


@app.task(name="echo")
def echo(value: Any) -> Any:
    return value


def noted(step: Any, what: str, **fields: Any) -> None:
    note("step", step=type(step).__name__, did=what, **fields)


class Noting(bootsteps.StartStopStep):
    """Notes its life."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        noted(self, "made", parent=type(parent).__name__)

    def create(self, parent: Any) -> None:
        noted(self, "create")

    def start(self, parent: Any) -> None:
        noted(self, "start")
        if os.environ.get("STEPS_FAIL") == type(self).__name__:
            raise ValueError("this step cannot start")

    def stop(self, parent: Any) -> None:
        noted(self, "stop")

    def close(self, parent: Any) -> None:
        noted(self, "close")


class Zeroth(Noting):
    """Required by the others, and added by that alone."""


class Second(Noting):
    """Sorts before what it requires."""

    requires = ("tests.celery.apps.steps:Third", "celery.worker.components:Pool")


class Third(Noting):
    requires = (Zeroth, "celery.worker.components:Timer", "celery.worker.components:Hub")

    def start(self, worker: Any) -> None:
        super().start(worker)
        self.ticks = 0
        self.entry = worker.timer.call_repeatedly(0.2, self.tick, (worker,), priority=10)
        worker.hub.call_later(0.1, noted, self, "later")

    def tick(self, worker: Any) -> None:
        self.ticks += 1
        if self.ticks == 2:
            noted(
                self,
                "tick",
                hostname=worker.hostname.partition("@")[0],
                app=worker.app is app,
                processes=worker.pool.num_processes,
                concurrency=worker.concurrency,
                consumer=type(worker.consumer).__name__,
            )
            self.entry.cancel()


class Left(Noting):
    """Not wanted."""

    def include_if(self, parent: Any) -> bool:
        return False


class Listening(bootsteps.Step):
    """Connects a signal for children when it is made, as django-structlog does."""

    def __init__(self, parent: Any, **options: Any) -> None:
        signals.task_prerun.connect(self.on_prerun, weak=False)

    def on_prerun(self, task_id: str, **others: Any) -> None:
        note("prerun", id=task_id)


class Failing(Noting):
    """Starts unless the environment says otherwise."""


class Stopping(Noting):
    """Asks the worker to stop when the environment says so."""

    def start(self, parent: Any) -> None:
        noted(self, "start")
        if os.environ.get("STEPS_FAIL") == "Stopping":
            raise WorkerShutdown(0)


class Letters(bootsteps.ConsumerStep):
    """Receives from a queue of its own."""

    def get_consumers(self, channel: Any) -> list[Consumer]:
        noted(self, "consumers")
        return [Consumer(channel, queues=[LETTERS], callbacks=[self.on_letter], accept=["json"])]

    def on_letter(self, body: Any, message: Any) -> None:
        noted(self, "letter", body=body, thread=threading.current_thread() is threading.main_thread())
        message.ack()


class Beside(Noting):
    """A step of the consumer."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        super().start(consumer)
        consumer.event_dispatcher.send("worker-custom", note="from a step")
        consumer.timer.call_after(0.1, noted, (self, "after"))

    def shutdown(self, consumer: Any) -> None:
        noted(self, "shutdown")


app.steps["worker"].update([Second, Third, Left, Listening, Failing, Stopping])
app.steps["consumer"].update([Letters, Beside])
