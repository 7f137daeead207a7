"""``task-sent``: tells monitors of every call that leaves this process, when ``task_send_sent_event`` is on.

The fields are Celery's. Best effort and on a connection of its own: what cannot be told is forgotten, as the call
itself has been sent. The events of workers are not made here.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from fastq.brokers import open_blocking_bus
from fastq.errors import FastqError
from fastq.request import is_in_worker
from fastq.wire.message import Message
from fastq.wire.properties import decode_properties

if TYPE_CHECKING:
    from fastq.interfaces import BlockingBus
    from fastq.settings import Settings

#: Fields by the header that has them.
_FROM_HEADERS = {
    "uuid": "id",
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    **{name: name for name in ("root_id", "parent_id", "retries", "eta", "expires")},
}


class SentEvents:
    """Sends the events of one application in one process. Thread-safe."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
        self._parents: BlockingBus | None = None
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._bus: BlockingBus | None = None
        self._clock = itertools.count(1)
        self._hostname = f"gen{os.getpid()}@{socket.gethostname()}"

    def tell(self, messages: Sequence[Message]) -> None:
        """Say that these calls were sent. A task in a worker says nothing here: its process has no connections."""
        if is_in_worker():
            return
        with self._lock:
            events = [self._event(message) for message in messages]
            if len(events) == 1:
                self._publish("task.sent", orjson.dumps(events[0]))
            elif events:
                self._publish("task.multi", orjson.dumps(events))

    def _event(self, message: Message) -> dict[str, Any]:
        return {
            **sent_fields(message),
            "type": "task-sent",
            "hostname": self._hostname,
            "pid": os.getpid(),
            "utcoffset": utc_offset_h(),
            "timestamp": time.time(),
            "clock": next(self._clock),
        }

    def _publish(self, routing_key: str, body: bytes) -> None:
        bus = self._bus
        try:
            if bus is None:
                bus = self._bus = open_blocking_bus(self._url, self._settings)
            bus.publish_event(routing_key, {"hostname": self._hostname}, body)
        except FastqError:
            self._drop()

    def close(self) -> None:
        """Close the connection; the next event opens a new one."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()

    def after_fork(self) -> None:
        """Leave the parent's connection alone: it is kept, as closing it here would end it there."""
        self._parents = self._bus
        self._start()


def sent_fields(message: Message) -> dict[str, Any]:
    """Return what a ``task-sent`` event says of a message of ours."""
    headers = decode_properties(message.props, bounded=False)["headers"]
    return {
        **{field: headers.get(name) for field, name in _FROM_HEADERS.items()},
        "queue": None if message.exchange else message.routing_key,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
    }


def utc_offset_h() -> float:
    """Return how many hours local time is behind UTC, as events say it."""
    return (time.altzone if time.localtime().tm_isdst > 0 else time.timezone) / 3600
