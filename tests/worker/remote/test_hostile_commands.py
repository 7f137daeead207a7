"""What remote control asks for, and floods of it: no task may be delayed, run twice or lost by it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange

from fastq.brokers import open_blocking_bus
from fastq.bus.pidbox import Mailbox
from tests.support.stage import Stage, open_stage, until

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

SURROGATE = "caf\udce9"  # any name from os.listdir()

#: Arguments of ``add_consumer`` that no broker takes.
NAMES: list[dict[str, Any]] = [
    {"queue": "q" * 256},
    {"queue": SURROGATE},
    {"queue": ["q"]},
    {"exchange": "x" * 256},
    {"exchange": SURROGATE},
    {"routing_key": "k" * 256},
    {"exchange_type": 7},
]
#: Those that RabbitMQ refuses, by closing a channel or the whole connection.
REFUSED: list[dict[str, Any]] = [
    {"exchange": "x", "exchange_type": "nonsense"},
    {"exchange": "amq.own"},
    {"exchange": "x", "queue_arguments": {"x-message-ttl": "soon"}},
    {"exchange": "x", "queue_arguments": {"x-queue-type": "nonsense"}},
    {"exchange": "x", "queue_arguments": ["a"]},
]

#: Tickets and addresses for a reply.
ODD: list[tuple[Any, Any]] = [
    (SURROGATE, "a"),
    ("t", "a" * 300),
    ("t" * 100_000, "a"),
    ("t", SURROGATE),
    ("\0", "\0"),
    (1e400, ["a"]),
    ({"a": [1]}, None),
]


@pytest.fixture(params=["amqp", "redis"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def test_what_a_command_asks_for_cannot_end_the_connection(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1")
    long = stage.send(1, "work", 4.0)
    until(lambda: bool(stage.ledger.started()), 10, "it runs")
    bus = open_blocking_bus(stage.url, stage.client.conf)
    for each in NAMES + (REFUSED if stage.kind == "amqp" else []):
        _, reply = next(bus.ask("add_consumer", {"queue": "more", **each}, 5.0))
        assert "error" in reply, (each, reply)
    _, reply = next(bus.ask("add_consumer", {"queue": "more"}, 5.0))
    assert reply == {"ok": "add consumer more"}
    bus.close()
    stage.wait_for(long, 15)
    stage.wait_for_settled()
    assert stage.ledger.started() == {long[0]: 1}
    assert "lost" not in worker.log()


def test_odd_addresses_and_tickets_do_not_end_the_bus(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1")
    mailbox = Mailbox(stage.client.conf)
    bus = open_blocking_bus(stage.url, stage.client.conf)
    assert next(bus.ask("ping", {}, 5.0))[1] == {"ok": "pong"}
    requests = Exchange(mailbox.requests, type="fanout")
    with Connection(stage.url) as connection, connection.Producer() as producer:
        for ticket, address in ODD:
            fields = {"method": "ping", "arguments": {}, "ticket": ticket}
            fields["reply_to"] = {"exchange": mailbox.replies, "routing_key": address}
            body = json.dumps(fields)
            producer.publish(body, exchange=requests, content_type="application/json", content_encoding="utf-8")
    assert next(bus.ask("ping", {}, 5.0))[1] == {"ok": "pong"}
    bus.close()
    assert "is away" not in worker.log()


def test_a_flood_of_commands_delays_no_task(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1")
    stage.wait_for(stage.send(10), 10)
    mailbox = Mailbox(stage.client.conf)
    requests = Exchange(mailbox.requests, type="fanout")
    body = json.dumps({"method": "stats", "arguments": {}})
    late = []
    with Connection(stage.url) as connection, connection.Producer() as producer:
        for _ in range(10):
            for _ in range(1000):
                producer.publish(body, exchange=requests, content_type="application/json", content_encoding="utf-8")
            sent_at = time.time()
            [number] = stage.send(1)
            stage.wait_for([number], 20)
            late += [entry.at_unix - sent_at for entry in stage.ledger.entries()[-2:] if entry.what == "start"]
    late.sort()
    print(f"{stage.kind}: tasks amid 10,000 commands start after {late[5] * 1e3:.1f} ms, {late[-1] * 1e3:.1f} at most")
    assert late[8] < 0.5
    assert worker.stop() == 0
