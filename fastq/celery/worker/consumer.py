"""What users' code is shown for Celery's worker, consumer and pool: objects of Celery's classes with our parts in them.

Nothing here starts or stops anything by itself. Imported before the fork: no event loop of ours, no core.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import celery
from celery import bootsteps
from celery.apps import worker as celery_worker
from celery.concurrency.base import BasePool
from celery.exceptions import TaskRevokedError
from celery.worker import consumer as celery_consumer
from kombu.common import ignore_errors

from fastq.celery.worker.inside import Inside, TaskConsumer
from fastq.worker.remote.commands.worker import stats

if TYPE_CHECKING:
    from fastq.celery.worker.threads import HubThread
    from fastq.worker.options import WorkerOptions


class Worker(celery_worker.Worker):  # type: ignore[misc]  # Celery is not typed
    """The worker, as signals and steps of the worker get it."""

    use_eventloop = True

    def __init__(self, app: celery.Celery, options: WorkerOptions, thread: HubThread) -> None:
        self.app = app
        self.options = options_of(options)
        self.hostname = options.hostname
        self.startup_time = datetime.now(timezone.utc)
        self.concurrency = options.concurrency
        self.autoscale = options.autoscale
        self.loglevel = logging.getLevelName(options.loglevel)
        self.logfile = options.logfile or None
        self.pidfile = options.pidfile or None
        self.task_events = options.task_events
        self.prefetch_multiplier = options.prefetch_multiplier or app.conf.worker_prefetch_multiplier
        self.time_limit = options.time_limit
        self.soft_time_limit = options.soft_time_limit
        self.max_tasks_per_child = options.max_tasks_per_child
        self.max_memory_per_child = options.max_memory_per_child
        self.disable_rate_limits = app.conf.worker_disable_rate_limits
        self.pool_cls = Pool
        self.pid = os.getpid()
        self.steps: list[Any] = []
        self.blueprint = bootsteps.Blueprint(name="Worker")
        self._ask_stop: Callable[[str], None] | None = None
        self._asked = ""
        #: The running worker; from its first connection on.
        self.inside: Inside | None = None
        self._thread = thread
        self.consumer = Consumer(self)

    @property
    def hub(self) -> Any:
        """Return the event loop of the steps' thread."""
        return self._thread.hub

    @property
    def timer(self) -> Any:
        """Return the timer of the steps' thread."""
        return self._thread.hub.timer

    def stats(self) -> dict[str, Any]:
        """Return what ``inspect stats`` shows; {} before the worker is connected."""
        found: dict[str, Any] = {} if self.inside is None else self.inside.ask(stats)
        return found

    def start(self) -> None:
        """Nothing to do: it runs."""

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Ask for a warm stop, from any thread."""
        self._stop("warm")

    def terminate(self, in_sighandler: bool = False) -> None:
        """Ask for a cold stop, from any thread."""
        self._stop("cold")

    def _stop(self, how: str) -> None:
        if self._ask_stop is None:
            self._asked = how  # as soon as that can be done
        else:
            self._ask_stop(how)

    def can_stop(self, ask_stop: Callable[[str], None]) -> None:
        """Ask for stops in this way from now on."""
        self._ask_stop = ask_stop
        if self._asked:
            ask_stop(self._asked)


class Consumer(celery_consumer.Consumer):  # type: ignore[misc]
    """The consumer, as signals, steps of the consumer and strategies get it. Its connection is for users alone."""

    heart = gossip = pidbox_node = mingle = None
    restart_count = 0
    event_dispatcher: Any = None
    qos: Any = None

    def __init__(self, controller: Worker) -> None:
        self.controller = controller
        self.app = controller.app
        self.hostname = controller.hostname
        self.pid = controller.pid
        self.steps: list[Any] = []
        self.blueprint = bootsteps.Blueprint(name="Consumer")
        self.initial_prefetch_count = (controller.concurrency or 1) * controller.prefetch_multiplier
        self.prefetch_multiplier = controller.prefetch_multiplier
        self.disable_rate_limits = controller.disable_rate_limits
        self.task_buckets: Any = defaultdict(lambda: None)
        self.on_task_message: set[Callable[[Any], None]] = set()
        self.on_task_request = self._execute
        self.strategies = _Strategies(self)
        self._strategies_of_all = [self.strategies]
        self.conninfo = self.app.connection_for_read()
        self.connection_errors = self.conninfo.connection_errors
        self.channel_errors = self.conninfo.channel_errors
        self.amqheartbeat = 0
        self._limit_order = 0
        self._maximum_prefetch_restored = True
        self._pending_operations: deque[Any] = deque()
        self._connection: Any = None

    @property
    def task_consumer(self) -> TaskConsumer | None:
        """Return what receives tasks; None before the first connection."""
        inside = self.controller.inside
        return None if inside is None else TaskConsumer(self.app, inside)

    def update_strategies(self) -> None:
        """Have strategies made anew, here and where messages are handled, each when it is needed."""
        for strategies in self._strategies_of_all:
            strategies.clear()

    @property
    def pool(self) -> Any:
        """Return the pool."""
        return self.controller.pool

    @property
    def hub(self) -> Any:
        """Return the event loop of the steps' thread."""
        return self.controller.hub

    @property
    def timer(self) -> Any:
        """Return the timer of the steps' thread."""
        return self.controller.timer

    @property
    def connection(self) -> Any:
        """Return a connection of kombu's to the broker, made when it is asked for first."""
        if self._connection is None:
            self._connection = self.connect()
        return self._connection

    @connection.setter
    def connection(self, connection: Any) -> None:
        self._connection = connection

    @property
    def has_connection(self) -> bool:
        """Return whether the connection has been made."""
        return self._connection is not None

    def drop_connection(self) -> None:
        """Close the connection; it is made again when it is asked for."""
        connection, self._connection = self._connection, None
        if connection is not None:
            ignore_errors(connection, connection.close)

    def _widen(self, n: int) -> None:
        if (inside := self.controller.inside) is not None:
            inside.look(lambda view: view.window.widen(n), None)

    def for_strategies(self, timer: Any, on_park: Callable[[int], None]) -> Consumer:
        """Return the consumer that strategies get: it works in another thread, with this timer and no event loop."""
        other = copy.copy(self)
        other.__class__ = _StrategyConsumer
        other.own_timer = timer
        other.strategies = _Strategies(other)
        self._strategies_of_all.append(other.strategies)
        other.qos = Qos(on_park, self.controller)
        self.qos = Qos(self._widen, self.controller)
        other.on_task_request = other._execute
        other._pending_operations = deque()
        other.reset_rate_limits()
        return other

    def start(self) -> None:
        """Nothing to do: it runs."""

    def stop(self) -> None:
        """Nothing to do: the worker stops it."""

    def shutdown(self) -> None:
        """Nothing to do: the worker stops it."""

    def _execute(self, request: Any) -> None:
        try:
            request.execute_using_pool(self.pool)
        except TaskRevokedError:
            return


class _StrategyConsumer(Consumer):
    own_timer: Any = None
    hub = None  # callbacks of acknowledgements are called at once, as without an event loop

    @property
    def timer(self) -> Any:
        """Return the timer of the strategies' thread."""
        return self.own_timer


_StrategyConsumer.__name__ = _StrategyConsumer.__qualname__ = "Consumer"


class _Strategies(dict[str, Any]):
    """Handlers of messages by task, one for each task, made when it is needed first.

    ``ours`` stand for strategies of Celery's.
    """

    def __init__(self, consumer: Consumer) -> None:
        super().__init__()
        self._consumer = consumer
        self.ours: dict[str, Any] = {}

    def __missing__(self, name: str) -> Any:
        consumer = self._consumer
        handler = self.ours.get(name) or consumer.app.tasks[name].start_strategy(consumer.app, consumer)
        self[name] = handler
        return handler

    def __contains__(self, name: object) -> bool:
        return name in self._consumer.app.tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._consumer.app.tasks)

    def __len__(self) -> int:
        return len(self._consumer.app.tasks)

    get, keys, values, items = Mapping.get, Mapping.keys, Mapping.values, Mapping.items  # type: ignore[assignment]


class Qos:
    """The prefetch window as strategies and users' code see it.

    ``widen``: strategies say how many messages only wait for their time, users how many more may be here.
    """

    def __init__(self, widen: Callable[[int], None], controller: Worker) -> None:
        self._widen = widen
        self._controller = controller

    @property
    def value(self) -> int:
        """How many messages may be here; 0: any number."""
        inside = self._controller.inside
        return 0 if inside is None else int(inside.look(lambda view: view.core.prefetch, 0))

    def increment_eventually(self, n: int = 1) -> None:
        """Let that many messages more be here."""
        self._widen(n)

    def decrement_eventually(self, n: int = 1) -> None:
        """Take that back."""
        self._widen(-n)


class Heart:
    """What sends heartbeats, as receivers of ``heartbeat_sent`` get it."""

    def __init__(self, consumer: Consumer, interval: float) -> None:
        self.eventer = consumer.event_dispatcher
        self.interval = interval


class Pool(BasePool):  # type: ignore[misc]
    """The pool of child processes: calls of any function, with their callbacks in the strategies' thread."""

    is_green = False

    def __init__(self, apply: Callable[..., Any], get_pool: Callable[[], Any], app: celery.Celery) -> None:
        super().__init__(app=app)
        self._apply = apply
        self._get_pool = get_pool
        self._state = self.RUN

    def on_apply(self, target: Callable[..., Any], args: Any, kwargs: Any, **options: Any) -> Any:
        """Have a child call the function; return what stands for the call."""
        return self._apply(target, tuple(args), dict(kwargs), **options)

    @property
    def num_processes(self) -> int:
        """Return how many children there are."""
        size: int = self._get_pool().size
        return size

    def _get_info(self) -> dict[str, Any]:
        pool = self._get_pool()
        return {"implementation": "fastq", "max-concurrency": pool.size, "processes": list(pool.pids)}

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Send a child a signal."""
        os.kill(pid, signal or _TERM)


_TERM = signal.SIGTERM


def options_of(options: WorkerOptions) -> dict[str, Any]:
    """Return the options by Celery's names."""
    return {
        "concurrency": options.concurrency,
        "loglevel": options.loglevel,
        "logfile": options.logfile or None,
        "pidfile": options.pidfile or None,
        "statedb": options.statedb or None,
        "queues": list(options.queues),
        "hostname": options.hostname,
        "task_events": options.task_events,
        "time_limit": options.time_limit,
        "soft_time_limit": options.soft_time_limit,
        "max_tasks_per_child": options.max_tasks_per_child,
        "max_memory_per_child": options.max_memory_per_child,
        "prefetch_multiplier": options.prefetch_multiplier,
        "autoscale": options.autoscale,
    }
