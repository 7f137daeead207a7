"""Every spelling of a broker's URL has the whole of it: a worker, its results, remote control, and events."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import orjson
import pytest

from fastq import FastQ
from fastq.brokers import BROKERS, find_broker, open_blocking_bus
from fastq.settings import Settings
from tests.support.control_node import command_line
from tests.support.servers import Redis
from tests.support.worker_process import WorkerProcess

SOURCE = "from fastq import FastQ\napp = FastQ('schemes')\n@app.task(name='add')\ndef add(a, b): return a + b\n"
CELERY_SOURCE = (
    "import celery\napp = celery.Celery('schemes', broker={0!r}, backend={0!r})\n"
    "@app.task(name='add')\ndef add(a, b): return a + b\n"
)


@pytest.fixture(scope="module")
def unix_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of a Redis server's Unix socket; such paths are short."""
    with tempfile.TemporaryDirectory(prefix="fq") as folder:
        path = f"{folder}/redis.sock"
        server = Redis(tmp_path_factory.mktemp("redis-unix"), {"unixsocket": path})
        server.start()
        yield path
        server.close()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    scheme: str = request.param
    if scheme in ("pyamqp", "librabbitmq"):
        return str(request.getfixturevalue("amqp_url")).replace("amqp://", f"{scheme}://")
    return f"{scheme}://{request.getfixturevalue('unix_socket')}?virtual_host=2"


EVERY = [
    *(pytest.param(scheme, marks=pytest.mark.redis) for scheme in ("redis+socket", "redis+unix", "unix", "socket")),
    *(pytest.param(scheme, marks=pytest.mark.rabbitmq) for scheme in ("pyamqp", "librabbitmq")),
]


def check_worker(url: str, backend: str) -> None:
    """Ask the worker that sends events for all that it has."""
    with closing(open_blocking_bus(url, Settings({"broker_url": url}))) as bus:
        events = bus.events()
        status = command_line("fastq", "-C", "-b", url, "status")
        assert (status.returncode, status.stdout.count(": OK")) == (0, 1), status.stderr
        ping = command_line("fastq", "-b", url, "inspect", "ping", "-j")
        assert list(json.loads(ping.stdout).values()) == [{"ok": "pong"}], ping.stderr
        with closing(FastQ("client", broker=url, backend=backend)) as client:
            assert client.send_task("add", (1, 2)).get(timeout=20) == 3
        seen: set[str] = set()
        while "task-succeeded" not in seen:
            found: Any = orjson.loads(next(events)[1])
            seen.update(event["type"] for event in (found if isinstance(found, list) else [found]))


@pytest.mark.parametrize("url", EVERY, indirect=True)
def test_a_worker_has_results_remote_control_and_events(url: str, start_worker: Callable[..., WorkerProcess]) -> None:
    backend = "rpc://" if find_broker(url).speaks_amqp else url
    environment = {"FASTQ_BROKER_URL": url, "FASTQ_RESULT_BACKEND": backend}
    worker = start_worker("-c", "1", "-E", source=SOURCE, env=environment)
    check_worker(url, backend)
    assert worker.stop() == 0


@pytest.mark.redis
def test_a_worker_of_celerys_application_has_it_too(
    unix_socket: str, start_worker: Callable[..., WorkerProcess]
) -> None:
    url = f"redis+socket://{unix_socket}?virtual_host=3"
    worker = start_worker("-c", "1", "-E", source=CELERY_SOURCE.format(url))
    # Celery's results there are named socket://; they are asked for at the same place.
    check_worker(url, url)
    assert worker.stop() == 0


def test_every_scheme_has_all_that_its_broker_has() -> None:
    """They are one row of the table: nothing can be said of one scheme and not of another."""
    names = [scheme for broker in BROKERS for scheme in broker.schemes]
    assert len(names) == len(set(names))
    for broker in BROKERS:
        assert (broker.bus is None) == (broker.blocking_bus is None)
        assert set(broker.tls_schemes) <= set(broker.schemes)
        assert set(broker.ports) <= set(broker.schemes)
