"""Which signal asks for what, and its way to the worker on its event loop. What the actions do is the worker's affair.

Source: Celery's worker signals, with Sidekiq's and nginx's TTIN/TTOU for one process more or less.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial, update_wrapper
from typing import Any, Final, Literal, cast

from fastq.errors import SettingsError
from fastq.pool.process import DUMP_SIGNAL
from fastq.worker.process.daemon import START_DIRECTORY
from fastq.worker.process.log import log_stream

Action = Literal["warm", "cold", "restart", "dump", "grow", "shrink", "ignore"]

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
    signal.signal = cast("Any", _in_main_thread(loop, take, set_signal))

    def uninstall() -> None:
        signal.signal = set_signal
        for number in table:
            loop.remove_signal_handler(number)

    return uninstall


def _in_main_thread(
    loop: asyncio.AbstractEventLoop, take: Callable[[int, Any], Any], set_signal: Callable[[int, Any], Any]
) -> Callable[[int, Any], Any]:
    """Return ``signal.signal`` for users' code: it runs in other threads than the one that may set handlers."""

    def signal_(signalnum: int, handler: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return take(signalnum, handler)
        done: Future[Any] = Future()

        def set_it() -> None:
            try:
                done.set_result(take(signalnum, handler))
            except Exception as error:  # it is the caller's
                done.set_exception(error)

        loop.call_soon_threadsafe(set_it)
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
    pids = list(children)
    print(f"Stacks of the main process, {os.getpid()}; its children {pids} write theirs below:", file=log, flush=True)
    faulthandler.dump_traceback(log, all_threads=True)
    for pid in pids:
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            continue  # it ended in the meantime


def restart() -> None:
    """Replace this process by a fresh one with the same command line; the pid stays. Returns never."""
    sys.stdout.flush()
    sys.stderr.flush()
    # A relative --workdir in the command line counts from where it was typed.
    os.chdir(os.environ.get(START_DIRECTORY, os.curdir))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  no shell is wanted
