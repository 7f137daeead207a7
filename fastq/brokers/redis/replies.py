"""Bytes to replies, within bounds, and whether a reply is one that its command can have. No sockets."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import hiredis

from fastq.errors import RedisError, RemoteProtocolError

#: Chosen: what one call may bring, as the server does nothing else meanwhile.
CLAIM_BYTES: Final = 16 << 20
#: As ``fastq_max_message_bytes``, for who has no settings.
MAX_MESSAGE_BYTES: Final = 128 << 20
ENVELOPE_BYTES: Final = 1 << 20

_MORE: Final = object()

#: What a reply looks like: a type, a tuple of types, a list of such, or ``[such, ...]`` for any number of one.
Shape: TypeAlias = Any


def longest_envelope(max_message_bytes: int) -> int:
    """Return how long a message is at most as it lies in Redis: in base64, with its headers as text."""
    return max_message_bytes * 4 // 3 + ENVELOPE_BYTES


class ReplyReader:
    """What turns bytes into replies, error replies into RedisError objects. A reply has at most so many bytes."""

    def __init__(self, max_message_bytes: int) -> None:
        self._reader = hiredis.Reader(protocolError=RemoteProtocolError, replyError=RedisError, notEnoughData=_MORE)
        self._max_bytes = CLAIM_BYTES + longest_envelope(max_message_bytes)
        self._unfinished_bytes = 0

    def take(self, data: bytes) -> list[Any]:
        """Take bytes and return the replies that are complete by now. Raises RemoteProtocolError."""
        replies = []
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _MORE:
                replies.append(reply)
        except MemoryError:
            raise RemoteProtocolError("a reply announces more items than there is memory for") from None
        self._unfinished_bytes = 0 if replies else self._unfinished_bytes + len(data)
        if self._unfinished_bytes > self._max_bytes:
            raise RemoteProtocolError(
                f"a reply has more than {self._max_bytes} bytes, which is more than fastq_max_message_bytes allows"
            )
        return replies


def fits(reply: Any, shape: Shape) -> bool:
    """Whether a reply, or a message of a subscription, has this shape."""
    if isinstance(shape, (type, tuple)):
        return isinstance(reply, shape)
    if not isinstance(reply, list):
        return False
    if shape[-1] is ...:
        # Nearly always all are of just that type, and there can be thousands.
        return [*set(map(type, reply))] == [shape[0]] or all(fits(item, shape[0]) for item in reply)
    return len(reply) == len(shape) and all(map(fits, reply, shape))
