"""Tasks that belong to no application in particular, as in a reusable Django app."""

from __future__ import annotations

from typing import Any

from celery import Task, current_app, shared_task


@shared_task
def shared(x: int) -> dict[str, Any]:
    return {"x": x, "main": current_app.main}


@shared_task(bind=True, name="renamed", max_retries=5)
def shared_bound(self: Task, x: int) -> dict[str, Any]:
    return {"x": x, "name": self.name, "max_retries": self.max_retries}
