"""The first commands of a connection and what their replies mean, and errors as one clear line each. No sockets.

Source: Redis's documentation of AUTH, SELECT, ROLE and Sentinel, and the error codes of ``server.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

from fastq.brokers.redis.replies import Shape, fits
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import ConnectionLost, FastqError, RedisError, RemoteProtocolError, SettingsError
from fastq.net import tcp, tls

#: A command as it is sent: its name and arguments.
#: A command, or one that is packed already.
Command: TypeAlias = "tuple[str | bytes | int | float, ...] | bytes"

#: The channel on which a server tells of changed keys, as a list; nil when all are gone.
INVALIDATED: Final = "__redis__:invalidate"

#: The server cannot serve now, or is no master any more: connect anew, to another one perhaps.
AWAY_CODES: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "UNBLOCKED"})
#: No repetition will help.
LOGIN_CODES: Final = frozenset({"NOAUTH", "WRONGPASS", "DENIED"})
#: The server is short of memory, disk or replicas, or busy with a script: try again on the same connection.
PASSING_CODES: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS", "BUSY", "TRYAGAIN", "CLUSTERDOWN"})


def login_commands(url: RedisUrl, name: str) -> list[Command]:
    """Return what to send first, in one write; the last command always has a reply that needs a login."""
    commands: list[Command] = []
    if url.password:
        commands.append(("AUTH", url.username, url.password) if url.username else ("AUTH", url.password))
    shown = "".join(letter if "!" <= letter <= "~" else "_" for letter in name)
    if shown:
        commands.append(("CLIENT", "SETNAME", shown))
    if url.db:
        commands.append(("SELECT", url.db))
    commands.append(("ROLE",) if url.service else ("PING",))
    return commands


def check_login(url: RedisUrl, commands: Sequence[Command], replies: Sequence[Any]) -> None:
    """Return when the connection may be used. Raises SettingsError (do not try again) or ConnectionLost (do)."""
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, RedisError):
            _refuse(url, str(command[0]), reply)
    if url.service and (not isinstance(replies[-1], list) or replies[-1][:1] != [b"master"]):
        raise ConnectionLost(f"Redis at {url} is not the master of {url.service!r} yet, or no longer")


def _refuse(url: RedisUrl, command: str, error: RedisError) -> None:
    if error.code in AWAY_CODES or "max number of clients" in str(error):
        raise turned_away(url, error)
    if command == "AUTH" or error.code in LOGIN_CODES:
        raise refused_login(url, error)
    if command == "SELECT":
        raise SettingsError(f"Redis at {url} has no database {url.db}: {error}. Use a lower number in the URL")
    if command in ("PING", "ROLE"):
        raise SettingsError(f"Redis at {url} answered {command} with {error}. Allow that command to the URL's user")


def refused_login(url: RedisUrl, error: RedisError) -> SettingsError:
    """Return the error for a user, password or address that Redis does not let in."""
    if not url.password and error.code == "NOAUTH":
        remedy = "It wants a password: redis://user:password@host or redis://:password@host"
    elif "without any password" in str(error) or "no password is set" in str(error):
        remedy = "It has no password: leave it out of the URL"
    else:
        remedy = "Check user and password in the URL, percent-encoded where they have special characters"
    return SettingsError(f"Redis at {url} refused the login: {error}. {remedy}")


def is_away(reply: Any) -> bool:
    """Whether a reply says that this server is of no use now and the connection must be made anew."""
    return isinstance(reply, RedisError) and reply.code in AWAY_CODES


def went_away(url: RedisUrl, error: Exception) -> ConnectionLost:
    """Return the error for a server that said so."""
    return ConnectionLost(f"Redis at {url} does not take commands any more: {error}")


def no_redis(url: RedisUrl, error: Exception) -> ConnectionLost:
    """Return the error for a server that breaks the protocol."""
    return ConnectionLost(f"{url} does not speak Redis's protocol: {error}")


def odd_reply(url: RedisUrl, reply: Any) -> ConnectionLost:
    """Return the error for a reply that its command cannot have, or that no command asked for."""
    return no_redis(url, RemoteProtocolError(f"it answered {repr(reply)[:60]}, which nothing has asked for"))


def is_push(message: Any) -> bool:
    """Whether it is a message of a subscription, such as ``[b"message", channel, payload]``; a pong is none."""
    if not fits(message, list) or not message or not isinstance(message[0], bytes):
        return False
    if message[:2] == [b"message", INVALIDATED.encode()]:
        return len(message) == 3
    return fits(message, _PUSHES.get(message[0], int))


_SUBSCRIBED: Final = [bytes, (bytes, type(None)), int]
_PUSHES: Final[dict[bytes, Shape]] = {
    b"message": [bytes, bytes, bytes],
    b"pmessage": [bytes, bytes, bytes, bytes],
    **{name + b"subscribe": _SUBSCRIBED for name in (b"", b"un", b"p", b"pun")},
}


def may_not_listen(url: RedisUrl, error: Exception) -> SettingsError:
    """Return the error for a user who may not subscribe to a channel."""
    return SettingsError(
        f"Redis at {url} refuses a subscription: {error}. Allow the URL's user the channels, such as "
        "&celery-task-meta-* for results, &*celeryev* for events and &*pidbox* for remote control"
    )


def turned_away(url: RedisUrl, error: RedisError) -> ConnectionLost:
    """Return the error for a server that lets nobody in for now."""
    return ConnectionLost(f"Redis at {url} takes no connection now: {error}")


def silent(url: RedisUrl, silence_s: float) -> ConnectionLost:
    """Return the error for a server that has not answered in time."""
    found = ConnectionLost(f"Redis at {url} has not answered for {silence_s:.3g} s")
    found.timed_out = True
    return found


def unreachable(url: RedisUrl, error: Exception) -> ConnectionLost:
    """Return the error for a server that cannot be connected to."""
    reason = "time-out" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
    wanted = " with TLS" if url.tls else ""
    return ConnectionLost(f"cannot connect to Redis at {url}: {reason}. Is it running{wanted}, and is the URL right?")


def closed_early(url: RedisUrl) -> ConnectionLost:
    """Return the error for a server that hangs up instead of answering the login."""
    remedy = "" if url.tls else ". If it wants TLS, write rediss://"
    return ConnectionLost(f"Redis at {url} closed the connection during the login{remedy}")


def lost(url: RedisUrl, error: Exception | None) -> ConnectionLost:
    """Return the error for a connection that broke."""
    found = ConnectionLost(f"connection to Redis at {url} lost: {error or 'closed by the server'}")
    found.timed_out = isinstance(error, (TimeoutError, BlockingIOError))
    return found


def tls_failed(url: RedisUrl, error: Exception) -> FastqError:
    """Return the error for a TLS handshake that failed."""
    return tls.tls_failed(
        url,
        error,
        "Name its authority in ssl_ca_certs (of broker_use_ssl, redis_backend_use_ssl or the URL)",
    )


def none_reachable(failures: Sequence[ConnectionLost]) -> ConnectionLost:
    """Return the only error, or one that names them all."""
    return tcp.none_reachable(failures, "Redis")


def at_master(url: RedisUrl, sentinel: RedisUrl, reply: Any) -> RedisUrl:
    """Return where the master is that a Sentinel has named. Raises ConnectionLost."""
    if not fits(reply, [bytes, bytes]) or not reply[1].isdigit():
        raise odd_reply(sentinel, reply)
    return replace(url, host=reply[0].decode(errors="replace"), port=int(reply[1]), sentinels=())


def no_master(url: RedisUrl, reply: Any) -> FastqError:
    """Return the error for a Sentinel that names no master."""
    if isinstance(reply, RedisError):
        return refused_login(url, reply) if reply.code in LOGIN_CODES else ConnectionLost(f"Sentinel {url}: {reply}")
    return ConnectionLost(f"Sentinel {url} knows no master of that name. Check 'master_name' in the transport options")
