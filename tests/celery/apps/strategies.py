"""Tasks with a Strategy or a Request class of their own; each note says what the worker called."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import Reject
from celery.worker.control import control_command
from celery.worker.request import Request
from celery.worker.strategy import default

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})


def kind_of(info: Any) -> str:
    """Return the class of the exception that Celery's pool reports."""
    error = info.exception
    return type(error.exc if isinstance(error, ExceptionWithTraceback) else error).__name__


# --- a request of one's own


class Loud(Request):
    """Notes what becomes of its call."""

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        super().on_accepted(pid, time_accepted)
        note("accepted", id=self.id, by=pid, acknowledged=self.acknowledged)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        note("failure", id=self.id, error=kind_of(exc_info), return_ok=return_ok, acknowledged=self.acknowledged)

    def on_retry(self, exc_info: Any) -> None:
        super().on_retry(exc_info)
        note("retry", id=self.id, error=repr(exc_info.exception.exc))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        super().on_timeout(soft, timeout)
        note("timeout", id=self.id, soft=soft, limit=timeout)

    def on_success(self, failed__retval__runtime: Any, **kwargs: Any) -> None:
        super().on_success(failed__retval__runtime, **kwargs)
        note("success", id=self.id)

    def _announce_revoked(self, reason: str, terminated: bool, signum: int | None, expired: bool) -> None:
        super()._announce_revoked(reason, terminated, signum, expired)
        note("revoked", id=self.id, reason=reason, terminated=terminated, expired=expired)


class LoudTask(app.Task):  # type: ignore[name-defined,misc]
    Request = "tests.celery.apps.strategies:Loud"


@app.task(base=LoudTask, name="good")
def good(x: int) -> int:
    note("run", pid=os.getpid())
    return x + 1


@app.task(base=LoudTask, name="late", acks_late=True)
def late(x: int) -> int:
    return x + 1


@app.task(base=LoudTask, name="bad")
def bad() -> None:
    raise ValueError("bad")


@app.task(base=LoudTask, name="late_bad", acks_late=True)
def late_bad() -> None:
    raise ValueError("bad")


@app.task(base=LoudTask, name="again", bind=True, max_retries=1)
def again(self: Any) -> int:
    if self.request.retries:
        return 7
    raise self.retry(exc=KeyError("first"), countdown=0)


@app.task(base=LoudTask, name="refuse")
def refuse() -> None:
    raise Reject("no", requeue=False)


@app.task(base=LoudTask, name="slow")
def slow() -> str:
    note("begun")
    time.sleep(30)
    return "slept"


@app.task(base=LoudTask, name="die")
def die() -> None:
    os._exit(3)


# --- strategies of one's own


class Counting(app.Task):  # type: ignore[name-defined,misc]
    """Celery's own strategy, with a note before each message."""

    def Strategy(self, task: Any, app: Any, consumer: Any) -> Callable[..., Any]:  # noqa: N802  Celery's name
        handle = default(task, app, consumer)
        note("strategy", consumer=type(consumer).__name__, hostname=consumer.hostname.partition("@")[0])

        def count(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **options: Any) -> Any:
            note("message", id=message.headers["id"])
            return handle(message, body, ack, reject, callbacks, **options)

        return count


@app.task(base=Counting, name="counted")
def counted(x: int) -> int:
    return x * 2


@control_command()
def renew_strategies(state: Any) -> Any:
    state.consumer.update_strategies()
    return {"ok": "renewed"}


class Gathering(app.Task):  # type: ignore[name-defined,misc]
    """Holds messages until there are three, or for a second; then a child gets all of their arguments."""

    def Strategy(self, task: Any, app: Any, consumer: Any) -> Callable[..., Any]:  # noqa: N802  Celery's name
        held: list[tuple[Any, Any]] = []

        def flush() -> None:
            messages, held[:] = held[:], []
            if not messages:
                return

            def done(result: Any) -> None:
                note("done", result=result)
                for message, _ in messages:
                    message.ack()

            def failed(info: Any) -> None:
                note("failed", error=kind_of(info))
                for _, reject in messages:
                    reject(None, ())

            consumer.pool.apply_async(
                work,
                ([message.decode()[0][0] for message, _ in messages],),
                accept_callback=lambda pid, at: note("taken", by=pid, recent=time.monotonic() - at < 60),
                callback=done,
                error_callback=failed,
            )

        def take(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            if message.decode()[0][0] == "reject":
                reject(None, (), False)
                note("refused")
                return
            held.append((message, reject))
            note("held", count=len(held))
            if len(held) == 3:
                flush()
            elif len(held) == 1 and message.decode()[0][0] != "keep":
                consumer.timer.call_after(1.0, flush)

        return take


@app.task(base=Gathering, name="gathered")
def gathered(x: Any) -> None:
    raise AssertionError("a child gets the arguments of several calls, not one")


def work(values: list[Any]) -> Any:
    """Return the sum in a child; "boom" raises there, "lambda" returns what cannot be sent back."""
    if "boom" in values:
        raise LookupError("boom")
    if "lambda" in values:
        return lambda: None
    return [os.getpid(), sum(values)]
