"""Doorbells: datagram sockets in a folder beside the database file, so that nobody has to poll it. No SQL.

A worker binds a bell that every publish rings; a client binds one that brings results. A bound bell also says that its
process lives: the kernel refuses datagrams for a dead one. A datagram may be lost, as its receiver's buffer holds few,
but never what it is about: receivers read the file before they sleep, and senders repeat a lost one for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import socket
import stat
import struct
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Final, Literal

from fastq.errors import SettingsError
from fastq.net import forks

Kind = Literal["w", "c"]
WORKER: Final = "w"
CLIENT: Final = "c"

#: A bell's name comes out of messages too (``reply_to``): only this form is ever joined to a path.
NAME: Final = re.compile(r"[wc]-[0-9]{1,10}-[0-9a-f]{16}")
#: Results up to this size travel in the datagram; a larger one is read from the file.
MAX_INLINE_BYTES: Final = 32 * 1024
#: Chosen so that a datagram fits a socket's default send buffer (208 KiB) with room to spare.
MAX_DATAGRAM_BYTES: Final = 64 * 1024
_MAX_SENDERS: Final = 512
_RECORD: Final = struct.Struct("!HI")
_IN_FILE: Final = 0xFFFFFFFF
# The kernel stamps a folder with the time of its last tick, up to 10 ms ago: a younger stamp may hide a second change.
_STAMP_GRAIN_NS: Final = 20_000_000

_open_folders: weakref.WeakSet[BellFolder] = weakref.WeakSet()


class Bell:
    """A bound socket, with a name that other processes ring."""

    def __init__(self, folder: BellFolder, name: str, bound: socket.socket) -> None:
        self.folder = folder
        self.name = name
        self.socket = bound

    def fileno(self) -> int:
        """Return what to poll for reading."""
        return self.socket.fileno()

    def hear(self) -> list[bytes]:
        """Return the datagrams that have arrived; [] when there is none."""
        heard: list[bytes] = []
        try:
            while True:
                heard.append(self.socket.recv(2 * MAX_DATAGRAM_BYTES))
        except BlockingIOError:
            return heard

    def close(self) -> None:
        """Unbind the bell and remove its name."""
        self.folder.forget(self)
        self.socket.close()
        self.folder.unlink(self.name)


class BellFolder:
    """The folder ``<file>-bells`` as one part of one process sees it. Not thread-safe; a forked child makes its own."""

    def __init__(self, path: str) -> None:
        self.path = path + "-bells"
        self._owner = os.stat(path).st_uid
        self._fd = _open_folder(self.path, self._owner)
        self._bells: list[Bell] = []
        self._senders: dict[str, socket.socket] = {}
        self._workers: list[str] = []
        self._stamp_ns = -1
        _open_folders.add(self)
        forks.register(self)

    def bind(self, kind: Kind) -> Bell:
        """Return a new bell of this process."""
        name = f"{kind}-{os.getpid()}-{secrets.token_hex(8)}"
        bell = Bell(self, name, self._bound(name))
        self._bells.append(bell)
        return bell

    def ring(self, name: str, datagram: bytes = b"") -> bool:
        """Send to one bell; False when the datagram was lost. A bell that is dead or gone needs none."""
        try:
            sender = self._senders.get(name) or self._connected(name)
            sender.send(datagram)
        except BlockingIOError:
            return False
        except (ConnectionRefusedError, FileNotFoundError):
            self._drop_sender(name)
            self.unlink(name)
        except OSError:
            self._drop_sender(name)
            return False
        return True

    def ring_workers(self, besides: Bell | None = None) -> None:
        """Wake every worker of the file but one. A worker that does not keep up has its buffer full and is awake."""
        for name in self._worker_names():
            if besides is None or name != besides.name:
                self.ring(name)

    def is_alive(self, name: str) -> bool | None:
        """Return whether the process that bound a bell lives; None when the bell is not there any more."""
        probe = _new_socket()
        try:
            probe.connect(self._address(name))
        except FileNotFoundError:
            return None
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # no descriptors or no memory: says nothing about the other side
        finally:
            probe.close()
        return True

    def restore(self, bell: Bell) -> None:
        """Bind a bell again if somebody removed its name, or the folder with it."""
        try:
            if stat.S_ISSOCK(os.stat(bell.name, dir_fd=self._fd, follow_symlinks=False).st_mode):
                return
        except OSError:
            pass
        if os.fstat(self._fd).st_nlink == 0:
            self._reopen()
        fresh = self._bound(bell.name)
        # Same descriptor number: whoever polls it need not know.
        os.dup2(fresh.fileno(), bell.socket.fileno(), inheritable=False)
        fresh.close()

    def sweep(self) -> None:
        """Remove what dead clients left; a dead worker's bell stays until its work is given back."""
        for name in os.listdir(self._fd):
            if name.startswith(CLIENT) and NAME.fullmatch(name) and self.is_alive(name) is False:
                self.unlink(name)

    def unlink(self, name: str) -> None:
        """Remove a bell's name, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)

    def forget(self, bell: Bell) -> None:
        """Stop keeping a bell that is being closed."""
        if bell in self._bells:
            self._bells.remove(bell)

    def unbind(self, kind: Kind) -> None:
        """Remove the names of the bells of a kind; nobody rings them any more."""
        for bell in self._bells:
            if bell.name.startswith(kind):
                self.unlink(bell.name)

    def close(self) -> None:
        """Close every bell and descriptor."""
        for bell in list(self._bells):
            bell.close()
        self._close_descriptors()

    def after_fork(self) -> None:
        """In a forked child: close its copies of everything; the names are the parent's."""
        # A child that kept a bell open would make the parent look alive after its death.
        for bell in self._bells:
            bell.socket.close()
        self._bells.clear()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        _open_folders.discard(self)

    def _worker_names(self) -> list[str]:
        """Return the names of the bound worker bells, listed again only when the folder has changed."""
        found = os.fstat(self._fd)
        if found.st_mtime_ns != self._stamp_ns or found.st_nlink == 0:
            if found.st_nlink == 0:
                self._reopen()
            self._workers = [name for name in os.listdir(self._fd) if name.startswith(WORKER) and NAME.fullmatch(name)]
            settled = time.time_ns() - found.st_mtime_ns > _STAMP_GRAIN_NS
            self._stamp_ns = found.st_mtime_ns if settled else -1
        return self._workers

    def _reopen(self) -> None:
        """Open the folder that now has our path: the one we had was removed."""
        fresh = _open_folder(self.path, self._owner)
        os.dup2(fresh, self._fd, inheritable=False)
        os.close(fresh)
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def _address(self, name: str) -> str:
        # A socket's path is limited to 108 bytes; one through the descriptor is short however deep the folder lies.
        return f"/proc/self/fd/{self._fd}/{name}" if _HAS_PROC else f"{self.path}/{name}"

    def _bound(self, name: str) -> socket.socket:
        bound = _new_socket()
        try:
            bound.bind(self._address(name))
            if _HAS_PROC:
                self._open_to_all(name)
        except OSError as error:
            bound.close()
            raise SettingsError(
                f"no socket can be made in {self.path} ({error}). Make the folder writable for this user"
            ) from error
        return bound

    def _open_to_all(self, name: str) -> None:
        """Let root and the folder's owner hear each other; the folder keeps others out."""
        # Its owner may put anything under that name, and this may be root: only a socket of ours is touched.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            found = os.fstat(fd)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                raise OSError(f"{name} was replaced by something else")
            os.chmod(f"/proc/self/fd/{fd}", 0o666)  # noqa: S103
        finally:
            os.close(fd)

    def _connected(self, name: str) -> socket.socket:
        """Return a new sender. One for each bell: unread datagrams count against the buffer of their sender."""
        if len(self._senders) >= _MAX_SENDERS:
            self._drop_sender(next(iter(self._senders)))
        sender = _new_socket()
        try:
            sender.connect(self._address(name))
        except OSError:
            sender.close()
            raise
        self._senders[name] = sender
        return sender

    def _drop_sender(self, name: str) -> None:
        sender = self._senders.pop(name, None)
        if sender is not None:
            sender.close()


# --- results in datagrams ---------------------------------------------------------------------------------------------


def pack_results(results: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield datagrams with as many (task id, meta) each as fit; a large meta is left out and read from the file."""
    parts: list[bytes] = []
    size = 0
    for task_id, meta in results:
        key = task_id.encode("utf-8", "replace")
        inline = len(meta) <= MAX_INLINE_BYTES
        record = _RECORD.pack(len(key), len(meta) if inline else _IN_FILE) + key + (meta if inline else b"")
        if size + len(record) > MAX_DATAGRAM_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
        parts.append(record)
        size += len(record)
    if parts:
        yield b"".join(parts)


def unpack_results(datagram: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Yield (task id, meta), None for a meta that is to be read from the file. Stops at the first false length."""
    at, end = 0, len(datagram)
    while at + _RECORD.size <= end:
        key_size, meta_size = _RECORD.unpack_from(datagram, at)
        key_end = at + _RECORD.size + key_size
        meta_end = key_end + (0 if meta_size == _IN_FILE else meta_size)
        if meta_end > end:
            return
        task_id = datagram[at + _RECORD.size : key_end].decode(errors="replace")
        yield task_id, None if meta_size == _IN_FILE else datagram[key_end:meta_end]
        at = meta_end


# --- sockets and folders ----------------------------------------------------------------------------------------------

_HAS_PROC: Final = os.path.isdir("/proc/self/fd")


def _new_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setblocking(False)
    return made


def _open_folder(path: str, owner: int) -> int:
    """Return a descriptor of the folder; made when missing, for the owner of the database file only."""
    is_made = False
    try:
        os.mkdir(path, 0o700)
        is_made = True
    except FileExistsError:
        pass
    except OSError as error:
        raise SettingsError(
            f"folder {path} cannot be made ({error.strerror}). Make its parent writable for user {os.geteuid()}"
        ) from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be used as a folder ({error.strerror}). Remove it, and use one file as one user"
        ) from error
    if is_made and owner != os.fstat(fd).st_uid == os.geteuid() and not os.listdir(fd):
        os.fchown(fd, owner, -1)  # root looks at somebody's file; empty: it is the folder that was made just now
    found = os.fstat(fd)
    if found.st_uid != owner or found.st_mode & 0o077:
        os.close(fd)
        raise SettingsError(
            f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}; user {owner}, "
            "the file's, and mode 700 are needed. Remove it, and use one file as one user"
        )
    return fd


def _remove_client_bells() -> None:
    # A worker's stays, should it be here still: its silence tells the others at once that it died.
    for folder in list(_open_folders):
        folder.unbind(CLIENT)


atexit.register(_remove_client_bells)
