"""Tasks that send, store and return, with a limit or an alarm drawn to strike there; for both kinds of application."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from tests.celery.proj.journal import note


class Struck(Exception):
    """What the application's own alarm raises."""


#: What is raised, by the way in which a call is struck.
RAISED = {"interrupt": KeyboardInterrupt, "exit": SystemExit}

_own_term: Any = signal.SIG_DFL


def _set_alarm(way: str, alarm_s: float) -> None:
    """Have the application's own handler of a signal raise after so many seconds; 0 takes it back."""
    error = RAISED.get(way, Struck)

    def strike(signum: int, frame: object) -> None:
        raise error("by the alarm")

    def ask(signum: int, frame: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    global _own_term
    if way == "term" and alarm_s:
        _own_term = signal.signal(signal.SIGTERM, strike)
    signal.signal(signal.SIGALRM, ask if way == "term" else strike)
    signal.setitimer(signal.ITIMER_REAL, alarm_s)
    if way == "term" and not alarm_s:
        signal.signal(signal.SIGTERM, _own_term)


def add_tasks(app: Any) -> None:
    """Register the tasks with an application of either kind; STRIKES_LOOP has them be coroutine functions."""

    def work(self: Any, number: int, size: int, steps: Sequence[str], alarm_s: float, way: str, catches: bool) -> Any:
        """Take the steps and return the number and so many bytes.

        ``way`` "loose": the alarm is left behind and may strike anywhere. ``catches``: go on when something has struck.
        """
        try:
            if alarm_s:
                _set_alarm(way, alarm_s)
            for _ in _taken(app, self, number, size, steps):
                pass
        except Exception as error:
            if not catches or type(error).__name__ not in ("Struck", "SoftTimeLimitExceeded"):
                raise
        finally:
            if alarm_s and way != "loose":
                _set_alarm(way, 0)
        return [number, "r" * size]

    async def work_on_loop(
        self: Any, number: int, size: int, steps: Sequence[str], alarm_s: float, way: str, catches: bool
    ) -> Any:
        """The same where a limit strikes at each ``await``."""
        try:
            for _ in _taken(app, self, number, size, steps):
                await asyncio.sleep(0.001)
        except Exception as error:
            if not catches or type(error).__name__ != "SoftTimeLimitExceeded":
                raise
        return [number, "r" * size]

    app.task(name="work", bind=True)(work_on_loop if os.environ.get("STRIKES_LOOP") else work)

    @app.task(name="follow", ignore_result=True)
    def follow(result: list[Any]) -> None:
        note("followed", number=result[0], size=len(result[1]))


def _taken(app: Any, task: Any, number: int, size: int, steps: Sequence[str]) -> Iterator[None]:
    """Take the steps, and yield between them."""
    for step in steps:
        if step == "state":
            task.update_state(state="PROGRESS", meta={"number": number, "blob": "s" * size})
        elif step == "states":
            for _ in range(300):
                task.update_state(state="PROGRESS", meta={"number": number, "blob": "s" * (size % 1000)})
                yield
        else:
            app.send_task("follow", ([number, "f" * size],))
            note("sent", number=number)
        yield
