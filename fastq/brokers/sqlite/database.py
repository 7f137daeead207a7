"""The SQLite file of the embedded broker: where it is, who may open it, its tables, and what its errors mean.

No messages and no sockets: ``broker`` and ``fastq.results.sqlite`` say what is done with the tables. Two rules for
all of them: a connection never sleeps inside SQLite: ``patiently`` waits for a lock, with a deadline; and nobody but
SQLite opens the file, because closing any descriptor of it would drop the locks that SQLite holds for this process.
"""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar
from urllib.parse import parse_qsl, quote, unquote

from fastq.errors import ConnectionLost, SettingsError

T = TypeVar("T")

APPLICATION_ID: Final = 0x66717331  # "fqs1": tells our file from any other program's
SCHEMA_VERSION: Final = 1

#: What a value can be refused for by itself, whatever the state of the file.
UNSTORABLE = (UnicodeError, OverflowError, TypeError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError,
              sqlite3.ProgrammingError)  # fmt: skip

#: A message is in ``messages`` and in exactly one of ``ready``, ``delayed`` and ``claimed``: its state is which. So a
#: claim moves rows of 20 bytes and never rewrites a message (a third cheaper than a column and its indexes, measured),
#: and what a dead worker held is found without an index over the backlog.
SCHEMA: Final = """
CREATE TABLE queues (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

CREATE TABLE messages (
    id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, priority INTEGER NOT NULL, due REAL,
    props BLOB NOT NULL, body BLOB NOT NULL
);
CREATE TABLE ready (
    queue INTEGER NOT NULL, rank INTEGER NOT NULL, id INTEGER NOT NULL, deliveries INTEGER NOT NULL,
    PRIMARY KEY (queue, rank, id)
) WITHOUT ROWID;
CREATE TABLE delayed (due REAL NOT NULL, id INTEGER NOT NULL, PRIMARY KEY (due, id)) WITHOUT ROWID;
CREATE TABLE claimed (id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, deliveries INTEGER NOT NULL);
CREATE TRIGGER publish_now AFTER INSERT ON messages WHEN new.due IS NULL
    BEGIN INSERT INTO ready VALUES (new.queue, -new.priority, new.id, 0); END;
CREATE TRIGGER publish_later AFTER INSERT ON messages WHEN new.due IS NOT NULL
    BEGIN INSERT INTO delayed VALUES (new.due, new.id); END;

CREATE TABLE dead (
    id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, priority INTEGER NOT NULL, deliveries INTEGER NOT NULL,
    reason TEXT NOT NULL, died REAL NOT NULL, props BLOB NOT NULL, body BLOB NOT NULL
);

CREATE TABLE results (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, meta BLOB NOT NULL, saved REAL NOT NULL
);
CREATE TABLE waiters (id TEXT NOT NULL, bell TEXT NOT NULL, PRIMARY KEY (id, bell)) WITHOUT ROWID;

CREATE TABLE workers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    bell TEXT NOT NULL, queues TEXT NOT NULL, started REAL NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a URL points: an absolute path, and how durable a confirmed publish is there."""

    path: str
    synchronous: str = "FULL"


def parse_url(url: str) -> Location:
    """Return the location that a URL names: sqlite:///relative.db, sqlite:////absolute.db.

    ``?synchronous=normal`` confirms a publish before it is on the disk: faster, and lost when the power fails.
    """
    _, _, rest = url.partition("://")
    text, _, query = rest.partition("?")
    path = unquote(text[1:])
    if not text.startswith("/") or not path or path == ":memory:":
        raise SettingsError(
            f"{url!r} names no file. Write sqlite:///fastq.db (relative), sqlite:////var/lib/fastq.db (absolute) or memory://"
        )
    synchronous = "FULL"
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "synchronous" or value.lower() not in ("full", "normal"):
            raise SettingsError(
                f"unknown option {name}={value} in {url!r}. Known: synchronous=full, synchronous=normal"
            )
        synchronous = value.upper()
    return Location(os.path.abspath(path), synchronous)


def connect(path: str, synchronous: str, timeout_s: float = 10.0) -> sqlite3.Connection:
    """Return a connection to the file at ``path``, created and given its tables when it is missing.

    Autocommit, usable from any thread, never waits by itself. Raises SettingsError (wrong place, owner or format;
    damaged) or ConnectionLost (locked, disk full).
    """
    _check_place(path)
    try:
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode=rw", uri=True, timeout=0, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise refusal(path, error) from error
    try:
        patiently(lambda: _prepare(connection, path, synchronous), timeout_s)
    except sqlite3.Error as error:
        connection.close()
        raise refusal(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def identity(path: str) -> tuple[int, int]:
    """Return what tells this file from another one put in its place; (0, 0) when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


# --- waiting and errors -----------------------------------------------------------------------------------------------


def patiently(action: Callable[[], T], timeout_s: float) -> T:
    """Return what the action returns, trying again while another connection holds the lock, until the time is up.

    SQLite's own busy handler sleeps a millisecond and more at once; a commit holds the lock for a fraction of that.
    """
    try:
        return action()
    except sqlite3.OperationalError as error:
        if not is_busy(error):
            raise
    deadline = time.monotonic() + timeout_s
    pause_s = 50e-6
    while True:
        time.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - only keeps two that wait apart
        pause_s = min(pause_s * 1.5, 2e-3)
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise


def is_busy(error: sqlite3.Error) -> bool:
    """Another connection holds the lock: the same call may succeed in a moment."""
    # By its text: error codes came with Python 3.11.
    text = str(error)
    return "is locked" in text or "locking protocol" in text


def is_damaged(error: sqlite3.Error) -> bool:
    """The file is not a database or no longer a sound one: no call will succeed."""
    text = str(error)
    return "malformed" in text or "not a database" in text or "no such table" in text or "no such column" in text


def explain(path: str, error: sqlite3.Error) -> str:
    """Return one line: what happened to the file, and the remedy."""
    text = str(error)
    if is_busy(error):
        return f"{path} stays locked by another program. Close whatever holds a transaction open on it"
    if is_damaged(error):
        return (
            f"{path} is damaged or no SQLite database ({text}); it is left as it is. Move it away to start with an "
            f"empty one, or rescue it: sqlite3 {path} .recover | sqlite3 rescued.db"
        )
    if "full" in text or "disk I/O" in text:
        return f"{path} cannot be written ({text}). Free space on its disk or raise the quota; nothing stored is lost"
    if "readonly" in text or "unable to open" in text or "access" in text:
        return (
            f"{path} is not writable for user {os.geteuid()} ({text}). "
            "Give the file and its folder to this user, or name another file"
        )
    return f"{path}: {text}"


def refusal(path: str, error: sqlite3.Error) -> SettingsError | ConnectionLost:
    """Return the error to raise for one of SQLite's at opening: ConnectionLost when time may heal it."""
    text = str(error)
    heals = is_busy(error) or "full" in text or "disk I/O" in text
    return (ConnectionLost if heals else SettingsError)(explain(path, error))


# --- opening ----------------------------------------------------------------------------------------------------------


def _check_place(path: str) -> None:
    """Create the file, for this user only, when it is missing. Raises SettingsError where others could swap it."""
    folder = os.path.dirname(path)
    try:
        place = os.stat(folder)
    except OSError as error:
        raise SettingsError(
            f"folder {folder} of {path} cannot be used ({error.strerror}). Create it or name another file"
        ) from error
    shared = bool(place.st_mode & stat.S_IWOTH)
    if shared and not place.st_mode & stat.S_ISVTX:
        raise SettingsError(
            f"{folder} is writable for everybody, so anybody could replace {path}. Run chmod o-w {folder}"
        )
    for suffix in ("", "-wal", "-shm"):
        _check_file(path + suffix, shared)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        _check_file(path, shared)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be created ({error.strerror}). Make {folder} writable for user {os.geteuid()}"
        ) from error


def _check_file(path: str, shared: bool) -> None:
    """Raise SettingsError when something is there that may not be opened as a database file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsError(f"{path} cannot be used ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError(f"{path} is no regular file (a symbolic link, folder or device). Name the file itself")
    if shared and found.st_uid != os.geteuid():
        raise SettingsError(
            f"{path} belongs to user {found.st_uid} in a folder open to everybody. Use a folder of your own"
        )


def _prepare(connection: sqlite3.Connection, path: str, synchronous: str) -> None:
    """Set what a connection needs, and create the tables in an empty file."""
    marks = connection.execute(
        "SELECT a.application_id, v.user_version FROM pragma_application_id a, pragma_user_version v"
    )
    application, version = marks.fetchone()
    if application != APPLICATION_ID:
        _create(connection, path)
    elif version != SCHEMA_VERSION:
        raise SettingsError(
            f"{path} has format {version}, this fastq knows format {SCHEMA_VERSION}. Upgrade fastq or name another file"
        )
    connection.execute(f"PRAGMA synchronous={synchronous}")
    # Debian builds SQLite to wipe deleted rows: a rewrite of every page for a file that only its owner may read.
    connection.execute("PRAGMA secure_delete=OFF")
    connection.execute("PRAGMA journal_size_limit=16777216")
    connection.execute("PRAGMA cache_size=-8192")


def _create(connection: sqlite3.Connection, path: str) -> None:
    """Write the tables into an empty file; somebody else may do so at the same moment."""
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise SettingsError(
                f"the file system of {path} has no shared memory (a network share?). Put the file on a local disk"
            )
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise SettingsError(f"{path} is the database of another program. Name another file")
            # Not executescript: it would commit first.
            for statement in SCHEMA.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
