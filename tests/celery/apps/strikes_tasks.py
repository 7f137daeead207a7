"""Tasks that send, store and return, with a limit or an alarm drawn to strike there; for both kinds of application."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from tests.celery.proj.journal import note


class Struck(Exception):
    """What the application's own alarm raises."""


def _strike(signum: int, frame: object) -> None:
    raise Struck("by the alarm")


def add_tasks(app: Any) -> None:
    """Register the tasks with an application of either kind."""

    @app.task(name="work", bind=True)
    def work(
        self: Any, number: int, size: int, steps: Sequence[str], alarm_s: float, is_loose: bool, catches: bool
    ) -> list[Any]:
        """Take the steps and return the number and so many bytes.

        ``is_loose``: the alarm is left behind and may strike anywhere. ``catches``: go on when something has struck.
        """
        if alarm_s:
            signal.signal(signal.SIGALRM, _strike)
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
        try:
            _take(app, self, number, size, steps)
        except Exception as error:
            if not catches or type(error).__name__ not in ("Struck", "SoftTimeLimitExceeded"):
                raise
        finally:
            if alarm_s and not is_loose:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return [number, "r" * size]

    @app.task(name="follow", ignore_result=True)
    def follow(result: list[Any]) -> None:
        note("followed", number=result[0], size=len(result[1]))


def _take(app: Any, task: Any, number: int, size: int, steps: Sequence[str]) -> None:
    for step in steps:
        if step == "state":
            task.update_state(state="PROGRESS", meta={"number": number, "blob": "s" * size})
        elif step == "states":
            for _ in range(300):
                task.update_state(state="PROGRESS", meta={"number": number, "blob": "s" * (size % 1000)})
        else:
            app.send_task("follow", ([number, "f" * size],))
            note("sent", number=number)
