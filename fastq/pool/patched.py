"""Whether gevent or eventlet has replaced sockets and threads of this process. Imports neither."""

from __future__ import annotations

import sys
from typing import Any


def patched_by() -> str:
    """Return the name of the library, "" for none."""
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and (gevent.is_module_patched("socket") or gevent.is_module_patched("threading")):
        return "gevent"
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and (eventlet.is_monkey_patched("socket") or eventlet.is_monkey_patched("thread")):
        return "eventlet"
    return ""
