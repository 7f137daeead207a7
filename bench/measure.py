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
KERNEL_COUNTER = ("perf", "stat", "-e", "raw_syscalls:sys_enter")
KERNEL_START_S = 0.5  # perf does not say when it counts
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
    """Counts the system calls of a tree from start() to stop(): by the kernel's own counter, else by strace.

    strace slows a worker down, which then reads in smaller batches and makes more calls than it would.
    """

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.count = 0
        self._pids = pids
        self._by_kernel = has_kernel_counter()
        self._summaries = [folder / f"calls-{pid}.txt" for pid in (pids[:1] if self._by_kernel else pids)]
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Return when every thread of every process is watched. Raises RuntimeError where that is not allowed."""
        if self._by_kernel:
            pids = ",".join(map(str, self._pids))
            commands = [[*KERNEL_COUNTER, "-x", ",", "-o", str(self._summaries[0]), "-p", pids]]
        else:
            commands = [
                ["strace", "-c", "-f", "-o", str(summary), f"--attach={pid}"]
                for pid, summary in zip(self._pids, self._summaries, strict=True)
            ]
        for command in commands:
            self._processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + STRACE_START_S
        while not (self._by_kernel or all(is_traced(pid) for pid in self._pids)):
            ended = next((process for process in self._processes if process.poll() is not None), None)
            if time.monotonic() > deadline or ended is not None:
                for process in self._processes:
                    process.kill()
                raise RuntimeError(f"strace cannot attach: {(ended or self._processes[0]).communicate()[1]}")
            time.sleep(0.02)
        time.sleep(KERNEL_START_S if self._by_kernel else 0)

    def stop(self) -> None:
        """Detach; the count is known then."""
        for process in self._processes:
            process.send_signal(signal.SIGINT)
        for process in self._processes:
            process.communicate(timeout=STRACE_START_S)
        if self._processes:
            texts = [summary.read_text(encoding="ascii", errors="replace") for summary in self._summaries]
            if self._by_kernel:
                self.count = sum(int(line.split(",")[0]) for line in texts[0].splitlines() if "sys_enter" in line)
            else:
                self.count = sum(sum(parse_summary(text).values()) for text in texts)
        self._processes = []

    def __enter__(self) -> SystemCalls:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def has_kernel_counter() -> bool:
    """Return whether perf may count system calls here (it needs root and a mounted tracefs)."""
    try:
        return subprocess.run([*KERNEL_COUNTER, "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


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
