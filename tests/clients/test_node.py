"""celery-ts and celery-node, as npm has them, call tasks of an unchanged Celery application.

Run under stock Celery too, wherever that answers these clients at all, so that the expected outcome is Celery's.
"""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from tests.clients.conftest import Call, Serve
from tests.support.worker_process import Program

programs = pytest.mark.parametrize("program", ["celery", "fastq"], ids=["under_celery", "under_fastq"])

# celery-ts writes the arguments into a header as well, and its AMQP library has room for 64 KiB of headers.
DOCUMENT = {"name": "Zoë ✓", "sizes": [1, 2.5, None, True], "deep": [[{"empty": {}, "none": []}]], "long": "x" * 40_000}


def in_seconds(seconds: float) -> str:
    return (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)).isoformat()


def celery_ts_calls() -> list[dict[str, Any]]:
    return [
        {"task": "add", "args": [2, 3]},
        {"task": "greet", "args": ["Zoë ✓"], "kwargs": {"greeting": "Grüezi"}},
        {"task": "echo", "args": [DOCUMENT]},
        {"task": "fail", "args": ["no luck"]},
        {"task": "add", "args": [4, 5], "options": {"eta": in_seconds(0.5), "expires": in_seconds(60)}},
        {"task": "add", "args": [6, 7], "options": {"priority": 5}},
    ]


CELERY_TS_OUTCOMES = [
    {"value": 5},
    {"value": "Grüezi, Zoë ✓!"},
    {"value": DOCUMENT},
    # Its result is the stored one, whatever the state.
    {"value": {"exc_type": "ValueError", "exc_message": ["no luck"], "exc_module": "builtins"}},
    {"value": 9},
    {"value": 13},
]

CELERY_NODE_CALLS = [
    {"task": "add", "args": [2, 3]},
    {"task": "add", "args": [2, 3], "protocol": 1},
    {"task": "greet", "args": ["Zoë ✓"], "kwargs": {"greeting": "Grüezi"}},
    {"task": "greet", "args": ["Zoë ✓"], "kwargs": {"greeting": "Grüezi"}, "protocol": 1},
    {"task": "echo", "args": [DOCUMENT]},
    {"task": "fail", "args": ["no luck"]},
]
CELERY_NODE_OUTCOMES = [
    {"value": 5},
    {"value": 5},
    {"value": "Grüezi, Zoë ✓!"},
    {"value": "Grüezi, Zoë ✓!"},
    {"value": DOCUMENT},
    {"error": "FAILURE", "exc_type": "ValueError", "exc_message": ["no luck"], "exc_module": "builtins"},
]


@programs
@pytest.mark.rabbitmq
def test_celery_ts_gets_results_by_rpc(program: Program, amqp_url: str, serve: Serve, node_client: Call) -> None:
    serve(program, amqp_url, "rpc://")
    results = amqp_url.replace("amqp://", "rpc://")
    assert node_client("celery_ts.js", amqp_url, results, *celery_ts_calls()) == CELERY_TS_OUTCOMES


@programs
@pytest.mark.redis
def test_celery_ts_gets_results_over_redis(
    program: Program, redis_databases: tuple[str, str], serve: Serve, node_client: Call
) -> None:
    serve(program, *redis_databases)
    assert node_client("celery_ts.js", *redis_databases, *celery_ts_calls()) == CELERY_TS_OUTCOMES


@programs
@pytest.mark.redis
def test_celery_node_gets_results_over_redis(
    program: Program, redis_databases: tuple[str, str], serve: Serve, node_client: Call
) -> None:
    serve(program, *redis_databases)
    assert node_client("celery_node.js", *redis_databases, *CELERY_NODE_CALLS) == CELERY_NODE_OUTCOMES


@pytest.mark.rabbitmq
def test_celery_node_gets_results_over_rabbitmq(amqp_url: str, serve: Serve, node_client: Call) -> None:
    # Not under Celery 5: it fills no queue of the task's own, which is where this client looks.
    serve("fastq", amqp_url, "rpc://")
    assert node_client("celery_node.js", amqp_url, amqp_url, *CELERY_NODE_CALLS) == CELERY_NODE_OUTCOMES


@pytest.mark.rabbitmq
def test_celery_itself_leaves_celery_node_without_a_result(amqp_url: str, serve: Serve, node_client: Call) -> None:
    serve("celery", amqp_url, "rpc://")
    call = {"task": "add", "args": [2, 3], "timeout_ms": 1500}
    assert [outcome["error"] for outcome in node_client("celery_node.js", amqp_url, amqp_url, call)] == ["TIMEOUT"]
