"""The JSON envelope, against what kombu writes and reads itself."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import hiredis
import pytest
from kombu import Connection
from kombu.transport.virtual import Message as KombuMessage

from fastq.errors import DecodeError, EncodeError
from fastq.wire.head import scan
from fastq.wire.kombu import decode_claim, decode_envelope, encode_envelope, encode_push
from fastq.wire.message import encode_properties, encode_task
from fastq.wire.properties import decode_properties

TASK_ID = "6c0d5e0c-4a6d-4a5e-9d0f-1f3b7f7a0001"
TAG = "0b7d4a35-6c3c-4d1b-8f43-0d6a7a9f0002"
BODY = b'[[1, "\\u00fc"], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


def envelope(**options: Any) -> dict[str, Any]:
    """Return a whole envelope as kombu would hold it, changed by the options; None takes a part away."""
    parts = json.loads(encode_envelope("", "celery", encode_task("tests.task", TASK_ID, BODY).props, BODY, TAG))
    changed = {**parts, **{name.replace("_", "-"): value for name, value in options.items()}}
    return {name: value for name, value in changed.items() if value is not ...}


class Channel:
    """Catches what a kombu producer sends, before it is put into a list."""

    def __init__(self) -> None:
        self.connection = Connection("memory://")
        self.channel = self.connection.channel()
        self.sent: list[bytes] = []
        self.channel._put = self._put

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        from kombu.utils.json import dumps

        self.sent.append(dumps(message).encode())

    def send(self, body: bytes, properties: dict[str, Any], exchange: str, routing_key: str) -> bytes:
        properties = dict(properties)
        message = self.channel.prepare_message(
            body.decode(),
            properties.pop("priority", None),
            properties.pop("content_type", None),
            properties.pop("content_encoding", None),
            properties.pop("headers", None),
            properties,
        )
        with patch.object(type(self.channel), "_next_delivery_tag", lambda _: TAG):
            self.channel.basic_publish(message, "", routing_key)
        assert exchange == ""
        return self.sent.pop()


@pytest.fixture(scope="module")
def kombu_channel() -> Iterator[Channel]:
    channel = Channel()
    yield channel
    channel.connection.release()


HEADERS: list[dict[str, Any]] = [
    {},
    {"text": 'ü \x7f \U0001f600 " \\ \n \t \r \b \f \x00', "": "empty key", "ключ": "значение"},
    {"whole": 0, "least": -(1 << 63), "most": (1 << 63) - 1, "small": -1, "edge": 1 << 31},
    {
        "half": 0.5,
        "tiny": 5e-324,
        "huge": 1.7976931348623157e308,
        "third": 1 / 3,
        "e": 1e16,
        "whole": 2.0,
        "minus": -0.0,
    },
    {"yes": True, "no": False, "nothing": None, "list": [], "table": {}, "nested": {"a": [1, [None, {"b": []}]]}},
    {"not a number": math.inf, "least": -math.inf},
]


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_headers_are_written_as_kombu_writes_them(headers: dict[str, Any], kombu_channel: Channel) -> None:
    properties = {
        "content_type": "application/json", "content_encoding": "utf-8", "headers": headers,
        "correlation_id": TASK_ID, "reply_to": "here", "delivery_mode": 2, "priority": 3,
    }  # fmt: skip
    theirs = {name: properties[name] for name in (*list(properties)[3:5], "delivery_mode", "priority")}
    expected = kombu_channel.send(BODY, {**properties, **theirs}, "", "celery")
    ours = encode_envelope("", "celery", encode_properties(properties), BODY, TAG)
    assert ours == expected


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, {}),
        ({"priority": 9, "reply_to": "abc"}, {}),
        ({"expires": 4102444800.0, "eta": 4102444000.0, "shadow": "other"}, {}),
        ({"headers": {"trace": "x", "n": [1, 2.5]}, "compression": "application/x-gzip", "time_limit": 5}, {}),
        ({"content_type": "application/x-python-serialize", "content_encoding": "binary", "delivery_mode": 1}, {}),
    ],
)
def test_a_task_is_written_as_kombu_writes_it(
    options: dict[str, Any], extra: dict[str, Any], kombu_channel: Channel
) -> None:
    message = encode_task("tests.task", TASK_ID, BODY, **options)
    found = decode_properties(message.props)
    properties = {name: found[name] for name in ("content_type", "content_encoding", "headers")}
    # Celery's order: correlation_id, reply_to, delivery_mode, expiration.
    properties |= {"correlation_id": TASK_ID, "reply_to": found.get("reply_to", "")}
    properties |= {"delivery_mode": found["delivery_mode"]}
    properties |= {"expiration": found["expiration"]} if "expiration" in found else {}
    properties |= {"priority": found["priority"]}
    expected = kombu_channel.send(BODY, properties, "", "celery")
    assert encode_envelope("", "celery", message.props, BODY, TAG) == expected


def test_each_character_is_escaped_wherever_it_stands() -> None:
    characters = [*map(chr, range(1, 0x100)), "\u2028", "\U0001f600"]
    for before in range(18):
        texts = ["x" * before + character + "y" * 9 for character in characters]
        written = encode_envelope("", "q", encode_properties({"headers": {"h": texts}}), b"", TAG)
        assert json.dumps(texts).encode() in written


def test_integers_are_written_as_json_writes_them() -> None:
    numbers = [0, 1, -1, 9, 10, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63)]
    written = encode_envelope("", "q", encode_properties({"headers": {"h": numbers}}), b"", TAG)
    assert json.dumps(numbers).encode() in written


@pytest.mark.parametrize("place", ["", "celery", "grün\x06\x163"])
@pytest.mark.parametrize("body", [b"", BODY, b"x" * 3_000_000])
def test_a_message_is_packed_as_the_library_packs_the_command(place: str, body: bytes) -> None:
    message = encode_task("tests.task", TASK_ID, body)
    envelope = encode_envelope(message.exchange, message.routing_key, message.props, body, TAG)
    assert encode_push(place, message, TAG) == hiredis.pack_command(("LPUSH", place, envelope))  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [b"", b"\x00\xff" * 1000, b"a", b"ab", BODY])
def test_kombu_reads_what_is_written(body: bytes, kombu_channel: Channel) -> None:
    props = encode_task("tests.task", TASK_ID, body, headers={"x": 1.5}, priority=4).props
    message = KombuMessage(json.loads(encode_envelope("ex", "key", props, body, TAG)), channel=kombu_channel.channel)
    assert bytes(message.body) == body
    assert message.delivery_tag == TAG
    assert message.headers["task"] == "tests.task"
    assert message.headers["x"] == 1.5
    assert message.properties["priority"] == 4
    assert message.delivery_info["exchange"] == "ex"
    assert message.delivery_info["routing_key"] == "key"


@pytest.mark.parametrize("headers", [*HEADERS[:5], None])
def test_what_is_written_is_read_as_it_was(headers: dict[str, Any] | None) -> None:
    message = encode_task("tests.task", TASK_ID, BODY, headers=headers, expires=4102444800.0, priority=7, reply_to="r")
    assert decode_envelope(encode_envelope("", "celery", message.props, BODY, TAG)) == (message.props, BODY, 1)


def test_every_property_survives() -> None:
    properties = {
        "content_type": "text/plain", "headers": {}, "delivery_mode": 1, "priority": 0, "correlation_id": "c",
        "reply_to": "r", "expiration": "5", "message_id": "m", "type": "t", "user_id": "u", "app_id": "a",
        "cluster_id": "k",
    }  # fmt: skip
    props, _, _ = decode_envelope(encode_envelope("", "q", encode_properties(properties), b"", TAG))
    assert decode_properties(props) == properties


def test_a_timestamp_is_written() -> None:
    written = json.loads(encode_envelope("", "q", encode_properties({"timestamp": 1234567890}), b"", TAG))
    assert written["properties"]["timestamp"] == 1234567890


@pytest.mark.parametrize("value", [b"bytes", [b"bytes"], {"a": {"b": b"bytes"}}])
def test_a_header_without_a_form_in_json_is_refused(value: object) -> None:
    with pytest.raises(EncodeError, match="'x' has no form"):
        encode_envelope("", "q", encode_properties({"headers": {"h": value}}), b"", TAG)


def test_properties_that_are_cut_short_are_refused_or_shorter_but_never_read_beyond() -> None:
    props = encode_task("tests.task", TASK_ID, BODY, headers={"f": 1.5, "n": {"a": [1, "x"]}}, reply_to="r").props
    for length in range(len(props)):
        with pytest.raises(EncodeError, match="cut short"):
            encode_envelope("", "q", props[:length], BODY, TAG)


def test_lengths_that_lie_are_refused() -> None:
    table = b"\x01aS" + struct.pack(">I", 1000) + b"x"
    props = struct.pack(">HI", 1 << 13, len(table)) + table
    with pytest.raises(EncodeError, match="cut short"):
        encode_envelope("", "q", props, b"", TAG)


def test_headers_that_are_no_text_are_refused() -> None:
    table = b"\x01aS" + struct.pack(">I", 1) + b"\xff"
    with pytest.raises(EncodeError, match="UTF-8"):
        encode_envelope("", "q", struct.pack(">HI", 1 << 13, len(table)) + table, b"", TAG)


def test_headers_nested_too_deep_are_refused() -> None:
    table = b""
    for _ in range(40):
        table = b"\x01aF" + struct.pack(">I", len(table)) + table
    with pytest.raises(EncodeError, match="deeper than 32"):
        encode_envelope("", "q", struct.pack(">HI", 1 << 13, len(table)) + table, b"", TAG)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(**options: Any) -> tuple[bytes, bytes, int]:
    return decode_envelope(json.dumps(envelope(**options)).encode())


ODD_HEADERS: list[Any] = [float("nan"), [float("inf"), -float("inf")], "caf\udce9", {"\ud800": "\udfff"}]


@pytest.mark.parametrize("value", ODD_HEADERS, ids=range(len(ODD_HEADERS)))
def test_headers_that_only_the_json_module_reads_come_back_as_kombu_reads_them(value: Any) -> None:
    raw = json.dumps(envelope(headers={"id": "i", "task": "t", "x": value})).encode()
    props, body, _ = decode_envelope(raw)
    assert (scan(props)["problem"], body) == ("fine", BODY)
    assert repr(decode_properties(props)["headers"]["x"]) == repr(json.loads(raw)["headers"]["x"])
    again = json.loads(encode_envelope("", "celery", props, body, TAG))
    assert repr(again["headers"]["x"]) == repr(value)


def test_what_the_slow_reader_takes_is_bounded_whatever_the_message_says() -> None:
    large = base64.b64encode(b"x" * 3_000_000).decode()
    assert read(body=large, headers={"x": float("nan")})[1] == b"x" * 3_000_000
    assert read(headers={"x": "\ud800", "body": "another"}, body=large)[1] == b"x" * 3_000_000
    hostile = [
        {"headers": {"x": [0] * 1_000_000, "y": float("nan")}},
        {"body": "a\ud800" + large},
        {"properties": {"body": large, "x": [float("nan")] * 500_000}, "body": ...},
    ]
    for options in hostile:
        start = time.monotonic()
        with pytest.raises(DecodeError):
            read(**options)
        # Beside its making a message costs what orjson takes to its first fault, and a megabyte of json.
        assert time.monotonic() - start < 2
    for raw in (b'{"x": NaN, "y": ' + b"[" * 100_000, b'{"x": NaN, "y": ' + b"9" * 6000 + b"}"):
        with pytest.raises(DecodeError):
            decode_envelope(raw)


WRONG_PARTS: list[dict[str, Any]] = [
    *({"body": 5}, {"body": ...}, {"body": ["a"]}, {"body": "ü"}, {"body": "abc"}),
    *({"headers": []}, {"headers": "x"}, {"headers": {"k" * 256: 1}}),
    *({"properties": []}, {"properties": 1}, {"properties": {"body_encoding": "rot13"}}),
    *({"content_type": 5}, {"content_encoding": {}}),
]
MALFORMED: list[bytes] = [
    *(b"", b"{", b"null", b"5", b"[]", b'"text"', b"\xff\xfe", b"{}", b"[" * 5000),
    *(b'{"body": 1}', b'{"body": null}', b'{"body": "!"}\x00'),
    *(json.dumps(envelope(**parts)).encode() for parts in WRONG_PARTS),
]


@pytest.mark.parametrize("raw", MALFORMED, ids=range(len(MALFORMED)))
def test_what_kombu_does_not_write_is_refused_with_a_reason(raw: bytes) -> None:
    with pytest.raises(DecodeError, match=r"message|unknown body_encoding"):
        decode_envelope(raw)


def test_headers_nested_too_deep_are_not_read() -> None:
    nested: Any = 1
    for _ in range(40):
        nested = [nested]
    with pytest.raises(DecodeError, match="32 levels"):
        read(headers={"n": nested})


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"body": "plain ü", "properties": {}}, "plain ü".encode()),
        ({"body": "plain", "properties": {"body_encoding": "utf-8"}}, b"plain"),
        ({"body": "", "properties": None}, b""),
        ({"body": "YWI=", "headers": None}, b"ab"),
    ],
)
def test_other_forms_of_a_body_are_read(options: dict[str, Any], body: bytes) -> None:
    assert read(**options)[1] == body


@pytest.mark.parametrize(
    "properties",
    [
        {"priority": "high", "delivery_mode": [], "reply_to": 5, "correlation_id": {}, "expiration": 1.5},
        {"priority": -5, "delivery_mode": 300, "reply_to": "x" * 256, "correlation_id": "ü" * 200},
    ],
)
def test_properties_of_wrong_types_do_not_matter(properties: dict[str, Any]) -> None:
    props, body, _ = read(properties={"body_encoding": "base64", **properties})
    assert body == BODY
    assert scan(props)["problem"] == "fine"
    assert "reply_to" not in decode_properties(props)


def test_a_byte_of_priority_is_kept_in_its_range() -> None:
    assert scan(read(properties={"body_encoding": "base64", "priority": 1000})[0])["priority"] == 255
    assert scan(read(properties={"body_encoding": "base64", "priority": -1})[0])["priority"] == 0


@pytest.mark.parametrize(
    ("headers", "deliveries"),
    [
        ({}, 1),
        ({"redelivered": True}, 2),
        ({"redelivered": False}, 1),
        ({"x-delivery-count": 3}, 4),
        ({"x-delivery-count": 3, "redelivered": True}, 4),
        ({"x-delivery-count": "3"}, 1),
        ({"x-delivery-count": 10**12}, 1),
        ({"x-delivery-count": -1}, 1),
    ],
)
def test_deliveries_are_counted(headers: dict[str, Any], deliveries: int) -> None:
    assert read(headers=headers)[2] == deliveries


def test_a_claim_becomes_rows_with_one_for_each_message() -> None:
    good = json.dumps(envelope()).encode()
    long = json.dumps(envelope(body="A" * 8000)).encode()
    rows = decode_claim([1, [good, b"\xff" * 5000], 0, [long, good]], [b"first", b"celery"], 41, 5000)
    props = encode_task("tests.task", TASK_ID, BODY).props
    assert rows == [
        (41, b"celery", props, BODY, 1),
        (42, b"celery", b"", b"\xff" * 4096, 1),
        (43, b"first", b"", long[:4096], 1),
        (44, b"first", props, BODY, 1, b"", b"celery"),
    ]


@pytest.mark.parametrize(
    ("info", "route"),
    [
        ({"exchange": "news", "routing_key": "news.\u00fc"}, (b"news", "news.\u00fc".encode())),
        ({"exchange": "celery", "routing_key": "celery"}, (b"celery", b"celery")),
        ({"exchange": "", "routing_key": "other"}, (b"", b"other")),
        ({"exchange": "", "routing_key": "celery"}, ()),
        ({"exchange": "news"}, ()),
        ({"exchange": None, "routing_key": "celery"}, ()),
        ({"exchange": "x" * 256, "routing_key": "celery"}, ()),
        (["news", "x"], ()),
        (None, ()),
    ],
)
def test_a_row_ends_in_the_route_that_the_sender_chose(info: Any, route: tuple[bytes, ...]) -> None:
    properties = {**envelope()["properties"], "delivery_info": info}
    raw = json.dumps(envelope(properties=properties)).encode()
    (row,) = decode_claim([0, [raw]], [b"celery"], 1, 100_000)
    assert row[5:] == route


def test_an_empty_claim_has_no_rows() -> None:
    assert decode_claim([], [b"celery"], 1, 1000) == []
