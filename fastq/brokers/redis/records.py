"""Taken messages as they stand in ``unacked``, and what they become when they go back to their queues. No I/O.

Source: kombu 5.7, ``restore_by_tag`` and ``_do_restore_message`` of its Redis transport.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastq.brokers.headers import DELIVERY_COUNT, REJECTED
from fastq.wire.kombu import is_bounded


@dataclass(frozen=True)
class Record:
    """A taken message. ``message`` is None when it is not one that kombu could have written."""

    envelope: bytes
    message: dict[str, Any] | None
    exchange: str
    routing_key: str

    @property
    def priority(self) -> int:
        """Return its priority, 0 when it has none."""
        properties = self.message.get("properties") if self.message else None
        try:
            return int(properties["priority"]) if isinstance(properties, dict) else 0
        except (KeyError, TypeError, ValueError, OverflowError):
            return 0

    def redelivered(self) -> bytes:
        """Return the envelope for its next delivery: marked as kombu does, and counted."""
        message = self.message
        headers = message.get("headers") if message else None
        if message is None or not isinstance(headers, dict):
            return self.envelope
        former = headers.get(DELIVERY_COUNT)
        count = former if isinstance(former, int) and former > 0 else 1 if headers.get("redelivered") is True else 0
        headers["redelivered"] = True
        headers[DELIVERY_COUNT] = count + 1
        properties = message.get("properties")
        info = properties.get("delivery_info") if isinstance(properties, dict) else None
        if isinstance(info, dict):
            info["redelivered"] = True
        return json.dumps(message).encode()

    def rejected(self, reason: str) -> bytes:
        """Return the envelope for the dead letters: the reason in a header, where there is a place for it."""
        headers = self.message.get("headers") if self.message else None
        if not isinstance(headers, dict):
            return self.envelope
        headers[REJECTED] = reason
        return json.dumps(self.message).encode()


def end_of_record(queue: str) -> bytes:
    """Return what follows the envelope in a record of a message that was taken from this queue."""
    return f', "", {json.dumps(queue)}]'.encode()


def read_record(value: bytes) -> Record:
    """Return the record; one that fits no pattern goes to no queue."""
    if value.startswith(b'[, "'):
        # Without its envelope, which is empty or too long to be read.
        places = _loads(b"[" + value[3:])
        if isinstance(places, list) and len(places) == 2 and all(isinstance(name, str) for name in places):
            return Record(b"", None, *places)
    # What we have written ourselves is taken apart as text: the envelope need not be JSON, and stays as it is.
    envelope, found, end = value.rpartition(b', "", ')
    own = _loads(b"[" + end) if found else None
    if isinstance(own, list) and len(own) == 1 and isinstance(own[0], str):
        return Record(envelope[1:], _message(_loads(envelope[1:])), "", own[0])
    whole = _loads(value)
    if isinstance(whole, list) and len(whole) == 3 and all(isinstance(name, str) for name in whole[1:]):
        return Record(json.dumps(whole[0]).encode(), _message(whole[0]), whole[1], whole[2])
    return Record(value, None, "", "")


def _message(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _loads(text: bytes) -> Any:
    """Return the JSON value in a text, None when it is not JSON, too deep or too much."""
    if not is_bounded(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
