"""Serializers by name and by content type, and the check that a message's content type is accepted.

A codec is any object with the attributes of ``fastq.interfaces.Codec``; the built-in ones are the modules of this
folder, imported when they are first asked for. Knows nothing of messages and settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from fastq.errors import ContentDisallowed, DecodeError, EncodingDisallowed, SettingsError

if TYPE_CHECKING:
    from fastq.interfaces import Codec

#: Content types of the built-in codecs, so that a name can be accepted before its library is imported.
CONTENT_TYPES = {
    "json": "application/json",
    "msgpack": "application/x-msgpack",
    "pickle": "application/x-python-serialize",
    "yaml": "application/x-yaml",
}

#: What to install for those that need a library; not an extra of fastq, as PyPI has another project of that name.
_PACKAGES = {"msgpack": "msgpack", "yaml": "PyYAML"}

_NAMES = {content_type: name for name, content_type in CONTENT_TYPES.items()}
_AS_UTF8 = frozenset({"", "utf-8", "utf8", "us-ascii", "ascii", "binary", "ascii-8bit", "8bit"})
#: The other charsets that senders write bodies in. Python knows a hundred more encodings: some take the square of a
#: body's length to read, some are no charsets.
_CHARSETS = frozenset(
    {
        *("utf-16", "utf-16le", "utf-16be", "utf-16-le", "utf-16-be", "utf-32", "utf-32le", "utf-32be"),
        *("iso-8859-1", "iso8859-1", "latin-1", "latin1", "iso-8859-15", "windows-1252", "cp1252"),
    }
)
_codecs: dict[str, Codec] = {}


def get(name: str) -> Codec:
    """Return the codec of this name or content type. Raises SettingsError when there is none."""
    codec = _codecs.get(name)
    return codec if codec is not None else _load(name)


def is_known(name: str) -> bool:
    """Return whether there is a codec of this name or content type."""
    return name in _codecs or name in CONTENT_TYPES or name in CONTENT_TYPES.values()


def register(codec: Codec) -> None:
    """Make a codec known under its name and content type, in place of a built-in one of the same name."""
    _codecs[codec.name] = _codecs[codec.content_type] = codec


def accepted(names: Iterable[str]) -> frozenset[str]:
    """Return the content types that names or content types stand for; imports nothing."""
    return frozenset(_codecs[name].content_type if name in _codecs else CONTENT_TYPES.get(name, name) for name in names)


def decode(data: bytes, content_type: str, content_encoding: str | bytes | None, accept: frozenset[str]) -> Any:
    """Return the value in a message body.

    Raises ContentDisallowed for a type not in ``accept``, EncodingDisallowed for text in an encoding that is not read,
    else DecodeError.
    """
    if content_type not in accept:
        raise ContentDisallowed(
            f"content type {content_type[:80]!r} is not accepted (accepted: {', '.join(sorted(accept))}); "
            "if its sender is trusted, add it to accept_content"
        )
    try:
        codec = get(content_type)
    except SettingsError as error:
        raise DecodeError(str(error)) from error
    return codec.decode(_as_utf8(data, content_encoding) if codec.content_encoding == "utf-8" else data)


def is_charset(name: str | bytes | None) -> bool:
    """Return whether bodies are read in this content encoding."""
    plain_name = _plain_charset(name)
    return plain_name in _AS_UTF8 or plain_name in _CHARSETS


def _plain_charset(name: str | bytes | None) -> str:
    if isinstance(name, bytes):  # it is no UTF-8
        return repr(name)
    return (name or "").lower().replace("_", "-")


def _as_utf8(data: bytes, charset: str | bytes | None) -> bytes:
    name = _plain_charset(charset)
    if name in _AS_UTF8:
        return data
    if name not in _CHARSETS:
        raise EncodingDisallowed(
            f"content encoding {name[:80]!r} is not read; write the body in UTF-8, or in one of "
            f"{', '.join(sorted(_CHARSETS))}"
        )
    try:
        return data.decode(name).encode("utf-8")
    except UnicodeError as error:
        raise DecodeError(f"cannot read the body as {name!r}: {error}") from error


def _load(name: str) -> Codec:
    plain_name = _NAMES.get(name, name)
    if plain_name not in CONTENT_TYPES:
        raise SettingsError(
            f"unknown serializer {name[:80]!r}; known: {', '.join(sorted(CONTENT_TYPES.keys() | _codecs))}"
        )
    try:
        codec = cast("Codec", importlib.import_module(f"fastq.codecs.{plain_name}"))
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(plain_name, error.name)
        raise SettingsError(
            f"serializer {plain_name!r} needs the library {error.name!r}: pip install {package}"
        ) from error
    register(codec)
    return codec
