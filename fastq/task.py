"""A task: the user's function, what it says about itself, and the words to call, send and retry it.

Runs nothing by itself but direct and eager calls; in a worker the child calls ``run``. Source of the words: Celery's
``Task``.
"""

from __future__ import annotations

import copyreg
import inspect
import logging
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast

from fastq.codecs.meta import encode_meta
from fastq.eager import run_here
from fastq.errors import MaxRetriesExceeded, Retry, SettingsError
from fastq.net.threads import in_thread
from fastq.request import (
    ExceptionInfo,
    Request,
    current,
    is_in_worker,
    pop_request,
    push_request,
    running_task,
)
from fastq.result import AsyncResult, EagerResult, ResultSource
from fastq.sending.absent import TASK_ATTRIBUTES, lacking
from fastq.sending.options import (
    CHECKS,
    TASK_CHECKS,
    RetryOptions,
    SendOptions,
    TaskOptions,
    check_names,
    flag,
    seconds,
    text_option,
)
from fastq.sending.parameters import ANY, Parameters, takes_task
from fastq.states import FAILURE
from fastq.steps import Around, Step
from fastq.steps import retry as retries
from fastq.steps.built_in import BUILT_IN
from fastq.wire.ids import new_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastq.interfaces import Publisher
    from fastq.sending.envelope import Envelope
    from fastq.sending.on_loop import LoopSender
    from fastq.sending.sender import Sender
    from fastq.settings import Settings
    from fastq.steps.retry import ExceptionClasses, RetryPolicy

__all__ = ["ExceptionInfo", "Request", "Task", "current", "pop_request", "push_request"]

P = ParamSpec("P")
R = TypeVar("R")

#: Attributes that take a setting's value where the task says nothing.
SETTINGS_BEHIND = {
    "acks_late": "task_acks_late",
    "ignore_result": "task_ignore_result",
    "track_started": "task_track_started",
}

#: Methods that a worker calls around ``run``; the base class has them all, doing nothing.
HANDLERS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")


#: What may be said of a task where it is declared.
_OPTIONS = TaskOptions.__optional_keys__ | {"bind", "base"}

#: Options that say how a task is retried by itself.
_AUTORETRY_OPTIONS = frozenset(
    {"dont_autoretry_for", "retry_backoff", "retry_backoff_max", "retry_jitter", "retry_kwargs"}
)


class Application(ResultSource, Protocol):
    """An application as its tasks see it; ``fastq.FastQ`` is one."""

    main: str | None
    conf: Settings
    tasks: dict[str, Task[..., Any]]
    sender: Sender
    steps: tuple[Step, ...]

    @property
    def stores_results(self) -> bool:
        """Return whether there is a result store."""

    @property
    def publisher(self) -> Publisher:
        """Return the connection to the broker, opened at first use."""

    @property
    def loop_sender(self) -> LoopSender:
        """Return what sends from event loops; made when it is first asked for."""

    @property
    def current_task(self) -> Task[..., Any] | None:
        """Return the task whose call is running here."""

    def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SendOptions],
    ) -> AsyncResult[Any]:
        """Send a task by name, registered here or not, and return the handle on its result."""

    def batch(self) -> AbstractContextManager[None]:
        """Collect what this thread sends inside a ``with`` block and publish it at the end, with one wait for all."""

    def AsyncResult(self, task_id: str, task_name: str | None = None) -> AsyncResult[Any]:  # noqa: N802 - Celery's word
        """Return the handle on a task that was sent before."""

    def pickled_task(self, task: Task[..., Any]) -> Any:
        """Return how pickle and copy find a task of this application."""


@lacking(TASK_ATTRIBUTES, "task {.name!r} has no")
class Task(Generic[P, R]):
    """A registered task. Made by ``@app.task``; a subclass with a ``run`` method goes to ``app.register_task``.

    Class attributes are the defaults of the options of the same name. None in ``acks_late``, ``ignore_result`` and
    ``track_started`` becomes the setting's value when the application is finalized.
    """

    #: The function that does the work.
    run: Callable[..., R]

    name: str = ""
    bind: bool = False
    typing: bool = True
    ignore_result: bool | None = None
    acks_late: bool | None = None
    track_started: bool | None = None
    throws: tuple[type[BaseException], ...] = ()

    max_retries: int | None = 3
    default_retry_delay: float = 180.0
    autoretry_for: ExceptionClasses = ()
    dont_autoretry_for: ExceptionClasses = ()
    retry_backoff: bool | float = False
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    retry_kwargs: Mapping[str, Any] = types.MappingProxyType({})

    time_limit: float | None = None
    soft_time_limit: float | None = None
    serializer: str | None = None
    compression: str | None = None
    queue: str | None = None
    exchange: str | None = None
    routing_key: str | None = None
    priority: int | None = None
    expires: float | datetime | None = None

    #: What ``autoretry_for`` and the ``retry_…`` options add up to; None: no exception is retried by itself.
    autoretry: RetryPolicy | None = None
    #: Whether its function is a coroutine function.
    is_async: bool = False
    #: The handlers that this task has of its own; a worker need not call the others.
    handlers: frozenset[str] = frozenset()

    _app: Application | None = None
    _sender: Sender
    _envelope: Envelope | None = None
    _direct: Envelope | None = None
    _around: Around | None = None
    _parameters: Parameters = ANY
    _inherited: tuple[str, ...] = ()

    # --- what a task class may override ------------------------------------------------------------------------------

    def before_start(self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Be called before ``run``."""

    def on_success(self, retval: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Be called with the value that ``run`` returned."""

    def on_failure(
        self, exc: Exception, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: ExceptionInfo
    ) -> None:
        """Be called with the exception that ended the task."""

    def on_retry(
        self, exc: BaseException, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: ExceptionInfo
    ) -> None:
        """Be called with the reason when the task is to run again."""

    def after_return(
        self,
        status: str,
        retval: Any,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo | None,
    ) -> None:
        """Be called last, whatever happened; not after Ignore and Reject."""

    # --- calling and sending -----------------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now, as a plain call."""
        if not self.bind:
            return self.run(*args, **kwargs)
        if self.is_async:
            return cast("R", self._called(args, kwargs))
        push_request(Request.local(self.name, args, kwargs, called_directly=True))
        try:
            return self.run(*args, **kwargs)
        finally:
            pop_request()

    async def _called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        push_request(Request.local(self.name, args, kwargs, called_directly=True))
        try:
            return await cast("Any", self.run)(*args, **kwargs)
        finally:
            pop_request()

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send the task with these arguments and return the handle on its result."""
        envelope = self._direct
        if envelope is None:
            return self.apply_async(args, kwargs)
        parameters = self._parameters
        if kwargs or not parameters.least <= len(args) <= parameters.most:
            parameters.check(args, kwargs)
        return self._sender.send(envelope, new_id(), args, kwargs)

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError when the function cannot be called with these arguments (never with ``typing=False``)."""
        self._parameters.check(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Unpack[SendOptions]
    ) -> AsyncResult[R]:
        """Send the task with options (see ``SendOptions``) and return the handle on its result."""
        positional, named = self._checked(args, kwargs, options, "apply_async()")
        sender = self.sender
        if sender.conf.task_always_eager:  # before the envelope: its reply address opens the result store
            return self._send_eagerly(positional, named, options)
        envelope = self._envelope or self._keep(sender.addressed(self._new_envelope(positional, named, options)))
        return sender.send(*sender.with_options(envelope, options), positional, named)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Do as ``delay`` does without blocking the event loop."""
        envelope = self._direct
        if envelope is None or self._has_own("aapply_async"):
            return await self.aapply_async(args, kwargs)
        parameters = self._parameters
        if kwargs or not parameters.least <= len(args) <= parameters.most:
            parameters.check(args, kwargs)
        return await self.app.loop_sender.send(envelope, new_id(), args, kwargs)

    async def aapply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Unpack[SendOptions]
    ) -> AsyncResult[R]:
        """Do as ``apply_async`` does without blocking the event loop."""
        if self._has_own("apply_async") and not self._has_own("aapply_async"):
            # One of the user's, or of a tool that wraps it, must see every call. It may block, but not in a worker:
            # there it hands the message over, from the call's own thread.
            send = partial(self.apply_async, args, kwargs, **options)
            return send() if is_in_worker() else await in_thread(send)
        positional, named = self._checked(args, kwargs, options, "aapply_async()")
        sender, on_loop = self.sender, self.app.loop_sender
        if sender.conf.task_always_eager:
            return self._send_eagerly(positional, named, options)
        envelope = self._envelope or self._keep(await on_loop.addressed(self._new_envelope(positional, named, options)))
        return await on_loop.send(*sender.with_options(envelope, options), positional, named)

    def apply(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        task_id: str | None = None,
        throw: bool | None = None,
        retries: int = 0,
        headers: Mapping[str, Any] | None = None,
    ) -> EagerResult[R]:
        """Run the task here with handlers and retries, as a worker would, and return its result.

        A retry follows at once. ``throw``: raise the task's exception (default: the setting ``task_eager_propagates``).
        """
        positional, named = _arguments(args, kwargs)
        task_id = task_id or new_id()
        around = self._around
        if around is None:
            around = self._around = Around(self, (*self.app.steps, *BUILT_IN))
        state, value, einfo = run_here(self, around, task_id, positional, named, retries, dict(headers or {}))
        if state == FAILURE and (self.app.conf.task_eager_propagates if throw is None else throw):
            raise value
        return EagerResult(task_id, self.app, self.name, state, value, None if einfo is None else einfo.traceback)

    def retry(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Unpack[RetryOptions],
    ) -> Retry:
        """Send the running call again and raise Retry (``throw=False``: return it).

        ``exc`` is the reason; without it, the exception being handled. After ``max_retries`` (default: the task's) the
        reason ``exc`` is raised, or MaxRetriesExceeded. The next run comes after ``countdown`` seconds (default:
        ``default_retry_delay``) or at ``eta``. Called directly, outside a worker, it raises the reason.
        """
        request = self.request
        handled = sys.exc_info()[1]
        reason = handled if exc is None else exc
        if request.called_directly:
            if reason is not None:
                raise reason
            raise Retry(
                message=f"retry() of task {self.name!r} was called outside of a running task, as in a plain call: "
                "there is no message to send again. Send one: delay(...)"
            )
        limit = self.max_retries if max_retries is None else max_retries
        if limit is not None and request.retries >= limit:
            raise (
                exc
                if exc is not None
                else MaxRetriesExceeded(
                    f"{self.name}[{request.id}] was retried {request.retries} times, its max_retries is {limit}"
                )
            )
        again = self.send_retry(reason, countdown, eta, args, kwargs, options)
        if throw:
            raise again
        return again

    def send_retry(
        self,
        reason: BaseException | None,
        countdown: float | None = None,
        eta: datetime | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: RetryOptions | None = None,
    ) -> Retry:
        """Send the running call again, whatever its number of retries, and return the Retry that says so."""
        request = self.request
        positional, named = request.args if args is None else args, request.kwargs if kwargs is None else kwargs
        if request.is_eager:
            request.next_run = (positional, named)
            return Retry(reason, time.time())
        options = options or {}
        if options:
            check_names(options, RetryOptions.__optional_keys__, "retry()")
        if countdown is None and eta is None:
            countdown = self.default_retry_delay
        when: SendOptions = {"countdown": countdown, "eta": eta}
        envelopes = self.sender.envelopes
        envelope = envelopes.with_options(envelopes.of_request(request), {**options, **when})
        self.sender.publish((envelope.next_run(request, positional, named),))
        return Retry(reason, envelope.eta)

    def update_state(self, *, state: str, meta: Any = None, task_id: str | None = None) -> None:
        """Store a state of the running call (or of another one) with any JSON value; nothing where none is kept."""
        request = self.request
        if task_id is None and (request.id is None or request.is_eager or self.ignore_result):
            return
        task_id = cast("str", request.id) if task_id is None else task_id
        sender = self.sender
        if sender.stores_results and not sender.conf.task_always_eager:
            sender.store.save(task_id, state, encode_meta(task_id, state, meta))

    def AsyncResult(self, task_id: str) -> AsyncResult[R]:  # noqa: N802 - Celery's word
        """Return the handle on a call of this task that was sent before."""
        return AsyncResult(task_id, self.app, self.name)

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def app(self) -> Application:
        """Return the application. Raises SettingsError before the task is registered."""
        if self._app is None:
            raise SettingsError(f"{type(self).__name__} belongs to no application; register it: app.register_task(...)")
        return self._app

    @property
    def sender(self) -> Sender:
        """Return what sends this task's calls. Raises SettingsError before the task is registered."""
        return self.app.sender

    @property
    def request(self) -> Request:
        """Return the running call of this task; outside any, an empty one with ``called_directly`` set."""
        request = running_task(self.name)
        return Request.local(self.name, (), {}, called_directly=True) if request is None else request

    def __reduce__(self) -> Any:
        """A pickle or copy of a registered task is the task itself, found by its name."""
        if self._app is None:
            return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined] # not in typeshed
        return self._app.pickled_task(self)

    def __repr__(self) -> str:
        return f"<Task {self.name or type(self).__name__}>"

    # --- registration, called by the application ---------------------------------------------------------------------

    def declare(
        self, app: Application | None, name: str, function: Callable[..., R] | None, options: TaskOptions, bind: bool
    ) -> None:
        """Make this the task of a function (None: of its own ``run`` method) in an application (None: only check)."""
        check_names(options, _OPTIONS, "task()")
        vars(self).update({option: value for option, value in options.items() if option != "name"})
        self._app = app
        if app is not None:
            self._sender = app.sender
        self.name = text_option("name", name)
        if function is not None:
            self._wrap(function, bind)
        elif not callable(getattr(self, "run", None)):
            raise TypeError(f"{type(self).__name__} has no run() method")
        else:
            self.bind = True
        self._check_run(name)
        self._check_options(options)
        self._parameters = Parameters(self.run) if self.typing else ANY
        cls = type(self)
        self._around = None
        self.handlers = frozenset(name for name in HANDLERS if getattr(cls, name) is not getattr(Task, name))
        self._inherited = tuple(attribute for attribute in SETTINGS_BEHIND if getattr(self, attribute) is None)

    def settle(self, settings: Settings) -> None:
        """Take from the settings what the task does not say itself; what was prepared for sending is prepared anew."""
        for attribute in self._inherited:
            setattr(self, attribute, getattr(settings, SETTINGS_BEHIND[attribute]))
        self.forget_envelope()

    def forget_envelope(self) -> None:
        """Prepare the next message anew: settings or the process have changed."""
        self._envelope = self._direct = None

    def _check_run(self, name: str) -> None:
        self.is_async = inspect.iscoroutinefunction(self.run)
        if inspect.isgeneratorfunction(self.run) or inspect.isasyncgenfunction(self.run):
            raise TypeError(
                f"task {name!r} is a generator function: calling it runs nothing of it. Return a list, or send a call "
                "for each part"
            )

    def _wrap(self, function: Callable[..., R], bind: bool) -> None:
        self.bind = flag("bind", bind)
        if bind and not takes_task(function):
            raise TypeError(
                f"bind=True passes the task itself as the first argument, and {function!r:.80} has no place "
                "for it: write def f(self, ...), or leave bind out"
            )
        # types.MethodType: the task becomes the first argument at no cost per call.
        self.run = types.MethodType(function, self) if bind else function
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            if hasattr(function, attribute):
                setattr(self, attribute, getattr(function, attribute))
        self.__wrapped__ = function

    def _check_options(self, given: TaskOptions) -> None:
        for option, check in {**CHECKS, **TASK_CHECKS}.items():
            value = getattr(self, option, None)
            if value is not None:
                setattr(self, option, check(option, value))
        limit: Any = self.max_retries
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"max_retries is {limit!r}; expected an int >= 0, or None for no limit")
        if not isinstance(self.retry_backoff, bool):
            seconds("retry_backoff", self.retry_backoff)
        self.throws = retries.exception_classes("throws", self.throws)
        self.autoretry = retries.policy(
            self.autoretry_for,
            self.dont_autoretry_for,
            self.retry_backoff,
            self.retry_backoff_max,
            self.retry_jitter,
            self.retry_kwargs,
        )
        idle = next((option for option in given if option in _AUTORETRY_OPTIONS), None)
        if self.autoretry is None and idle is not None:
            raise TypeError(
                f"{idle} says how autoretry_for retries, and this task has no autoretry_for: "
                "@app.task(autoretry_for=(ConnectionError,), ...)"
            )

    def _checked(
        self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, options: SendOptions, where: str
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the arguments of a call; raise TypeError for those, and for names of options, that cannot be."""
        positional, named = _arguments(args, kwargs)
        if options:
            check_names(options, SendOptions.__optional_keys__, where)
        self._parameters.check(positional, named)
        return positional, named

    def _send_eagerly(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions) -> EagerResult[R]:
        self.sender.finalize()
        return self.apply(args, kwargs, task_id=options.get("task_id"), headers=options.get("headers"))

    def _new_envelope(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions) -> Envelope:
        """Return the envelope for one call; where its result goes is not in it yet.

        The options are checked, before a connection is opened for that address.
        """
        envelopes = self._sender.envelopes
        if options:
            envelopes.with_options(envelopes.of_name(self.name), options)
        return envelopes.of_task(self, args, kwargs)

    def _keep(self, envelope: Envelope) -> Envelope:
        """Use an envelope for the next calls too, unless a router looks at every call."""
        if self._sender.envelopes.routes_are_static:
            self._envelope = envelope
            # An apply_async of the user's, or of a tool that wraps it, must see every call.
            self._direct = None if self._has_own("apply_async") else envelope
        return envelope

    def _has_own(self, method: str) -> bool:
        """Return whether a method is not the one that is written here."""
        return getattr(type(self), method) is not _SENDING[method] or method in vars(self)


_SENDING = {"apply_async": Task.apply_async, "aapply_async": Task.aapply_async}


def get_task_logger(name: str) -> logging.Logger:
    """Return a logger for task code: its records carry the name and id of the running task."""
    return logging.getLogger(f"fastq.task.{name}")


def _arguments(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return arguments in the types that go out as they are. Raises TypeError for text and other non-lists."""
    if args is not None and not isinstance(args, (list, tuple)):
        raise TypeError(f"args is {args!r:.80}; expected a list or tuple of positional arguments")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs is {kwargs!r:.80}; expected a dict of keyword arguments")
    return (() if args is None else args), ({} if kwargs is None else dict(kwargs))
