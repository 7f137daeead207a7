"""Tasks with an ETA in thousands: a worker keeps the first of them, the broker the rest until nearer their time.

A real worker on RabbitMQ and on Redis. What Redis does with a single message is in test_redis_transport.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fastq.brokers import open_blocking_bus
from fastq.brokers.rabbitmq.delays import PREFIX
from fastq.errors import TaskRevoked
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.stage import APP, QUEUE, Stage, open_stage, until
from tests.support.worker_process import WorkerProcess

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.slow]

KEPT = 1000  # what the core keeps in memory
MAX_BYTES = 512  # for each task that waits


@pytest.fixture(params=["amqp", "redis"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def postponed(stage: Stage) -> int:
    """Return how many messages the broker keeps for their time."""
    if stage.redis is not None:
        return int(stage.redis.call("ZCARD", f"{QUEUE}.delayed"))
    assert stage.rabbitmq is not None
    depths = [stage.rabbitmq.queue_depth(stage.vhost, f"{PREFIX}{1 << power}") for power in range(23)]
    return sum(depth for depth in depths if depth > 0)


def all_of(stage: Stage) -> int:
    """Return how many messages there are, with the worker or at the broker."""
    return stage.depth() + (postponed(stage) if stage.rabbitmq is not None else 0)


def fill(stage: Stage) -> list[int]:
    """Have the worker keep as many as it keeps, so that what comes later is postponed; return their numbers."""
    numbers = stage.send(KEPT + 50, eta=time.time() + 3600)
    until(lambda: postponed(stage) == 50, 30, "50 messages are with the broker")
    return numbers


def memory_of(worker: WorkerProcess) -> int:
    return int(psutil.Process(worker.pid).memory_info().rss)


def start_of(stage: Stage, number: int) -> float:
    return next(entry.at_unix for entry in stage.ledger.entries() if entry.number == number)


def test_thousands_of_far_tasks_hold_back_nothing_and_cost_no_memory(stage: Stage) -> None:
    worker = stage.start_worker("-c", "2")
    stage.wait_for(stage.send(10), 10)
    before = memory_of(worker)

    def send(number: int) -> None:
        stage.client.send_task("work", (number,), countdown=3600, ignore_result=True)

    numbers = range(len(stage.sent), len(stage.sent) + 10_000)
    with ThreadPoolExecutor(8 if stage.kind == "amqp" else 1) as senders:  # there the disk confirms several at a time
        list(senders.map(send, numbers))
    stage.sent += numbers
    sent_at = time.time()
    [number] = stage.send(1)
    stage.wait_for([number], 30)
    print(f"{stage.kind}: a task behind 10,000 ran {start_of(stage, number) - sent_at:.3f} s after it was sent")
    assert start_of(stage, number) - sent_at < 5.0  # on a busy machine; each of 10,000 would take it longer
    until(lambda: postponed(stage) == 10_000 - KEPT, 30, "9,000 wait at the broker")
    at_10_000 = memory_of(worker) - before
    stage.send(20_000, eta=time.time() + 3600)
    until(lambda: postponed(stage) == 30_000 - KEPT, 60, "29,000 wait at the broker")
    at_30_000 = memory_of(worker) - before
    print(
        f"{stage.kind}: the worker grew by {at_10_000 >> 10:,} KiB with 10,000 that wait, {at_30_000 >> 10:,} KiB with "
        f"30,000: {at_30_000 / 30_000:.0f} bytes each, {(at_30_000 - at_10_000) / 20_000:.0f} for each more"
    )
    assert at_10_000 / 10_000 <= MAX_BYTES
    assert (at_30_000 - at_10_000) / 20_000 <= MAX_BYTES
    assert len(stage.ledger.started()) == 11
    # What it kept is given back: nothing of all that is lost.
    assert worker.stop() == 0
    assert all_of(stage) == 30_000


def waiting(stage: Stage) -> int:
    """Return how many tasks wait in the worker for their time."""
    bus = open_blocking_bus(stage.url, stage.client.conf)
    reply = next(iter(bus.ask("scheduled", {}, 5.0)))
    bus.close()
    return len(reply[1])


def test_a_burst_after_another_one_is_with_the_worker_before_it_is_due(stage: Stage) -> None:
    # The window is its narrowest where messages are acknowledged early.
    stage.start_worker("-c", "2", "--compat")
    due = time.time() + 2
    stage.wait_for(stage.send(3000, eta=due), 20)
    sent_at = time.time()
    stage.send(900, eta=sent_at + 60)
    until(lambda: waiting(stage) == 900, 5, "all of the second burst wait in the worker")
    print(f"{stage.kind}: 900 were there after {time.time() - sent_at:.2f} s")


@pytest.mark.parametrize(
    ("app", "mode", "within_s"),
    [
        (APP, "--reliable", (2, 5)),
        (APP, "--compat", (1, 3)),
        ("tests.celery.tasks_under_attack", "--compat", (1, 3)),
    ],
    ids=["reliable", "compat", "celery"],
)
def test_ten_thousand_that_are_due_within_seconds_start_in_time(
    stage: Stage, app: str, mode: str, within_s: tuple[int, int]
) -> None:
    stage.start_worker("-c", "2", "-l", "WARNING", mode, app=app)
    due: dict[int, float] = {}
    while len(due) < 10_000:
        now = time.time()
        etas = [now + random.uniform(*within_s) for _ in range(500)]
        numbers = range(len(stage.sent), len(stage.sent) + 500)
        bodies = [json.dumps([[number], {}, {}]).encode() for number in numbers]
        calls = zip(bodies, etas, strict=True)
        stage.publish([encode_task("work", new_id(), body, eta=eta, ignore_result=True) for body, eta in calls])
        stage.sent += numbers
        sent_at = time.time()  # a slow machine has sent some of them too late
        due |= {number: max(eta, sent_at) for number, eta in zip(numbers, etas, strict=True)}
    stage.wait_for(due, 60)
    late = sorted(entry.at_unix - due[entry.number] for entry in stage.ledger.entries() if entry.what == "start")
    print(f"{stage.kind}: half of 10,000 started within {late[5000]:.4f} s, 99 % within {late[9900]:.3f} s")
    assert len(late) == 10_000
    assert late[9900] <= 1.0


def test_postponed_tasks_come_back_and_run_in_time_unless_revoked_or_expired(stage: Stage) -> None:
    stage.start_worker("-c", "2")
    fill(stage)
    due = time.time() + 12.5
    numbers = stage.send(300, eta=due)
    expiring = stage.call("work", countdown=12, expires=11)
    revoked = stage.call("work", countdown=12)
    # On RabbitMQ the worker keeps what it gets while it declares the queue for the time.
    until(lambda: postponed(stage) > 50 + 270, 5, "they are with the broker")
    bus = open_blocking_bus(stage.url, stage.client.conf)
    assert list(bus.ask("revoke", {"task_id": revoked.id}, 5.0, pattern="*", matcher="glob"))
    bus.close()
    stage.wait_for(numbers, 20)
    late = [entry.at_unix - due for entry in stage.ledger.entries() if entry.what == "start"]
    print(f"{stage.kind}: {len(late)} ran {min(late):.3f} to {max(late):.3f} s after their time")
    assert min(late) >= 0
    assert max(late) < 1.0
    assert stage.ledger.started() == dict.fromkeys(numbers, 1)
    with pytest.raises(TaskRevoked, match="expired"):
        expiring.get(timeout=5)
    with pytest.raises(TaskRevoked, match="revoked"):
        revoked.get(timeout=5)
    until(lambda: all_of(stage) == KEPT + 50, 5, "the broker holds nothing more of what was due")


def test_a_worker_killed_while_it_postpones_loses_none(stage: Stage) -> None:
    first = stage.start_worker("-c", "2")
    fill(stage)
    due = time.time() + 14
    numbers = stage.send(4000, eta=due)
    until(lambda: postponed(stage) > 50 + 500, 10, "it is postponing them")
    first.kill9()
    left = 4050 - postponed(stage)
    stage.start_worker("-c", "2")
    stage.wait_for(numbers, 45)
    done = stage.ledger.done()
    twice = [number for number in numbers if done[number] > 1]
    print(f"{stage.kind}: killed with {left} to go; {len(twice)} of 4,000 ran twice")
    assert min(entry.at_unix for entry in stage.ledger.entries()) >= due
    if stage.redis is not None:
        # It moves from one place to the other in one step.
        assert left > 0
        assert not twice


def test_a_worker_that_starts_later_runs_what_others_have_postponed(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1")
    fill(stage)
    numbers = stage.send(50, eta=time.time() + 11)
    until(lambda: postponed(stage) > 50, 5, "they are with the broker")
    assert worker.stop() == 0
    due = time.time() + 11
    until(lambda: time.time() > due, 15, "their time is over, and nobody is there")
    assert not stage.ledger.started()
    stage.start_worker("-c", "1")
    stage.wait_for(numbers, 20)
    assert stage.ledger.started() == dict.fromkeys(numbers, 1)


def test_a_worker_asks_for_no_more_than_its_limit_of_what_waits(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stage = open_stage("amqp", request, tmp_path)
    try:
        # Near, so that nothing is postponed: with no limit a worker takes in all of them at once.
        stage.send(2000, eta=time.time() + 9.5)
        stage.start_worker("-c", "1", worker_eta_task_limit=100)
        rabbitmq = stage.rabbitmq
        assert rabbitmq is not None
        seen: list[tuple[float, int]] = []

        def is_settled() -> bool:
            seen.append((time.monotonic(), 2000 - rabbitmq.ready_messages(stage.vhost, QUEUE)))
            return all(taken == seen[-1][1] > 0 for at, taken in seen if at > time.monotonic() - 1) and (
                time.monotonic() - seen[0][0] > 1
            )

        until(is_settled, 8, "the worker takes in no more")
        assert 100 <= seen[-1][1] <= 250
    finally:
        stage.close()
