"""Every error that fastq raises on purpose, as one tree. No behaviour beyond messages and fields.

FastqError
├── SettingsError            a setting, option or URL is wrong: fix it and start again
├── ConnectionLost           the broker or store went away: safe to try again
├── RemoteProtocolError      the peer broke its protocol
│   └── RedisError           Redis answered a command with an error
├── LocalProtocolError       fastq broke the protocol: a bug here
├── PoolLost                 the worker's processes are gone or hang: start it again
├── PublishError             a message was not confirmed by the broker
├── EncodeError              a value has no form in the chosen serializer
├── DecodeError              bytes are not what their content type says
│   ├── ContentDisallowed    the content type is not in accept_content
│   └── EncodingDisallowed   the content encoding is none that text is read in
├── ResultTimeout            get(timeout=...) ran out of time (also a TimeoutError)
├── ResultsDisabled          the application has no result backend
├── TaskError                how a task can end without a return value
│   ├── NotRegistered        no task of that name in this application
│   ├── MaxRetriesExceeded   retry() was called once too often
│   ├── SoftTimeLimitExceeded  raised inside the task
│   ├── TimeLimitExceeded    the child was killed at the hard limit
│   ├── WorkerLostError      the child died while it ran the task
│   ├── TaskRevoked          the task was revoked or had expired before it ran
│   └── RemoteError          an exception class that this process cannot rebuild
└── ControlFlow              raised by task code to tell the worker what to do; never logged as an error
    ├── Retry                run again later
    ├── Ignore               store nothing
    └── Reject               give the message back to the broker

CallEnded, a SystemExit: raised in a call that the worker ends before its time; no handler of users' is to catch it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class FastqError(Exception):
    """Base of every error in this module."""


class CallEnded(SystemExit):
    """Raised in a call that is to end now: past its hard limit, revoked, or because the worker stops at once."""


class SettingsError(FastqError):
    """A setting, option or URL is wrong; the text names it, its value and the remedy."""


class ConnectionLost(FastqError):
    """The connection to a broker or store ended; trying again is safe.

    ``timed_out``: we ended it, as nothing was heard in time; what was sent on it may still be carried out.
    """

    timed_out = False


class RemoteProtocolError(FastqError):
    """The peer sent bytes that its protocol does not allow."""


class RedisError(RemoteProtocolError):
    """Redis answered a command with an error; the text is Redis's own and begins with its code, as in ``WRONGTYPE``."""

    @property
    def code(self) -> str:
        """The first word: ``ERR``, ``NOSCRIPT``, ``OOM``…"""
        return str(self).partition(" ")[0]


class LocalProtocolError(FastqError):
    """fastq itself broke a protocol rule."""


class PoolLost(FastqError):
    """A worker cannot go on, as the process that forks its children has ended or hangs."""


class PublishError(FastqError):
    """The broker did not confirm a message; it may or may not have been stored.

    ``again``: the messages of the batch that are to be sent again, as they were refused or their connection was lost:
    None for all of them, empty after a time-out, as what was sent may still arrive.
    """

    def __init__(self, *args: object, again: Sequence[object] | None = None) -> None:
        super().__init__(*args)
        self.again = again


class EncodeError(FastqError):
    """A value cannot be written by the chosen serializer."""


class DecodeError(FastqError):
    """Bytes cannot be read as the content type they claim."""


class ContentDisallowed(DecodeError):
    """The content type is not listed in ``accept_content``."""


class EncodingDisallowed(DecodeError):
    """The content encoding is not one of the charsets that message bodies are written in."""


class ResultTimeout(FastqError, TimeoutError):
    """No result arrived within the time given."""


class ResultsDisabled(FastqError):
    """A result was asked of an application that stores none."""


class TaskError(FastqError):
    """Base of the ways a task can end without a return value."""


class NotRegistered(TaskError, KeyError):
    """No task of that name is registered; ``args[0]`` is the name."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MaxRetriesExceeded(TaskError):
    """``retry()`` was called more often than ``max_retries`` allows."""


class SoftTimeLimitExceeded(TaskError):
    """Raised inside a task when its soft time limit has passed."""


class TimeLimitExceeded(TaskError):
    """The task ran past its hard time limit and its process was killed; ``args[0]`` is the limit in seconds."""


class WorkerLostError(TaskError):
    """The process that ran the task died."""


class TaskRevoked(TaskError):
    """The task was revoked, or had expired, before it ran."""


class RemoteError(TaskError):
    """An exception raised by the task whose class this process cannot rebuild."""


class ControlFlow(FastqError):
    """Base of what task code raises to steer the worker."""


class Retry(ControlFlow):
    """The task is to run again; ``exc`` is the reason, ``when`` the unix time of the next run, ``message`` a text."""

    def __init__(self, exc: BaseException | None = None, when: float | None = None, message: str = "") -> None:
        super().__init__(exc, when)
        self.exc = exc
        self.when = when
        self.message = message

    def __str__(self) -> str:
        return self.message or super().__str__()


class Ignore(ControlFlow):
    """End the task now; no state is stored and the message is acknowledged."""


class Reject(ControlFlow):
    """Give the message back: to the queue when ``requeue``, else to its dead letters."""

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        super().__init__(reason, requeue)
        self.reason = reason
        self.requeue = requeue
