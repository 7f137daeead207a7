"""The AMQP codec against bytes that py-amqp 5.4.2 made, and against bytes that nobody should send."""

from __future__ import annotations

import random
import struct
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from fastq.errors import EncodeError, LocalProtocolError, RemoteProtocolError
from fastq.wire import message
from fastq.wire.amqp import (
    METHODS,
    decode_method,
    decode_properties,
    decode_table,
    encode_method,
    encode_properties,
    encode_table,
)

# Made with py-amqp 5.4.2: `from amqp.serialization import dumps; dumps(FORMAT, VALUES).hex()`, the format's letters
# in the order of the fields in the specification (B and b: the reserved short and the bits).
GOLDEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "queue.declare",
        {"queue": "celery", "durable": True, "arguments": {"x-max-priority": 10, "x-queue-type": "classic"}},
        "00000663656c657279020000002d0e782d6d61782d7072696f72697479490000000a0c782d71756575652d74797065530000"
        "0007636c6173736963",
    ),
    (
        "basic.consume",
        {"queue": "celery", "consumer_tag": "tag1", "no_ack": True},
        "00000663656c65727904746167310200000000",
    ),
    (
        "exchange.declare",
        {"exchange": "celery", "type": "direct", "durable": True},
        "00000663656c657279066469726563740200000000",
    ),
    ("queue.bind", {"queue": "q", "exchange": "e", "routing_key": "k"}, "000001710165016b0000000000"),
    (
        "exchange.bind",
        {"destination": "d", "source": "s", "routing_key": "#.k"},
        "00000164017303232e6b0000000000",
    ),
    ("basic.qos", {"prefetch_count": 40}, "00000000002800"),
    ("basic.ack", {"delivery_tag": 77, "multiple": True}, "000000000000004d01"),
    ("basic.nack", {"delivery_tag": 77, "requeue": True}, "000000000000004d02"),
    ("basic.reject", {"delivery_tag": 2**63 + 1}, "800000000000000100"),
    ("basic.publish", {"routing_key": "celery", "mandatory": True}, "0000000663656c65727901"),
    (
        "connection.start-ok",
        {
            "client_properties": {"product": "x", "capabilities": {"consumer_cancel_notify": True}},
            "mechanism": "PLAIN",
            "response": b"\0guest\0guest",
            "locale": "en_US",
        },
        "000000390770726f647563745300000001780c6361706162696c6974696573460000001916636f6e73756d65725f63616e63"
        "656c5f6e6f74696679740105504c41494e0000000c00677565737400677565737405656e5f5553",
    ),
    ("connection.tune-ok", {"channel_max": 2047, "frame_max": 131072, "heartbeat": 60}, "07ff00020000003c"),
    ("connection.open", {"virtual_host": "/"}, "012f0000"),
    ("connection.close", {"reply_code": 200, "reply_text": "bye"}, "00c80362796500000000"),
    ("channel.open", {}, "00"),
    ("channel.close-ok", {}, ""),
    ("confirm.select", {}, "00"),
    ("queue.delete", {"queue": "q", "if_unused": True, "nowait": True}, "0000017105"),
    ("basic.cancel", {"consumer_tag": "tag1"}, "047461673100"),
]

# dumps("F", [TABLE]); 64-bit numbers are type L there, which RabbitMQ and we read as l.
TABLE_HEX = (
    "00000090047465787453000000074772c3bcc39f65016e4900000007036269674c000000012a05f200036e656749fffffffd02706964"
    "400c000000000000037965737401026e6f56047768656e54000000006b0292f00570726963654402000004d2046c6973744100000011"
    "490000000153000000016141000000015603737562460000000e016b460000000704646565707400"
)
TABLE = {
    "text": "Grüße",
    "n": 7,
    "big": 5_000_000_000,
    "neg": -3,
    "pi": 3.5,
    "yes": True,
    "no": None,
    "when": datetime(2026, 11, 22, 7, 0, 0, tzinfo=timezone.utc),
    "price": Decimal("12.34"),
    "list": [1, "a", [None]],
    "sub": {"k": {"deep": False}},
}

# amqp.basic_message.Message(b"x", **PROPERTIES)._serialize_properties(), headers as application_headers.
PROPERTIES_HEX = (
    "fffc106170706c69636174696f6e2f6a736f6e057574662d380000003a047461736b5300000005742e6164640269645300000001310772"
    "65747269657349000000000974696d656c696d6974410000000656490000001e0204013101720435303030016d00000000499602d20274"
    "79056775657374036170700163"
)
PROPERTIES = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "headers": {"task": "t.add", "id": "1", "retries": 0, "timelimit": [None, 30]},
    "delivery_mode": 2,
    "priority": 4,
    "correlation_id": "1",
    "reply_to": "r",
    "expiration": "5000",
    "message_id": "m",
    "timestamp": 1234567890,
    "type": "ty",
    "user_id": "guest",
    "app_id": "app",
    "cluster_id": "c",
}


def golden_ids(case: Any) -> str | None:
    return case if isinstance(case, str) and "." in case else None


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN, ids=golden_ids)
def test_methods_are_encoded_as_py_amqp_does(name: str, fields: dict[str, Any], expected: str) -> None:
    assert encode_method(METHODS[name], **fields).hex() == expected


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN, ids=golden_ids)
def test_methods_are_decoded(name: str, fields: dict[str, Any], expected: str) -> None:
    decoded_name, decoded = decode_method(METHODS[name], bytes.fromhex(expected))
    assert decoded_name == name
    assert {key: decoded[key] for key in fields} == fields
    # What was not given is empty, zero or false.
    assert not any(value for key, value in decoded.items() if key not in fields)


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN, ids=golden_ids)
def test_arguments_cut_short_at_any_byte_are_refused(name: str, fields: dict[str, Any], expected: str) -> None:
    whole = bytes.fromhex(expected)
    for size in range(len(whole)):
        with pytest.raises(RemoteProtocolError):
            decode_method(METHODS[name], whole[:size])


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN, ids=golden_ids)
def test_bytes_behind_the_arguments_are_refused(name: str, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_method(METHODS[name], bytes.fromhex(expected) + b"\0")


def test_every_method_survives_a_round_trip() -> None:
    for name, method_id in METHODS.items():
        arguments = encode_method(method_id)
        decoded_name, fields = decode_method(method_id, arguments)
        assert decoded_name == name
        assert encode_method(method_id, **fields) == arguments


def test_the_servers_start_method_is_decoded() -> None:
    table = encode_table({"product": "RabbitMQ", "capabilities": {"publisher_confirms": True}})
    arguments = b"\x00\x09" + table + b"\0\0\0\x0ePLAIN AMQPLAIN" + b"\0\0\0\x05en_US"
    assert decode_method(METHODS["connection.start"], arguments) == (
        "connection.start",
        {
            "version_major": 0,
            "version_minor": 9,
            "server_properties": {"product": "RabbitMQ", "capabilities": {"publisher_confirms": True}},
            "mechanisms": b"PLAIN AMQPLAIN",
            "locales": b"en_US",
        },
    )


# --- tables and properties


def test_tables_of_py_amqp_are_read() -> None:
    assert decode_table(bytes.fromhex(TABLE_HEX)) == TABLE


def test_tables_are_written_as_py_amqp_does_but_for_the_letter_of_long_numbers() -> None:
    assert encode_table(TABLE).hex() == TABLE_HEX.replace("036269674c", "036269676c")


def test_properties_are_written_and_read_as_py_amqp_does() -> None:
    assert encode_properties(PROPERTIES).hex() == PROPERTIES_HEX
    assert decode_properties(bytes.fromhex(PROPERTIES_HEX)) == PROPERTIES


@pytest.mark.parametrize("name", list(PROPERTIES))
def test_a_single_property_stands_alone(name: str) -> None:
    only = {name: PROPERTIES[name]}
    assert decode_properties(encode_properties(only)) == only


def test_absent_properties_are_absent() -> None:
    assert encode_properties({"priority": None}) == b"\0\0"
    assert decode_properties(b"\0\0") == {}


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        (b"t", b"\x02", True),
        (b"b", b"\xff", -1),
        (b"B", b"\xff", 255),
        (b"s", b"\xff\xfe", -2),
        (b"u", b"\xff\xfe", 65534),
        (b"I", b"\x80\0\0\0", -(2**31)),
        (b"i", b"\x80\0\0\0", 2**31),
        (b"l", b"\xff" * 8, -1),
        (b"L", b"\xff" * 8, 2**64 - 1),
        (b"f", struct.pack(">f", 0.5), 0.5),
        (b"d", struct.pack(">d", -0.1), -0.1),
        (b"D", b"\x03\xff\xff\xff\xff", Decimal("-0.001")),
        (b"S", b"\0\0\0\x02ab", "ab"),
        (b"S", b"\0\0\0\x02\xff\xfe", b"\xff\xfe"),
        (b"x", b"\0\0\0\x02ab", b"ab"),
        (b"T", struct.pack(">Q", 253402300799), datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc)),
        (b"T", struct.pack(">Q", 253402300800), 253402300800),
        (b"T", b"\xff" * 8, 2**64 - 1),
        (b"V", b"", None),
        (b"A", b"\0\0\0\x00", []),
        (b"A", b"\0\0\0\x03VVV", [None, None, None]),
        (b"F", b"\0\0\0\0", {}),
    ],
)
def test_every_field_type_is_read(kind: bytes, raw: bytes, expected: Any) -> None:
    value = decode_table(table_of(b"\x01k" + kind + raw))["k"]
    assert value == expected
    assert type(value) is type(expected)


def test_of_equal_keys_the_later_one_wins() -> None:
    assert decode_table(table_of(b"\x01kI\0\0\0\x01\x01kI\0\0\0\x02")) == {"k": 2}


def test_keys_are_text_whatever_their_bytes() -> None:
    assert decode_table(table_of(b"\x02\xff\xfeV\x00V")) == {"\\xff\\xfe": None, "": None}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (object(), "object has no AMQP form"),
        (2**63, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (Decimal("NaN"), "no AMQP form"),
        (Decimal("1E400"), "does not fit"),
        (Decimal("12345678901"), "does not fit"),
        (datetime(1969, 1, 1, tzinfo=timezone.utc), "1970"),
        ("\ud800", "UTF-8"),
        ({"k" * 256: 1}, "limit is 255"),
        ("x" * (1 << 20), "bytes"),
        (["x" * 1000] * 2000, "bytes"),
    ],
)
def test_what_has_no_amqp_form_is_an_error_that_names_it(value: Any, problem: str) -> None:
    with pytest.raises(EncodeError, match=problem):
        encode_table({"k": value})


def test_dates_without_a_zone_are_utc() -> None:
    offset = timezone(timedelta(hours=2))
    assert encode_table({"k": datetime(2026, 1, 1)}) == encode_table({"k": datetime(2026, 1, 1, 2, tzinfo=offset)})


def test_nesting_is_limited_both_ways() -> None:
    value: Any = 1
    for _ in range(31):
        value = {"n": value}
    assert decode_table(encode_table(value)) == value
    with pytest.raises(EncodeError, match="32 deep"):
        encode_table({"n": {"n": value}})
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(EncodeError, match="32 deep"):
        encode_table(loop)


@pytest.mark.parametrize(
    ("name", "value"), [("priority", 256), ("priority", -1), ("priority", "high"), ("timestamp", 2**64)]
)
def test_numbers_that_do_not_fit_their_property_are_refused(name: str, value: object) -> None:
    with pytest.raises(EncodeError, match=name):
        encode_properties({name: value})


def test_short_strings_are_at_most_255_bytes() -> None:
    assert encode_method(METHODS["channel.open"], out_of_band="x" * 255)[0] == 255
    with pytest.raises(EncodeError, match="limit is 255"):
        encode_method(METHODS["channel.open"], out_of_band="x" * 256)
    with pytest.raises(EncodeError, match="limit is 255"):
        encode_properties({"correlation_id": "ü" * 128})


def test_our_own_mistakes_are_local_errors() -> None:
    with pytest.raises(LocalProtocolError, match="no field 'que'"):
        encode_method(METHODS["queue.declare"], que="x")
    with pytest.raises(LocalProtocolError, match="unknown AMQP method"):
        encode_method(0x00FF00FF)
    with pytest.raises(LocalProtocolError, match="no basic property 'headres'"):
        encode_properties({"headres": {}})


def test_unknown_methods_of_the_peer_are_remote_errors() -> None:
    with pytest.raises(RemoteProtocolError, match="0x00ff00ff"):
        decode_method(0x00FF00FF, b"")


# --- bytes that are not trusted


def table_of(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def nested(depth: int, kind: bytes = b"F") -> bytes:
    """Tables (or arrays) one in the other."""
    key = b"\x01n" if kind == b"F" else b""
    inner = table_of(b"")
    for _ in range(depth - 1):
        inner = table_of(key + kind + inner)
    return inner


def test_deep_tables_are_refused_before_librabbitmq_sees_them() -> None:
    assert decode_table(nested(32))
    for depth in (33, 1000, 15_000):
        with pytest.raises(RemoteProtocolError, match="32 deep"):
            decode_table(nested(depth))


def test_deep_arrays_are_refused() -> None:
    for depth in (32, 1000, 30_000):
        with pytest.raises(RemoteProtocolError, match="32 deep"):
            decode_table(table_of(b"\x01aA" + nested(depth, b"A")))


@pytest.mark.parametrize("size", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [b"S", b"x", b"F", b"A"])
def test_false_sizes_are_refused(kind: bytes, size: int) -> None:
    content = b"\x01k" + kind + struct.pack(">I", size) + b"ab"
    with pytest.raises(RemoteProtocolError):
        decode_table(table_of(content))
    with pytest.raises(RemoteProtocolError):
        decode_table(struct.pack(">I", size) + content)


def test_an_inner_table_may_not_reach_beyond_the_outer_one() -> None:
    inner = b"\x01kF" + struct.pack(">I", 4) + b"\x01a"
    # The bytes that it would swallow are there, but they belong to what follows the outer table.
    with pytest.raises(RemoteProtocolError):
        decode_method(METHODS["queue.declare"], b"\0\0\x01q\0" + table_of(inner) + b"V\0")


@pytest.mark.parametrize("whole", [bytes.fromhex(TABLE_HEX)])
def test_a_table_cut_short_at_any_byte_is_refused(whole: bytes) -> None:
    for size in range(len(whole)):
        with pytest.raises(RemoteProtocolError):
            decode_table(whole[:size])
    with pytest.raises(RemoteProtocolError, match="1 bytes too many"):
        decode_table(whole + b"\0")


def test_properties_cut_short_at_any_byte_are_refused() -> None:
    whole = bytes.fromhex(PROPERTIES_HEX)
    for size in range(len(whole)):
        with pytest.raises(RemoteProtocolError):
            decode_properties(whole[:size])
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_properties(whole + b"\0")


@pytest.mark.parametrize("flags", [b"\0\x01", b"\0\x02", b"\xff\xff", b"\0\x01" * 40])
def test_flags_that_no_property_has_are_refused(flags: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="flags"):
        decode_properties(flags)


@pytest.mark.parametrize("kind", [b"U", b"\0", b"z", b"\xff"])
def test_unknown_field_types_are_refused(kind: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown AMQP field type"):
        decode_table(table_of(b"\x01k" + kind + b"\0" * 16))


def test_more_than_a_mebibyte_at_once_is_refused() -> None:
    content = b"\x01kx" + struct.pack(">I", 10 << 20) + bytes(10 << 20)
    with pytest.raises(RemoteProtocolError, match="limit is 1048576"):
        decode_properties(b"\x20\0" + table_of(content))
    with pytest.raises(RemoteProtocolError, match="limit is 1048576"):
        decode_table(table_of(content))
    with pytest.raises(RemoteProtocolError, match="limit is 1048576"):
        decode_method(METHODS["connection.start"], bytes(2 << 20))


def test_random_changes_are_read_or_refused_but_never_crash() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    originals = [bytes.fromhex(PROPERTIES_HEX), encode_properties({"headers": TABLE})]
    for _ in range(20_000):
        data = bytearray(generator.choice(originals))
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            properties = decode_properties(bytes(data))
        except RemoteProtocolError:
            continue
        assert isinstance(properties, dict)


# --- the fast encoder of task messages writes the same


def test_task_messages_are_read_as_they_were_meant() -> None:
    task = message.encode_task(
        "t.add", "id-1", b"[[],{},{}]", retries=3, time_limit=30.0, eta=1_800_000_000.5, priority=7, reply_to="answers",
        group="g", group_index=2, headers={"trace": {"a": [1, 2**40, None, 1.5, True, "ü"]}},
    )  # fmt: skip
    properties = decode_properties(task.props)
    assert properties["priority"] == 7
    assert properties["correlation_id"] == "id-1"
    assert properties["reply_to"] == "answers"
    headers = properties["headers"]
    assert headers["task"] == "t.add"
    assert headers["timelimit"] == [30.0, None]
    assert headers["eta"] == "2027-01-15T08:00:00.500000+00:00"
    assert headers["trace"] == {"a": [1, 2**40, None, 1.5, True, "ü"]}
    assert list(headers)[:5] == ["lang", "task", "id", "shadow", "eta"]


def test_both_encoders_of_properties_agree() -> None:
    plain = {name: value for name, value in PROPERTIES.items() if name != "timestamp"} | {"timestamp": 5}
    assert message.encode_properties(plain) == encode_properties(plain)
