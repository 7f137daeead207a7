"""From a call to its message: everything that stands before the publisher.

``Envelope`` holds all of a message but its id and arguments; one is kept per task, so that sending with no options
computes nothing anew. Publishes nothing itself.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone, tzinfo
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastq import codecs
from fastq.codecs import compression
from fastq.codecs._walk import short_repr
from fastq.codecs.json import ODD_NUMBER_HINT, place_of_odd_number
from fastq.errors import EncodeError, SettingsError
from fastq.queues import named_options
from fastq.request import BROKER_HEADERS, Request
from fastq.sending.options import (
    CHECKS,
    SECONDS_OR_MOMENT,
    RetryOptions,
    SendOptions,
    custom_headers,
    flag,
    seconds,
    text_option,
)
from fastq.sending.routing import NO_ROUTE, Router
from fastq.wire.dates import iso8601_to_unix
from fastq.wire.message import Message, TaskTemplate

if TYPE_CHECKING:
    from fastq.interfaces import Codec
    from fastq.settings import Settings

#: The third part of a body: what follows a task. Chains and callbacks are not sent by fastq.
EMBED: Mapping[str, None] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@dataclass(frozen=True)
class PublishRetry:
    """How often publishing is tried again when the broker is not there, and how long the pauses are."""

    max_retries: int | None = 3
    interval_start: float = 0.0
    interval_step: float = 0.2
    interval_max: float = 1.0

    def pause_s(self, attempt: int) -> float:
        """Return the seconds to wait before the attempt of this number, counted from 0."""
        return min(self.interval_max, self.interval_start + attempt * self.interval_step)


_MAX_PLACE_DEPTH = 8  # chosen: further down a place is no help, and a value that holds itself has no end

ONE_ATTEMPT = PublishRetry(max_retries=0)


@dataclass(slots=True)
class Envelope:
    """What the messages of a task have in common. ``eta`` and ``expires`` are unix times, ``lifetime_s`` is a span."""

    name: str
    codec: Codec
    routing_key: str
    accept: Sequence[str]  #: names or content types of the serializers that the application's workers read
    exchange: str = ""
    compression: str | None = None
    priority: int | None = None
    delivery_mode: int = 2
    lifetime_s: float | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    ignore_result: bool = False
    reply_to: str | None = None
    origin: str = ""
    publish_retry: PublishRetry | None = None
    eta: float | None = None
    expires: float | None = None
    shadow: str | None = None
    headers: dict[str, Any] | None = None

    #: What follows from the above; None until the first message.
    template: TaskTemplate | None = field(default=None, init=False)

    def message(self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], parent: Request | None) -> Message:
        """Return the message of one call, sent by the running call ``parent``. Raises EncodeError."""
        template = self.template
        if template is None:
            template = self.template = self._template()
        if self.lifetime_s is not None:
            template = self._template(expires=time.time() + self.lifetime_s)
        return template.message(
            task_id,
            self._body((args, kwargs, EMBED)),
            short_repr(args),
            short_repr(kwargs) if kwargs else "{}",
            None if parent is None else parent.root_id or parent.id,
            None if parent is None else parent.id,
        )

    def next_run(self, request: Request, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        """Return the message that runs a call again: the same id and family, one retry more.

        With the same arguments in the same form the body goes out as it came in, callbacks and all.
        """
        call = request.call
        assert call is not None, "only a call that came in a message has a next run"
        same_call = args is request.args and kwargs is request.kwargs
        same_form = self.codec.content_type == request.properties.get("content_type")
        if same_call and same_form and self._compression() == request.compression:
            body = call.body
        else:
            body = self._body((args, kwargs, {name: getattr(request, name) for name in EMBED}))
        template = self._template(retries=request.retries + 1, group=request.group, group_index=request.group_index)
        return template.message(
            call.id,
            body,
            (request.argsrepr if same_call else None) or short_repr(args),
            (request.kwargsrepr if same_call else None) or short_repr(kwargs),
            request.root_id,
            request.parent_id,
        )

    def _body(self, parts: tuple[Any, ...]) -> bytes:
        try:
            body = self.codec.encode(parts)
        except EncodeError as error:
            place = _place_of_fault(self.codec, *parts[:2])
            if place is None:
                raise
            odd = place_of_odd_number(parts[:2]) if self.codec.name == "json" else None
            words = error if odd is None else f"no JSON form: {odd[1]!r}: {ODD_NUMBER_HINT}"
            raise EncodeError(f"{words} ({place} of task {self.name!r})") from error
        return body if self.compression is None else compression.compress(body, self.compression)

    def _compression(self) -> str | None:
        return None if self.compression is None else compression.content_type(self.compression)

    def _template(self, **more: Any) -> TaskTemplate:
        if self.codec.name not in self.accept and self.codec.content_type not in self.accept:
            name, accepted = self.codec.name, ", ".join(map(repr, self.accept))
            raise SettingsError(
                f"serializer {name!r}: the application's own workers would refuse the message, as accept_content is "
                f"[{accepted}]. Add {name!r} to it, or choose another serializer"
            )
        fields = {name: getattr(self, name) for name in _FIXED if getattr(self, name) is not None}
        return TaskTemplate(
            self.name,
            content_type=self.codec.content_type,
            content_encoding=self.codec.content_encoding,
            compression=self._compression(),
            **fields | more,
        )


_FIXED = (
    *("exchange", "routing_key", "eta", "expires", "time_limit", "soft_time_limit", "shadow", "ignore_result"),
    *("reply_to", "priority", "delivery_mode", "origin", "headers"),
)


class Addressed(Protocol):
    """What a task says about its own messages; None where it says nothing."""

    name: str
    queue: str | None
    exchange: str | None
    routing_key: str | None
    priority: int | None
    expires: float | datetime | None
    serializer: str | None
    compression: str | None
    ignore_result: bool | None
    time_limit: float | None
    soft_time_limit: float | None


class Envelopes:
    """Makes envelopes from settings, tasks and options, and checks all three. One per application."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._router = Router(settings.task_routes)
        self._zone = _zone(settings.timezone)
        self._policy = publish_retry(settings.task_publish_retry_policy)
        self.default_retry = self._policy if settings.task_publish_retry else ONE_ATTEMPT
        self.routes_are_static = self._router.is_static

    def of_name(self, name: str) -> Envelope:
        """Return the envelope of a task of which only the name is known."""
        return Envelope(
            name=text_option("name", name),
            codec=codecs.get(self._settings.task_serializer),
            accept=self._settings.accept_content,
            routing_key=self._settings.task_default_queue,
            compression=self._settings.task_compression,
            priority=self._settings.task_default_priority,
            delivery_mode=self._settings.task_default_delivery_mode,
            ignore_result=self._settings.task_ignore_result,
            origin=f"gen{os.getpid()}@{socket.gethostname()}",
        )

    def routed(
        self, envelope: Envelope, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, task: object = None
    ) -> Envelope:
        """Return the envelope with what ``task_routes`` says of it."""
        route = self._router.route(envelope.name, args, kwargs, task)
        if route is NO_ROUTE:
            return envelope
        said = {name: value for name, value in vars(route).items() if value is not None}
        return self.with_options(envelope, cast("SendOptions", said))

    def of_task(self, task: Addressed, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Envelope:
        """Return the envelope of a task: what it says of itself wins over its route, that over the settings."""
        envelope = self.of_name(task.name)
        if task.queue is None and task.routing_key is None and task.exchange is None:
            envelope = self.routed(envelope, args, kwargs, task)
        said = {name: getattr(task, name) for name in _TASK_OPTIONS if getattr(task, name) is not None}
        return self.with_options(envelope, cast("SendOptions", said), lasting=True)

    def with_options(self, envelope: Envelope, options: SendOptions | RetryOptions, lasting: bool = False) -> Envelope:
        """Return a changed copy. Raises TypeError and ValueError naming the option.

        In a ``lasting`` copy ``expires`` counts from each sending, else from now.
        """
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        changes: dict[str, Any] = {}
        for name in given.keys() & CHECKS.keys():
            changes[name] = CHECKS[name](name, given[name])
        if "serializer" in given:
            changes["codec"] = codecs.get(changes.pop("serializer"))
        if "compression" in changes:
            compression.content_type(changes["compression"])
        changes.update(self._address(envelope, changes.pop("queue", None), changes))
        changes.update(self._times(given, lasting))
        if "headers" in given:
            changes["headers"] = {**(envelope.headers or {}), **custom_headers(given["headers"])}
        if "retry" in given or "retry_policy" in given:
            changes["publish_retry"] = self._publish_retry(given.get("retry"), given.get("retry_policy"))
        return dataclasses.replace(envelope, **changes)

    def _address(self, envelope: Envelope, queue: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
        if queue is not None:
            return {"exchange": "", "routing_key": self.known_queue(queue)}
        exchange = changes.get("exchange", envelope.exchange)
        if "routing_key" in changes and not exchange:
            self.known_queue(changes["routing_key"])
        return {}

    def of_request(self, request: Request) -> Envelope:
        """Return the envelope in which a received call goes out again."""
        info, properties = request.delivery_info, request.properties
        hard, soft = request.timelimit
        return Envelope(
            name=request.task or "",
            codec=codecs.get(properties.get("content_type") or self._settings.task_serializer),
            accept=self._settings.accept_content,
            routing_key=info["routing_key"],
            exchange=info["exchange"],
            compression=request.compression,
            priority=info["priority"],
            delivery_mode=properties.get("delivery_mode") or self._settings.task_default_delivery_mode,
            expires=_expiry(request.expires),
            time_limit=hard,
            soft_time_limit=soft,
            ignore_result=request.ignore_result,
            reply_to=request.reply_to,
            origin=request.origin or "",
            shadow=request.shadow,
            headers={name: value for name, value in request.headers.items() if name.lower() not in BROKER_HEADERS}
            or None,
        )

    def known_queue(self, queue: str) -> str:
        """Return the queue's name. Raises SettingsError when ``task_queues`` lists all there are, without it."""
        settings = self._settings
        if not settings.task_create_missing_queues:
            known = {settings.task_default_queue, *(name for name, _ in named_options(settings.task_queues))}
            if queue not in known:
                raise SettingsError(
                    f"unknown queue {queue!r}; declared: {', '.join(sorted(known))}. "
                    "Add it to task_queues, or set task_create_missing_queues"
                )
        return queue

    def _times(self, given: Mapping[str, Any], lasting: bool) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if "countdown" in given and "eta" in given:
            raise ValueError("countdown and eta are two words for one thing: give one of them")
        if "countdown" in given:
            changes["eta"] = time.time() + seconds("countdown", given["countdown"])
        elif "eta" in given:
            changes["eta"] = self._unix("eta", given["eta"])
        expires = given.get("expires")
        if isinstance(expires, datetime):
            changes.update(expires=self._unix("expires", expires), lifetime_s=None)
        elif expires is not None:
            span = seconds("expires", expires, SECONDS_OR_MOMENT)
            changes.update(
                {"expires": None, "lifetime_s": span}
                if lasting
                else {"expires": time.time() + span, "lifetime_s": None}
            )
        return changes

    def _unix(self, option: str, value: Any) -> float:
        if not isinstance(value, datetime):
            raise TypeError(f"{option} is {value!r:.80}; expected a datetime")
        moment: datetime = value
        if moment.tzinfo is None:
            if self._zone is None:
                raise ValueError(
                    f"{option} is {moment.isoformat(' ')}, which could be any zone's time. Say which: "
                    "datetime.now(timezone.utc) + ..., moment.astimezone() for local time, countdown in seconds, "
                    "or the setting timezone for all of them: FastQ(timezone='UTC')"
                )
            moment = moment.replace(tzinfo=self._zone)
        return moment.timestamp()

    def _publish_retry(self, retry: Any, policy: Any) -> PublishRetry:
        if policy is not None and not isinstance(policy, Mapping):
            raise TypeError(f"retry_policy is {policy!r:.80}; expected a dict")
        if retry is not None and not flag("retry", retry):
            return ONE_ATTEMPT
        return self._policy if policy is None else publish_retry(policy, self._policy)


def publish_retry(policy: Mapping[str, Any], base: PublishRetry = ONE_ATTEMPT) -> PublishRetry:
    """Return a retry policy of the settings or of a call; what it leaves out comes from ``base``."""
    known = [field.name for field in dataclasses.fields(PublishRetry)]
    for name, value in policy.items():
        if name not in known:
            raise SettingsError(f"publish retry policy has the unknown key {name!r}; known: {', '.join(known)}")
        if name != "max_retries" or value is not None:
            seconds(name, value)
    return dataclasses.replace(base, **policy)


def _place_of_fault(codec: Codec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return which argument has no form, with the way to it inside: ``argument 2['when']``; None: no single one."""
    named = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    place = None
    while (
        found := next(((where, value) for where, value in named if not _is_writable(codec, value)), None)
    ) is not None:
        place, value = found
        if place.count("[") >= _MAX_PLACE_DEPTH:
            break
        if isinstance(value, Mapping):
            named = [(f"{place}[{key!r:.40}]", each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            named = [(f"{place}[{index}]", each) for index, each in enumerate(value)]
        else:
            break
    return place


def _is_writable(codec: Codec, value: Any) -> bool:
    try:
        codec.encode(value)
    except EncodeError:
        return False
    return True


def _expiry(header: str | float | datetime | None) -> float | None:
    """Return the unix time in an ``expires`` header; other clients also write seconds from now, or AMQP's timestamp."""
    if isinstance(header, datetime):
        return header.timestamp()
    if isinstance(header, str):
        return iso8601_to_unix(header.encode("ascii", "replace"))
    return None if header is None else header if header > 1e9 else time.time() + header


def _zone(name: str | None) -> tzinfo | None:
    if name is None:
        return None
    if name.upper() == "UTC":
        return timezone.utc  # needs no time zone data, which small images lack
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise SettingsError(f"setting 'timezone' is {name!r}, which is no known time zone: {error}") from error


_TASK_OPTIONS = (
    *("queue", "exchange", "routing_key", "priority", "expires", "serializer", "compression", "ignore_result"),
    *("time_limit", "soft_time_limit"),
)
