"""The way of calls that others than the task have a hand in: through Celery's tracer, which stores results from here.

It serves the calls of the main process too, most of which are calls of that tracer.
"""

from __future__ import annotations

import pickle
from types import FrameType
from typing import Any, Final

import celery
from billiard.einfo import ExceptionInfo
from celery.app import trace

from fastq.celery.running.ends import REQUEUED, Ends, exception_report
from fastq.running.calls import Limit
from fastq.states import REJECTED, RETRY, SUCCESS
from fastq.wire.call import Call

#: Modules whose functions the tracer calls besides the task, and the names by which it calls that through one of them.
_TRACERS_OWN: Final = ("celery._state", "celery.app.task", "celery.app.trace", "celery.backends.", "celery.loaders.",
                       "celery.utils.", "logging")  # fmt: skip
_CALLS_OF_TASKS: Final = ("__call__", "__protected_call__")


class Traced:
    """Runs calls through Celery's tracer."""

    def __init__(self, app: celery.Celery, hostname: str, ends: Ends, limit: Limit) -> None:
        self._app = app
        self._hostname = hostname
        self._ends = ends
        self._limit = limit

    def run(self, task: Any, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> ExceptionInfo | None:
        """Run a call. Returns what has struck it before it had a request: it has stored and reported nothing then."""
        self._make_tracer(task)
        if call.soft_time_limit or self._limit.guards_all:
            outcome = self._limit.around(call, task.__trace__, (call.id, args, kwargs, fields), {})
        else:
            outcome = task.__trace__(call.id, args, kwargs, fields)
        value, info, _, text = outcome
        ends = self._ends
        if not info and isinstance(value, ExceptionInfo):
            return value
        if not info:
            meta = ends.unaddressed_meta(call, task, fields, SUCCESS, value, None)
            ends.finish(call, SUCCESS, meta, {"result": text}, False)
            return None
        error, traceback = info.retval, getattr(value, "traceback", None)
        if info.state == RETRY:
            report: Any = exception_report(getattr(error, "exc", error), traceback)
        elif info.state == REJECTED:
            report = REQUEUED if error.requeue else value
        else:
            report = exception_report(error, traceback)
        meta = ends.unaddressed_meta(call, task, fields, info.state, error, traceback)
        ends.finish(call, info.state, meta, report, bool(getattr(error, "requeue", False)))
        return None

    def apply(self, call: Call) -> None:
        """Call a function for the main process, as Celery's pool does, and tell it what came of it."""
        try:
            function, args, kwargs = pickle.loads(call.body)  # noqa: S301  the main process has written it
            if function is trace.fast_trace_task:
                self._make_tracer(self._app.tasks[args[0]])
            is_guarded = call.soft_time_limit or self._limit.guards_all
            value = self._limit.around(call, function, args, kwargs) if is_guarded else function(*args, **kwargs)
            ok = True
        except Exception:
            value, ok = ExceptionInfo(), False
        self._ends.finish_own(call, ok, value, self._limit.has_struck(call))

    def _make_tracer(self, task: Any) -> None:
        if getattr(task, "__trace__", None) is None:
            # Looked up in its module at this moment: that is where tools put theirs.
            task.__trace__ = trace.build_tracer(task.name, task, self._app.loader, self._hostname, app=self._app)


def is_tracing(frame: FrameType | None) -> bool:
    """Return whether Celery's tracer is at work, not the task: stores its end, sends what follows it, tells of it."""
    inner = None
    while frame is not None:
        if frame.f_code.co_name == "trace_task" and frame.f_globals is vars(trace):
            if inner is None or frame.f_locals.get("state") is not None:
                return True
            is_own = str(inner.f_globals.get("__name__")).startswith(_TRACERS_OWN)
            return is_own and inner.f_code.co_name not in _CALLS_OF_TASKS
        inner, frame = frame, frame.f_back
    return False
