"""Files that the operator names, come by through no link that another user may have put there.

A log file in a folder that somebody else may write could be a link to any file that this process may write, and root
may write all of them. What the kernel has against that, fs.protected_symlinks, is for folders with the sticky bit.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

#: The process's own streams by name. They lead to what was opened before it began, and a pipe has no path.
_OWN_STREAMS: Final = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
_MAX_LINKS: Final = 40  # as the kernel's own
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of the file. Raises OSError, which names a link that is not to be trusted.

    With O_NOFOLLOW the file itself may be no link at all.
    """
    if path.startswith(_OWN_STREAMS):
        return os.open(path, flags | os.O_CLOEXEC, mode)
    folder, name, is_ours = _find(path, follow=not flags & os.O_NOFOLLOW)
    try:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    finally:
        os.close(folder)
    found = os.fstat(descriptor)
    if not is_ours and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it has another name, in a folder that others may write", path)
    return descriptor


def check_file(path: str) -> bool:
    """Return whether nobody but root and this user can put another file there. Raises OSError as ``open_file`` does.

    For files that a library opens by their name.
    """
    folder, _, is_ours = _find(path, follow=True)
    os.close(folder)
    return is_ours


def _find(path: str, follow: bool) -> tuple[int, str, bool]:
    """Return the file's folder and its name there, links resolved, and whether the way to it is only ours to change."""
    parts = _parts(os.path.abspath(path))
    folder = os.open("/", _FOLDER)
    is_ours, links = True, 0
    try:
        while True:
            is_ours = is_ours and _is_ours(os.fstat(folder))
            name = parts.pop() if parts else "."
            try:
                entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                if parts:
                    raise
                return folder, name, is_ours
            found = os.fstat(entry)
            if stat.S_ISLNK(found.st_mode) and (parts or follow):
                links += 1
                target = os.readlink("", dir_fd=entry)
                os.close(entry)
                _check_link(found, name, is_last=not parts)
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                parts += _parts(target)
                if target.startswith("/"):
                    os.close(folder)
                    folder = os.open("/", _FOLDER)
            elif parts:
                os.close(folder)
                folder = entry
            else:
                os.close(entry)
                return folder, name, is_ours
    except BaseException:
        os.close(folder)
        raise


def _parts(path: str) -> list[str]:
    """Return the names on the way, the last one first."""
    return [part for part in reversed(path.split("/")) if part]


def _check_link(found: os.stat_result, name: str, is_last: bool) -> None:
    # Folders that are links are how releases are rolled out; for root alone that is nobody else's to say.
    if found.st_uid not in (0, os.geteuid()) and (is_last or os.geteuid() == 0):
        raise PermissionError(errno.EPERM, f"{name!r} is a link of user {found.st_uid}, who can have it lead anywhere")


def _is_ours(folder: os.stat_result) -> bool:
    theirs = stat.S_IWOTH if folder.st_gid in (0, os.getegid()) else stat.S_IWOTH | stat.S_IWGRP
    return folder.st_uid in (0, os.geteuid()) and (not folder.st_mode & theirs or bool(folder.st_mode & stat.S_ISVTX))
