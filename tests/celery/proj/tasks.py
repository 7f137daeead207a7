"""Single tasks. What is called in which way stands in the tests."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from celery import Task, current_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.result import allow_join_result
from celery.utils.log import get_task_logger
from pydantic import BaseModel

from tests.celery.proj.app import app
from tests.celery.proj.errors import Expected, HidesArguments, PlainError, TwoArguments
from tests.celery.proj.journal import note
from tests.support.task_ledger import record_done, record_start

logger = get_task_logger(__name__)

# --- values -----------------------------------------------------------------------------------------------------------


@app.task
def add(x: Any, y: Any = 0) -> Any:
    return x + y


@app.task
def echo(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"args": list(args), "kwargs": kwargs}


@app.task
def identity(value: Any) -> Any:
    return value


@app.task
def nothing() -> None:
    """Return None, which is a result like any other."""


@app.task
def unserializable() -> Any:
    return object()


@app.task
def kind_of(value: Any) -> str:
    """Return how the value arrived."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


@app.task
def show(value: Any) -> str:
    return repr(value)


class Point(BaseModel):
    """An argument and result that pydantic checks."""

    x: int
    y: int = 7


@app.task(pydantic=True)
def mirror(point: Point, *, label: str = "") -> Point:
    assert isinstance(point, Point)
    return Point(x=point.y, y=point.x + len(label))


# --- errors -----------------------------------------------------------------------------------------------------------


@app.task
def fail(name: str, *args: Any) -> None:
    raise {"ValueError": ValueError, "KeyError": KeyError, "PlainError": PlainError, "TwoArguments": TwoArguments}[
        name
    ](*args)


@app.task
def fail_hiding_arguments() -> None:
    raise HidesArguments(3)


@app.task
def fail_with_object() -> None:
    raise PlainError(object(), {1, 2})


@app.task
def fail_with_cause() -> None:
    try:
        {}["missing"]
    except KeyError as error:
        raise PlainError("wrapped") from error


@app.task(throws=(Expected,))
def fail_as_expected() -> None:
    raise Expected("known")


@app.task
def fail_with_local_class() -> None:
    class Local(Exception):
        """Cannot be imported by name."""

    raise Local("inside")


@app.task
def wait_for_soft_limit(catch: bool) -> str:
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        note("soft_limit", id=current_task.request.id)
        if not catch:
            raise
        return "caught"
    return "too late"


@app.task
def name_the_named(**named: int) -> list[str]:
    return sorted(named)


@app.task(soft_time_limit=0.5)
def limited_by_option() -> None:
    time.sleep(30)


# --- retries ----------------------------------------------------------------------------------------------------------


@app.task(bind=True, max_retries=3, default_retry_delay=0)
def retry_until(self: Task, wanted: int, countdown: float = 0.0) -> int:
    note("attempt", id=self.request.id, retries=self.request.retries, delivery=self.request.delivery_info)
    if self.request.retries < wanted:
        raise self.retry(exc=PlainError(f"attempt {self.request.retries}"), countdown=countdown)
    return self.request.retries


@app.task(bind=True, max_retries=1, default_retry_delay=0)
def retry_without_error(self: Task) -> None:
    note("attempt", id=self.request.id, retries=self.request.retries)
    self.retry()


@app.task(bind=True, max_retries=5, default_retry_delay=0)
def retry_with_other_arguments(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    if not kwargs.get("again"):
        self.retry(args=(*args, "more"), kwargs={"again": True}, countdown=0)
    return {"args": list(args), "kwargs": kwargs, "retries": self.request.retries}


@app.task(bind=True, max_retries=1, default_retry_delay=0)
def retry_from_except(self: Task) -> None:
    try:
        raise TwoArguments(5, "five")
    except TwoArguments:
        self.retry()


@app.task(bind=True, max_retries=2, default_retry_delay=0)
def retry_without_throw(self: Task) -> str:
    note("attempt", id=self.request.id, retries=self.request.retries)
    if self.request.retries == 0:
        said = self.retry(throw=False)
        return f"first: {type(said).__name__}"
    return "second"


@app.task(
    bind=True,
    autoretry_for=(PlainError, KeyError),
    dont_autoretry_for=(KeyError,),
    retry_kwargs={"max_retries": 2},
    retry_backoff=True,
    retry_jitter=False,
)
def autoretried(self: Task, error: str = "PlainError") -> str:
    note("attempt", id=self.request.id, retries=self.request.retries, eta=self.request.eta)
    if self.request.retries < 1 or error == "KeyError":
        fail.run(error, "again")
    return f"after {self.request.retries}"


@app.task(bind=True, max_retries=None, default_retry_delay=0)
def retry_for_ever(self: Task, wanted: int) -> int:
    if self.request.retries < wanted:
        self.retry()
    return self.request.retries


# --- verdicts ---------------------------------------------------------------------------------------------------------


@app.task
def ignore() -> None:
    note("ran", id=current_task.request.id)
    raise Ignore


@app.task(bind=True)
def ignore_after_state(self: Task) -> None:
    self.update_state(state="CUSTOM", meta={"seen": True})
    raise Ignore


@app.task(bind=True, acks_late=True)
def reject(self: Task, requeue: bool) -> str:
    redelivered = self.request.delivery_info["redelivered"]
    note("ran", id=self.request.id, redelivered=redelivered)
    if not redelivered:
        raise Reject("not now", requeue=requeue)
    return "second time"


@app.task(bind=True)
def reject_early(self: Task) -> None:
    note("ran", id=self.request.id)
    raise Reject("too late to reject", requeue=True)


# --- the running call -------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return what JSON can carry: tuples as lists, the rest as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


@app.task(bind=True)
def dump_request(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return every field of the request, declared ones and those that came with the message.

    Without _children, which is there once `children` has been looked at.
    """
    request = self.request
    fields = {name for name in [*vars(request), *vars(type(request))] if not name.startswith("__")} - {"_children"}
    values = {name: getattr(request, name) for name in fields}
    return {name: plain(value) for name, value in values.items() if not callable(value)}


@app.task(bind=True)
def dump_task(self: Task) -> dict[str, Any]:
    """Return what a task can ask about itself and its application while it runs."""
    return {
        "name": self.name,
        "bound": self is app.tasks[self.name],
        "current_task": current_task.name,
        "app_current_task": app.current_task.name,
        "app_current_worker_task": app.current_worker_task.name,
        "app": self.app.main,
        "request_is_mine": current_task.request.id == self.request.id,
        "hostname": self.request.hostname,
        "called_directly": self.request.called_directly,
        "pid": os.getpid(),
        "process_is_main": os.getsid(0) == os.getpid(),
        "argv0": Path(sys.argv[0]).name,
    }


@app.task(bind=True)
def call_other(self: Task, x: int) -> str:
    """Send a call and return its id."""
    return str(dump_request.apply_async((x,), headers={"from": "parent"}).id)


@app.task
def wait_inside(x: int) -> Any:
    return add.delay(x, 1).get(timeout=5)


@app.task
def wait_inside_allowed(x: int) -> Any:
    with allow_join_result():
        return add.delay(x, 1).get(timeout=5)


@app.task
def run_inside(x: int) -> dict[str, Any]:
    """Run another task here, in three ways."""
    eager = dump_request.apply((x,))
    return {"direct": add(x, 1), "eager": eager.result["is_eager"], "state": eager.state, "run": add.run(x, 2)}


@app.task(bind=True)
def report_progress(self: Task, gate: str) -> str:
    self.update_state(state="PROGRESS", meta={"done": 3, "of": 4})
    wait_for_file(gate)
    return "done"


@app.task(bind=True)
def send_event(self: Task) -> None:
    self.send_event("task-custom", colour="blue")


# --- timing -----------------------------------------------------------------------------------------------------------


def wait_for_file(path: str) -> None:
    """Return when the test has made the file; a task that waits for ever would hang the test."""
    deadline = time.monotonic() + 30
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


@app.task(bind=True)
def note_time(self: Task, mark: Any = None) -> float:
    note("ran", id=self.request.id, mark=mark, eta=self.request.eta, queue=self.request.delivery_info["routing_key"])
    return time.time()


@app.task(bind=True, rate_limit="5/s")
def rate_limited(self: Task, number: int) -> None:
    note("limited", number=number)


@app.task(bind=True)
def hold(self: Task, gate: str, mark: Any = None) -> str:
    """Run until the test opens the gate."""
    note("holding", id=self.request.id, mark=mark)
    wait_for_file(gate)
    return "opened"


@app.task(bind=True, track_started=True)
def hold_tracked(self: Task, gate: str) -> str:
    wait_for_file(gate)
    return "opened"


@app.task(bind=True)
def sleep_for(self: Task, seconds: float) -> str:
    note("holding", id=self.request.id)
    time.sleep(seconds)
    return "slept"


@app.task
def stop_collecting() -> None:
    """Have the garbage collector come as rarely as it does to old objects: not at all."""
    gc.disable()


@app.task(bind=True)
def spin(self: Task, seconds: float) -> str:
    """Run that long in small steps, between which an exception from outside arrives."""
    note("spinning", id=self.request.id)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
    return "spun"


# --- results ----------------------------------------------------------------------------------------------------------


@app.task(ignore_result=True)
def ignored(x: int) -> int:
    note("ran", id=current_task.request.id)
    return x


@app.task(ignore_result=True, store_errors_even_if_ignored=True)
def ignored_but_errors() -> None:
    raise PlainError("kept")


@app.task(ignore_result=True)
def ignored_error() -> None:
    note("ran", id=current_task.request.id)
    raise PlainError("not kept")


# --- task classes -----------------------------------------------------------------------------------------------------


class Recording(Task):
    """Notes every handler that a worker calls."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note("__call__", id=self.request.id, args=args, kwargs=kwargs, retries=self.request.retries)
        return super().__call__(*args, **kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        headers = {**(options.pop("headers", None) or {}), "added-by": "apply_async"}
        return super().apply_async(args, kwargs, headers=headers, **options)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("before_start", id=task_id, args=args, kwargs=kwargs, retries=self.request.retries)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note("on_success", id=task_id, args=args, kwargs=kwargs, retval=retval, retries=self.request.retries)

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(
            "on_retry",
            id=task_id,
            args=args,
            kwargs=kwargs,
            exc=repr(exc),
            einfo=type(einfo).__name__,
            retries=self.request.retries,
        )

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("on_failure", id=task_id, args=args, kwargs=kwargs, exc=repr(exc), einfo=type(einfo).__name__)

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(
            "after_return",
            id=task_id,
            args=args,
            kwargs=kwargs,
            status=status,
            retval=plain(retval),
            einfo=type(einfo).__name__,
            retries=self.request.retries,
        )


@app.task(base=Recording, bind=True, max_retries=1, default_retry_delay=0)
def recorded(self: Task, outcome: str, factor: int = 1) -> Any:
    note("run", id=self.request.id, header=(self.request.headers or {}).get("added-by"), retries=self.request.retries)
    if outcome == "retry" and self.request.retries == 0:
        raise self.retry(exc=PlainError("again"))
    if outcome == "fail":
        raise PlainError("failed")
    if outcome == "ignore":
        raise Ignore
    if outcome == "hard limit":
        time.sleep(30)
    if outcome == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * factor


class Keeping(Task):
    """One instance per process, which lives as long as the process: people keep connections in it."""

    abstract = True
    _made = 0

    @property
    def made(self) -> int:
        if not self._made:
            self._made = os.getpid()
        return self._made


@app.task(base=Keeping, bind=True)
def keeping(self: Keeping) -> bool:
    return self.made == os.getpid()


class ByClass(Task):
    """A task that is a class, registered by hand."""

    name = "proj.by_class"
    greeting = "hello"

    def run(self, name: str) -> str:
        return f"{self.greeting} {name}"


app.register_task(ByClass())


@app.task(name="named by hand", bind=True)
def named(self: Task) -> str:
    return self.name


@app.task(bind=True)
def annotated(self: Task) -> int:
    return self.max_retries


@app.task(bind=True)
def not_annotated(self: Task) -> int:
    return self.max_retries


# --- logging ----------------------------------------------------------------------------------------------------------


@app.task
def log_and_print(word: str) -> None:
    logger.info("logged %s", word)
    logging.getLogger("proj.other").warning("warned %s", word)
    print(f"printed {word}")


# --- what a kill may hit ----------------------------------------------------------------------------------------------


def work(self: Task, number: int, seconds: float) -> int:
    """Note the start and the end, with a pause between."""
    record_start(os.environ["PROJ_LEDGER"], number)
    time.sleep(seconds)
    record_done(os.environ["PROJ_LEDGER"], number)
    return number


app.task(bind=True, name="proj.work_early")(work)
app.task(bind=True, name="proj.work_late", acks_late=True, reject_on_worker_lost=True)(work)
