"""A message as Celery's replies describe it. Bodies are decoded only for this, within bounds, and never unpickled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict

from fastq import codecs
from fastq.codecs.compression import decompress
from fastq.errors import FastqError
from fastq.wire.message import unix_to_iso8601
from fastq.wire.properties import readable_properties

#: Chosen: a larger body is described by what its sender wrote of the arguments.
_MAX_BODY_BYTES: Final = 64 * 1024
#: Chosen: messages described before others get their turn; 100 take about 2 ms.
_AT_A_TIME: Final = 100
#: Decoding these runs no code of the sender's.
_HARMLESS: Final = codecs.accepted(("json", "msgpack", "yaml"))
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


Describe = Callable[[Mapping[str, Any], str], dict[str, Any]]


async def described(rows: Sequence[Mapping[str, Any]], hostname: str, describe: Describe) -> list[dict[str, Any]]:
    """Return the description of each message, letting others have their turn in between."""
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        found.append(describe(row, hostname))
        if number % _AT_A_TIME == 0:
            await asyncio.sleep(0)
    return found


def info(row: Mapping[str, Any], hostname: str) -> dict[str, Any]:
    """Return what ``active`` and ``reserved`` show of a message."""
    properties = readable_properties(row["props"])
    headers = properties.get("headers") or {}
    args, kwargs = _arguments(properties, headers, row["body"])
    return _info(row, hostname, properties, headers, args, kwargs)


def safe_info(row: Mapping[str, Any], hostname: str) -> dict[str, Any]:
    """Return the same with the arguments as text."""
    properties = readable_properties(row["props"])
    headers = properties.get("headers") or {}
    return _info(row, hostname, properties, headers, *_as_text(headers))


def schedule_info(row: Mapping[str, Any], hostname: str) -> dict[str, Any]:
    """Return what ``scheduled`` shows of a message."""
    eta = row["eta"]
    return {
        "eta": None if eta is None else unix_to_iso8601(eta),
        "priority": _ETA_PRIORITY,
        "request": info(row, hostname),
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


def _info(
    row: Mapping[str, Any],
    hostname: str,
    properties: Mapping[str, Any],
    headers: Mapping[str, Any],
    args: Any,
    kwargs: Any,
) -> dict[str, Any]:
    return {
        "id": row["id"],
        "name": headers.get("shadow") or row["name"],
        "args": args,
        "kwargs": kwargs,
        "type": row["name"],
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


def _arguments(properties: Mapping[str, Any], headers: Mapping[str, Any], body: bytes) -> tuple[Any, Any]:
    """Return positional and keyword arguments: the values where they can be had, else their text."""
    if len(body) > _MAX_BODY_BYTES:
        return _as_text(headers)
    try:
        if compression := headers.get("compression"):
            body = decompress(body, compression, _MAX_BODY_BYTES)
        content_type = str(properties.get("content_type") or "")
        value = codecs.decode(body, content_type, properties.get("content_encoding"), _HARMLESS)
    except FastqError:
        return _as_text(headers)
    if isinstance(value, (list, tuple)) and len(value) >= 2:
        return value[0], value[1]
    if isinstance(value, Mapping):  # protocol 1
        return value.get("args") or [], value.get("kwargs") or {}
    return _as_text(headers)


def _as_text(headers: Mapping[str, Any]) -> tuple[str, str]:
    return str(headers.get("argsrepr") or "()"), str(headers.get("kwargsrepr") or "{}")
