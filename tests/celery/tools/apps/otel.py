"""opentelemetry-instrumentation-celery, set up as its manual says; spans go to files of TOOL_FOLDER, a line each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery import Celery, chain
from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

app = Celery("otel_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])


class ToFile(SpanExporter):
    """Appends each span as a line to a file of this process."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        path = Path(os.environ["TOOL_FOLDER"], f"spans-{os.getpid()}.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.writelines(span.to_json(indent=None) + "\n" for span in spans)
        return SpanExportResult.SUCCESS


def instrument(**_: Any) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ToFile()))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()


worker_process_init.connect(instrument, weak=False)


@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="crash")
def crash() -> None:
    raise ValueError("no luck")


@app.task(name="flaky", bind=True, max_retries=1)
def flaky(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(exc=ConnectionError("not yet"), countdown=0)
    return "second time"


@app.task(name="parent")
def parent() -> None:
    with trace.get_tracer("shop").start_as_current_span("within"):
        add.delay(1, 1)


def main() -> None:
    """Send every task within one span; print the trace's id."""
    instrument()
    with trace.get_tracer("test").start_as_current_span("client") as span:
        results = [
            add.delay(2, 3),
            crash.delay(),
            flaky.delay(),
            parent.apply_async(headers={"mine": "kept"}),
            chain(add.s(1, 2), add.s(3)).apply_async(),
        ]
        for result in results:
            result.get(timeout=20, propagate=False)
    print(json.dumps(f"0x{span.get_span_context().trace_id:032x}"))


if __name__ == "__main__":
    main()
