"""The connections that Celery's code has in a child, once the handler of a signal has raised in the midst of their use.

A reply that nobody has read would be taken for that of the next request, so they are exchanged at that moment: after a
soft time limit, and after whatever handlers the application has.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
from collections.abc import Callable
from functools import partial
from signal import valid_signals
from threading import Condition, RLock
from types import FrameType
from typing import Any

import celery
from celery import _state
from kombu import pools, resource

from fastq.pool.outside import watched_locks


class Connections:
    """Those of one process: result stores, broker connections, producers.

    ``are_shared``: other calls that run use them too, so that they are not closed, only given to nobody any more.
    """

    def __init__(self, app: celery.Celery, are_shared: bool = False) -> None:
        self._app = app
        self._are_shared = are_shared
        #: The connection of kombu's that was used last and what it held then, by their ids.
        self._seen = (0, 0)
        #: What closes connections that nobody gets any more.
        self._old: list[Callable[[], object]] = []

    def begin(self) -> None:
        """Get ready in the process that has them: from here on an exception may come between any two steps."""
        made = resource.LifoQueue  # Python's, or kombu's own
        if not issubclass(made, _Reentered):
            resource.LifoQueue = type(made.__name__, (_Reentered, made), {})
        for pool in [*pools.connections.values(), *pools.producers.values()]:
            if getattr(pool._resource, "mutex", None) not in watched_locks:
                _let_reenter(pool._resource)

    def have_old(self) -> bool:
        """Return whether there is something to close, or to free: one was replaced since this was last asked."""
        return bool(self._old) or (self._app._pool is not None and self._has_lost(self._app._pool._resource.queue))

    def _has_lost(self, queue: list[Any]) -> bool:
        held = getattr(queue[-1], "_connection", None) if queue else None
        if held is None:
            return False
        before, self._seen = self._seen, (id(queue[-1]), id(held))
        return before[0] == self._seen[0] and before[1] != self._seen[1]

    def exchange(self) -> None:
        """Have new connections made from now on. Safe between any two steps: it takes no lock and closes no object."""
        # Not kept where they are shared, not even for a moment: another call may be about to close what is old.
        old = [] if self._are_shared else self._old
        for pool in () if self._are_shared else list(pools.connections.values()):
            for connection in pool._dirty.copy():
                _hang_up(connection)
        for group in (pools.producers, pools.connections):
            old += [partial(_close_pool, pool) for pool in list(group.values())]
            group.clear()
        # New ones, not none: what was interrupted goes on where Python ignores the exception, in a __del__ for one.
        producers = getattr(vars(self._app).get("amqp"), "_producer_pool", None)
        if self._app._pool is not None or producers is not None:
            pools.set_limit(self._app.conf.broker_pool_limit)
            connection = self._app.connection_for_write()
            self._app._pool = pools.connections[connection]
            self._app.amqp._producer_pool = pools.producers[connection]
        task = _state.get_current_task()
        for backend in {id(each): each for each in (self._app._backend, task and task.backend) if each}.values():
            _exchange_of(backend, old)

    def close_old(self) -> None:
        """Close what was exchanged, and free what lost connections have left: kombu leaves their sockets in cycles."""
        old, self._old = self._old, []
        for close in old:
            with contextlib.suppress(Exception):
                close()
        gc.collect()
        # What was interrupted may have gone on, where Python ignores the exception, and built on what is closed now.
        producers = getattr(vars(self._app).get("amqp"), "_producer_pool", None)
        if producers is not None and producers.connections._closed:
            pools.producers.clear()
            self._app.amqp._producer_pool = None
            if self._app._pool is not None and self._app._pool._closed:
                self._app._pool = None


class _Reentered:
    """What a queue of free connections is that one of kombu's pools makes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _let_reenter(self)


def _let_reenter(queue: Any) -> None:
    """Give a queue that nobody uses yet a lock that its thread can take again.

    The queue takes and gives it in steps of their own. An exception between two of them leaves it taken, and kombu,
    which gives back the connection then, would wait for it for ever.
    """
    queue.mutex = lock = RLock()
    watched_locks.add(lock)
    queue.not_empty, queue.not_full, queue.all_tasks_done = Condition(lock), Condition(lock), Condition(lock)


def _exchange_of(backend: Any, old: list[Callable[[], object]]) -> None:
    client = vars(backend).pop("client", None)
    if (pool := getattr(client, "connection_pool", None)) is not None:  # Redis
        old.append(pool.disconnect)
    elif (close := getattr(client, "disconnect_all", None)) is not None:  # memcached
        old.append(close)
    sessions = getattr(backend, "session_manager", None) or _default_sessions(backend)
    if sessions is not None:
        old += [engine.dispose for engine in sessions._engines.values()]
        sessions._engines, sessions._sessions = {}, {}
    consumer: Any = getattr(backend, "result_consumer", None)
    if getattr(consumer, "_pubsub", None) is not None or getattr(consumer, "_connection", None) is not None:
        old += [partial(_hang_up, getattr(consumer, "_connection", None)), consumer.on_after_fork]


def _close_pool(pool: Any) -> None:
    for connection in [*pool._dirty, *pool._resource.queue]:
        _hang_up(connection)
    pool.force_close_all()


def _hang_up(connection: Any) -> None:
    """End kombu's connection if it speaks AMQP: with half a frame sent, a goodbye would never be answered."""
    transport: Any = getattr(getattr(connection, "_connection", None), "_transport", None)
    with contextlib.suppress(OSError, AttributeError):  # one that is not open
        transport.sock.shutdown(socket.SHUT_RDWR)


def _default_sessions(backend: Any) -> Any:
    """Return what holds the engines of a database in a Celery before 5.7; None for other stores."""
    method = getattr(type(backend), "ResultSession", None)
    return None if method is None else (method.__defaults__ or (None,))[0]


def watch_handlers(on_raise: Callable[[], None]) -> None:
    """Call ``on_raise`` when the handler of a signal raises, before the exception goes on; whoever sets it, and when.

    Handlers are called by way of one of ours, which nobody gets to see.
    """
    # Where the functions of `signal` look for these at each call: some have imported those by name.
    module: Any = sys.modules["_signal"]
    set_handler, get_handler = module.signal, module.getsignal

    def signal(signalnum: int, handler: Any) -> Any:
        return _inside(set_handler(signalnum, _Watched(handler, on_raise) if callable(handler) else handler))

    def getsignal(signalnum: int) -> Any:
        return _inside(get_handler(signalnum))

    module.signal, module.getsignal = signal, getsignal
    for signum in valid_signals():
        handler = get_handler(signum)
        if callable(handler):
            signal(signum, handler)


class _Watched:
    """A handler that tells when it raises."""

    __slots__ = ("handler", "on_raise")

    def __init__(self, handler: Callable[[int, FrameType | None], Any], on_raise: Callable[[], None]) -> None:
        self.handler = handler
        self.on_raise = on_raise

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            self.handler(signum, frame)
        except BaseException:
            self.on_raise()
            raise


def _inside(handler: Any) -> Any:
    return handler.handler if type(handler) is _Watched else handler
