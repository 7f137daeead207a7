"""Celery's remote control messages: bytes to values and back, and who is meant. No sockets, no commands.

Requests are broadcast on a fanout exchange to one queue per worker; replies go to the queue that the request names.
Source: kombu's pidbox as seen on the wire; reference of the names in Celery's ``control_*`` settings.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from fastq.errors import DecodeError, RemoteProtocolError
from fastq.wire.message import Message, decode_properties, encode_properties, new_id

REQUEST_EXCHANGE: Final = "celery.pidbox"
REPLY_EXCHANGE: Final = "reply.celery.pidbox"
_QUEUE_EXPIRES_MS: Final = 10_000  # Celery's control_queue_expires and control_queue_ttl
_MESSAGE_TTL_MS: Final = 300_000

#: A method of a declaration and its fields; ``<method>-ok`` answers each.
Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One command to some or all workers."""

    method: str
    arguments: Mapping[str, Any]
    destination: Sequence[str] = ()
    pattern: str = ""
    matcher: str = ""
    ticket: str = ""
    reply_to: str = ""  # routing key on REPLY_EXCHANGE; empty: nobody waits for a reply
    clock: int = 0

    def is_for(self, hostname: str) -> bool:
        """Return whether the node of that name is meant."""
        if self.destination:
            return hostname in self.destination
        if not self.pattern or not self.matcher:
            return True
        if self.matcher == "glob":
            return fnmatch.fnmatch(hostname, self.pattern)
        return self.matcher == "pcre" and _matches(self.pattern, hostname)


def request_steps() -> Iterator[Step]:
    """Yield what makes the exchanges that requests and replies go through."""
    yield "exchange.declare", {"exchange": REQUEST_EXCHANGE, "type": "fanout"}
    yield "exchange.declare", {"exchange": REPLY_EXCHANGE, "type": "direct"}


def node_steps(hostname: str) -> Iterator[Step]:
    """Yield what makes a worker's queue."""
    yield from request_steps()
    yield "queue.declare", _private_queue(node_queue(hostname))
    yield "queue.bind", {"queue": node_queue(hostname), "exchange": REQUEST_EXCHANGE, "routing_key": ""}


def reply_steps(address: str) -> Iterator[Step]:
    """Yield what makes the queue in which the replies to a client arrive."""
    yield from request_steps()
    yield "queue.declare", _private_queue(reply_queue(address))
    yield "queue.bind", {"queue": reply_queue(address), "exchange": REPLY_EXCHANGE, "routing_key": address}


def node_queue(hostname: str) -> str:
    """Return the name of a worker's queue."""
    return f"{hostname}.{REQUEST_EXCHANGE}"


def reply_queue(address: str) -> str:
    """Return the name of the queue for replies to that address."""
    return f"{address}.{REPLY_EXCHANGE}"


def _private_queue(name: str) -> dict[str, Any]:
    arguments = {"x-expires": _QUEUE_EXPIRES_MS, "x-message-ttl": _MESSAGE_TTL_MS}
    return {"queue": name, "exclusive": True, "auto_delete": True, "arguments": arguments}


def encode_request(request: Request, expires: float) -> Message:
    """Return the request as a message; ``expires`` is the unix time after which no reply is read."""
    body = {
        "method": request.method,
        "arguments": dict(request.arguments),
        "destination": list(request.destination) or None,
        "pattern": request.pattern or None,
        "matcher": request.matcher or None,
        "ticket": request.ticket,
        "reply_to": {"exchange": REPLY_EXCHANGE, "routing_key": request.reply_to},
    }
    return _message(REQUEST_EXCHANGE, "", {"clock": request.clock, "expires": expires}, body)


def encode_reply(request: Request, hostname: str, reply: object, clock: int) -> Message:
    """Return a worker's reply as a message."""
    headers = {"ticket": request.ticket, "clock": clock}
    return _message(REPLY_EXCHANGE, request.reply_to, headers, {hostname: reply})


def _message(exchange: str, routing_key: str, headers: dict[str, Any], body: dict[str, Any]) -> Message:
    properties = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": headers,
        "delivery_mode": 1,
        "priority": 0,
    }
    return Message(exchange, routing_key, encode_properties(properties), orjson.dumps(body), new_id())


def decode_request(props: bytes, body: bytes) -> Request:
    """Return the request in a message. Raises DecodeError when it is none."""
    headers, fields = _decode(props, body)
    method, arguments = fields.get("method"), fields.get("arguments") or {}
    destination, reply_to = fields.get("destination") or (), fields.get("reply_to") or {}
    if not isinstance(method, str) or not isinstance(arguments, dict) or not isinstance(destination, (list, tuple)):
        raise DecodeError("a control message without a method, arguments and destination of the right types")
    has_reply = isinstance(reply_to, dict) and reply_to.get("exchange") == REPLY_EXCHANGE
    clock = headers.get("clock")
    return Request(
        method=method,
        arguments=arguments,
        destination=[name for name in destination if isinstance(name, str)],
        pattern=_text(fields.get("pattern")),
        matcher=_text(fields.get("matcher")),
        ticket=_text(fields.get("ticket")),
        # A routing key is a short string; a longer one cannot be anybody's address.
        reply_to=_text(reply_to.get("routing_key"))[:255] if has_reply else "",
        clock=clock if isinstance(clock, int) and 0 <= clock < 2**62 else 0,
    )


def decode_reply(props: bytes, body: bytes) -> tuple[str, dict[str, Any]]:
    """Return the ticket and the replies by node in a message. Raises DecodeError when it is none."""
    headers, replies = _decode(props, body)
    return _text(headers.get("ticket")), replies


def _decode(props: bytes, body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return headers and body. Raises DecodeError unless the body is a JSON object, and said to be one."""
    try:
        properties = decode_properties(props)
    except RemoteProtocolError as error:
        raise DecodeError(f"a control message with properties that cannot be read: {error}") from error
    content_type = properties.get("content_type")
    if content_type != "application/json":
        raise DecodeError(f"a control message of type {content_type!r}; only application/json is read")
    try:
        fields = orjson.loads(body)
    except ValueError as error:
        raise DecodeError(f"a control message that is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DecodeError("a control message that is not a JSON object")
    return properties.get("headers") or {}, fields


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _matches(pattern: str, hostname: str) -> bool:
    """Return whether the regular expression matches the start of the name; one that could take long matches nothing.

    Nothing can interrupt a match, and a message must not be able to stop the worker: hence no repeated groups, no
    references, and at most three repetitions, which cost at worst the cube of a node name's length.
    """
    repetitions = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > 200 or repetitions > 3 or re.search(r"\)[*+?{]|\(\?|\\\d", pattern):
        return False
    try:
        return re.match(pattern, hostname[:255]) is not None
    except re.error:
        return False
