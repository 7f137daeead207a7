"""JSON with the types that JSON lacks, in kombu's form: ``{"__type__": name, "__value__": value}``.

Plain values take orjson; whatever orjson would write or read differently from the json module (dates, integers beyond
64 bits, keys that are not text) takes the json module. Numbers that JSON has no word for (NaN, the infinities) are read
as the json module reads them, and written only where that is asked for. No I/O. Source of the tags: kombu 5.7, checked
against it in the tests.
"""

from __future__ import annotations

import base64
import json
import math
import uuid
from collections.abc import Callable, Generator
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, TypeVar

import orjson

from fastq.codecs._walk import HUGE_INTEGER, LONG_INTEGER, TOO_DEEP, is_plain, short_repr, survey
from fastq.errors import DecodeError, EncodeError

name = "json"
content_type = "application/json"
content_encoding = "utf-8"

#: What to do about a number that is none.
ODD_NUMBER_HINT: Final = "JSON has no word for it: pass None or text, or choose another serializer"

T = TypeVar("T")

_writers: dict[type, tuple[str | None, Callable[[Any], Any]]] = {}
_readers: dict[str, Callable[[Any], Any]] = {}


def encode(value: Any) -> bytes:
    """Return the value as JSON. Raises EncodeError, naming the value that has no form."""
    if is_plain(value):
        try:
            return orjson.dumps(value)
        except orjson.JSONEncodeError:
            pass  # a lone surrogate: the json module writes it as an escape
    return _encode_tagged(value, _ENCODER)


def encode_loosely(value: Any) -> bytes:
    """Return the same, with ``NaN`` and ``Infinity`` as kombu writes them: for what only Python programs read."""
    return _encode_tagged(value, _LOOSE_ENCODER)


def encode_event(value: Any) -> bytes:
    """Return what orjson writes of a value; of lone surrogates, which it cannot write, what the json module does."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return encode_loosely(value)


def decode_event(data: bytes | str) -> Any:
    """Return what a JSON text says, tags and all as they stand. Raises ValueError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass  # as in decode
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def decode(data: bytes) -> Any:
    """Return the value in a JSON text. Raises DecodeError."""
    found = survey(data)
    if not found:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # the json module also reads lone surrogates, NaN and 1e400, and words the error for the rest
    if found & TOO_DEEP:
        raise DecodeError("JSON is nested deeper than 512 levels")
    if found & HUGE_INTEGER:
        raise DecodeError("JSON holds an integer of more than 4300 digits")
    return _decode_tagged(data)


def decode_plain(data: bytes, max_depth: int) -> Any:
    """Return what a JSON text says, tags as they stand: for a look, so no type's own code runs. Raises DecodeError."""
    found = survey(data, max_depth)
    if found & (TOO_DEEP | HUGE_INTEGER):
        raise DecodeError(
            f"JSON is nested deeper than {max_depth} levels, or holds an integer of more than 4300 digits"
        )
    try:
        return json.loads(data) if found & LONG_INTEGER else decode_event(data)
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from error


def register_type(
    cls: type[T], marker: str | None, encode: Callable[[T], Any], decode: Callable[[Any], T] | None = None
) -> None:
    """Teach the codec a class: ``encode`` turns an instance into JSON values, ``decode`` turns those back.

    Without a marker the encoded value stands untagged in the text, and nothing is decoded.
    """
    _writers[cls] = (marker, encode)
    if marker is not None and decode is not None:
        _readers[marker] = decode


def place_of_odd_number(value: Any) -> tuple[str, float] | None:
    """Return where in a value of lists and mappings the first NaN or infinity stands, as ``[0]['v'][1]``, and which."""
    seen: set[int] = set()
    open_places = [("", value)]
    while open_places:
        place, found = open_places.pop()
        if isinstance(found, float) and not math.isfinite(found):
            return place, found
        if not isinstance(found, (dict, list, tuple)) or id(found) in seen:
            continue
        seen.add(id(found))
        items = found.items() if isinstance(found, dict) else enumerate(found)
        open_places += reversed([(f"{place}[{short_repr(key, 40)}]", item) for key, item in items])
    return None


def _encode_tagged(value: Any, encoder: json.JSONEncoder) -> bytes:
    try:
        data = encoder.encode(value).encode("ascii")
    except (TypeError, ValueError, OverflowError) as error:
        odd = place_of_odd_number(value) if isinstance(error, ValueError) else None
        if odd is not None:
            raise EncodeError(f"no JSON form: value{odd[0]} is {odd[1]!r}; {ODD_NUMBER_HINT}") from None
        raise EncodeError(f"no JSON form: {error}") from error
    except RecursionError:
        raise EncodeError("no JSON form: the value is nested too deeply") from None
    found = survey(data)
    if found & TOO_DEEP:
        raise EncodeError("no JSON form: the value is nested deeper than 512 levels")
    if found & HUGE_INTEGER:
        raise EncodeError("no JSON form: an integer has more than 4300 digits")
    return data


def _tag(value: Any) -> Any:
    """Return what stands in JSON for a value that the json module does not know."""
    own = getattr(value, "__json__", None)
    if own is not None:
        return own()
    for cls, (marker, write) in _writers.items():
        if isinstance(value, cls):
            written = write(value)
            return written if marker is None else {"__type__": marker, "__value__": written}
    raise EncodeError(
        f"no JSON form for {type(value).__module__}.{type(value).__qualname__}: {short_repr(value, 80)}; "
        f"{_plain_form(value)}, or teach the codec with fastq.codecs.json.register_type()"
    )


def _plain_form(value: Any) -> str:
    """Return how to write a value in plain ones."""
    forms = (
        (Enum, "use its .value"),
        (PurePath, "use str(...)"),
        (timedelta, "use its .total_seconds()"),
        ((set, frozenset, Generator, range), "use list(...) or sorted(...)"),
    )
    for cls, words in forms:
        if isinstance(value, cls):
            return words
    if is_dataclass(value):
        return "use dataclasses.asdict(...)"
    dump = next((name for name in ("tolist", "model_dump") if hasattr(value, name)), None)  # numpy, pydantic
    return "use plain values" if dump is None else f"use its .{dump}()"


_ENCODER = json.JSONEncoder(default=_tag, allow_nan=False, separators=(",", ":"))
_LOOSE_ENCODER = json.JSONEncoder(default=_tag, separators=(",", ":"))


def _decode_tagged(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_hook=_untag)
    except RecursionError:
        raise DecodeError("JSON is nested too deeply") from None
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from error


def _untag(pairs: dict[str, Any]) -> Any:
    if len(pairs) != 2 or "__type__" not in pairs or "__value__" not in pairs:
        return pairs
    marker, written = pairs["__type__"], pairs["__value__"]
    read = _readers.get(marker) if isinstance(marker, str) else None
    if read is None:
        raise DecodeError(f"JSON tags a value with an unknown type: {short_repr(marker, 80)}")
    try:
        return read(written)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise DecodeError(f"JSON tags a value as {marker!r} that is none: {short_repr(written, 80)}") from error


def _bytes_tag(value: bytes) -> Any:
    try:
        return {"__type__": "bytes", "__value__": value.decode("utf-8")}
    except UnicodeDecodeError:
        return {"__type__": "base64", "__value__": base64.b64encode(value).decode("ascii")}


def _read_datetime(text: str) -> datetime:
    # Python 3.10 does not read the Z that other languages write.
    return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)


# The order matters: a datetime is a date.
register_type(datetime, "datetime", datetime.isoformat, _read_datetime)
register_type(date, "date", date.isoformat, lambda text: _read_datetime(text).date())
register_type(time, "time", time.isoformat, time.fromisoformat)
register_type(Decimal, "decimal", str, Decimal)
register_type(uuid.UUID, "uuid", lambda value: {"hex": value.hex}, lambda value: uuid.UUID(**value))
register_type(bytes, None, _bytes_tag)
_readers["bytes"] = lambda text: text.encode("utf-8")
# Others break the lines of long base64.
_readers["base64"] = lambda text: base64.b64decode(text.encode("ascii"))
