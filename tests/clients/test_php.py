"""A PHP client in the shape of celery-php calls tasks of an unchanged Celery application.

Run under stock Celery too, wherever that answers this client at all, so that the expected outcome is Celery's.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import Call, Serve
from tests.support.servers import RabbitMQ
from tests.support.worker_process import Program

programs = pytest.mark.parametrize("program", ["celery", "fastq"], ids=["under_celery", "under_fastq"])

CALLS: list[dict[str, Any]] = [
    {"task": "add", "args": [2, 3]},
    {"task": "add", "args": [2, 3], "protocol": 2},
    {"task": "greet", "kwargs": {"name": "Zoë ✓", "greeting": "Grüezi"}},
    {"task": "greet", "args": ["Zoë ✓"], "protocol": 2},
    {"task": "echo", "args": [{"sizes": [1, 2.5, None, True], "deep": [[{"long": "x" * 70_000}]]}]},
    {"task": "fail", "args": ["no luck"]},
]
OUTCOMES = [
    ("SUCCESS", 5),
    ("SUCCESS", 5),
    ("SUCCESS", "Grüezi, Zoë ✓!"),
    ("SUCCESS", "Hello, Zoë ✓!"),
    ("SUCCESS", CALLS[4]["args"][0]),
    ("FAILURE", {"exc_type": "ValueError", "exc_message": ["no luck"], "exc_module": "builtins"}),
]
# celery-php's manual asks for results that do not expire: it declares the queue of a result without x-expires.
NEVER = {"CLIENTS_RESULT_EXPIRES_S": "0"}


def outcomes(documents: list[Any]) -> list[tuple[str, Any] | None]:
    return [document and (document["status"], document["result"]) for document in documents]


@programs
@pytest.mark.redis
def test_php_gets_results_over_redis(
    program: Program, redis_databases: tuple[str, str], serve: Serve, php_client: Call
) -> None:
    serve(program, *redis_databases)
    documents = php_client(*redis_databases, *CALLS)
    assert outcomes(documents) == OUTCOMES
    assert all(document["task_id"].startswith("php_") for document in documents)
    assert [bool(document["traceback"]) for document in documents] == [False] * 5 + [True]


@pytest.mark.rabbitmq
@pytest.mark.parametrize("way", ["consume", "poll"])
def test_php_gets_results_over_rabbitmq(way: str, amqp_url: str, serve: Serve, php_client: Call) -> None:
    # Not under Celery 5: it declares neither the exchange nor the queue that celery-php waits at.
    serve("fastq", amqp_url, "rpc://", **NEVER)
    assert outcomes(php_client(amqp_url, f"amqp://results?wait={way}", *CALLS)) == OUTCOMES


@pytest.mark.rabbitmq
def test_php_may_name_the_time_that_results_are_kept(amqp_url: str, serve: Serve, php_client: Call) -> None:
    serve("fastq", amqp_url, "rpc://", CLIENTS_RESULT_EXPIRES_S="3600")
    assert outcomes(php_client(amqp_url, "amqp://results?expires_ms=3600000", *CALLS)) == OUTCOMES


@pytest.mark.rabbitmq
def test_a_result_that_nobody_wants_makes_no_queue(
    rabbitmq: RabbitMQ, amqp_vhost: str, amqp_url: str, serve: Serve, php_client: Call
) -> None:
    serve("fastq", amqp_url, "rpc://", **NEVER)
    calls = [{"task": "ignored", "forget": True}, {"task": "add", "args": [2, 3]}]
    assert outcomes(php_client(amqp_url, "amqp://results", *calls)) == [("SUCCESS", 5)]
    assert task_queues(rabbitmq, amqp_vhost) == []


def task_queues(rabbitmq: RabbitMQ, vhost: str) -> list[str]:
    names = rabbitmq.evaluate(
        f'[binary_to_list(element(4, amqqueue:get_name(Q))) || Q <- rabbit_amqqueue:list(<<"{vhost}">>)]'
    )
    return [name for name in names.split('"') if name.startswith("php_")]
