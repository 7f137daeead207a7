"""The application that the workers under fault tests run: tasks that write the ledger and then do as the test needs.

Broker and result store come from fastq's own environment variables, other settings from FASTQ_TEST_SETTINGS (JSON),
the ledger's path from FASTQ_TEST_LEDGER.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time

from fastq import FastQ, Task
from fastq.errors import Reject, SoftTimeLimitExceeded
from tests.support.task_ledger import record, record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")
STOPPED = b"stopped\0"  # the third kind of record: a soft limit was seen inside the task

app = FastQ("faults", **json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}")))

_kept: list[bytearray] = []


@app.task(name="work")
def work(number: int, seconds: float = 0.0, *ignored: object) -> int:
    """Take that long and return the number."""
    record_start(LEDGER, number)
    if seconds:
        time.sleep(seconds)
    record_done(LEDGER, number)
    return number


@app.task(name="until")
def wait_until(number: int, gate: str) -> None:
    """Wait until a file exists."""
    record_start(LEDGER, number)
    while not os.path.exists(gate):
        time.sleep(0.01)
    record_done(LEDGER, number)


@app.task(name="kill_own_child")
def kill_own_child(number: int) -> None:
    """End the process that runs this, as a segmentation fault or the memory killer does."""
    record_start(LEDGER, number)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="turn_down")
def turn_down(number: int) -> None:
    """Reject the message for good."""
    record_start(LEDGER, number)
    raise Reject("no such user\nin line 2")


@app.task(name="once_more", bind=True, acks_late=False)
def once_more(self: Task[..., None], number: int, gate: str) -> None:
    """Be acknowledged at once, wait until a file exists, and run once more by a retry."""
    record_start(LEDGER, number)
    if self.request.retries:
        record_done(LEDGER, number)
        return
    while not os.path.exists(gate):
        time.sleep(0.01)
    self.retry(countdown=0)


@app.task(name="stuck_in_c")
def stuck_in_c(number: int, call: str) -> None:
    """Hold the interpreter's lock in C for a minute: no signal handler written in Python can run.

    ``call``: "usleep" comes back as soon as any signal is handled, "read" is restarted by the system and never does.
    """
    record_start(LEDGER, number)
    c = ctypes.PyDLL(None)
    if call == "usleep":
        c.usleep(60_000_000)
    else:
        reader, _ = os.pipe()
        c.read(reader, ctypes.create_string_buffer(1), 1)
    record_done(LEDGER, number)


@app.task(name="stops_in_time")
def stops_in_time(number: int, seconds: float) -> str:
    """Clean up when the soft limit comes and return normally."""
    record_start(LEDGER, number)
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        record(LEDGER, STOPPED, number)
        return "stopped in time"
    return "was not stopped"


@app.task(name="ignores_soft_limit")
def ignores_soft_limit(number: int, seconds: float) -> None:
    """Go on after the soft limit, so that only the hard one ends it."""
    record_start(LEDGER, number)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            time.sleep(deadline - time.monotonic())
        except SoftTimeLimitExceeded:
            record(LEDGER, STOPPED, number)
    record_done(LEDGER, number)


@app.task(name="grow")
def grow(number: int, mebibytes: int) -> int:
    """Keep that much memory for the rest of the process's life; return the process."""
    record_start(LEDGER, number)
    _kept.append(bytearray(b"x") * (mebibytes << 20))
    record_done(LEDGER, number)
    return os.getpid()
