"""A task's state as key-value stores keep it: JSON or another serializer's bytes, compressed or not.

What a state says is ``codecs.meta``'s. Source: Celery 5.7's backends; a compressed state names its method in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastq import codecs
from fastq.codecs import compression
from fastq.codecs.meta import decode_meta
from fastq.errors import DecodeError, EncodeError, SettingsError

if TYPE_CHECKING:
    from fastq.settings import Settings

#: In front of a compressed state; then come the content type of the compression, a zero, and the stream.
COMPRESSED: Final = b"\0celery-compressed\0"


class PayloadCodec:
    """An application's stored states, by its result_serializer, result_compression and accepted content types."""

    def __init__(self, settings: Settings) -> None:
        accept = settings.result_accept_content
        self._accept = codecs.accepted(settings.accept_content if accept is None else accept)
        self._serializer = settings.result_serializer
        self._compression = settings.result_compression
        if self._compression is None:
            return
        try:
            self._content_type = compression.content_type(self._compression).encode()
        except EncodeError as error:
            raise SettingsError(f"result_compression: {error}") from None

    @property
    def compresses(self) -> bool:
        """Whether ``encode`` changes anything."""
        return self._compression is not None

    def encode(self, meta: bytes) -> bytes:
        """Return an encoded state as it is stored: compressed where the settings want that."""
        if self._compression is None:
            return meta
        return b"%b%b\0%b" % (COMPRESSED, self._content_type, compression.compress(meta, self._compression))

    def decode(self, payload: bytes) -> dict[str, Any]:
        """Return a stored state as a dict. Raises DecodeError, ContentDisallowed for a serializer not accepted."""
        if payload.startswith(COMPRESSED):
            content_type, _, stream = payload[len(COMPRESSED) :].partition(b"\0")
            payload = compression.decompress(stream, content_type.decode(errors="replace"))
        if self._serializer == "json" or payload[:1] == b"{":  # fastq's own is JSON, whatever Celery's is
            return decode_meta(payload)
        try:
            codec = codecs.get(self._serializer)
        except SettingsError as error:
            raise DecodeError(str(error)) from error
        meta = codecs.decode(payload, codec.content_type, codec.content_encoding, self._accept)
        if not isinstance(meta, Mapping) or not isinstance(meta.get("status"), str):
            raise DecodeError(f"not a stored task state, as {self._serializer}: {payload[:80]!r}")
        return dict(meta)
