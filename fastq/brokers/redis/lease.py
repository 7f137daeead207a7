"""The lease under which a worker holds messages in Redis: a score in a sorted set, renewed while the worker lives.

Whoever renews a lease looks for those that have run out and gives back what their owners held. Nothing here receives.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Final

from fastq.brokers.redis import scripts
from fastq.brokers.redis.commands import check
from fastq.brokers.redis.digests import run_script
from fastq.errors import ConnectionLost

if TYPE_CHECKING:
    from fastq.brokers.redis.aio import AsyncRedis
    from fastq.brokers.redis.jobs import Jobs
    from fastq.brokers.redis.layout import Layout
    from fastq.brokers.redis.login import Command
    from fastq.brokers.redis.unacked import Unacked
    from fastq.interfaces import Holder

logger = logging.getLogger("fastq.transport.redis")

#: Together at most 15 s (reliability rules, section 3): a lease runs out, is seen to have run out, and is not renewed.
LEASE_S: Final = 8.0
RENEW_EVERY_S: Final = 3.0
GRACE_S: Final = 2.0


class RedisLease:
    """One worker's lease (the protocol is ``interfaces.Lease``) at ``place``, the database's URL as it was given."""

    def __init__(self, place: str, redis: AsyncRedis, layout: Layout, unacked: Unacked, jobs: Jobs) -> None:
        self.owner = f"fastq-{secrets.token_hex(8)}"
        self._place = place
        self._redis = redis
        self._layout = layout
        self._unacked = unacked
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._holder: Holder | None = None
        self._renewed_at = 0.0
        self._touched_at = 0.0
        self._is_asking = False
        self._abandoned: set[str] = set()  # owners that earlier connections of this process were
        self._inherited: set[str] = set()

    @property
    def renew_every_s(self) -> float:
        """How often to renew it."""
        return min(RENEW_EVERY_S, self._layout.visibility_timeout_s / 4)

    async def take(self, holder: Holder) -> None:
        """Hold messages from now on. What earlier connections of this process held is nobody's: it goes back."""
        self._holder = holder
        self._abandoned = _ABANDONED.pop(self._place, set())
        bury: list[Command] = [("ZADD", self._layout.leases, "XX", 0, owner) for owner in self._abandoned]
        await self._renew(holder, bury, joins=True)

    async def renew(self) -> None:
        """Say that this worker lives. Raises ConnectionLost when it was taken for dead: what it held is others'."""
        assert self._holder is not None, "take() first"
        await self._renew(self._holder, [], joins=False)

    def is_in_doubt(self) -> bool:
        """Whether this process stood still for so long that others may have taken over.

        Redis is asked then, and the holder told to ``go_on``.
        """
        if self._is_asking:
            return True
        if self._holder is None or self._loop.time() - self._renewed_at < LEASE_S:
            return False
        self._is_asking = True
        self._jobs.spawn(self._ask(self._holder))
        return True

    def abandon(self) -> None:
        """The connection is lost: the next one of this process has what was held go back."""
        _ABANDONED.setdefault(self._place, set()).add(self.owner)

    async def end(self, is_certain: bool) -> None:
        """Hold nothing more. Not ``is_certain``: it may have taken what it never heard of."""
        if is_certain:
            await self._redis.call("ZREM", self._layout.leases, self.owner)
        else:  # whoever renews a lease next puts that back
            await self._redis.call("ZADD", self._layout.leases, "XX", 0, self.owner)

    # --- inside

    async def _ask(self, holder: Holder) -> None:
        """Take the lease up again, unless somebody has taken this worker for dead; then the connection ends."""
        is_trusted = False
        try:
            await self._jobs.patiently(self.renew)
            is_trusted = True
        finally:
            self._is_asking = False
            holder.go_on(is_trusted)

    async def _renew(self, holder: Holder, bury: list[Command], joins: bool) -> None:
        asked_at, timeout_s = self._loop.time(), self._layout.visibility_timeout_s
        touched: list[str] = []
        if asked_at - self._touched_at >= timeout_s / 4:
            # What is held here must not look overdue to others.
            self._touched_at, touched = asked_at, holder.held_fields()
        keys = (self._layout.leases, self._layout.unacked_index)
        renew = run_script(scripts.RENEW, keys, self.owner, LEASE_S, GRACE_S, timeout_s, int(joins), *touched)
        try:
            replies = await asyncio.wait_for(self._redis.pipeline([*bury, renew]), LEASE_S)
        except asyncio.TimeoutError:
            if self._loop.time() - asked_at < LEASE_S + RENEW_EVERY_S and not self._redis.lost.done():
                raise ConnectionLost(f"Redis at {self._redis.url} has not answered for {LEASE_S} s") from None
            # This process stood still while it was asking: the answer may have been there all the time.
            await self._renew(holder, bury, joins)
            return
        texts = [bytes, ...]
        is_trusted, buried, overdue = self._redis.expect(check(replies[-1:])[0], [int, texts, texts])
        if not is_trusted:
            raise ConnectionLost(f"{self.owner} was taken for dead: it did not renew its lease in time")
        self._renewed_at = asked_at
        for owner in {name.decode() for name in buried} - self._inherited:
            # Not here: a long inheritance must not keep us from renewing our own lease.
            self._jobs.spawn(self._inherit(holder, owner))
        if overdue:
            count = await holder.give_back([field.decode() for field in reversed(overdue)])
            logger.warning("gave back %s held for more than %s s", _messages(count), timeout_s)

    async def _inherit(self, holder: Holder, owner: str) -> None:
        """Give back what a dead owner held, and forget the owner."""
        self._inherited.add(owner)
        fields = await self._jobs.patiently(self._unacked.fields_of, owner)
        count = await self._jobs.patiently(holder.give_back, fields)
        await self._jobs.patiently(self._redis.call, "ZREM", self._layout.leases, owner)
        if count and owner in self._abandoned:
            logger.warning("gave back %s that this process held when it lost its connection", _messages(count))
        elif count:
            logger.warning(
                "gave back %s of a worker that died, hangs or lost its connection (%s)", _messages(count), owner
            )
        self._inherited.discard(owner)


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count} messages"


#: Owners whose connection was lost in this process, by their place.
_ABANDONED: dict[str, set[str]] = {}
