"""Serializers and compression: exact values both ways, kombu's JSON form, and hostile input."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json as stdlib_json
import lzma
import re
import resource
import subprocess
import sys
import uuid
import zlib
from array import array
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq import codecs
from fastq.codecs import compression, json, meta
from fastq.codecs._walk import HUGE_INTEGER, LONG_INTEGER, TAGGED, TOO_DEEP, is_plain, members, short_repr, survey
from fastq.errors import (
    ContentDisallowed,
    DecodeError,
    EncodeError,
    EncodingDisallowed,
    RemoteError,
    SettingsError,
    SoftTimeLimitExceeded,
)

# --- plain values and the walks ---------------------------------------------------------------------------------------


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**63 - 1, -(2**63), 1.5, "é", "", [], (), {}, [1, {"a": (2,)}]])
def test_exact_built_in_values_are_plain(value: Any) -> None:
    assert is_plain(value)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        float("nan"),
        float("inf"),
        b"",
        Text("x"),
        {1: 2},
        {Text("k"): 1},
        [datetime(2026, 1, 1)],
        {"a": {"b": [set()]}},
        Decimal(1),
    ],
)
def test_what_orjson_would_change_or_refuse_is_not_plain(value: Any) -> None:
    assert not is_plain(value)
    assert not is_plain([value])
    assert not is_plain({"deep": (value,)})


def test_a_cycle_is_not_plain() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert not is_plain(loop)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'{"a": [1, -2.5e300, "x"]}', 0),
        (b"[999999999999999999]", 0),
        (b"[1234567890123456789]", LONG_INTEGER),
        (b"-9223372036854775809", LONG_INTEGER),
        (b"[0.12345678901234567890123, 12345678901234567890.5, 12345678901234567890e5]", 0),
        (b'["12345678901234567890"]', 0),
        (rb'["\"12345678901234567890\\", 1]', 0),
        (rb'["\\", 12345678901234567890]', LONG_INTEGER),
        (b'{"__type__": 1}', TAGGED),
        (rb'{"\"__type__": 1}', 0),
        (b'{"__type__x": 1}', 0),
        (b"1" * 4300, LONG_INTEGER),
        (b"1" * 4301, HUGE_INTEGER),
        (b"[" * 512 + b"]" * 512, 0),
        (b"[" * 513 + b"]" * 513, TOO_DEEP),
        (b'{"a":' * 513, TOO_DEEP),
        (b'["' + b"[" * 600 + b'"]', 0),
        (b'"never closed', 0),
        (b"", 0),
    ],
)
def test_survey_sees_what_orjson_would_not_read_exactly(text: bytes, found: int) -> None:
    assert survey(text) == found


def test_survey_of_every_cut_of_a_text_stays_inside_it() -> None:
    text = rb'{"__type__": "a\\\"b", "n": [-12345678901234567890, 1.5e-7, "\\"]}'
    for end in range(len(text)):
        # What follows in memory is not looked at: a part has nothing that the whole has not.
        assert survey(text[:end]) | survey(text) == survey(text)


# --- JSON -------------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary(max_size=20)
    | st.datetimes().map(lambda moment: moment.replace(fold=0))  # ISO 8601 has no word for fold
    | st.dates()
    | st.times().map(lambda moment: moment.replace(fold=0))
    | st.uuids()
    | st.decimals(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


def is_tagged(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == {"__type__", "__value__"} or any(map(is_tagged, value.values()))
    return isinstance(value, list) and any(map(is_tagged, value))


@given(JSON_VALUES)
def test_a_value_comes_back_as_it_went(value: Any) -> None:
    if not is_tagged(value):
        back = json.decode(json.encode(value))
        assert back == value
        assert repr(back) == repr(value)


@given(JSON_VALUES)
def test_kombu_reads_what_we_write_and_we_read_what_it_writes(value: Any) -> None:
    kombu_json = pytest.importorskip("kombu.utils.json", reason="kombu is not installed: pip install '.[bench]'")
    if not is_tagged(value):
        assert kombu_json.loads(json.encode(value)) == kombu_json.loads(kombu_json.dumps(value))
        assert json.decode(kombu_json.dumps(value).encode()) == value


ZONE = timezone(timedelta(hours=2))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 1, 1), '{"__type__":"datetime","__value__":"2026-01-01T00:00:00"}'),
        (
            datetime(2026, 1, 1, 2, 3, 4, 5, ZONE),
            '{"__type__":"datetime","__value__":"2026-01-01T02:03:04.000005+02:00"}',
        ),
        (date(2026, 1, 1), '{"__type__":"date","__value__":"2026-01-01"}'),
        (time(1, 2, 3), '{"__type__":"time","__value__":"01:02:03"}'),
        (Decimal("1.10"), '{"__type__":"decimal","__value__":"1.10"}'),
        (
            uuid.UUID("12345678123456781234567812345678"),
            '{"__type__":"uuid","__value__":{"hex":"12345678123456781234567812345678"}}',
        ),
        ("é".encode(), '{"__type__":"bytes","__value__":"\\u00e9"}'),
        (b"\xff\x00", '{"__type__":"base64","__value__":"/wA="}'),
    ],
)
def test_the_tagged_form_is_that_of_kombu(value: Any, text: str) -> None:
    assert json.encode([value, "é"]) == f'[{text},"\\u00e9"]'.encode()
    assert json.decode(text.encode()) == value


def test_dates_that_other_languages_wrote_are_read() -> None:
    assert json.decode(b'{"__type__":"datetime","__value__":"2026-01-01T00:00:00Z"}') == datetime(
        2026, 1, 1, tzinfo=timezone.utc
    )
    assert json.decode(b'{"__type__":"date","__value__":"2026-01-01T00:00:00"}') == date(2026, 1, 1)


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**100, -(10**4000)])
def test_integers_beyond_64_bits_are_exact(number: int) -> None:
    data = json.encode({"n": number})
    assert data == b'{"n":%d}' % number
    assert json.decode(data) == {"n": number}


def test_floats_that_look_long_are_read_as_floats() -> None:
    assert json.decode(b"[12345678901234567890.0, 1e30]") == [12345678901234567890.0, 1e30]


@pytest.mark.parametrize("value", [[10**4300], {"n": -(10**5000)}])
def test_integers_of_more_than_4300_digits_are_refused(value: Any) -> None:
    with pytest.raises(EncodeError, match="4300"):
        json.encode(value)


def test_hostile_numbers_are_refused_when_read() -> None:
    with pytest.raises(DecodeError, match="4300 digits"):
        json.decode(b"9" * 6000)
    for text in (b"nan", b"[Inf]", b"-NaN", b"[1e4e4]"):
        with pytest.raises(DecodeError, match="not JSON"):
            json.decode(text)


@pytest.mark.parametrize(
    "text", [b"NaN", b"[Infinity, -Infinity]", b"[1e400, -1e999]", rb'{"v": ["\\udce9", NaN]}', rb'"\\ud83d\\u0041"']
)
def test_what_only_the_json_module_reads_is_read_as_kombu_reads_it(text: bytes) -> None:
    kombu_json = pytest.importorskip("kombu.utils.json")
    value = kombu_json.loads(text)
    assert repr(json.decode(text)) == repr(value)
    assert json.encode_loosely(value).decode() == kombu_json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (float("nan"), "value is nan"),
        ([1, float("inf")], r"value\[1\] is inf"),
        ({"a": [{}, ({"b": -float("inf")},)]}, r"value\['a'\]\[1\]\[0\]\['b'\] is -inf"),
        ([b"tagged", [0, float("nan")], float("inf")], r"value\[1\]\[1\] is nan"),
    ],
)
def test_numbers_that_are_none_are_refused_with_their_place_when_written(value: Any, place: str) -> None:
    with pytest.raises(EncodeError, match="no JSON form: " + place):
        json.encode(value)


def test_the_place_of_an_odd_number_is_looked_for_in_a_value_that_holds_itself() -> None:
    loop: list[Any] = []
    loop += [loop, loop, {"loop": loop}]
    assert json.place_of_odd_number(loop) is None
    with pytest.raises(EncodeError, match="Circular"):
        json.encode(loop)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_is_bounded_both_ways() -> None:
    assert json.decode(json.encode(nested(512))) == nested(512)
    for depth in (513, 5_000):
        with pytest.raises(EncodeError, match="deep"):
            json.encode(nested(depth))
    with pytest.raises(DecodeError, match="512 levels"):
        json.decode(b"[" * 100_000 + b"]" * 100_000)


def test_a_cycle_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(EncodeError, match="Circular"):
        json.encode(loop)


def test_keys_that_are_not_text_become_text_as_in_the_json_module() -> None:
    value = {1: "a", None: "b", False: "c", 1.5: "d"}
    assert json.decode(json.encode(value)) == stdlib_json.loads(stdlib_json.dumps(value))
    with pytest.raises(EncodeError, match="keys must be"):
        json.encode({(1, 2): 3})


def test_of_duplicate_keys_the_last_one_wins() -> None:
    assert json.decode(b'{"a": 1, "a": 2}') == {"a": 2}
    assert json.decode(b'{"a": 12345678901234567890, "a": 2}') == {"a": 2}


def test_a_lone_surrogate_goes_there_and_back() -> None:
    assert json.encode(["\ud800", 1]) == b'["\\ud800",1]'
    assert json.decode(b'["\\ud800",1]') == ["\ud800", 1]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"nul", b"\xff", b'"\xed\xa0\x80"', b"[1,]", b"\xef\xbb\xbf[]", b"[1] x", b"'a'"]
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not JSON"):
        json.decode(data)


@pytest.mark.parametrize(
    "value",
    [
        '{"__type__": "os.system", "__value__": "true"}',
        '{"__type__": ["datetime"], "__value__": 1}',
        '{"__type__": "datetime", "__value__": 5}',
        '{"__type__": "uuid", "__value__": {"number": 1}}',
        '{"__type__": "decimal", "__value__": "x"}',
        '{"__type__": "base64", "__value__": "abc"}',
        '{"__type__": "bytes", "__value__": null}',
    ],
)
def test_a_tag_that_means_nothing_is_refused(value: str) -> None:
    with pytest.raises(DecodeError, match="tags a value"):
        json.decode(value.encode())


def test_a_dict_that_only_looks_like_a_tag_stays_a_dict() -> None:
    value = {"__type__": "datetime", "__value__": "x", "more": 1}
    assert json.decode(json.encode(value)) == value


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Speaks:
    def __json__(self) -> Any:
        return {"spoken": [1, date(2026, 1, 1)]}


def test_a_class_can_be_registered_with_and_without_a_tag() -> None:
    with pytest.raises(EncodeError, match=r"no JSON form for .*Point.*register_type"):
        json.encode(Point(1))
    json.register_type(Point, "point", lambda point: [point.x], lambda values: Point(values[0]))
    try:
        assert json.encode(Point(3)) == b'{"__type__":"point","__value__":[3]}'
        assert json.decode(json.encode([Point(3)]))[0].x == 3
        json.register_type(Point, None, lambda point: point.x)
        assert json.encode([Point(3)]) == b"[3]"
    finally:
        del json._writers[Point], json._readers["point"]


class Suit(Enum):
    HEARTS = "h"


@dataclass
class Pair:
    x: int


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (Suit.HEARTS, "use its .value"),
        (Path("/a"), "use str(...)"),
        (timedelta(1), "use its .total_seconds()"),
        ({1}, "use list(...) or sorted(...)"),
        (Pair(1), "use dataclasses.asdict(...)"),
        (array("i", [1]), "use its .tolist()"),
        (object(), "use plain values"),
    ],
)
def test_a_value_without_a_form_is_refused_with_the_plain_one_to_use(value: Any, remedy: str) -> None:
    with pytest.raises(EncodeError, match=re.escape(f"; {remedy}, or teach")):
        json.encode([value])


def test_an_object_may_say_its_json_itself() -> None:
    assert json.encode(Speaks()) == b'{"spoken":[1,{"__type__":"date","__value__":"2026-01-01"}]}'


# --- short_repr -------------------------------------------------------------------------------------------------------


class BadRepr:
    def __repr__(self) -> str:
        raise ValueError("no")


class OddRepr:
    def __repr__(self) -> str:
        return "\ud800"


@pytest.mark.parametrize(
    "value",
    [
        (),
        (1,),
        (1, "two", None, 2.5, True),
        {"a": 1},
        {},
        [1, (2,)],
        (b"x",),
        {3},
        frozenset({4}),
        set(),
        ((1,), {"k": [2]}),
    ],
)
def test_a_short_value_is_shown_as_it_is(value: Any) -> None:
    assert short_repr(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [("x" * 10**6,), list(range(10**5)), {str(i): i for i in range(10**4)}, ("\U0010ffff" * 64,) * 8, b"y" * 10**6],
)
def test_a_long_value_is_cut(value: Any) -> None:
    text = short_repr(value)
    assert len(text) <= 1024 + 3
    assert text.endswith("...")
    assert text[:20] == repr(value)[:20]


def test_what_cannot_be_shown_is_named() -> None:
    assert short_repr([BadRepr()]) == "[<BadRepr: no repr, ValueError>]"
    assert short_repr(OddRepr()).isascii()
    assert short_repr((10**5000,)) == "(<int: no repr, ValueError>,)"


def test_depth_is_cut_at_three_levels() -> None:
    assert short_repr([[[[1]]]]) == "[[[[...]]]]"
    assert short_repr(nested(100_000), 50).count("[") == 4


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_codec_is_found_by_name_and_by_content_type() -> None:
    assert codecs.get("json") is codecs.get("application/json") is json
    assert codecs.get("pickle").content_type == "application/x-python-serialize"


def test_an_unknown_serializer_is_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown serializer 'xml'; known: .*json"):
        codecs.get("xml")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "fastq.codecs.yaml", raising=False)
    monkeypatch.setattr(codecs, "_codecs", {})
    with pytest.raises(SettingsError, match=r"needs the library 'yaml': pip install PyYAML"):
        codecs.get("yaml")


def test_accept_takes_names_and_content_types_and_imports_nothing() -> None:
    accept = codecs.accepted(["json", "yaml", "application/x-custom"])
    assert accept == {"application/json", "application/x-yaml", "application/x-custom"}


def test_a_content_type_that_is_not_accepted_is_refused_before_it_is_decoded() -> None:
    gadget = b"cbuiltins\nexit\n(tR."
    with pytest.raises(ContentDisallowed, match="accept_content"):
        codecs.decode(gadget, "application/x-python-serialize", "binary", codecs.accepted(["json"]))


def test_a_body_in_another_charset_is_read() -> None:
    accept = codecs.accepted(["json"])
    assert codecs.decode('["é"]'.encode("latin-1"), "application/json", "latin-1", accept) == ["é"]
    assert codecs.decode(b"[1]", "application/json", None, accept) == [1]
    for charset in ("UTF-8", "utf_8", "US-ASCII", "binary", "ascii-8bit", "ISO-8859-1", "windows-1252", ""):
        assert codecs.decode(b"[1]", "application/json", charset, accept) == [1]
    for charset in ("utf-16", "UTF-16LE", "utf_16_be", "utf-32"):
        assert codecs.decode("[1]".encode(charset), "application/json", charset, accept) == [1]
    with pytest.raises(DecodeError, match="cannot read the body"):
        codecs.decode(b"\x00", "application/json", "utf-16", accept)
    for charset in ("no-such-charset", "rot13", "punycode", "utf-7", "\0", "x" * 1000):
        with pytest.raises(EncodingDisallowed, match="is not read"):
            codecs.decode(b"[1]", "application/json", charset, accept)
    with pytest.raises(EncodingDisallowed, match="is not read"):
        codecs.decode(b"[1]", "application/json", b"\xff", accept)


class Shout:
    name = "shout"
    content_type = "text/x-shout"
    content_encoding = "utf-8"

    def encode(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def decode(self, data: bytes) -> Any:
        return data.decode().lower()


def test_a_codec_of_the_user_is_found_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_codecs", {})
    codecs.register(Shout())
    assert codecs.get("shout").encode("a") == b"A"
    assert codecs.decode(b"A", "text/x-shout", "utf-8", codecs.accepted(["shout"])) == "a"


@pytest.mark.parametrize("name", ["pickle", "yaml", "msgpack"])
def test_a_message_body_goes_there_and_back(name: str) -> None:
    if name != "pickle":
        pytest.importorskip(name)
    codec = codecs.get(name)
    back = codec.decode(codec.encode(([1, "é"], {"k": [None, 2.5]}, {"callbacks": None})))
    assert [list(back[0]), *back[1:]] == [[1, "é"], {"k": [None, 2.5]}, {"callbacks": None}]


@pytest.mark.parametrize("name", ["pickle", "yaml", "msgpack"])
def test_what_a_codec_cannot_write_or_read_is_a_clear_error(name: str) -> None:
    if name != "pickle":
        pytest.importorskip(name)
    codec = codecs.get(name)
    with pytest.raises(EncodeError):
        codec.encode(lambda: None)
    for data in (b"\xc1", b"\x80\x99", b"!!python/object/apply:os.system ['true']", b"[" * 3000):
        with pytest.raises(DecodeError):
            codec.decode(data)


# --- compression ------------------------------------------------------------------------------------------------------

TEXT = b"a message body " * 1000
STANDARD = ["zlib", "gzip", "bzip2", "bzip", "lzma", "xz"]


def available(name: str) -> bool:
    try:
        compression.content_type(name)
    except EncodeError:
        return False
    return True


def skip_unless_available(name: str) -> None:
    if not available(name):
        pytest.skip(f"the library for {name} is not installed")


@pytest.mark.parametrize("name", [*STANDARD, "zstd", "brotli"])
def test_a_body_is_compressed_and_read_by_name_and_by_content_type(name: str) -> None:
    skip_unless_available(name)
    packed = compression.compress(TEXT, name)
    assert len(packed) < len(TEXT) / 10
    assert compression.decompress(packed, name) == TEXT
    assert compression.decompress(packed, compression.content_type(name)) == TEXT
    assert compression.decompress(compression.compress(b"", name), name) == b""


@pytest.mark.parametrize("name", ["zlib", "bzip2", "lzma", "zstd", "brotli"])
def test_a_stream_that_is_cut_off_or_followed_by_bytes_is_refused(name: str) -> None:
    skip_unless_available(name)
    packed = compression.compress(TEXT, name)
    for end in (0, 1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(DecodeError):
            compression.decompress(packed[:end], name)
    with pytest.raises(DecodeError):
        compression.decompress(packed + b"more", name)
    with pytest.raises(DecodeError):
        compression.decompress(b"this is not compressed at all", name)


def test_the_content_types_are_those_of_kombu_and_real_gzip_files_are_read() -> None:
    assert compression.content_type("gzip") == compression.content_type("zlib") == "application/x-gzip"
    assert compression.content_type("bzip2") == "application/x-bz2"
    assert compression.content_type("xz") == "application/x-lzma"
    assert zlib.decompress(compression.compress(TEXT, "gzip")) == TEXT
    assert compression.decompress(gzip.compress(TEXT), "application/x-gzip") == TEXT
    assert compression.decompress(bz2.compress(TEXT), "application/x-bz2") == TEXT
    assert compression.decompress(lzma.compress(TEXT), "application/x-lzma") == TEXT


@pytest.mark.parametrize("name", ["no-such", 5, ["zlib"], None, "x" * 500])
def test_an_unknown_compression_is_refused_with_the_known_ones(name: Any) -> None:
    with pytest.raises(DecodeError, match="compression"):
        compression.decompress(b"x", name)


def test_the_bound_on_what_comes_out_depends_on_what_came_in() -> None:
    repetitive = zlib.compress(bytes(8 * 1024 * 1024))
    assert len(compression.decompress(repetitive, "zlib")) == 8 * 1024 * 1024
    with pytest.raises(DecodeError, match="decompression bomb"):
        compression.decompress(zlib.compress(bytes(8 * 1024 * 1024 + 1)), "zlib")
    assert len(compression.decompress(zlib.compress(TEXT), "zlib", max_bytes=len(TEXT))) == len(TEXT)
    with pytest.raises(DecodeError, match="decompression bomb"):
        compression.decompress(zlib.compress(TEXT), "zlib", max_bytes=len(TEXT) - 1)


BOMB = """
import resource, sys
from fastq.codecs import compression
from fastq.errors import DecodeError
name = sys.argv[1]
packed = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    compression.decompress(packed, name)
except DecodeError as error:
    assert "bomb" in str(error), error
else:
    raise SystemExit("the bomb was let through")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def make_bomb(name: str, mib: int) -> bytes:
    piece = bytes(1024 * 1024)
    if name == "zlib":
        packer: Any = zlib.compressobj(9)
    elif name == "bzip2":
        packer = bz2.BZ2Compressor(1)
    elif name == "lzma":
        packer = lzma.LZMACompressor(preset=0)
    elif name == "brotli":  # at its default it takes 13 times as long
        return bytes(importlib.import_module("brotli").compress(piece * mib, quality=5))
    else:
        return compression.compress(piece * mib, name)
    return b"".join([packer.compress(piece) for _ in range(mib)]) + bytes(packer.flush())


@pytest.mark.parametrize("name", ["zlib", "bzip2", "lzma", "zstd", "brotli"])
def test_a_bomb_takes_less_than_80_mib(name: str) -> None:
    skip_unless_available(name)
    assert resource.RUSAGE_SELF == 0
    packed = make_bomb(name, 256)
    done = subprocess.run([sys.executable, "-c", BOMB, name], input=packed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 80 * 1024


# --- stored states ----------------------------------------------------------------------------------------------------


def test_a_success_has_celerys_layout() -> None:
    stored = stdlib_json.loads(meta.encode_meta("id-1", "SUCCESS", {"sum": 3}))
    done = datetime.fromisoformat(stored.pop("date_done"))
    assert done.tzinfo is not None
    assert abs(datetime.now(timezone.utc) - done) < timedelta(seconds=5)
    assert stored == {
        "status": "SUCCESS",
        "result": {"sum": 3},
        "traceback": None,
        "children": [],
        "task_id": "id-1",
    }


def test_a_failure_has_celerys_layout() -> None:
    data = meta.encode_meta(
        "id-1",
        "FAILURE",
        ValueError("bad", 3),
        traceback="Traceback …",
        children=["child"],
        group_id="g",
        parent_id="p",
        extended={"name": "t", "args": [1], "retries": 0, "kwargs": {"f": object}},
    )
    stored = meta.decode_meta(data)
    assert list(stored)[:2] == ["status", "result"]
    assert stored["result"] == {"exc_type": "ValueError", "exc_message": ["bad", 3], "exc_module": "builtins"}
    assert stored["traceback"] == "Traceback …"
    assert stored["children"] == [[["child", None], None]]
    assert (stored["group_id"], stored["parent_id"], stored["name"], stored["args"]) == ("g", "p", "t", [1])
    assert stored["kwargs"] == repr({"f": object})


def test_a_state_of_the_users_has_no_date_done() -> None:
    stored = meta.decode_meta(meta.encode_meta('i"d', 'PRO"GRESS', {"done": 5}))
    assert (stored["status"], stored["result"], stored["date_done"]) == ('PRO"GRESS', {"done": 5}, None)
    assert stored["task_id"] == 'i"d'


def test_a_value_without_a_json_form_is_an_encode_error() -> None:
    with pytest.raises(EncodeError):
        meta.encode_meta("id", "SUCCESS", object())
    with pytest.raises(EncodeError):
        meta.encode_meta("id", "SUCCESS", ValueError("an exception as a value"))


class Explosive:
    def __json__(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize("argument", [object(), Explosive(), BadRepr(), {1, 2}, float("nan"), [10**5000], nested(3000)])
def test_any_exception_can_be_stored(argument: Any) -> None:
    stored = stdlib_json.loads(meta.encode_exception(ValueError("kept", argument)))
    assert stored["exc_message"][0] == "kept"
    assert isinstance(stored["exc_message"][1], str)


@pytest.mark.parametrize("data", [b"[]", b"null", b'{"result": 1}', b'{"status": 5}', b"{"])
def test_a_stored_state_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        meta.decode_meta(data)


# --- exceptions of stored results -------------------------------------------------------------------------------------

touched: list[Any] = []


class PlainError(Exception):
    class InnerError(Exception):
        pass


class WithConstructor(Exception):
    def __init__(self, *args: Any) -> None:
        touched.append(args)
        super().__init__(*args)


class WithNew(Exception):
    def __new__(cls, *args: Any) -> WithNew:
        touched.append(args)
        return super().__new__(cls, *args)


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        touched.append(args)
        return super().__call__(*args, **kwargs)


class WithMeta(Exception, metaclass=Meta):
    pass


def stored_exception(cls: type[BaseException], *args: Any) -> dict[str, Any]:
    return {"exc_type": cls.__qualname__, "exc_message": list(args), "exc_module": cls.__module__}


@pytest.mark.parametrize("cls", [ValueError, KeyError, OSError, ZeroDivisionError, SoftTimeLimitExceeded, PlainError])
def test_known_exceptions_are_rebuilt(cls: type[Exception]) -> None:
    error = meta.rebuild_exception(stored_exception(cls, "a", 2))
    assert isinstance(error, cls)
    assert error.args == ("a", 2)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "/a"),
        FileExistsError(17, "File exists", "/a", None, b"/b"),
        PermissionError(13, "Permission denied"),
        OSError("text"),
    ],
)
def test_an_os_error_keeps_its_file_names(error: OSError) -> None:
    again = meta.rebuild_exception(json.decode(meta.encode_exception(error)))
    assert isinstance(again, type(error))
    assert (again.args, again.filename, again.filename2) == (error.args, error.filename, error.filename2)  # type: ignore[attr-defined]
    assert str(again) == str(error)
    by_path = meta.rebuild_exception(json.decode(meta.encode_exception(FileNotFoundError(2, "No", Path("/p")))))
    assert by_path.filename == "/p"  # type: ignore[attr-defined]


def test_a_nested_class_is_rebuilt() -> None:
    assert type(meta.rebuild_exception(stored_exception(PlainError.InnerError, 1))) is PlainError.InnerError


@pytest.mark.parametrize("cls", [WithConstructor, WithNew, WithMeta])
def test_a_constructor_of_the_users_runs_only_when_the_task_names_the_class(cls: type[Exception]) -> None:
    touched.clear()
    error = meta.rebuild_exception(stored_exception(cls, "x"))
    assert touched == []
    assert isinstance(error, RemoteError)
    assert type(error).__name__ == cls.__name__
    assert error.args == ("x",)
    assert type(meta.rebuild_exception(stored_exception(cls, "x"), [cls])) is cls
    assert touched != []


@pytest.mark.parametrize(
    "stored",
    [
        {"exc_type": "system", "exc_message": ["touch /tmp/owned"], "exc_module": "os"},
        {"exc_type": "eval", "exc_message": ["touched.append(1)"], "exc_module": "builtins"},
        {"exc_type": "object", "exc_message": [], "exc_module": "builtins"},
        {"exc_type": "SystemExit", "exc_message": [1], "exc_module": "builtins"},
        {"exc_type": "KeyboardInterrupt", "exc_message": [], "exc_module": "builtins"},
        {"exc_type": "ValueError.__init__.__globals__", "exc_message": [], "exc_module": "builtins"},
        {"exc_type": "__class__", "exc_message": [], "exc_module": "builtins"},
        {"exc_type": "Popen", "exc_message": [["true"]], "exc_module": "subprocess"},
        {"exc_type": "UnicodeDecodeError", "exc_message": ["wrong arguments"], "exc_module": "builtins"},
        {"exc_type": "", "exc_message": [], "exc_module": ""},
        {"exc_type": "no name\0", "exc_message": "text", "exc_module": 5},
        {"exc_type": "X" * 10_000, "exc_message": {"a": 1}, "exc_module": None},
        {"exc_message": ["no type"]},
        {"exc_type": 5},
        "only text",
        None,
        [],
    ],
)
def test_gadgets_become_remote_errors(stored: Any) -> None:
    touched.clear()
    assert isinstance(meta.rebuild_exception(stored), RemoteError)
    assert touched == []


def test_nothing_is_imported_because_a_result_says_so() -> None:
    imported: list[str] = []
    sys.addaudithook(lambda event, args: imported.append(args[0]) if event == "import" else None)
    for module in ("antigravity", "this", "xml.dom.pulldom", "fastq.no_such", "tests.no_such"):
        assert isinstance(
            meta.rebuild_exception({"exc_type": "Error", "exc_message": [], "exc_module": module}), RemoteError
        )
    assert imported == []


def test_a_lazy_module_is_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(type(sys)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            touched.append(name)
            return super().__getattribute__(name)

        def __getattr__(self, name: str) -> Any:
            touched.append(name)
            return ValueError

    touched.clear()
    monkeypatch.setitem(sys.modules, "lazy_module", Lazy("lazy_module"))
    touched.clear()
    assert isinstance(meta.rebuild_exception({"exc_type": "E", "exc_module": "lazy_module"}), RemoteError)
    assert touched == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{}", {}),
        (b' {"a": [1, {"b": "}]"}], "c" : "x\\"y" } ', {b"a": b'[1, {"b": "}]"}]', b"c": b'"x\\"y"'}),
        (b'{"a":1,"a":2}', {b"a": b"2"}),
        (b'{"a":,"b":}', {b"a": b"", b"b": b""}),
        *(
            (text, None)
            for text in (b"", b"{", b"[]", b'{"a"}', b'{"a": 1', b'{"a": 1]', b'{"a": "x}', b'{"a": 1} 2', b'{"a": 1,}')
        ),
    ],
)
def test_the_members_of_an_object_are_found_without_reading_them(text: bytes, expected: object) -> None:
    assert members(text) == expected


def test_yaml_with_aliases_is_read_unless_they_multiply() -> None:
    codec = codecs.get("yaml")
    shared = ["x" * 1000]
    assert codec.decode(codec.encode([shared] * 100)) == [shared] * 100
    for text in (b"&a [*a]", b"- &a [x]\n" + b"- &b [*a, *a]\n" * 2 + b"- [!!int '']", b"- 1:1" + b":1" * 100):
        with pytest.raises(DecodeError):
            codec.decode(text)
    assert codec.decode(b"1:30:00") == 5400
