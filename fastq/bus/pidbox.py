"""Celery's remote control messages: values to bytes and back, their names, and who is meant. No I/O, no commands.

A request is broadcast to every worker's own queue; a reply goes to the queue that the request names. Source: kombu's
pidbox as seen on the wire; the settings ``control_*``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastq import codecs
from fastq.bus.patterns import matches
from fastq.codecs import json
from fastq.errors import DecodeError, EncodeError, FastqError, RemoteProtocolError
from fastq.wire.message import encode_properties
from fastq.wire.properties import decode_properties

if TYPE_CHECKING:
    from fastq.settings import Settings

#: Chosen: a revoke of ten thousand ids fits; what is larger is dropped unread.
MAX_REQUEST_BYTES: Final = 1024 * 1024
#: Measured: to read so much of it takes 0.1 s at worst; JSON is a hundred times as fast.
MAX_YAML_BYTES: Final = 16 * 1024
#: Where a bus puts a message's content type among its headers.
CONTENT_TYPE: Final = "content_type"


class Mailbox:
    """The exchanges and queues of remote control, by name, and how its messages are written and read."""

    def __init__(self, settings: Settings) -> None:
        name = settings.control_exchange
        self.requests = f"{name}.pidbox"
        self.replies = f"reply.{name}.pidbox"
        self.expires_s = settings.control_queue_expires
        self.ttl_s = settings.control_queue_ttl
        self.exclusive = settings.control_queue_exclusive
        self.durable = settings.control_queue_durable
        self.codec = codecs.get(settings.task_serializer)
        self.accept = codecs.accepted(settings.accept_content)

    def node_queue(self, hostname: str) -> str:
        """Return the name of a worker's queue."""
        return f"{hostname}.{self.requests}"

    def reply_queue(self, address: str) -> str:
        """Return the name of the queue for replies to that address."""
        return f"{address}.{self.replies}"

    # --- requests

    def encode_request(self, request: Request) -> bytes:
        """Return a request's body. Raises EncodeError."""
        fields = {
            "method": request.method,
            "arguments": dict(request.arguments),
            "destination": list(request.destination) or None,
            "pattern": request.pattern or None,
            "matcher": request.matcher or None,
        }
        if request.reply_to:
            fields["ticket"] = request.ticket
            fields["reply_to"] = {"exchange": self.replies, "routing_key": request.reply_to}
        return self._encode(fields)

    def decode_request(self, headers: Mapping[str, Any], body: bytes) -> Request:
        """Return the request in a message. Raises DecodeError when it is none."""
        is_yaml = headers.get(CONTENT_TYPE) == codecs.CONTENT_TYPES["yaml"]
        most = MAX_YAML_BYTES if is_yaml else MAX_REQUEST_BYTES
        if len(body) > most:
            raise DecodeError(f"a control message of {len(body)} bytes; {most} are read")
        fields = self._decode(headers, body)
        method, arguments = fields.get("method"), fields.get("arguments") or {}
        destination, reply_to = fields.get("destination") or (), fields.get("reply_to") or {}
        if not isinstance(method, str) or not isinstance(arguments, dict) or not isinstance(destination, (list, tuple)):
            raise DecodeError("a control message without a method, arguments and destination of the right types")
        has_reply = isinstance(reply_to, dict) and reply_to.get("exchange") == self.replies
        return Request(
            method=method,
            arguments=arguments,
            destination=[str(name) for name in destination],
            pattern=_text(fields.get("pattern")),
            matcher=_text(fields.get("matcher")),
            ticket=_text(fields.get("ticket")),
            reply_to=_address(reply_to.get("routing_key")) if has_reply else "",
        )

    # --- replies

    def encode_reply(self, hostname: str, reply: object) -> bytes:
        """Return a reply's body; a reply without a form in the serializer is an error with its repr."""
        try:
            return self._encode({hostname: reply})
        except EncodeError as error:
            return self._encode({hostname: {"error": repr(error)}})

    def decode_replies(self, headers: Mapping[str, Any], body: bytes, ticket: str) -> list[tuple[str, Any]]:
        """Return the nodes' replies in a message; [] when it answers another question or none."""
        if headers.get("ticket") != ticket:
            return []
        try:
            return list(self._decode(headers, body).items())
        except DecodeError:
            return []

    def _encode(self, fields: dict[str, Any]) -> bytes:
        """Return a body as kombu writes it, where JSON may hold NaN: settings and commands of others are not ours."""
        try:
            return self.codec.encode(fields)
        except EncodeError:
            if self.codec.content_type != json.content_type:
                raise
        return json.encode_loosely(fields)

    def _decode(self, headers: Mapping[str, Any], body: bytes) -> dict[str, Any]:
        try:
            fields = codecs.decode(body, _text(headers.get(CONTENT_TYPE)), None, self.accept)
        except FastqError as error:
            raise DecodeError(f"a control message that cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise DecodeError(f"a control message that is a {type(fields).__name__}, not a mapping")
        return fields


@dataclass(frozen=True, slots=True)
class Request:
    """One command to some or all workers."""

    method: str
    arguments: Mapping[str, Any]
    destination: Sequence[str] = ()
    pattern: str = ""
    matcher: str = ""
    ticket: str = ""
    reply_to: str = ""  # routing key for the reply; empty: nobody waits for one

    def is_for(self, hostname: str) -> bool:
        """Return whether the node of that name is meant. Raises PatternRefused."""
        if self.destination:
            return hostname in self.destination
        return not self.pattern or not self.matcher or matches(self.pattern, self.matcher, hostname)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _address(value: object) -> str:
    """Return a routing key, which is a short string; what is longer, or no text, cannot be anybody's address."""
    return _text(value).encode("utf-8", "replace")[:255].decode("utf-8", "ignore")


# --- properties


def encode_headers(headers: Mapping[str, Any], content_type: str, content_encoding: str) -> bytes:
    """Return the properties of a message that need not survive the broker's end."""
    return encode_properties({
        "content_type": content_type,
        "content_encoding": content_encoding,
        "headers": dict(headers),
        "delivery_mode": 1,
        "priority": 0,
    })  # fmt: skip


def decode_headers(props: bytes) -> dict[str, Any]:
    """Return a message's headers with its content type; {} for properties that cannot be read."""
    try:
        found = decode_properties(props)
    except RemoteProtocolError:
        return {}
    return {**(found.get("headers") or {}), CONTENT_TYPE: found.get("content_type")}
