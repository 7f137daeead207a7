"""A running worker seen and steered from outside: remote control, events, revoked tasks, and what outlives a restart.

Holds the parts together and shows the worker to the commands (``commands.command.WorkerView``). Nothing here touches a
task's message; where the broker has no bus it is quiet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastq.brokers import has_bus
from fastq.errors import FastqError
from fastq.interfaces import Bus
from fastq.wire.ids import new_id
from fastq.worker.autoscale import Autoscaler
from fastq.worker.options import WorkerOptions, expand_path
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.control import Control
from fastq.worker.remote.events import HEARTBEAT_S, Events
from fastq.worker.remote.mingle import find_namesakes, mingle
from fastq.worker.remote.revoked import StateFile, revoked_from_environment

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Consumer
    from fastq.pool import Pool
    from fastq.settings import Settings
    from fastq.worker.hooks import Hooks
    from fastq.worker.program import Program
    from fastq.worker.window import Window

logger = logging.getLogger("fastq.worker")


class Remote:
    """The worker as others see it. ``get_consumer`` returns the connection for tasks, None while there is none."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        program: Program,
        options: WorkerOptions,
        core: Core,
        pool: Pool,
        get_consumer: Callable[[], Consumer | None],
        stop: Callable[[str], None],
        window: Window,
    ) -> None:
        self.hostname = options.hostname
        self.instance = new_id()
        self.started_unix = time.time()
        self.options = options
        self.core = core
        self.pool = pool
        self.stop = stop
        self.window = window
        self.clock = LamportClock()
        self.revocations = revoked_from_environment()
        self.autoscale = Autoscaler(pool, core, options.autoscale) if options.autoscale else None
        self.events: Events | None = None
        self._loop = loop
        self._program = program
        self._get_consumer = get_consumer
        self._file = StateFile(expand_path(options.statedb, options.hostname)) if options.statedb else None
        self._control: Control | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._has_mingled = False

    # --- life

    def start(self, hooks: Hooks) -> None:
        """Remember what the last run knew, then listen and tell. Raises SettingsError for a state file of no use."""
        if self._file is not None:
            self._file.load(self.revocations, self.clock)
            self._revoked_changed()
        if has_bus(str(self.settings.broker_url)):
            self._control = Control(self.settings, self.hostname, self, self.clock, self._on_connected)
            beat_s = None if self.options.without_heartbeat else self.options.heartbeat_interval or HEARTBEAT_S
            self.events = Events(
                self._loop,
                lambda: self._control.bus if self._control is not None else None,
                self.hostname,
                self.settings,
                self.clock,
                heartbeat_s=beat_s,
                counts=lambda: (self.core.running, self.core.received),
                on_switch=lambda enabled: hooks.refresh(),
            )
            if self.options.task_events:
                self.events.enable()
            self._tasks.append(self._loop.create_task(self._control.serve()))
        if self.autoscale is not None:
            self._tasks.append(self._loop.create_task(self.autoscale.run()))
        hooks.watch(self.revocations, self.events)

    async def close(self) -> None:
        """Say goodbye, stop listening, and write down what the next run is to know."""
        if self.events is not None:
            self.events.stop()
        # Before Python 3.12 a cancellation may be lost where it meets the end of a wait.
        while left := [task for task in self._tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)
        if self._file is not None:
            try:
                self._file.save(self.revocations, self.clock)
            except OSError as error:
                logger.error("%s", error)

    async def _on_connected(self, bus: Bus) -> None:
        assert self.events is not None
        self.events.connected()
        if not self._has_mingled:
            self._has_mingled = True
            if not self.options.without_mingle:
                await mingle(bus, self.hostname, self.instance, self.clock, self.revocations, self._merge)
            elif self.settings.worker_enable_remote_control:
                with contextlib.suppress(FastqError):  # the connection is made again, and nobody waits for this
                    await find_namesakes(bus, self.hostname, self.instance)

    def _merge(self, ids: Iterable[str]) -> None:
        self.revocations.update(ids)
        self._revoked_changed()

    def _revoked_changed(self) -> None:
        self.core.revoked = self.revocations if self.revocations else None

    # --- what commands see

    @property
    def settings(self) -> Settings:
        """Return the application's settings."""
        return self._program.settings

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        """Return the settings that were changed, or all, without secrets."""
        return self._program.configuration(with_defaults)

    def report(self) -> str:
        """Return what a bug report should say of this installation."""
        return self._program.report()

    @property
    def consumer(self) -> Any:
        """Return the connection that tasks come over; None while the broker is away."""
        return self._get_consumer()

    @property
    def registry(self) -> Mapping[str, Any]:
        """Return the application's task objects by name."""
        return self._program.registry

    @property
    def custom_commands(self) -> Mapping[str, Callable[..., Any]]:
        """Return the application's own commands."""
        return self._program.commands

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Store the state REVOKED for tasks of which no worker has begun one; does not wait."""
        self._program.mark_revoked(ids)
