"""Task messages: the encoder and the scanner against librabbitmq's codec; whole, cut short, hostile."""

from __future__ import annotations

import datetime
import os
import random
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery.utils.time import maybe_iso8601

from fastq.errors import EncodeError
from fastq.wire import amqp
from fastq.wire.dates import iso8601_to_unix, unix_to_iso8601
from fastq.wire.head import scan
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_properties, encode_task

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
#: The headers of protocol 2 in the order in which Celery writes them.
ORDER = [
    "lang",
    "task",
    "id",
    "shadow",
    "eta",
    "expires",
    "group",
    "group_index",
    "retries",
    "timelimit",
    "root_id",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
]


def example(**options: Any) -> Message:
    return encode_task("tasks.add", "id-1", b"[[1],{},{}]", **options)


def test_the_encoded_headers_are_those_of_protocol_2_in_order() -> None:
    properties = amqp.decode_properties(example().props)
    assert list(properties["headers"]) == ORDER
    assert properties["headers"]["root_id"] == properties["correlation_id"] == "id-1"
    assert properties["headers"]["timelimit"] == [None, None]
    assert (properties["content_type"], properties["content_encoding"]) == ("application/json", "utf-8")
    assert (properties["delivery_mode"], properties["priority"]) == (2, 0)


def test_everything_that_can_be_said_of_a_task_is_read_back_by_librabbitmq_and_by_the_scanner() -> None:
    message = example(
        eta=1_800_000_000.25,
        expires=1_900_000_000,
        retries=3,
        time_limit=2.5,
        soft_time_limit=2,
        root_id="r",
        parent_id="p",
        group="g",
        group_index=4,
        shadow="s",
        ignore_result=True,
        reply_to="q",
        priority=7,
        compression="application/x-gzip",
        origin="gen1@h",
        headers={"trace": "1-2", "nested": {"list": [1, None, True, 2.5, b"x"]}},
    )
    properties = amqp.decode_properties(message.props)
    headers = properties["headers"]
    assert headers["eta"] == "2027-01-15T08:00:00.250000+00:00"
    assert headers["expires"] == "2030-03-17T17:46:40.000000+00:00"
    assert headers["timelimit"] == [2.5, 2]
    assert headers["nested"] == {"list": [1, None, True, 2.5, b"x"]}
    assert headers["trace"] == "1-2"
    assert headers["compression"] == "application/x-gzip"
    assert (properties["reply_to"], properties["priority"]) == ("q", 7)
    assert int(properties["expiration"]) > 0
    found = scan(message.props)
    assert found["problem"] == "fine"
    assert (found["task"], found["id"], found["reply_to"], found["correlation_id"]) == (
        "tasks.add",
        "id-1",
        "q",
        "id-1",
    )
    assert (found["eta"], found["expires"]) == (1_800_000_000.25, 1_900_000_000)
    assert (found["time_limit"], found["soft_time_limit"], found["retries"], found["ignore_result"]) == (
        2.5,
        2,
        3,
        True,
    )
    assert (message.due, message.expires, message.priority) == (1_800_000_000.25, 1_900_000_000, 7)


def test_the_scanner_reads_what_librabbitmq_wrote() -> None:
    headers = {
        "task": "t",
        "id": "i",
        "retries": 2**40,
        "timelimit": [None, 7],
        "x-delivery-count": 5,
        "other": {"a": [1]},
    }
    found = scan(amqp.encode_properties({"headers": headers, "reply_to": "r", "priority": 3}))
    assert (found["problem"], found["task"], found["id"], found["delivery_count"]) == ("retries", "t", "i", 5)
    headers["retries"] = 2
    found = scan(amqp.encode_properties({"headers": headers, "reply_to": "r", "priority": 3}))
    assert (found["problem"], found["time_limit"], found["soft_time_limit"]) == ("fine", -1, 7)


def test_both_encoders_of_properties_agree() -> None:
    properties = {
        "content_type": "a/b",
        "headers": {"k": [1, "two", None]},
        "delivery_mode": 1,
        "priority": 2,
        "correlation_id": "c",
        "expiration": "100",
        "message_id": "m",
        "timestamp": 1_700_000_000,
        "type": "t",
        "app_id": "a",
    }
    assert amqp.decode_properties(encode_properties(properties)) == amqp.decode_properties(
        amqp.encode_properties(properties)
    )


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "no-task"),
        ({"task": ""}, "no-task"),
        ({"task": 5, "id": "i"}, "task"),
        ({"task": ["t"], "id": "i"}, "task"),
        ({"task": "t"}, "no-id"),
        ({"task": "t", "id": 7}, "id"),
        ({"task": "t", "id": ["i"]}, "id"),
        ({"task": "t", "id": ""}, "id"),
        ({"task": "t", "id": "i", "eta": "soon"}, "eta"),
        ({"task": "t", "id": "i", "eta": 17}, "eta"),
        ({"task": "t", "id": "i", "expires": "never"}, "expires"),
        ({"task": "t", "id": "i", "expires": [1]}, "expires"),
        ({"task": "t", "id": "i", "timelimit": 5}, "timelimit"),
        ({"task": "t", "id": "i", "timelimit": ["soon", "-2"]}, "timelimit"),
        ({"task": "t", "id": "i", "timelimit": ["1", "9" * 30]}, "timelimit"),
        ({"task": "t", "id": "i", "timelimit": [1, 2, 3]}, "timelimit"),
        ({"task": "t", "id": "i", "timelimit": ["1", "2.5"]}, "fine"),
        ({"task": "t", "id": "i", "timelimit": []}, "fine"),
        ({"task": "t", "id": "i", "timelimit": 0}, "fine"),
        ({"task": "t", "id": "i", "retries": "many"}, "retries"),
        ({"task": "t", "id": "i", "retries": "1" * 30}, "retries"),
        ({"task": "t", "id": "i", "retries": "2"}, "fine"),
        ({"task": "x" * 2000, "id": "i"}, "task"),
        ({"task": "t", "id": "i" * 2000}, "id"),
        ({"task": "t\0u", "id": "i"}, "fine"),
        ({"task": "t", "id": "i", "eta": "9999-12-31T23:59:59.999999-23:59"}, "fine"),
    ],
)
def test_a_wrong_header_is_named(headers: dict[str, Any], problem: str) -> None:
    assert scan(amqp.encode_properties({"headers": headers}))["problem"] == problem


DEATH = {"count": 1, "reason": "rejected", "queue": "q", "exchange": "", "routing-keys": ["q"]}
FATAL = [
    [7],
    ["x"],
    [None],
    [[]],
    [DEATH, 7],
    [7, DEATH],
    *([{**DEATH, "count": each}] for each in ("1", 1.5, True, [])),
]
HARMLESS = [None, 7, "x", {}, [], [{}], [DEATH, DEATH], [{**DEATH, "count": None}], [{"queue": 7, "reason": []}]]


def is_fatal(**properties: Any) -> bool:
    return bool(scan(amqp.encode_properties(properties))["breaks_dead_letters"])


@pytest.mark.parametrize("deaths", FATAL, ids=repr)
def test_deaths_that_rabbitmq_cannot_add_to_are_refused(deaths: Any) -> None:
    headers = {"task": "t", "id": "i", "x-death": deaths}
    assert scan(amqp.encode_properties({"headers": headers}))["problem"] == "x-death"
    assert is_fatal(headers=headers)
    assert is_fatal(content_type="a/b", content_encoding="utf-8", headers={"eta": 5, **headers}, priority=3)
    # Behind what is too deep to be read; and RabbitMQ takes the first of two, where other readers take the last.
    fatal, other = (amqp.encode_properties({"headers": {"x-death": each}})[6:] for each in (deaths, []))
    deep = b""
    for _ in range(60):
        deep = b"A" + len(deep).to_bytes(4, "big") + deep
    for table in (b"\4deep" + deep + fatal, fatal + other, other + fatal):
        assert scan(b"\x20\0" + len(table).to_bytes(4, "big") + table)["breaks_dead_letters"]


@pytest.mark.parametrize("deaths", HARMLESS, ids=repr)
def test_other_deaths_are_let_be(deaths: Any) -> None:
    headers = {"task": "t", "id": "i", "x-death": deaths, "y-death": [7], "inner": {"x-death": [7]}}
    assert scan(amqp.encode_properties({"headers": headers}))["problem"] == "fine"
    assert not is_fatal(headers=headers)
    assert not is_fatal(content_type="a/b", reply_to="x-death")


def test_properties_cut_short_anywhere_are_refused_or_read_without_harm() -> None:
    whole = example(headers={"a": {"b": [1, 2]}}, reply_to="q").props
    for size in range(len(whole)):
        assert scan(whole[:size])["problem"] == "properties", size
    assert scan(whole + b"trailing")["problem"] == "fine"


def test_random_damage_never_harms_the_scanner() -> None:
    seed = int(os.environ.get("FASTQ_TEST_SEED", random.randrange(2**32)))
    print("seed", seed)
    source = random.Random(seed)
    whole = bytearray(example(headers={"a": {"b": [1, 2]}}, eta=1e9, time_limit=3).props)
    for _ in range(20_000):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 8)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        scan(bytes(damaged[: source.randint(0, len(damaged))]))


def test_ids_are_version_7_uuids_in_the_order_of_time_and_differ_in_a_forked_child() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(uuid.UUID(each).version == 7 and str(uuid.UUID(each)) == each for each in ids)
    assert [each[:13] for each in ids] == sorted(each[:13] for each in ids)
    assert abs(int(ids[0].replace("-", "")[:12], 16) / 1000 - time.time()) < 5
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, new_id().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 36).decode() != new_id()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T10:00:00",
        "2026-11-22T10:00:00.5",
        "2026-11-22T10:00:00.123456+00:00",
        "2026-02-28T23:59:59+05:30",
        "2024-02-29T00:00:00-11:00",
        "1970-01-01T00:00:00+00:00",
        "2100-03-01T12:00:00+0100",
    ],
)
def test_dates_are_read_as_the_standard_library_reads_them(text: str) -> None:
    if text.endswith("+0100"):
        expected = datetime.datetime.fromisoformat(text[:-2] + ":00")
    else:
        fraction = text.replace(".5", ".500000")
        expected = datetime.datetime.fromisoformat(fraction)
    if expected.tzinfo is None:
        expected = expected.replace(tzinfo=datetime.timezone.utc)
    assert iso8601_to_unix(text.encode()) == pytest.approx(expected.timestamp(), abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-13-01T00:00:00",
        "2026-02-29",
        "2026-366",
        "2026-W54-1",
        "2026-W10T10:00",
        "0000-01-01",
        "202611",
        "2026-11T10:00",
        "2026-11-22T",
        "2026-11-22T1",
        "2026-11-22T10:0000",
        "2026-11-22T24:00:01",
        "2026-11-22T10:00:00,",
        "2026-11-22T10:00+24:00",
        "2026-11-22T10:00+00:60",
        "2" * 200,
        "2026-11-22T10:00:00+1",
        "2026-11-22T10:00:00Zx",
        "2026-11-22T1x:00:00",
    ],
)
def test_what_is_no_date_is_none(text: str) -> None:
    assert iso8601_to_unix(text.encode()) is None


def test_numbers_written_as_text_are_read() -> None:
    headers = {"task": "t", "id": "i", "retries": "2", "timelimit": ["5", "2.5"]}
    found = scan(amqp.encode_properties({"headers": headers}))
    assert (found["problem"], found["retries"]) == ("fine", 2)
    assert (found["time_limit"], found["soft_time_limit"]) == (5, 2.5)
    found = scan(amqp.encode_properties({"headers": {**headers, "timelimit": ["5", None]}}))
    assert (found["time_limit"], found["soft_time_limit"]) == (5, -1)


@pytest.mark.parametrize("moment", ["1970-01-01", "1969-12-31T23:59", "0001-01-01T00:00:00Z", EPOCH])
def test_a_time_long_ago_is_a_time(moment: object) -> None:
    headers = {"task": "t", "id": "i", "eta": moment, "expires": moment}
    found = scan(amqp.encode_properties({"headers": headers}))
    assert found["problem"] == "fine"
    assert found["eta"] == found["expires"] != 0
    assert found["expires"] < 1


def date_forms() -> Iterator[str]:
    """Yield every form that a date may have in a header, with days on both sides of 1970 and of new year's weeks."""
    dates = ["2020", "2020-01", "1969-12-31", "19691231", "0001-01-01", "9999-12-31", "2020-366", "2021365", "1969-001"]
    dates += [f"{year}{dash}W{week}" for year in (2020, 2026) for week in ("01", "53") for dash in ("", "-")]
    yield from dates
    days = ["2020-01-02", "20200102", "1969-12-31", "00010101", "2020-366", "2021365"]
    days += [f"{year:04}-W{week}-{day}" for year in (1970, 2020, 2026) for week in ("01", "53") for day in (1, 7)]
    days += [f"{year:04}W{week}{day}" for year in (1969, 2021) for week in ("01", "52") for day in (1, 7)]
    clocks = ["03", "0304", "03:04", "030405", "03:04:05", "030405.6", "03:04:05,123456", "03:04:05.123456789"]
    clocks += ["24", "2400", "24:00:00.0"]
    zones = ["", "Z", "z", "+05", "-0530", "+05:30", "-00:00", "+23:59"]
    for day in days:
        yield day
        for clock in clocks:
            for zone in zones:
                yield f"{day}{'Tt_'[len(clock) % 3]}{clock}{zone}"


def test_dates_are_read_as_celery_reads_them() -> None:
    forms = list(date_forms())
    for text in forms:
        expected = maybe_iso8601(text)
        if expected.tzinfo is None:
            expected = expected.replace(tzinfo=datetime.timezone.utc)
        seconds = (expected - EPOCH).total_seconds()
        assert iso8601_to_unix(text.encode()) == pytest.approx(seconds, abs=2e-6), text
    source = random.Random(11)
    for _ in range(5_000):  # cut short and overwritten, as a test of bounds
        text = list(source.choice(forms))
        text[source.randrange(len(text))] = source.choice("0129-:.,TZW+x")
        iso8601_to_unix("".join(text[: source.randrange(len(text) + 1)]).encode())


def test_dates_are_written_as_celery_writes_them() -> None:
    source = random.Random(7)
    for _ in range(500):
        unix = source.randrange(-62_135_596_800, 7_258_118_400) + source.randrange(10**6) / 1e6
        expected = datetime.datetime.fromtimestamp(unix, datetime.timezone.utc)
        assert iso8601_to_unix(unix_to_iso8601(unix).encode()) == pytest.approx(expected.timestamp(), abs=2e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"priority": 300}, "priority"),
        ({"headers": {"a": object()}}, "object"),
        ({"headers": {"a": 2**70}}, "64 bits"),
        ({"reply_to": "q" * 300}, "255"),
        ({"eta": 1e15}, "out of range"),
    ],
)
def test_what_has_no_amqp_form_is_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(EncodeError, match=text):
        example(**options)


def test_headers_nested_without_end_are_refused() -> None:
    nested: dict[str, Any] = {}
    nested["again"] = nested
    with pytest.raises(EncodeError, match="deeper"):
        example(headers=nested)
