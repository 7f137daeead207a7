"""Remote control, the worker's side: stays connected to the bus, hands requests to the commands, sends the replies.

It has a connection of its own, so that nothing that comes in here can disturb the tasks. It never ends the worker: a
message that is no request is counted and dropped, a lost connection is made again. What the commands do is not known
here. Events are published over the same bus.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from fastq.brokers import open_bus
from fastq.bus.patterns import PatternRefused
from fastq.bus.pidbox import Mailbox, Request
from fastq.errors import DecodeError, FastqError
from fastq.interfaces import Bus
from fastq.settings import Settings
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.commands import COMMANDS
from fastq.worker.remote.commands.command import Command, WorkerView
from fastq.worker.remote.commands.worker import ping

logger = logging.getLogger("fastq.worker.control")

_FIRST_RETRY_S: Final = 0.1  # reliability rules, section 6.2: 0.1 s to 30 s with full jitter
_LAST_RETRY_S: Final = 30.0
#: Chosen: requests whose answer takes more than one turn of the loop, at one time; more are refused.
_MAX_RUNNING: Final = 64
#: Chosen: a flood of requests gets half of the loop's time, in turns of a length that no task notices.
_TURN_S: Final = 0.002
#: Chosen: what comes beyond so many that wait for their turn is dropped.
_MAX_WAITING: Final = 10_000


class Control:
    """Answers requests for one node until ``serve`` is cancelled. ``ready`` is set while it listens.

    Without a view of a worker it answers ``ping`` alone. ``on_connected`` is called with each new bus, to announce the
    worker and to catch up with the others; what it raises of FastqError is logged.
    """

    def __init__(
        self,
        settings: Settings,
        hostname: str,
        view: WorkerView | None = None,
        clock: LamportClock | None = None,
        on_connected: Callable[[Bus], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self.malformed = 0
        #: The bus while it is connected, for events.
        self.bus: Bus | None = None
        self.clock = clock or LamportClock()
        self._settings = settings
        self._hostname = hostname
        self._view = view
        self._mailbox = Mailbox(settings)
        self._on_connected = on_connected
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting: deque[tuple[Mapping[str, Any], bytes]] = deque()
        self._is_dropping = False
        self._turns = asyncio.Lock()

    # --- connecting

    async def serve(self) -> None:
        """Stay connected and answer; when cancelled, close the connection."""
        try:
            await self._serve()
        finally:
            for task in self._tasks:
                task.cancel()

    async def _serve(self) -> None:
        attempt = 0
        while True:
            bus: Bus | None = None
            try:
                bus = open_bus(str(self._settings.broker_url), self._settings, self.clock)
                await bus.open(self._hostname, self._on_request if self._listens else None)
                attempt = 0
                self._connected(bus)
                reason: Exception = await asyncio.shield(bus.lost)
            except FastqError as error:
                reason = error
            finally:
                self.bus = None
                self.ready.clear()
                if bus is not None:
                    await bus.close()
            attempt += 1
            level = logging.WARNING if attempt == 1 else logging.DEBUG
            logger.log(level, "remote control of %s is away: %s", self._hostname, reason)
            longest = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(attempt, 10))
            await asyncio.sleep(random.uniform(_FIRST_RETRY_S, longest))  # noqa: S311  jitter, not a secret

    @property
    def _listens(self) -> bool:
        return self._settings.worker_enable_remote_control

    def _connected(self, bus: Bus) -> None:
        self.bus = bus
        self.ready.set()
        if self._on_connected is not None:
            self._start(self._welcome(self._on_connected(bus)))

    async def _welcome(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FastqError as error:
            logger.warning("remote control of %s could not catch up: %s", self._hostname, error)

    # --- requests

    def _on_request(self, headers: Mapping[str, Any], body: bytes) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            if not self._is_dropping:
                logger.warning("remote control: more than %s requests wait; further ones are dropped", _MAX_WAITING)
            self._is_dropping = True
            return
        self._waiting.append((headers, body))
        if len(self._waiting) == 1:
            self._take_turn()

    def _take_turn(self) -> None:
        until = time.monotonic() + _TURN_S
        while self._waiting:
            try:
                self._handle(*self._waiting[0])
            except Exception as error:  # whatever came, the bus goes on
                logger.warning("remote control: a request could not be answered: %r", error)
            self._waiting.popleft()
            if self._waiting and time.monotonic() > until:
                asyncio.get_running_loop().call_later(_TURN_S, self._take_turn)
                return
        self._is_dropping = False

    def _handle(self, headers: Mapping[str, Any], body: bytes) -> None:
        try:
            request = self._mailbox.decode_request(headers, body)
        except DecodeError as error:
            self.malformed += 1
            level = logging.WARNING if self.malformed == 1 else logging.DEBUG
            logger.log(level, "remote control: %s", error)
            return
        self.clock.adjust(headers.get("clock"))
        try:
            if not request.is_for(self._hostname):
                return
        except PatternRefused as error:
            logger.warning("remote control: %.100s is not run: %s", request.method, error)
            self._reply(request, {"error": str(error)})
            return
        logger.debug("remote control: %s %s", request.method, dict(request.arguments))
        reply = self._answer(request)
        if inspect.isawaitable(reply):
            self._answer_later(request, reply)
        else:
            self._reply(request, reply)

    def _answer(self, request: Request) -> Any:
        """Run the command and return its reply, or an awaitable for it; what goes wrong is the reply."""
        view = self._view
        if view is None:
            return ping(view) if request.method == "ping" else {"error": repr(KeyError(request.method))}
        custom = view.custom_commands.get(request.method)
        if custom is not None:
            # The user's code may take its time; the loop has none to give.
            return asyncio.to_thread(custom, view, **_by_name(request.arguments))
        command = COMMANDS.get(request.method)
        if command is None:
            return {"error": repr(KeyError(request.method))}
        return self._run(command, view, request)

    def _run(self, command: Command, view: WorkerView, request: Request) -> Any:
        answer = partial(command.function, view, **_by_name(request.arguments))
        try:
            return self._in_turn(answer) if command.takes_turns else answer()
        except Exception as error:  # whatever the arguments led to, it is the asker's business
            logger.warning("remote control: %.100s failed: %.1000r", request.method, error)
            return {"error": repr(error)}

    async def _in_turn(self, answer: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        async with self._turns:
            return await answer()

    def _answer_later(self, request: Request, reply: Any) -> None:
        if len(self._tasks) >= _MAX_RUNNING:
            reply.close()
            self._reply(request, {"error": f"busy: {_MAX_RUNNING} requests are being answered; ask again"})
        else:
            self._start(self._finish(request, reply))

    async def _finish(self, request: Request, work: Any) -> None:
        try:
            reply = await work
        except Exception as error:  # the user's own commands run here
            logger.warning("remote control: %.100s failed: %.1000r", request.method, error)
            reply = {"error": repr(error)}
        try:
            self._reply(request, reply)
        except Exception as error:
            logger.warning("remote control: the reply to %s could not be sent: %r", request.method, error)

    def _reply(self, request: Request, reply: object) -> None:
        bus = self.bus
        if not request.reply_to or bus is None:
            return
        headers = {"ticket": request.ticket, "clock": self.clock.forward()}
        body = self._mailbox.encode_reply(self._hostname, reply)
        bus.reply(self._mailbox.replies, request.reply_to, headers, body)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _by_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments under names that a function can take; ``view`` is ours."""
    return {str(name): value for name, value in arguments.items() if name != "view"}
