"""Messages as Celery's replies describe them, within a bound for each and one for the reply, which says if it was cut.

Bodies are read only for this, and only what is JSON; of the others, of large and of deep ones the text is shown that
their sender wrote of the arguments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict

from fastq.codecs import json
from fastq.codecs._walk import short_repr
from fastq.codecs.compression import decompress
from fastq.errors import DecodeError
from fastq.wire.dates import unix_to_iso8601
from fastq.wire.properties import readable_properties

#: Chosen: a larger or deeper body is described by what its sender wrote of the arguments.
_MAX_BODY_BYTES: Final = 64 * 1024
_MAX_DEPTH: Final = 32
#: Chosen: bodies that are read for one reply. Values take up to 25 times as much memory as their JSON.
_MAX_READ_BYTES: Final = 1024 * 1024
#: Chosen: about as much JSON is in a reply; 4,096 messages with short arguments.
_MAX_REPLY_BYTES: Final = 2 * 1024 * 1024
_MIN_ROW_BYTES: Final = 512
_MAX_TEXT: Final = 1024  # as senders bound it
#: Headers of more than RabbitMQ takes are not read.
_MAX_PROPERTIES_BYTES: Final = 128 * 1024
#: Chosen: messages described before others get their turn; 100 take about 2 ms.
_AT_A_TIME: Final = 100
#: These are decompressed for a look: more than the bound takes no memory. Others want tens of MiB to begin with.
_COMPRESSIONS: Final = ("application/x-gzip", "gzip", "zlib")
_CHARSETS: Final = (None, "", "utf-8", "utf8", "us-ascii", "ascii", "binary")
#: The end of the year 9999, in UTC: a zone, or rounding, puts a moment beyond it.
_LAST_MOMENT: Final = 253402300799.0
#: What Celery's timer gives every ETA task.
_ETA_PRIORITY: Final = 6


class Row(TypedDict):
    """A message as the core lists it."""

    id: str
    name: str
    props: bytes
    body: bytes
    exchange: str
    routing_key: str
    redelivered: bool
    deliveries: int
    eta: float | None  # unix time
    pid: int | None
    started: float | None  # unix time
    acknowledged: bool


class Room:
    """How much more goes into a reply: of everything, and of bodies that are read for it."""

    __slots__ = ("bytes", "read_bytes")

    def __init__(self) -> None:
        self.bytes = _MAX_REPLY_BYTES
        self.read_bytes = _MAX_READ_BYTES


Describe = Callable[[Mapping[str, Any], str, Room], dict[str, Any]]


async def described(
    rows: Sequence[Mapping[str, Any]], hostname: str, describe: Describe, room: Room | None = None
) -> list[dict[str, Any]]:
    """Return the description of each message, letting others have their turn in between.

    When there is no more room, a last one has no id, and as its name says how many there are beyond.
    """
    room = room or Room()
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if room.bytes <= 0:
            found.append(describe(_rest(len(rows) - number), hostname, room))
            break
        found.append(describe(row, hostname, room))
        if number % _AT_A_TIME == _AT_A_TIME - 1:
            await asyncio.sleep(0)
    return found


def _rest(count: int) -> Row:
    return Row(
        id="",
        name=f"{count} more messages, not shown: the reply has reached its bound",
        props=b"",
        body=b"",
        exchange="",
        routing_key="",
        redelivered=False,
        deliveries=0,
        eta=None,
        pid=None,
        started=None,
        acknowledged=False,
    )


def info(row: Mapping[str, Any], hostname: str, room: Room) -> dict[str, Any]:
    """Return what ``active`` and ``reserved`` show of a message."""
    properties, headers = _properties(row)
    return _info(row, hostname, room, properties, headers, _arguments(properties, headers, row["body"], room))


def safe_info(row: Mapping[str, Any], hostname: str, room: Room) -> dict[str, Any]:
    """Return the same with the arguments as text."""
    properties, headers = _properties(row)
    return _info(row, hostname, room, properties, headers, None)


def schedule_info(row: Mapping[str, Any], hostname: str, room: Room) -> dict[str, Any]:
    """Return what ``scheduled`` shows of a message."""
    eta = row["eta"]
    return {
        "eta": None if eta is None else unix_to_iso8601(min(eta, _LAST_MOMENT)),
        "priority": _ETA_PRIORITY,
        "request": info(row, hostname, room),
    }


def stamps_of(props: bytes) -> dict[str, set[str]]:
    """Return the stamps that a message carries, by header."""
    headers = readable_properties(props).get("headers") or {}
    names, stamps = headers.get("stamped_headers") or (), headers.get("stamps") or {}
    if not isinstance(names, (list, tuple)) or not isinstance(stamps, Mapping):
        return {}
    return {name: texts(stamps.get(name)) for name in names if isinstance(name, str)}


def texts(value: object) -> set[str]:
    """Return one or several values as text."""
    several = value if isinstance(value, (list, tuple, set, frozenset)) else () if value is None else (value,)
    return {str(each) for each in several}


def _properties(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a message's properties and its headers."""
    properties = readable_properties(row["props"]) if len(row["props"]) <= _MAX_PROPERTIES_BYTES else {}
    return properties, properties.get("headers") or {}


def _info(
    row: Mapping[str, Any],
    hostname: str,
    room: Room,
    properties: Mapping[str, Any],
    headers: Mapping[str, Any],
    arguments: tuple[Any, Any] | None,
) -> dict[str, Any]:
    name, type_ = _text(headers.get("shadow") or row["name"]), _text(row["name"])
    args, kwargs = arguments or (_text(headers.get("argsrepr") or "()"), _text(headers.get("kwargsrepr") or "{}"))
    room.bytes -= _MIN_ROW_BYTES + len(name) + len(type_) + (0 if arguments else len(args) + len(kwargs))
    return {
        "id": row["id"],
        "name": name,
        "args": args,
        "kwargs": kwargs,
        "type": type_,
        "hostname": hostname,
        "time_start": row["started"],
        "acknowledged": bool(row["acknowledged"]),
        "delivery_info": {
            "exchange": row["exchange"],
            "routing_key": row["routing_key"],
            "priority": properties.get("priority") or 0,
            "redelivered": bool(row["redelivered"]),
        },
        "worker_pid": row["pid"],
    }


def _arguments(
    properties: Mapping[str, Any], headers: Mapping[str, Any], body: bytes, room: Room
) -> tuple[Any, Any] | None:
    """Return positional and keyword arguments; None when they are not read."""
    most = min(_MAX_BODY_BYTES, room.read_bytes)
    charset = properties.get("content_encoding")
    if properties.get("content_type") != json.content_type or len(body) > most:
        return None
    if charset is not None and charset.lower() not in _CHARSETS:
        return None
    try:
        if compression := headers.get("compression"):
            if compression not in _COMPRESSIONS:
                return None
            body = decompress(body, compression, most)
        value = json.decode_plain(body, _MAX_DEPTH)
    except DecodeError:
        return None
    room.read_bytes -= len(body)
    room.bytes -= len(body)
    if isinstance(value, list) and len(value) >= 2:
        return value[0], value[1]
    if isinstance(value, dict):  # protocol 1
        return value.get("args") or [], value.get("kwargs") or {}
    return None


def _text(value: object) -> str:
    return value[:_MAX_TEXT] if isinstance(value, str) else short_repr(value, _MAX_TEXT)
