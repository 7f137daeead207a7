"""Message bodies of a Celery application: bytes to arguments. Plain JSON by our own reader, the rest by kombu.

Whatever a body holds, the only error is ``Malformed``, which names the class that it is counted under.
"""

from __future__ import annotations

from typing import Any

import celery
from celery.exceptions import SecurityError
from kombu import serialization
from kombu.utils import json as kombu_json

from fastq.codecs import compression
from fastq.codecs.json import decode as decode_json
from fastq.errors import DecodeError
from fastq.running.decode import Malformed
from fastq.wire.call import Call

#: What kombu.utils.json reads from the start; an application may register more.
_KNOWN_TYPES = frozenset({"datetime", "date", "time", "Decimal", "decimal", "uuid", "bytes", "base64", "register_type"})


class Bodies:
    """Reads the bodies of an application's messages."""

    def __init__(self, app: celery.Celery) -> None:
        self._accept = serialization.prepare_accept_content(app.conf.accept_content)
        accepts_json = self._accept is None or "application/json" in self._accept
        self._reads_json = accepts_json and not _has_own_types()

    def read(self, call: Call) -> tuple[Any, Any, dict[str, Any]]:
        """Return arguments, keyword arguments and follow-ups. Raises Malformed."""
        if call.json_body and self._reads_json:
            try:
                payload = decode_json(call.body)
            except DecodeError as error:
                raise Malformed("empty-body" if not call.body else "json", error) from error
        else:
            payload = self._read_other(call)
        if not isinstance(payload, (list, tuple)) or len(payload) != 3:
            raise Malformed("body-shape")
        args, kwargs, embed = payload
        if not isinstance(args, (list, tuple)):
            raise Malformed("args")
        if kwargs is None:
            kwargs = {}
        if not isinstance(kwargs, dict) or (kwargs and not all(isinstance(name, str) for name in kwargs)):
            raise Malformed("kwargs")
        if embed is not None and not isinstance(embed, dict):
            raise Malformed("embed")
        return args, kwargs, embed or {}

    def _read_other(self, call: Call) -> Any:
        try:
            properties = call.properties()
            name = call.headers().get("compression")
        except Exception as error:  # the wire layer's own errors: nested too deep, cut short
            raise Malformed("properties", error) from error
        body = call.body
        if name is not None:
            body = _decompress(body, name)
        content_type = properties.get("content_type") or "application/json"
        if self._accept is not None and content_type not in self._accept:
            raise Malformed("content-type", content_type)
        try:
            return serialization.loads(body, content_type, properties.get("content_encoding") or "utf-8", self._accept)
        except Exception as error:  # a serializer of anybody's, on bytes of anybody's
            # kombu puts its own error around what a serializer raises.
            is_signature = isinstance(error.__context__, SecurityError)
            raise Malformed("signature" if is_signature else "body", repr(error)) from error


def _decompress(body: bytes, name: object) -> bytes:
    """Undo a compression: a known one within our bounds, an application's own by kombu."""
    from kombu import compression as kombu_compression

    try:
        if not compression.is_known(name) and name in kombu_compression._decoders:
            own: bytes = kombu_compression.decompress(body, name)
            return own
        return compression.decompress(body, name)
    except Exception as error:  # a method of anybody's, on bytes of anybody's
        raise Malformed("compression", repr(error)) from error


def _has_own_types() -> bool:
    """Return whether the application has taught kombu's JSON a type of its own."""
    return not set(kombu_json._decoders) <= _KNOWN_TYPES
