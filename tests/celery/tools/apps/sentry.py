"""sentry-sdk with its Celery integration: errors, transactions, breadcrumbs and tags, sent to SENTRY_DSN."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import sentry_sdk
from celery import Celery
from sentry_sdk.integrations.celery import CeleryIntegration

sentry_sdk.init(
    dsn=os.environ["SENTRY_DSN"],
    release="1.0",
    traces_sample_rate=1.0,
    send_default_pii=True,
    _experiments={"transport_compression_algo": "gzip"},  # else brotli where that is installed
    integrations=[CeleryIntegration()],
)

app = Celery("sentry_app", broker=os.environ["TOOL_BROKER"], backend=os.environ["TOOL_RESULTS"])
logger = logging.getLogger("shop")


@app.task(name="add")
def add(x: int, y: int) -> int:
    sentry_sdk.set_tag("sum", "yes")
    with sentry_sdk.start_span(op="shop", name="counting"):
        return x + y


@app.task(name="crash")
def crash(order: int) -> None:
    logger.info("order %s taken", order)
    sentry_sdk.set_tag("order", str(order))
    raise ValueError(f"order {order} has no items")


@app.task(name="expected", throws=(KeyError,))
def expected() -> None:
    raise KeyError("known to happen")


@app.task(name="flaky", bind=True, max_retries=1)
def flaky(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "second time"


@app.task(name="parent")
def parent() -> str:
    return str(add.delay(1, 1).id)


class Custom(app.Task):  # type: ignore[name-defined,misc]
    """The integration patches the class's own __call__ where there is one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@app.task(name="custom", base=Custom)
def custom() -> None:
    raise LookupError("from a class with a call of its own")


def main() -> None:
    """Send every task within one transaction; print the trace's id."""
    with sentry_sdk.start_transaction(op="test", name="client") as transaction:
        results = [add.delay(2, 3), crash.delay(7), expected.delay(), flaky.delay(), parent.delay(), custom.delay()]
        for result in results:
            result.get(timeout=20, propagate=False)
    sentry_sdk.flush()
    print(json.dumps({"trace": transaction.trace_id, "states": [result.state for result in results]}))


if __name__ == "__main__":
    main()
