"""A toy of a step, as an application would write one: at most so many calls of a task at a time, by its ``quota``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastq import Step, Task
from fastq.errors import Reject
from fastq.steps import After, Before


class Metered(Task[..., Any]):
    """A task with a quota; 0: none may run."""

    quota: int | None = None


class Quota(Step):
    """Rejects calls beyond their task's quota, and counts how calls end."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.asked: list[str] = []

    def before(self, task: Task[..., Any]) -> Before | None:
        """Return what takes a place, for tasks with a quota."""
        self.asked.append(task.name)
        quota, name = getattr(task, "quota", None), task.name
        if quota is None:
            return None

        def take(task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            self.running[name] += 1
            if self.running[name] > quota:
                raise Reject(f"{self.running[name]} calls, quota {quota}")

        return take

    def after(self, task: Task[..., Any], state: str) -> After | None:
        """Return what gives the place back, however the call ended."""
        if getattr(task, "quota", None) is None:
            return None

        def give_back(state: str, value: Any, task_id: str, args: Any, kwargs: Any, einfo: object) -> None:
            self.running[task.name] -= 1
            self.ended[state] += 1

        return give_back
