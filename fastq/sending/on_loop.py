"""Sending from event loops: what ``sender`` does, without blocking. One publisher for each loop, closed with it.

Messages are made, and attempts counted, by the sender; here is only what waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastq.errors import ConnectionLost, FastqError, PublishError
from fastq.net import forks
from fastq.net.threads import in_thread
from fastq.result import AsyncResult

if TYPE_CHECKING:
    from fastq.interfaces import AsyncPublisher, Publisher
    from fastq.sending.envelope import Envelope, PublishRetry
    from fastq.sending.options import SendOptions
    from fastq.sending.sender import Sender
    from fastq.wire.message import Message


class _Open(NamedTuple):
    """A loop's publisher, the one that was set to be used if there is one, and what closes it when the loop ends."""

    publisher: AsyncPublisher
    given: Publisher | None
    closing: AsyncGenerator[None, None]


class LoopSender:
    """Sends the calls of one application from coroutines, by what its ``sender`` says."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._open: dict[asyncio.AbstractEventLoop, _Open] = {}
        forks.register(self)

    # --- what is sent

    async def send_task(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions
    ) -> AsyncResult[Any]:
        """Do as ``Sender.send_task`` does."""
        sender = self._sender
        if sender.conf.task_always_eager:
            return sender.send_task(name, args, kwargs, options)
        envelope = sender.known_envelope(name)
        if envelope is None:
            envelope = sender.new_envelope(name, args, kwargs, options)
            sender.keep_envelope(await self.addressed(envelope))
        return await self.send(*sender.with_options(envelope, options), args, kwargs)

    async def send(
        self, envelope: Envelope, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AsyncResult[Any]:
        """Publish one call and return the handle on its result; ``adelay`` and all its relatives end here."""
        sender = self._sender
        message, parent = sender.make(envelope, task_id, args, kwargs)
        batch = sender.collecting
        if batch is None:
            await self._publish((message,), envelope.publish_retry)
        else:
            batch.messages.append(message)
        return sender.handle(envelope, task_id, parent, batch)

    async def addressed(self, envelope: Envelope) -> Envelope:
        """Return the envelope with where its result is to go."""
        if not envelope.ignore_result:
            envelope.reply_to = await self._reply_address()
        return envelope

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[None]:
        """Do as ``Sender.batch`` does."""
        with self._sender.collect() as batch:
            yield
        if batch is not None and (messages := batch.take()):
            await self._publish(messages, None)

    async def _publish(self, messages: Sequence[Message], retry: PublishRetry | None) -> None:
        sender = self._sender
        left, attempts = messages, None
        deadline = time.monotonic() + sender.conf.fastq_publish_timeout
        while True:
            try:
                await self._publish_once(left, deadline)
                break
            except (ConnectionLost, PublishError) as error:
                if attempts is None:
                    attempts = sender.attempts(messages, retry, deadline)
                pause_s = attempts.pause_after(error)
                left = attempts.left
            await asyncio.sleep(pause_s)
            with suppress(FastqError):
                await self._reply_address(deadline)
        if sender.tells_sent:
            await in_thread(partial(sender.tell_sent, messages))

    async def _publish_once(self, messages: Sequence[Message], deadline: float) -> None:
        sender = self._sender
        open_ = self._open.get(asyncio.get_running_loop())
        publisher = (
            open_.publisher
            if open_ is not None and open_.given is sender.given_publisher
            else await self._new_publisher()
        )
        for message in messages:
            if not message.exchange and not sender.is_declared(message.routing_key):
                if sender.may_declare(message.routing_key):
                    await publisher.declare(message.routing_key, deadline)
                sender.note_declared(message.routing_key)
        await publisher.publish(messages, deadline)

    async def _reply_address(self, deadline: float | None = None) -> str | None:
        sender = self._sender
        if not sender.wants_replies:
            return None
        store = sender.store
        if store.is_there():
            return store.reply_address(deadline)
        return await in_thread(partial(store.reply_address, deadline))

    # --- publishers

    async def _new_publisher(self) -> AsyncPublisher:
        """Return this loop's publisher; the loop's end closes it."""
        from fastq.brokers import async_form, open_async_publisher

        loop, given = asyncio.get_running_loop(), self._sender.given_publisher
        self._sender.finalize()
        for each in [each for each in self._open if each.is_closed()]:
            del self._open[each]
        publisher = (
            open_async_publisher(self._sender.broker_url, self._sender.conf) if given is None else async_form(given)
        )
        closing = _closing(publisher)
        await anext(closing)  # from now on the loop knows it; nothing was waited for
        stale = self._open.get(loop)
        self._open[loop] = _Open(publisher, given, closing)
        if stale is not None:
            _close_soon(loop, stale.closing)
        return publisher

    async def aclose(self) -> None:
        """Close what the running loop has open; a later use opens it again."""
        open_ = self._open.pop(asyncio.get_running_loop(), None)
        if open_ is not None:
            await open_.closing.aclose()

    def leave(self) -> None:
        """Have every loop close what it has open, soon."""
        left, self._open = self._open, {}
        for loop, open_ in left.items():
            _close_soon(loop, open_.closing)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Have no connections inside a ``with`` block but those that are opened there."""
        kept, self._open = self._open, {}
        try:
            yield
        finally:
            self.leave()
            self._open = kept

    def after_fork(self) -> None:
        """In a forked child: the loops are the parent's, and so are their connections."""
        _inherited.append(self._open)
        self._open = {}


async def _closing(publisher: AsyncPublisher) -> AsyncGenerator[None, None]:
    """Close a publisher when the loop shuts down, which ends all generators that it knows: ``asyncio.run`` does."""
    try:
        yield
    finally:
        await publisher.close()


def _close_soon(loop: asyncio.AbstractEventLoop, closing: AsyncGenerator[None, None]) -> None:
    async def close() -> None:
        with suppress(RuntimeError):  # the loop itself closes it now
            await closing.aclose()

    def begin() -> None:
        task = loop.create_task(close())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(begin)


_tasks: Final[set[asyncio.Task[None]]] = set()
# Never let go: to close a transport of the parent's would take it out of the epoll set that both have.
_inherited: Final[list[object]] = []
