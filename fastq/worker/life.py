"""A worker's life on its event loop: start the pool, connect, stay connected, adapt the prefetch, stop in order.

Imported only after the zygote was forked, so that children do not carry an event loop in their memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvloop

from fastq._core import Core
from fastq.brokers import open_consumer
from fastq.errors import ConnectionLost, FastqError, PoolLost, RemoteProtocolError, SettingsError
from fastq.interfaces import Consumer
from fastq.link import BatchSource
from fastq.net.urls import mask_url
from fastq.plugins import load
from fastq.pool import Group, Pool, PoolOptions, find_pool
from fastq.pool.titles import active, set_title
from fastq.queues import QueueSpec
from fastq.results import find_store
from fastq.running import messages
from fastq.settings import Settings
from fastq.worker.hooks import Hooks
from fastq.worker.options import WorkerOptions
from fastq.worker.process.daemon import restart
from fastq.worker.process.exitcodes import EX_FAILURE, EX_OK
from fastq.worker.process.log import SHOW_INFO
from fastq.worker.process.logthread import LogThread
from fastq.worker.process.signals import Install, dump_stacks
from fastq.worker.program import Program
from fastq.worker.remote.remote import Remote
from fastq.worker.stop import Stop
from fastq.worker.storage import Storage
from fastq.worker.window import Window

logger = logging.getLogger("fastq.worker")

FIRST_RETRY_S = 0.1  # reliability rules, section 6.2: 0.1 s to 30 s with full jitter
LAST_RETRY_S = 30.0
FLAP_S = 1.0
RESTART_RETRY_S = 2.0  # reliability goals, scenario 9: consuming again within 2 s after the broker's port opens
CANCEL_S = 5.0
COLD_S = 2.0
STORE_WAIT_S = 2.0  # chosen: a worker that stops waits so long for a result store that is away
HANDLERS_S = 10.0  # chosen: what users' code has for its last work
LOOK_EVERY_S = 0.2
COLLECT_S = 1.0  # after a lost connection: when the other ones that went with it have ended too
MAX_NAMED = 100  # running tasks in a line of the log


class Life:
    """One run of a worker. ``options`` are resolved against the program's settings; ``prepared`` is the pool's."""

    def __init__(self, program: Program, options: WorkerOptions, prepared: Any, groups: tuple[Group, ...] = ()) -> None:
        self.program = program
        self.options = options
        self.settings: Settings = program.settings
        broker = program.settings.broker_url
        assert broker is not None  # settled settings name it
        self._broker: str = broker if isinstance(broker, str) else ";".join(broker)
        self._backend = program.results
        self.core: Core
        self.pool: Pool
        self._window: Window
        self._prepared = prepared
        self._groups = groups or (Group("one", options.concurrency or 1),)
        self._was_connected = False
        self._owns_process = False
        self._has_said_ready = False
        self._remote: Remote | None = None
        self._welcoming: asyncio.Task[None] | None = None
        self._thread: LogThread | None = None
        self._queues: Sequence[str] = options.queues
        self._added: list[QueueSpec] = []
        self._consumer: Consumer | None = None
        self._storage: Storage | None = None
        self._stop = Stop()
        self._signum = signal.SIGTERM  # the one that came last

    def run(self, on_ready: Callable[[], None] | None = None, install: Install | None = None) -> int:
        """Run until stopped and return the exit code. ``install`` routes signals; None: the process is not ours."""
        self._owns_process = install is not None
        if self._owns_process:
            # What is alive now stays alive: the collector need not look at it, nor at each batch of messages.
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 20)
        loop = uvloop.new_event_loop()
        if install is not None:  # else the process is not ours, nor its logging
            self._thread = LogThread()
            self._thread.take_over()
        try:
            return loop.run_until_complete(self._main(loop, on_ready, install))
        finally:
            loop.close()
            if self._thread is not None:
                self._thread.close()
            if self._stop.restarts:
                restart()

    def stop_soon(self, how: str = "warm") -> None:
        """Ask for a warm or cold stop, from any thread. No harm when the worker has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._stop.loop.call_soon_threadsafe(self._stop_by_program, how)

    # --- the life of a worker

    async def _main(
        self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None] | None, install: Install | None
    ) -> int:
        options = self.options
        hooks = self.program.hooks(loop)
        self._stop.start(loop)
        self.pool = self._make_pool(loop, hooks)
        self.core = self._make_core(loop, hooks)
        beside = sum(group.processes * group.slots for group in self._groups[1:])
        self._window = Window(options, self.core, self.pool, self.settings.worker_eta_task_limit or 0, beside)
        uninstall = install(loop, self._actions(), self._note_signal) if install is not None else lambda: None
        serving: asyncio.Task[None] | None = None
        self.program.tell("starting", life=self)
        remote = self._remote = Remote(
            loop,
            self.program,
            options,
            self.core,
            self.pool,
            lambda: self._consumer,
            self._stop_by_command,
            self._window,
        )
        try:
            await self._stop.unless(self.pool.start(self.core))
            if not self._stop.asked:
                if self.pool.companion is not None:
                    self.pool.companion.start()
                remote.start(hooks)
                serving = loop.create_task(self._serve(on_ready))
                await asyncio.wait([serving, loop.create_task(self._stop.wait())], return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
            await self._shut_down(serving)
            await self._end_program()
            return EX_FAILURE if self._stop.how == "cold" else EX_OK
        finally:
            await remote.close()
            self.pool.kill()
            self.pool.close()
            hooks.close()
            uninstall()

    async def _serve(self, on_ready: Callable[[], None] | None) -> None:
        """Stay connected: connect, consume, and start again when the connection is lost."""
        attempt, flaps, lost_at = 0, 0, time.monotonic()
        self.core.hold()
        while True:
            try:
                await self._connect()
            except (ConnectionLost, RemoteProtocolError, SettingsError) as error:
                # Settings that worked once are not what is wrong now: the broker is half up, or a proxy answers for it.
                if isinstance(error, SettingsError) and not self._was_connected:
                    raise
                attempt += 1
                self._collect_soon()
                await self._before_retry(attempt, time.monotonic() - lost_at, error)
                continue
            attempt, connected_at = 0, time.monotonic()
            self._was_connected = True
            logger.info(messages.CONNECTED, mask_url(self._broker))
            if self._owns_process:
                set_title(self.program.process_title, self.options.hostname, "MainProcess", active())
            self.program.tell("connected", view=self._remote, loop=self._stop.loop)
            if self._welcoming is None:
                self._welcoming = asyncio.ensure_future(self._welcome(on_ready))
            elif self._welcoming.done():
                self._say_ready()
            consumer = self._consumer
            assert consumer is not None
            adapting = asyncio.ensure_future(self._window.adapt(consumer))
            try:
                # Shielded: stopping cancels this task, and that must not look like a lost connection.
                reason = await asyncio.shield(consumer.lost)
            finally:
                adapting.cancel()
            lost_at = time.monotonic()
            logger.warning(messages.CONNECTION_LOST, reason)
            await self._disconnect()
            self._collect_soon()
            if self.settings.worker_cancel_long_running_tasks_on_connection_loss:
                self.core.cancel_lost(signal.SIGTERM)
            # A connection that ends as soon as it stands is not made again in a tight loop.
            flaps = flaps + 1 if lost_at - connected_at < FLAP_S else 0
            if flaps > 1:
                longest = min(FLAP_S, FIRST_RETRY_S * 2 ** min(flaps, 16))
                await asyncio.sleep(random.uniform(FIRST_RETRY_S, longest))  # noqa: S311  jitter, not a secret

    def _collect_soon(self) -> None:
        # A connection and the error that ended it refer to each other; the collector comes too rarely by itself.
        self._stop.loop.call_later(COLLECT_S, gc.collect)

    def _say_ready(self) -> None:
        ready = {"hostname": self.options.hostname}
        logger.info(messages.READY, ready)
        is_shown = self.options.loglevel in SHOW_INFO or self.options.quiet or not self._owns_process
        if not is_shown and not self._has_said_ready:
            # Whoever has started it by hand waits for this line, and the log does not show it.
            print(messages.READY % ready, flush=True)
        self._has_said_ready = True

    async def _welcome(self, on_ready: Callable[[], None] | None) -> None:
        """Tell the program, once, that the worker is ready; tasks begin when its handlers have had their say."""
        told = self.program.tell("ready", life=self)
        if told is not None:
            await asyncio.wrap_future(told)
            if self._thread is not None:
                self._thread.take_over()  # logging handlers that were added just now
        if not self._stop.asked:
            self.core.resume()
        self._say_ready()
        if on_ready is not None:
            on_ready()

    async def _end_program(self) -> None:
        """Tell the program that all has ended, and wait within bounds for its handlers."""
        told = self.program.tell("stopped")
        if told is None:
            return
        done, _ = await asyncio.wait([asyncio.wrap_future(told)], timeout=HANDLERS_S)
        if not done:
            logger.warning("handlers of the worker's end are not done after %g s; it ends without them", HANDLERS_S)

    async def _connect(self) -> None:
        settings, options = self.settings, self.options
        consumer = open_consumer(self._broker, settings, self.core)
        consumer.name = options.hostname
        await consumer.open()
        self._consumer = consumer
        consumer.source.window = self._window.size
        consumer.source.max_held_bytes = settings.fastq_max_held_bytes
        try:
            self._choose_store(consumer)
            if self.core.answers_all and consumer.replies is not None:
                await consumer.replies.prepare()
            self.core.add_source(consumer.source)
            self.core.set_outlet(consumer.outlet)
            await consumer.consume(self._queues, self._window.size)
            for spec in self._added:
                await consumer.add_queue(spec)
        except BaseException:
            await self._disconnect()
            raise

    def _choose_store(self, consumer: Consumer) -> None:
        """Say where results go: along with the replies (rpc), to the broker's own file, or elsewhere."""
        if self._backend == "disabled" or self.core.rpc_results:
            return
        if self._backend == self._broker and consumer.saves_results:
            assert isinstance(consumer.source, BatchSource)
            self.core.set_store(consumer.source)
        elif self._storage is None:
            storage = Storage(self._backend, self.settings, self.core, self.options.hostname)
            storage.start(self._on_fatal)
            self._storage = storage

    async def _disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        if not self._stop.asked:
            # Queues come and go by remote control: the next connection goes on with those of now.
            specs = {spec.name: spec for spec in consumer.queue_specs}
            self._added = [spec for name, spec in specs.items() if name not in self.options.queues]
            self._queues = [name for name in self.options.queues if name in specs or not specs]
        self.core.drop_source(consumer.source)
        self.core.set_outlet(None)
        await consumer.close()

    async def _before_retry(self, attempt: int, down_s: float, error: Exception) -> None:
        """Log and wait before the next attempt to connect; raises when there is to be none."""
        settings = self.settings
        limit = settings.broker_connection_max_retries
        retries = settings.broker_connection_retry
        if settings.broker_connection_retry_on_startup is not None and not self._was_connected:
            retries = settings.broker_connection_retry_on_startup
        if not retries or (limit and attempt > limit):
            raise ConnectionLost(f"{error}. Start the broker, or set broker_url to one that runs")
        # A restart of the broker costs no more than its own time and a little: not half a minute after it is back.
        longest = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(attempt, 16), max(RESTART_RETRY_S, down_s / 4))
        delay = random.uniform(FIRST_RETRY_S, longest)  # noqa: S311  jitter, not a secret
        logger.error(messages.CANNOT_CONNECT, mask_url(self._broker), error, delay, attempt, limit or "no limit")
        await asyncio.sleep(delay)

    # --- stopping

    def _actions(self) -> dict[str, Callable[[], None]]:
        def warm() -> None:
            self.core.hold()
            self._say(messages.WARM_SHUTDOWN)
            self._stop.ask("warm", self.options.grace_s)
            self.program.tell("stopping", how="warm", signum=self._signum)

        def cold() -> None:
            soft_s = self.settings.worker_soft_shutdown_timeout
            on_idle = self.settings.worker_enable_soft_shutdown_on_idle
            if soft_s > 0 and self._stop.how != "cold" and (on_idle or not self.core.is_idle):
                # Asked once more, it is cold at once.
                self.core.hold()
                logger.warning(messages.SOFT_SHUTDOWN, soft_s)
                self._stop.ask("cold", soft_s)
            else:
                self._say(messages.COLD_SHUTDOWN)
                self._stop.ask("cold", 0)
            self.program.tell("stopping", how="cold", signum=self._signum)

        def again() -> None:
            self.core.hold()
            logger.warning(messages.RESTART, "SIGHUP")
            self._stop.restarts = True
            self._stop.ask("warm", self.options.grace_s)

        return {
            "warm": warm,
            "cold": cold,
            "restart": again,
            "dump": lambda: dump_stacks(self.pool.pids),
            "grow": self.pool.grow,
            "shrink": self.pool.shrink,
        }

    def _stop_by_program(self, how: str) -> None:
        self._signum = signal.SIGQUIT if how == "cold" else signal.SIGTERM
        self._stop_by_command(how)

    def _stop_by_command(self, how: str) -> None:
        self._actions()[how]()

    def _note_signal(self, number: signal.Signals) -> None:
        self._signum = number

    def _say(self, text: str) -> None:
        if self._owns_process:
            say(text)
        else:
            logger.warning("%s", text)

    def _on_fatal(self, error: FastqError) -> None:
        logger.critical("%s", error)
        # Without children nothing runs any more; what became of it is still to be stored and told.
        self._stop.fail(error, STORE_WAIT_S if isinstance(error, PoolLost) else 0)

    async def _shut_down(self, serving: asyncio.Task[None] | None) -> None:
        """Receive nothing more, let running calls end (warm) or give them back (cold), settle, disconnect."""
        companion = self.pool.companion
        if companion is not None:
            companion.ask_stop()
        if self._welcoming is not None:
            self._welcoming.cancel()
        if serving is not None:
            # Before Python 3.12 a cancellation may be lost where it meets the end of a wait.
            while not serving.done():
                serving.cancel()
                await asyncio.wait([serving], timeout=0.1)
        if self._consumer is not None and not self._consumer.lost.done():
            try:
                await asyncio.wait_for(self._consumer.cancel(), CANCEL_S)
            except (FastqError, TimeoutError, asyncio.TimeoutError) as error:
                logger.warning("could not cancel the consumer: %s", error)
        self.core.quiet()
        if self._stop.how == "warm" and not self.core.only_stores:
            grace = "" if self.options.grace_s is None else f", for at most {self.options.grace_s:g} s"
            self._say(f"worker: waiting for running tasks to end: {self.core.running}{grace}")
        is_idle = self.core.is_idle if self._stop.is_over else await self._until_idle()
        if self._stop.how == "cold" and self.settings.worker_enable_soft_shutdown_on_idle:
            await self._stop.until_over()  # who sets it has asked for all of the time
        if not is_idle and self.core.only_stores:
            logger.warning(
                "%s tasks have run, but their results could not be stored within %s s; what is not acknowledged yet "
                "will run again",
                self.core.stats()["ledger"]["finished"],
                STORE_WAIT_S,
            )
        elif not is_idle and self.core.running:
            limit_s = self._stop.limit_s
            why = f"running tasks did not end within {limit_s:g} s" if limit_s else "the worker stops at once"
            logger.warning("%s; they are given back: %s", why, self._running_names())
        if not self.core.only_stores:
            self.pool.kill()
            self.core.give_back_running()
        await self.pool.stop(COLD_S)
        if companion is not None:
            await companion.stop()
        self.core.tick()
        await self._disconnect()
        if self._storage is not None:
            await self._storage.close()
        self._stop.check()

    async def _until_idle(self) -> bool:
        """Wait until all that ran is settled; False when the time for that is over."""
        idle = asyncio.Event()
        self.core.on_idle = idle.set
        if self.core.is_idle:
            return True
        over = asyncio.ensure_future(self._stop.until_over())
        waiting = asyncio.ensure_future(idle.wait())
        storing = asyncio.ensure_future(self._until_store_is_given_up())
        await asyncio.wait([over, waiting, storing], return_when=asyncio.FIRST_COMPLETED)
        for each in (over, waiting, storing):
            each.cancel()
        return idle.is_set()

    async def _until_store_is_given_up(self) -> None:
        """Return when all that is left has waited for a result store that is away for long enough."""
        waited_s = 0.0
        while waited_s < STORE_WAIT_S:
            await asyncio.sleep(LOOK_EVERY_S)
            waited_s = waited_s + LOOK_EVERY_S if self.core.only_stores and self.core.is_store_away else 0.0

    def _running_names(self) -> str:
        running = [task for child in self.core.children for task in child.running_tasks]
        shown = ", ".join(f"{name}[{task_id}]" for name, task_id, _ in running[:MAX_NAMED]) or "none"
        return shown + (f" and {len(running) - MAX_NAMED} more" if len(running) > MAX_NAMED else "")

    # --- parts

    async def _save_reply(self, task_id: str, meta: bytes) -> None:
        if self._consumer is not None and self._consumer.replies is not None:
            await self._consumer.replies.save(task_id, meta)

    def _make_pool(self, loop: asyncio.AbstractEventLoop, hooks: Hooks) -> Pool:
        options, settings = self.options, self.settings
        recycles = bool(options.max_tasks_per_child or options.max_memory_per_child)
        wanted = PoolOptions(
            concurrency=self._groups[0].processes,
            on_lost=hooks.child_lost,
            on_fatal=self._on_fatal,
            keeps_spare=settings.fastq_keeps_spare and recycles,
            overlaps=settings.fastq_keeps_spare,
            start_timeout_s=settings.fastq_child_start_timeout or None,
            groups=self._groups,
            stall_s=settings.fastq_loop_stall_s,
        )
        pool: Pool = load(find_pool(options.pool).pool)(loop, self._prepared, wanted)
        return pool

    def _make_core(self, loop: asyncio.AbstractEventLoop, hooks: Hooks) -> Core:
        options, settings = self.options, self.settings
        reliable = bool(options.reliable)
        rules = self.program.task_rules(options)
        if len(self._groups) > 1:
            for task in rules:
                task.group = int(task.name in self.program.async_names)
        core = Core(
            loop,
            rules,
            hooks,
            self.pool,
            reliable=reliable,
            max_deliveries=settings.fastq_max_deliveries,
            max_child_deaths=settings.fastq_max_child_deaths,
            max_tasks_per_child=options.max_tasks_per_child or 0,
            time_limit=options.time_limit or 0,
            soft_time_limit=options.soft_time_limit or 0,
            grace=options.grace_s or 0,
            rpc_results=find_store(self._backend).replies,
            are_many=tuple(group.is_many for group in self._groups),
        )
        core.max_etas = min(core.max_etas, settings.worker_eta_task_limit or core.max_etas)
        core.answers_all = self.program.answers_all and core.rpc_results
        hooks.attach(core, self.pool, self._save_reply)
        return core


def say(text: str) -> None:
    """Log a line that whoever has stopped the worker looks for, and print it where their terminal shows no log."""
    logger.warning("%s", text)
    streams = [getattr(each, "stream", None) for each in logging.getLogger().handlers]
    if sys.__stderr__ is not None and sys.__stderr__ not in streams:
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())
