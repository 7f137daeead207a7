"""One task function under every combination of the options that say when a message is acknowledged."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject

from tests.celery.proj.app import app
from tests.celery.proj.errors import PlainError
from tests.celery.proj.journal import note

# Celery's main process has read by then that a child took the call; before, it would give it to another child.
ACCEPTED_S = 0.2

VARIANTS: dict[str, dict[str, Any]] = {
    "early": {},
    "early_requeue": {"reject_on_worker_lost": True},
    "early_retry": {"retry_on_worker_lost": True},
    "late": {"acks_late": True},
    "late_requeue": {"acks_late": True, "reject_on_worker_lost": True},
    "late_retry": {"acks_late": True, "retry_on_worker_lost": True},
    "late_no_ack": {"acks_late": True, "acks_on_failure_or_timeout": False},
    "late_no_failure": {"acks_late": True, "acks_on_failure": False},
    "late_no_timeout": {"acks_late": True, "acks_on_timeout": False},
}


def times_run(task_id: str) -> int:
    """Count one more run of this call, over all processes, and return the count."""
    path = Path(os.environ["PROJ_JOURNAL"]).with_name(f"runs-{task_id}")
    with path.open("a") as runs:
        runs.write("x")
    return path.stat().st_size


class Ending(Task):
    """May end, or wait, after its success has been stored."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        if args[0] == "die after success":
            time.sleep(ACCEPTED_S)
            os.kill(os.getpid(), signal.SIGKILL)
        if args[0] == "wait after success":
            note("waiting", id=task_id)
            time.sleep(30)


def end(self: Task, how: str, times: int = 1) -> str:
    """End badly as often as asked; then return."""
    note("run", id=self.request.id, redelivered=self.request.delivery_info["redelivered"], retries=self.request.retries)
    if times_run(self.request.id) > times:
        return "lived"
    if how in {"kill", "exit", "SystemExit"}:
        time.sleep(ACCEPTED_S)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "SystemExit":
        raise SystemExit(4)
    if how == "error":
        raise PlainError("failed")
    if how == "hang":
        time.sleep(30)
    if how.startswith("reject"):
        raise Reject("told to", requeue=how == "reject and requeue")
    if how == "ignore":
        raise Ignore
    return "lived"


for variant, options in VARIANTS.items():
    app.task(bind=True, base=Ending, name=f"proj.acks.{variant}", max_retries=1, default_retry_delay=0, **options)(end)
