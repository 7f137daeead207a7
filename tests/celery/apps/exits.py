"""What tools do around a child's life: code around billiard's loop and exit, connections made before the fork.

EXITS_TOOL  workloop, _do_exit: a wrapper there that bears the original's name; sentry: sentry-sdk, whose transport
            waits for a flush; connections: the main process uses all of them before it forks
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from billiard.pool import Worker
from celery import signals

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})
TOOL = os.environ.get("EXITS_TOOL", "")


def wrap(method: str) -> None:
    """Put a function of ours around a method of billiard's worker, as New Relic and Sentry do."""
    original: Callable[..., Any] = getattr(Worker, method)

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        if method == "_do_exit":
            note("exit", method=method)
        try:
            return original(*args, **kwargs)
        finally:
            if method == "workloop":
                note("exit", method=method)

    setattr(Worker, method, around)


if TOOL in ("workloop", "_do_exit"):
    wrap(TOOL)
elif TOOL == "sentry":
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration

    class Patient(sentry_sdk.Transport):
        """Sends what it has when it is told to flush, and not before."""

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.held: list[str] = []

        def capture_envelope(self, envelope: Any) -> None:
            self.held += [item.type for item in envelope.items]

        def flush(self, timeout: float, callback: Any = None) -> None:
            held, self.held = self.held, []
            if held:
                note("flushed", kinds=held)

    sentry_sdk.init(dsn="http://key@localhost:1/1", transport=Patient, integrations=[CeleryIntegration()])


def redis_id() -> int | None:
    """Return the number of this process's connection to the result store."""
    client = getattr(app.backend, "client", None)
    return None if client is None else int(client.client_id())


def broker_port() -> int | None:
    """Return the local port of this process's connection to RabbitMQ, over which it sends."""
    with app.producer_pool.acquire(block=True) as producer:
        sock = getattr(producer.connection.connection, "sock", None)
        return None if sock is None else int(sock.getsockname()[1])


@signals.worker_init.connect
def use_everything_before_the_fork(**arguments: Any) -> None:
    if TOOL != "connections":
        return
    app.backend.store_result("before", "kept", "SUCCESS")
    app.send_task("ping", task_id="sent-by-main")
    note("connections", redis=redis_id(), broker=broker_port())


@app.on_after_fork.connect
def tell_of_the_fork(sender: Any, **arguments: Any) -> None:
    note("after_fork", main=sender.main)


@app.task(name="ping")
def ping() -> int:
    return os.getpid()


@app.task(name="crash")
def crash() -> None:
    raise ValueError("seen by the tool")


@app.task(name="connections", bind=True)
def connections(self: Any, gate: str) -> list[Any]:
    """Hold a child until the other one has this task too."""
    note("holding", id=self.request.id)
    while not os.path.exists(gate):
        pass
    app.send_task("ping")
    note("connections", redis=redis_id(), broker=broker_port())
    return [os.getpid(), app.AsyncResult("before").result]
