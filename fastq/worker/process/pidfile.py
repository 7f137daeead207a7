"""The pid file: one worker per file, stale files taken over, removed by its owner only. It does not daemonize.

Two workers that find the same stale file at the same moment are kept apart by a lock on the file while it is read and
rewritten; the file is never unlinked and created anew, so neither can remove what the other has just written.
"""

from __future__ import annotations

import fcntl
import os
from types import TracebackType

from fastq.worker.process.exitcodes import CannotCreate
from fastq.worker.process.files import open_file

_MODE = 0o644


class Pidfile:
    """A file that holds the pid of the running worker; a context manager. An empty path means no file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._owner: int | None = None

    def acquire(self) -> None:
        """Write our pid. Raises CannotCreate when the file names another running process or cannot be written."""
        if not self.path:
            return
        try:
            while not self._try_acquire():
                pass
        except OSError as error:
            raise CannotCreate(
                f"cannot write pid file {self.path!r}: {error.strerror}. "
                "Choose a directory that this user may write with --pidfile, or --pidfile= for none"
            ) from error

    def release(self) -> None:
        """Remove the file if this process wrote it and it still holds our pid; forked children leave it alone."""
        if self._owner != os.getpid():
            return
        self._owner = None
        try:
            if _read_pid(self.path) == os.getpid():
                os.unlink(self.path)
        except OSError:
            pass  # the next start sees that the pid is stale

    def _try_acquire(self) -> bool:
        """Write our pid and return True; False when the file was removed between opening and locking it."""
        descriptor = _open(self.path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_same_file(descriptor, self.path):
                return False
            text = os.read(descriptor, 64)
            self._check_content(text)
            self._check_owner(_parse_pid(text))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            self._owner = os.getpid()
            return True
        finally:
            os.close(descriptor)

    def _check_content(self, text: bytes) -> None:
        # After a crash of the machine it may be empty, or hold zeros.
        if text.strip(b"0123456789 \t\r\n\0"):
            raise CannotCreate(
                f"pid file {self.path!r} holds something else than a pid and is left as it is. "
                "Remove it, or name another file with --pidfile"
            )

    def _check_owner(self, pid: int | None) -> None:
        # Our own pid stands there after a restart by exec (HUP), or when a container gave us the same number again.
        if pid is None or pid == os.getpid() or not is_running(pid):
            return
        raise CannotCreate(
            f"pid file {self.path!r} belongs to process {pid} ({_command_of(pid)}), which is running. "
            "Stop it first, remove the file if that is another program, or give this worker its own --pidfile"
        )

    def __enter__(self) -> Pidfile:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def is_running(pid: int) -> bool:
    """Return whether a process of that pid runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The state follows the command name, which may itself hold blanks and brackets.
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return not os.path.isdir("/proc/self") and _answers_signal(pid)
    except OSError:
        return False


def _answers_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _open(path: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW
    while True:
        try:
            descriptor = open_file(path, flags | os.O_CREAT | os.O_EXCL, _MODE)
        except FileExistsError:
            pass
        else:
            os.fchmod(descriptor, _MODE)
            return descriptor
        try:
            return open_file(path, flags)
        except FileNotFoundError:
            continue  # its owner stopped just now


def _is_same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read_pid(path: str) -> int | None:
    """Return the pid in the file; None when there is none, or no such file that may be read."""
    try:
        with open(path, "rb") as file:
            return _parse_pid(file.read(64))
    except OSError:
        return None


def _parse_pid(text: bytes) -> int | None:
    """Return the pid in the text, or None for anything else: such a file is stale."""
    text = text.strip()
    return int(text) if text.isdigit() and 0 < int(text) < 2**31 else None


def _command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return command or "command unknown"
