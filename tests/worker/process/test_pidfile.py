"""The pid file: who may write it, when it is stale, who removes it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from fastq.worker.process.exitcodes import EX_CANTCREAT, CannotCreate, exit_code_of
from fastq.worker.process.pidfile import Pidfile, is_running

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.pid"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()


def test_the_file_holds_the_pid_and_is_readable_by_all(path: Path) -> None:
    old = os.umask(0o077)
    try:
        with Pidfile(str(path)):
            assert path.read_text() == f"{os.getpid()}\n"
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(old)
    assert not path.exists()


def test_a_file_of_a_running_process_is_refused_with_its_command(path: Path, other: subprocess.Popen[bytes]) -> None:
    path.write_text(f"{other.pid}\n")
    with pytest.raises(CannotCreate, match=f"process {other.pid} .*sys.stdin.read.*which is running") as raised:
        Pidfile(str(path)).acquire()
    assert exit_code_of(raised.value) == EX_CANTCREAT
    assert path.read_text() == f"{other.pid}\n"


def test_a_file_of_a_dead_process_is_taken_over(path: Path, other: subprocess.Popen[bytes]) -> None:
    path.write_text(f"{other.pid}\n")
    other.kill()
    other.wait()
    with Pidfile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_zombie_does_not_run(other: subprocess.Popen[bytes]) -> None:
    assert is_running(other.pid)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(other.pid)


@pytest.mark.parametrize("text", ["", "\n", "0", "9" * 30, "\0\0"])
def test_a_file_without_a_pid_is_stale(path: Path, text: str) -> None:
    path.write_text(text)
    with Pidfile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"


def test_our_own_pid_is_no_obstacle(path: Path) -> None:
    path.write_text(f"{os.getpid()}\n")
    with Pidfile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_an_empty_path_means_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Pidfile(""):
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_does_not_exist_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match=r"No such file or directory.*--pidfile"):
        Pidfile(str(tmp_path / "none" / "worker.pid")).acquire()


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(CannotCreate):
        Pidfile(str(path)).acquire()
    assert victim.read_text() == "precious"


def test_a_forked_child_leaves_the_file_alone(path: Path) -> None:
    with Pidfile(str(path)) as pidfile:
        child = os.fork()
        if child == 0:
            pidfile.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert path.exists()


def test_a_file_that_another_worker_has_written_since_is_left_alone(path: Path) -> None:
    with Pidfile(str(path)):
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def acquire(path: str) -> str:
    """Return the pid when the file is ours, and leave it there; in a process of its own."""
    try:
        Pidfile(path).acquire()
    except CannotCreate:
        return ""
    return str(os.getpid())


def test_of_several_that_find_a_stale_file_at_once_one_wins(path: Path, other: subprocess.Popen[bytes]) -> None:
    other.kill()
    other.wait()
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        # The pool keeps its processes, so that a winner still runs when the others look.
        for _ in range(10):
            path.write_text(f"{other.pid}\n")
            winners = set(pool.map(acquire, [str(path)] * 8)) - {""}
            assert len(winners) == 1
            assert path.read_text().strip() in winners
