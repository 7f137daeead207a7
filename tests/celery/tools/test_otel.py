"""opentelemetry-instrumentation-celery: the trace over client and worker is the same tree of spans."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

VARYING = {"celery.hostname", "celery.reply_to", "messaging.message.id", "messaging.conversation_id"}
SPANS = 18

ADDED = ["apply_async/add (PRODUCER, UNSET)", [["run/add (CONSUMER, UNSET)", []]]]
EXPECTED = [
    [
        "client (INTERNAL, UNSET)",
        [
            ["apply_async/add (PRODUCER, UNSET)", [["run/add (CONSUMER, UNSET)", [ADDED]]]],  # the chain
            ADDED,
            [
                "apply_async/crash (PRODUCER, UNSET)",
                [["run/crash (CONSUMER, ERROR, no luck, exception:ValueError)", []]],
            ],
            [
                "apply_async/flaky (PRODUCER, UNSET)",
                [
                    [
                        "run/flaky (CONSUMER, UNSET, Retry in 0s: ConnectionError('not yet'))",
                        [["apply_async/flaky (PRODUCER, UNSET)", [["run/flaky (CONSUMER, UNSET)", []]]]],
                    ]
                ],
            ],
            [
                "apply_async/parent (PRODUCER, UNSET)",
                [["run/parent (CONSUMER, UNSET)", [["within (INTERNAL, UNSET)", [ADDED]]]]],
            ],
        ],
    ]
]
NAMES = ("add", "crash", "flaky", "parent")
DELIVERY = "{'exchange': '', 'routing_key': 'celery', 'priority': 0, 'redelivered': False}"
ATTRIBUTES = {
    *((f"{verb}/{name}", "celery.action", verb) for verb in ("apply_async", "run") for name in NAMES),
    *((f"{verb}/{name}", "celery.task_name", name) for verb in ("apply_async", "run") for name in NAMES),
    *((f"{verb}/{name}", "messaging.destination", "celery") for verb in ("apply_async", "run") for name in NAMES),
    *((f"apply_async/{name}", "messaging.destination_kind", "queue") for name in NAMES),
    *((f"run/{name}", "celery.delivery_info", DELIVERY) for name in NAMES),
    *((f"run/{name}", "celery.state", "SUCCESS") for name in ("add", "flaky", "parent")),
    ("run/crash", "celery.state", "FAILURE"),
    ("run/flaky", "celery.state", "RETRY"),
    ("run/flaky", "celery.retries", "1"),
    ("run/flaky", "celery.retry.reason", "Retry in 0s: ConnectionError('not yet')"),
}


def spans_of(tool: Tool) -> list[dict[str, Any]]:
    """Return the finished spans of all processes."""
    texts = [path.read_text(encoding="utf-8") for path in tool.folder.glob("spans-*.jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("}")]


def tree(spans: list[dict[str, Any]], parent: str | None = None) -> list[Any]:
    """Return the spans below a parent, each as (description, [below it])."""
    below = [span for span in spans if span["parent_id"] == parent]
    return sorted(([describe(span), tree(spans, span["context"]["span_id"])] for span in below), key=str)


def describe(span: dict[str, Any]) -> str:
    kind, status = span["kind"].removeprefix("SpanKind."), span["status"]
    said = [status.get("description"), span["attributes"].get("celery.retry.reason")]
    events = [f"{event['name']}:{event['attributes']['exception.type']}" for event in span["events"]]
    words = [kind, status["status_code"], *(text for text in said if text), *events]
    return f"{span['name']} ({', '.join(words)})"


def test_the_trace_is_the_same(tool: Tool) -> None:
    worker = tool.worker("otel")
    trace_id = tool.client("otel")
    spans = wait_for(
        lambda: len(spans := spans_of(tool)) >= SPANS and spans,
        15.0,
        lambda: f"only {sorted(span['name'] for span in spans_of(tool))}\n{worker.log()}",
    )
    assert tree(spans) == EXPECTED
    assert {span["context"]["trace_id"] for span in spans} == {trace_id}
    attributes = {
        (span["name"], name, str(value))
        for span in spans
        for name, value in span["attributes"].items()
        if name not in VARYING
    }
    assert attributes == ATTRIBUTES
