"""Which signal asks for what, and its way to the worker on its event loop. What the actions do is the worker's affair.

Source: Celery's worker signals, with Sidekiq's and nginx's TTIN/TTOU for one process more or less.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial, update_wrapper
from typing import Any, Final, Literal, TypeAlias, cast

from fastq.errors import SettingsError
from fastq.pool.process import DUMP_SIGNAL
from fastq.worker.process.log import log_stream

Action = Literal["warm", "cold", "restart", "dump", "grow", "shrink", "ignore"]

#: Routes the signals to a worker on its loop and returns what undoes it: ``install``, or ``HandlersBeside.install``.
Install: TypeAlias = Callable[
    [asyncio.AbstractEventLoop, Mapping[str, Callable[[], None]], Callable[[signal.Signals], None]], Callable[[], None]
]

#: TERM's entry can be remapped and HUP's depends on the terminal: ask ``action_table``.
SIGNALS: Final[Mapping[signal.Signals, Action]] = {
    signal.SIGTERM: "warm",
    signal.SIGINT: "warm",
    signal.SIGQUIT: "cold",
    signal.SIGHUP: "restart",
    signal.SIGUSR1: "dump",
    signal.SIGUSR2: "ignore",  # Celery's remote debugger; the default action would end the process
    signal.SIGTTIN: "grow",
    signal.SIGTTOU: "shrink",
    signal.SIGWINCH: "ignore",
}

#: Celery has nothing there: a handler that the application has set before the worker began stays.
_LEFT_TO_OTHERS: Final = ("ignore", "grow", "shrink")
#: Interrupts the main thread where it runs calls. Nobody's but ours; ``fastq.pool`` has the ones above it.
_JOBS_SIGNAL: Final = signal.SIGRTMAX - 5
#: How long a thread waits for its handler to be set. Chosen: the loop is never busy for so long.
_SET_S: Final = 10.0

#: REMAP_SIGTERM takes these: the platforms that send TERM only (Heroku) get a cold stop from it.
_REMAPS: Final[Mapping[str, Action]] = {"": "warm", "SIGTERM": "warm", "SIGINT": "warm", "SIGQUIT": "cold"}


def action_table(on_terminal: bool, environ: Mapping[str, str] = os.environ) -> dict[signal.Signals, Action]:
    """Return what each signal asks for here. Raises SettingsError when REMAP_SIGTERM names no usable signal."""
    remap = environ.get("REMAP_SIGTERM", "")
    if remap not in _REMAPS:
        raise SettingsError(f"REMAP_SIGTERM is {remap!r}; use SIGQUIT for a cold stop on TERM, or unset it")
    table = dict(SIGNALS)
    table[signal.SIGTERM] = _REMAPS[remap]
    if on_terminal:
        # There HUP says that the window was closed: nobody is left to see a restarted worker.
        table[signal.SIGHUP] = "warm"
    return table


def is_on_terminal() -> bool:
    """Return whether standard input is a terminal."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def install(
    loop: asyncio.AbstractEventLoop,
    actions: Mapping[str, Callable[[], None]],
    note: Callable[[signal.Signals], None] = lambda number: None,
) -> Callable[[], None]:
    """Route the signals to the actions on the loop and return the function that undoes it.

    ``actions`` holds a callable for each of warm, cold, restart, dump, grow and shrink. A second "warm" becomes "cold".
    ``note`` is told which signal it was, before its action.
    """
    handler = _Handler(actions)
    table = action_table(is_on_terminal())

    def on_signal(number: signal.Signals, action: Action) -> None:
        note(number)
        handler.on_signal(action)

    for number, action in list(table.items()):
        if action in _LEFT_TO_OTHERS and callable(signal.getsignal(number)):
            del table[number]  # the application's own
        else:
            loop.add_signal_handler(number, partial(on_signal, number, action))

    def take(number: int, handler: Any) -> Any:
        """Set a handler of the application's; ours is what it has replaced, and does what it did when it is called."""
        known = next((each for each in table if each == number), None)
        if known is None:
            return set_signal(number, handler)
        action = table.pop(known)
        loop.remove_signal_handler(known)
        set_signal(known, handler)
        return lambda signum, frame: loop.call_soon_threadsafe(on_signal, known, action)

    set_signal: Any = signal.signal
    signal.signal = cast("Any", _in_main_thread(loop.call_soon_threadsafe, take, set_signal))

    def uninstall() -> None:
        signal.signal = set_signal
        for number in table:
            loop.remove_signal_handler(number)

    return uninstall


class HandlersBeside:
    """Handlers in the main thread, which runs calls, for a loop in another one. Make and undo it in the main thread.

    They run between any two steps of a call, and interrupt nothing. What a call forks has the defaults again.
    """

    def __init__(self) -> None:
        self._table = action_table(is_on_terminal())
        self._pass_on: Callable[[signal.Signals], object] | None = None
        self._early: list[signal.Signals] = []
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        for number, action in list(self._table.items()):
            before = signal.getsignal(number)
            if action in _LEFT_TO_OTHERS and callable(before):
                continue  # the application's own
            self._before[number] = before
            signal.signal(number, self._on_signal)
        self._jobs: deque[Callable[[], None]] = deque()
        signal.signal(_JOBS_SIGNAL, self._on_jobs)
        self._set_signal: Any = signal.signal
        signal.signal = cast("Any", _in_main_thread(self._run, self._set_signal, self._set_signal))
        os.register_at_fork(after_in_child=self.restore)

    def install(
        self,
        loop: asyncio.AbstractEventLoop,
        actions: Mapping[str, Callable[[], None]],
        note: Callable[[signal.Signals], None],
    ) -> Callable[[], None]:
        """Have the signals reach the loop, those that came before too; the same as the function of that name."""
        handler = _Handler(actions)

        def on_loop(number: signal.Signals) -> None:
            note(number)
            handler.on_signal(self._table[number])

        def pass_on(number: signal.Signals) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_loop, number)

        def uninstall() -> None:
            self._pass_on = None

        self._pass_on = pass_on
        while self._early:
            pass_on(self._early.pop(0))
        return uninstall

    def restore(self) -> None:
        """Set the handlers that were there before, where ours are there still."""
        signal.signal = self._set_signal
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                is_forked = os.getpid() != self._pid
                signal.signal(number, signal.SIG_DFL if is_forked and callable(before) else before)

    def _run(self, job: Callable[[], None]) -> None:
        """Have it done in the main thread, whatever runs there."""
        self._jobs.append(job)
        signal.pthread_kill(cast("int", threading.main_thread().ident), _JOBS_SIGNAL)

    def _on_jobs(self, signum: int, frame: object) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _on_signal(self, signum: int, frame: object) -> None:
        number = signal.Signals(signum)
        if os.getpid() != self._pid:  # it came between the fork and `restore`
            self.restore()
            os.kill(os.getpid(), signum)
        elif self._pass_on is not None:
            self._pass_on(number)
        else:
            self._early.append(number)


def _in_main_thread(
    run: Callable[[Callable[[], None]], object], take: Callable[[int, Any], Any], set_signal: Callable[[int, Any], Any]
) -> Callable[[int, Any], Any]:
    """Return ``signal.signal`` for users' code: it runs in other threads than the one that may set handlers.

    ``run`` has something done in the main thread.
    """

    def signal_(signalnum: int, handler: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return take(signalnum, handler)
        done: Future[Any] = Future()

        def set_it() -> None:
            try:
                done.set_result(take(signalnum, handler))
            except Exception as error:  # it is the caller's
                done.set_exception(error)

        run(set_it)
        return done.result(_SET_S)

    return update_wrapper(signal_, set_signal)


class _Handler:
    """Remembers that a stop was asked for, so that asking again makes it a cold one."""

    def __init__(self, actions: Mapping[str, Callable[[], None]]) -> None:
        self._actions = {action: actions[action] for action in SIGNALS.values() if action != "ignore"}
        self._is_stopping = False

    def on_signal(self, action: Action) -> None:
        if action == "ignore":
            return
        if action == "warm":
            action = "cold" if self._is_stopping else "warm"
            self._is_stopping = True
        self._actions[action]()


def dump_stacks(children: Iterable[int]) -> None:
    """Write the stacks of all threads of this process to the log, and have each child write its own.

    Children have registered ``faulthandler`` for that, which works even while they are stuck in C.
    """
    log = log_stream()
    pids = [pid for pid in children if pid != os.getpid()]
    those = f"; its children {pids} write theirs below" if pids else ""
    print(f"Stacks of the main process, {os.getpid()}{those}:", file=log, flush=True)
    faulthandler.dump_traceback(log, all_threads=True)
    for pid in pids:
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            continue  # it ended in the meantime
