"""MessagePack through the msgpack library, text and bytes apart as in its current specification."""

from __future__ import annotations

from typing import Any

import msgpack

from fastq.errors import DecodeError, EncodeError

name = "msgpack"
content_type = "application/x-msgpack"
content_encoding = "binary"


def encode(value: Any) -> bytes:
    """Return the value as MessagePack. Raises EncodeError."""
    try:
        data: bytes = msgpack.packb(value, use_bin_type=True)
        return data
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EncodeError(f"no MessagePack form: {error}") from error


def decode(data: bytes) -> Any:
    """Return the value in MessagePack bytes. Raises DecodeError."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise DecodeError(f"not MessagePack: {type(error).__name__}: {error}") from error
