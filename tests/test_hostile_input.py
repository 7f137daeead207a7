"""No message and no command holds a worker: a running one goes on, within a bound of time and of memory.

Malformed messages are in ``tests.test_malformed``; these are well-formed ones that would cost too much to read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastq.wire.ids import new_id
from fastq.wire.message import Message
from tests.attacked import NODE, Attacked, Program
from tests.malformed import headers, properties
from tests.servers import wait_until
from tests.stage import QUEUE, Kind, open_stage

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
