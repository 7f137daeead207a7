"""Fixtures that every test may ask for: real servers, a database file, a worker process, a fault proxy.

A missing server skips the test here and fails it in CI, so that a lost install step cannot pass for green.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq import app as fastq_app
from tests import ROOT
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, Redis, ServerMissing, free_ports
from tests.support.worker_process import WorkerProcess

#: Makes a Redis server of a test's own, with this password.
OwnRedis = Callable[..., Redis]

# What depends on the interpreter most: the compiled parts and the task API.
SMOKE_FOLDERS = ("wire", "core", "api", "brokers/memory")
SMOKE_PLACES = {ROOT / "tests" / folder for folder in SMOKE_FOLDERS}


# What breaks most is looked at first, so that it shows within three minutes; then what takes longest, so that nobody
# waits for it at the end.
FIRST = ("house/test_lint", "house/test_layers", "house/test_typing", "wire", "codecs", "net", "core", "api", "sending")
LONGEST = (
    *("worker/kinds", "fuzz", "soak", "celery/test_strikes", "celery/test_mixed", "celery/test_tasks"),
    *(
        "celery/test_options",
        "celery/test_hookpoints",
        "celery/test_canvas",
        "celery/test_accelerate",
        "celery/test_events",
    ),
    *("worker/test_reliability", "worker/test_hostile_input", "worker/test_malformed", "brokers/redis", "cli"),
)


def turn_of(item: pytest.Item) -> tuple[int, int]:
    """Return when an item's file is to be run, the least first."""
    try:
        place = str(item.path.relative_to(ROOT / "tests"))
    except ValueError:  # in bench/
        return 2, 0
    if place.startswith(FIRST):
        return 0, 0
    return next(((1, turn) for turn, start in enumerate(LONGEST) if place.startswith(start)), (2, 0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the files of the smoke test, and what says how stock Celery alone behaves; put all in order."""
    items.sort(key=turn_of)
    for item in items:
        if item.path.parent in SMOKE_PLACES:
            item.add_marker(pytest.mark.smoke)
        if "under_celery" in item.name:
            item.add_marker(pytest.mark.reference)


def missing(error: ServerMissing) -> None:
    """Skip on a developer's machine, fail in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def closed_applications() -> Iterator[None]:
    """Close what a file's applications have left open: the last one made is kept alive by the next one only."""
    yield
    for application in list(fastq_app._apps):
        application.close()
    # kombu's go by URL, whichever application made them: the next file would get one to a server restarted since.
    if "kombu.pools" in sys.modules:
        sys.modules["kombu.pools"].reset()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A private RabbitMQ, one for the whole session; a test that restarts it leaves it running."""
    try:
        server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    except ServerMissing as error:
        missing(error)
        raise
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A private Redis, one for the whole session."""
    try:
        server = Redis(tmp_path_factory.mktemp("redis"))
    except ServerMissing as error:
        missing(error)
        raise
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    """A function that returns a server that is not started yet, its port closed; with a password if one is given."""
    opened: list[Redis] = []

    def open_redis(password: str = "") -> Redis:
        try:
            server = Redis(tmp_path_factory.mktemp("own-redis"), {"requirepass": password} if password else None)
        except ServerMissing as error:
            missing(error)
            raise
        server.port = free_ports(1)
        opened.append(server)
        return server

    yield open_redis
    for server in opened:
        server.close()


@pytest.fixture
def amqp_vhost(rabbitmq: RabbitMQ) -> Iterator[str]:
    """The name of a virtual host of the test's own; it is deleted, with its queues and connections, afterwards."""
    vhost = rabbitmq.new_vhost()
    yield vhost
    rabbitmq.delete_vhost(vhost)


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ, amqp_vhost: str) -> str:
    """The URL of the test's own virtual host."""
    return rabbitmq.url(amqp_vhost)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a database file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'fastq.db'}"


@pytest.fixture
def fault_proxy() -> Iterator[Callable[[str, int], FaultProxy]]:
    """A function that returns a running proxy to a host and port; all are closed afterwards."""
    proxies: list[FaultProxy] = []

    def start(host: str, port: int) -> FaultProxy:
        proxies.append(FaultProxy(host, port).start())
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """A function with WorkerProcess's arguments after the folder; it returns a worker that is ready.

    Whatever is still running at the end of the test is killed.
    """
    workers: list[WorkerProcess] = []

    def start(*arguments: str, **options: Any) -> WorkerProcess:
        folder = tmp_path / f"worker{len(workers) + 1}"
        folder.mkdir()
        worker = WorkerProcess(folder, *arguments, **options)
        workers.append(worker)
        return worker.start()

    yield start
    for worker in workers:
        worker.kill9()
