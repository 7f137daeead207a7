"""Leaving the terminal and root behind, and a worker that runs in the background."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastq.errors import SettingsError
from fastq.worker.process.daemon import drop_privileges, set_umask, warn_root
from fastq.worker.process.pidfile import is_running
from tests import ROOT
from tests.support.servers import Redis, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

SHOP = """
from fastq import FastQ
app = FastQ("shop", broker="sqlite:///shop.db")
"""


def in_child(function: Callable[[], None]) -> str:
    """Run the function in a forked process; return what it raised as text, "" for nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


# -- user and group


@needs_root
def test_privileges_are_dropped_for_good() -> None:
    def become_nobody() -> None:
        drop_privileges("nobody", "")
        assert os.getresuid() == (65534, 65534, 65534)
        assert os.getresgid() == (65534, 65534, 65534)
        assert set(os.getgroups()) <= {65534}
        for call in (lambda: os.setuid(0), lambda: os.setgid(0)):
            try:
                call()
            except PermissionError:
                continue
            raise AssertionError("root was had back")

    assert in_child(become_nobody) == ""


@needs_root
def test_who_is_not_root_cannot_change_user() -> None:
    def try_twice() -> None:
        drop_privileges("nobody", "")
        drop_privileges("nobody", "")  # already so: nothing to do
        drop_privileges("root", "")

    assert in_child(try_twice).startswith("SettingsError('only root may change user and group")


def test_unknown_users_and_groups_are_named() -> None:
    with pytest.raises(SettingsError, match="--uid 'no-such-user' is no user of this machine"):
        drop_privileges("no-such-user", "")
    with pytest.raises(SettingsError, match="--gid 'no-such-group' is no group of this machine"):
        drop_privileges("", "no-such-group")


@needs_root
def test_root_is_warned_and_with_pickles_refused(caplog: pytest.LogCaptureFixture) -> None:
    warn_root(["json"], {})
    assert "superuser privileges" in caplog.text
    for name in ("pickle", "application/x-python-serialize"):
        with pytest.raises(SettingsError, match="refusing to run as root while accept_content has"):
            warn_root(["json", name], {})
    warn_root(["pickle"], {"C_FORCE_ROOT": "1"})


@pytest.mark.parametrize("text", ["", "8", "1000", "-1", "0o1x", "abc"])
def test_a_umask_is_an_octal_number(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--umask is .*; it must be an octal number up to 777"):
        set_umask(text)


# -- a worker in the background


class Background:
    """A worker that was started with -D in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pidfile = folder / "fastq.pid"
        self.log = folder / "worker.log"
        (folder / "shop.py").write_text(SHOP)

    def start(self, *options: str, app: str = "shop") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastq", "-A", app, "worker", "-c", "1", "-l", "INFO", "-D", *options]
        return subprocess.run(
            [*command, "--pidfile", "%n.pid", "--logfile", "worker.log"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @property
    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def wait_for_log(self, text: str, count: int = 1) -> None:
        wait_until(
            lambda: self.log.exists() and self.log.read_text().count(text) >= count,
            20,
            lambda: AssertionError(f"no {text!r} in {self.log.read_text() if self.log.exists() else 'no log'}"),
        )

    def wait_for_end(self, pid: int) -> None:
        wait_until(lambda: not is_running(pid), 30, lambda: AssertionError(f"process {pid} still runs"))


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Background]:
    worker = Background(tmp_path)
    yield worker
    if worker.pidfile.exists():
        pid = worker.pid
        os.kill(pid, signal.SIGKILL)
        worker.wait_for_end(pid)


@pytest.mark.slow
def test_a_detached_worker_restarts_and_stops_on_signals(background: Background) -> None:
    started = background.start()
    assert (started.returncode, started.stderr.replace("WARNING", "").count("Error")) == (0, 0), started.stderr
    background.wait_for_log("ready.")
    pid = background.pid
    assert os.getsid(pid) not in (pid, os.getsid(0))
    assert os.readlink(f"/proc/{pid}/fd/2") == os.devnull
    assert stat.S_IMODE(background.log.stat().st_mode) & 0o137 == 0

    os.kill(pid, signal.SIGHUP)
    background.wait_for_log("ready.", count=2)
    assert background.pid == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(background.folder)

    second = background.start()
    assert second.returncode == 73
    assert f"belongs to process {pid} (" in second.stderr

    os.kill(pid, signal.SIGTERM)
    background.wait_for_end(pid)
    assert not background.pidfile.exists()
    assert "worker: Warm shutdown (MainProcess)" in background.log.read_text()


def named_python(folder: Path) -> tuple[Path, Path]:
    """Return a program that is this Python by another name, and the file in which it writes how it was started."""
    program, started = folder / "python-by-name", folder / "started"
    program.write_text(f'#!/bin/sh\necho "$@" >> {started}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program, started


@pytest.mark.slow
def test_another_python_runs_it_when_it_is_detached(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    program, started = named_python(background.folder)
    monkeypatch.setenv("FASTQ_EXECUTABLE", str(program))  # of a worker that has started this one
    done = background.start("--executable", str(program))
    assert done.returncode == 0, done.stderr
    background.wait_for_log("ready.")
    pid = background.pid
    assert started.read_text().startswith("-m fastq -A shop worker")
    os.kill(pid, signal.SIGHUP)
    background.wait_for_log("ready.", count=2)
    assert started.read_text().count("\n") == 1
    os.kill(pid, signal.SIGTERM)
    background.wait_for_end(pid)


@pytest.mark.slow
@pytest.mark.redis
def test_the_settings_of_a_celery_application_name_the_python(background: Background, redis_server: Redis) -> None:
    program, started = named_python(background.folder)
    (background.folder / "proj.py").write_text(
        f"import celery\napp = celery.Celery('proj', broker={redis_server.url(6)!r})\n"
        f"app.conf.update(worker_executable={str(program)!r}, broker_connection_retry_on_startup=True)\n"
    )
    done = background.start("-n", "fastq@%h", app="proj")
    assert done.returncode == 0, done.stderr
    background.wait_for_log("ready.")
    pid = background.pid
    assert started.read_text().count("\n") == 1
    assert os.readlink(f"/proc/{pid}/fd/2") == os.devnull
    os.kill(pid, signal.SIGTERM)
    background.wait_for_end(pid)


def test_a_python_that_is_not_there_is_named(background: Background) -> None:
    done = background.start("--executable", "/no/such/python")
    assert done.returncode == 78
    assert "--executable (worker_executable) is '/no/such/python': No such file or directory" in done.stderr


def test_an_error_at_start_up_is_seen_where_the_command_was_typed(background: Background) -> None:
    (background.folder / "broken.py").write_text("1 / 0\n")
    done = background.start(app="broken")
    assert done.returncode == 1
    assert "module 'broken' does not import (-A broken): ZeroDivisionError" in done.stderr
    assert not background.pidfile.exists()


def test_an_error_after_that_is_in_the_log(background: Background) -> None:
    (background.folder / "far.py").write_text(
        "from fastq import FastQ\n"
        "app = FastQ('far', broker='amqp://127.0.0.1:1//', broker_connection_retry=False, "
        "broker_connection_retry_on_startup=False)\n"
    )
    done = background.start(app="far")
    assert done.returncode == 0, done.stderr
    background.wait_for_log("CRITICAL/MainProcess] cannot connect to RabbitMQ at amqp://guest:**@127.0.0.1:1/")
    wait_until(lambda: not background.pidfile.exists(), 20, lambda: AssertionError("the pid file stayed"))
