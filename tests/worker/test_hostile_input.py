"""No message and no command holds a worker: a running one goes on, within a bound of time and of memory.

Malformed messages are in ``tests.worker.test_malformed``; these are well-formed ones that would cost too much to read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastq.wire.ids import new_id
from fastq.wire.message import Message
from tests.support.attacked_worker import NODE, Attacked, Program
from tests.support.malformed_messages import headers, properties
from tests.support.servers import wait_until
from tests.support.stage import QUEUE, Kind, open_stage

pytestmark = pytest.mark.rabbitmq

#: On a loaded machine; what these tests are about took from minutes to for ever.
SOON_S = 10.0
TARGETS: list[tuple[Kind, Program]] = [
    ("amqp", "fastq"), ("amqp", "celery"), ("redis", "fastq"), ("redis", "celery"),
]  # fmt: skip
YAML = "application/x-yaml"


@pytest.fixture(scope="module", params=TARGETS, ids="-".join)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A worker with one child that holds 1,000 messages with an ETA and more."""
    kind, program = request.param
    stage = open_stage(kind, request, tmp_path_factory.mktemp(f"hostile-{kind}-{program}"))
    attacked = Attacked(stage, program, children=1, accept_content=["json", "yaml"])
    yield attacked
    attacked.close()
    stage.close()


def log_since(target: Attacked, size: int, text: str) -> None:
    """Return when the log has the text in what was written after its first ``size`` characters."""
    wait_until(
        lambda: text in target.worker.log()[size:],
        SOON_S,
        lambda: AssertionError(f"no {text!r} in {target.worker.log()[size:]}"),
    )


# --- patterns of remote control

PATTERNS = [
    ("pcre", "(|)" * 40 + "!"),
    ("pcre", "(a*)*" * 20 + "!"),
    ("pcre", "((){65535}){65535}!"),
    ("pcre", "(?=(.*)*!)"),
    ("pcre", ".*.*.*.*.*.*.*.*.*!"),
    ("pcre", "(?i)" + "[\0-\U0010ffff]" * 40),
    ("glob", "*a" * 100 + "!"),
    ("glob", "*?" * 100 + "!"),
    ("glob", "*[!a]" * 40 + "!"),
]


@pytest.mark.parametrize(("matcher", "pattern"), PATTERNS)
def test_no_pattern_holds_the_worker(target: Attacked, matcher: str, pattern: str) -> None:
    with target.memory_bound(20):
        for _ in range(5):
            target.bus.tell("ping", {}, pattern=pattern, matcher=matcher)
        assert target.ask("ping") == {"ok": "pong"}
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()


@pytest.mark.parametrize("pattern", [r"(\w+)@\1", "(?=a)", "a{9999}", "(", "a**", "x" * 300])
def test_who_sends_a_pattern_that_is_not_read_is_told(target: Attacked, pattern: str) -> None:
    before = len(target.worker.log())
    replies = list(target.bus.ask("ping", {}, 1.0, pattern=pattern, matcher="pcre"))
    [(node, reply)] = replies
    assert node == NODE
    assert "pattern" in reply["error"]
    log_since(target, before, "remote control: ping is not run: ")
    assert list(target.bus.ask("ping", {}, 1.0, pattern="(attacked|other)@[a-z]{1,9}$", matcher="pcre"))


# --- what is looked at for a reply


def aliases(levels: int) -> bytes:
    """Return YAML of a line a level that is ten times as much as the line before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


def hold(target: Attacked, count: int, body: bytes, **changes: Any) -> list[str]:
    """Publish messages whose time comes in an hour, wait until the worker has them, and return their ids."""
    ids = [new_id() for _ in range(count)]
    held = len(target.ask("scheduled"))
    target.stage.publish(
        [Message("", QUEUE, later(task_id, **changes), body) for task_id in ids]
    )  # fmt: skip
    wait_until(
        lambda: len(target.ask("scheduled")) >= held + count, 30, lambda: AssertionError("the worker has not got them")
    )
    return ids


def later(task_id: str, **changes: Any) -> bytes:
    """Return the properties of a message whose time comes in two hours."""
    return properties(headers(id=task_id, eta="2999-01-01T00:00:00+00:00"), **changes)


def shown(target: Attacked, task_id: str) -> dict[str, Any]:
    """Return what the worker shows of a message that it holds."""
    request: dict[str, Any] = next(
        each["request"] for each in target.ask("scheduled") if each["request"]["id"] == task_id
    )
    return request


DEEP = b"[" * 400 + b"]" * 400
LOOKED_AT = {
    "yaml": (aliases(7), {"content_type": YAML}),
    "yaml-merged": (b"- &a [x]\n" + b"".join(b"- &b%d {<<: [*a, *a]}\n" % n for n in range(9)), {"content_type": YAML}),
    "msgpack": (b"\x93\xdd\0\0\xff\xf0" + b"\x90" * 65520 + b"\x80\x80", {"content_type": "application/x-msgpack"}),
    "punycode": (b'"' + b"a" * 60_000 + b"-" + b"z" * 60_000 + b'"', {"content_encoding": "punycode"}),
    "deep": (b"[" + DEEP + b", {}, {}]", {}),
    "tagged": (b'[[{"__type__": "decimal", "__value__": "1E+999999"}], {}, {}]', {}),
    "many": (b"[[" + b"[]," * 20_000 + b"0], {}, {}]", {}),
    "compressed": (zlib.compress(b"[[" + b"[]," * 9_000_000 + b"0], {}, {}]"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_look_at_a_message_costs_little(target: Attacked, name: str) -> None:
    body, changes = LOOKED_AT[name]
    with target.memory_bound(40):
        [task_id] = hold(target, 1, body, **changes)
        found = shown(target, task_id)
        if name not in ("tagged", "many"):
            assert isinstance(found["args"], str)
        for method in ("scheduled", "reserved", "active"):
            assert isinstance(target.ask(method), list)
        assert target.ask("query_task", ids=[task_id])[task_id][0] == "scheduled"
    assert target.send_good(SOON_S) < SOON_S
    target.check_alive()
    assert "failed" not in target.worker.log()


def test_the_end_of_the_year_9999_is_shown(target: Attacked) -> None:
    for moment in ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-12:00"):
        held = len(target.ask("scheduled"))
        table = headers(eta=moment)
        target.stage.publish([task_message(b"[[1], {}, {}]", table)])
        wait_until(lambda held=held: len(target.ask("scheduled")) > held, 30, lambda: AssertionError("not held"))  # type: ignore[misc]
        assert max(each["eta"] for each in target.ask("scheduled")) == "9999-12-31T23:59:59.000000+00:00"


def test_a_reply_has_a_bound_and_says_that_it_was_cut(target: Attacked) -> None:
    body = b"[[" + b"[[]]," * 12_000 + b"0], {}, {}]"
    with target.memory_bound(150):
        ids = hold(target, 900, body)
        for _ in range(5):
            target.bus.tell("scheduled", {}, destination=[NODE])
        rows = [each["request"] for each in target.ask("scheduled", 30)]
        assert target.send_good(SOON_S) < SOON_S
    by_id = {each["id"]: each for each in rows}
    assert set(ids) <= by_id.keys()
    as_values = [task_id for task_id in ids if isinstance(by_id[task_id]["args"], list)]
    assert 5 < len(as_values) < 100
    assert len(json.dumps(rows, default=str)) < 4_000_000
    target.check_alive()


# --- what children read


def task_message(body: bytes, table: dict[str, Any] | None = None, **changes: Any) -> Message:
    return Message("", QUEUE, properties(headers() if table is None else table, **changes), body)


#: Names of encodings that Python knows, and none that a message is written in.
ENCODINGS = ["punycode", "\0", "idna", "utf-7", "unicode_escape", "uu", "zlib", "mbcs", "x" * 200, "../../evil_module"]


@pytest.mark.parametrize("charset", ENCODINGS)
def test_no_content_encoding_holds_or_ends_a_child(target: Attacked, charset: str) -> None:
    before = len(target.worker.log())
    body = b'[["' + b"a" * 1_000_000 + b"-" + b"z" * 1_000_000 + b'", 0], {}, {}]'
    with target.memory_bound(80):
        target.stage.publish([task_message(body, content_encoding=charset)] * 2)
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()
    if target.worker.log()[before:].count("Rejected malformed message: class=content-encoding ") != 2:
        # Celery reads JSON as UTF-8 whatever a message says of its encoding.
        assert target.program == "celery"


@pytest.mark.parametrize(
    "content_type", ["application/json", YAML, "application/data", "application/text", "text/plain"]
)
def test_no_message_of_protocol_1_holds_the_main_process(target: Attacked, content_type: str) -> None:
    fields = b'{"task": "nobody.knows", "id": "%s", "kwargs": {}, "args": [' % new_id().encode()
    body = fields + b"[]," * 3_000_000 + b'"' + b"a" * 1_000_000 + b"-" + b"z" * 1_000_000 + b'"]}'
    with target.memory_bound(160):  # a message of 11 MB, in its envelope on Redis
        target.stage.publish([task_message(body, {}, content_type=content_type, content_encoding="punycode")])
        assert target.ask("ping") == {"ok": "pong"}
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()


def merges(levels: int) -> bytes:
    """Return YAML of mappings that each merge the one before ten times."""
    return b"".join(b"- &a%d {<<: [%s]}\n" % (n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, levels))


YAMLS = {
    "aliases": b"- [" + b"1]\n- x:\n" + b"\n".join(b"    " + line for line in aliases(9).splitlines()) + b"\n- {}\n",
    "merged": b"- &a0 {x: 1}\n" + merges(9),
    "itself": b"- &a [*a]\n- {}\n- {}\n",
    "base-60": b"- [" + b":".join([b"1"] * 300_000) + b"]\n- {}\n- {}\n",
    "base-60-float": b"- [" + b":".join([b"1"] * 3000) + b".5]\n- {}\n- {}\n",
    "no-int": b'- [!!int ""]\n- {}\n- {}\n',
    "no-bool": b"- [!!bool perhaps]\n- {}\n- {}\n",
    "no-moment": b"- [!!timestamp yesterday]\n- {}\n- {}\n",
    "deep": b"[" * 50_000 + b"]" * 50_000,
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_no_yaml_holds_or_ends_a_child(target: Attacked, name: str) -> None:
    before = len(target.worker.log())
    with target.memory_bound(150):
        target.stage.publish([task_message(YAMLS[name], content_type=YAML)])
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()
    log_since(target, before, "Rejected malformed message: class=body ")


def test_aliases_that_do_not_multiply_are_read(target: Attacked) -> None:
    target.stage.sent.append(number := len(target.stage.sent))
    body = b"- [%d, 0, &a {x: 1}, *a, *a]\n- {}\n- {}\n" % number
    target.stage.publish([task_message(body, content_type=YAML)])
    target.stage.wait_for([number], SOON_S)


def test_headers_of_redis_have_a_bound(target: Attacked) -> None:
    if target.stage.redis is None:
        pytest.skip("RabbitMQ has one of its own")
    many = "[]," * 4_000_000 + "0"
    envelope = '{"body": "", "headers": {"task": "work", "id": "x", "x": [%s]}, "properties": {}}'
    with target.memory_bound(120):
        target.stage.redis.call("LPUSH", QUEUE, envelope % many)
        assert target.ask("ping") == {"ok": "pong"}
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()
