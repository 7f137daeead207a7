"""The options of declaring, sending and retrying a task: names, types and checks. Does nothing with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict, cast

from fastq import codecs
from fastq.codecs import compression
from fastq.request import PROTOCOL_HEADERS

if TYPE_CHECKING:
    from fastq.steps.retry import ExceptionClasses

MAX_SHORT_BYTES = 255  # AMQP 0-9-1, 4.2.5.3: short strings

SECONDS_OR_MOMENT = "a number of seconds or a datetime"


class TaskOptions(TypedDict, total=False):
    """The options of ``@app.task`` and ``@shared_task`` besides ``bind`` and ``base``."""

    name: str | None
    ignore_result: bool | None
    acks_late: bool | None
    track_started: bool | None
    throws: ExceptionClasses
    typing: bool  # False: arguments are not checked against the function when a task is sent
    max_retries: int | None
    default_retry_delay: float
    autoretry_for: ExceptionClasses
    dont_autoretry_for: ExceptionClasses
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    retry_kwargs: Mapping[str, Any]
    time_limit: float | None
    soft_time_limit: float | None
    serializer: str | None
    compression: str | None
    queue: str | None
    exchange: str | None
    routing_key: str | None
    priority: int | None
    expires: float | datetime | None


class SendOptions(TypedDict, total=False):
    """The options of ``apply_async`` and ``send_task``; None: as the task, its route or the settings say."""

    task_id: str | None
    countdown: float | None  # seconds from now
    eta: datetime | None  # with its zone, or with the setting ``timezone``
    expires: float | datetime | None  # seconds from now, or when
    queue: str | None  # wins over exchange and routing_key
    exchange: str | None
    routing_key: str | None
    priority: int | None
    serializer: str | None
    compression: str | None
    headers: Mapping[str, Any] | None
    ignore_result: bool | None
    retry: bool | None  # False: one attempt to publish
    retry_policy: Mapping[str, Any] | None
    time_limit: float | None
    soft_time_limit: float | None
    shadow: str | None
    reply_to: str | None


class RetryOptions(TypedDict, total=False):
    """The options of ``Task.retry`` that change the next run's message; what is left out stays as it was."""

    expires: float | datetime | None
    queue: str | None
    exchange: str | None
    routing_key: str | None
    priority: int | None
    serializer: str | None
    compression: str | None
    headers: Mapping[str, Any] | None
    ignore_result: bool | None
    time_limit: float | None
    soft_time_limit: float | None
    shadow: str | None


def text_option(option: str, value: Any) -> str:
    """Return a text that fits an AMQP short string. Raises TypeError or ValueError naming the option."""
    if not isinstance(value, str):
        raise TypeError(f"{option} is {value!r:.80}; expected text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{option} is no text in UTF-8 ({error.reason}): {value!r:.80}") from None
    if not 0 < size <= MAX_SHORT_BYTES:
        raise ValueError(f"{option} must have 1 to {MAX_SHORT_BYTES} bytes: {value!r:.80}")
    return value


def check_names(options: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise TypeError for the first option that is not known, naming the nearest one."""
    for name in options:
        if name not in known:
            from fastq.sending import absent  # only needed on the way to an error

            table = {"task()": absent.TASK_OPTIONS, "worker()": {}}.get(where, absent.SEND_OPTIONS)
            if (words := absent.absent(f"{where} got the option", name, table)) is not None:
                raise TypeError(words)
            import difflib  # only needed on the way to an error

            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(sorted(known))}"
            raise TypeError(f"{where} got an unknown option {name!r}{hint}")


def seconds(option: str, value: Any, expected: str = "a number of seconds") -> float:
    """Return a finite number of seconds. Raises TypeError, saying what is ``expected``, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, timedelta):
            expected = "a number of seconds: the total_seconds() of this"
        raise TypeError(f"{option} is {shown(value)}; expected {expected}")
    if not math.isfinite(value):
        raise ValueError(f"{option} is {value!r}; expected a finite number")
    return float(value)


def shown(value: object) -> str:
    """Return a wrong value as an error names it."""
    return f"{value!r:.80}"


def _expires(option: str, value: Any) -> float | datetime:
    return value if isinstance(value, datetime) else seconds(option, value, SECONDS_OR_MOMENT)


def _serializer(option: str, value: Any) -> str:
    name = text_option(option, value)
    if not codecs.is_known(name):
        codecs.get(name)  # raises, with the names of those there are
    return name


def _compression(option: str, value: Any) -> str:
    compression.content_type(text_option(option, value))
    return cast("str", value)


def _limit(option: str, value: Any) -> float | None:
    limit_s = seconds(option, value)
    if limit_s < 0:
        raise ValueError(f"{option} is {value!r}; expected seconds, or 0 for no limit")
    # Whole seconds stay integers on the wire, as Celery writes them.
    return int(limit_s) if limit_s == int(limit_s) else limit_s


def _priority(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} is {value!r:.80}; expected an int from 0 to 255")
    if not 0 <= value <= 255:
        raise ValueError(f"{option} is {value}; expected 0 to 255")
    return value


def flag(option: str, value: Any) -> bool:
    """Return a flag. Raises TypeError, naming the option, for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{option} is {value!r:.80}; expected True or False")
    return value


def _exchange(option: str, value: Any) -> str:
    return value if value == "" else text_option(option, value)


def custom_headers(headers: Any) -> dict[str, Any]:
    """Return the user's message headers. Raises TypeError or ValueError for names that the protocol uses itself."""
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers is {headers!r:.80}; expected a dict")
    for name in headers:
        text_option("a header's name", name)
        if name in PROTOCOL_HEADERS:
            raise ValueError(f"header {name!r} belongs to the task protocol; choose another name")
    return dict(headers)


#: The options that are checked by their value alone.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "queue": text_option,
    "exchange": _exchange,
    "routing_key": text_option,
    "priority": _priority,
    "serializer": text_option,
    "compression": text_option,
    "ignore_result": flag,
    "time_limit": _limit,
    "soft_time_limit": _limit,
    "shadow": text_option,
    "reply_to": text_option,
}

#: The further options of a task that are checked so, where it is declared.
TASK_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "expires": _expires,
    "serializer": _serializer,
    "compression": _compression,
    "default_retry_delay": seconds,
    "retry_backoff_max": seconds,
    **dict.fromkeys(("acks_late", "track_started", "typing", "retry_jitter"), flag),
}
