"""A call to a server that takes connections and then says nothing ends when `fastq_publish_timeout` is over."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from fastq import FastQ
from fastq.errors import ConnectionLost, PublishError
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, Redis

TIMEOUT_S = 1.0
SLACK_S = 0.7


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


def app_on(url: str, backend: str = "disabled") -> FastQ:
    return FastQ(
        "test", broker=url, backend=backend, fastq_publish_timeout=TIMEOUT_S, broker_connection_timeout=0.4,
        broker_transport_options={"master_name": "m"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "amqp://127.0.0.1:{port}//",
        "redis://127.0.0.1:{port}/0",
        "redis://127.0.0.1:{port}/0;redis://127.0.0.1:{port}/1",
        "sentinel://127.0.0.1:{port}/0;sentinel://127.0.0.1:{port}/0",
    ],
    ids=["amqp", "redis", "two", "sentinel"],
)
def test_all_attempts_at_a_silent_server_share_one_deadline(url: str, silent_port: int) -> None:
    app = app_on(url.format(port=silent_port))
    began = time.monotonic()
    with pytest.raises((ConnectionLost, PublishError)):
        app.send_task("x")
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    app.close()


@pytest.mark.redis
@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["amqp", "rpc", "redis"])
@pytest.mark.parametrize("fault", ["hangs", "hangs for new ones"])
def test_a_server_that_falls_silent_ends_a_call_in_time(
    kind: str, fault: str, request: pytest.FixtureRequest, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    """The connection stands and nothing is answered; or it is lost, and new ones are not answered."""
    if kind == "redis":
        redis: Redis = request.getfixturevalue("redis_server")
        proxy, url = fault_proxy("127.0.0.1", redis.port), redis.url(4)
    else:
        rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
        proxy, url = fault_proxy("127.0.0.1", rabbitmq.port), request.getfixturevalue("amqp_url")
    app = app_on(proxy.url(url), "rpc://" if kind == "rpc" else "disabled")
    app.send_task("x")
    proxy.stall()
    if fault == "hangs for new ones":
        proxy.cut()
    began = time.monotonic()
    with pytest.raises((ConnectionLost, PublishError)):
        app.send_task("x")
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    proxy.resume()
    # What was left of that call's time does not bound the next one.
    app.send_task("x")
    if kind == "redis":
        publisher = app.publisher
        assert publisher._redis._timeout_s > 0.9 * TIMEOUT_S  # type: ignore[attr-defined]
    app.close()
