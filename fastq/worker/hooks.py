"""What the message loop calls Python for: refusals, failures recorded by the main process, and the life of children.

Nothing here runs for a task that simply succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastq._child import Child
from fastq._core import Core
from fastq.codecs.meta import encode_meta
from fastq.errors import ContentDisallowed, DecodeError, NotRegistered, TaskRevoked, TimeLimitExceeded, WorkerLostError
from fastq.guard import guarded
from fastq.interfaces import CallHooks
from fastq.link import Delivery
from fastq.pool import Pool
from fastq.printable import Lines
from fastq.running.messages import TaskLog
from fastq.states import FAILURE, REVOKED
from fastq.wire.head import scan
from fastq.wire.properties import readable_properties
from fastq.worker.remote.events import Events
from fastq.worker.remote.revoked import Revoked

logger = logging.getLogger("fastq.worker")

#: Kinds of failure that are no fault of the task: its time had passed, or somebody took it back.
REVOCATIONS = frozenset({"expired", "revoked", "terminated"})

#: Classes of messages that are sound, but not taken by this worker.
NOT_ACCEPTED = frozenset({"content-type", "follow-ups", "signature"})

#: What is wrong with a refused message, by the class it is counted under, where the class alone does not say it.
REFUSALS: Mapping[str, str] = {
    "args": "its arguments are not a list",
    "body-shape": "its body is not [args, kwargs, embed]",
    "compression": "its body cannot be decompressed within the bounds",
    "content-encoding": "its content encoding is not one of the charsets that are read",
    "content-type": "its content type is not in the worker's accept_content",
    "embed": "the third part of its body is not a mapping",
    "empty-body": "its body is empty",
    "follow-ups": "it asks for callbacks, a chain or a chord, which this application does not carry out",
    "json": "its body is no JSON, or nested too deeply",
    "kwargs": "its keyword arguments are not a mapping with names as keys",
    "no-task": "it names no task",
    "oversized": "it is larger than fastq_max_message_bytes",
    "signature": "its signature does not hold",
}

#: Time for a child to write its stacks before it is killed at its hard limit.
DUMP_S = 0.1

#: Time for a task that is terminated to clean up; after that its process is killed.
TERMINATE_S = 5.0

#: Lost results are counted in a line so often, not one by one.
LOST_RESULTS_EVERY_S = 10.0


@guarded(CallHooks, failure=(FAILURE, None))
class Hooks:
    """Answers the core about calls and passes on what happens (the protocol is ``interfaces.CallHooks``)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, logger: logging.Logger = logger) -> None:
        self._loop = loop
        self._log = TaskLog(logger)
        self._logs_received = logger.isEnabledFor(logging.INFO)
        self.pool: Pool
        self.core: Core
        self.events: Events | None = None
        self._answers: set[asyncio.Future[None]] = set()
        self._lost_results = 0
        self._lost_results_logged_at = -LOST_RESULTS_EVERY_S
        self._revoked: Revoked | None = None
        self._sends: Events | None = None  # the same while task events are on

    def attach(self, core: Core, pool: Pool, save_reply: Callable[[str, bytes], Coroutine[Any, Any, None]]) -> None:
        """Belong to this message loop and pool. ``save_reply`` sends a result, by task id, to who gave no address."""
        self.core, self.pool, self._save_reply = core, pool, save_reply
        self.refresh()

    def watch(self, revoked: Revoked, events: Events | None) -> None:
        """Look out for revoked stamps, and pass on to monitors what happens."""
        self._revoked, self.events = revoked, events
        self.refresh()

    def refresh(self) -> None:
        """Say what the message loop is to report, as somebody's wishes have changed."""
        has_events = self.events is not None and self.events.enabled
        self.core.wants_outcomes = has_events
        self.core.wants_received = has_events or self.wants_received
        self._sends = self.events if has_events else None

    @property
    def wants_received(self) -> bool:
        """Return whether each delivery is to be reported for the log's sake or to look for revoked stamps."""
        return self._logs_received or bool(self._revoked and self._revoked.stamps)

    def close(self) -> None:
        """Finish what is going on; nothing is asked or reported after this."""

    # --- messages

    def received(self, name: str, task_id: str, delivery: Delivery) -> bool:
        """A task message was admitted (called only when somebody wants to know).

        Return True to keep it waiting until ``core.proceed`` is called.
        """
        if self._logs_received:
            headers = readable_properties(delivery.describe()["props"]).get("headers") or {}
            self._log.received(name, task_id, *(str(headers.get(key) or "") for key in ("argsrepr", "kwargsrepr")))
        self.look_for_stamps(task_id, delivery)
        # Of a revoked task monitors hear that alone.
        if self._sends is not None and not (self._revoked and task_id in self._revoked):
            found = delivery.describe()
            self._sends.received(found["props"], found["body"], name, task_id)
        return False

    def look_for_stamps(self, task_id: str, delivery: Delivery) -> None:
        """Revoke a message if one of its stamps is revoked."""
        if self._revoked is None or not self._revoked.stamps:
            return
        if self._revoked.see(task_id, delivery.describe()["props"]) and self.core.revoked is None:
            self.core.revoked = self._revoked

    def handed(self, delivery: Delivery) -> None:
        """A message of a task whose messages are handed over is here: ``core.judge`` when it is done (the bridge's)."""

    def accepted(self, delivery: Delivery, pid: int) -> None:
        """A call that the main process has made has started (the bridge's)."""

    def reported(self, delivery: Delivery, state: str, report: bytes | None) -> None:
        """A child's outcome is for the main process: ``core.recorded`` when it is dealt with (the bridge's)."""

    def started(self, task_id: str, pid: int) -> None:
        """A call has started (called only when somebody wants to know)."""
        if self._sends is not None:
            self._sends.started(task_id, pid)

    def finished(self, name: str, task_id: str, state: str, report: str | None, runtime_s: float) -> None:
        """A call has ended (called only when somebody wants to know)."""
        if self._sends is not None:
            self._sends.finished(task_id, name, state, report, runtime_s)

    def foreign(self, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
        """Return properties and body of a message of an older form, in today's; None when it is none."""
        return None

    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None:
        """A message was rejected because it is not a task message, or none that this worker takes."""
        found = scan(props)
        logger.error(
            "Rejected %s message: class=%s queue=%s task=%.100r id=%.100r headers=%d bytes body=%d bytes%s",
            "malformed" if reason not in NOT_ACCEPTED else "unaccepted",
            reason,
            queue.decode("utf-8", "replace"),
            found["task"],
            found["id"],
            len(props),
            len(body),
            _remedy(reason, props),
        )

    def failure(
        self, kind: str, name: str, task_id: str, detail: Any, delivery: Delivery
    ) -> tuple[str, bytes | None] | None:
        """Return the state and the encoded result of a delivery that no child can end, and log it.

        None: it is recorded elsewhere, and ``core.recorded`` called when that is done.
        """
        state, error = self.failure_of(kind, name, task_id, detail)
        if self._sends is not None and state == REVOKED:
            signum = detail if kind == "terminated" else None
            self._sends.revoked(task_id, kind == "terminated", signum, kind == "expired")
        elif self._sends is not None:
            self._sends.failed(task_id, repr(error))
        return state, encode_meta(task_id, state, error)

    def failure_of(self, kind: str, name: str, task_id: str, detail: Any) -> tuple[str, Exception]:
        """Return the state and the error that a kind of failure means, and log it."""
        error: Exception
        if kind in REVOCATIONS:
            self.log_revoked(name, task_id)
            return REVOKED, TaskRevoked(kind)
        if kind == "unknown":
            self._log.unregistered(name, task_id)
            error = NotRegistered(name)
        elif kind == "refused":  # ``refused`` has logged it
            error = (ContentDisallowed if detail[0] == "content-type" else DecodeError)(refusal(*detail))
        elif kind == "time-limit":
            error = TimeLimitExceeded(detail)
        elif kind == "deliveries":
            error = WorkerLostError(f"delivered {detail} times without an end; not run again")
            logger.error("Task %s[%s] was %s", name, task_id, error)
        else:
            error = WorkerLostError(f"Worker exited prematurely: {detail}")
            logger.error("Task %s[%s] raised unexpected: %r", name, task_id, error)
        return FAILURE, error

    def log_revoked(self, name: str, task_id: str) -> None:
        """Log that a task does not run, and why if it was for a stamp."""
        self._log.revoked(name, task_id, self._revoked.stamp_of.get(task_id) if self._revoked is not None else None)

    def unaddressed(self, task_id: str, meta: bytes, delivery: Delivery) -> None:
        """A result is to reach a sender who gave no address; ``core.confirmed`` when that was tried."""
        work = asyncio.ensure_future(self._save_reply(task_id, meta))
        self._answers.add(work)
        work.add_done_callback(lambda _: self._answered(work, delivery))

    def _answered(self, work: asyncio.Future[None], delivery: Delivery) -> None:
        self._answers.discard(work)
        if not work.cancelled() and (error := work.exception()) is not None:
            logger.warning("a result could not be sent: %s", error)
        self.core.confirmed(delivery)

    def unsendable(self, task_id: str, queue: str, reason: str) -> None:
        """A result or a message of a task has no form that the broker takes."""
        logger.error("A message of task %s to %r could not be sent: %s", task_id or "?", queue, reason)

    def unconfirmed(self, name: str, task_id: str) -> None:
        """A message that a task sent was refused by the broker: the task runs again."""
        logger.error("A message sent by task %s[%s] reached no queue; the task will run again", name, task_id)

    def result_lost(self, name: str, task_id: str) -> None:
        """A result can be neither stored nor kept, as too many wait for the store already."""
        self._lost_results += 1
        now = self._loop.time()
        if now - self._lost_results_logged_at >= LOST_RESULTS_EVERY_S:
            self._lost_results_logged_at = now
            logger.error(
                "64 MiB of results wait for their store; those of further tasks are lost: %s so far, the last one of "
                "%s[%s]",
                self._lost_results,
                name,
                task_id,
            )

    def cancelled(self, name: str, task_id: str, delivery: Delivery) -> None:
        """A call was ended because its connection is gone: the broker gives it out again."""
        logger.warning("Task %s[%s] was ended, as the connection that brought it is gone; it runs again", name, task_id)

    # --- the processes of calls

    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """A call ran past its hard limit: have the child write its stacks, then kill it."""
        self._log.hard_limit(name, task_id, limit)
        self.kill_with_stacks(child, name, task_id)

    def kill_with_stacks(self, child: Child, name: str, task_id: str) -> None:
        """Log where a child is, and kill it."""
        self.pool.dump_stack(child)
        self._loop.call_later(DUMP_S, self._kill_dumped, child, name, task_id)

    def _kill_dumped(self, child: Child, name: str, task_id: str) -> None:
        if stacks := self.pool.stacks(child):
            logger.warning(
                "Stacks of the process that task %s[%s] did not leave in time:\n%s", name, task_id, Lines(stacks)
            )
        self.pool.kill_child(child)

    def terminate(self, child: Child, signum: int) -> None:
        """The call that a child runs was revoked: send its process the signal, and make sure that it ends."""
        # A child ignores INT, so that the programs it starts do; the call is to end all the same.
        self.pool.terminate(child, signal.SIGTERM if signum == signal.SIGINT else signum)
        self._loop.call_later(TERMINATE_S, self.pool.kill_child, child)

    def overdue(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """One of several calls of a child ran past its hard limit: the message loop tells it to end."""
        self._log.hard_limit(name, task_id, limit)

    def hopeless(self, child: Child, why: str) -> None:
        """Kill a child with all its calls: have it write its stacks first."""
        self.pool.dump_stack(child)
        self._loop.call_later(DUMP_S, self._kill_hopeless, child, why)

    def _kill_hopeless(self, child: Child, why: str) -> None:
        self._show_stacks(child, f"pid:{child.pid} is killed: {why}")
        self.pool.kill_child(child)

    def stalled(self, child: Child, seconds: float) -> None:
        """Log where the loop of a child stands still: what does not await keeps all its calls waiting."""
        self.pool.dump_stack(child)
        text = f"the event loop of pid:{child.pid} has taken no turn for {seconds:.1f} s, and its calls wait"
        self._loop.call_later(DUMP_S, self._show_stacks, child, text)

    def _show_stacks(self, child: Child, why: str) -> None:
        logger.warning("%s. Its stacks:\n%s", why, Lines(self.pool.stacks(child) or "none were written"))

    def child_lost(self, title: str, reason: str) -> None:
        """A child ended that nobody had asked to."""
        logger.error("%s exited with %r", title, reason)


def refusal(reason: str, detail: str) -> str:
    """Return what the sender of a refused message is told: its class and what is wrong with it."""
    text = REFUSALS.get(reason, f"its {reason} cannot be read")
    return f"the worker refused the message (class={reason}): {text}" + (f": {detail}" if detail else "")


def _remedy(reason: str, props: bytes) -> str:
    """Return what is to be done about a message that is sound but not taken; nothing for the others."""
    if reason == "follow-ups":
        return (
            ". A FastQ application runs no callbacks, chains or chords: have the task send what comes next, "
            "or send the call to a worker of a Celery application"
        )
    if reason != "content-type":
        return ""
    content_type = readable_properties(props).get("content_type")
    return (
        f". Content type {content_type!r:.100} is not accepted: if all who can send are trusted, "
        "list its serializer in accept_content"
    )
