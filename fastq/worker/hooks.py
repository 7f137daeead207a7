"""What the message loop calls Python for: refusals, failures recorded by the main process, and the life of children.

Nothing here runs for a task that simply succeeds.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastq._core import Child
from fastq.codecs.meta import encode_meta
from fastq.errors import NotRegistered, TaskRevoked, TimeLimitExceeded, WorkerLostError
from fastq.pool.supervisor import Pool
from fastq.states import FAILURE, REVOKED
from fastq.wire.message import scan
from fastq.worker.messages import TaskLog

logger = logging.getLogger("fastq.worker")

#: Time for a child to write its stacks before it is killed at its hard limit.
DUMP_S = 0.1


class Hooks:
    """Answers the core's questions and passes events on; ``pool`` is set once it exists."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._log = TaskLog(logger)
        self.pool: Pool | None = None

    # --- messages

    def received(self, name: str, task_id: str) -> None:
        """A task message was admitted (called only when INFO is logged)."""
        self._log.received(name, task_id)

    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None:
        """A message was rejected because it is not a task message."""
        found = scan(props)
        logger.error(
            "Rejected malformed message: class=%s queue=%s task=%.100r id=%.100r headers=%d bytes body=%d bytes",
            reason,
            queue.decode("utf-8", "replace"),
            found["task"],
            found["id"],
            len(props),
            len(body),
        )

    def failure(self, kind: str, name: str, task_id: str, detail: Any) -> tuple[str, bytes | None]:
        """Return the state and the encoded result of a delivery that no child can end, and log it."""
        error: Exception
        if kind == "expired":
            self._log.revoked(name, task_id)
            return REVOKED, encode_meta(task_id, REVOKED, TaskRevoked("expired"))
        if kind == "unknown":
            self._log.unregistered(name, task_id)
            error = NotRegistered(name)
        elif kind == "time-limit":
            error = TimeLimitExceeded(detail)
        elif kind == "deliveries":
            error = WorkerLostError(f"delivered {detail} times without an end; not run again")
            logger.error("Task %s[%s] was %s", name, task_id, error)
        else:
            error = WorkerLostError(f"Worker exited prematurely: {detail}")
            logger.error("Task %s[%s] raised unexpected: %r", name, task_id, error)
        return FAILURE, encode_meta(task_id, FAILURE, error)

    def unsendable(self, task_id: str, queue: str, reason: str) -> None:
        """A result or a message of a task has no form that the broker takes."""
        logger.error("A message of task %s to %r could not be sent: %s", task_id or "?", queue, reason)

    def unconfirmed(self, name: str, task_id: str) -> None:
        """A message that a task sent was refused by the broker: the task runs again."""
        logger.error("A message sent by task %s[%s] reached no queue; the task will run again", name, task_id)

    # --- children

    def child_ready(self, child: Child) -> None:
        """A child takes calls."""
        assert self.pool is not None
        self.pool.child_ready(child)

    def child_full(self, child: Child) -> None:
        """A child was given its last call."""
        assert self.pool is not None
        self.pool.child_full(child)

    def child_drained(self, child: Child) -> None:
        """A child has finished its last call."""
        assert self.pool is not None
        self.pool.child_drained(child)

    def child_broken(self, child: Child, reason: str) -> None:
        """A child does not make sense any more."""
        assert self.pool is not None
        logger.critical("%s; it is killed", reason)
        self.pool.child_broken(child, reason)

    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """A call ran past its hard limit: have the child write its stacks, then kill it."""
        assert self.pool is not None
        self._log.hard_limit(name, task_id, limit)
        self.pool.dump_stack(child)
        self._loop.call_later(DUMP_S, self.pool.kill_child, child)

    def child_lost(self, pid: int, reason: str) -> None:
        """A child ended that nobody had asked to."""
        logger.error("Process %r pid:%d exited with %r", "ForkPoolWorker", pid, reason)
