"""One run: one system with a virtual host or database file, a counter, a worker and a producer of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from bench.floor import Floor
from bench.measure import tree_of
from bench.peers.counter import Counter
from bench.systems import ROOT, System
from tests.support.servers import RabbitMQ, Redis

Broker = Literal["amqp", "sqlite", "redis"]
Figures = dict[str, float]

WARM_UP_TASKS = 100
START_TIMEOUT_S = 60.0
TASK_TIMEOUT_S = 0.05  # per task; a system that needs more than 50 ms for a no-op is stuck
POLL_S = 0.002
REDIS_DATABASES = 16  # a server has so many unless it is told otherwise


class BenchError(Exception):
    """A system did not start, run or answer in time; the text ends with its output."""


class Bench:
    """What all runs share: the private brokers, the floor's program, the peers' interpreter, a folder."""

    def __init__(self, peers: str, folder: Path, rabbitmq: RabbitMQ | None, redis: Redis | None = None) -> None:
        self.peers = peers
        self.folder = folder
        self.rabbitmq = rabbitmq
        self.redis = redis
        self._databases = 0
        self.floor = Floor(folder)

    def broker_pids(self, broker: Broker) -> list[int]:
        """Return the broker's processes; [] when the broker is a file."""
        server = {"amqp": self.rabbitmq, "redis": self.redis, "sqlite": None}[broker]
        return server.pids() if server is not None else []

    def _redis_url(self) -> str:
        """Return the URL of an empty database; Redis has sixteen."""
        assert self.redis is not None
        self._databases += 1
        if self._databases % REDIS_DATABASES == 0:
            self.redis.restart()
        return self.redis.url(self._databases % REDIS_DATABASES)

    @contextlib.contextmanager
    def run(self, system: System, broker: Broker, results: bool, task: str = "noop") -> Iterator[Run]:
        """Give one system, of whose tasks one is sent, everything it needs, and clear it away afterwards."""
        folder = Path(tempfile.mkdtemp(prefix=f"{system.module}-", dir=self.folder))
        vhost = self.rabbitmq.new_vhost() if broker == "amqp" and self.rabbitmq is not None else None
        try:
            if broker == "redis":
                url = self._redis_url()
            else:
                url = self.rabbitmq.url(vhost) if vhost and self.rabbitmq else f"sqlite:///{folder / 'queue.db'}"
            backend = "disabled" if not results else "rpc://" if broker == "amqp" else url
            yield Run(self, system, broker, folder, url, backend, task)
        finally:
            if vhost and self.rabbitmq:
                self.rabbitmq.delete_vhost(vhost)
            shutil.rmtree(folder)


class Run:
    """One system on one empty broker."""

    def __init__(
        self, bench: Bench, system: System, broker: Broker, folder: Path, url: str, backend: str, task: str
    ) -> None:
        self.bench = bench
        self.system = system
        self.broker = broker
        self.folder = folder
        self.counter = Counter(folder / "counter")
        self._python = system.interpreter(bench.peers)
        self._environment = {
            **os.environ,
            **dict(system.environment),
            "PYTHONPATH": str(ROOT),
            "BENCH_BROKER": url,
            "BENCH_BACKEND": backend,
            "BENCH_COUNTER": str(folder / "counter"),
            "BENCH_TASK": task,
        }

    def broker_pids(self) -> list[int]:
        """Return the broker's processes."""
        return self.bench.broker_pids(self.broker)

    @contextlib.contextmanager
    def worker(self, children: int = 1, recycle: int | None = None) -> Iterator[int]:
        """Run a worker while the body runs; yields its pid at once, before it is ready."""
        log_path = self.folder / "worker.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [self._python, *self.system.worker(children, recycle)],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process.pid
        except BenchError as error:
            output = log_path.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise BenchError(f"{self.system.name}: {error}\n{output}") from None
        finally:
            end(process)

    def warm_up(self) -> None:
        """Return when the worker has run its first tasks."""
        with self.filled(WARM_UP_TASKS):
            self.wait_for(self.counter.total, WARM_UP_TASKS, START_TIMEOUT_S)

    @contextlib.contextmanager
    def filled(self, count: int) -> Iterator[None]:
        """Put that many tasks into the queue; the producer stays alive while the body runs, its reply queue with it."""
        process = self._client("fill", count)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                process.kill()
                raise BenchError(f"{self.system.name}: the producer failed\n{process.communicate()[1]}")
            yield
        finally:
            end(process)

    def ask(self, command: str, count: int) -> Figures:
        """Run one of the client's commands and return what it measured."""
        process = self._client(command, count)
        try:
            output, errors = process.communicate(timeout=START_TIMEOUT_S + count * TASK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise BenchError(f"{command} did not end: {process.communicate()[1][-2000:]}") from None
        if process.returncode != 0 or not output:
            raise BenchError(f"{command} failed: {errors[-2000:]}")
        figures: Figures = json.loads(output.splitlines()[-1])
        return figures

    def forks(self, count: int) -> Figures:
        """Return what forking and ending so many empty processes of a worker's size took."""
        command = [self._python, "-m", "bench.peers.forks", str(count)]
        done = subprocess.run(
            command,
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=START_TIMEOUT_S,
        )
        figures: Figures = json.loads(done.stdout)
        return figures

    def wait_for(self, total: Callable[[], int], target: int, timeout_s: float) -> None:
        """Return when the counter has reached the target."""
        deadline = time.monotonic() + timeout_s
        while total() < target:
            if time.monotonic() > deadline:
                raise BenchError(f"{total()} of {target} tasks had run after {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _client(self, command: str, count: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._python, "-m", "bench.peers.client", self.system.module, command, str(count)],
            env=self._environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Stop a process and everything below it, in order if it lets itself be stopped."""
    tree = tree_of(process.pid) if process.poll() is None else []
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in tree[1:]:
        with contextlib.suppress(ProcessLookupError):
            if tree_of(pid):
                os.kill(pid, signal.SIGKILL)
