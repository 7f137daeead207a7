"""A call's body: bytes to arguments. Whatever it holds, the only error is ``Malformed``; runs nothing."""

from __future__ import annotations

from typing import Any

from fastq.codecs import compression
from fastq.codecs import decode as decode_content
from fastq.codecs.json import decode as decode_json
from fastq.errors import ContentDisallowed, DecodeError, EncodingDisallowed
from fastq.wire.call import Call

#: Chosen: characters of a decoder's words that a refused message's sender is told.
MAX_DETAIL = 500


class Malformed(DecodeError):
    """A message body that is not a task's: the class that it is counted under, and for its sender what is wrong."""

    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(kind, str(detail)[:MAX_DETAIL])

    @property
    def report(self) -> str:
        """Return both as the main process reads them."""
        return "\n".join(filter(None, self.args))


def decode_call(call: Call, accept: frozenset[str]) -> tuple[list[Any], dict[str, Any], dict[str, Any] | None]:
    """Return the three parts of a call's body: arguments, keyword arguments, follow-ups. Raises Malformed."""
    if call.json_body:
        try:
            payload = decode_json(call.body)
        except DecodeError as error:
            raise Malformed("empty-body" if not call.body else "json", error) from error
    else:
        payload = _decode_other(call, accept)
    if type(payload) is not list or len(payload) != 3:
        if isinstance(payload, (list, tuple)) and len(payload) == 3:
            payload = list(payload)
        else:
            raise Malformed("body-shape")
    args, kwargs, embed = payload
    if type(args) is not list:
        if not isinstance(args, tuple):
            raise Malformed("args")
        args = list(args)
    if type(kwargs) is not dict:
        if kwargs is not None:
            raise Malformed("kwargs")
        kwargs = {}
    for name in kwargs:
        if type(name) is not str:
            raise Malformed("kwargs")
    if embed is not None:
        if type(embed) is not dict:
            raise Malformed("embed")
        # To run the task and forget what is to follow it would lose work without a word.
        if any(embed.values()):
            raise Malformed("follow-ups")
    return args, kwargs, embed


def _decode_other(call: Call, accept: frozenset[str]) -> Any:
    """Anything but plain JSON: another serializer, a compressed body, an unusual charset."""
    try:
        properties = call.properties()
    except Exception as error:  # the wire layer's own errors: nested too deep, cut short
        raise Malformed("properties", error) from error
    body = call.body
    name = call.headers().get("compression")
    if name is not None:
        try:
            body = compression.decompress(body, name if isinstance(name, str) else repr(name))
        except DecodeError as error:
            raise Malformed("compression", error) from error
    content_type = properties.get("content_type") or "application/json"
    try:
        return decode_content(body, content_type, properties.get("content_encoding"), accept)
    except ContentDisallowed as error:
        raise Malformed("content-type", error) from error
    except EncodingDisallowed as error:
        raise Malformed("content-encoding", error) from error
    except DecodeError as error:
        raise Malformed("body", error) from error
