"""A publisher and a result store that keep all they get, and calls as a child receives them. No broker, no worker."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastq.codecs.meta import decode_meta
from fastq.errors import ResultTimeout
from fastq.interfaces import Meta, Unwatch
from fastq.states import READY_STATES
from fastq.wire.call import Call
from fastq.wire.message import Message
from fastq.wire.pipe import SHARED_SIZE, ChildPipe, RingReader, call_record
from fastq.wire.properties import decode_properties


class RecordingPublisher:
    """Keeps what is published, a list for each call of ``publish``; raises what ``failures`` holds first."""

    def __init__(self) -> None:
        self.batches: list[list[Message]] = []
        self.declared: list[str] = []
        self.failures: list[Exception] = []
        self.closed = False

    @property
    def messages(self) -> list[Message]:
        return [message for batch in self.batches for message in batch]

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.batches.append(list(messages))

    def declare(self, queue: str, deadline: float | None = None) -> None:
        self.declared.append(queue)

    def purge(self, queue: str) -> int:
        return len(self.messages)

    def depth(self, queue: str) -> int:
        return len(self.messages)

    def close(self) -> None:
        self.closed = True


class RecordingStore:
    """Keeps metas by task id. Waiting ends when ``save`` is called from another thread."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self.metas: dict[str, Meta] = {}
        self.changed = threading.Condition()
        self.watchers: dict[str, list[Callable[[Meta], None]]] = {}
        self.observers: dict[str, list[Callable[[Meta], None]]] = {}
        self.loads = 0
        self.closed = False

    def reply_address(self, deadline: float | None = None) -> str | None:
        return self.address

    def is_there(self) -> bool:
        return True

    def load(self, task_id: str) -> Meta | None:
        self.loads += 1
        return self.metas.get(task_id)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        with self.changed:
            if not self.changed.wait_for(lambda: self._is_ready(task_id), timeout_s):
                raise ResultTimeout(f"task {task_id} has not ended within {timeout_s} s")
            return self.metas[task_id]

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        with self.changed:
            if not self._is_ready(task_id):
                self.watchers.setdefault(task_id, []).append(callback)
                return partial(self._unwatch, task_id, callback)
        threading.Thread(target=callback, args=(self.metas[task_id],)).start()
        return partial(self._unwatch, task_id, callback)

    def _unwatch(self, task_id: str, callback: Callable[[Meta], None]) -> None:
        with self.changed:
            callbacks = self.watchers.get(task_id, [])
            if callback in callbacks:
                callbacks.remove(callback)

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        with self.changed:
            observers = self.observers.setdefault(task_id, [])
            observers.append(callback)
        if task_id in self.metas:
            callback(self.metas[task_id])
        return partial(observers.remove, callback)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        with self.changed:
            self.metas[task_id] = decode_meta(meta)
            self.changed.notify_all()
            callbacks = self.watchers.pop(task_id, []) if self._is_ready(task_id) else []
            callbacks += self.observers.get(task_id, ())
        for callback in callbacks:
            callback(self.metas[task_id])

    def forget(self, task_id: str) -> None:
        self.metas.pop(task_id, None)

    def close(self) -> None:
        self.closed = True

    def _is_ready(self, task_id: str) -> bool:
        return task_id in self.metas and self.metas[task_id]["status"] in READY_STATES


def headers(message: Message) -> dict[str, Any]:
    """Return a message's headers."""
    found: dict[str, Any] = decode_properties(message.props)["headers"]
    return found


def body(message: Message) -> Any:
    """Return the JSON body of a message."""
    return json.loads(message.body)


def received(message: Message, **options: Any) -> Call:
    """Return the call that a child gets for a message, through the pipe between main process and child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    shared = os.memfd_create("recording")
    try:
        os.ftruncate(shared, SHARED_SIZE)
        ring = RingReader(shared)
        pipe = ChildPipe(theirs.fileno(), shared)
        ours.sendall(call_record(1, message.exchange, message.routing_key, message.props, message.body, **options))
        call = pipe.next()
        assert call is not None
        assert ring.started[0] == 1
        return call
    finally:
        ours.close()
        theirs.close()
        os.close(shared)
