"""What the tests of clients in other languages share: the worker under either program, and a client's run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.servers import Redis
from tests.support.worker_process import Program, WorkerProcess

HERE = Path(__file__).resolve().parent
CLIENT_TIMEOUT_S = 40.0  # longer than a client's own time limit, so that its own words are seen

Serve = Callable[..., WorkerProcess]
Call = Callable[..., list[Any]]


def absent(what: str, how: str) -> None:
    """Skip on a developer's machine, fail in CI."""
    text = f"{what} is not installed: {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


@pytest.fixture
def serve(start_worker: Callable[..., WorkerProcess]) -> Serve:
    """A function (program, broker URL, result URL, **environment) that returns a worker of tests/clients/app.py."""

    def start(program: Program, broker: str, results: str, **environment: str) -> WorkerProcess:
        env = {"CLIENTS_BROKER": broker, "CLIENTS_RESULTS": results, **environment}
        return start_worker("-c", "1", app="tests.clients.app", program=program, env=env)

    return start


@pytest.fixture
def redis_databases(redis_server: Redis) -> tuple[str, str]:
    """The URLs of the broker's and the results' database, both empty."""
    databases = redis_server.url(6), redis_server.url(7)
    for url in databases:
        with redis.Redis.from_url(url) as client:
            client.flushdb()
    return databases


def run_client(command: list[str], broker: str, results: str, calls: tuple[dict[str, Any], ...]) -> list[Any]:
    """Run a client and return what it printed: one entry per call."""
    done = subprocess.run(
        [*command, broker, results, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    outcomes: list[Any] = json.loads(done.stdout)
    return outcomes


@pytest.fixture
def node_client() -> Call:
    """A function (script, broker URL, result URL, *calls) that returns the outcomes the script printed."""
    node = shutil.which("node")
    if node is None or not (HERE / "node" / "node_modules").is_dir():
        absent("node or its packages", "ci/clients")
        raise AssertionError

    def call(script: str, broker: str, results: str, *calls: dict[str, Any]) -> list[Any]:
        return run_client([node, str(HERE / "node" / script)], broker, results, calls)

    return call


@pytest.fixture
def php_client() -> Call:
    """A function (broker URL, result URL, *calls) that returns the result documents the client printed."""
    php = shutil.which("php")
    folders = [Path("/usr/share/php", name) for name in ("PhpAmqpLib", "Predis")]
    if php is None or not all(folder.is_dir() for folder in folders):
        absent("php, php-amqplib or php-nrk-predis", "ci/clients")
        raise AssertionError

    def call(broker: str, results: str, *calls: dict[str, Any]) -> list[Any]:
        return run_client([php, str(HERE / "php" / "celery_client.php")], broker, results, calls)

    return call
