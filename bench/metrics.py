"""Every metric: a function that measures one system once, and the list of what is compared with what.

A function returns figures by name; UNITS says what they mean. bench/README.md says how each one is taken.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.measure import SystemCalls, cpu_of, frozen, pss_bytes, tree_of
from bench.run import TASK_TIMEOUT_S, Bench, Broker, Figures, Run
from bench.systems import (
    CELERY,
    CELERY_ACCELERATED,
    CELERY_BEHIND,
    DRAMATIQ,
    DRAMATIQ_ASYNC,
    DRAMATIQ_THREADS,
    FASTQ,
    FASTQ_ASYNC,
    FASTQ_BEHIND,
    FASTQ_DROP_IN,
    HUEY,
    HUEY_FSYNC,
    TASKIQ,
    TASKIQ_HOLDING,
    TASKIQ_STREAM,
    System,
    celery_pooled,
    fastq_pooled,
)

ROUND_TRIPS = 300
SETTLE_S = 0.3  # the last acks are still on their way when the last task has been counted
START_TIMEOUT_S = 60.0
MANY_CHILDREN = 8
RECYCLE_AFTER = 50
FORKS = 200
SLOTS = 1000  # coroutines or greenlets of one child
THREADS = 100
DRAMATIQ_THREADS_OF_NOOPS = 8  # its default; a thread waits for each coroutine, and more of them make it slower
HELD = 10_000
TRACED_SHARE = 0.2  # strace slows a worker down about tenfold

UNITS = {
    "worker_us": "worker CPU µs/task",
    "tasks_s": "tasks/s",
    "broker_us": "broker CPU µs/task",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "producer_us": "producer CPU µs/task",
    "pss_mb": "PSS MB, parent + 2 children",
    "start_s": "start to first task, s",
    "syscalls": "system calls/task",
    "one_us": "1 child, CPU µs/task",
    "many_us": f"{MANY_CHILDREN} children, CPU µs/task",
    "many_ratio": f"{MANY_CHILDREN} against 1",
    "plain_us": "without, CPU µs/task",
    "recycled_us": f"recycled every {RECYCLE_AFTER}, CPU µs/task",
    "recycled_ratio": "recycled against without",
    "busy": "worker CPUs busy",
    "held_mb": f"PSS MB, {HELD:,} calls asleep",
    "call_kb": "kB/call",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done in one round."""

    tasks: int
    fast_tasks: int  # for what needs microseconds where others need a millisecond: else the run is too short to read


@dataclass(frozen=True, slots=True)
class Entrant:
    """One line of one table."""

    name: str
    measure: Callable[[Bench, Plan], Figures]
    system: System | None = None  # None for the floor

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the modules that must be installed."""
        return self.system.needs if self.system is not None else ()


@dataclass(frozen=True, slots=True)
class Metric:
    """One table."""

    name: str
    title: str
    broker: Broker
    entrants: tuple[Entrant, ...]
    baselines: tuple[tuple[str, str], ...] = ()  # (entrant, figure): the others are given as ratios to these


# -- measuring


def drain_once(run: Run, tasks: int, children: int = 1, recycle: int | None = None) -> Figures:
    """Fill the queue while a warm worker is stopped, let it go, and return what emptying the queue cost."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(run.worker(children, recycle))
        run.warm_up()
        target = run.counter.total() + tasks
        with frozen(worker) as pids:
            stack.enter_context(run.filled(tasks))
            worker_before, broker_before = cpu_of(pids), cpu_of(run.broker_pids())
            began = time.perf_counter()
        run.wait_for(run.counter.total, target, START_TIMEOUT_S + tasks * TASK_TIMEOUT_S)
        wall_s = time.perf_counter() - began
        time.sleep(SETTLE_S)
        figures = {
            "worker_us": (cpu_of(tree_of(worker)) - worker_before) / tasks * 1e6,
            "tasks_s": tasks / wall_s,
        }
        if run.broker_pids():
            figures["broker_us"] = (cpu_of(run.broker_pids()) - broker_before) / tasks * 1e6
        return figures


def drain(system: System, broker: Broker, results: bool) -> Entrant:
    """Return what one task costs and how many there are in a second, from a full queue."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results) as run:
            return drain_once(run, plan.fast_tasks if system in (FASTQ, FASTQ_DROP_IN) else plan.tasks)

    return Entrant(system.name, measure, system)


def round_trip(system: System, broker: Broker) -> Entrant:
    """Return how long one call with its result takes on an idle worker."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results=True) as run, run.worker():
            run.warm_up()
            return milliseconds(run.ask("roundtrip", ROUND_TRIPS))

    return Entrant(system.name, measure, system)


def publish(system: System, broker: Broker, command: str = "publish", results: bool = False) -> Entrant:
    """Return what sending one task costs the producer."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results) as run:
            return per_task(run.ask(command, plan.tasks))

    name = f"{system.name}, in a batch" if command == "batch" else system.name
    return Entrant(name, measure, system)


def memory(system: System, broker: Broker) -> Entrant:
    """Return what a worker with two children holds after its first tasks."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results=False) as run, run.worker(children=2) as worker:
            run.warm_up()
            return {"pss_mb": pss_bytes(tree_of(worker)) / 1e6}

    return Entrant(system.name, measure, system)


def start(system: System, broker: Broker) -> Entrant:
    """Return the time from starting a worker to its first task done, the task waiting already."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results=False) as run, run.filled(1):
            began = time.perf_counter()
            with run.worker():
                run.wait_for(run.counter.total, 1, START_TIMEOUT_S)
                return {"start_s": time.perf_counter() - began}

    return Entrant(system.name, measure, system)


def system_calls(system: System, broker: Broker) -> Entrant:
    """Return how many system calls the worker's tree makes for one task, from a full queue."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        tasks = plan.fast_tasks if system is FASTQ else int(plan.tasks * TRACED_SHARE)
        with bench.run(system, broker, results=False) as run, contextlib.ExitStack() as stack:
            worker = stack.enter_context(run.worker())
            run.warm_up()
            target = run.counter.total() + tasks
            with frozen(worker):
                stack.enter_context(run.filled(tasks))
                calls = stack.enter_context(SystemCalls(tree_of(worker), run.folder))
            run.wait_for(run.counter.total, target, START_TIMEOUT_S + tasks * TASK_TIMEOUT_S)
            calls.stop()
            return {"syscalls": calls.count / tasks}

    return Entrant(system.name, measure, system)


def more_children(system: System, broker: Broker) -> Entrant:
    """Return what one task costs with eight children against one."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        tasks = plan.fast_tasks if system is FASTQ else plan.tasks
        with bench.run(system, broker, results=False) as run:
            one = drain_once(run, tasks)["worker_us"]
        with bench.run(system, broker, results=False) as run:
            many = drain_once(run, tasks, children=MANY_CHILDREN)["worker_us"]
        return {"one_us": one, "many_us": many, "many_ratio": many / one}

    return Entrant(system.name, measure, system)


def recycling(system: System, broker: Broker) -> Entrant:
    """Return what one task costs when each child is replaced after fifty of them, against never."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results=False) as run:
            plain = drain_once(run, plan.tasks)["worker_us"]
        with bench.run(system, broker, results=False) as run:
            recycled = drain_once(run, plan.tasks, recycle=RECYCLE_AFTER)["worker_us"]
        return {"plain_us": plain, "recycled_us": recycled, "recycled_ratio": recycled / plain}

    return Entrant(system.name, measure, system)


def waiting(system: System, broker: Broker, task: str, slots: int) -> Entrant:
    """Return what one call costs and how many there are in a second, when one process runs many at once."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with bench.run(system, broker, results=False, task=task) as run:
            tasks = plan.fast_tasks if system.distribution == "fastq" else plan.tasks
            figures = drain_once(run, tasks, children=slots)
        # How well waits overlap: with a whole CPU busy it is the work that takes the time, not the waiting.
        return {**figures, "busy": figures["worker_us"] * figures["tasks_s"] / 1e6}

    return Entrant(system.name, measure, system)


def holding(system: System, broker: Broker) -> Entrant:
    """Return what a worker holds while ten thousand calls sleep in it, and the share of each call beyond the first."""

    def measure(bench: Bench, plan: Plan) -> Figures:
        with (
            bench.run(system, broker, results=False, task="hold") as run,
            run.worker(children=HELD) as worker,
            run.filled(1),
        ):
            run.wait_for(run.counter.total, 1, START_TIMEOUT_S)
            time.sleep(SETTLE_S)
            one = pss_bytes(tree_of(worker))
            with run.filled(HELD - 1):
                run.wait_for(run.counter.total, HELD, START_TIMEOUT_S + HELD * TASK_TIMEOUT_S)
                time.sleep(SETTLE_S)
                held = pss_bytes(tree_of(worker))
        return {"held_mb": held / 1e6, "call_kb": (held - one) / (HELD - 1) / 1e3}

    return Entrant(system.name, measure, system)


def floor_recycling(bench: Bench, plan: Plan) -> Figures:
    """Return what each task's share is of forking and ending a process of a worker's size that does nothing."""
    with bench.run(FASTQ, "amqp", results=False) as run:
        measured = run.forks(FORKS)
    return {"recycled_us": measured["cpu_s"] / FORKS / RECYCLE_AFTER * 1e6}


def floor_drain(bench: Bench, plan: Plan) -> Figures:
    """Return what a C client needs that only consumes and acks."""
    assert bench.rabbitmq is not None
    vhost = bench.rabbitmq.new_vhost()
    bench.floor.run("fill", bench.rabbitmq.port, vhost, plan.fast_tasks)
    before = cpu_of(bench.broker_pids("amqp"))
    measured = bench.floor.run("drain", bench.rabbitmq.port, vhost, plan.fast_tasks)
    time.sleep(SETTLE_S)
    broker_s = cpu_of(bench.broker_pids("amqp")) - before
    bench.rabbitmq.delete_vhost(vhost)
    return {
        "worker_us": measured["cpu_s"] / plan.fast_tasks * 1e6,
        "tasks_s": plan.fast_tasks / measured["wall_s"],
        "broker_us": broker_s / plan.fast_tasks * 1e6,
    }


def floor_round_trip(bench: Bench, plan: Plan) -> Figures:
    """Return the time from a C client through the broker to another and back."""
    assert bench.rabbitmq is not None
    vhost = bench.rabbitmq.new_vhost()
    measured = bench.floor.run("roundtrip", bench.rabbitmq.port, vhost, ROUND_TRIPS)
    bench.rabbitmq.delete_vhost(vhost)
    return milliseconds(measured)


def floor_publish(bench: Bench, plan: Plan) -> Figures:
    """Return what a C client needs to send one message, not waiting for a confirm."""
    return _floor_publish(bench, plan, confirmed=False)


def floor_confirm(bench: Bench, plan: Plan) -> Figures:
    """Return what a C client needs to send one message and wait for its confirm."""
    return _floor_publish(bench, plan, confirmed=True)


def _floor_publish(bench: Bench, plan: Plan, confirmed: bool) -> Figures:
    assert bench.rabbitmq is not None
    vhost = bench.rabbitmq.new_vhost()
    measured = bench.floor.run("confirm" if confirmed else "publish", bench.rabbitmq.port, vhost, plan.tasks)
    bench.rabbitmq.delete_vhost(vhost)
    return per_task(measured)


def floor_push(bench: Bench, plan: Plan) -> Figures:
    """Return what a C client needs to put one message into a list of Redis and wait for the reply."""
    assert bench.redis is not None
    return per_task(bench.floor.run("lpush", bench.redis.port, "-", plan.tasks))


def milliseconds(measured: Figures) -> Figures:
    """Return a client's quantiles in milliseconds."""
    return {"p50_ms": measured["p50_s"] * 1e3, "p99_ms": measured["p99_s"] * 1e3}


def per_task(measured: Figures) -> Figures:
    """Return a producer's figures for one task."""
    return {
        "producer_us": measured["cpu_s"] / measured["count"] * 1e6,
        "tasks_s": measured["count"] / measured["wall_s"],
    }


# -- what is compared with what

DELAYS: tuple[tuple[str, Broker, str], ...] = (("rabbitmq", "amqp", "RabbitMQ"), ("redis", "redis", "Redis"))


def io_metrics(suffix: str, broker: Broker, words: str) -> tuple[Metric, ...]:
    """Return the tables of tasks that wait, on one broker."""
    taskiqs = (TASKIQ, TASKIQ_STREAM) if broker == "redis" else (TASKIQ,)
    asynchronous = (("taskiq", "worker_us"), ("dramatiq, async", "worker_us"))
    return (
        Metric(
            f"io-noop{suffix}",
            f"async def no-op tasks from a full {words} queue, {SLOTS:,} at once in one child",
            broker,
            (
                waiting(FASTQ_ASYNC, broker, "noop", SLOTS),
                *(waiting(taskiq, broker, "noop", SLOTS) for taskiq in taskiqs),
                waiting(DRAMATIQ_ASYNC, broker, "noop", DRAMATIQ_THREADS_OF_NOOPS),
            ),
            asynchronous,
        ),
        Metric(
            f"io-sleep{suffix}",
            f"await asyncio.sleep(0.01), {words}, {SLOTS:,} at once in one child (dramatiq: {THREADS})",
            broker,
            (
                waiting(FASTQ_ASYNC, broker, "nap", SLOTS),
                *(waiting(taskiq, broker, "nap", SLOTS) for taskiq in taskiqs),
                waiting(DRAMATIQ_ASYNC, broker, "nap", THREADS),
            ),
            asynchronous,
        ),
        Metric(
            f"io-gevent{suffix}",
            f"time.sleep(0.01), {words}, {SLOTS:,} greenlets in one process",
            broker,
            (
                waiting(fastq_pooled("gevent"), broker, "nap", SLOTS),
                waiting(fastq_pooled("eventlet"), broker, "nap", SLOTS),
                waiting(fastq_pooled("gevent", "celery_app"), broker, "nap", SLOTS),
                waiting(celery_pooled("gevent"), broker, "nap", SLOTS),
                waiting(celery_pooled("eventlet"), broker, "nap", SLOTS),
            ),
            (("celery, gevent", "worker_us"),),
        ),
        Metric(
            f"io-threads{suffix}",
            f"time.sleep(0.01), {words}, {THREADS} threads in one process",
            broker,
            (
                waiting(fastq_pooled("threads"), broker, "nap", THREADS),
                waiting(fastq_pooled("threads", "celery_app"), broker, "nap", THREADS),
                waiting(celery_pooled("threads"), broker, "nap", THREADS),
                waiting(DRAMATIQ_THREADS, broker, "nap", THREADS),
            ),
            (("celery, threads", "worker_us"), ("dramatiq, threads", "worker_us")),
        ),
    )


METRICS: tuple[Metric, ...] = (
    Metric(
        "drain",
        "No-op tasks from a full RabbitMQ queue, 1 child, no results",
        "amqp",
        (
            drain(FASTQ, "amqp", results=False),
            drain(FASTQ_DROP_IN, "amqp", results=False),
            drain(CELERY, "amqp", results=False),
            drain(DRAMATIQ, "amqp", results=False),
            Entrant("floor", floor_drain),
        ),
        (("celery", "worker_us"), ("dramatiq", "worker_us"), ("floor", "worker_us"), ("floor", "tasks_s")),
    ),
    Metric(
        "drain-results",
        "The same with results over RabbitMQ (rpc)",
        "amqp",
        (
            drain(FASTQ, "amqp", results=True),
            drain(FASTQ_DROP_IN, "amqp", results=True),
            drain(CELERY, "amqp", results=True),
        ),
        (("celery", "worker_us"),),
    ),
    Metric(
        "drain-redis",
        "No-op tasks from a full Redis queue, 1 child, no results",
        "redis",
        (
            drain(FASTQ, "redis", results=False),
            drain(FASTQ_DROP_IN, "redis", results=False),
            drain(CELERY, "redis", results=False),
        ),
        (("celery", "worker_us"),),
    ),
    Metric(
        "drain-redis-results",
        "The same with results in Redis",
        "redis",
        (
            drain(FASTQ, "redis", results=True),
            drain(FASTQ_DROP_IN, "redis", results=True),
            drain(CELERY, "redis", results=True),
        ),
        (("celery", "worker_us"),),
    ),
    Metric(
        "drain-sqlite",
        "No-op tasks from a full SQLite file, 1 child, no results",
        "sqlite",
        (
            drain(FASTQ, "sqlite", results=False),
            drain(HUEY, "sqlite", results=False),
            drain(HUEY_FSYNC, "sqlite", results=False),
        ),
        (("huey", "worker_us"),),
    ),
    Metric(
        "drain-sqlite-results",
        "The same with results in the file",
        "sqlite",
        (
            drain(FASTQ, "sqlite", results=True),
            drain(HUEY, "sqlite", results=True),
            drain(HUEY_FSYNC, "sqlite", results=True),
        ),
        (("huey", "worker_us"),),
    ),
    Metric(
        "roundtrip",
        "Call and result, one by one, RabbitMQ (dramatiq: until the task has run)",
        "amqp",
        (
            round_trip(FASTQ, "amqp"),
            round_trip(FASTQ_BEHIND, "amqp"),
            round_trip(CELERY, "amqp"),
            round_trip(DRAMATIQ, "amqp"),
            Entrant("floor", floor_round_trip),
        ),
        (("celery", "p50_ms"), ("dramatiq", "p50_ms"), ("floor", "p50_ms")),
    ),
    Metric(
        "roundtrip-redis",
        "Call and result, one by one, Redis",
        "redis",
        (round_trip(FASTQ, "redis"), round_trip(CELERY, "redis")),
        (("celery", "p50_ms"),),
    ),
    Metric(
        "roundtrip-sqlite",
        "Call and result, one by one, SQLite (huey polls each 0.5 ms)",
        "sqlite",
        (round_trip(FASTQ, "sqlite"), round_trip(HUEY, "sqlite"), round_trip(HUEY_FSYNC, "sqlite")),
        (("huey", "p50_ms"),),
    ),
    Metric(
        "publish",
        "Sending tasks to RabbitMQ; fastq's are confirmed, Celery's and dramatiq's are not by default",
        "amqp",
        (
            publish(FASTQ, "amqp"),
            publish(FASTQ_BEHIND, "amqp"),
            publish(FASTQ, "amqp", "batch"),
            publish(CELERY, "amqp"),
            publish(DRAMATIQ, "amqp"),
            Entrant("floor", floor_publish),
            Entrant("floor, confirmed", floor_confirm),
        ),
        (("celery", "producer_us"), ("dramatiq", "producer_us"), ("floor", "producer_us")),
    ),
    Metric(
        "publish-redis",
        "Sending tasks to Redis",
        "redis",
        (
            publish(FASTQ, "redis"),
            publish(FASTQ_BEHIND, "redis"),
            publish(FASTQ, "redis", "batch"),
            publish(CELERY, "redis"),
            Entrant("floor", floor_push),
        ),
        (("celery", "producer_us"), ("floor", "producer_us")),
    ),
    Metric(
        "publish-sqlite",
        "Sending tasks to SQLite",
        "sqlite",
        (
            publish(FASTQ, "sqlite"),
            publish(FASTQ, "sqlite", "batch"),
            publish(HUEY, "sqlite"),
            publish(HUEY_FSYNC, "sqlite"),
        ),
        (("huey", "producer_us"),),
    ),
    *(
        Metric(
            f"delay-{name}{'-results' if results else ''}",
            f"Celery's delay() to {words}{', with results' if results else ''}; accelerated: fastq.accelerate",
            broker,
            (
                publish(CELERY, broker, results=results),
                publish(CELERY_ACCELERATED, broker, results=results),
                *([publish(CELERY_BEHIND, broker, results=results)] if broker == "redis" else []),
                Entrant("floor", floor_push if broker == "redis" else floor_publish),
            ),
            (("celery", "producer_us"), ("floor", "producer_us")),
        )
        for name, broker, words in DELAYS
        for results in (False, True)
    ),
    Metric(
        "memory",
        "Memory, RabbitMQ",
        "amqp",
        (memory(FASTQ, "amqp"), memory(CELERY, "amqp"), memory(DRAMATIQ, "amqp")),
        (("celery", "pss_mb"),),
    ),
    Metric(
        "memory-sqlite",
        "Memory, SQLite",
        "sqlite",
        (memory(FASTQ, "sqlite"), memory(HUEY, "sqlite")),
        (("huey", "pss_mb"),),
    ),
    Metric(
        "start",
        "Start to first task done, RabbitMQ",
        "amqp",
        (start(FASTQ, "amqp"), start(CELERY, "amqp"), start(DRAMATIQ, "amqp")),
        (("celery", "start_s"),),
    ),
    Metric(
        "start-sqlite",
        "Start to first task done, SQLite",
        "sqlite",
        (start(FASTQ, "sqlite"), start(HUEY, "sqlite")),
        (("huey", "start_s"),),
    ),
    Metric(
        "syscalls",
        "System calls under load, RabbitMQ",
        "amqp",
        (system_calls(FASTQ, "amqp"), system_calls(CELERY, "amqp"), system_calls(DRAMATIQ, "amqp")),
        (("celery", "syscalls"),),
    ),
    Metric(
        "children",
        "More children than cores, RabbitMQ",
        "amqp",
        (more_children(FASTQ, "amqp"), more_children(CELERY, "amqp"), more_children(DRAMATIQ, "amqp")),
    ),
    Metric(
        "recycle",
        f"A new child every {RECYCLE_AFTER} tasks, RabbitMQ",
        "amqp",
        (recycling(FASTQ, "amqp"), recycling(CELERY, "amqp"), Entrant("floor: empty forks", floor_recycling)),
    ),
    *io_metrics("", "amqp", "RabbitMQ"),
    *io_metrics("-redis", "redis", "Redis"),
    Metric(
        "io-memory",
        f"{HELD:,} calls that sleep, in one child, RabbitMQ",
        "amqp",
        (
            holding(FASTQ_ASYNC, "amqp"),
            holding(fastq_pooled("gevent"), "amqp"),
            holding(TASKIQ_HOLDING, "amqp"),
            holding(celery_pooled("gevent"), "amqp"),
        ),
        (("taskiq", "held_mb"), ("celery, gevent", "held_mb")),
    ),
)
