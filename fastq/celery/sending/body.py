"""The body of a task message as kombu writes it: serialized, and compressed where that is asked for. No I/O.

Plain JSON takes the short way: kombu's own encoder, without the layers around it. All else is kombu's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import kombu.compression
import kombu.serialization
import kombu.utils.json

from fastq.celery.sending._encode import dump_json

_ENCODER = kombu.utils.json.JSONEncoder()
_DUMPS = kombu.utils.json.dumps


def kombu_json(value: Any) -> bytes:
    """Return JSON as kombu writes it."""
    return dump_json(value, _ENCODER.default)


def encode_body(body: Any, serializer: str, compression: str | None, headers: dict[str, Any]) -> tuple[str, str, bytes]:
    """Return (content type, content encoding, bytes); notes a compression in the headers. May raise EncodeError."""
    content_type, encoding, data = _serialized(body, serializer)
    if compression:
        data, headers["compression"] = kombu.compression.compress(data, compression)
    return content_type, encoding, data if isinstance(data, bytes) else str(data).encode(encoding)


def _serialized(body: Any, serializer: str) -> tuple[str, str, Any]:
    codec = kombu.serialization.registry._encoders.get(serializer)
    if codec is not None and codec.encoder is _DUMPS:
        # kombu has its own words for what cannot be written.
        with contextlib.suppress(Exception):
            return codec.content_type, codec.content_encoding, kombu_json(body)
    content_type, encoding, data = kombu.serialization.dumps(body, serializer)
    return content_type, encoding, data
