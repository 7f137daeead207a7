"""The floor of recycling: what it costs to fork and end a process of a worker's size that does nothing.

python -m bench.peers.forks COUNT    with an application in BENCH_* imported, print the CPU of COUNT forks as JSON
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys

import fastq.worker.program  # noqa: F401  what a worker has in memory
from bench.peers import fastq_app  # noqa: F401


def cpu_s() -> float:
    """Return the CPU of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Fork and wait, one by one."""
    count = int(sys.argv[1])
    gc.collect()
    gc.freeze()
    began = cpu_s()
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    print(json.dumps({"count": count, "cpu_s": cpu_s() - began}))


if __name__ == "__main__":
    main()
