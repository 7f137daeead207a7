"""A broker that sends what AMQP forbids: the worker closes the connection, says why, does not grow, and comes back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastq.wire.message import encode_task, new_id
from tests.hostile import FRAME_BODY, FRAME_HEADER, FRAME_METHOD, HostileBroker, deliver, frame, method
from tests.malformed import MIB, headers, nested, properties, raw_fields, raw_properties
from tests.oracle import Ledger
from tests.stage import APP, until
from tests.test_malformed import memory_of
from tests.workers import WorkerProcess

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
    Attack("body-of-8-EiB", PLAIN_DELIVER + header(1 << 63) + frame(FRAME_BODY, 1, FLOOD[:1000]), "message of 9223372036854"),
    Attack("body-of-minus-1", PLAIN_DELIVER + header(0xFFFFFFFFFFFFFFFF), "message of 18446744073709551615 bytes"),
    Attack("body-longer-than-said", PLAIN_DELIVER + header(2) + frame(FRAME_BODY, 1, b"xyz"), "longer than its header said"),
    Attack("deliver-cut-in-tag", damaged_deliver(b"\xffabc"), "basic.deliver of 4 bytes is too short"),
    Attack("deliver-empty", damaged_deliver(b""), "basic.deliver of 0 bytes is too short"),
    Attack("deliver-cut-in-exchange", damaged_deliver(b"\x01t" + bytes(9) + b"\xff\x00"), "inside the exchange name"),
    Attack("deliver-cut-in-key", damaged_deliver(b"\x01t" + bytes(9) + b"\x00\xffce"), "inside the routing key"),
    Attack("close-cut-off", frame(FRAME_METHOD, 0, struct.pack(">HHH", 10, 50, 320) + b"\xffab"), "connection.close"),
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


def test_the_worker_survives_every_attack_and_comes_back(start: Callable[..., Target]) -> None:
    """One worker for all of them: each connection brings the next attack, the last one a task."""
    target = start([attack.data for attack in ATTACKS])
    worker = target.worker
    worker.wait_for_log("ready\\.", 15)
    before = memory_of(worker.pid, "VmRSS")
    target.ledger.wait_for_done(1, 60)
    growth = memory_of(worker.pid, "VmHWM") - before
    log = worker.log()
    lines = [line for line in log.splitlines() if LOST in line]
    print("\n".join(line.partition(LOST)[2].partition(". Trying")[0] for line in lines))
    print(f"memory grew by at most {growth / MIB:.1f} MiB over {len(ATTACKS)} attacks")
    assert worker.exit_code is None
    assert len(lines) == len(ATTACKS)
    for attack, line in zip(ATTACKS, lines, strict=True):
        assert attack.says in line, attack.name
    assert growth < GROWTH
    assert target.ledger.done() == {len(ATTACKS): 1}
    assert "Traceback" not in log
    # Everything that was opened was closed: the two connections of the last turn are left.
    until(lambda: target.broker.closed_by_client == target.broker.connections - 2, 5, "the worker closed the others")
    assert worker.stop(10) == 0


@pytest.mark.parametrize(
    ("size", "reason"),
    [(1000, "properties"), (30_000, "properties")],
    ids=["1000-deep", "as-deep-as-a-frame-holds"],
)
def test_a_delivery_with_deep_headers_is_rejected_and_the_connection_stays(
    start: Callable[..., Target], size: int, reason: str
) -> None:
    depth = min(size, (FRAME_MAX - 1000) // 7)
    deep = deliver(raw_properties(raw_fields((b"stamps", nested(depth)))), b"[[1], {}, {}]")
    target = start([])
    target.broker.attacks = [deep + good_delivery(0).replace(struct.pack(">Q", 1), struct.pack(">Q", 2), 1)]
    target.ledger.wait_for_done(1, 20)
    until(lambda: len(target.broker.settled) == 2, 5, "both are settled")
    assert sorted(target.broker.settled) == [("basic.ack", 2), ("basic.nack", 1)]
    assert f"Rejected malformed message: class={reason} " in target.worker.log()
    assert target.broker.subscriptions == 1


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("connection.start", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
        ("connection.start", frame(FRAME_METHOD, 0, bytes(200_000))),
        ("connection.start", frame(FRAME_METHOD, 0, struct.pack(">HHBBI", 10, 10, 0, 9, 0xFFFFFFFF) + b"\1k")),
        (
            "connection.start",
            frame(
                FRAME_METHOD,
                0,
                struct.pack(">HHBBI", 10, 10, 0, 9, len(nested(1000)) + 1) + b"\1k" + nested(1000) + bytes(8),
            ),
        ),
        ("connection.tune", method("connection.tune", channel_max=0, frame_max=64, heartbeat=0)),
        ("connection.tune", b""),
        ("queue.declare", frame(FRAME_METHOD, 2, struct.pack(">HH", 50, 11) + b"\xffcelery")),
        ("basic.consume", b""),
        ("channel.open", frame(FRAME_METHOD, 1, FLOOD, size=0x7FFFFFFF)),
    ],
    ids=[
        "http",
        "start-larger-than-a-frame",
        "start-with-a-false-table",
        "start-with-a-deep-table",
        "frame-max-64",
        "no-tune",
        "declare-ok-cut-off",
        "no-consume-ok",
        "open-ok-of-2-GiB",
    ],
)
def test_a_bad_answer_once_the_worker_had_been_connected_is_not_its_end(
    start: Callable[..., Target], name: str, reply: bytes
) -> None:
    """A broker that restarts is for a while a proxy's error page, or half a broker: a worker outlives that."""
    # The first turn ends by a false frame; the next one gets the bad answer; the one after that must work.
    target = start([])
    target.broker.attacks = [b""]
    target.worker.wait_for_log("ready\\.", 15)
    target.broker.replies[name] = reply
    target.broker.attacks += [good_delivery(0)] * 2
    target.broker.drop_connections()
    target.ledger.wait_for_done(1, 25)
    assert target.worker.exit_code is None
    assert name not in target.broker.replies
    assert "Traceback" not in target.worker.log()
