"""A tool's stage: broker, result store and folder of its own, under the program that the test is run for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.celery.tools.tool import Tool
from tests.support.servers import Redis
from tests.support.worker_process import Program, WorkerProcess

BROKER_DATABASE, RESULT_DATABASE, LOCK_DATABASE = 8, 9, 10


@pytest.fixture(params=["celery", "fastq"], ids=["under_celery", "under_fastq"])
def program(request: pytest.FixtureRequest) -> Program:
    """The program whose worker runs the tasks."""
    chosen: Program = request.param
    return chosen


@pytest.fixture
def tool(
    program: Program,
    tmp_path: Path,
    amqp_url: str,
    redis_server: Redis,
    start_worker: Callable[..., WorkerProcess],
) -> Iterator[Tool]:
    """Tasks through RabbitMQ, results and locks in Redis; the tool's application says what it uses."""
    for database in (BROKER_DATABASE, RESULT_DATABASE, LOCK_DATABASE):
        with redis.Redis.from_url(redis_server.url(database)) as client:
            client.flushdb()
    environment = {
        "TOOL_BROKER": amqp_url,
        "TOOL_RESULTS": redis_server.url(RESULT_DATABASE),
        "TOOL_LOCKS": redis_server.url(LOCK_DATABASE),
    }
    made = Tool(program, tmp_path, environment, start_worker)
    yield made
    made.close()
