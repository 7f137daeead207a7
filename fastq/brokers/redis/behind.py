"""Publishing to Redis with the reply collected behind the caller's back: ``confirm_publish="behind"``.

A publish returns once the message is with the kernel. Each command is kept until Redis has answered it, and sent again
on a new connection when the old one is lost, not when the server is slow to answer or to read, so a crash of the server
or of the connection loses no message (but may store one twice); only a crash of this process in that moment can. What
Redis refuses is logged, as nobody waits for it any more.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.limits import check_sizes
from fastq.brokers.redis import login
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.commands import push_command
from fastq.brokers.redis.publisher import RedisPublisher
from fastq.brokers.watcher import LOOK_EVERY_S, Watcher
from fastq.errors import ConnectionLost, FastqError, PublishError, RedisError
from fastq.net import forks

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

logger = logging.getLogger("fastq.transport.redis_behind")

WINDOW: Final = 512  # chosen: commands under way before the oldest are waited for; their replies fit any socket buffer
COLLECT_EVERY: Final = 64  # chosen: commands between two looks at what has been answered


class Backlog:
    """Commands on their way over one connection, each kept until it is answered. Thread-safe and fork-aware.

    ``timeout_s`` bounds how long is waited for room.
    """

    def __init__(self, redis: BlockingRedis, timeout_s: float) -> None:
        self._redis = redis
        self._timeout_s = timeout_s
        #: (task id, packed command), in the order of sending; b"" for one whose sender was told that it may be lost.
        self._unanswered: deque[tuple[str, bytes]] = deque()
        self._unsent = b""  # what the socket has not taken yet
        self._uncollected = 0
        self._heard_at = 0.0
        self._warned_at = 0.0
        self._lock = threading.Lock()
        self._watcher = Watcher(self._look, "fastq-replies")
        _BACKLOGS.add(self)
        forks.register(self)

    def put(self, entries: Sequence[tuple[str, bytes]], deadline: float | None = None) -> None:
        """Write packed commands, each with the id of its task. Raises ConnectionLost when there is no server.

        PublishError when there is no room in time, and when the socket does not take all: then they may still arrive.
        """
        with self._lock:
            self._uncollected += len(entries)
            if self._uncollected >= COLLECT_EVERY:
                self._collect()
            if self._unsent or len(self._unanswered) >= WINDOW:
                self._make_room(deadline)
            if not self._unanswered:
                self._heard_at = time.monotonic()
            before = len(self._unanswered)
            self._unanswered.extend(entries)
            try:
                self._write(entries)
            except FastqError:
                # The caller hears of these: they are its own to send again.
                while len(self._unanswered) > before:
                    self._unanswered.pop()
                raise
            finally:
                if not self._watcher.is_awake:
                    self._watcher.wake()
            if self._unsent:
                # Answers come in order, so their places stay.
                for place in range(before, len(self._unanswered)):
                    self._unanswered[place] = (self._unanswered[place][0], b"")
                raise PublishError(
                    f"Redis at {self._redis.url} has not taken {len(entries)} message(s) within {self._timeout_s:g} s "
                    "(fastq_publish_timeout); they may still be stored",
                    again=(),
                )

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until everything is answered and return how many commands are not, 0 when all is well."""
        with self._lock:
            self._settle(0, self._timeout_s if timeout_s is None else timeout_s)
            return len(self._unanswered)

    def close(self) -> None:
        """Wait for the replies, at most ``timeout_s``, and close the connection."""
        if left := self.flush():
            ids = ", ".join(task_id for task_id, _ in list(self._unanswered)[:5])
            logger.error("closed with %d message(s) that Redis at %s has not taken: %s", left, self._redis.url, ids)
        with self._lock:
            self._redis.close()

    def close_at_exit(self) -> None:
        """Close unless a thread is still publishing."""
        if self._lock.acquire(timeout=0.2):
            self._lock.release()
            self.close()

    def after_fork(self) -> None:
        """In a forked child: the parent keeps what it has sent."""
        self._lock = threading.Lock()
        self._unanswered = deque()
        self._unsent = b""
        self._uncollected = 0
        self._watcher.after_fork()

    # --- with the lock held

    def _make_room(self, deadline: float | None) -> None:
        """Wait for room behind what is under way. Raises PublishError: nothing of the new messages was sent."""
        wait_s = self._timeout_s if deadline is None else min(self._timeout_s, deadline - time.monotonic())
        self._settle(WINDOW // 2, wait_s)
        if self._unsent or len(self._unanswered) >= WINDOW:
            raise PublishError(
                f"not published: Redis at {self._redis.url} has not answered {len(self._unanswered)} message(s) that "
                f"were sent before, for {max(0.0, wait_s):.3g} s; those may still be stored"
            )

    def _write(self, entries: Sequence[tuple[str, bytes]]) -> None:
        if not self._redis.is_open:
            self._send_again()
            return
        try:
            self._unsent = self._redis.send(
                entries[0][1] if len(entries) == 1 else b"".join([command for _, command in entries])
            )
        except ConnectionLost as error:
            logger.warning("%s; what is not answered is sent again", error)
            self._send_again()

    def _send_again(self) -> None:
        """Open a connection and send everything that is not answered."""
        self._redis.open()
        self._unanswered = deque(entry for entry in self._unanswered if entry[1])
        self._unsent = self._redis.send(b"".join([command for _, command in self._unanswered]))
        self._heard_at = time.monotonic()

    def _collect(self, wait_s: float = 0.0) -> None:
        """Take the replies that have come, waiting at most so long for the first."""
        self._uncollected = 0
        if not self._redis.is_open:
            return
        try:
            replies = self._redis.replies(wait_s)
            for reply in replies:
                if type(reply) is not int or not self._unanswered:
                    self._take_odd(reply)
                self._unanswered.popleft()
            if replies:
                self._heard_at = time.monotonic()
        except FastqError as error:
            logger.warning("%s; what is not answered is sent again", error)

    def _take_odd(self, reply: Any) -> None:
        """Take a reply that is no length of a list. Raises ConnectionLost for one that ends the connection."""
        if not isinstance(reply, RedisError) or not self._unanswered:
            self._redis.expect(reply, int if self._unanswered else ())
        elif login.is_away(reply):
            self._redis.close()
            raise login.went_away(self._redis.url, reply)
        else:
            logger.error("Redis at %s refused task %s: %s", self._redis.url, self._unanswered[0][0], reply)

    def _settle(self, left: int, timeout_s: float) -> None:
        """Wait until at most ``left`` commands are unanswered, through reconnects, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while (self._unsent or len(self._unanswered) > left) and (left_s := deadline - time.monotonic()) > 0:
            if self._mend():
                self._collect(min(left_s, LOOK_EVERY_S))
            else:
                time.sleep(min(left_s, LOOK_EVERY_S))

    def _mend(self) -> bool:
        """Whether there is a connection with everything on its way; makes one where the old one is lost."""
        if self._redis.is_open:
            if self._unsent and not self._send_rest():
                return False
            now = time.monotonic()
            if now - max(self._heard_at, self._warned_at) > self._timeout_s:
                # Only slow: what it has would be stored twice. A peer that is gone is found by TCP.
                self._warned_at, silence_s = now, now - self._heard_at
                logger.warning(
                    "Redis has not answered %d command(s) for %.0f s; still waiting", len(self._unanswered), silence_s
                )
            return True
        try:
            self._send_again()
        except FastqError as error:
            logger.warning("%d message(s) wait for a connection: %s", len(self._unanswered), error)
            return False
        return True

    def _send_rest(self) -> bool:
        """Write what the socket has not taken yet; whether the connection is still there."""
        try:
            self._unsent = self._redis.send(self._unsent)
        except ConnectionLost as error:
            logger.warning("%s; what is not answered is sent again", error)
            return False
        return True

    def _look(self) -> bool:
        with self._lock:
            self._collect()
            if self._unanswered:
                self._mend()
            return bool(self._unanswered)


class RedisBehindPublisher(RedisPublisher):
    """A RedisPublisher that does not wait for replies but for room: at most WINDOW messages are unanswered."""

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(url, settings)
        self._backlog = Backlog(self._redis_of(settings), settings.fastq_publish_timeout)

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the messages are on their way; errors of the connection are raised, later ones are logged."""
        check_sizes(messages, self._max_message_bytes)
        entries = []
        for message in messages:
            if message.exchange:
                # Where exchanges lead to is asked for; and what was sent before must not come behind.
                self.flush()
                super().publish(messages, deadline)
                return
            entries.append((message.id, push_command(self._layout, message)))
        self._backlog.put(entries, deadline)

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until everything is answered and return how many messages are not, 0 when all is well."""
        return self._backlog.flush(timeout_s)

    def close(self) -> None:
        """Wait for the replies, at most ``fastq_publish_timeout``, and close the connections."""
        self._backlog.close()
        super().close()


_BACKLOGS: weakref.WeakSet[Backlog] = weakref.WeakSet()


def _close_at_exit() -> None:
    for backlog in list(_BACKLOGS):
        backlog.close_at_exit()


atexit.register(_close_at_exit)
