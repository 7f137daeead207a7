"""The 36 classes of malformed messages, numbered as in the reliability rules (section 5), each with its outcome.

Data only: properties and bodies as bytes. ``tests.worker.test_malformed`` publishes them.
"""

from __future__ import annotations

import bz2
import importlib
import json
import lzma
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastq.wire.ids import new_id
from fastq.wire.message import encode_properties

#: In the arguments of every message; must not be in any log.
SECRET = "correct-horse-battery-staple"
NUMBER = b"%NUMBER%"  # stands for the call's number in a body
GADGET = "FASTQ_TEST_GADGET"  # environment variable: the directory that gadgets try to make
MIB = 1 << 20

#: rejected: to the dead letters, counted under ``reason``. unknown: the same, under Celery's words for an unregistered
#: task. runs: legal, or nothing that this version reads. waits: legal, kept for its time.
Outcome = Literal["rejected", "unknown", "runs", "waits"]


@dataclass(frozen=True)
class Case:
    """One malformed message. ``body`` is made when it is needed: some take a while."""

    number: int
    name: str
    outcome: Outcome
    reason: str
    props: bytes
    body: Callable[[], bytes]
    only: str = ""  # the one broker that can carry it

    def __str__(self) -> str:
        return f"{self.number:02}-{self.name}"


# --- pieces -----------------------------------------------------------------------------------------------------------

BODY = b'[[%s, 0, "%s"], {}, {}]' % (NUMBER, SECRET.encode())
ABSENT = object()


def headers(**changes: Any) -> dict[str, Any]:
    """Return the headers of a good message with these changed; ABSENT leaves one out."""
    task_id = new_id()
    good: dict[str, Any] = {
        "lang": "py",
        "task": "work",
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": f"(1, 0, {SECRET!r})",
        "kwargsrepr": "{}",
        "origin": "gen1@host",
        "ignore_result": False,
        "stamped_headers": None,
        "stamps": {},
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not ABSENT}


def properties(table: dict[str, Any] | None, **changes: Any) -> bytes:
    """Return encoded properties with these headers."""
    good = {"content_type": "application/json", "content_encoding": "utf-8", "headers": table, "delivery_mode": 2}
    return encode_properties({**good, **changes})


def string(text: bytes) -> bytes:
    """Return a long string as a field value."""
    return b"S" + struct.pack(">I", len(text)) + text


def raw_properties(fields: list[tuple[bytes, bytes]], reply_to: bytes = b"", table_size: int | None = None) -> bytes:
    """Return properties whose headers are these (key, encoded value), by hand: what no encoder would write."""
    table = b"".join(bytes([len(key)]) + key + value for key, value in fields)
    flags = 0b1111000000000000 | (0x0200 if reply_to else 0)
    props = struct.pack(">H", flags) + b"\x10application/json\x05utf-8"
    props += struct.pack(">I", len(table) if table_size is None else table_size) + table + b"\x02"
    return props + (bytes([len(reply_to)]) + reply_to if reply_to else b"")


def raw_fields(*more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the two fields that a task message must have, and more."""
    return [(b"task", string(b"work")), (b"id", string(new_id().encode())), *more]


def nested(depth: int) -> bytes:
    """Return a table inside a table, so many times, as a field value."""
    value = b"F\0\0\0\0"
    for _ in range(depth - 1):
        value = b"F" + struct.pack(">I", len(value) + 2) + b"\x01k" + value
    return value


class Gadget:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ[GADGET],)


def pickled() -> bytes:
    """Return a pickle that makes the gadget's directory."""
    return pickle.dumps(Gadget())


def yaml_gadget() -> bytes:
    """Return YAML that makes the gadget's directory when it is loaded unsafely."""
    return f"!!python/object/apply:os.mkdir [{os.environ[GADGET]!r}]".encode()


# --- decompression bombs ----------------------------------------------------------------------------------------------


def zlib_bomb() -> bytes:
    """Return 1 GiB of zeros in 1 MiB. Only the first block is compressed: the others are the same bytes."""
    compressor = zlib.compressobj(9)
    block = compressor.compress(bytes(64 * MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    following = compressor.compress(bytes(64 * MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return block + 15 * following


def zeros_packed(compress: Callable[[bytes], bytes]) -> bytes:
    """Return 256 MiB of zeros, packed."""
    return compress(bytes(256 * MIB))


def bombs() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Yield (name, content type, bomb) for every method whose library is here."""
    yield "zlib", "application/x-gzip", zlib_bomb
    yield "bz2", "application/x-bz2", lambda: bz2.compress(bytes(96 * MIB))
    yield "lzma", "application/x-lzma", lambda: lzma.compress(bytes(256 * MIB), preset=0)
    for name, content_type, modules, options in (
        ("zstd", "application/zstd", ("compression.zstd", "backports.zstd"), {}),
        ("brotli", "application/x-brotli", ("brotli",), {"quality": 5}),  # the default takes 13 times as long
    ):
        for module in modules:
            try:
                library: Any = importlib.import_module(module)
            except ImportError:
                continue
            compress: Callable[[bytes], bytes] = partial(library.compress, **options)
            yield name, content_type, partial(zeros_packed, compress)
            break


# --- the classes ------------------------------------------------------------------------------------------------------


def bad_body(number: int, name: str, reason: str, body: bytes | Callable[[], bytes], **changes: Any) -> Case:
    """A message whose headers are fine."""
    make = body if callable(body) else lambda: body
    return Case(number, name, "rejected", reason, properties(headers(), **changes), make)


def bad_header(number: int, name: str, reason: str, only: str = "", **changes: Any) -> Case:
    """A message whose body is fine."""
    return Case(number, name, "rejected", reason, properties(headers(**changes)), lambda: BODY, only)


def harmless(number: int, name: str, *, body: bytes = BODY, props: bytes | None = None, **changes: Any) -> Case:
    """A message that runs: the oddity is legal, or in a field that nothing reads."""
    return Case(number, name, "runs", "", properties(headers(**changes)) if props is None else props, lambda: body)


def all_cases() -> Iterator[Case]:
    """Yield at least one message of each class."""
    yield bad_body(1, "not-json", "json", b'[[1], {"secret": "' + SECRET.encode() + b'"')
    odd = rb'[[%s, 0, NaN, [1e400, -Infinity], "caf\udce9"], {}, {}]' % NUMBER
    yield harmless(1, "what-only-pythons-json-reads", body=odd)
    yield bad_body(2, "empty-body", "empty-body", b"")
    yield bad_body(3, "null", "body-shape", b"null")
    yield bad_body(4, "a-number", "body-shape", b"42")
    yield bad_body(5, "list-of-one", "body-shape", b"[[1]]")
    yield bad_body(5, "list-of-four", "body-shape", b"[[1], {}, {}, {}]")
    yield bad_body(5, "a-mapping-of-three", "body-shape", b'{"0": [1], "1": {}, "2": {}}')
    yield bad_body(6, "args-a-mapping", "args", b'[{"a": 1}, {}, {}]')
    yield bad_body(6, "args-a-string", "args", b'["abc", {}, {}]')
    yield bad_body(7, "kwargs-a-list", "kwargs", b"[[1], [2], {}]")
    yield harmless(8, "embed-null", body=b"[[%s], {}, null]" % NUMBER)
    yield bad_body(8, "embed-a-list", "embed", b"[[1], {}, [1]]")
    yield Case(9, "no-headers", "rejected", "no-task", properties(None), lambda: BODY)
    yield Case(9, "no-properties", "rejected", "no-task", b"\0\0", lambda: BODY)
    yield bad_header(9, "no-task", "no-task", task=ABSENT)
    yield bad_header(10, "task-an-integer", "task", task=7)
    yield bad_header(10, "task-null", "task", task=None)
    yield bad_header(11, "task-a-list", "task", task=["work"])
    yield bad_header(11, "task-of-a-megabyte-nearly", "task", task="x" * 100_000)
    yield bad_header(12, "id-missing", "no-id", id=ABSENT)
    yield bad_header(13, "id-an-integer", "id", id=7)
    yield bad_header(13, "id-empty", "id", id="")
    yield bad_header(14, "id-a-list", "id", id=["a"])
    unknown = properties(headers(task="evil_module.task"))
    yield Case(15, "unknown-task", "unknown", "", unknown, lambda: BODY)
    yield bad_header(16, "eta-no-date", "eta", eta="tomorrow")
    yield bad_header(16, "eta-the-30th-hour", "eta", eta="2026-11-22T30:00:00+00:00")
    yield harmless(16, "eta-before-1970", eta="1960-W01", expires="2999-001T24:00")
    yield bad_header(17, "eta-an-integer", "eta", eta=1_800_000_000)
    yield bad_header(18, "expires-garbage", "expires", expires="\0\0\0")
    yield bad_header(19, "expires-a-list", "expires", expires=[1])
    # RabbitMQ's own reader cannot take numbers that are none.
    yield bad_header(19, "expires-nan", "expires", only="sqlite", expires=float("nan"))
    yield bad_header(20, "timelimit-a-scalar", "timelimit", timelimit=5)
    yield bad_header(20, "timelimit-of-one", "timelimit", timelimit=[5])
    yield bad_header(20, "timelimit-of-three", "timelimit", timelimit=[5, 5, 5])
    yield bad_header(21, "timelimit-of-words", "timelimit", timelimit=["5", "soon"])
    yield harmless(21, "timelimit-as-text", timelimit=["5", None])
    yield harmless(21, "timelimit-empty", timelimit=[])
    yield bad_header(21, "timelimit-negative", "timelimit", timelimit=[-1, None])
    yield bad_header(21, "timelimit-infinite", "timelimit", only="sqlite", timelimit=[float("inf"), None])
    yield bad_header(22, "retries-a-string", "retries", retries="many")
    yield bad_header(22, "retries-negative", "retries", retries=-1)
    yield harmless(22, "retries-as-text", retries="1")
    yield bad_body(23, "unknown-content-type", "content-type", BODY, content_type="application/x-unheard-of")
    pickle_type = "application/x-python-serialize"
    yield bad_body(24, "pickle", "content-type", pickled, content_type=pickle_type, content_encoding="binary")
    yield bad_body(24, "pickle-said-to-be-json", "json", pickled)
    yield bad_body(24, "yaml", "content-type", yaml_gadget, content_type="application/x-yaml")
    yield bad_body(25, "unknown-charset", "content-encoding", BODY, content_encoding="x-klingon")
    yield bad_body(25, "charset-that-is-no-charset", "content-encoding", BODY, content_encoding="zip")
    yield bad_body(26, "invalid-utf-8", "json", b'[["\xff\xfe"], {}, {}]')
    yield bad_body(27, "100000-deep", "json", b"[" * 100_000 + b"]" * 100_000)
    mappings = b'[[], {"a": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001 + b", {}]"
    yield bad_body(27, "100000-mappings-deep", "json", mappings)
    yield bad_header(28, "unknown-compression", "compression", compression="application/x-rar")
    corrupt = bytearray(zlib.compress(BODY))
    corrupt[10] ^= 0xFF
    compressed = properties(headers(compression="application/x-gzip"))
    yield Case(29, "corrupt-zlib", "rejected", "compression", compressed, lambda: bytes(corrupt))
    yield Case(29, "zlib-cut-off", "rejected", "compression", compressed, lambda: zlib.compress(BODY)[:-6])
    yield Case(29, "zlib-and-more", "rejected", "compression", compressed, lambda: zlib.compress(BODY) + b"more")
    # This version carries out no follow-ups: a message that asks for them is refused, whatever the form.
    for key, value in (("callbacks", b"5"), ("errbacks", b"[1]"), ("chain", b'[{"task": 7}]'), ("chord", b'"x"')):
        body = b'[[%s], {}, {"%s": %s}]' % (NUMBER, key.encode(), value)
        yield bad_body(30, f"{key}-of-a-wrong-type", "follow-ups", body)
    yield harmless(
        30, "follow-ups-null", body=b'[[%s], {}, {"callbacks": null, "chain": null, "chord": null}]' % NUMBER
    )
    yield bad_body(31, "6000-digits", "json", b"[[" + b"9" * 6000 + b"], {}, {}]")
    yield Case(32, "nul-in-task-name", "unknown", "", properties(headers(task="work\0")), lambda: BODY)
    long_id = properties(headers(), reply_to="no\nsuch\0queue", correlation_id="x" * 200)
    yield harmless(33, "garbage-reply-to", props=long_id)
    yield harmless(33, "reply-to-that-grows-when-decoded", props=raw_properties(raw_fields(), reply_to=b"\xff" * 200))
    for name, content_type, bomb in bombs():
        props = properties(headers(compression=content_type))
        yield Case(34, f"bomb-{name}", "rejected", "compression", props, bomb)
    deep = raw_properties(raw_fields((b"stamps", nested(1000))))
    yield Case(35, "headers-1000-deep", "rejected", "properties", deep, lambda: BODY)
    # 32 levels are the limit, the headers themselves being the first.
    yield harmless(35, "headers-32-deep", props=raw_properties(raw_fields((b"stamps", nested(31)))))
    too_deep = raw_properties(raw_fields((b"stamps", nested(32))))
    yield Case(35, "headers-33-deep", "rejected", "properties", too_deep, lambda: BODY)
    # RabbitMQ takes headers of one frame at most; the frame itself is for the hostile broker to exceed.
    yield harmless(35, "headers-of-120-kB", props=raw_properties(raw_fields((b"x", string(b"x" * 120_000)))))
    ten_megabytes = raw_properties(raw_fields((b"x", string(b"x" * 10_000_000))))
    yield Case(35, "headers-of-10-MB", "runs", "", ten_megabytes, lambda: BODY, only="sqlite")
    for name, props in damaged_properties():
        # RabbitMQ does not take these from a publisher.
        yield Case(35, name, "rejected", "properties", props, lambda: BODY, only="sqlite")
    yield harmless(36, "origin-a-number", origin=7, shadow=["a"], group_index="first", stamps=5, stamped_headers=1)
    yield harmless(36, "lang-and-root-of-wrong-types", lang=[], root_id={}, parent_id=1, group=1.5, argsrepr=None)
    yield harmless(36, "lone-surrogates", id="caf\udce9", argsrepr="('caf\udce9',)", **{"\ud800": ["\udfff"]})
    yield Case(36, "nan-in-headers", "runs", "", properties(headers(x=[float("nan")])), lambda: BODY, only="redis")
    yield harmless(36, "duplicate-ids", props=raw_properties(raw_fields((b"id", string(new_id().encode())))))
    yield Case(
        36, "duplicate-task-of-two-types", "rejected", "task",
        raw_properties([(b"task", b"A\0\0\0\0"), *raw_fields()]), lambda: BODY,
    )  # fmt: skip
    year_9999 = properties(headers(eta="9999-12-31T23:59:59.999999+00:00"))
    yield Case(36, "eta-in-the-year-9999", "waits", "", year_9999, lambda: BODY)
    yield bad_header(36, "eta-in-the-year-10000", "eta", eta="10000-01-01T00:00:00+00:00")


def damaged_properties() -> Iterator[tuple[str, bytes]]:
    """Yield properties that are no properties."""
    fields = raw_fields()
    whole = raw_properties(fields)
    yield "no-bytes", b""
    yield "one-byte", b"\xff"
    yield "flags-alone", b"\xff\xfc"
    yield "continued-flags", b"\xff\xff\xff\xff" + whole[2:]
    yield "cut-off", whole[:-20]
    yield "table-longer-than-the-rest", raw_properties(fields, table_size=0x7FFFFFFF)
    yield "table-of-negative-length", raw_properties(fields, table_size=0xFFFFFFFF)
    yield "table-shorter-than-its-fields", raw_properties(fields, table_size=9)
    yield "string-of-negative-length", raw_properties([(b"task", b"S\xff\xff\xff\xffwork")])
    yield "array-longer-than-the-table", raw_properties([(b"timelimit", b"A\x00\x00\xff\xffVV"), *fields])
    yield "value-of-unknown-type", raw_properties([(b"x", b"?1234"), *fields])
    yield "key-without-value", raw_properties([*fields, (b"x", b"")])


def with_number(body: bytes, number: int) -> bytes:
    """Return a body with the call's number put in."""
    return body.replace(NUMBER, json.dumps(number).encode())
