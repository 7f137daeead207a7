"""The systems that are compared: how each one's worker is started, tuned as a competent user would for throughput."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFETCH = 1000


@dataclass(frozen=True, slots=True)
class System:
    """One task queue, or one way to use it."""

    name: str
    module: str  # under bench.peers
    distribution: str  # what pip calls it
    worker: Callable[[int, int | None], list[str]]  # (children, recycle after N tasks) -> arguments of the interpreter
    environment: tuple[tuple[str, str], ...] = ()

    def interpreter(self, peers: str) -> str:
        """Return which Python runs it: fastq runs in this one, the others in the peers'."""
        return sys.executable if self.distribution == "fastq" else peers


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
