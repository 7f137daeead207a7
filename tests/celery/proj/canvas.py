"""Tasks for workflows: callbacks, errbacks, replacing, adding to a chord."""

from __future__ import annotations

from typing import Any

from celery import Task, chain, chord, group

from tests.celery.proj.app import app
from tests.celery.proj.errors import PlainError
from tests.celery.proj.journal import note
from tests.celery.proj.tasks import add


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def double(x: Any) -> Any:
    return x * 2


@app.task(bind=True)
def keep(self: Task, value: Any, label: str = "") -> Any:
    """Note that it came here, with what, and pass the value on."""
    note("kept", id=self.request.id, value=value, label=label, parent=self.request.parent_id, root=self.request.root_id)
    return value


@app.task
def fail_here(*args: Any) -> None:
    raise PlainError("here", *args)


@app.task(bind=True, max_retries=3, default_retry_delay=0)
def retry_once(self: Task, x: int) -> int:
    if self.request.retries == 0:
        self.retry()
    return x


@app.task
def error_by_id(task_id: str) -> None:
    """An errback of the old form, known by its single argument: it is sent as a task, with the id of the failed one."""
    note("error_by_id", failed=task_id)


@app.task
def error_in_place(request: Any, error: Exception, traceback: str) -> None:
    """An errback of the new form: it is called where the task failed."""
    note(
        "error_in_place",
        failed=request.id,
        error=repr(error),
        traceback="PlainError" in str(traceback),
    )


@app.task(bind=True)
def replaced(self: Task, by: str, x: int) -> Any:
    """Go on as something else."""
    forms = {
        "task": lambda: add.s(x, 1),
        "chain": lambda: chain(add.s(x, 1), double.s()),
        "group": lambda: group(add.s(x, 1), add.s(x, 2)),
        "chord": lambda: chord([add.s(x, 1), add.s(x, 2)], total.s()),
        "twice": lambda: replaced.s("task", x + 10),
        "failure": lambda: fail_here.si(x),
    }
    raise self.replace(forms[by]())


@app.task(bind=True)
def add_more(self: Task, x: int) -> int:
    """Add a task to the chord that this one is part of."""
    self.add_to_chord(add.s(100, x))
    return x


@app.task(bind=True)
def dump_stamps(self: Task, *args: Any) -> dict[str, Any]:
    return {"stamps": self.request.stamps, "stamped_headers": sorted(self.request.stamped_headers or [])}


@app.task(bind=True)
def call_stamped(self: Task) -> str:
    """Send a call from a stamped one."""
    return str(dump_stamps.delay().id)


@app.task(bind=True)
def where(self: Task, *args: Any) -> dict[str, Any]:
    """Return the call's place in its workflow."""
    request = self.request
    return {
        "args": list(args),
        "id": request.id,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "group": request.group,
        "group_index": request.group_index,
        "chord": bool(request.chord),
        "chain": len(request.chain or ()),
    }
