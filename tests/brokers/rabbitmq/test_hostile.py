"""A broker that sends what AMQP forbids: the worker closes the connection, says why, does not grow, and comes back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.hostile_servers import FRAME_BODY, FRAME_HEADER, FRAME_METHOD, HostileBroker, deliver, frame, method
from tests.support.malformed_messages import MIB, headers, nested, properties, raw_fields, raw_properties
from tests.support.stage import APP, until
from tests.support.task_ledger import Ledger
from tests.support.worker_process import WorkerProcess
from tests.worker.test_malformed import memory_of

FRAME_MAX = 131072
GROWTH = 8 * MIB  # 1 MiB is the goal; the rest is the noise of a process that starts
LOST = "Connection to broker lost: "

GOOD_PROPS = properties(headers())
PLAIN_DELIVER = method(
    "basic.deliver", 1, consumer_tag="tag", delivery_tag=1, redelivered=False, exchange="", routing_key="celery"
)


@dataclass(frozen=True)
class Attack:
    """Bytes for a worker that has just subscribed, and what its log is to say."""

    name: str
    data: bytes
    says: str

    def __str__(self) -> str:
        return self.name


def header(body_size: int, props: bytes = GOOD_PROPS) -> bytes:
    """Return a content header frame that announces a body of this size."""
    return frame(FRAME_HEADER, 1, struct.pack(">HHQ", 60, 0, body_size) + props)


def damaged_deliver(arguments: bytes) -> bytes:
    """Return a basic.deliver with these arguments."""
    return frame(FRAME_METHOD, 1, struct.pack(">HH", 60, 60) + arguments)


FLOOD = bytes(4 * MIB)

ATTACKS = [
    Attack("frame-of-4-GiB", frame(FRAME_METHOD, 1, FLOOD, size=0xFFFFFFFF), "announced a frame of 4294967303 bytes"),
    Attack("frame-of-minus-8", frame(FRAME_BODY, 1, FLOOD, size=0xFFFFFFF8), "announced a frame of 4294967296 bytes"),
    Attack("frame-max-and-1", frame(FRAME_BODY, 1, bytes(FRAME_MAX - 7)), f"a frame of {FRAME_MAX + 1} bytes"),
    Attack("10-MB-of-headers", PLAIN_DELIVER + header(2, bytes(10_000_000)), "announced a frame of 10000020 bytes"),
    Attack("wrong-end-byte", frame(FRAME_METHOD, 1, bytes(4), end=0), "does not end in 0xCE but in 0x00"),
    Attack("unknown-frame-type", frame(77, 1, b""), "frame of unknown type 77"),
    Attack("method-of-2-bytes", frame(FRAME_METHOD, 1, b"\0\0"), "method frame of 2 bytes"),
    Attack("header-of-nothing", header(2), "header came without its method"),
    Attack("body-of-nothing", frame(FRAME_BODY, 1, b"x"), "body frame came without its header"),
    Attack("body-before-header", PLAIN_DELIVER + frame(FRAME_BODY, 1, b"x"), "body frame came without its header"),
    Attack("method-inside-content", PLAIN_DELIVER + PLAIN_DELIVER, "where a message's content was due"),
    Attack("short-header", PLAIN_DELIVER + frame(FRAME_HEADER, 1, bytes(11)), "content header of 11 bytes"),
    Attack("body-of-8-EiB", PLAIN_DELIVER + header(1 << 63) + frame(FRAME_BODY, 1, b"x"), "announces 9223372036854"),
    Attack("body-of-minus-1", PLAIN_DELIVER + header(0xFFFFFFFFFFFFFFFF), "announces 18446744073709551615 bytes"),
    Attack("body-longer-than-said", PLAIN_DELIVER + header(2) + frame(FRAME_BODY, 1, b"xyz"), "longer than its header"),
    Attack("deliver-cut-in-tag", damaged_deliver(b"\xffabc"), "basic.deliver of 4 bytes is too short"),
    Attack("deliver-empty", damaged_deliver(b""), "basic.deliver of 0 bytes is too short"),
    Attack("deliver-cut-in-exchange", damaged_deliver(b"\x01t" + bytes(9) + b"\xff\x00"), "inside the exchange name"),
    Attack("deliver-cut-in-key", damaged_deliver(b"\x01t" + bytes(9) + b"\x00\xffce"), "inside the routing key"),
    Attack("close-cut-off", frame(FRAME_METHOD, 0, struct.pack(">HHH", 10, 50, 320) + b"\xffab"), "field of 255 bytes"),
    Attack("unknown-method", frame(FRAME_METHOD, 0, struct.pack(">HH", 77, 77)), "method"),
]  # fmt: skip


class Target:
    """A worker whose broker means harm."""

    def __init__(self, folder: Path, attacks: list[bytes], **replies: bytes) -> None:
        self.ledger = Ledger(folder / "ledger.bin")
        self.broker = HostileBroker([*attacks, good_delivery(len(attacks))], replies)
        self.broker.__enter__()
        self.worker = WorkerProcess(
            folder,
            "-c",
            "1",
            app=APP,
            env={
                "FASTQ_BROKER_URL": self.broker.url,
                "FASTQ_TEST_LEDGER": str(self.ledger.path),
                "FASTQ_TEST_SETTINGS": json.dumps({"broker_connection_timeout": 1, "broker_heartbeat": 0}),
            },
            await_ready=False,
        ).start()

    def close(self) -> None:
        self.worker.kill9()
        self.broker.__exit__()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    targets: list[Target] = []

    def start_target(attacks: list[bytes], **replies: bytes) -> Target:
        targets.append(Target(tmp_path, attacks, **replies))
        return targets[-1]

    yield start_target
    for target in targets:
        target.close()


def good_delivery(number: int) -> bytes:
    """Return the delivery of a task that runs."""
    message = encode_task("work", new_id(), json.dumps([[number], {}, {}]).encode())
    return deliver(message.props, message.body)


@pytest.mark.parametrize("attacks", [ATTACKS[0::2], ATTACKS[1::2]], ids=["even", "odd"])
def test_the_worker_survives_every_attack_and_comes_back(start: Callable[..., Target], attacks: list[Attack]) -> None:
    """One worker for many attacks: each connection brings the next one, the last connection a task."""
    target = start([attack.data for attack in attacks])
    worker = target.worker
    worker.wait_for_log("ready\\.", 15)
    before = memory_of(worker.pid, "VmRSS")
    target.ledger.wait_for_done(1, 60)
    growth = memory_of(worker.pid, "VmHWM") - before
    log = worker.log()
    # An attack that comes with the answer to the subscription is found out while the worker still connects.
    lines = [line for line in log.splitlines() if LOST in line or "Cannot connect to" in line]
    print("\n".join(line.partition("MainProcess] ")[2] for line in lines))
    print(f"memory grew by at most {growth / MIB:.1f} MiB over {len(attacks)} attacks")
    assert worker.exit_code is None
    assert len(lines) == len(attacks)
    for attack, line in zip(attacks, lines, strict=True):
        assert attack.says in line, attack.name
    assert growth < GROWTH
    assert target.ledger.done() == {len(attacks): 1}
    assert "Traceback" not in log
    # What was opened was closed: three connections are left, for tasks, publishing and control.
    until(lambda: target.broker.ended == target.broker.connections - 3, 5, "the worker closed the others")
    assert worker.stop(10) == 0


@pytest.mark.parametrize("depth", [1000, (FRAME_MAX - 1000) // 7], ids=["1000-deep", "as-deep-as-a-frame-holds"])
def test_a_delivery_with_deep_headers_is_rejected_and_the_connection_stays(
    start: Callable[..., Target], depth: int
) -> None:
    message = encode_task("work", new_id(), b"[[0], {}, {}]")
    deep = deliver(raw_properties(raw_fields((b"stamps", nested(depth)))), b"[[1], {}, {}]")
    target = start([deep + deliver(message.props, message.body, tag=2)])
    target.ledger.wait_for_done(1, 20)
    until(lambda: ("basic.ack", 2) in target.broker.settled, 5, "the good one is acknowledged")
    assert ("basic.nack", 1) in target.broker.settled
    assert target.ledger.done() == {0: 1}
    assert "Rejected malformed message: class=properties " in target.worker.log()
    assert target.broker.subscriptions == 1


def start_with(server_properties: bytes) -> bytes:
    """Return a connection.start with these bytes for its table."""
    return frame(FRAME_METHOD, 0, struct.pack(">HHBB", 10, 10, 0, 9) + server_properties + bytes(8))


DEEP_TABLE = struct.pack(">I", len(nested(1000)) + 2) + b"\1k" + nested(1000)
BAD_ANSWERS = {
    "http": ("connection.start", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "start-larger-than-a-frame": ("connection.start", frame(FRAME_METHOD, 0, bytes(200_000))),
    "start-with-a-false-table": ("connection.start", start_with(b"\xff\xff\xff\xff\1k")),
    "start-with-a-deep-table": ("connection.start", start_with(DEEP_TABLE)),
    "no-tune": ("connection.tune", b""),
    "frame-max-64": ("connection.tune", method("connection.tune", channel_max=0, frame_max=64, heartbeat=0)),
    "open-ok-of-2-GiB": ("channel.open", frame(FRAME_METHOD, 1, FLOOD, size=0x7FFFFFFF)),
    "declare-ok-cut-off": ("queue.declare", frame(FRAME_METHOD, 2, struct.pack(">HH", 50, 11) + b"\xffcelery")),
    "refused": ("queue.declare", method("channel.close", 2, reply_code=403, reply_text="ACCESS_REFUSED")),
    "consume-ok-and-garbage": ("basic.consume", method("basic.consume-ok", 1, consumer_tag="tag") + b"\xff" * 8),
}


@pytest.mark.parametrize(("name", "reply"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_bad_answer_once_the_worker_had_been_connected_is_not_its_end(
    start: Callable[..., Target], name: str, reply: bytes
) -> None:
    """A broker that restarts is for a while a proxy's error page, or half a broker: a worker outlives that."""
    target = start([b""])
    target.worker.wait_for_log("ready\\.", 15)
    target.broker.replies[name] = reply
    # The subscription after the bad answer gets a task, whether or not the bad answer came with one.
    target.broker.attacks += [good_delivery(1)] * 2
    target.broker.drop_connections()
    target.ledger.wait_for_done(1, 10)
    log = target.worker.log()
    print([line.partition("Cannot connect to ")[2] for line in log.splitlines() if "Cannot connect to" in line])
    assert name not in target.broker.replies
    assert target.worker.exit_code is None
    assert "Traceback" not in log


def test_a_flood_of_notices_that_it_blocks_publishers_is_one_line_a_while(start: Callable[..., Target]) -> None:
    target = start([])
    target.worker.wait_for_log("ready\\.", 15)
    blocked, unblocked = method("connection.blocked", reason="short of memory"), method("connection.unblocked")
    before = memory_of(target.worker.pid, "VmRSS")
    target.broker.send_all(blocked * 20_000)
    target.worker.wait_for_log("blocks publishers", 10)
    target.broker.send_all((unblocked + blocked) * 20_000 + unblocked)
    # What is said last is how it is.
    target.worker.wait_for_log("takes messages again", 30)
    log = target.worker.log()
    lines = [line for line in log.splitlines() if "blocks publishers" in line or "takes messages again" in line]
    print("\n".join(lines))
    # Three connections, each with two changes to tell.
    assert len(lines) <= 3 * 3
    assert memory_of(target.worker.pid, "VmHWM") - before < GROWTH
    assert target.worker.exit_code is None
    assert LOST not in log
