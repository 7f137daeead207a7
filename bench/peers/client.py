"""The producer's half of each measurement, the same loop for every system. It prints one line of JSON per answer.

python -m bench.peers.client APP fill COUNT       send COUNT tasks, print {"filled": COUNT}, wait for the end of input
python -m bench.peers.client APP publish COUNT    print the CPU of sending COUNT tasks one by one
python -m bench.peers.client APP batch COUNT      the same, all in one batch, where the system has such a thing
python -m bench.peers.client APP roundtrip COUNT  print the times of COUNT calls, each waiting for its result

APP is a module of this folder with send() for one task, call() for one with its result and, perhaps, send_batch(count).
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable

WARM_UP = 50


def main() -> None:
    """Run the command of sys.argv with the functions of one system."""
    app, command, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    system = importlib.import_module(f"bench.peers.{app}")
    if command == "fill":
        fill(system.send, getattr(system, "send_batch", None), count)
    elif command == "publish":
        publish(system.send, count)
    elif command == "batch":
        batch(system.send_batch, count)
    else:
        round_trips(system.call, count)


def fill(send: Callable[[], object], send_batch: Callable[[int], object] | None, count: int) -> None:
    """Fill the queue and stay alive: a reply queue lives as long as its connection."""
    if send_batch is not None:
        send_batch(count)
    else:
        for _ in range(count):
            send()
    answer({"filled": count})
    sys.stdin.read()


def publish(send: Callable[[], object], count: int) -> None:
    """Print what one send costs, CPU of all threads of this process."""
    for _ in range(WARM_UP):
        send()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        send()
    cpu = time.process_time() - cpu
    answer({"count": count, "wall_s": time.perf_counter() - began, "cpu_s": cpu})


def batch(send_batch: Callable[[int], object], count: int) -> None:
    """Print what one task of a batch costs."""
    send_batch(WARM_UP)
    began, cpu = time.perf_counter(), time.process_time()
    send_batch(count)
    cpu = time.process_time() - cpu
    answer({"count": count, "wall_s": time.perf_counter() - began, "cpu_s": cpu})


def round_trips(call: Callable[[], object], count: int) -> None:
    """Print the quantiles of `count` calls."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    times.sort()
    answer({"count": count, "p50_s": times[count // 2], "p99_s": times[count * 99 // 100]})


def answer(value: dict[str, float]) -> None:
    """Print one line of JSON for the benchmark."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
