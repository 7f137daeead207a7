"""A Celery application whose Redis connections pause between a request and its reply, for a signal to strike there."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from threading import Condition
from typing import Any

import amqp.transport
import redis.connection
from celery.app import trace

from fastq.celery.running.ends import Ends
from fastq.wire.call import Call
from tests.celery.proj.app import make_app

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})

#: The command behind which connections pause.
_pausing = ""
_pause_s = 20.0
_send = redis.connection.Connection.send_command


def _send_and_pause(self: Any, *args: Any, **options: Any) -> None:
    _send(self, *args, **options)
    if args[0] == _pausing:
        time.sleep(_pause_s)


redis.connection.Connection.send_command = _send_and_pause  # type: ignore[method-assign]


_write = amqp.transport._AbstractTransport.write


def _write_half(self: Any, data: bytes) -> None:
    global _pausing
    if _pausing == "half":
        _pausing = ""
        _write(self, data[: len(data) // 2])
        time.sleep(_pause_s)
    _write(self, data)


amqp.transport._AbstractTransport.write = _write_half


_exit = Condition.__exit__


def _pause_and_exit(self: Condition, *arguments: Any) -> None:
    global _pausing
    if _pausing == "pool" and self is app.pool._resource.not_empty:
        _pausing = ""
        time.sleep(_pause_s)
    _exit(self, *arguments)


Condition.__exit__ = _pause_and_exit  # type: ignore[method-assign]


class Struck(Exception):
    """What the application's own alarm raises."""


def _strike(*arguments: object) -> None:
    raise Struck("by the alarm")


@app.task(name="struck", bind=True)
def struck(self: Any, where: str, by_alarm: bool, catches: bool) -> str:
    """Be struck while a state is stored, a message is sent, or the pool of connections has its lock."""
    global _pausing
    before = signal.signal(signal.SIGALRM, _strike)
    if by_alarm:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        if where == "store":
            # Another command than the one that stores: its reply is no "OK".
            _pausing = "GET"
            self.backend.get_state(self.request.id)
        else:
            app.send_task("echo", ["first"], ignore_result=True, queue="nobody")
            _pausing = where if where in ("half", "pool") else "LPUSH"
            app.send_task("echo", ["sent"], ignore_result=True, queue="nobody")
    except Exception:
        if not catches:
            raise
    finally:
        _pausing = ""
        signal.signal(signal.SIGALRM, before)
    return "caught"


@app.task(name="ends_in_time")
def ends_in_time(command: str) -> str:
    """Have the pause in the midst of what records this task's end."""
    global _pausing, _pause_s
    _pausing, _pause_s = command, 1.0
    return command


@app.task(name="reset")
def reset() -> None:
    """Have no pauses any more."""
    global _pausing, _pause_s
    _pausing, _pause_s = "", 20.0


@app.task(name="collect")
def collect(values: list[Any]) -> list[Any]:
    return values


@app.task(name="echo", bind=True)
def echo(self: Any, number: int) -> list[Any]:
    """Return what the task's own store and broker say by the child's connections."""
    self.update_state(state="PROGRESS", meta={"number": number})
    state = self.backend.get_task_meta(self.request.id, cache=False)
    return [number, state["status"], state["result"]]


@app.task(name="struck_late")
def struck_late() -> str:
    return "answered"


_finish = Ends.finish


def _finish_and_strike(self: Ends, call: Call, *arguments: Any) -> None:
    """Be struck when the call's end has been reported."""
    _finish(self, call, *arguments)
    if call.name == "struck_late":
        raise Struck("late")


Ends.finish = _finish_and_strike  # type: ignore[method-assign]


@app.task(name="struck_early")
def struck_early() -> str:
    return "not struck"


_make_context = trace.Context.__init__


def _strike_and_make(self: Any, *args: Any, **fields: Any) -> None:
    """Be struck before the tracer has a request."""
    if args and args[0].get("task") == "struck_early" and sys._getframe(1).f_code.co_name == "trace_task":
        raise Struck("early")
    _make_context(self, *args, **fields)


trace.Context.__init__ = _strike_and_make  # type: ignore[method-assign]


@app.task(name="is_mapped")
def is_mapped() -> bool:
    from celery.backends.database.models import TaskExtended

    return bool(TaskExtended.__mapper__.configured)


@app.task(name="fail")
def fail(number: int) -> None:
    raise ValueError(number)
