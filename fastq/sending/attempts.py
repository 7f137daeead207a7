"""How often messages are sent, and which of them again. Sends nothing and does not wait: that differs on a loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fastq.errors import ConnectionLost, PublishError

if TYPE_CHECKING:
    from fastq.sending.envelope import PublishRetry
    from fastq.wire.message import Message


class Attempts:
    """The attempts to send messages by a policy, until a deadline (monotonic) for all of them together."""

    def __init__(self, messages: Sequence[Message], policy: PublishRetry, deadline: float) -> None:
        #: What the next attempt is to send: what was lost with its connection or refused, never what was confirmed.
        self.left = messages
        self._policy = policy
        self._deadline = deadline
        self._count = 0

    def pause_after(self, error: ConnectionLost | PublishError) -> float:
        """Return how long (s) to wait before the next attempt; raise the error of the last one if there is none."""
        policy = self._policy
        if policy.max_retries is not None and self._count >= policy.max_retries:
            raise error
        if isinstance(error, PublishError) and error.again is not None:
            if not error.again:
                raise error
            self.left = cast("Sequence[Message]", error.again)
        pause_s = policy.pause_s(self._count)
        if time.monotonic() + pause_s >= self._deadline:
            raise error
        self._count += 1
        return pause_s
