"""Leaving the terminal and root behind: detach, umask, user and group. Linux and other POSIX systems only.

Nothing here may import user code or start threads: ``detach_process`` forks.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from fastq.errors import SettingsError
from fastq.worker.process.exitcodes import EX_FAILURE, EX_OK

logger = logging.getLogger("fastq.worker.daemon")

_ROOT_WARNING: Final = (
    "You're running the worker with superuser privileges: this is absolutely not recommended! "
    "Choose another user with --uid (uid=%d euid=%d gid=%d egid=%d)"
)
_PICKLE_NAMES: Final = ("pickle", "application/x-python-serialize", "application/x-python")


#: Environment variables that outlive a restart by exec: where the command was typed, and which process is detached.
START_DIRECTORY: Final = "FASTQ_START_DIRECTORY"
_DETACHED_PID: Final = "FASTQ_DETACHED_PID"
#: And those that outlive a start by another Python: which one that was, and where a detached process reports to.
_EXECUTABLE: Final = "FASTQ_EXECUTABLE"
_REPORT: Final = "FASTQ_DETACHED_REPORT"


class Daemon:
    """The detached process's line back to the terminal that started it: whether the start succeeded."""

    def __init__(self, report: int) -> None:
        self._report = report

    def started(self) -> None:
        """Let the starting command end with code 0, and let go of the terminal."""
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        self.finished(EX_OK)

    def finished(self, code: int) -> None:
        """Let the starting command end with that code; only the first report counts."""
        if self._report >= 0:
            os.write(self._report, bytes([code & 0xFF]))
            os.close(self._report)
            self._report = -1

    def leave_to_another(self) -> None:
        """Have the program that takes this one's place in the process report, by ``taken_over``."""
        os.set_inheritable(self._report, True)
        os.environ[_REPORT] = str(self._report)


def taken_over() -> Daemon | None:
    """Return the line that another Python has left to this one, if there is one."""
    report = os.environ.pop(_REPORT, None)
    if report is None:
        return None
    os.set_inheritable(int(report), False)
    return Daemon(int(report))


def go_on_with(executable: str, daemon: Daemon | None = None) -> None:
    """Have another Python start this worker in our place; returns when this is that Python.

    Raises SettingsError when there is no such program.
    """
    mine = f"{os.getpid()} {executable}"
    if os.path.abspath(executable) == sys.executable or os.environ.get(_EXECUTABLE) == mine:
        return
    os.environ[_EXECUTABLE] = mine
    if daemon is not None:
        daemon.leave_to_another()
    try:
        restart(executable)
    except OSError as error:
        text = f"--executable (worker_executable) is {executable!r}: {error.strerror}. Name a Python that has fastq"
        raise SettingsError(text) from error


def restart(executable: str | None = None) -> NoReturn:
    """Replace this process by a fresh one with the same command line; the pid stays. ``executable``: another Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    # A relative --workdir in the command line counts from where it was typed.
    os.chdir(os.environ.get(START_DIRECTORY, os.curdir))
    program = executable or sys.executable
    os.execv(program, [program, *sys.orig_argv[1:]])  # noqa: S606  no shell is wanted


def change_directory(path: str) -> None:
    """Change the working directory, and remember where we were for a restart. Raises SettingsError."""
    here = os.getcwd()
    try:
        os.chdir(path)
    except OSError as error:
        raise SettingsError(f"--workdir {path!r}: {error.strerror}. Name a directory that exists") from error
    os.environ.setdefault(START_DIRECTORY, here)


def is_detached() -> bool:
    """Return whether this process left the terminal already, before it was restarted."""
    return os.environ.get(_DETACHED_PID) == str(os.getpid())


def detach_process() -> Daemon:
    """Go on in a process of its own session, without a terminal; the calling process ends when that one has reported.

    The standard streams stay until ``started``, so that an error at start-up is still seen where the command was typed.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(writer)
        # Nothing written: the daemon died before it could say why.
        code = os.read(reader, 1) or bytes([EX_FAILURE])
        os._exit(code[0])
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.environ[_DETACHED_PID] = str(os.getpid())
    return Daemon(writer)


def set_umask(text: str) -> None:
    """Set the file mode mask from an octal number. Raises SettingsError when it is none."""
    try:
        mask = int(text, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777:
        raise SettingsError(f"--umask is {text!r}; it must be an octal number up to 777, for example 027")
    os.umask(mask)


def drop_privileges(user: str, group: str) -> None:
    """Become that user and group for good; empty means: stay (the group is the user's).

    Raises SettingsError when a name is unknown, when we may not change, or when root could be had back.
    """
    if not user and not group:
        return
    account = _account(user) if user else None
    gid = _group_id(group) if group else account.pw_gid if account else os.getgid()
    try:
        if account and os.geteuid() == 0:
            os.initgroups(account.pw_name, gid)
        if gid != os.getgid():
            os.setgid(gid)
        if account and account.pw_uid != os.getuid():
            os.setuid(account.pw_uid)
    except PermissionError as error:
        raise SettingsError("only root may change user and group; leave out --uid and --gid") from error
    if account and account.pw_uid and _can_become_root():
        raise SettingsError(f"--uid {user} left a way back to root; start the worker without saved privileges")


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise SettingsError(f"--uid {user!r} is no user of this machine; give a name or number that is") from None


def _group_id(group: str) -> int:
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise SettingsError(f"--gid {group!r} is no group of this machine; give a name or number that is") from None


def _can_become_root() -> bool:
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True


def warn_root(accept_content: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Log a warning when this process runs as root.

    Raises SettingsError when it would also unpickle messages: who can publish could then do anything on this machine.
    """
    if os.geteuid():
        return
    pickles = [name for name in accept_content if name in _PICKLE_NAMES]
    if pickles and not environ.get("C_FORCE_ROOT"):
        raise SettingsError(
            f"refusing to run as root while accept_content has {pickles[0]!r}: any message could run any code. "
            "Give --uid another user, take it out of accept_content, or set C_FORCE_ROOT=1 to run all the same"
        )
    logger.warning(_ROOT_WARNING, os.getuid(), os.geteuid(), os.getgid(), os.getegid())
