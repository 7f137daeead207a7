"""The systems that are compared: how each one's worker is started, tuned as a competent user would for throughput."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFETCH = 1000


@dataclass(frozen=True, slots=True)
class System:
    """One task queue, or one way to use it."""

    name: str
    module: str  # under bench.peers
    distribution: str  # what pip calls it
    # (children, or calls at once in the only child; recycle after N tasks) -> arguments of the interpreter
    worker: Callable[[int, int | None], list[str]]
    environment: tuple[tuple[str, str], ...] = ()
    libraries: tuple[str, ...] = ()  # what it imports beside itself, by the module's name

    def interpreter(self, peers: str) -> str:
        """Return which Python runs it: fastq runs in this one, the others in the peers'."""
        return sys.executable if self.distribution == "fastq" else peers

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the modules without which it cannot be measured."""
        return (self.distribution, *self.libraries)


def fastq_worker(children: int, recycle: int | None) -> list[str]:
    arguments = ["-m", "fastq", "-A", "bench.peers.fastq_app", "worker", "-c", str(children), "-l", "WARNING"]
    arguments += ["--prefetch-multiplier", str(PREFETCH)]
    return [*arguments, "--max-tasks-per-child", str(recycle)] if recycle else arguments


def drop_in_worker(children: int, recycle: int | None) -> list[str]:
    arguments = ["-m", "fastq", "-A", "bench.peers.celery_app", "worker", "-c", str(children), "-l", "WARNING"]
    arguments += ["-O", "fair", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [*arguments, "--max-tasks-per-child", str(recycle)] if recycle else arguments


def celery_worker(children: int, recycle: int | None) -> list[str]:
    arguments = ["-m", "celery", "-A", "bench.peers.celery_app", "worker", "-c", str(children), "-l", "WARNING"]
    arguments += ["-P", "prefork", "-O", "fair", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [*arguments, "--max-tasks-per-child", str(recycle)] if recycle else arguments


def dramatiq_worker(children: int, recycle: int | None) -> list[str]:
    assert recycle is None, "dramatiq does not recycle"
    return ["-m", "dramatiq", "bench.peers.dramatiq_app", "-p", str(children), "-t", "1", "--skip-logging"]


def huey_worker(children: int, recycle: int | None) -> list[str]:
    assert recycle is None, "huey does not recycle"
    # One worker thread is huey's leanest set-up; several only scale as processes. It polls: 1 to 10 ms.
    kind = "thread" if children == 1 else "process"
    arguments = ["-m", "huey.bin.huey_consumer", "bench.peers.huey_app.huey", "-w", str(children), "-k", kind]
    return [*arguments, "-d", "0.001", "-m", "0.01", "-n", "-q"]


def fastq_pool(pool: str, module: str) -> Callable[[int, int | None], list[str]]:
    """Return how fastq runs one child with many calls at once, of its own or of Celery's application."""

    def worker(slots: int, recycle: int | None) -> list[str]:
        assert recycle is None, "not measured"
        arguments = ["-m", "fastq", "-A", f"bench.peers.{module}", "worker", "-P", pool, "-c", str(slots)]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"] if module == "celery_app" else []
        return [*arguments, "-l", "WARNING", *quiet]

    return worker


def celery_pool(pool: str) -> Callable[[int, int | None], list[str]]:
    """Return how Celery runs many calls at once in its only process."""

    def worker(slots: int, recycle: int | None) -> list[str]:
        assert recycle is None, "not measured"
        arguments = ["-m", "celery", "-A", "bench.peers.celery_app", "worker", "-P", pool, "-c", str(slots)]
        # As many again are fetched ahead: with more a worker on Redis, which has no limit of its own, takes everything.
        arguments += ["-l", "WARNING", "--prefetch-multiplier", "2"]
        return [*arguments, "--without-gossip", "--without-mingle", "--without-heartbeat"]

    return worker


def taskiq_worker(slots: int, recycle: int | None) -> list[str]:
    assert recycle is None, "not measured"
    arguments = ["-m", "taskiq", "worker", "bench.peers.taskiq_app:broker", "-w", "1", "--log-level", "WARNING"]
    return [*arguments, "--max-async-tasks", str(slots), "--max-prefetch", str(slots)]


def dramatiq_async_worker(slots: int, recycle: int | None) -> list[str]:
    # A thread waits for each coroutine, so that as many run at once as there are threads.
    assert recycle is None, "dramatiq does not recycle"
    return ["-m", "dramatiq", "bench.peers.dramatiq_async_app", "-p", "1", "-t", str(slots), "--skip-logging"]


def dramatiq_threads_worker(slots: int, recycle: int | None) -> list[str]:
    assert recycle is None, "dramatiq does not recycle"
    return ["-m", "dramatiq", "bench.peers.dramatiq_app", "-p", "1", "-t", str(slots), "--skip-logging"]


FASTQ = System("fastq", "fastq_app", "fastq", fastq_worker)
FASTQ_BEHIND = System("fastq, confirms behind", "fastq_app", "fastq", fastq_worker, (("BENCH_CONFIRM", "behind"),))
CELERY_ACCELERATED = System("celery, accelerated", "celery_app", "fastq", celery_worker, (("BENCH_ACCELERATE", "1"),))
CELERY_BEHIND = System(
    "celery, accelerated, confirms behind", "celery_app", "fastq", celery_worker, (("BENCH_ACCELERATE", "behind"),)
)
FASTQ_DROP_IN = System("fastq, Celery app", "celery_app", "fastq", drop_in_worker)
CELERY = System("celery", "celery_app", "celery", celery_worker)
DRAMATIQ = System(
    "dramatiq", "dramatiq_app", "dramatiq", dramatiq_worker, (("dramatiq_queue_prefetch", str(PREFETCH)),)
)
HUEY = System("huey", "huey_app", "huey", huey_worker)
HUEY_FSYNC = System("huey, fsync", "huey_app", "huey", huey_worker, (("BENCH_HUEY_FSYNC", "1"),))

# -- what waits: many calls at once in one process


def fastq_pooled(pool: str, module: str = "fastq_app") -> System:
    """Return fastq with one child of a kind, for an application of its own or for Celery's."""
    name = f"fastq, {pool}{', Celery app' if module == 'celery_app' else ''}"
    return System(name, module, "fastq", fastq_pool(pool, module), libraries=green(pool))


def celery_pooled(pool: str) -> System:
    """Return Celery with one of its pools that run everything in one process."""
    return System(f"celery, {pool}", "celery_app", "celery", celery_pool(pool), libraries=green(pool))


def green(pool: str) -> tuple[str, ...]:
    """Return the library of a pool of greenlets."""
    return (pool,) if pool in ("gevent", "eventlet") else ()


FASTQ_ASYNC = fastq_pooled("asyncio", "fastq_async_app")
TASKIQ = System("taskiq", "taskiq_app", "taskiq", taskiq_worker, libraries=("taskiq_aio_pika", "taskiq_redis"))
TASKIQ_STREAM = replace(TASKIQ, name="taskiq, stream", environment=(("BENCH_TASKIQ_STREAM", "1"),))
TASKIQ_HOLDING = replace(TASKIQ, environment=(("BENCH_PREFETCH", "20000"),))
DRAMATIQ_ASYNC = System(
    "dramatiq, async",
    "dramatiq_async_app",
    "dramatiq",
    dramatiq_async_worker,
    (("dramatiq_queue_prefetch", str(PREFETCH)),),
)
DRAMATIQ_THREADS = replace(DRAMATIQ, name="dramatiq, threads", worker=dramatiq_threads_worker)
