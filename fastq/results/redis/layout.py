"""How results lie in Redis, for whoever writes or reads them: keys, channels, lifetimes, and the commands to store one.

Knows no connection, and of a stored state only where it begins. Source: Celery 5.7's Redis backend, which reads what
is written by these commands and writes what they keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastq.brokers.redis.login import Command
from fastq.states import FAILURE, SUCCESS

if TYPE_CHECKING:
    from fastq.settings import Settings

PREFIX: Final = "celery-task-meta-"

# Celery never replaces a SUCCESS, and looks before it writes; the look is done here, where the state lies. Whatever the
# serializer, Celery writes the status first (YAML: in a line of its own). What is compressed the caller has to judge.
_STORE_UNLESS_SUCCEEDED: Final = b"""
local head = redis.call('GETRANGE', KEYS[1], 0, 99)
if string.match(head, 'status[^%w_]+([%w_]+)') == 'SUCCESS' then return 0 end
if string.sub(head, 1, 1) == '\\0' then return redis.call('GET', KEYS[1]) end
if string.match(head, '^%a+:') and string.find(redis.call('GET', KEYS[1]), '\\nstatus: SUCCESS\\n', 1, true) then
    return 0
end
if tonumber(ARGV[2]) > 0 then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
else
    redis.call('SET', KEYS[1], ARGV[1])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"""


class ResultLayout:
    """Where an application's results are in Redis. ``options`` are its result_backend_transport_options."""

    def __init__(self, settings: Settings) -> None:
        prefix = str(settings.result_backend_transport_options.get("global_keyprefix") or "")
        if prefix and prefix[-1] not in ":_-.":
            prefix += "_"
        self.prefix = prefix + PREFIX
        self._prefix_bytes = self.prefix.encode()
        failure_expires = settings.result_failure_expires
        self.expires = int(settings.result_expires or 0)
        self.failure_expires = self.expires if failure_expires is None else int(failure_expires)

    def key(self, task_id: str) -> bytes:
        """Return the key of a task's state, which is also the channel where it is announced."""
        return self._prefix_bytes + task_id.encode("utf-8", "surrogatepass")

    def task_id(self, key: bytes) -> str:
        """Return the task that a key or channel belongs to."""
        text = key[len(self._prefix_bytes) :]
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return text.decode("utf-8", "replace")

    def store(self, task_id: str, state: str, payload: bytes) -> list[Command]:
        """Return the commands that store a state and announce it: two for SUCCESS, one for what must not replace one.

        That one replies with 1; with 0 when a SUCCESS was there and has been kept; with a compressed state when one was
        there and nothing was done: ``replace`` stores over it, if it is no SUCCESS.
        """
        if state == SUCCESS:
            return self.replace(task_id, state, payload)
        expires = self.failure_expires if state == FAILURE else self.expires
        return [("EVAL", _STORE_UNLESS_SUCCEEDED, 1, self.key(task_id), payload, expires)]

    def replace(self, task_id: str, state: str, payload: bytes) -> list[Command]:
        """Return the commands that store a state whatever was there, and announce it."""
        key = self.key(task_id)
        expires = self.failure_expires if state == FAILURE else self.expires
        if expires > 0:
            return [("SET", key, payload, "EX", expires), ("PUBLISH", key, payload)]
        return [("SET", key, payload), ("PUBLISH", key, payload)]
