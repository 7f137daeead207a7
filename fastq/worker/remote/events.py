"""What a worker tells monitors: its own life every two seconds, and, when switched on, each step of every task.

Types, fields and routing keys are Celery's, so that Flower, exporters and ``celery events`` understand them; only
``sw_ident`` says ``fastq``. Events are best effort: while the broker is away a bounded number is kept, the oldest go
first. Runs on the event loop's thread; how a message reaches the broker is the bus's business.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, overload

import orjson

from fastq.codecs._walk import short_repr
from fastq.codecs.json import decode_event, encode_event, encode_loosely, place_of_odd_number
from fastq.errors import ConnectionLost, EncodeError
from fastq.sending.sent import utc_offset_h
from fastq.states import FAILURE, REJECTED, RETRY, SUCCESS
from fastq.version import __version__
from fastq.wire.dates import iso8601_to_unix, unix_to_iso8601
from fastq.wire.properties import readable_properties

if TYPE_CHECKING:
    import asyncio

    from fastq.settings import Settings
    from fastq.worker.remote.clock import LamportClock

HEARTBEAT_S: Final = 2.0  # Celery's; a monitor takes a worker for dead after twice that
FLUSH_S: Final = 0.1  # chosen: ten messages a second at most while little happens, and nobody sees the delay
FLUSH_EVENTS: Final = 100  # chosen: a list of 100 plain events has 30 kB, one AMQP frame
HELD_EVENTS: Final = 10_000  # reliability rules, section 6.2
HELD_BYTES: Final = 16 * 1024 * 1024
MAX_TEXT: Final = 16 * 1024  # of a result, exception or traceback
#: A retry can come in, run and end before the child that asked for it has reported so. A monitor goes by what it hears
#: last, so the new run's events wait for that report; so long and so many at most.
RETRY_WAIT_S: Final = 5.0
_MAX_RETRIES_WAITING: Final = 1000
_MAX_RUNNING: Final = 10_000  # far above any number of children: calls whose end nobody has reported
_MAX_BODY: Final = 64 * 1024  # of a message whose sender has not written its arguments as text

SOFTWARE: Final[Mapping[str, str]] = {"sw_ident": "fastq", "sw_ver": __version__, "sw_sys": platform.system()}

#: What a run of a task can end with.
_ENDS: Final = frozenset(
    f"task-{end}" for end in ("succeeded", "failed", "retried", "rejected", "revoked", "cancelled")
)

Event = dict[str, Any]


class EventBus(Protocol):
    """The part of ``interfaces.Bus`` that is needed here."""

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send an event, or a list of them, to whoever listens. Raises ConnectionLost."""


class Events:
    """Sends one worker's events.

    ``get_bus`` returns the bus while it is connected, else None. ``counts`` returns how many tasks run now and how many
    were received since the start. ``on_switch`` is called with True or False when task events are switched.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        get_bus: Callable[[], EventBus | None],
        hostname: str,
        settings: Settings,
        clock: LamportClock,
        *,
        heartbeat_s: float | None = HEARTBEAT_S,
        counts: Callable[[], tuple[int, int]] = lambda: (0, 0),
        on_switch: Callable[[bool], None] = lambda enabled: None,
    ) -> None:
        """``heartbeat_s`` None: nothing is told of the worker itself (``--without-heartbeat``)."""
        self.enabled: bool = settings.worker_send_task_events
        self.dropped = 0
        self.counts = counts
        self.on_switch = on_switch
        self.on_beat: Callable[[], object] = _nothing  # called before the worker says how it is
        self.heartbeat_s = heartbeat_s or HEARTBEAT_S
        self._loop = loop
        self._get_bus = get_bus
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._headers = {"hostname": hostname}
        self._common: Event = {"hostname": hostname, "utcoffset": utc_offset_h(), "pid": os.getpid()}
        self._buffer: list[Event] = []
        self._running: set[str] = set()
        self._next_runs: dict[str, list[Event]] = {}  # events that wait for the end of the same task's earlier run
        self._held: deque[tuple[str, bytes, int]] = deque()  # routing key, body, how many events
        self._held_events = self._held_bytes = 0
        self._has_odd = False  # a number that orjson would write as null is in the buffer
        self._flushing: asyncio.TimerHandle | None = None
        self._beating: asyncio.TimerHandle | None = None

    # --- life

    def connected(self) -> None:
        """The bus is there, for the first time or again: announce the worker, send what was kept, beat from now on."""
        self._tell("worker-online")
        self.flush()
        if self._heartbeat_s is not None and self._beating is None:
            self._beating = self._loop.call_later(self._heartbeat_s, self._beat)

    def heartbeat(self) -> None:
        """Send a heartbeat now."""
        self._tell("worker-heartbeat")

    def stop(self) -> None:
        """Send what is left and say goodbye; nothing is sent by itself any more."""
        for timer in (self._flushing, self._beating):
            if timer is not None:
                timer.cancel()
        self._flushing = self._beating = None
        self._end_all()
        self.flush()
        self._tell("worker-offline")

    def enable(self) -> bool:
        """Switch task events on; False when they were on already."""
        return self._switch(True)

    def disable(self) -> bool:
        """Switch task events off; False when they were off already."""
        return self._switch(False)

    def _switch(self, enabled: bool) -> bool:
        if self.enabled == enabled:
            return False
        self._end_all()
        self.flush()
        self.enabled = enabled
        self.on_switch(enabled)
        return True

    # --- tasks

    def received(self, props: bytes, body: bytes, name: str, task_id: str) -> None:
        """A task message was admitted. As with Celery, of one that has expired only its end is told."""
        if not self.enabled:
            return
        properties = readable_properties(props)
        headers = properties.get("headers") or {}
        expires = _moment(headers.get("expires"))
        if expires is not None and _is_past(expires):
            return
        args, kwargs = _arguments(properties, headers, body)
        if task_id in self._running and len(self._next_runs) < _MAX_RETRIES_WAITING:
            self._next_runs.setdefault(task_id, [])
            self._loop.call_later(RETRY_WAIT_S, self._ended, task_id)
        self._put(
            {
                "type": "task-received",
                "uuid": task_id,
                "name": name,
                "args": args,
                "kwargs": kwargs,
                "root_id": _text(headers.get("root_id")),
                "parent_id": _text(headers.get("parent_id")),
                "retries": _count(headers.get("retries")),
                "eta": _moment(headers.get("eta")),
                "expires": expires,
            }
        )

    def started(self, task_id: str, pid: int) -> None:
        """A child has begun a call. Which one has no field in the event: its ``pid`` is the worker's."""
        if self.enabled:
            self._put({"type": "task-started", "uuid": task_id})

    def finished(self, task_id: str, name: str, state: str, reason: str | None, runtime_s: float) -> None:
        """A call has ended; ``reason`` is the child's report as JSON.

        ``{"result"}``, ``{"exception", "traceback"}``, or ``{"requeue"}`` of a message given back. One that is not put
        back into its queue has failed as well, when the report has the exception.
        """
        if not self.enabled:
            return
        report = _report(reason)
        if state == SUCCESS:
            result = _shorten(_text(report.get("result")))
            self._put({"type": "task-succeeded", "uuid": task_id, "result": result, "runtime": runtime_s})
        elif state == FAILURE:
            self._raised("task-failed", task_id, report)
        elif state == RETRY:
            self._raised("task-retried", task_id, report)
        elif state == REJECTED:
            requeue = bool(report.get("requeue"))
            if not requeue and "exception" in report:
                self._raised("task-failed", task_id, report)
            self._put({"type": "task-rejected", "uuid": task_id, "requeue": requeue})
        else:
            self._ended(task_id)

    def failed(self, task_id: str, exception: str, traceback: str | None = None) -> None:
        """The main process records a failure: a time limit, a lost child; ``exception`` is its repr."""
        if self.enabled:
            self._raised("task-failed", task_id, {"exception": exception, "traceback": traceback})

    def revoked(self, task_id: str, terminated: bool, signum: int | None, expired: bool) -> None:
        """A task was revoked or had expired; ``signum`` ended it when it ran already."""
        if self.enabled:
            self._put(
                {
                    "type": "task-revoked",
                    "uuid": task_id,
                    "terminated": terminated,
                    "signum": signum,
                    "expired": expired,
                }
            )

    def cancelled(self, task_id: str) -> None:
        """A running call was stopped with the worker; its message runs again."""
        if self.enabled:
            self._put({"type": "task-cancelled", "uuid": task_id})

    def send(self, type: str, /, **fields: Any) -> None:
        """Send an event of the application's own. Raises EncodeError for a field that JSON has no form for.

        ``task-…`` types go along with the task events, and only when these are on.
        """
        try:
            is_odd = place_of_odd_number(fields) is not None
            plain = json.loads(encode_loosely(fields) if is_odd else encode_event(fields))
        except (TypeError, ValueError, RecursionError, EncodeError) as error:
            raise EncodeError(f"event {type!r} cannot be written as JSON: {error}") from error
        if not type.startswith("task-"):
            self._publish(type.replace("-", "."), encode_loosely(self._stamped({**plain, "type": type})), 1)
        elif self.enabled:
            self._has_odd |= is_odd
            self._put({**plain, "type": type})

    def _raised(self, type: str, task_id: str, report: Mapping[str, Any]) -> None:
        exception, traceback = (_shorten(_text(report.get(name))) for name in ("exception", "traceback"))
        self._put({"type": type, "uuid": task_id, "exception": exception, "traceback": traceback})

    # --- sending

    def _put(self, event: Event) -> None:
        """Take the event of a task."""
        self._order(self._stamped(event))

    def _order(self, event: Event) -> None:
        """Collect a stamped event, behind those of the run before it."""
        kind, task_id = event["type"], str(event.get("uuid"))
        if self._next_runs and task_id in self._next_runs and kind != "task-retried":
            self._next_runs[task_id].append(event)
            return
        self._collect(event)
        if kind == "task-started":
            if len(self._running) >= _MAX_RUNNING:
                self._running.clear()
            self._running.add(task_id)
        elif kind in _ENDS:
            self._ended(task_id)

    def _ended(self, task_id: str) -> None:
        """A run is over: collect what the next one of the same task has had to say meanwhile."""
        self._running.discard(task_id)
        for event in self._next_runs.pop(task_id, ()):
            event["clock"] = self._clock.forward()
            self._order(event)

    def _end_all(self) -> None:
        for task_id in [*self._next_runs]:
            self._ended(task_id)
        self._running.clear()

    def _collect(self, event: Event) -> None:
        self._buffer.append(event)
        if len(self._buffer) >= FLUSH_EVENTS:
            self.flush()
        elif self._flushing is None:
            self._flushing = self._loop.call_later(FLUSH_S, self._flush_in_time)

    def _stamped(self, event: Event) -> Event:
        """Return the event with the fields that all have."""
        event.update(self._common)
        event["timestamp"] = time.time()
        event["clock"] = self._clock.forward()
        return event

    def _flush_in_time(self) -> None:
        self._flushing = None
        self.flush()

    def flush(self) -> None:
        """Send what is collected, as one message."""
        events, self._buffer = self._buffer, []
        # Not once per event: it changes twice a year.
        self._common["utcoffset"] = utc_offset_h()
        if events:
            encode = encode_loosely if self._has_odd else encode_event
            self._has_odd = False
            self._publish("task.multi", encode(events), len(events))
        elif self._held:
            self._release(self._get_bus())

    def _publish(self, routing_key: str, body: bytes, count: int) -> None:
        """Send a message behind those that were kept, or keep it."""
        bus = self._get_bus()
        if self._held:
            self._release(bus)
        if not self._held and bus is not None:
            try:
                return bus.publish_event(routing_key, self._headers, body)
            except ConnectionLost:
                pass
        return self._hold(routing_key, body, count)

    def _hold(self, routing_key: str, body: bytes, count: int) -> None:
        self._held.append((routing_key, body, count))
        self._held_events += count
        self._held_bytes += len(body)
        while self._held_events > HELD_EVENTS or self._held_bytes > HELD_BYTES:
            self.dropped += self._unhold()

    def _unhold(self) -> int:
        """Forget the oldest message that is kept and return how many events it had."""
        _, body, count = self._held.popleft()
        self._held_events -= count
        self._held_bytes -= len(body)
        return count

    def _release(self, bus: EventBus | None) -> None:
        """Send what was kept."""
        if bus is None:
            return
        try:
            while self._held:
                routing_key, body, _ = self._held[0]
                bus.publish_event(routing_key, self._headers, body)
                self._unhold()
        except ConnectionLost:
            return

    # --- the worker itself

    def _beat(self) -> None:
        assert self._heartbeat_s is not None
        self._beating = self._loop.call_later(self._heartbeat_s, self._beat)
        self._tell("worker-heartbeat")

    def _tell(self, type: str) -> None:
        """Send how the worker is. While the bus is away nothing is kept: a heartbeat is news or nothing."""
        bus = self._get_bus()
        if self._heartbeat_s is None or bus is None:
            return
        self.on_beat()
        active, processed = self.counts()
        event = {"type": type, "freq": self._heartbeat_s, "active": active, "processed": processed, **SOFTWARE}
        event["loadavg"] = [math.ceil(load * 100) / 100 for load in os.getloadavg()]
        try:
            bus.publish_event(type.replace("-", "."), self._headers, orjson.dumps(self._stamped(event)))
        except ConnectionLost:
            return


def _nothing() -> None:
    pass


def _arguments(properties: Mapping[str, Any], headers: Mapping[str, Any], body: bytes) -> tuple[str, str]:
    """Return the arguments as text: as the sender wrote them, else from the body; "" when that cannot be read."""
    args, kwargs = headers.get("argsrepr"), headers.get("kwargsrepr")
    if isinstance(args, str) and isinstance(kwargs, str):
        return _shorten(args), _shorten(kwargs)
    readable = properties.get("content_type") == "application/json" and not headers.get("compression")
    if not readable or len(body) > _MAX_BODY:
        return "", ""
    try:
        decoded = decode_event(body)
    except ValueError:
        return "", ""
    if isinstance(decoded, dict):  # the first version of the protocol
        values = decoded.get("args"), decoded.get("kwargs")
    elif isinstance(decoded, list) and len(decoded) >= 2:
        values = decoded[0], decoded[1]
    else:
        return "", ""
    return short_repr(tuple(values[0]) if isinstance(values[0], list) else ()), short_repr(values[1] or {})


def _report(reason: str | None) -> dict[str, Any]:
    """Return a child's report; {} for one that makes no sense, as events must not stop a worker."""
    try:
        report = decode_event(reason) if reason else {}
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _moment(value: object) -> str | None:
    """Return a header's moment as ISO 8601; clients in other languages also write seconds, from now or from 1970."""
    if isinstance(value, str) and value:
        return value[:64]
    if isinstance(value, datetime):  # AMQP's own timestamp
        return value.isoformat()
    if isinstance(value, (int, float)) and 0 < value < 1e11:
        return unix_to_iso8601(value if value > 1e9 else time.time() + value)
    return None


def _is_past(moment: str) -> bool:
    unix = iso8601_to_unix(moment.encode("ascii", "replace"))
    return unix is not None and unix <= time.time()


@overload
def _shorten(text: str) -> str: ...


@overload
def _shorten(text: str | None) -> str | None: ...


def _shorten(text: str | None) -> str | None:
    """Return a text within bounds: of a long one its beginning and its end, where a traceback says why."""
    if text is None or len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 4]}\n...\n{text[-MAX_TEXT * 3 // 4 :]}"
