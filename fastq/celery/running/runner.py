"""Runs the calls of a Celery application, with its request around each.

Two ways through: a call that nobody but the task itself has a hand in runs straight (``straight.py``) and its result
goes to the main process; every other one goes through Celery's own tracer (``traced.py``), which stores results and
sends follow-ups from here.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from traceback import format_exc
from typing import Any

import celery
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.app import trace
from celery.app.trace import TraceInfo

from fastq.celery.running._request import request_fields, to_context
from fastq.celery.running.bodies import Bodies
from fastq.celery.running.chords import free_claim
from fastq.celery.running.connections import Connections
from fastq.celery.running.coroutines import enter, own_function, own_handler, separate, set_own_function
from fastq.celery.running.ends import Ends, exception_report
from fastq.celery.running.outages import wait_out
from fastq.celery.running.plan import Plan, ignores
from fastq.celery.running.replies import divert
from fastq.celery.running.straight import Straight
from fastq.celery.running.traced import Traced, is_tracing
from fastq.errors import RemoteProtocolError
from fastq.printable import Lines
from fastq.running.birth import ChildOptions
from fastq.running.calls import is_hosted, make_limit
from fastq.running.decode import Malformed
from fastq.running.limit import plain
from fastq.states import FAILURE
from fastq.wire.call import Call
from fastq.wire.pipe import OUTCOME_MALFORMED, OUTCOME_UNKNOWN, ChildPipe

logger = logging.getLogger("celery.app.trace")

#: Of the call that runs; where results are replies alone. Other threads than that of the call have none.
_request: ContextVar[dict[str, Any]] = ContextVar("fastq_celery_request", default={})  # noqa: B039  nobody writes to it


class CeleryRunner:
    """Runs calls and reports their outcomes on the pipe."""

    def __init__(self, app: celery.Celery, options: ChildOptions, results: str) -> None:
        self.app = app
        self._pipe: ChildPipe
        self._hostname = options.hostname
        self._is_amqp = options.is_amqp
        self._worker_saves = results != "disabled"
        self._deduplicates = bool(app.conf.worker_deduplicate_successful_tasks)
        self._bodies = Bodies(app)
        self._plans: dict[str, Plan] = {}
        is_many = options.calls != "one"
        self._has_loop = options.calls == "loop"
        #: Whether a coroutine runs in another thread than what calls it.
        self._awaits_elsewhere = options.calls in ("loop", "gevent", "eventlet")
        self._is_hosted = is_hosted(options.calls)
        self._encloses = False
        self._finishing: Callable[[Callable[..., Any]], Callable[..., Any]] = plain
        #: What was read of calls that came to the loop and go through the tracer.
        self._reads: dict[int, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {}
        self.connections = Connections(app, is_many)
        self.limit = make_limit(options.calls, _past_limit, is_tracing, self.connections.exchange)
        self._ends = Ends(results == "rpc://", options.max_memory_kib)
        stores = self._worker_saves and not self._ends.replies
        self._straight = Straight(app, options.hostname, self._ends, self.limit, stores)
        self._traced = Traced(app, options.hostname, self._ends, self.limit)
        self._has_begun = False

    def prepare(self) -> None:
        """Look at every task, and what stores results, before the first fork."""
        for name in self.app.tasks:
            self._plan_of(name)
        # SQLAlchemy does it at the first use; what is raised in the midst of that leaves it of no use to the process.
        database = sys.modules.get("celery.backends.database.session")
        if database is not None and hasattr(database.ResultModelBase, "registry"):
            database.ResultModelBase.registry.configure()

    def begin(self, pipe: ChildPipe) -> None:
        """Get ready to run calls in this process and to report on that pipe; again, to report on another one."""
        self._pipe = self._ends.pipe = pipe
        if self._has_begun:
            return
        self._has_begun = True
        self.connections.begin()
        if self._ends.replies:
            divert(lambda *state: self._pipe.state(*state), _request.get)
        if self.app.conf.get("fastq_reliable"):
            wait_out(self.app)
        if self._awaits_elsewhere:
            separate(self.app)
        if self._has_loop:
            self.limit.has_coroutine = self._has_coroutine
        if self._has_loop or self._is_hosted:
            self._finishing = self.limit.finishing
        if self._awaits_elsewhere or self._is_hosted:
            self._plans.clear()
            self.prepare()  # anew, as it knows the stacks, and what a pool has put in the place of Celery's parts
        self._encloses = True
        for plan in self._plans.values():
            self._enclose(plan)
        self._straight.begin()
        self.limit.begin()

    def run(self, call: Call) -> None:
        """Run one call and report how it ended. Raises nothing but what ends the process."""
        if call.is_own:
            if self._awaits_elsewhere:
                enter(call.seq)
            _request.set({})
            self._traced.apply(call)
            return
        plan = self._plans.get(call.name) or self._plan_of(call.name)
        if plan is None:
            self._pipe.finish(call, OUTCOME_UNKNOWN)
            return
        if self._awaits_elsewhere and (self._has_loop or plan.awaits):
            enter(call.seq)
        read = self._read(call)
        if read is None:
            return
        args, kwargs, embed, request = read
        if self._ends.replies:
            _request.set(request)
        try:
            self._choose(plan, call, args, kwargs, request, embed)
        except MemoryError:
            raise
        except (SystemExit, KeyboardInterrupt) as error:
            if not self.limit.guards_all:
                raise
            if self.limit.is_cancelled(call):
                self._pipe.cancelled(call)
            elif not self._pipe.has_answered(call):
                # Of one call among others it is not to end the process.
                self._internal_error(plan.task, call, request, WorkerLostError(f"the task raised {error!r}"))
        except Exception as error:
            if self._pipe.has_answered(call):
                raise  # by a handler of a signal: there is no call any more that it could end
            self._internal_error(plan.task, call, request, error)
        if self.connections.have_old():
            self.connections.close_old()

    def _has_coroutine(self, call: Call) -> bool:
        plan = self._plans.get(call.name)
        return not call.is_own and plan is not None and plan.is_async

    def is_async(self, call: Call) -> bool:
        """Return whether the call runs on the loop: one of a coroutine function that goes the straight way."""
        if call.is_own:
            return False
        plan = self._plans.get(call.name) or self._plan_of(call.name)
        return plan is not None and plan.is_async and not plan.is_traced

    async def run_async(self, call: Call) -> bool:
        """Run a call of a coroutine function, and report how it ended. False: it is one for the tracer, in a thread."""
        enter(call.seq)
        plan = self._plans[call.name]
        read = self._read(call)
        if read is None:
            return True
        args, kwargs, embed, request = read
        if not self._is_straight(plan, call, request, embed):
            self._reads[call.seq] = read
            return False
        if self._ends.replies:
            _request.set(request)
        try:
            await self._straight.run_async(plan, call, args, kwargs, request)
        except Exception as error:
            if self.limit.is_cancelled(call):
                self._pipe.cancelled(call)
                return True
            if self._pipe.has_answered(call):
                raise
            self._internal_error(plan.task, call, request, error)
        return True

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Surround the calls of a loop with nothing: Celery has signals for that."""
        yield

    def _enclose(self, plan: Plan) -> None:
        """Have the limit know the task's own function, which Celery's code is to call."""
        function = own_function(plan.task)
        if not (plan.is_async or self.limit.guards_all) or own_handler(function) is not function:
            return
        enclosed = self.limit.inside(function)
        if enclosed is function:
            return
        enclosed.fastq_original = function
        set_own_function(plan.task, enclosed)
        if plan.is_async and self._has_loop:
            plan.function = function
        elif plan.function is not plan.task:
            plan.function = plan.task.run

    def _read(self, call: Call) -> tuple[Any, Any, dict[str, Any], dict[str, Any]] | None:
        """Return arguments, follow-ups and request of a call; None: it cannot be read, which is reported."""
        if call.seq in self._reads:
            return self._reads.pop(call.seq)
        try:
            args, kwargs, embed = self._bodies.read(call)
            return args, kwargs, embed, request_fields(call, args, kwargs, embed, self._hostname, self._is_amqp)
        except RemoteProtocolError as error:  # headers that are sound, but too large for what is rare in them
            self._pipe.finish(call, OUTCOME_MALFORMED, None, Malformed("properties", error).report)
        except Malformed as error:
            self._pipe.finish(call, OUTCOME_MALFORMED, None, error.report)
        return None

    def _is_straight(self, plan: Plan, call: Call, request: dict[str, Any], embed: dict[str, Any]) -> bool:
        return not (
            plan.is_traced
            or _has_follow_ups(embed)
            or (plan.stores_here and not ignores(plan.task, request))
            or (self._deduplicates and call.redelivered)
        )

    def _choose(
        self, plan: Plan, call: Call, args: Any, kwargs: Any, request: dict[str, Any], embed: dict[str, Any]
    ) -> None:
        """Send a call the straight way or through Celery's tracer."""
        if not self._is_straight(plan, call, request, embed):
            if call.redelivered and embed.get("chord"):
                free_claim(plan.task.backend, call.id, request["group"])
            struck = self._traced.run(plan.task, call, args, kwargs, request)
            if struck is not None:
                try:  # Celery's code looks for the exception that is being handled
                    raise getattr(struck.exception, "exc", struck.exception)
                except Exception as error:
                    self._record_internal(plan.task, call, request, error)
        else:
            self._straight.run(plan, call, args, kwargs, request)

    def _internal_error(self, task: Any, call: Call, fields: dict[str, Any], error: Exception) -> None:
        """What is around a task has failed, its result store for one: tell, and record a failure if that can be."""
        trace._signal_internal_error(task, call.id, fields["args"], fields["kwargs"], fields, error)
        self._record_internal(task, call, fields, error)

    def _record_internal(self, task: Any, call: Call, fields: dict[str, Any], error: Exception) -> None:
        logger.error("Task %s[%s] met an internal error: %r\n%s", call.name, call.id, error, Lines(format_exc()))
        with contextlib.suppress(Exception):
            TraceInfo(FAILURE, error).handle_error_state(task, to_context(fields), eager=False)
        self._ends.finish(call, FAILURE, None, exception_report(error, format_exc()), False)

    def _plan_of(self, name: str) -> Plan | None:
        """Return the task's plan; a task may have been registered by another one a moment ago."""
        task = self.app.tasks.get(name)
        if task is None:
            return None
        plan = self._plans[name] = Plan(self.app, task, self._worker_saves, self._finishing)
        if self._encloses:
            self._enclose(plan)
        return plan


def _past_limit(call: Call) -> Exception:
    """Return what is raised in a call whose time is up; it is logged where Celery does."""
    if not call.is_own:  # of a call of its own the main process says so itself
        logging.getLogger("celery.worker.request").warning(
            "Soft time limit (%ss) exceeded for %s[%s]", call.soft_time_limit, call.name, call.id
        )
    error: Exception = SoftTimeLimitExceeded()
    return error


def _has_follow_ups(embed: dict[str, Any]) -> bool:
    get = embed.get
    return bool(get("callbacks") or get("errbacks") or get("chain") or get("chord"))
