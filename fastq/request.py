"""The running call as task code sees it (``task.request``), and which one is running here.

A Request reads its message only when a field is asked for that the worker did not need itself. Sends nothing.
Source of the field names: Celery's ``Task.request``.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastq.wire.call import Call

#: Message headers of the protocol; every other header is the user's.
PROTOCOL_HEADERS = frozenset(
    {
        *("lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"),
        *("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting"),
        *("stamped_headers", "stamps", "compression"),
    }
)

#: Headers that a broker adds on the way; they are not sent on.
BROKER_HEADERS = frozenset(
    {
        *("x-death", "x-delivery-count", "x-acquired-count"),
        *("x-first-death-queue", "x-first-death-reason", "x-first-death-exchange"),
        *("x-last-death-queue", "x-last-death-reason", "x-last-death-exchange"),
    }
)


class Request:
    """One call of a task. Fields that are not attributes yet are read from the message at first use."""

    id: str | None = None
    task: str | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    retries: int = 0
    hostname: str | None = None
    is_eager: bool = False
    called_directly: bool = False
    utc: bool = True
    #: Results of the tasks that this call has sent; None until the first.
    spawned: list[Any] | None = None
    #: An eager call's own headers; a received one has them in its message.
    sent_headers: Mapping[str, Any] = {}
    #: Arguments with which an eager call asked to be run again.
    next_run: tuple[Sequence[Any], Mapping[str, Any]] | None = None

    _call: Call | None = None
    _embed: Mapping[str, Any] | None = None
    _outer: Request | None = None

    if TYPE_CHECKING:
        root_id: str | None
        parent_id: str | None
        group: str | None
        group_index: int | None
        taskset: str | None
        shadow: str | None
        eta: str | None
        expires: str | float | None
        origin: str | None
        compression: str | None
        argsrepr: str | None
        kwargsrepr: str | None
        ignore_result: bool
        timelimit: Sequence[float | None]
        time_limit: float | None
        soft_time_limit: float | None
        reply_to: str | None
        correlation_id: str | None
        delivery_info: dict[str, Any]
        properties: dict[str, Any]
        headers: dict[str, Any]
        callbacks: Any
        errbacks: Any
        chain: Any
        chord: Any
        stamps: dict[str, Any] | None
        stamped_headers: Sequence[str] | None
        replaced_task_nesting: int
        logfile: str | None
        loglevel: int | None

    @classmethod
    def from_call(
        cls,
        call: Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        hostname: str | None = None,
        embed: Mapping[str, Any] | None = None,
    ) -> Request:
        """Return the request of a received call; ``embed`` is the third part of its body."""
        self = cls.__new__(cls)
        self._call = call
        self._embed = embed
        self.id = call.id
        self.task = call.name
        self.retries = call.retries
        self.args = args
        self.kwargs = kwargs
        self.hostname = hostname
        return self

    @classmethod
    def local(cls, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], **fields: Any) -> Request:
        """Return the request of a call that came in no message: direct or eager."""
        self = cls.__new__(cls)
        self.task = task
        self.args = args
        self.kwargs = kwargs
        vars(self).update(fields)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "headers" in self.__dict__:
            raise AttributeError(f"the request has no field and its message no header {name!r}")
        self._read_message()
        return getattr(self, name)

    def __repr__(self) -> str:
        return f"<Request {self.task}[{self.id}] retries={self.retries}>"

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field or a custom header of the message."""
        return getattr(self, name, default)

    @property
    def children(self) -> list[Any]:
        """Return the results of the tasks that this call has sent."""
        if self.spawned is None:
            self.spawned = []
        return self.spawned

    @property
    def call(self) -> Call | None:
        """Return the message that this is the request of."""
        return self._call

    def _read_message(self) -> None:
        """Set all remaining fields: those of the protocol, then custom headers under names that are still free."""
        call = self._call
        headers = call.headers() if call is not None else self.sent_headers
        properties = call.properties() if call is not None else {}
        embed = self._embed or {}
        limits = headers.get("timelimit")
        hard, soft = limits if isinstance(limits, (list, tuple)) and len(limits) == 2 else (None, None)
        # Other clients write numbers as text; what is no number was refused.
        hard, soft = (float(limit) if isinstance(limit, str) else limit for limit in (hard, soft))
        custom = {name: value for name, value in headers.items() if name not in PROTOCOL_HEADERS}
        fields = {
            **{name: headers.get(name) for name in PROTOCOL_HEADERS if name not in {"lang", "id", "task", "retries"}},
            "ignore_result": bool(headers.get("ignore_result")),
            "replaced_task_nesting": headers.get("replaced_task_nesting") or 0,
            "taskset": headers.get("group"),
            "timelimit": (hard, soft),
            "time_limit": hard,
            "soft_time_limit": soft,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id"),
            "delivery_info": self._delivery_info(properties),
            "properties": {name: value for name, value in properties.items() if name != "headers"},
            "headers": custom,
            **{name: embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord")},
            "logfile": None,
            "loglevel": None,
        }
        taken = self.__dict__
        for name, value in {**custom, **fields}.items():
            if name not in taken and (name in fields or not hasattr(type(self), name)):
                taken[name] = value

    def _delivery_info(self, properties: Mapping[str, Any]) -> dict[str, Any]:
        call = self._call
        return {
            "exchange": call.exchange if call is not None else "",
            "routing_key": call.routing_key if call is not None else "",
            "priority": properties.get("priority"),
            "redelivered": call.redelivered if call is not None else False,
        }


class ExceptionInfo:
    """An exception with its traceback, as handlers receive it (``einfo``); its text is the traceback."""

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception
        self.type = type(exception)
        self._text: str | None = None

    @property
    def traceback(self) -> str:
        """Return the formatted traceback; it is formatted when it is first asked for."""
        if self._text is None:
            self._text = "".join(traceback.format_exception(self.type, self.exception, self.exception.__traceback__))
        return self._text

    def __str__(self) -> str:
        return self.traceback


_running: ContextVar[Request | None] = ContextVar("fastq_running", default=None)

#: Return the innermost running request of this thread or coroutine, None outside any call.
current = _running.get


def push_request(request: Request) -> None:
    """Make a request the running one; ``pop_request`` brings back the one before."""
    request._outer = _running.get()
    _running.set(request)


def pop_request() -> None:
    """End the running request."""
    request = _running.get()
    if request is not None:
        _running.set(request._outer)


def running_message() -> Request | None:
    """Return the innermost request that a worker runs, looking past direct calls; None when there is none."""
    request = _running.get()
    while request is not None and request.called_directly:
        request = request._outer
    return request


def is_in_worker() -> bool:
    """Return whether this runs in a call that a worker has received: its process has no connections."""
    request = running_message()
    return request is not None and request.call is not None


def running_task(name: str) -> Request | None:
    """Return the innermost running request of this task."""
    request = _running.get()
    while request is not None and request.task != name:
        request = request._outer
    return request
