"""What the Celery examples share: their options, a private Redis when no broker is named, and a worker.

`--with celery` and `--with fastq` start the same application; nothing else differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


def parse_options(description: str) -> argparse.Namespace:
    """Return the command line's options: `program` and `broker`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--with", dest="program", choices=["celery", "fastq"], default="fastq", help="whose worker")
    parser.add_argument(
        "--broker",
        default=os.environ.get("CELERY_BROKER_URL"),
        help="its URL; default: $CELERY_BROKER_URL, else a private Redis",
    )
    return parser.parse_args()


@contextlib.contextmanager
def broker(url: str | None, folder: Path) -> Iterator[str]:
    """The URL of the named broker, or of a Redis that runs until the end of the block."""
    if url is not None:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("no broker: name one with --broker, or install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with _running(command, folder / "redis.log", {}, "Ready to accept connections"):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def worker(program: str, app: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A worker with two children that is ready at the beginning of the block and stopped in order at its end."""
    command = [sys.executable, "-m", program, "-A", app, "worker", "-l", "INFO", "-c", "2"]
    with _running(command, folder / "worker.log", environment, " ready."):
        yield


@contextlib.contextmanager
def beat(app: str, folder: Path, environment: Mapping[str, str], *options: str) -> Iterator[None]:
    """Celery's own beat while the block runs: fastq workers take what it sends like anybody's."""
    command = [sys.executable, "-m", "celery", "-A", app, "beat", "-l", "INFO", *options]
    with _running(command, folder / "beat.log", environment, "beat: Starting..."):
        yield


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastq-example-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _running(command: list[str], log: Path, environment: Mapping[str, str], ready: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while ready not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not start\n{log.read_text(errors='replace')}")
            time.sleep(0.02)
        yield
    except Exception:
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
