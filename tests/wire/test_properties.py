"""Reading basic properties in one pass gives what librabbitmq gives, and its errors."""

from __future__ import annotations

import random
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest

from fastq.errors import RemoteProtocolError
from fastq.wire import amqp
from fastq.wire.message import encode_task
from fastq.wire.properties import decode_properties

TASK = encode_task(
    "t.add", "id-1", b"[[],{},{}]", retries=3, time_limit=30.0, eta=1_800_000_000.5, priority=7, reply_to="answers",
    group="g", group_index=2, expires=1_900_000_000.0,
    headers={"trace": {"a": [1, 2**40, None, True, "ü"]}, "empty": {}, "none": []},
).props  # fmt: skip
HEADERS: dict[str, Any] = {
    "text": "ü",
    "none": None,
    "yes": True,
    "no": False,
    "one": 1,
    "minus": -1,
    "large": -(2**40),
    "": "",
    "table": {"in": {"side": [1, [2, [None]]]}},
    "array": ["a", {"b": "c"}],
}


def read(decode: Any, props: bytes) -> Any:
    """Return what a decoder returns, or the class of its error."""
    try:
        return decode(props)
    except RemoteProtocolError as error:
        return type(error)


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"headers": {}},
        {"headers": HEADERS},
        {"content_type": "application/json", "content_encoding": "utf-8", "headers": HEADERS, "delivery_mode": 2},
        {"priority": 0, "correlation_id": "c" * 255, "reply_to": "", "expiration": "60000"},
        {"headers": {"float": 1.5, "bytes": b"\xff", "decimal": Decimal("1.5")}},
        {"headers": {"date": datetime(2026, 1, 1, tzinfo=timezone.utc)}, "timestamp": 5, "app_id": "a"},
        {"message_id": "m", "type": "t", "user_id": "u", "cluster_id": "c"},
    ],
    ids=str,
)
def test_what_librabbitmq_wrote_is_read_alike(properties: dict[str, Any]) -> None:
    props = amqp.encode_properties(properties)
    found = decode_properties(props)
    assert found == amqp.decode_properties(props)
    assert list(found) == list(amqp.decode_properties(props))


def test_a_task_s_properties_are_read_alike() -> None:
    found = decode_properties(TASK)
    assert found == amqp.decode_properties(TASK)
    assert found["headers"]["trace"] == {"a": [1, 2**40, None, True, "ü"]}
    assert list(found["headers"])[:5] == ["lang", "task", "id", "shadow", "eta"]


def test_keys_of_one_message_are_not_taken_for_those_of_the_next() -> None:
    for headers in ({"aa": 1, "bb": 2}, {"ab": 1, "bb": 2}, {"a": 1}, {"aa": 1, "b": 2, "bb": 3}, {"aa": 1, "bb": 2}):
        assert decode_properties(amqp.encode_properties({"headers": headers}))["headers"] == headers


def test_many_and_deep_headers_are_read() -> None:
    deep: dict[str, Any] = {}
    for level in range(20):
        deep = {f"level{level}": deep}
    headers = {**{f"key{number}": number for number in range(300)}, "deep": deep}
    assert decode_properties(amqp.encode_properties({"headers": headers}))["headers"] == headers


def test_text_that_is_no_utf8_is_bytes() -> None:
    props = amqp.encode_properties({"headers": {"text": "abc"}, "reply_to": "abc"}).replace(b"abc", b"\xff\xfe\xfd")
    assert decode_properties(props) == {"headers": {"text": b"\xff\xfe\xfd"}, "reply_to": b"\xff\xfe\xfd"}


def test_a_part_is_refused() -> None:
    for size in range(len(TASK)):
        with pytest.raises(RemoteProtocolError):
            decode_properties(TASK[:size])


@pytest.mark.parametrize(
    "props",
    [
        pytest.param(TASK + b"\0", id="a byte more"),
        pytest.param(b"\0\1", id="flags that go on"),
        pytest.param(b"\0\2", id="an unknown flag"),
        pytest.param(b"\x20\0\xff\xff\xff\xff", id="a table of 4 GiB"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_is_malformed_is_refused(props: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_properties(props)


def test_random_changes_are_read_alike() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    originals = [TASK, amqp.encode_properties({"headers": HEADERS, "reply_to": "r", "expiration": "1"})]
    readable = 0
    for _ in range(20_000):
        data = bytearray(generator.choice(originals))
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        # By their text: a changed byte may have made a float of it that is not equal to itself.
        found, expected = (repr(read(decode, bytes(data))) for decode in (decode_properties, amqp.decode_properties))
        assert found == expected, bytes(data)
        readable += found[0] == "{"
    assert readable > 1000
