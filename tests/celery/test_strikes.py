"""Limits and alarms that strike while a child sends, stores or ends a call: each call has one end all the same.

FASTQ_TEST_STRIKES=10000 makes that many calls of each kind, instead of what takes some ten seconds.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import BackendGetMetaError
from celery.exceptions import TimeoutError as NoResult

from fastq.pool.process import DUMP_SIGNAL
from tests.celery.conftest import _marks
from tests.celery.stage import CeleryStage, Servers, opened

CALLS = int(os.environ.get("FASTQ_TEST_STRIKES", "60"))
APPS = {"celery": "tests.celery.apps.strikes", "fastq": "tests.celery.apps.strikes_fastq"}
PLACES = (
    ("fastq", "redis", "redis"), ("fastq", "amqp", "rpc"),
    ("celery", "redis", "redis"), ("celery", "amqp", "rpc"), ("celery", "amqp", "database"),
)  # fmt: skip
#: Each pool's options. Only with one call at a time in a process do handlers of signals run in the calls; elsewhere
#: limits alone strike.
POOLS = {
    "prefork": ("-P", "prefork"),
    "spawn": ("--pool-start-method", "spawn"),
    "threads": ("-P", "threads"),
    "gevent": ("-P", "gevent"),
    "eventlet": ("-P", "eventlet"),
    "solo": ("-P", "solo"),
    "asyncio": ("-P", "asyncio"),
    "loop": ("--async-processes", "1"),
    "hosted": ("-P", "tests.support.hosted_pools:Threads"),
}
HAVE_ALARMS = ("prefork", "spawn")
#: Where the tasks are coroutine functions.
HAVE_LOOP = ("asyncio", "loop")
#: Where others than PLACES[1:3] are tried.
PLACES_OF = {
    "prefork": PLACES,
    "spawn": PLACES[2:3],
    "asyncio": PLACES[1:2],
    "loop": PLACES[2:3],
    "hosted": PLACES[2:3],
}
KINDS = [
    pytest.param((pool, application, broker, backend), id=f"{pool}-{application}-{broker}-{backend}",
                 marks=_marks(broker, backend))
    for pool in POOLS
    for application, broker, backend in PLACES_OF.get(pool, PLACES[1:3])
]  # fmt: skip
SIZES = (0, 0, 100, 3_000, 40_000, 130_000, 140_000, 300_000, 1_000_000, 4_000_000)
#: What a handler of the application's raises: its own Exception, what ends a program, and the same from SIGTERM.
ALARMS = ("alarm", "interrupt", "exit", "term")
#: Calls on the way at a time: a caller's memory and broker hold what is drawn.
AT_A_TIME = 50
CONFIRMING = ("celery", "amqp")
#: kombu makes an EncodeError or a DecodeError of whatever is raised while it does that, and Celery's stores an error of
#: their own, which cannot be read back: an Exception.
WRAPPED = {"EncodeError", "DecodeError", "BackendStoreError", "Exception"}
ENDS = {"SoftTimeLimitExceeded", "Struck", "KeyboardInterrupt", "SystemExit", "WorkerLostError"} | WRAPPED
#: What inspect.getfullargspec makes of whatever is raised in it; kombu calls it when it connects.
UNSUPPORTED = "unsupported callable"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    return tuple(request.param)


@pytest.fixture
def stage(kind: tuple[Any, ...], servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryStage]:
    pool, application, broker, backend = kind
    with opened(servers, tmp_path_factory, "fastq", broker, backend) as stage:
        # Celery's senders wait for RabbitMQ's confirms only then; else a struck connection may lose what it has sent.
        settings = (
            {"broker_transport_options": {"confirm_publish": True}} if (application, broker) == CONFIRMING else {}
        )
        stage.start_worker(
            "-c", "4", *POOLS[pool], app=APPS[application], log_level="WARNING", await_ready=False, settings=settings,
            env={"STRIKES_LOOP": "1"} if pool in HAVE_LOOP else {},
        )  # fmt: skip
        yield stage


def drawn(draw: random.Random, number: int, backend: str, has_alarms: bool) -> dict[str, Any]:
    """Return the arguments and options of one call."""
    # 300 states fill the ring; to a database file they are 300 transactions.
    weights = (4, 0 if backend == "database" else 1, 4)
    steps = draw.choices(("state", "states", "send"), weights=weights, k=draw.randrange(4))
    at_s = 10 ** draw.uniform(-3.5, -0.7)
    way = draw.choice(("none", "limit", "limit", *ALARMS, "loose") if has_alarms else ("none", "limit"))
    return {
        "args": [number, draw.choice(SIZES), steps, at_s if way in (*ALARMS, "loose") else 0, way, draw.random() < 0.3],
        "soft_time_limit": at_s if way == "limit" else None,
    }  # fmt: skip


@pytest.mark.timeout(180 + CALLS)
def test_every_call_has_one_end_whatever_strikes_when(stage: CeleryStage, kind: tuple[Any, ...]) -> None:
    seed = int(os.environ.get("FASTQ_TEST_SEED", random.randrange(2**32)))
    print(f"FASTQ_TEST_SEED={seed} FASTQ_TEST_STRIKES={CALLS}")
    draw = random.Random(seed)
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for first in range(0, CALLS, AT_A_TIME):
        calls = []
        for number in range(first, min(first + AT_A_TIME, CALLS)):
            options = drawn(draw, number, kind[3], kind[0] in HAVE_ALARMS)
            if kind[1] == "celery" and draw.random() < 0.3:
                options["link"] = stage.client.signature("follow")
            calls.append((number, options, stage.client.send_task("work", **options)))
        for number, options, result in calls:
            end = end_of(stage, result, number, options["args"][1])
            ends[end] += 1
            if end != "SUCCESS" and end not in ENDS:
                wrong.append(f"{number} {options} {result.id}: {end}")
    print(kind, dict(ends))
    if wrong:  # what runs still says where it stands
        for pid in stage.worker.children():
            os.kill(pid, DUMP_SIGNAL)
        stage.worker.wait_for_log("most recent call first", 10)
    assert not wrong, "\n".join([*wrong[:20], stage.logs()])
    # Loose alarms, which end children too, have struck by now.
    assert stage.client.send_task("work", [CALLS, 10, [], 0, "none", False], retry=False).get(30) == [CALLS, "r" * 10]
    sent = Counter(note["number"] for note in stage.notes("sent"))
    stage.until(
        lambda: (
            (sent - Counter(note["number"] for note in stage.notes("followed"))).total() <= struck_follows(stage, ends)
        ),
        "what tasks have sent has run",
        60,
    )
    stage.wait_for_empty(timeout_s=30)
    log = stage.worker.log()
    assert "damaged" not in log, stage.logs()
    assert " was due" not in log, stage.logs()
    assert stage.worker.stop(30) == 0, stage.logs()


def struck_follows(stage: CeleryStage, ends: Counter[str]) -> int:
    """Return how many of the calls that tasks have sent a loose alarm may have ended before they did anything."""
    log = stage.worker.log()
    lost = log.count("Task handler raised error: WorkerLostError") - ends["WorkerLostError"]
    return max(lost, 0) + len(re.findall(r"Task follow\[\S+ raised", log))


def end_of(stage: CeleryStage, result: Any, number: int, size: int) -> str:
    """Return how a call has ended: SUCCESS with the right value, the error's name, or what is wrong."""
    deadline = time.monotonic() + 60
    while True:
        try:
            value = result.get(max(1.0, deadline - time.monotonic()), propagate=False, disable_sync_subtasks=False)
            break
        except NoResult:
            return "no end"
        except BackendGetMetaError:  # "database is locked", to this reader
            if time.monotonic() > deadline:
                raise
    if isinstance(value, BaseException):
        was_struck = isinstance(value, TypeError) and str(value) == UNSUPPORTED
        # importlib's lock, struck between two of its lines, looks for the thread that has waited for it in vain.
        was_struck = was_struck or (isinstance(value, KeyError) and isinstance(value.args[0], int))
        # What Python makes of it in the midst of a class statement: of a module that is imported at its first use.
        was_struck = was_struck or (isinstance(value, RuntimeError) and "__set_name__" in str(value))
        return "Struck" if was_struck else type(value).__name__
    return "SUCCESS" if value == [number, "r" * size] else f"wrong value {value!r:.100}"
