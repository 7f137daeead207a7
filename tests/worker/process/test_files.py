"""Files that an operator names, in folders where somebody else may have put a link to another file.

Links are made by ``nobody`` and followed, or not, by root: those tests need root.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq.errors import SettingsError
from fastq.worker.process.exitcodes import CannotCreate
from fastq.worker.process.files import check_file, open_file
from fastq.worker.process.log import open_handler
from fastq.worker.process.pidfile import Pidfile
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.revoked import Revoked, StateFile
from tests import ROOT as FOLDER
from tests.support.servers import wait_until
from tests.support.worker_process import WorkerProcess

ROOT = str(FOLDER)
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be misled to a file of root's")

SHOP = """
from fastq import FastQ
app = FastQ("shop", broker="sqlite:///shop.db")
"""
CELERY_SHOP = """
import celery
app = celery.Celery("shop", broker="redis://127.0.0.1:1/0")
"""


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder of nobody's that everybody may look into, as pytest's own folders cannot be."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of root's."""
    path = tmp_path / "precious"
    path.write_text("precious\n")
    path.chmod(0o644)
    return path


def link(path: Path, target: Path) -> Path:
    """Make a link of nobody's."""
    path.symlink_to(target)
    os.lchown(path, NOBODY, NOBODY)
    return path


def readable_python() -> tuple[str, str]:
    """Return a Python of this version that every user may run, and its path to the packages here."""
    found = sys.executable, ""
    if not all(os.stat(path).st_mode & 0o5 == 0o5 for path in (sys.base_prefix, *Path(sys.base_prefix).parents)):
        other = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/local/bin:/usr/bin")
        if other is None:
            pytest.skip(f"no user but root may read {sys.base_prefix}, and there is no other Python of this version")
        found = other, sysconfig.get_path("purelib")
    return found


def run_worker(folder: Path, app: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "shop.py").write_text(SHOP)
    (folder / "celery_shop.py").write_text(CELERY_SHOP)
    python, packages = readable_python()
    return subprocess.run(
        [python, "-m", "fastq", "-A", app, "worker", "-c", "1", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, packages])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# -- a worker that root has started


@needs_root
@pytest.mark.parametrize("app", ["shop", "celery_shop"])
@pytest.mark.parametrize("option", ["--logfile", "--pidfile"])
@pytest.mark.parametrize("user", [["--uid", "nobody"], []])
def test_a_link_of_the_users_leads_root_nowhere(
    theirs: Path, precious: Path, app: str, option: str, user: list[str]
) -> None:
    done = run_worker(theirs, app, *user, option, str(link(theirs / "w.file", precious)))
    assert done.returncode == 73, done.stderr
    assert option in done.stderr
    found = precious.stat()
    assert (found.st_uid, precious.read_text()) == (0, "precious\n")


@needs_root
def test_files_are_those_of_the_user_that_the_worker_becomes(theirs: Path) -> None:
    python, packages = readable_python()
    logs = theirs / "log"
    logs.mkdir(mode=0o700)
    done = run_worker(theirs, "shop", "--uid", "nobody", "-f", str(logs / "w.log"))
    assert done.returncode == 73
    assert "Permission denied. Choose a file that this user may write with --logfile" in done.stderr
    assert list(logs.iterdir()) == []

    os.chown(logs, NOBODY, NOBODY)
    worker = WorkerProcess(
        theirs, "--uid", "nobody", "-f", "log/%n.log", "--pidfile", "log/%n.pid", "-c", "1", source=SHOP
    )
    worker._command[0], worker._environment["PYTHONPATH"] = python, os.pathsep.join([str(theirs), ROOT, packages])
    worker._await_ready = False
    worker.start()
    try:
        log = logs / "fastq.log"
        wait_until(lambda: log.exists() and "ready." in log.read_text(), 30, lambda: AssertionError(worker.log()))
        assert {(path.name, path.stat().st_uid) for path in logs.iterdir()} == {
            ("fastq.log", NOBODY),
            ("fastq.pid", NOBODY),
        }
        assert worker.stop() == 0
        assert not (logs / "fastq.pid").exists()
    finally:
        worker.kill9()


# -- each kind of file


@needs_root
@pytest.mark.parametrize("celery", [False, True])
def test_a_log_that_was_replaced_by_a_link_is_not_followed_but_written_on(
    theirs: Path, precious: Path, celery: bool
) -> None:
    log = theirs / "w.log"
    made = "h = open_handler(sys.argv[1], 'w@h')"
    if celery:
        made = (
            "import celery\n"
            "from fastq.celery.worker.logs import set_up\n"
            "from fastq.worker.options import WorkerOptions\n"
            "set_up(celery.Celery(), WorkerOptions(logfile=sys.argv[1], loglevel='INFO'))\n"
            "h = next(each for each in logging.getLogger().handlers if hasattr(each, 'baseFilename'))"
        )
    script = (
        f"import logging, os, sys\nfrom fastq.worker.process.log import open_handler\n{made}\n"
        "say = lambda text: h.emit(logging.makeLogRecord({'msg': text}))\n"
        "say('one')\n"
        "os.rename(sys.argv[1], sys.argv[1] + '.1')\n"
        "os.symlink(sys.argv[2], sys.argv[1]); os.lchown(sys.argv[1], 65534, 65534)\n"
        "say('two')\n"
        "os.unlink(sys.argv[1])\n"
        "say('three')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(log), str(precious)], check=True, timeout=60)
    assert precious.read_text() == "precious\n"
    assert [line.split()[-1] for line in Path(f"{log}.1").read_text().splitlines()] == ["one", "two"]
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["three"]
    assert stat.S_IMODE(log.stat().st_mode) & 0o137 == 0


@needs_root
def test_a_folder_that_is_a_link_of_the_users_is_not_entered(theirs: Path, tmp_path: Path) -> None:
    link(theirs / "logs", tmp_path)
    with pytest.raises(CannotCreate, match=r"is a link of user 65534.*--logfile"):
        open_handler(str(theirs / "logs" / "w.log"), "w@h")
    with pytest.raises(CannotCreate, match=r"is a link of user 65534.*--pidfile"):
        Pidfile(str(theirs / "logs" / "w.pid")).acquire()
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_another_name_of_a_file_of_roots_is_not_written(theirs: Path) -> None:
    mine = theirs / "mine"
    mine.write_text("precious")
    os.link(mine, theirs / "w.log")
    with pytest.raises(CannotCreate, match="has another name"):
        open_handler(str(theirs / "w.log"), "w@h")


def test_links_of_our_own_are_followed(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "deep")
    (tmp_path / "relative").symlink_to("absolute/er/../er")
    (tmp_path / "w.log").symlink_to("relative/file")
    os.close(open_file(str(tmp_path / "w.log"), os.O_WRONLY | os.O_CREAT, 0o600))
    assert (tmp_path / "deep" / "er" / "file").exists()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        open_file(str(tmp_path / "round"), os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        open_file(str(tmp_path / "none" / "file"), os.O_RDONLY)
    with pytest.raises(NotADirectoryError):
        open_file(str(tmp_path / "deep" / "er" / "file" / "x"), os.O_WRONLY | os.O_CREAT)
    check_file(str(tmp_path / "no-such-file"))


def test_standard_streams_can_be_named() -> None:
    script = (
        "import logging\nfrom fastq.worker.process.log import open_handler\n"
        "for name in ('/dev/stdout', '/dev/stderr', '/proc/self/fd/1'):\n"
        "    open_handler(name, 'w@h').emit(logging.makeLogRecord({'msg': name}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("/dev/stdout\n/proc/self/fd/1\n", "/dev/stderr\n")


@pytest.mark.parametrize("text", ["no number", "-3", "1.5\n", "# key = value\n"])
def test_what_is_no_pid_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.pid"
    path.write_text(text)
    with pytest.raises(CannotCreate, match=r"holds something else than a pid.*--pidfile"):
        Pidfile(str(path)).acquire()
    assert path.read_text() == text


def test_the_state_file_is_for_its_owner_only(tmp_path: Path) -> None:
    state = StateFile(str(tmp_path / "state"))
    state.load(Revoked(), LamportClock())
    state.save(Revoked(), LamportClock())
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


@needs_root
def test_root_keeps_no_state_in_a_folder_of_somebody_elses(theirs: Path, precious: Path) -> None:
    with pytest.raises(SettingsError, match=r"others than root may change .*--uid"):
        StateFile(str(theirs / "state")).load(Revoked(), LamportClock())
    assert list(theirs.iterdir()) == []


@needs_root
@pytest.mark.parametrize("suffix", ["", ".db", ".dat", ".dir"])
def test_the_schedule_of_beat_is_no_link_of_somebody_elses(theirs: Path, tmp_path: Path, suffix: str) -> None:
    import celery

    from fastq.celery.worker.beat import Beat

    link(theirs / f"schedule{suffix}", tmp_path / "made")
    with pytest.raises(SettingsError, match=r"is a link of user 65534.*--schedule"):
        Beat(celery.Celery(set_as_current=False), str(theirs / "schedule"), "")
