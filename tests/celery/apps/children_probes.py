"""What a task finds in its process: plain functions, which `children` and `children_fastq` make tasks of."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.celery.proj.journal import note


def identity() -> dict[str, Any]:
    me: Any = multiprocessing.current_process()
    return {
        "pid": os.getpid(),
        "name": me.name,
        "index": getattr(me, "index", None),
        "identity": list(me._identity),
        "daemon": me.daemon,
        "leads": os.getpgid(0) == os.getpid(),
    }


def hold_identity(gate: str) -> dict[str, Any]:
    """Return what is known of this process once the gate is open, and say in the log that it was here."""
    with open("/proc/self/cmdline", encoding="utf-8") as file:
        found = {**identity(), "title": file.read().partition("\0")[0]}
    logging.getLogger("probe").warning("pid %d holds", os.getpid())
    note("holding", mark=gate)
    while not os.path.exists(gate):
        time.sleep(0.01)
    return found


def fork_and_signal(signum: int) -> float:
    """Return after how many seconds a fork that sleeps has ended of a signal; 5 when it has not."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            time.sleep(60)
        finally:
            os._exit(0)
    time.sleep(0.05)
    os.kill(pid, signum)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > 5:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 5
        time.sleep(0.01)
    return time.monotonic() - began


def program_after(name: str) -> str:
    """Return what a shell says after it has got a signal."""
    return subprocess.run(["/bin/sh", "-c", f"kill -{name} $$; echo lives"], stdout=subprocess.PIPE, text=True).stdout


def program_until(gate: str) -> str:
    """Return what a shell says that this task has started, and that waits for the gate."""
    command = f"echo > {gate}.begun; while [ ! -e {gate} ]; do sleep 0.05; done; echo lives"
    return subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, text=True).stdout


def read_descriptor() -> str:
    return os.read(0, 100).decode()


def read_stdin() -> list[str]:
    return [sys.stdin.read(), os.readlink("/proc/self/fd/0")]


def passed_on() -> list[str]:
    """Return what a program finds open that a task starts without closing anything, besides the standard streams."""
    listed = ["/bin/ls", "-l", "/proc/self/fd"]
    lines = subprocess.run(listed, stdout=subprocess.PIPE, text=True, close_fds=False).stdout.splitlines()[1:]
    found = [line.split()[-3:] for line in lines]
    return sorted(what for number, _, what in found if number not in "012" and not what.endswith("/fd"))


def sleep_with_alarm_used() -> None:
    signal.alarm(1)
    signal.alarm(0)
    time.sleep(20)


def leave_handler() -> None:
    def foreign(*_: object) -> None:
        raise ZeroDivisionError

    signal.signal(signal.SIGALRM, foreign)
    signal.setitimer(signal.ITIMER_REAL, 300)


def timer_left() -> float:
    left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return left


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def hold_and_clean_up(mark: str) -> None:
    note("holding", mark=mark)
    try:
        time.sleep(60)
    except BaseException as error:
        note("interrupted", mark=mark, by=type(error).__name__)
        raise
    finally:
        note("cleaned up", mark=mark)


def swallow(mark: str) -> str:
    note("holding", mark=mark)
    with contextlib.suppress(BaseException):
        time.sleep(60)
    return "went on"


def start_and_hold(mark: str) -> None:
    note("started", mark=mark, program=subprocess.Popen(["/bin/sleep", "300"]).pid)
    time.sleep(60)


def allocate(mib: int) -> int:
    bytearray(b"x") * (mib << 20)
    return os.getpid()


def leave_thread(mark: str) -> int:
    def flush() -> None:
        time.sleep(0.7)
        note("flushed", mark=mark)

    threading.Thread(target=flush, daemon=True).start()
    return os.getpid()


def log(logger: str) -> None:
    logging.getLogger(logger).warning("said in a task")


class Journal(logging.Handler):
    """A handler of the user's own."""

    def emit(self, record: logging.LogRecord) -> None:
        task = [getattr(record, field, None) for field in ("task_name", "task_id")]
        note("record", logger=record.name, process=record.processName, task=task, text=record.getMessage())


if os.environ.get("OWN_HANDLERS"):
    for each in (None, "celery.task", "multiprocessing"):  # Celery's task loggers and billiard's do not propagate
        logging.getLogger(each).addHandler(Journal())


PROBES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        identity, hold_identity, fork_and_signal, program_after, program_until, read_descriptor, read_stdin,
        sleep_with_alarm_used, leave_handler, timer_left, sleep, log, hold_and_clean_up, swallow, start_and_hold,
        allocate, leave_thread, passed_on,
    )
}  # fmt: skip
