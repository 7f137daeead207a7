"""What a worker's message loop takes from Redis and gives back: claims, verdicts, and messages to send.

The connection and which lists are looked at are the consumer's, the lease that messages are held under is ``lease``'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.redis import scripts
from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.commands import (
    fanout_command,
    push_command,
    refused,
    routed,
)
from fastq.brokers.redis.digests import run_script
from fastq.brokers.redis.jobs import RETRY_S, Jobs
from fastq.brokers.redis.layout import Layout
from fastq.brokers.redis.login import PASSING_CODES
from fastq.brokers.redis.order import QueueOrder
from fastq.brokers.redis.records import end_of_record
from fastq.brokers.redis.replies import CLAIM_BYTES, longest_envelope
from fastq.brokers.redis.unacked import FIELDS, POSTPONED, Unacked
from fastq.errors import EncodeError, PublishError, RedisError
from fastq.link import ACK, REJECT, REQUEUE, RETURN, BatchSource
from fastq.wire.head import scan
from fastq.wire.kombu import decode_claim
from fastq.wire.message import Message

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Lease
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.redis_source")

SAMPLE_BYTES: Final = 4096  # of a message that is too long to be taken, to be logged
MAX_CLAIM: Final = 1 << 31
RECHECK_S: Final = 0.01  # chosen: with worker_disable_prefetch busy children are looked at so often
ASK_AGAIN_S: Final = 0.1  # chosen: an application's own order that leaves queues out is asked so often
FANOUT_TAG: Final = 1 << 62  # what pub/sub brings is not in Redis any more: its tags are beyond all others


class RedisSource(BatchSource):
    """The hot half: claims, verdicts and follow-ups as single calls per batch. Runs on the loop's thread."""

    def __init__(
        self,
        redis: AsyncRedis,
        layout: Layout,
        settings: Settings,
        core: Core | None,
        unacked: Unacked,
        lease: Lease,
        jobs: Jobs,
        *,
        fanouts: Container[str],
        await_messages: Callable[[], None],
    ) -> None:
        super().__init__()
        self.owner = lease.owner
        self.unacked = unacked
        self._redis = redis
        self._layout = layout
        self._core = core
        self._lease = lease
        self._jobs = jobs
        self._fanouts = fanouts
        self._await_messages = await_messages
        self._keeps_dead_letters = settings.fastq_reliable
        self._takes_when_free = settings.worker_disable_prefetch
        self._recheck: asyncio.TimerHandle | None = None
        self._longest = longest_envelope(settings.fastq_max_message_bytes)
        self._order = QueueOrder(layout.queue_order)
        self._names: list[bytes] = []
        self._lists: list[str] = []
        self._ends: list[bytes] = []
        self._held: set[int] = set()
        self._arriving: Iterator[tuple[Any, ...]] = iter(())
        self._prefetch = 0
        self.postpone = self._postponed
        self._next_tag = 1
        self._next_fanout = FANOUT_TAG
        self._limit = 0
        self._taken = 0
        self._is_claiming = False
        self._is_drained = False
        self._returning = 0
        self._doubtful_verdicts: list[tuple[int, int]] = []
        self._doubtful_messages: list[tuple[int, Message]] = []

    @property
    def queues(self) -> list[str]:
        """The queues that are received from."""
        return list(self._order.queues)

    @property
    def lists(self) -> list[str]:
        """All their lists."""
        return list(self._lists)

    @property
    def is_claiming(self) -> bool:
        """Whether messages may be on their way here."""
        return self._is_claiming

    def hold(self, prefetch: int) -> None:
        """Hold at most so many unsettled messages, not counting what waits for its time."""
        self._prefetch = prefetch
        self.window = prefetch + self._scheduled

    def receive_from(self, queues: Sequence[str]) -> None:
        """Receive from these queues from the next claim on."""
        self._order.update(queues)
        # New lists, as a claim that is under way still means the old ones.
        self._names, self._ends, self._lists = self._places_of(self._order.queues)
        self.wake()

    def _places_of(self, queues: Sequence[str]) -> tuple[list[bytes], list[bytes], list[str]]:
        """Return the queues' names, what ends a record from each, and all their lists."""
        lists = [each for queue in queues for each in self._layout.lists_of(queue)]
        return [queue.encode() for queue in queues], [end_of_record(queue) for queue in queues], lists

    def wake(self) -> None:
        """Look for messages: there may be new ones."""
        self._is_drained = False
        self._claim()

    def held_fields(self) -> list[str]:
        """Return the fields of what is held, the last one first."""
        return self._fields(sorted(self._held, reverse=True))

    def take_fanout(self, queue: str, envelope: bytes) -> None:
        """Hand over what pub/sub has brought for a queue."""
        self._next_fanout += 1
        self.receive(decode_claim([0, [envelope]], [queue.encode()], self._next_fanout, self._longest))

    def go_on(self, is_trusted: bool) -> None:
        """Carry out what was held back while the lease was in doubt; of what is not ours any more, nothing.

        The messages of an owner who was taken for dead go out by the next connection.
        """
        verdicts, self._doubtful_verdicts = self._doubtful_verdicts, []
        messages, self._doubtful_messages = self._doubtful_messages, []
        if is_trusted and messages:
            self.publish(messages)
        if is_trusted and verdicts:
            self.settle(verdicts)
        elif verdicts:
            # What nobody has put back yet need not run again.
            fields = self._fields(tag for tag, verdict in verdicts if verdict == ACK and tag < FANOUT_TAG)
            self._forget(fields)

    # --- called by the core

    def pull(self, n: int) -> None:
        """Allow ``n`` more deliveries, those included that are on their way here."""
        self._limit = self._taken + n
        self._claim()

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Tell the verdicts on deliveries."""
        if self._lease.is_in_doubt():
            self._doubtful_verdicts += batch
            return
        self._make_room()
        own = [each for each in batch if each[0] < FANOUT_TAG]
        self._held.difference_update(tag for tag, _ in own)
        done = self._fields(tag for tag, verdict in own if verdict == ACK or self._is_dropped(verdict))
        if done:
            self._forget(done)
        others = [each for each in own if each[1] != ACK and not self._is_dropped(each[1])]
        if others:
            self._returning += 1
            rejected = self.take_reasons(sorted(tag for tag, verdict in others if verdict == REJECT))
            self._jobs.spawn(self._put_elsewhere(others, rejected))
        self._claim()

    def publish(self, batch: list[tuple[int, Message]]) -> None:
        """Send messages."""
        if self._lease.is_in_doubt():
            self._doubtful_messages += batch
            return
        commands, tokens, orders = [], [], []
        for token, message in batch:
            if message.exchange == POSTPONED:
                orders.append((token, message))
                continue
            if message.exchange:
                self._jobs.spawn(self._publish_through_exchange(token, message))
                continue
            try:
                commands.append(push_command(self._layout, message))
            except EncodeError as error:
                # Running the task again would not help: the message stays what it is.
                logger.error("message %s to %s cannot be sent: %s", message.id, message.routing_key, error)
                asyncio.get_running_loop().call_soon(self.published, [token])
                continue
            tokens.append(token)
        if orders:
            waiting = [token for token, _ in orders]
            self.unacked.postpone([order for _, order in orders], lambda replies: self._on_postponed(waiting, replies))
        if commands:
            self._redis.send(commands, lambda replies: self._on_published(tokens, replies))

    # --- inside

    @property
    def _scheduled(self) -> int:
        """How many messages wait in this process for their time."""
        return int(self._core.stats()["scheduled"]) if self._core is not None else 0

    def _claim(self) -> None:
        wanted = min(self._limit - self._taken, self._free())
        if wanted <= 0 or self._is_claiming or self._is_drained or self._returning or self.dead or not self._names:
            return
        room = min(CLAIM_BYTES, self.max_held_bytes - self.held_bytes)
        if room <= 0:
            return  # until something is settled
        names, ends, lists = self._names, self._ends, self._lists
        if self._order.has_own:
            names, ends, lists = self._places_of(self._order.choose())
            if not names:
                self._look_again(ASK_AGAIN_S)
                return
        keys = [self._layout.leases, self._layout.unacked, self._layout.unacked_index, *lists]
        command = run_script(
            scripts.CLAIM, keys,
            self.owner, self._next_tag, wanted, room, self._longest, SAMPLE_BYTES,
            len(self._layout.steps), self._order.turn(), *ends,
        )  # fmt: skip
        self._is_claiming = True
        self._redis.send([command], lambda replies: self._on_claimed(names, replies[0]))

    def _free(self) -> int:
        """Return for how many messages there is somebody to run them, where nothing is to be held in advance."""
        if not self._takes_when_free:
            return MAX_CLAIM
        free = MAX_CLAIM if self._core is None else len(self._core.children) - self._core.load
        if free <= 0:
            self._look_again(RECHECK_S)
        return free

    def _look_again(self, after_s: float) -> None:
        if self._recheck is None and not self.dead:
            self._recheck = asyncio.get_running_loop().call_later(after_s, self._claim_again)

    def _claim_again(self) -> None:
        self._recheck = None
        if not self.dead:
            self._claim()

    def _on_claimed(self, names: list[bytes], reply: Any) -> None:
        self._is_claiming = False
        if isinstance(reply, RedisError):
            if reply.code not in PASSING_CODES:
                self._jobs.fail(reply)
                return
            self._jobs.warn(f"cannot receive from Redis for now: {reply}")
            asyncio.get_running_loop().call_later(RETRY_S, self._claim_again)
            return
        if self.dead:
            return
        self._redis.expect(reply, list)
        self._redis.expect(reply, [int, bytes, *([int, [bytes, ...]] * (len(reply) // 2 - 1))])
        if any(not 0 <= queue < len(names) for queue in reply[2::2]):
            self._redis.refuse(reply)
        is_drained, problem = reply[0] == 1, reply[1]
        rows = decode_claim(reply[2:], names, self._next_tag, self._longest)
        self._next_tag += len(rows)
        self._taken += len(rows)
        self._held.update(row[0] for row in rows)
        if self._order.has_own:
            self._order.gave([names[queue].decode() for queue in reply[2::2]])
        # Queues that the application's order has left out may have some, and it may name them the next time.
        is_partial = len(names) < len(self._names)
        self._is_drained = is_drained and not is_partial
        if rows:
            self._arriving = iter(rows)
            self.receive(rows)
            self._arriving = iter(())
            self._make_room()
        if problem:
            self._jobs.warn(f"cannot receive from {problem.decode(errors='replace')}")
        elif self._is_drained:
            self._await_messages()
        if is_partial and is_drained and not rows:
            self._look_again(ASK_AGAIN_S)
        else:
            self._claim()

    def _make_room(self) -> None:
        """Have what waits here for its time not count towards the prefetch."""
        if self.held < self.window == self._prefetch:
            return
        # The core asks for more when half of the window is free: never, when most of it waits.
        self.window = self._prefetch + self._scheduled
        self._limit = max(self._limit, self._taken + self.window - self.held)

    def _postponed(self, found: Mapping[str, Any], due: float) -> Message | None:
        """Return the order to put a delivery away until nearer its time; None for one that is not in Redis as it is."""
        # The core asks while it takes what has arrived, in order.
        for tag, queue, props, *_ in self._arriving:
            if props is found["props"]:
                place = self._layout.list_of(queue.decode(), scan(props)["priority"])
                return Message(POSTPONED, place, b"", f"{self.owner}:{tag}".encode(), found["id"], due=due)
        return None

    def _on_postponed(self, tokens: list[int], replies: list[Any]) -> None:
        if isinstance(replies[0], RedisError):
            # A key of a wrong type, or no permission: then they wait in this process.
            self.postpone = None
            self._jobs.warn(f"tasks that are due later wait in the worker: Redis answered {replies[0]}")
            self.publish_failed(tokens, str(replies[0]))
        else:
            self.published(tokens)

    def _fields(self, tags: Iterable[int]) -> list[str]:
        return [f"{self.owner}:{tag}" for tag in tags]

    def _is_dropped(self, verdict: int) -> bool:
        return verdict == REJECT and not self._keeps_dead_letters

    def _forget(self, fields: Sequence[str]) -> None:
        """Have messages forgotten that are done."""
        if fields:
            self.unacked.settle(fields, partial(self._on_settled, fields))

    def _on_settled(self, fields: Sequence[str], replies: list[Any]) -> None:
        refused: list[str] = []
        for place, reply in enumerate(replies):
            if isinstance(reply, RedisError):
                refused += fields[place * FIELDS : (place + 1) * FIELDS]
                self._jobs.warn(f"calls that have run cannot be settled for now: Redis answered {reply}")
            else:
                self._redis.expect(reply, int)
        if refused:
            # Not the end of the connection: with it they would run again.
            self._jobs.spawn(self._forget_later(refused))

    async def _forget_later(self, fields: Sequence[str]) -> None:
        await asyncio.sleep(RETRY_S)
        self._forget(fields)

    async def give_back(self, fields: Sequence[str], counted: bool = True) -> int:
        """Put messages back into their queues, the last one first; return how many were still there."""
        # Those behind them are not taken meanwhile: these have the older claim.
        self._returning += 1
        try:
            return await self.unacked.give_back(fields, counted)
        finally:
            self._returning -= 1
            self.wake()

    async def _put_elsewhere(self, verdicts: list[tuple[int, int]], rejected: dict[str, list[int]]) -> None:
        """Carry out the verdicts after which a message is somewhere else."""
        tags = {each: sorted(tag for tag, verdict in verdicts if verdict == each) for each in (REQUEUE, RETURN)}
        try:
            for reason, buried in rejected.items():
                await self._jobs.patiently(self.unacked.bury, self._fields(buried), reason)
            for verdict, counted in ((REQUEUE, True), (RETURN, False)):
                await self._jobs.patiently(self.give_back, self._fields(reversed(tags[verdict])), counted)
        finally:
            self._returning -= 1
        self.wake()

    async def _publish_through_exchange(self, token: int, message: Message) -> None:
        try:
            if message.exchange in self._fanouts:
                commands = [fanout_command(self._layout, message)]
            else:
                members = await self._redis.call("SMEMBERS", self._layout.bindings_of(message.exchange))
                commands = routed(self._layout, message, self._redis.expect(members, [bytes, ...]))
        except (PublishError, EncodeError) as error:
            self.publish_failed([token], str(error))
            return
        self._on_published([token] * len(commands), await self._redis.pipeline(commands))

    def _on_published(self, tokens: list[int], replies: list[Any]) -> None:
        failures = {token: reply for token, reply in zip(tokens, replies, strict=True) if isinstance(reply, RedisError)}
        stored = [token for token in tokens if token not in failures]
        if failures:
            reason = str(refused(next(iter(failures.values()))))
            self._jobs.warn(reason)
            self.publish_failed(list(failures), reason)
        self._redis.expect([reply for reply in replies if not isinstance(reply, RedisError)], [int, ...])
        if stored:
            self.published(stored)
