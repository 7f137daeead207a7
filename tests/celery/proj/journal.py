"""What tasks, handlers and signal receivers of the application note; the test reads it. One line of JSON per note."""

from __future__ import annotations

import json
import os
import time
from typing import Any


def role() -> str:
    """Return which process this is: "main" or "child" of a worker, "client" for the test itself."""
    if "PROJ_JOURNAL" not in os.environ:
        return "client"
    # The test starts each worker in a session of its own, whose leader is the main process.
    return "main" if os.getsid(0) == os.getpid() else "child"


def note(what: str, **fields: Any) -> None:
    """Append one note; one write() to a file opened with O_APPEND is whole whoever is killed when."""
    path = os.environ.get("PROJ_JOURNAL")
    if path is None:
        return
    entry = {"what": what, "role": role(), "pid": os.getpid(), "at": time.time(), **fields}
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, json.dumps(entry, default=repr).encode() + b"\n")
    finally:
        os.close(descriptor)
