"""The end of a Celery application that a test has made as a client."""

from __future__ import annotations

import contextlib

import celery


def close_client(client: celery.Celery) -> None:
    """Close its connections, such that results which outlive it open none again."""
    consumer = getattr(client.backend, "result_consumer", None)
    if consumer is not None:
        with contextlib.suppress(AttributeError):  # one that never waited for anything has nothing to stop
            consumer.stop()
        consumer.cancel_for = lambda task_id: None
    client.close()
