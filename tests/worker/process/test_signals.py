"""Which signal asks the worker for what."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from fastq.errors import SettingsError
from fastq.worker.process.signals import SIGNALS, action_table, install
from tests import ROOT

ACTIONS = ("warm", "cold", "restart", "dump", "grow", "shrink")


async def asked_by(*signals: signal.Signals) -> list[str]:
    """Return the actions that these signals, sent one after another, ask for."""
    asked: list[str] = []
    loop = asyncio.get_running_loop()

    def note(action: str) -> Callable[[], None]:
        return lambda: asked.append(action)

    uninstall = install(loop, {action: note(action) for action in ACTIONS})
    try:
        for number in signals:
            os.kill(os.getpid(), number)
            # The signal comes in through a pipe that the loop reads: two turns see to it.
            seen = len(asked)
            for _ in range(50):
                await asyncio.sleep(0.001)
                if len(asked) > seen:
                    break
    finally:
        uninstall()
    return asked


def run(*signals: signal.Signals) -> list[str]:
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(asked_by(*signals))
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("number", "action"),
    [
        (signal.SIGTERM, ["warm"]),
        (signal.SIGINT, ["warm"]),
        (signal.SIGQUIT, ["cold"]),
        (signal.SIGHUP, ["restart"]),
        (signal.SIGUSR1, ["dump"]),
        (signal.SIGTTIN, ["grow"]),
        (signal.SIGTTOU, ["shrink"]),
        (signal.SIGWINCH, []),
        (signal.SIGUSR2, []),
    ],
)
def test_each_signal_asks_for_its_action(
    number: signal.Signals, action: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REMAP_SIGTERM", raising=False)
    with open(os.devnull, encoding="utf-8") as null:
        monkeypatch.setattr(sys, "stdin", null)
        assert run(number) == action


def test_asking_twice_to_stop_means_at_once() -> None:
    assert run(signal.SIGTERM, signal.SIGTERM) == ["warm", "cold"]
    assert run(signal.SIGINT, signal.SIGTERM, signal.SIGTERM) == ["warm", "cold", "cold"]


def test_other_signals_in_between_change_nothing() -> None:
    assert run(signal.SIGTTIN, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) == ["grow", "warm", "dump", "cold"]


def test_term_can_be_made_a_cold_stop() -> None:
    assert action_table(False, {"REMAP_SIGTERM": "SIGQUIT"})[signal.SIGTERM] == "cold"
    assert action_table(False, {})[signal.SIGTERM] == "warm"
    with pytest.raises(SettingsError, match="REMAP_SIGTERM is 'SIGKILL'; use SIGQUIT"):
        action_table(False, {"REMAP_SIGTERM": "SIGKILL"})


def test_a_closed_terminal_stops_the_worker_instead_of_restarting_it() -> None:
    assert action_table(True, {})[signal.SIGHUP] == "warm"
    assert action_table(False, {})[signal.SIGHUP] == "restart"


def test_no_signal_that_ends_a_process_by_default_is_forgotten() -> None:
    ending = {"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"}
    assert ending <= {number.name for number in SIGNALS}


RESTART = """
import os, sys
from fastq.worker.process.daemon import restart
print(os.getpid(), os.getcwd(), sys.argv[1:], flush=True)
if os.environ.setdefault("TURN", "1") == "1":
    os.environ["TURN"] = "2"
    os.chdir("/")
    os.environ["FASTQ_START_DIRECTORY"] = sys.argv[1]
    restart()
"""


def test_a_restart_keeps_pid_arguments_and_the_place_where_it_was_started(tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(RESTART)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "b c"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.endswith(f"{tmp_path} ['{tmp_path}', 'b c']")


DUMP = """
import faulthandler, logging, os, signal, sys
from fastq.pool.process import DUMP_SIGNAL
from fastq.worker.process.signals import dump_stacks
logging.getLogger().addHandler(logging.FileHandler(sys.argv[1]))
reader, writer = os.pipe()
child = os.fork()
def stuck_in_the_child():
    os.write(writer, b"x")
    signal.pause()
if not child:
    faulthandler.register(DUMP_SIGNAL, file=open(sys.argv[1] + ".child", "w"), chain=True)
    stuck_in_the_child()
def asking():
    dump_stacks([child, 2**22 - 1])
os.read(reader, 1)
asking()
os.waitpid(child, 0)
"""


def test_stacks_of_parent_and_children_are_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", DUMP, str(log)], check=True, timeout=20, cwd=ROOT)
    assert "in asking" in log.read_text()
    assert "in stuck_in_the_child" in (tmp_path / "log.child").read_text()
