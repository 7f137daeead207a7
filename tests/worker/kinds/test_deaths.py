"""Deaths of processes, workers and connections, in every kind of pool: nothing is lost, the innocent are spared."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.kinds import CALLS, PATIENCE_S, Field, Row, central_rows, rows, sharing_rows
from tests.support.servers import RabbitMQ, Redis
from tests.support.stage import Stage, until

MANY = 20


@sharing_rows
def test_all_calls_of_a_process_that_is_killed_run_again(field: Field) -> None:
    worker = field.start_reliable(calls=MANY)
    gate = field.gate()
    field.send(MANY, "until", str(gate))
    for _ in range(2):  # of fastq_max_child_deaths 3
        until(lambda: len(alive(field)) == MANY, PATIENCE_S, "all run")
        (pid,) = set(alive(field).values())
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(field) or pid not in alive(field).values(), PATIENCE_S, "it is gone")  # noqa: B023
    gate.touch()
    field.stage.wait_for(field.stage.sent, PATIENCE_S)
    field.stage.wait_for_settled()
    verdict = field.stage.verdict("kill -9 of a process")
    assert not verdict.lost
    assert not verdict.done_twice
    assert worker.exit_code is None


def alive(field: Field) -> dict[int, int]:
    """Return the calls that run, and the living process each is in."""
    return {number: pid for number, pid in field.ledger.running().items() if psutil.pid_exists(pid)}


@central_rows
def test_a_call_that_kills_its_process_ends_and_no_other_one(field: Field) -> None:
    worker = field.start_reliable()
    killing = field.call("kill")
    good = field.call_many(3 * CALLS, "work", 0.2)
    numbers = field.last(3 * CALLS)
    assert field.error_of(killing) == "WorkerLostError"
    assert [result.get(timeout=PATIENCE_S) for result in good] == numbers
    assert field.ledger.started()[0] == 3
    field.stage.wait_for_settled()
    assert worker.exit_code is None


def test_killing_calls_side_by_side_end_and_innocents_succeed(field: Field) -> None:
    worker = field.start_reliable(calls=MANY if field.kind.shares else CALLS)
    killing = field.call_many(3, "kill")
    good = field.call_many(MANY, "work", 0.3)
    numbers = field.last(MANY)
    for result in killing:
        assert field.error_of(result) == "WorkerLostError"
    assert [result.get(timeout=PATIENCE_S) for result in good] == numbers
    field.stage.wait_for_settled()
    assert worker.exit_code is None


@central_rows
def test_a_worker_that_is_killed_loses_nothing(field: Field) -> None:
    worker = field.start_reliable(calls=MANY if field.kind.shares else CALLS)
    field.send(300, "work", 0.05)
    field.ledger.wait_for_done(30, PATIENCE_S)
    worker.kill9()
    field.start_reliable(calls=MANY if field.kind.shares else CALLS)
    field.stage.wait_for(field.stage.sent, 3 * PATIENCE_S)
    field.stage.wait_for_settled(PATIENCE_S)
    verdict = field.stage.verdict("kill -9 of the worker")
    assert not verdict.lost


def test_processes_end_with_their_worker(field: Field) -> None:
    worker = field.start_reliable()
    field.send(CALLS, "until", str(field.gate()))
    field.wait_for_running(range(CALLS))
    worker.kill9_parent()
    worker.wait_for_no_leftovers()


def test_a_connection_that_is_cut_loses_nothing(field: Field, fault_proxy: Callable[[str, int], FaultProxy]) -> None:
    target = urlsplit(field.stage.url)
    proxy = fault_proxy(target.hostname or "", target.port or 0)
    field.start_reliable(calls=MANY if field.kind.shares else CALLS, url=proxy.url(field.stage.url))
    results = []
    for _ in range(2):
        results += field.call_many(150, "work", 0.05)
        field.ledger.wait_for_done(len(results) - 130, PATIENCE_S)
        proxy.cut()
    field.stage.wait_for(field.stage.sent, 2 * PATIENCE_S)
    field.stage.wait_for_settled(PATIENCE_S)
    verdict = field.stage.verdict("cuts of the connection")
    assert not verdict.lost
    assert [result.get(timeout=PATIENCE_S) for result in results] == field.stage.sent


def check_restart(field: Field, restart: Callable[[], None]) -> None:
    """Restart the broker while calls run; raise when one is lost."""
    calls = MANY if field.kind.shares else CALLS
    worker = field.start_reliable(calls=calls)
    field.send(30 * calls, "work", 0.1)
    field.ledger.wait_for_done(3 * calls, PATIENCE_S)
    restart()
    assert len(field.ledger.done()) < 30 * calls
    field.stage.wait_for(field.stage.sent, 3 * PATIENCE_S)
    field.stage.wait_for_settled(PATIENCE_S)
    assert not field.stage.verdict("restart of the broker").lost
    assert "Connection to broker lost" in worker.log()
    assert worker.exit_code is None


@rows(lambda row: row.broker == "amqp")
def test_a_rabbitmq_that_restarts_loses_nothing(field: Field, rabbitmq: RabbitMQ) -> None:
    check_restart(field, rabbitmq.restart)


@rows(lambda row: row.broker == "redis")
def test_a_redis_that_restarts_loses_nothing(row: Row, tmp_path: Path, lasting_redis: Redis) -> None:
    field = Field(row, Stage("redis", lasting_redis.url(), tmp_path))
    try:
        check_restart(field, lasting_redis.restart)
    finally:
        field.close()


@pytest.fixture
def lasting_redis(redis_server: Redis, tmp_path: Path) -> Iterator[Redis]:
    """A server beside the session's, with a log of every change, which is on the disk before a change is confirmed."""
    server = Redis(tmp_path, {"appendonly": "yes", "appendfsync": "always"}).start()
    yield server
    server.close()


def test_compat_counts_what_ran_in_a_process_that_died_as_failed(field: Field) -> None:
    field.start("--compat")
    gate = field.gate()
    results = field.call_many(CALLS, "until", str(gate))
    field.wait_for_running(range(CALLS))
    pid = field.ledger.running()[0]
    os.kill(pid, signal.SIGKILL)
    died = [number for number, each in field.ledger.running().items() if each == pid]
    for number in died:
        assert field.error_of(results[number]) == "WorkerLostError"
    gate.touch()
    for number in set(range(CALLS)) - set(died):
        assert results[number].get(timeout=PATIENCE_S) == number
    assert field.call("work").get(timeout=PATIENCE_S) == CALLS
