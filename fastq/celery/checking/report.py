"""What ``fastq check`` found, as values and as text. Knows no application; needs no Celery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Kinds of findings that make the check fail: what is written there does not happen.
FAILING = ("unusable", "unknown", "not carried")
#: Kinds that are worth a look.
RISK, NOTE = "risk", "note"


@dataclass(frozen=True)
class Finding:
    """Something about a setting, or about what else the application asks of its worker."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class TaskPath:
    """A task and why it does not run straight; no reasons: it does."""

    name: str
    reasons: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Return "fast" or "compatible"."""
        return "compatible" if self.reasons else "fast"


@dataclass(frozen=True)
class Report:
    """All about an application. ``broker`` and ``results`` are shown as they are: without passwords.

    ``carries_follow_ups``: whether its calls may have a callback, errback, chain or chord behind them.
    """

    application: str
    broker: str
    results: str
    tasks: Sequence[TaskPath]
    findings: Sequence[Finding] = ()
    carries_follow_ups: bool = True

    @property
    def is_ok(self) -> bool:
        """Return whether everything that the application sets will happen."""
        return not any(finding.kind in FAILING for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {
            "application": self.application,
            "broker": self.broker,
            "results": self.results,
            "ok": self.is_ok,
            "tasks": [{"name": each.name, "path": each.path, "reasons": list(each.reasons)} for each in self.tasks],
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self) -> Iterator[str]:
        """Yield the report as text for people."""
        yield self.application
        yield f"  broker   {self.broker}"
        yield f"  results  {self.results}"
        yield ""
        yield from self._task_lines()
        if self.findings:
            yield ""
            yield "Settings"
            width = max(len(finding.kind) for finding in self.findings)
            yield from (f"  {each.kind:{width}}  {each.name}: {each.text}" for each in self.findings)

    def _task_lines(self) -> Iterator[str]:
        slow = [task for task in self.tasks if task.reasons]
        yield f"Tasks: {len(self.tasks) - len(slow)} on the fast path, {len(slow)} on the compatible path"
        if self.carries_follow_ups and len(slow) < len(self.tasks):
            yield "  (a call with a callback, errback, chain or chord behind it takes the compatible path)"
        # What holds for every task is said once.
        common = [
            reason for reason in (slow[0].reasons if slow else ()) if all(reason in task.reasons for task in self.tasks)
        ]
        yield from (f"  every task: {reason}" for reason in common)
        for task in self.tasks:
            yield f"  {task.path:10}  {task.name}"
            yield from (f"  {'':10}    {reason}" for reason in task.reasons if reason not in common)
