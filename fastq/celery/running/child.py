"""A child that runs a Celery application's tasks, with Celery's request, stacks, signals and tracer around a call.

Two ways through: a call that nobody but the task itself has a hand in runs straight (``_run``) and its result goes to
the main process; every other one goes through Celery's own tracer (``_trace``), which stores results and sends
follow-ups from here. Calls come from the same pipe as those of a FastQ application.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from traceback import format_exc
from types import FrameType
from typing import Any

import celery
from billiard import process, util
from billiard.context import ForkProcess
from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import MaybeEncodingError, Worker
from celery import _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.app.task import Task as BaseTask
from celery.app.trace import TraceInfo, task_has_custom
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.saferepr import saferepr

from fastq.celery.checking.hookpoints import is_genuine, touched
from fastq.celery.running._request import faster, request_fields, to_context
from fastq.celery.running.bodies import Bodies
from fastq.celery.running.chords import free_claim, name_claims
from fastq.celery.running.connections import Connections, watch_handlers
from fastq.celery.running.outages import wait_out
from fastq.celery.running.replies import divert
from fastq.codecs.json import encode as encode_json
from fastq.errors import EncodeError, RemoteProtocolError
from fastq.pool.process import LIMIT_SIGNAL, Timer, set_name
from fastq.pool.titles import set_title
from fastq.printable import Lines
from fastq.running.birth import MemoryLimit, Signals, wait_for_threads, write_stacks_to
from fastq.running.child import EX_RECYCLE, ChildOptions, Malformed
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, STARTED, SUCCESS
from fastq.wire.call import Call
from fastq.wire.pipe import OUTCOME_NAMES, ChildPipe

_SUCCESS, _FAILURE, _RETRY, _IGNORED, _REJECTED, _REQUEUE, _MALFORMED, _RETURNED, _UNKNOWN = range(len(OUTCOME_NAMES))
_OUTCOMES = {SUCCESS: _SUCCESS, FAILURE: _FAILURE, RETRY: _RETRY, IGNORED: _IGNORED, REJECTED: _REJECTED}
_FOR_HOOKS = 2  # FLAG_FOR_HOOKS

#: How soon it is looked again whether a task runs that its soft limit is to end.
_AGAIN_S = 0.01
#: Modules whose functions the tracer calls besides the task, and the names by which it calls that through one of them.
_TRACERS_OWN = ("celery._state", "celery.app.task", "celery.app.trace", "celery.backends.", "celery.loaders.",
                "celery.utils.", "logging")  # fmt: skip
_CALLS_OF_TASKS = ("__call__", "__protected_call__")

#: What monitors are told of a message that is put back into its queue.
_REQUEUED: Mapping[str, Any] = {"requeue": True}

logger = logging.getLogger("celery.app.trace")


class Plan:
    """What running one task takes, looked up once: how its calls run, and which of its handlers do anything."""

    def __init__(self, app: celery.Celery, task: Any, worker_saves: bool) -> None:
        self.task = task
        self.reasons = touched(task, app)
        self.is_traced = bool(self.reasons)
        #: Where Celery would have the child store results, and the main process does not do it.
        self.stores_here = not worker_saves and not _is_disabled(task)
        # Celery's own __call__ only guards stacks that are in order here; one of the user's is the way to wrap the run.
        self.function: Callable[..., Any] = task.run if type(task).__call__ is BaseTask.__call__ else task
        self.requests = faster(task.request_stack)
        self.track_started = bool(task.track_started)
        self.repr_limit: int = task.resultrepr_maxsize
        self.before_start = task.before_start if task_has_custom(task, "before_start") else None
        self.on_success = task.on_success if task_has_custom(task, "on_success") else None
        self.after_return = task.after_return if task_has_custom(task, "after_return") else None
        self.cleanup = _cleanups(task, app)


class CeleryRunner:
    """Runs calls and reports their outcomes on the pipe."""

    def __init__(self, app: celery.Celery, options: ChildOptions, results: str) -> None:
        self._app = app
        self._pipe: ChildPipe
        self._hostname = options.hostname
        self._memory = MemoryLimit(options.max_memory_kib, _warn_of_memory)
        self._worker_saves = results != "disabled"
        self._replies = results == "rpc://"
        self._stores = self._worker_saves and not self._replies
        self._extended = bool(app.conf.result_extended)
        self._deduplicates = bool(app.conf.worker_deduplicate_successful_tasks)
        self._bodies = Bodies(app)
        self.connections = Connections(app)
        self._is_amqp = options.is_amqp
        self._plans: dict[str, Plan] = {}
        self._running = faster(_state._task_stack)
        self._timer: Timer
        self._request: dict[str, Any] = {}  # of the call that runs
        self._limited_call: Call | None = None  # the call that runs under a soft time limit
        self._is_late = False  # the call of the main process that runs has passed its soft time limit
        self._logs_info = False
        self._init_task = None if _is_default_loader(app, "on_task_init") else app.loader.on_task_init

    def prepare(self) -> None:
        """Look at every task, before the first fork."""
        for name in self._app.tasks:
            self._plan_of(name)

    def serve(self, pipe: ChildPipe) -> None:
        """Run calls until the pipe ends."""
        self._pipe = pipe
        if self._replies:
            divert(pipe, lambda: self._request)
        if self._app.conf.get("fastq_reliable"):
            wait_out(self._app)
        self._logs_info = logger.isEnabledFor(logging.INFO)
        signal.signal(LIMIT_SIGNAL, self._on_limit)
        self._timer = Timer(LIMIT_SIGNAL)
        pipe.ready()
        run, take = self.run, pipe.next
        while (call := take()) is not None:
            run(call)

    def run(self, call: Call) -> None:
        """Run one call and report how it ended. Raises nothing but what ends the process."""
        if call.is_own:
            self._apply(call)
            return
        plan = self._plans.get(call.name) or self._plan_of(call.name)
        if plan is None:
            self._pipe.finish(call, _UNKNOWN)
            return
        try:
            args, kwargs, embed = self._bodies.read(call)
            request = request_fields(call, args, kwargs, embed, self._hostname, self._is_amqp)
        except RemoteProtocolError as error:  # headers that are sound, but too large for what is rare in them
            self._pipe.finish(call, _MALFORMED, None, Malformed("properties", error).report)
            return
        except Malformed as error:
            self._pipe.finish(call, _MALFORMED, None, error.report)
            return
        self._request = request
        try:
            self._choose(plan, call, args, kwargs, request, embed)
        except MemoryError:
            raise
        except Exception as error:
            if self._pipe.has_answered(call):
                raise  # by a handler of a signal: there is no call any more that it could end
            self._internal_error(plan.task, call, request, error)
        if self.connections.has_old:
            self.connections.close_old()

    def _choose(
        self, plan: Plan, call: Call, args: Any, kwargs: Any, request: dict[str, Any], embed: dict[str, Any]
    ) -> None:
        """Send a call the straight way or through Celery's tracer."""
        if (
            plan.is_traced
            or _has_follow_ups(embed)
            or (plan.stores_here and not _ignores(plan.task, request))
            or (self._deduplicates and call.redelivered)
        ):
            if call.redelivered and embed.get("chord"):
                free_claim(plan.task.backend, call.id, request["group"])
            self._trace(plan, call, args, kwargs, request)
        else:
            self._run(plan, call, args, kwargs, request)

    def _internal_error(self, task: Any, call: Call, fields: dict[str, Any], error: Exception) -> None:
        """What is around a task has failed, its result store for one: tell, and record a failure if that can be."""
        trace._signal_internal_error(task, call.id, fields["args"], fields["kwargs"], fields, error)
        self._record_internal(task, call, fields, error)

    def _record_internal(self, task: Any, call: Call, fields: dict[str, Any], error: Exception) -> None:
        logger.error("Task %s[%s] met an internal error: %r\n%s", call.name, call.id, error, Lines(format_exc()))
        with contextlib.suppress(Exception):
            TraceInfo(FAILURE, error).handle_error_state(task, to_context(fields), eager=False)
        self._finish(call, FAILURE, None, _exception_report(error, format_exc()), False)

    def _plan_of(self, name: str) -> Plan | None:
        """Return the task's plan; a task may have been registered by another one a moment ago."""
        task = self._app.tasks.get(name)
        if task is None:
            return None
        plan = self._plans[name] = Plan(self._app, task, self._worker_saves)
        return plan

    # --- the straight way

    def _run(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> None:
        task, task_id = plan.task, call.id
        request = to_context(fields)
        # Without a __call__ of its own the task is running already, for a call of itself by its own name.
        request._protected = int(plan.function is not task)
        self._running.push(task)
        plan.requests.push(request)
        state: str | None = None
        value, meta = None, None
        report: Any = None
        requeues = False
        try:
            if signals.task_prerun.receivers:
                signals.task_prerun.send(sender=task, task_id=task_id, task=task, args=args, kwargs=kwargs)
            if self._init_task is not None:
                self._init_task(task_id, task)
            if plan.track_started and not _ignores(task, fields):
                started = {"pid": os.getpid(), "hostname": self._hostname}
                task.backend.store_result(task_id, started, STARTED, request=request)
            try:
                if plan.before_start is not None:
                    plan.before_start(task_id, args, kwargs)
                if call.soft_time_limit:
                    value = self._limited(call, plan.function, *args, **kwargs)
                else:
                    value = plan.function(*args, **kwargs)
                if call.wants_result:
                    meta = self._success_meta(call, request, task, value)
                state = SUCCESS
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                state, value, report = self._raised(task, request, error)
                traceback = report["traceback"] if state == FAILURE else None
                meta = self._unaddressed_meta(call, task, fields, state, value, traceback)
                requeues = bool(getattr(error, "requeue", False))
            else:
                runtime = time.monotonic() - call.started_s
                if meta is not None and self._stores and _has_listeners(plan):
                    # Whoever is called now may end the process: the success is to be known before.
                    self._pipe.state(task_id, SUCCESS, meta)
                if plan.on_success is not None:
                    self._handler(plan.on_success, value, task_id, args, kwargs)
                if signals.task_success.receivers:
                    signals.task_success.send(sender=task, result=value, runtime=runtime)
                if self._logs_info or call.wants_report:
                    text = saferepr(value, plan.repr_limit)
                    report = {"result": text}
                    if self._logs_info:
                        self._log_success(task, request, text, runtime)
                if plan.after_return is not None:
                    self._handler(plan.after_return, state, value, task_id, args, kwargs, None)
        finally:
            try:
                if signals.task_postrun.receivers:
                    signals.task_postrun.send(
                        sender=task, task_id=task_id, task=task, args=args, kwargs=kwargs, retval=value, state=state
                    )
            finally:
                self._running.pop()
                plan.requests.pop()
                for cleanup in plan.cleanup:
                    self._handler(cleanup)
        assert state is not None  # what leaves it open ends the process
        self._finish(call, state, meta, report, requeues)

    def _success_meta(self, call: Call, request: Context, task: Any, value: Any) -> bytes:
        if request._children is None and not self._extended and request.group is None and request.parent_id is None:
            try:
                meta = call.success_meta(encode_json(value))
            except EncodeError:
                meta = None
            if meta is not None:
                return meta
        # Whatever is out of the ordinary: Celery's own words, and its own errors.
        backend = task.backend
        fields = backend._get_result_meta(backend.encode_result(value, SUCCESS), SUCCESS, None, request)
        fields["task_id"] = call.id
        encoded = backend.encode(fields)
        return encoded if isinstance(encoded, bytes) else encoded.encode()

    def _unaddressed_meta(
        self, call: Call, task: Any, fields: dict[str, Any], state: str, value: Any, traceback: str | None
    ) -> bytes | None:
        """Return the result of a call whose sender gave no address for replies; the main process has a place for it."""
        if not self._replies or not call.wants_result or fields.get("reply_to") or state not in (SUCCESS, FAILURE):
            return None
        backend = task.backend
        result = backend.encode_result(value, state)
        meta = {"task_id": call.id, "status": state, "result": result, "traceback": traceback, "children": []}
        encoded = backend.encode(meta)
        return encoded if isinstance(encoded, bytes) else encoded.encode()

    def _raised(self, task: Any, request: Context, error: BaseException) -> tuple[str, Any, Any]:
        """Let Celery's own code record an exception; return state, value and what monitors are told.

        Called while the exception is being handled, as that code looks for it there.
        """
        if isinstance(error, Retry):
            info = TraceInfo(RETRY, error)
            einfo = info.handle_error_state(task, request, eager=False, call_errbacks=False)
            return RETRY, error, _exception_report(error.exc, einfo.traceback)
        if isinstance(error, Reject):
            TraceInfo(REJECTED, error).handle_reject(task, request)
            return REJECTED, error, _REQUEUED if error.requeue else ExceptionInfo()
        if isinstance(error, Ignore):
            TraceInfo(IGNORED, error).handle_ignore(task, request)
            return IGNORED, error, {}
        einfo = TraceInfo(FAILURE, error).handle_error_state(task, request, eager=False, call_errbacks=True)
        if task_has_custom(task, "after_return"):
            self._handler(task.after_return, FAILURE, error, request.id, request.args, request.kwargs, None)
        return FAILURE, error, _exception_report(einfo.exception, einfo.traceback)

    # --- Celery's tracer

    def _trace(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> None:
        task = plan.task
        self._make_tracer(task)
        if call.soft_time_limit:
            outcome = self._limited(call, task.__trace__, call.id, args, kwargs, fields)
        else:
            outcome = task.__trace__(call.id, args, kwargs, fields)
        value, info, _, text = outcome
        if not info and isinstance(value, ExceptionInfo):
            # It was struck before it had a request, and has stored nothing.
            self._record_internal(task, call, fields, value.exception)
            return
        if not info:
            meta = self._unaddressed_meta(call, task, fields, SUCCESS, value, None)
            self._finish(call, SUCCESS, meta, {"result": text}, False)
            return
        error = info.retval
        if info.state == RETRY:
            report: Any = _exception_report(getattr(error, "exc", error), getattr(value, "traceback", ""))
        elif info.state == REJECTED:
            report = _REQUEUED if error.requeue else value
        else:
            report = _exception_report(error, getattr(value, "traceback", ""))
        meta = self._unaddressed_meta(call, task, fields, info.state, error, getattr(value, "traceback", None))
        self._finish(call, info.state, meta, report, bool(getattr(error, "requeue", False)))

    # --- calls of the main process

    def _apply(self, call: Call) -> None:
        """Call a function for the main process, as Celery's pool does, and tell it what came of it."""
        self._is_late = False
        self._request = {}
        try:
            function, args, kwargs = pickle.loads(call.body)  # noqa: S301  the main process has written it
            if function is trace.fast_trace_task:
                self._make_tracer(self._app.tasks[args[0]])
            if call.soft_time_limit:
                value = self._limited(call, function, *args, **kwargs)
            else:
                value = function(*args, **kwargs)
            ok = True
        except Exception:
            value, ok = ExceptionInfo(), False
        self._pipe.finish(
            call,
            _SUCCESS if ok else _FAILURE,
            _pickled_end(ok, value, self._is_late),
            None,
            self._memory.flag() | _FOR_HOOKS,
        )

    # --- parts

    def _make_tracer(self, task: Any) -> None:
        if getattr(task, "__trace__", None) is None:
            # Looked up in its module at this moment: that is where tools put theirs.
            task.__trace__ = trace.build_tracer(task.name, task, self._app.loader, self._hostname, app=self._app)

    def _finish(self, call: Call, state: str, meta: bytes | None, report: Any, requeues: bool) -> None:
        outcome = _OUTCOMES.get(state, _FAILURE)
        if outcome == _REJECTED and requeues:
            outcome = _REQUEUE
        elif outcome == _REJECTED:
            # It never runs again, and that is a failure to who waits: Celery's code in the main process records it.
            self._pipe.finish(call, _REJECTED, _pickled_rejection(report), None, self._memory.flag() | _FOR_HOOKS)
            return
        text = encode_json(report).decode() if call.wants_report and report is not None else None
        self._pipe.finish(call, outcome, meta, text, self._memory.flag())

    def _limited(self, call: Call, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call with a timer that raises SoftTimeLimitExceeded in the task: not where its end is recorded already."""
        self._limited_call = call
        self._timer.set(call.soft_time_limit)
        try:
            return function(*args, **kwargs)
        finally:
            self._limited_call = None
            self._timer.set(0)

    def _on_limit(self, signum: int, frame: FrameType | None) -> None:
        call = self._limited_call
        # The time is looked at because a signal for the call before may be late.
        if call is None or time.monotonic() - call.started_s < call.soft_time_limit:
            return
        if _is_tracing(frame):
            self._timer.set(_AGAIN_S)
            return
        self._limited_call = None
        self._is_late = True
        if not call.is_own:  # of a call of its own the main process says so itself
            logging.getLogger("celery.worker.request").warning(
                "Soft time limit (%ss) exceeded for %s[%s]", call.soft_time_limit, call.name, call.id
            )
        raise SoftTimeLimitExceeded()

    def on_soft_limit(self, signum: int, frame: object) -> None:
        """Raise the soft time limit in the task that runs: what SIGUSR1 means to the children of Celery's pool."""
        if _state.get_current_task() is not None:
            raise SoftTimeLimitExceeded()

    def _handler(self, handler: Callable[..., Any], *args: Any) -> None:
        """Call one of the task's handlers; what it raises is logged, as the task's outcome stands already."""
        try:
            handler(*args)
        except (Reject, MemoryError):
            raise
        except Exception:
            logger.exception("task handler %r failed", getattr(handler, "__qualname__", handler))

    def _log_success(self, task: Any, request: Context, text: str, runtime: float) -> None:
        context = {
            "id": request.id,
            "name": request.shadow or task.name,
            "return_value": text,
            "runtime": runtime,
            "args": request.get("argsrepr") or saferepr(request.args),
            "kwargs": request.get("kwargsrepr") or saferepr(request.kwargs),
        }
        logger.info(trace.LOG_SUCCESS, context, extra={"data": context})


# --- looking at tasks and requests ------------------------------------------------------------------------------------


def _is_tracing(frame: FrameType | None) -> bool:
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


def _has_follow_ups(embed: dict[str, Any]) -> bool:
    get = embed.get
    return bool(get("callbacks") or get("errbacks") or get("chain") or get("chord"))


def _has_listeners(plan: Plan) -> bool:
    """Return whether somebody's code runs behind the task's own."""
    handlers = plan.on_success is not None or plan.after_return is not None or bool(plan.cleanup)
    return handlers or bool(signals.task_success.receivers or signals.task_postrun.receivers)


def _ignores(task: Any, fields: dict[str, Any]) -> bool:
    ignored = fields.get("ignore_result")
    return bool(task.ignore_result if ignored is None else ignored)


def _is_disabled(task: Any) -> bool:
    return type(task.backend).__name__ == "DisabledBackend"


def _cleanups(task: Any, app: celery.Celery) -> tuple[Callable[[], None], ...]:
    """Return what is to be called after each run: not what is known to do nothing."""
    found: list[Callable[[], None]] = []
    process_cleanup = getattr(type(task.backend), "process_cleanup", None)
    if getattr(process_cleanup, "__module__", "") != "celery.backends.base":
        found.append(task.backend.process_cleanup)
    if not _is_default_loader(app, "on_process_cleanup"):
        found.append(app.loader.on_process_cleanup)
    return tuple(found)


def _is_default_loader(app: celery.Celery, method: str) -> bool:
    return getattr(getattr(type(app.loader), method), "__module__", "") == "celery.loaders.base"


def _pickled_end(ok: bool, value: Any, is_late: bool) -> bytes:
    """Return the end of a call for the main process: a value that cannot be sent is an error, as with Celery's pool."""
    try:
        return pickle.dumps((ok, value, is_late))
    except Exception as error:  # whatever the value's own code raises
        try:
            raise MaybeEncodingError(error, value) from None
        except MaybeEncodingError:
            return pickle.dumps((False, ExceptionInfo(), is_late))


def _pickled_rejection(info: ExceptionInfo) -> bytes:
    try:
        return pickle.dumps(info)
    except Exception:  # a reason that cannot be sent
        try:
            raise Reject(saferepr(info.exception)) from None
        except Reject:
            return pickle.dumps(ExceptionInfo())


def _exception_report(error: Any, traceback: Any) -> dict[str, Any]:
    return {"exception": saferepr(error), "traceback": str(traceback or "")}


# --- the process ------------------------------------------------------------------------------------------------------


class CeleryChildMain:
    """What the zygote calls in each child it forks. All that children share is prepared here, before the fork."""

    def __init__(self, app: celery.Celery, options: ChildOptions, results: str) -> None:
        self._app = app
        self._options = options
        self._runner = CeleryRunner(app, options, results)
        self._runner.prepare()
        name_claims()

    def __call__(self, sock: int, shared: int, slot: int) -> int:
        """Run calls until the main process says stop or goes away; returns the exit code."""
        pipe = ChildPipe(sock, shared)
        write_stacks_to(shared)
        set_name(b"fastq-child")
        watch_handlers(self._runner.connections.exchange)
        handlers = Signals(pipe)
        handlers.handle(signal.SIGUSR1, self._runner.on_soft_limit)
        pipe.on_slot = lambda taken: self._renumber(slot + 1, taken + 1)
        self._begin(slot + 1)
        handlers.install()
        code = EX_RECYCLE
        try:
            self._serve(pipe)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        signals.worker_process_shutdown.send(sender=self._options.hostname, pid=os.getpid(), exitcode=code)
        if not pipe.is_terminated:
            wait_for_threads()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if not is_genuine(Worker._do_exit):
            # A tool waits for the end of a child there; what it has put its own around ends the process.
            Worker._do_exit(_Loop(lambda: None), os.getpid(), code & 0xFF)
        return code & 0xFF

    def _begin(self, number: int) -> None:
        """Do what Celery's pool does in a new child, in its order."""
        app = self._app
        _become(number)
        for name in ("billiard", "multiprocessing"):
            if (module := sys.modules.get(f"{name}.util")) is not None:
                module._run_after_forkers()
        _state._set_task_join_will_block(True)
        self._entitle(number)
        if self._options.setup is not None:
            self._options.setup(number)
        app.loader.init_worker()
        app.loader.init_worker_process()
        app.set_current()
        _state.set_default_app(app)
        trace._tasks = app._tasks
        signals.worker_process_init.send(sender=self._options.hostname)

    def _renumber(self, before: int, number: int) -> None:
        """Go by the number of the slot that this process takes its calls in."""
        _name(process.current_process(), number)
        self._entitle(number)
        if self._options.setup is not None:
            self._options.setup.renumber(before, number)

    def _entitle(self, number: int) -> None:
        set_title(self._options.program, self._options.hostname, f"ForkPoolWorker-{number}")

    def _serve(self, pipe: ChildPipe) -> None:
        # Tools put their own loop there to hear of a child's end.
        if is_genuine(Worker.workloop):
            self._runner.serve(pipe)
        else:
            Worker.workloop(_Loop(lambda: self._runner.serve(pipe)), pid=os.getpid())


def _become(number: int) -> None:
    """Make billiard and multiprocessing know this process as that child of a pool: by name, index, daemon flag."""
    child: Any = ForkProcess(daemon=True)
    _name(child, number)
    child._parent_pid = os.getppid()
    process._process_counter = itertools.count(1)
    process._children = set()
    process._set_current_process(child)


def _name(child: Any, number: int) -> None:
    child.name = f"ForkPoolWorker-{number}"
    child._identity = (number,)
    child.index = number - 1  # what %i stands for


def _warn_of_memory(text: str) -> None:
    """Log it for everybody, and where billiard does, which Celery mostly keeps silent."""
    logging.getLogger("celery.worker").warning(text)
    util.warning(text)


class _Loop:
    """What billiard's work loop needs of its process, so that a loop that a tool has put around it surrounds ours."""

    maxtasks = None
    max_memory_per_child = None
    inqW_fd = synqW_fd = -1  # noqa: N815  billiard's names
    on_exit = on_ready_counter = wait_for_syn = None

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve
        self.outq = self

    def put(self, item: object) -> None:
        """Take what the loop would tell its main process: nothing of it is needed."""

    def prepare_result(self, result: Any) -> Any:
        """Return the result."""
        return result

    def wait_for_job(self) -> None:
        """Run all calls, then end the loop."""
        self._serve()
        raise SystemExit(EX_RECYCLE)

    def _ensure_messages_consumed(self, completed: int) -> bool:
        return True
