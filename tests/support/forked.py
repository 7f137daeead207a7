"""Commands in processes forked from one that has imported what they need: each costs its own work, not its imports too.

As ``python -m celery ...`` and ``python -m fastq ...``, of which most of the time is Python's own start. What a command
imports, or must not, is tested elsewhere, with processes of their own.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests import ROOT

#: What most commands import.
IMPORTED = (
    *("celery.bin.celery", "celery.apps.multi", "celery.backends.redis", "kombu.transport.pyamqp"),
    *("kombu.transport.redis", "fastq.app", "fastq.cli.remote", "fastq.celery.cli.client"),
)
_LOCK = threading.Lock()


def run_command(
    program: str,
    arguments: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdin: str = "",
    timeout_s: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m program`` and return how it ended. Raises subprocess.TimeoutExpired once that has killed it."""
    with tempfile.TemporaryDirectory(prefix="fastq-forked-") as folder, _LOCK:
        files = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_text(stdin, encoding="utf-8")
        order = {"program": program, "arguments": arguments, "cwd": str(cwd), "env": dict(env), "files": files}
        server = _server()
        _write(server.stdin, order)
        pid = int(_read(server.stdout))
        killer = threading.Timer(timeout_s, lambda: os.kill(pid, signal.SIGKILL))
        killer.start()
        code = int(_read(server.stdout))
        is_late = not killer.is_alive()
        killer.cancel()
        out, err = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files[1:])
    command = [sys.executable, "-m", program, *arguments]
    if is_late:
        raise subprocess.TimeoutExpired(command, timeout_s, out, err)
    return subprocess.CompletedProcess(command, code, out, err)


@cache
def _server() -> subprocess.Popen[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTQ", "CELERY"))}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked"],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(server.communicate)
    return server


def _write(stream: IO[bytes] | None, value: object) -> None:
    assert stream is not None
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def _read(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError("what forks commands has ended")
    return line


def _serve() -> dict[str, Any] | None:
    """Fork a process for each order until there are none; in each it returns the order, in the end None."""
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    for line in iter(orders.readline, b""):
        order: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            orders.close()
            answers.close()
            return order
        _write(answers, pid)
        _write(answers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def _become(order: dict[str, Any]) -> None:
    """Be what ``python -m`` would be."""
    for number, file in enumerate(order["files"]):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  for the life of the process
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    paths = [order["cwd"], *filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in ("", str(ROOT), *paths))]
    sys.argv = [order["program"], *order["arguments"]]


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    order = _serve()
    if order is not None:
        _become(order)
        runpy.run_module(order["program"], run_name="__main__", alter_sys=True)
