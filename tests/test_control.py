"""Remote control: what the messages look like, whom they are for, and a node that answers on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import uvloop

from fastq.amqp.connection import BlockingConnection, connect_any
from fastq.amqp.url import Endpoints
from fastq.cli.broadcast import broadcast
from fastq.errors import DecodeError
from fastq.settings import Settings
from fastq.wire.frames import publish_frames
from fastq.wire.message import Message, decode_properties, encode_properties
from fastq.worker.control import Control
from fastq.worker.pidbox import REPLY_EXCHANGE, Request, decode_reply, decode_request, encode_reply, encode_request
from tests.servers import RabbitMQ, wait_until
from tests.workers import WorkerProcess

JSON = encode_properties({"content_type": "application/json", "headers": {"clock": 7}})


# -- messages


def test_a_request_comes_back_as_it_was_sent() -> None:
    request = Request("ping", {"x": 1}, ["a@h"], "a*", "glob", "ticket", "address", 7)
    message = encode_request(request, 1e9)
    assert decode_request(message.props, message.body) == request
    assert message.exchange == "celery.pidbox"


def test_a_request_has_celery_s_form() -> None:
    message = encode_request(Request("ping", {}, ticket="t", reply_to="oid"), 2e9)
    assert orjson.loads(message.body) == {
        "method": "ping",
        "arguments": {},
        "destination": None,
        "pattern": None,
        "matcher": None,
        "ticket": "t",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "oid"},
    }
    properties = decode_properties(message.props)
    assert properties["content_type"] == "application/json"
    assert properties["delivery_mode"] == 1
    assert properties["headers"] == {"clock": 0, "expires": 2e9}


def test_a_reply_has_celery_s_form() -> None:
    message = encode_reply(Request("ping", {}, ticket="t", reply_to="oid"), "fastq@h", {"ok": "pong"}, 3)
    assert (message.exchange, message.routing_key) == ("reply.celery.pidbox", "oid")
    assert orjson.loads(message.body) == {"fastq@h": {"ok": "pong"}}
    assert decode_properties(message.props)["headers"] == {"ticket": "t", "clock": 3}
    assert decode_reply(message.props, message.body) == ("t", {"fastq@h": {"ok": "pong"}})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"destination": ["other@h"]}, False),
        ({"destination": ["other@h", "fastq@host1"]}, True),
        ({"destination": ["other@h"], "pattern": "*", "matcher": "glob"}, False),
        ({"pattern": "fastq@*", "matcher": "glob"}, True),
        ({"pattern": "celery@*", "matcher": "glob"}, False),
        ({"pattern": "fastq@.*1$", "matcher": "pcre"}, True),
        ({"pattern": "host1", "matcher": "pcre"}, False),
        ({"pattern": "(", "matcher": "pcre"}, False),
        ({"pattern": "fastq*", "matcher": "unknown"}, False),
    ],
)
def test_a_request_is_for_the_nodes_it_names(fields: dict[str, object], expected: bool) -> None:
    request = decode_request(JSON, orjson.dumps({"method": "ping", **fields}))
    assert request.is_for("fastq@host1") is expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "a*a*a*a*a*b", r"(a*)\1", "(?:a*)*b", "a?" * 50 + "a" * 50])
def test_a_pattern_that_could_take_for_ever_matches_nothing(pattern: str) -> None:
    start = time.monotonic()
    assert not Request("ping", {}, pattern=pattern, matcher="pcre").is_for("a" * 200)
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"7", b"{", b"{}", b'{"method": 3}', b'{"method": "ping", "arguments": [1]}',
     b'{"method": "ping", "destination": "fastq@h"}', b"\xff\xfe", b'{"method": "ping"' + b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_request(JSON, body)


@pytest.mark.parametrize(
    "props",
    [
        encode_properties({"content_type": "application/x-python-serialize"}),
        encode_properties({}),
        b"\xff\xff\xff",
        b"",
    ],
)
def test_properties_of_anything_but_json_are_a_decode_error(props: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_request(props, b'{"method": "ping"}')


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
def test_a_reply_goes_nowhere_but_to_the_reply_exchange(reply_to: object) -> None:
    assert decode_request(JSON, orjson.dumps({"method": "ping", "reply_to": reply_to})).reply_to == ""


# -- a node on a real broker


class Node:
    """A Control on a loop of its own, in a thread."""

    def __init__(self, url: str, hostname: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._is_ready = threading.Event()
        self._settings = Settings({"broker_url": url})
        self.hostname = hostname
        self.control: Control
        self._task: asyncio.Task[None]
        # Daemonic: a test that fails half-way must not keep pytest from ending.
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._main()], daemon=True)

    async def _main(self) -> None:
        self.control = Control(self._settings, self.hostname)
        self._task = asyncio.ensure_future(self.control.serve())
        self._is_ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def start(self) -> Node:
        self._thread.start()
        self._is_ready.wait(10)
        self.wait_until_listening()
        return self

    def wait_until_listening(self) -> None:
        wait_until(self.control.ready.is_set, 30, lambda: AssertionError("the node did not get to listen in 30 s"))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()


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


def ask(url: str, *destination: str, timeout_s: float = 0.5, method: str = "ping") -> dict[str, object]:
    return dict(broadcast(Settings({"broker_url": url}), method, timeout_s, destination))


@pytest.mark.rabbitmq
def test_a_node_answers_a_ping(node: Node, amqp_url: str) -> None:
    assert ask(amqp_url) == {"fastq@here": {"ok": "pong"}}
    assert ask(amqp_url, "fastq@there") == {}


@pytest.mark.rabbitmq
def test_asking_named_nodes_waits_no_longer_than_their_answers_take(node: Node, amqp_url: str) -> None:
    start = time.monotonic()
    assert ask(amqp_url, "fastq@here", timeout_s=20) == {"fastq@here": {"ok": "pong"}}
    assert time.monotonic() - start < 10


@pytest.mark.rabbitmq
def test_an_unknown_command_is_answered_as_celery_answers_it(node: Node, amqp_url: str) -> None:
    assert ask(amqp_url, "fastq@here", method="no_such") == {"fastq@here": {"error": "KeyError('no_such')"}}


@pytest.mark.rabbitmq
def test_messages_that_are_no_requests_change_nothing(
    node: Node, amqp_url: str, connection: BlockingConnection
) -> None:
    connection.open_channel(1)
    hostile = [
        (JSON, b""), (JSON, b"null"), (JSON, b'{"method": []}'), (encode_properties({}), b"x" * 300_000),
        (JSON, orjson.dumps({"method": "ping", "reply_to": {"exchange": REPLY_EXCHANGE, "routing_key": "x" * 400}})),
        (JSON, orjson.dumps({"method": "ping", "arguments": {"surprise": 1}})),
    ]  # fmt: skip
    for props, body in hostile:
        connection.transmit(publish_frames(1, Message("celery.pidbox", "", props, body), connection.frame_max))
    assert ask(amqp_url) == {"fastq@here": {"ok": "pong"}}
    assert node.control.malformed == 4


@pytest.mark.rabbitmq
def test_a_node_listens_again_after_the_broker_was_away(rabbitmq: RabbitMQ, node: Node, amqp_url: str) -> None:
    rabbitmq.restart()
    node.wait_until_listening()
    pong = {"fastq@here": {"ok": "pong"}}
    wait_until(lambda: ask(amqp_url, "fastq@here") == pong, 60, lambda: AssertionError("the node did not come back"))


@pytest.mark.rabbitmq
def test_status_lists_the_node_as_celery_s_does(node: Node, amqp_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastq", "-b", amqp_url, "status"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "->  fastq@here: OK\n\n1 node online.\n")
    as_json = subprocess.run([*command, "-j"], cwd=root, capture_output=True, text=True, check=True)
    assert orjson.loads(as_json.stdout) == {"fastq@here": {"ok": "pong"}}


@pytest.mark.rabbitmq
def test_celery_s_own_status_sees_the_node(node: Node, amqp_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "celery", "-b", amqp_url, "status"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "->  fastq@here: OK\n\n1 node online.\n")


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
