"""A process that takes messages from a queue and holds them: to be killed, or stopped, by a test.

``python -m tests.support.holder URL COUNT LEASE_S`` prints ``holds`` when it has COUNT messages of the queue celery;
LEASE_S is how long its lease lasts with Redis. Then each line of its input is a command: ``ack`` settles all of them,
``lost`` waits until the connection is given up, ``fence`` until all that was asked for is done.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Any

from fastq.brokers.redis import lease
from fastq.brokers.redis.lease import LEASE_S
from fastq.link import ACK
from fastq.settings import Settings
from tests.support.tapped_consumer import TappedConsumer


class Holder:
    """That process, as a test sees it."""

    def __init__(self, url: str, count: int, lease_s: float = LEASE_S) -> None:
        command = [sys.executable, "-m", "tests.support.holder", url, str(count), str(lease_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._answer() == "holds"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def do(self, command: str) -> str:
        """Return what the process answers to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def leave(self) -> None:
        """Have it end in order: what it has settled is done."""
        self._process.communicate(timeout=20.0)

    def kill(self) -> None:
        """Kill it as a crash would."""
        self._process.kill()
        self._process.wait(10.0)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main(url: str, count: int, lease_s: float) -> None:
    """Take the messages, then obey."""
    lease.LEASE_S, lease.RENEW_EVERY_S = lease_s, lease_s / 3  # type: ignore[misc]
    with TappedConsumer(url, Settings({}), window=count) as consumer:
        held = consumer.arrived(count)
        print("holds", flush=True)
        for line in sys.stdin:
            if line.strip() == "ack":
                consumer.settle(ACK, *held)
                print("acked", flush=True)
            elif line.strip() == "fence":
                settled: Any = consumer.consumer
                consumer.run(settled.settled())
                print("done", flush=True)
            else:
                print(consumer.lost(30.0), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
