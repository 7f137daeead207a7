"""Compression of message bodies: by name when sending, by content type when receiving, within a bound.

Streams are read in pieces and dropped as soon as they pass the bound, so a bomb costs no more memory than the bound.
Source of the names and content types: kombu; "gzip" and "zlib" both mean a zlib stream there, and a real gzip file is
read as well.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from fastq.errors import DecodeError, EncodeError

MAX_BYTES = 64 * 1024 * 1024
MAX_RATIO = 200
#: Up to this size any ratio is fine: honest repetitive bodies reach 1000:1.
RATIO_FROM_BYTES = 8 * 1024 * 1024

_PIECE = 1024 * 1024
# xz -9 needs 65 MiB for its dictionary; the file format allows 4 GiB, taken before the first byte comes out.
_LZMA_MEMORY = 96 * 1024 * 1024


class Stream(Protocol):
    """What reads a compressed stream piece by piece."""

    def read(self, max_bytes: int) -> bytes:
        """Return at most so many more bytes; b"" only at the end. Raises ``errors`` of its method, or EOFError."""


class Method(NamedTuple):
    """One way to compress."""

    content_type: str
    compress: Callable[[bytes], bytes]
    open: Callable[[bytes], Stream]
    errors: tuple[type[Exception], ...]


def is_known(name: object) -> bool:
    """Return whether there is a method of this name or content type."""
    return name in _methods or name in _OPTIONAL


def content_type(name: str) -> str:
    """Return what a message's ``compression`` header says for a method's name. Raises EncodeError."""
    return _method(name, EncodeError).content_type


def compress(data: bytes, name: str) -> bytes:
    """Return the data compressed by the method of this name. Raises EncodeError."""
    return _method(name, EncodeError).compress(data)


def decompress(data: bytes, name: object, max_bytes: int = MAX_BYTES, max_ratio: int = MAX_RATIO) -> bytes:
    """Return the data decompressed by a method's name or content type.

    Raises DecodeError for a stream that is broken, cut off, followed by other bytes, or that grows past the bound.
    """
    if not isinstance(name, str):
        raise DecodeError(f"the compression header is {name!r:.80}; expected text")
    method = _method(name, DecodeError)
    bound = min(max_bytes, max(RATIO_FROM_BYTES, max_ratio * len(data)))
    pieces: list[bytes] = []
    size = 0
    try:
        stream = method.open(data)
        while piece := stream.read(min(_PIECE, bound + 1 - size)):
            pieces.append(piece)
            size += len(piece)
            if size > bound:
                raise DecodeError(
                    f"{len(data)} compressed bytes hold more than {bound}: refused as a decompression bomb"
                )
    except method.errors as error:
        raise DecodeError(f"not a stream of {method.content_type}: {error}") from error
    except EOFError:
        raise DecodeError(f"the stream of {method.content_type} is cut off") from None
    return b"".join(pieces)


def register(method: Method, *names: str) -> None:
    """Make a method known under its content type and these names."""
    for name in (method.content_type, *names):
        _methods[name] = method


class _Incremental:
    """A stream over the standard library's decompressor objects (bz2 and lzma share one shape)."""

    def __init__(self, decompressor: Any, data: bytes) -> None:
        self._decompressor = decompressor
        self._data = data

    def read(self, max_bytes: int) -> bytes:
        while not self._decompressor.eof:
            piece: bytes = self._decompressor.decompress(self._data, max_bytes)
            self._data = b""
            if piece:
                return piece
            if self._decompressor.needs_input:
                break
        _check_end(self._decompressor)
        return b""


class _Zlib:
    """A zlib or gzip stream; which one, its first bytes say."""

    def __init__(self, data: bytes) -> None:
        self._decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._data = data

    def read(self, max_bytes: int) -> bytes:
        while not self._decompressor.eof:
            before = len(self._data)
            piece = self._decompressor.decompress(self._data, max_bytes)
            self._data = self._decompressor.unconsumed_tail
            if piece:
                return piece
            if not self._data or len(self._data) == before:
                break
        _check_end(self._decompressor)
        return b""


def _check_end(decompressor: Any) -> None:
    if not decompressor.eof:
        raise EOFError
    if decompressor.unused_data:
        raise DecodeError("other bytes follow the compressed stream")


def _method(name: str, error: type[EncodeError | DecodeError]) -> Method:
    if name in _OPTIONAL and name not in _methods:
        with suppress(ImportError):
            register(*_OPTIONAL[name]())
    try:
        return _methods[name]
    except KeyError:
        known = ", ".join(sorted(key for key in _methods if "/" not in key))
        missing = "; its library is not installed" if name in _OPTIONAL else ""
        raise error(f"unknown compression {name[:80]!r}{missing}; known: {known}") from None


def _zstd() -> tuple[Any, ...]:
    try:
        zstd: Any = importlib.import_module("compression.zstd")  # Python 3.14
    except ImportError:
        zstd = importlib.import_module("backports.zstd")
    # A frame may ask for a window of 2 GiB before its first byte; 2^26 is the bound on what comes out anyway.
    options = {zstd.DecompressionParameter.window_log_max: 26}

    def open_stream(data: bytes) -> Stream:
        return _Incremental(zstd.ZstdDecompressor(options=options), data)

    return Method("application/zstd", zstd.compress, open_stream, (zstd.ZstdError,)), "zstd", "zstandard"


class _Brotli:
    """A brotli stream; needs brotli 1.2, the first that can be told how much to give out."""

    def __init__(self, brotli: Any, data: bytes) -> None:
        self._decompressor = brotli.Decompressor()
        self._data = data

    def read(self, max_bytes: int) -> bytes:
        while not self._decompressor.is_finished():
            piece: bytes = self._decompressor.process(self._data, output_buffer_limit=max_bytes)
            self._data = b""
            if piece:
                return piece
            if self._decompressor.can_accept_more_data():
                break
        if not self._decompressor.is_finished():
            raise EOFError
        return b""


def _brotli() -> tuple[Any, ...]:
    brotli: Any = importlib.import_module("brotli")
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise ImportError("brotli >= 1.2 is needed: older versions cannot bound their output")
    return Method(
        "application/x-brotli", brotli.compress, lambda data: _Brotli(brotli, data), (brotli.error,)
    ), "brotli"


_OPTIONAL: dict[str, Callable[[], tuple[Any, ...]]] = {
    **dict.fromkeys(("zstd", "zstandard", "application/zstd"), _zstd),
    **dict.fromkeys(("brotli", "application/x-brotli"), _brotli),
}
_methods: dict[str, Method] = {}

register(Method("application/x-gzip", zlib.compress, _Zlib, (zlib.error,)), "gzip", "zlib")
register(
    Method("application/x-bz2", bz2.compress, lambda data: _Incremental(bz2.BZ2Decompressor(), data), (OSError,)),
    "bzip2",
    "bzip",
)
register(
    Method(
        "application/x-lzma",
        lzma.compress,
        lambda data: _Incremental(lzma.LZMADecompressor(memlimit=_LZMA_MEMORY), data),
        (lzma.LZMAError,),
    ),
    "lzma",
    "xz",
)
