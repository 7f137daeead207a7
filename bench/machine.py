"""What the numbers were measured on. Names hardware and versions, never a person, an address or a path."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

PACKAGES = (
    *("fastq", "celery", "kombu", "amqp", "dramatiq", "pika", "huey", "taskiq", "taskiq-aio-pika", "taskiq-redis"),
    *("redis", "gevent", "eventlet", "uvloop", "orjson", "Cython"),
)


class Machine(TypedDict):
    """The record that goes into the JSON file."""

    date: str
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    system: str
    python: str
    sqlite: str
    rabbitmq: str
    versions: dict[str, str]
    load_before: list[float]
    load_after: list[float]


def describe(peers_python: str, rabbitmq_version: str) -> Machine:
    """Return what can be known before the first measurement."""
    import sqlite3

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "system": system_name(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "rabbitmq": rabbitmq_version,
        "versions": versions_in(peers_python),
        "load_before": load(),
        "load_after": [],
    }


def load() -> list[float]:
    """Return the load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def cpu_model() -> str:
    """Return the processor's name as the kernel prints it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def system_name() -> str:
    """Return the distribution's name and version."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def versions_in(python: str) -> dict[str, str]:
    """Return the versions of the compared packages, of this interpreter or of the peers'."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))\n"
    )
    versions: dict[str, str] = {}
    for interpreter in (python, sys.executable):
        done = subprocess.run([interpreter, "-c", program, *PACKAGES], capture_output=True, text=True, check=True)
        versions |= json.loads(done.stdout)
    return versions


def sentence(machine: Machine) -> str:
    """Return the machine in one line."""
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Linux {machine['kernel']}, Python {machine['python']}, RabbitMQ {machine['rabbitmq']}, "
        f"SQLite {machine['sqlite']}; load {machine['load_before'][0]} before, "
        f"{machine['load_after'][0] if machine['load_after'] else '?'} after"
    )
