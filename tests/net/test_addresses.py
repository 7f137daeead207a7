"""A name with two addresses, the first of which swallows packets or says nothing: whoever connects reaches the other
one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvloop

from fastq.brokers import open_blocking_bus, open_publisher
from fastq.brokers.rabbitmq.connection import connect_any
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost
from fastq.net import tcp
from fastq.net.tcp import connect_first, connect_first_on
from fastq.settings import Settings
from tests.support.stage import Stage, open_stage
from tests.support.worker_process import WorkerProcess

HOST = "two-places.test"
TIMEOUT_S = 2.0

#: A worker's part of the fixture: what its name resolves to.
RESOLVER = """
import os, socket
import uvloop

PORTS = [int(port) for port in os.environ["FASTQ_TEST_PORTS"].split(",")]
resolve, resolve_on = socket.getaddrinfo, uvloop.Loop.getaddrinfo

def places(port):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", each)) for each in PORTS]

def getaddrinfo(host, port, *args, **kwargs):
    return places(port) if host == "two-places.test" else resolve(host, port, *args, **kwargs)

async def getaddrinfo_on(self, host, port, **kwargs):
    return places(port) if host == "two-places.test" else await resolve_on(self, host, port, **kwargs)

socket.getaddrinfo = getaddrinfo
uvloop.Loop.getaddrinfo = getaddrinfo_on
"""


@pytest.fixture
def swallowing() -> Iterator[int]:
    """A port where connections are neither taken nor refused: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        while True:
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.3)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that has the name stand for ports of this machine, in this process."""
    real = socket.getaddrinfo

    def resolve(*ports: int) -> None:
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

        def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
            return places if host == HOST else real(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return resolve


def on_loop(port: int, timeout_s: float, *ports: int) -> socket.socket:
    class Loop(uvloop.Loop):
        async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:  # type: ignore[override]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", each)) for each in ports]

    loop = Loop()
    try:
        return loop.run_until_complete(asyncio.wait_for(connect_first_on(loop, HOST, port), timeout_s))
    finally:
        loop.close()


Connect = Callable[..., socket.socket]


@pytest.fixture(params=["blocking", "loop"])
def connect(request: pytest.FixtureRequest, resolve: Callable[..., None]) -> Connect:
    """A function that connects to the first of these ports that takes a connection, within the time."""

    def connect(*ports: int, timeout_s: float = 5.0) -> socket.socket:
        if request.param == "loop":
            return on_loop(1, timeout_s, *ports)
        resolve(*ports)
        return connect_first(HOST, 1, timeout_s)

    return connect


def test_the_first_address_that_takes_a_connection_is_used(connect: Connect, swallowing: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        second = other.getsockname()[1]
        for ports in ([port], [swallowing, port], [swallowing] * 2 + [port], [port, swallowing], [port, second]):
            began = time.monotonic()
            with connect(*ports) as sock:
                assert sock.getpeername()[1] == port
            assert time.monotonic() - began < 3.0


def test_an_address_that_refuses_costs_no_wait(
    connect: Connect, swallowing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "DELAY_S", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        refusing = socket.create_server(("127.0.0.1", 0))
        nobody = refusing.getsockname()[1]
        refusing.close()
        began = time.monotonic()
        with connect(nobody, nobody, server.getsockname()[1]) as sock:
            assert sock.getpeername() == server.getsockname()
        assert time.monotonic() - began < 3.0
    with pytest.raises(ConnectionRefusedError):
        connect(nobody, nobody)


def test_where_nobody_answers_the_time_ends_it(connect: Connect, swallowing: int) -> None:
    began = time.monotonic()
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        connect(swallowing, swallowing, timeout_s=0.6)
    assert 0.5 < time.monotonic() - began < 3.0


@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_all_that_connects_reaches_the_second_address(
    request: pytest.FixtureRequest, tmp_path: Path, kind: Any, swallowing: int, resolve: Callable[..., None]
) -> None:
    reached = open_stage(kind, request, tmp_path)
    place = urlsplit(reached.url)
    resolve(swallowing, place.port or 0)
    url = place._replace(netloc=place.netloc.replace(str(place.hostname), HOST)).geturl()
    folder = tmp_path / "two"
    folder.mkdir()
    limits = {"broker_connection_timeout": TIMEOUT_S, "fastq_publish_timeout": TIMEOUT_S}
    stage = Stage(kind, url, folder, **limits)  # without the server: it would add a policy by a name that it has not
    (folder / "resolver.py").write_text(RESOLVER)
    (folder / "tasks.py").write_text("import resolver\nfrom tests.support.tasks_for_faults import app\n")
    environment = stage.environment() | {"FASTQ_TEST_PORTS": f"{swallowing},{place.port}"}
    worker = WorkerProcess(folder, "-c", "1", app="tasks", env=environment)
    try:
        worker.start()
        assert stage.call("work").get(timeout=20) == 0
        with contextlib.closing(open_blocking_bus(stage.url, stage.client.conf)) as bus:
            assert [reply for _, reply in bus.ask("ping", {}, 2.0)] == [{"ok": "pong"}]
        assert "Cannot connect" not in worker.log()
    finally:
        worker.kill9()
        stage.close()
        reached.close()


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that takes connections and says nothing: a program that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def open_blocking(url: str, settings: Settings) -> None:
    if url.startswith("amqp"):
        connect_any(Endpoints(url, settings), settings, "test", 1.0).close()
        return
    with contextlib.closing(BlockingRedis(parse_redis_url(url, settings), 1.0, "test")) as client:
        client.open()


@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_an_address_that_says_nothing_is_tried_last_from_then_on(
    request: pytest.FixtureRequest, tmp_path: Path, kind: Any, mute: int, resolve: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tcp, "_silent", {})
    stage = open_stage(kind, request, tmp_path)
    place = urlsplit(stage.url)
    resolve(mute, place.port or 0)
    url = place._replace(netloc=place.netloc.replace(str(place.hostname), HOST)).geturl()
    settings = Settings({"broker_url": url, "broker_connection_timeout": 1.0})
    try:
        with pytest.raises(ConnectionLost):
            open_blocking(url, settings)
        open_blocking(url, settings)
        (tmp_path / "resolver.py").write_text(RESOLVER)
        (tmp_path / "tasks.py").write_text("import resolver\nfrom tests.support.tasks_for_faults import app\n")
        environment = stage.environment(url, broker_connection_timeout=1.0, result_backend="disabled")
        environment["FASTQ_TEST_PORTS"] = f"{mute},{place.port}"
        worker = WorkerProcess(tmp_path, "-c", "1", app="tasks", env=environment)
        stage.workers.append(worker)
        worker.start()
        stage.wait_for(stage.send(1), 20)
    finally:
        stage.close()


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_a_connection_that_is_reset_at_once_is_lost_and_nothing_else(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's address is not to be had then."""

    def connect(*place: Any) -> socket.socket:
        sock = connect_first(*place)
        time.sleep(0.01)  # the reset has come
        return sock

    module = {"amqp": "rabbitmq", "redis": "redis"}[scheme]
    monkeypatch.setattr(f"fastq.brokers.{module}.tcp.connect_first", connect)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)

        def reset() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()

        thread = threading.Thread(target=reset)
        thread.start()
        publisher = open_publisher(f"{scheme}://127.0.0.1:{server.getsockname()[1]}", Settings())
        for _ in range(5):
            with pytest.raises(ConnectionLost):
                publisher.depth("celery")
        publisher.close()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
