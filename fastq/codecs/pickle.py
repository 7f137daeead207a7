"""Pickle: any Python value, and any code its sender likes. Never accepted unless ``accept_content`` lists it."""

from __future__ import annotations

import pickle
from typing import Any

from fastq.codecs._walk import short_repr
from fastq.errors import DecodeError, EncodeError

name = "pickle"
content_type = "application/x-python-serialize"
content_encoding = "binary"


def encode(value: Any) -> bytes:
    """Return the value pickled. Raises EncodeError."""
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickling calls the value's own methods, which raise what they like
        raise EncodeError(f"cannot be pickled: {short_repr(value, 80)}: {error}") from error


def decode(data: bytes) -> Any:
    """Return the pickled value. Raises DecodeError."""
    try:
        return pickle.loads(data)  # noqa: S301 - that is what listing pickle in accept_content means
    except Exception as error:  # as above
        raise DecodeError(f"not a pickle: {type(error).__name__}: {error}") from error
