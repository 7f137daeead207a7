"""What the kernel knows about a tree of processes: CPU time, memory, system calls. Linux only.

Source: proc(5), clock_getcpuclockid(3), strace(1).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STRACE_START_S = 10.0


@dataclass(frozen=True, slots=True)
class Cpu:
    """User and system time that a tree has used since each of its processes began, children that ended included."""

    seconds: float

    def __sub__(self, earlier: Cpu) -> float:
        return self.seconds - earlier.seconds


def cpu_of(pids: list[int]) -> Cpu:
    """Return the CPU time of these processes and of their children that have ended and been waited for."""
    return Cpu(sum(own_cpu_s(pid) + reaped_cpu_s(pid) for pid in pids))


def own_cpu_s(pid: int) -> float:
    """Return the CPU seconds of all threads of a process; 0 when it has gone."""
    # The process's CPU clock counts in nanoseconds; /proc/PID/stat counts in ticks of 10 ms.
    clock = (~pid << 3) | 2  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), as clock_getcpuclockid(3) computes it
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def reaped_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process's children that have ended, in steps of 10 ms."""
    fields = stat_fields(pid)
    return (int(fields[13]) + int(fields[14])) / TICKS_PER_S if fields else 0.0


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (field 3 of proc(5) is the first); [] when it has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name in parentheses may hold spaces


def tree_of(root: int) -> list[int]:
    """Return the pids of a process and everything below it, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat_fields(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, []))
    return tree


def pss_bytes(pids: list[int]) -> int:
    """Return the proportional set size: private pages whole, shared pages divided by the number of their users."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def frozen(root: int) -> Iterator[list[int]]:
    """Stop a whole tree while the body runs; yields its pids."""
    pids = tree_of(root)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in reversed(pids):  # children first, so that no parent sees one of them stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class SystemCalls:
    """Counts the system calls of a tree, by strace, from start() to stop()."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.by_name: dict[str, int] = {}
        self._pids = pids
        self._summary = folder / "strace.txt"
        self._process: subprocess.Popen[str] | None = None

    @property
    def count(self) -> int:
        """All calls together; 0 before stop()."""
        return sum(self.by_name.values())

    def start(self) -> None:
        """Return when every thread of every process is watched. Raises RuntimeError where strace may not do that."""
        command = ["strace", "-c", "-f", "-o", str(self._summary), *(f"--attach={pid}" for pid in self._pids)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + STRACE_START_S
        while not all(is_traced(pid) for pid in self._pids):
            if time.monotonic() > deadline or self._process.poll() is not None:
                self._process.kill()
                raise RuntimeError(f"strace cannot attach: {self._process.communicate()[1]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Detach; by_name and count are known then."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=STRACE_START_S)
        self._process = None
        self.by_name = parse_summary(self._summary.read_text(encoding="ascii", errors="replace"))

    def __enter__(self) -> SystemCalls:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def is_traced(pid: int) -> bool:
    """Return whether a debugger or strace is attached to every thread of a process."""
    try:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            if "TracerPid:\t0\n" in status.read_text(encoding="ascii", errors="replace"):
                return False
    except OSError:
        return True  # it has gone: nothing to wait for
    return True


def parse_summary(text: str) -> dict[str, int]:
    """Return the calls column of `strace -c` by name."""
    counts: dict[str, int] = {}
    for line in text.splitlines():
        fields = line.split()
        # "% time  seconds  usecs/call  calls  [errors]  syscall"
        if len(fields) in (5, 6) and fields[3].isdigit() and fields[-1] != "total":
            counts[fields[-1]] = counts.get(fields[-1], 0) + int(fields[3])
    return counts
