"""States that Celery's code in a child replies by ``rpc://``: to the main process, which replies the result too.

By a connection of the child's own they would come when they like, and one that came behind the result would have a
caller wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from celery.backends.rpc import RPCBackend

from fastq.celery.checking.hookpoints import is_genuine


def divert(send: Callable[[str, str, bytes], None], running: Callable[[], Mapping[str, Any]]) -> None:
    """Have this process's stores hand states about the running call, whose request ``running`` returns, to ``send``.

    Nothing changes where a tool has put its own code around the store: it sends all states of a call from here.
    """
    original = RPCBackend.store_result
    if not is_genuine(original):
        return

    @wraps(original)
    def store_result(
        self: Any, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        routing_key, correlation_id = self.destination_for(task_id, request)
        if not (
            routing_key
            and routing_key == running().get("reply_to")
            and correlation_id == task_id
            and _is_plain(self)
            and len(task_id) <= _MAX_ID
            and len(state) <= _MAX_STATE
        ):
            return original(self, task_id, result, state, traceback=traceback, request=request, **options)
        send(task_id, state, _bytes(self.encode(self._to_result(task_id, state, result, traceback, request))))
        return result

    RPCBackend.store_result = store_result


#: What surely fits into a record and into a message's properties, in any script.
_MAX_ID, _MAX_STATE = 63, 63


def _is_plain(backend: Any) -> bool:
    """Return whether the main process can send the backend's results: Celery's own class, transient, as plain JSON."""
    return (
        type(backend) is RPCBackend
        and backend.serializer == "json"
        and not backend.persistent
        and not getattr(backend, "compression", None)  # since Celery 5.7
    )


def _bytes(payload: str | bytes) -> bytes:
    return payload if isinstance(payload, bytes) else payload.encode()
