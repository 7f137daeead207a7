"""How a call of a Celery application ended, as the main process reads it: outcome, result, what monitors are told."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from typing import Any, Final

from billiard import util
from billiard.einfo import ExceptionInfo
from billiard.pool import MaybeEncodingError
from celery.exceptions import Reject
from celery.utils.saferepr import saferepr

from fastq.codecs.json import encode as encode_json
from fastq.running.birth import MemoryLimit
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, SUCCESS
from fastq.wire.call import Call
from fastq.wire.pipe import (
    FLAG_FOR_HOOKS,
    OUTCOME_FAILURE,
    OUTCOME_IGNORED,
    OUTCOME_REJECTED,
    OUTCOME_REQUEUE,
    OUTCOME_RETRY,
    OUTCOME_SUCCESS,
    ChildPipe,
)

_OUTCOMES: Final = {
    SUCCESS: OUTCOME_SUCCESS,
    FAILURE: OUTCOME_FAILURE,
    RETRY: OUTCOME_RETRY,
    IGNORED: OUTCOME_IGNORED,
    REJECTED: OUTCOME_REJECTED,
}

#: What monitors are told of a message that is put back into its queue.
REQUEUED: Final[Mapping[str, Any]] = {"requeue": True}


class Ends:
    """Reports how calls ended on the pipe. ``replies``: results are replies by ``rpc://``."""

    def __init__(self, replies: bool, max_memory_kib: int) -> None:
        self.pipe: ChildPipe  # set in the process that runs the calls
        self.replies = replies
        self._memory = MemoryLimit(max_memory_kib, _warn_of_memory)

    def finish(self, call: Call, state: str, meta: bytes | None, report: Any, requeues: bool) -> None:
        """Report the end of a call: ``meta`` is the result for the main process to store, ``report`` for monitors."""
        outcome = _OUTCOMES.get(state, OUTCOME_FAILURE)
        if outcome == OUTCOME_REJECTED and requeues:
            outcome = OUTCOME_REQUEUE
        elif outcome == OUTCOME_REJECTED:
            # It never runs again, and that is a failure to who waits: Celery's code in the main process records it.
            flags = self._memory.flag() | FLAG_FOR_HOOKS
            self.pipe.finish(call, OUTCOME_REJECTED, _pickled_rejection(report), None, flags)
            return
        text = encode_json(report).decode() if call.wants_report and report is not None else None
        self.pipe.finish(call, outcome, meta, text, self._memory.flag())

    def finish_own(self, call: Call, ok: bool, value: Any, is_late: bool) -> None:
        """Report the end of a call of the main process; ``is_late``: it was past its soft time limit."""
        outcome = OUTCOME_SUCCESS if ok else OUTCOME_FAILURE
        flags = self._memory.flag() | FLAG_FOR_HOOKS
        self.pipe.finish(call, outcome, _pickled_end(ok, value, is_late), None, flags)

    def unaddressed_meta(
        self, call: Call, task: Any, fields: dict[str, Any], state: str, value: Any, traceback: str | None
    ) -> bytes | None:
        """Return the result of a call whose sender gave no address for replies; the main process has a place for it."""
        if not self.replies or not call.wants_result or fields.get("reply_to") or state not in (SUCCESS, FAILURE):
            return None
        backend = task.backend
        result = backend.encode_result(value, state)
        meta = {"task_id": call.id, "status": state, "result": result, "traceback": traceback, "children": []}
        return encoded_by(backend, meta)


def encoded_by(backend: Any, meta: Mapping[str, Any]) -> bytes:
    """Return a result in the store's own form."""
    encoded = backend.encode(meta)
    return encoded if isinstance(encoded, bytes) else encoded.encode()


def exception_report(error: Any, traceback: Any) -> dict[str, Any]:
    """Return what monitors are told of an exception."""
    return {"exception": saferepr(error), "traceback": str(traceback or "")}


def _pickled_end(ok: bool, value: Any, is_late: bool) -> bytes:
    """Return the end of a call for the main process: a value that cannot be sent is an error, as with Celery's pool."""
    try:
        return pickle.dumps((ok, value, is_late))
    except Exception as error:  # whatever the value's own code raises
        try:
            raise MaybeEncodingError(error, value) from None
        except MaybeEncodingError:
            return pickle.dumps((False, ExceptionInfo(), is_late))


def _pickled_rejection(info: ExceptionInfo) -> bytes:
    try:
        return pickle.dumps(info)
    except Exception:  # a reason that cannot be sent
        try:
            raise Reject(saferepr(info.exception)) from None
        except Reject:
            return pickle.dumps(ExceptionInfo())


def _warn_of_memory(text: str) -> None:
    """Log it for everybody, and where billiard does, which Celery mostly keeps silent."""
    logging.getLogger("celery.worker").warning(text)
    util.warning(text)
