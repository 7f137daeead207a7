"""The tasks that must not run any more: a bounded set of ids, stamps to look for, and the file that outlives a worker.

The file is the one of Celery's ``--statedb``: either side can read what the other has written. Nothing in it is
unpickled but plain values and Celery's own set, so that it can do no harm.
"""

from __future__ import annotations

import contextlib
import dbm
import io
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from fastq.errors import SettingsError
from fastq.worker.process.files import check_file
from fastq.worker.remote.commands.describe import stamps_of

if TYPE_CHECKING:
    from fastq.worker.remote.clock import LamportClock

MAX_IDS: Final = 50_000
EXPIRES_S: Final = 10_800.0
MAX_VARIABLE: Final = "CELERY_WORKER_REVOKES_MAX"
EXPIRES_VARIABLE: Final = "CELERY_WORKER_REVOKE_EXPIRES"
#: Chosen: an id longer than this is nobody's.
_MAX_ID_LENGTH: Final = 1024
_MAX_STAMPS: Final = 1000  # by header
_FORMAT: Final = 3
#: What goes wrong with the file: each kind of it has an exception class of its own.
_FILE_ERRORS: Final[tuple[type[Exception], ...]] = (
    *dbm.error,
    pickle.UnpicklingError,
    zlib.error,
    EOFError,
    ValueError,
)
_MAX_UNPACKED: Final = 64 * 1024 * 1024


class Revoked:
    """Revoked ids, oldest first. Where there are too many the oldest are forgotten, expired ones at each ``purge``."""

    def __init__(self, max_ids: int = MAX_IDS, expires_s: float = EXPIRES_S) -> None:
        self.stamps: dict[str, set[str]] = {}
        #: The stamp, as {header: value}, for which an id was revoked.
        self.stamp_of: dict[str, dict[str, str]] = {}
        self._ids: dict[str, float] = {}  # when each was revoked, by the monotonic clock
        self._max_ids = max_ids
        self._expires_s = expires_s

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def update(self, ids: Iterable[str]) -> None:
        """Revoke these tasks, from now on."""
        now = time.monotonic()
        for each in ids:
            if len(each) <= _MAX_ID_LENGTH:
                self._ids.pop(each, None)
                self._ids[each] = now
        if len(self._ids) > self._max_ids:
            self.purge()

    def purge(self) -> None:
        """Forget what is too old, or too much."""
        limit = time.monotonic() - self._expires_s
        while self._ids:
            oldest, since = next(iter(self._ids.items()))
            if len(self._ids) <= self._max_ids and since >= limit:
                return
            del self._ids[oldest]
            self.stamp_of.pop(oldest, None)

    def add_stamps(self, stamps: Mapping[str, set[str]]) -> None:
        """Revoke every task that carries one of these stamps, when it is seen."""
        for name, values in stamps.items():
            known = self.stamps.setdefault(name, set())
            known.update(values)
            while len(known) > _MAX_STAMPS:
                known.pop()

    def see(self, task_id: str, props: bytes) -> bool:
        """Revoke a task if its message carries a revoked stamp; return whether it does."""
        if not self.stamps:
            return False
        carried = stamps_of(props)
        for name, values in self.stamps.items():
            if common := carried.get(name, set()) & values:
                if task_id not in self._ids:
                    self.stamp_of[task_id] = {name: min(common)}
                self.update([task_id])
                return True
        return False


def revoked_from_environment() -> Revoked:
    """Return an empty set with the bounds that Celery's environment variables give. Raises SettingsError."""
    return Revoked(_number(MAX_VARIABLE, MAX_IDS, int), _number(EXPIRES_VARIABLE, EXPIRES_S, float))


def _number(variable: str, default: Any, kind: Callable[[str], Any]) -> Any:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{variable} is {text!r}; expected a number") from None


# --- the file


class StateFile:
    """What a worker remembers over a restart (``--statedb``): revoked ids and its clock."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, revoked: Revoked, clock: LamportClock) -> None:
        """Add what the file holds; a missing file is made. Raises SettingsError when it cannot be read."""
        try:
            with self._open() as file:
                packed = _value(file.get(b"zrevoked"))
                ids = _unpacked(packed) if isinstance(packed, bytes) else _value(file.get(b"revoked"))
                clock.adjust(_value(file.get(b"clock")))
        except _FILE_ERRORS as error:
            raise SettingsError(
                f"state file {self.path!r} cannot be used: {error}. Remove it, or name another one with --statedb"
            ) from error
        revoked.update(each for each in ids or () if isinstance(each, str))

    def save(self, revoked: Revoked, clock: LamportClock) -> None:
        """Write the file. Raises OSError."""
        revoked.purge()
        packed = zlib.compress(pickle.dumps(list(revoked)))
        values = {"__proto__": _FORMAT, "zrevoked": packed, "clock": clock.forward()}
        try:
            with self._open() as file:
                for name, value in values.items():
                    file[name.encode()] = pickle.dumps(value)
        except _FILE_ERRORS as error:
            raise OSError(f"state file {self.path!r} cannot be written: {error}") from error

    def _open(self) -> contextlib.closing[Any]:
        # It is opened by its name, again and again, so a look at what is there now would not be enough.
        if os.geteuid() == 0 and not check_file(self.path):
            folder = os.path.dirname(os.path.abspath(self.path))
            raise OSError(f"others than root may change {folder} or a folder above it; give --uid, or another folder")
        return contextlib.closing(dbm.open(self.path, "c", 0o600))


def _value(data: bytes | None) -> Any:
    return None if data is None else _Unpickler(io.BytesIO(data)).load()


def _unpacked(packed: bytes) -> Any:
    stream = zlib.decompressobj()
    data = stream.decompress(packed, _MAX_UNPACKED)
    if stream.unconsumed_tail:
        raise ValueError("more than 64 MiB of revoked ids")
    return _value(data)


class _Unpickler(pickle.Unpickler):
    """Reads plain values and Celery's set of ids; every other class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("celery.utils.collections", "LimitedSet"):
            return _ids_of_limited_set
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a state file")


def _ids_of_limited_set(max_ids: object, expires: object, ids: Mapping[str, object], *more: object) -> list[str]:
    """Return what Celery's set is rebuilt from, as a list."""
    return list(ids)
