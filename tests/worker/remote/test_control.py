"""Remote control: what the messages look like, whom they are for, and a node that answers on real brokers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from fastq.brokers import open_blocking_bus
from fastq.brokers.rabbitmq.connection import BlockingConnection, connect_any
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.bus.pidbox import MAX_REQUEST_BYTES, Mailbox, Request
from fastq.errors import DecodeError
from fastq.settings import Settings
from fastq.wire.frames import publish_frames
from fastq.wire.message import Message, encode_properties
from tests.support.control_node import ROOT, Node, environment, row
from tests.support.servers import RabbitMQ, wait_until
from tests.support.worker_process import WorkerProcess

JSON = {"content_type": "application/json", "clock": 7}
PROPS = encode_properties({"content_type": "application/json", "headers": {"clock": 7}})
REPLIES = "reply.celery.pidbox"
PONG = {"fastq@here": {"ok": "pong"}}


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(Settings())


# -- messages


def test_a_request_comes_back_as_it_was_sent(mailbox: Mailbox) -> None:
    request = Request("ping", {"x": 1}, ["a@h"], "a*", "glob", "ticket", "address")
    assert mailbox.decode_request(JSON, mailbox.encode_request(request)) == request


def test_a_request_has_celery_s_form(mailbox: Mailbox) -> None:
    body = mailbox.encode_request(Request("ping", {}, ticket="t", reply_to="oid"))
    assert orjson.loads(body) == {
        "method": "ping",
        "arguments": {},
        "destination": None,
        "pattern": None,
        "matcher": None,
        "ticket": "t",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "oid"},
    }
    assert mailbox.requests == "celery.pidbox"


def test_a_reply_has_celery_s_form_and_answers_one_question(mailbox: Mailbox) -> None:
    body = mailbox.encode_reply("fastq@h", {"ok": "pong"})
    assert orjson.loads(body) == {"fastq@h": {"ok": "pong"}}
    headers = {**JSON, "ticket": "t"}
    assert mailbox.decode_replies(headers, body, "t") == [("fastq@h", {"ok": "pong"})]
    assert mailbox.decode_replies(headers, body, "u") == []
    assert mailbox.decode_replies(headers, b"[]", "t") == []


def test_a_reply_without_a_form_says_so(mailbox: Mailbox) -> None:
    (reply,) = orjson.loads(mailbox.encode_reply("fastq@h", {"ok": object()})).values()
    assert reply["error"].startswith("EncodeError(")


def test_numbers_that_are_none_go_over_the_bus_as_with_celery(mailbox: Mailbox) -> None:
    odd = {"limit": float("inf"), "names": ["caf\udce9", float("nan")]}
    request = mailbox.decode_request(JSON, mailbox.encode_request(Request("mine", odd)))
    assert repr(request.arguments) == repr(odd)
    body = mailbox.encode_reply("fastq@h", odd)
    assert repr(mailbox.decode_replies({**JSON, "ticket": "t"}, body, "t")) == repr([("fastq@h", odd)])


@pytest.mark.parametrize("address", ["ü" * 200, "caf\udce9", "x" * 400])
def test_an_address_for_replies_is_always_one_that_can_be_sent_to(mailbox: Mailbox, address: str) -> None:
    reply_to = {"exchange": REPLIES, "routing_key": address}
    request = mailbox.decode_request(JSON, json.dumps({"method": "ping", "reply_to": reply_to}).encode())
    assert 0 < len(request.reply_to.encode()) <= 255


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"destination": ["other@h"]}, False),
        ({"destination": [7]}, False),
        ({"destination": ["other@h", "fastq@host1"]}, True),
        ({"destination": ["other@h"], "pattern": "*", "matcher": "glob"}, False),
        ({"pattern": "fastq@*", "matcher": "glob"}, True),
        ({"pattern": "celery@*", "matcher": "glob"}, False),
        ({"pattern": "fastq@.*1$", "matcher": "pcre"}, True),
        ({"pattern": "host1", "matcher": "pcre"}, False),
        ({"pattern": "(fastq|celery)@host[0-9]{1,3}$", "matcher": "pcre"}, True),
        ({"pattern": "fastq*", "matcher": "unknown"}, False),
    ],
)
def test_a_request_is_for_the_nodes_it_names(mailbox: Mailbox, fields: dict[str, object], expected: bool) -> None:
    request = mailbox.decode_request(JSON, orjson.dumps({"method": "ping", **fields}))
    assert request.is_for("fastq@host1") is expected


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"7", b"{", b"{}", b'{"method": 3}', b'{"method": "ping", "arguments": [1]}',
     b'{"method": "ping", "destination": "fastq@h"}', b"\xff\xfe", b'{"method": "ping"' + b"[" * 100_000,
     b'{"method": "ping", "x": "' + b"x" * MAX_REQUEST_BYTES + b'"}'],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_decode_error(mailbox: Mailbox, body: bytes) -> None:
    with pytest.raises(DecodeError):
        mailbox.decode_request(JSON, body)


@pytest.mark.parametrize("content_type", ["application/x-python-serialize", None, "", 7, "application/data"])
def test_anything_but_an_accepted_type_is_a_decode_error(mailbox: Mailbox, content_type: object) -> None:
    with pytest.raises(DecodeError):
        mailbox.decode_request({"content_type": content_type}, b'{"method": "ping"}')


@pytest.mark.parametrize(
    "reply_to",
    [
        None,
        "address",
        {"exchange": "orders", "routing_key": "x"},
        {"exchange": "reply.celery.pidbox", "routing_key": 5},
        7,
    ],
)
def test_a_reply_goes_nowhere_but_to_the_reply_exchange(mailbox: Mailbox, reply_to: object) -> None:
    assert mailbox.decode_request(JSON, orjson.dumps({"method": "ping", "reply_to": reply_to})).reply_to == ""


# -- a node on a real broker


@pytest.fixture
def node(amqp_url: str) -> Iterator[Node]:
    node = Node(amqp_url, "fastq@here").start()
    yield node
    node.stop()


@pytest.fixture
def connection(amqp_url: str) -> Iterator[BlockingConnection]:
    settings = Settings({"broker_url": amqp_url})
    connection = connect_any(Endpoints(amqp_url, settings), settings, "test", 5)
    yield connection
    connection.close()


def ask(
    url: str, *destination: str, timeout_s: float = 0.5, method: str = "ping", **arguments: object
) -> dict[str, Any]:
    bus = open_blocking_bus(url, Settings({"broker_url": url}))
    try:
        return dict(bus.ask(method, arguments, timeout_s, destination))
    finally:
        bus.close()


@pytest.mark.rabbitmq
def test_an_unknown_command_is_answered_as_celery_answers_it(node: Node, amqp_url: str) -> None:
    assert ask(amqp_url, "fastq@here", method="no_such") == {"fastq@here": {"error": "KeyError('no_such')"}}


@pytest.mark.rabbitmq
def test_a_command_that_fails_is_answered_with_the_error(node: Node, amqp_url: str) -> None:
    reply = ask(amqp_url, "fastq@here", method="revoke")["fastq@here"]
    assert reply["error"].startswith("TypeError(")
    assert ask(amqp_url, "fastq@here") == PONG


@pytest.mark.rabbitmq
def test_a_node_without_a_worker_behind_it_answers_ping_alone(amqp_url: str) -> None:
    node = Node(amqp_url, "fastq@here", with_view=False).start()
    try:
        assert ask(amqp_url, "fastq@here") == PONG
        assert ask(amqp_url, "fastq@here", method="stats") == {"fastq@here": {"error": "KeyError('stats')"}}
    finally:
        node.stop()


@pytest.mark.rabbitmq
def test_the_user_s_own_commands_are_run_beside_the_loop(node: Node, amqp_url: str) -> None:
    assert node.view is not None

    def slow(view: object, seconds: float) -> str:
        time.sleep(seconds)
        return f"slept in {view.hostname}"  # type: ignore[attr-defined]

    def bad(view: object) -> None:
        raise RuntimeError("no")

    node.view.custom_commands = {"slow": slow, "bad": bad}
    bus = open_blocking_bus(amqp_url, Settings({"broker_url": amqp_url}))
    asking = bus.ask("slow", {"seconds": 1.0}, 10.0, ["fastq@here"])
    bus.tell("slow", {"seconds": 1.0})
    start = time.monotonic()
    assert ask(amqp_url, "fastq@here", timeout_s=5) == PONG
    assert time.monotonic() - start < 0.9
    assert dict(asking) == {"fastq@here": "slept in fastq@here"}
    assert ask(amqp_url, "fastq@here", method="bad") == {"fastq@here": {"error": "RuntimeError('no')"}}
    bus.close()


@pytest.mark.rabbitmq
def test_the_clock_jumps_past_what_a_peer_says(node: Node, amqp_url: str, connection: BlockingConnection) -> None:
    connection.open_channel(1)
    for clock in (1000, 2**62 + 5, -5, "x"):
        props = encode_properties({"content_type": "application/json", "headers": {"clock": clock}})
        body = orjson.dumps({"method": "ping"})
        connection.transmit(publish_frames(1, Message("celery.pidbox", "", props, body), connection.frame_max))
    (reply,) = ask(amqp_url, "fastq@here", method="clock").values()
    assert 1000 < reply["clock"] < 1020


@pytest.mark.rabbitmq
def test_messages_that_are_no_requests_change_nothing(
    node: Node, amqp_url: str, connection: BlockingConnection
) -> None:
    connection.open_channel(1)
    hostile = [
        (PROPS, b""), (PROPS, b"null"), (PROPS, b'{"method": []}'), (encode_properties({}), b"x" * 300_000),
        (PROPS, b'{"method": "ping", "x": "' + b"x" * (2 << 20) + b'"}'), (PROPS, b"x" * (40 << 20)),
        (encode_properties({}), b"{}"),
        (PROPS, orjson.dumps({"method": "ping", "reply_to": {"exchange": REPLIES, "routing_key": "x" * 400}})),
        (PROPS, orjson.dumps({"method": "ping", "arguments": {"surprise": 1, "view": 2}})),
        (PROPS, orjson.dumps({"method": "revoke", "arguments": {"task_id": {"a": [None]}}})),
        (PROPS, orjson.dumps({"method": "pool_grow", "arguments": {"n": 10**9}})),
    ]  # fmt: skip
    for props, body in hostile:
        connection.transmit(publish_frames(1, Message("celery.pidbox", "", props, body), connection.frame_max))
    assert ask(amqp_url, timeout_s=3) == PONG
    assert node.control.malformed == 7


@pytest.mark.rabbitmq
def test_a_node_listens_again_after_the_broker_was_away(rabbitmq: RabbitMQ, node: Node, amqp_url: str) -> None:
    rabbitmq.restart()
    node.wait_until_listening()
    wait_until(lambda: ask(amqp_url, "fastq@here") == PONG, 60, lambda: AssertionError("the node did not come back"))


@pytest.mark.rabbitmq
def test_requests_are_answered_quickly_while_others_are_long(node: Node, amqp_url: str) -> None:
    assert node.view is not None
    rows = [row("proj.add", str(number), (number, number)) for number in range(20_000)]
    node.view.core.rows["scheduled"] = [{**each, "eta": time.time() + 1000} for each in rows]
    bus = open_blocking_bus(amqp_url, Settings({"broker_url": amqp_url}))
    for _ in range(3):
        bus.tell("scheduled", {})
    bus.tell("ping", {})
    long = open_blocking_bus(amqp_url, Settings({"broker_url": amqp_url}))
    collected = long.ask("scheduled", {}, 60.0, ["fastq@here"])
    times = []
    for _ in range(20):
        start = time.monotonic()
        assert dict(bus.ask("ping", {}, 5.0, ["fastq@here"])) == PONG
        times.append(time.monotonic() - start)
    assert sorted(times)[10] < 0.25, times
    *shown, last = dict(collected)["fastq@here"]
    assert 3000 < len(shown) < 5000
    assert last["request"]["name"].startswith(f"{20_000 - len(shown)} more messages, not shown")
    bus.close()
    long.close()


@pytest.mark.rabbitmq
def test_a_running_worker_answers_under_its_node_name(
    start_worker: Callable[..., WorkerProcess], amqp_url: str
) -> None:
    source = f"from fastq import FastQ\napp = FastQ('tasks', broker={amqp_url!r})\n"
    worker = start_worker("-c", "1", "-n", "w7@%%", source=source)
    wait_until(lambda: ask(amqp_url) != {}, 20, lambda: AssertionError("no answer"))
    assert ask(amqp_url) == {"w7@%": {"ok": "pong"}}
    assert worker.stop() == 0
    assert ask(amqp_url) == {}


@pytest.mark.rabbitmq
def test_a_worker_under_load_answers_at_once(start_worker: Callable[..., WorkerProcess], amqp_url: str) -> None:
    source = f"""
from fastq import FastQ
app = FastQ('tasks', broker={amqp_url!r})

@app.task(name='noop', ignore_result=True)
def noop():
    pass

def fill():
    from fastq.wire.message import encode_task
    from fastq.wire.ids import new_id
    body = b'[[], {{}}, {{}}]'
    for _ in range(60):
        app.publisher.publish([encode_task('noop', new_id(), body, ignore_result=True) for _ in range(1000)])
"""
    worker = start_worker("-c", "1", "-n", "busy@here", source=source, log_level="WARNING", await_ready=False)
    wait_until(lambda: ask(amqp_url) != {}, 30, lambda: AssertionError(worker.log()))
    program = [sys.executable, "-c", "import tasks; tasks.fill()"]
    filling = subprocess.Popen(program, cwd=worker.folder, env={**environment(), "PYTHONPATH": str(ROOT)})
    bus = open_blocking_bus(amqp_url, Settings({"broker_url": amqp_url}))
    times = []
    while filling.poll() is None:
        start = time.monotonic()
        assert dict(bus.ask("ping", {}, 10.0, ["busy@here"])) == {"busy@here": {"ok": "pong"}}
        times.append(time.monotonic() - start)
    bus.close()
    assert filling.returncode == 0
    assert len(times) > 5
    # What the declaring of a queue for the reply takes is in it as well.
    assert sorted(times)[len(times) // 2] < 0.2, times
