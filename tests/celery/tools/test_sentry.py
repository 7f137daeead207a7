"""sentry-sdk: what its server receives from the worker's processes, over HTTP, is the same."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


class Sink(http.server.ThreadingHTTPServer):
    """Sentry's server as far as the SDK sees it: keeps the events and transactions of the envelopes posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.items: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def dsn(self) -> str:
        return f"http://key@127.0.0.1:{self.server_address[1]}/1"

    def take(self, envelope: bytes) -> None:
        _, rest = envelope.split(b"\n", 1)
        while rest.strip():
            head, rest = rest.split(b"\n", 1)
            header = json.loads(head)
            size = header.get("length", rest.find(b"\n"))
            payload, rest = rest[:size], rest[size:].lstrip(b"\n")
            if header["type"] in ("event", "transaction"):
                with self.lock:
                    self.items.append({**json.loads(payload), "kind": header["type"]})

    def named(self, kind: str) -> list[dict[str, Any]]:
        with self.lock:
            return [item for item in self.items if item["kind"] == kind and item.get("transaction") != "client"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Takes envelopes."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Sink)
        self.server.take(body)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def error_of(event: dict[str, Any]) -> dict[str, Any]:
    exception = event["exception"]["values"][-1]
    frames = exception["stacktrace"]["frames"]
    return {
        "transaction": event["transaction"],
        "type": exception["type"],
        "value": exception["value"],
        "mechanism": exception["mechanism"],
        "where": [frame["function"] for frame in frames if frame["module"].startswith("tests.")],
        "tags": {**event["tags"], "celery_task_id": "an id" if event["tags"].get("celery_task_id") else None},
        "job": event["extra"]["celery-job"],
        "breadcrumbs": [(crumb["category"], crumb["message"]) for crumb in event["breadcrumbs"]["values"]],
        "op": event["contexts"]["trace"]["op"],
    }


def transaction_of(item: dict[str, Any]) -> tuple[Any, ...]:
    trace = item["contexts"]["trace"]
    tags = sorted(set(item.get("tags", {})) - {"celery_task_id"})
    spans = [(span["op"], span.get("description"), sorted(span.get("data", {}))) for span in item["spans"]]
    relevant = [span for span in spans if span[0] in ("queue.process", "queue.submit.celery", "queue.publish", "shop")]
    return item["transaction"], trace["op"], trace["status"], trace["origin"], tags, relevant


THREAD = ["thread.id", "thread.name"]
MESSAGE = ["messaging.destination.name", "messaging.message.id"]
MESSAGING = ["messaging.message.retry.count", "messaging.system", *THREAD]
COUNTING = ("shop", "counting", THREAD)

EXPECTED_ERRORS = [
    {
        "transaction": "crash",
        "type": "ValueError",
        "value": "order 7 has no items",
        "mechanism": {"type": "celery", "handled": False},
        "where": ["crash"],
        "tags": {"order": "7", "celery_task_id": "an id"},
        "job": {"task_name": "crash", "args": [7], "kwargs": {}},
        "breadcrumbs": [("shop", "order 7 taken")],
        "op": "queue.task.celery",
    },
    {
        "transaction": "custom",
        "type": "LookupError",
        "value": "from a class with a call of its own",
        "mechanism": {"type": "celery", "handled": False},
        "where": ["__call__", "custom"],
        "tags": {"celery_task_id": "an id"},
        "job": {"task_name": "custom", "args": [], "kwargs": {}},
        "breadcrumbs": [],
        "op": "queue.task.celery",
    },
]


def process(name: str) -> tuple[str, str, list[str]]:
    return "queue.process", name, [*MESSAGE, "messaging.message.receive.latency", *MESSAGING]


def submit(name: str) -> list[tuple[str, str, list[str]]]:
    spans = ("queue.submit.celery", name, THREAD)  # of apply_async and of send_task
    return [spans, spans, ("queue.publish", name, [*MESSAGE, *MESSAGING])]


def transaction(name: str, status: str, tags: list[str], *more: tuple[str, str, list[str]]) -> tuple[Any, ...]:
    return name, "queue.task.celery", status, "auto.queue.celery", tags, [process(name), *more]


EXPECTED_TRANSACTIONS = [
    transaction("add", "ok", ["status", "sum"], COUNTING),
    transaction("add", "ok", ["status", "sum"], COUNTING),
    transaction("crash", "internal_error", ["order", "status"]),
    transaction("custom", "internal_error", ["status"]),
    transaction("expected", "internal_error", ["status"]),
    transaction("flaky", "aborted", ["status"], *submit("flaky")),
    transaction("flaky", "ok", ["status"]),
    transaction("parent", "ok", ["status"], *submit("add")),
]


def test_sentry_receives_the_same(tool: Tool, sink: Sink) -> None:
    tool.environment["SENTRY_DSN"] = sink.dsn
    worker = tool.worker("sentry")
    client = tool.client("sentry")
    assert client["states"] == ["SUCCESS", "FAILURE", "FAILURE", "SUCCESS", "SUCCESS", "FAILURE"]
    wait_for(
        lambda: len(sink.named("transaction")) >= 8 and len(sink.named("event")) >= 2,
        15.0,
        lambda: f"received only {[(item['kind'], item['transaction']) for item in sink.items]}\n{worker.log()}",
    )
    worker.stop()  # what was still buffered is flushed at the end of each process

    errors = sorted(map(error_of, sink.named("event")), key=lambda error: str(error["transaction"]))
    assert errors == EXPECTED_ERRORS
    assert sorted(map(transaction_of, sink.named("transaction"))) == EXPECTED_TRANSACTIONS
    assert {item["contexts"]["trace"]["trace_id"] for item in sink.items} == {client["trace"]}
