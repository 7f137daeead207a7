"""A TCP connection to the first address of a name that takes one: one that swallows packets holds up no other.

The next address is tried a moment after the last one, which goes on meanwhile. Source: RFC 8305, section 5 (happy
eyeballs); addresses stay in the order in which the system gives them.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from fastq.errors import ConnectionLost

if TYPE_CHECKING:
    import asyncio

#: How long an address has for itself. Source: RFC 8305, "Connection Attempt Delay".
DELAY_S: Final = 0.25
#: Chosen: how long one that has said nothing comes behind the others of its name.
SILENT_S: Final = 60.0
_silent: dict[Any, float] = {}  # addresses, until when


def connect_first(host: str, port: int, timeout_s: float) -> socket.socket:
    """Return a connected socket. Raises OSError: what the first address has failed with, or a time-out."""
    deadline = time.monotonic() + timeout_s
    left = _in_order(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    failures: list[OSError] = []
    attempts: dict[int, socket.socket] = {}
    poll = select.poll()
    next_at = time.monotonic()
    try:
        while left or attempts:
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError("time-out")
            if left and (now >= next_at or not attempts):
                next_at = now + DELAY_S
                try:
                    sock = _begin(left.popleft())
                except OSError as error:
                    failures.append(error)
                else:
                    attempts[sock.fileno()] = sock
                    poll.register(sock, select.POLLOUT)
                continue
            until = min(deadline, next_at) if left else deadline
            for number, _ in poll.poll((until - now) * 1000 + 1):
                poll.unregister(number)
                sock = attempts.pop(number)
                try:
                    _check(sock)
                except OSError as error:
                    sock.close()
                    failures.append(error)
                    next_at = now
                else:
                    sock.settimeout(max(deadline - time.monotonic(), 0.001))
                    return sock
    finally:
        for sock in attempts.values():
            sock.close()
    raise failures[0]


def peer_of(sock: socket.socket) -> Any:
    """Return the address at the other end; None when the connection has ended already."""
    try:
        return sock.getpeername()
    except OSError:
        return None


def avoid(address: Any) -> None:
    """Have others of its name tried before an address that has taken a connection and then said nothing in time.

    ``address``: as ``peer_of`` returns it. A program that hangs still listens, and would be the first for ever.
    """
    _silent[address] = time.monotonic() + SILENT_S


def tune_socket(sock: socket.socket) -> None:
    """Send small writes at once, and notice a peer that is gone within about 20 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux names; elsewhere the system's own, longer spans hold.
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 20000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def none_reachable(failures: Sequence[ConnectionLost], what: str = "broker") -> ConnectionLost:
    """Return the only error, or one that names them all."""
    if len(failures) == 1:
        return failures[0]
    return ConnectionLost(f"no {what} can be reached: " + "; ".join(str(error) for error in failures))


async def connect_first_on(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """Return a connected socket that does not block. Raises OSError: what the first address has failed with."""
    import asyncio  # not at the top: children would carry it

    failures: list[OSError] = []
    attempts: set[asyncio.Task[socket.socket]] = set()
    left = _in_order(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    try:
        while left or attempts:
            if left:
                attempts.add(loop.create_task(_connect(loop, left.popleft())))
            delay_s = DELAY_S if left else None
            done, _ = await asyncio.wait(attempts, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                error = attempt.exception()
                if error is None:
                    attempts.discard(attempt)
                    return attempt.result()
                if not isinstance(error, OSError):
                    raise error
                attempts.discard(attempt)
                failures.append(error)
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close)
    raise failures[0]


def _in_order(addresses: Sequence[Any]) -> deque[Any]:
    """Return the addresses, behind the others those to avoid."""
    now = time.monotonic()
    for each in [address for address, until in _silent.items() if until <= now]:
        _silent.pop(each, None)
    return deque(sorted(addresses, key=lambda each: each[4] in _silent))


def _begin(address: Any) -> socket.socket:
    """Return a socket that is about to be connected."""
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    code = sock.connect_ex(place)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock


async def _connect(loop: asyncio.AbstractEventLoop, address: Any) -> socket.socket:
    sock = _begin(address)
    decided = loop.create_future()
    loop.add_writer(sock, lambda: None if decided.done() else decided.set_result(None))
    try:
        await decided
        _check(sock)
    except BaseException:
        loop.remove_writer(sock)
        sock.close()
        raise
    loop.remove_writer(sock)
    return sock


def _check(sock: socket.socket) -> None:
    """Raise OSError unless the socket is connected, now that it is decided."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _close(attempt: asyncio.Task[socket.socket]) -> None:
    """Close what was connected too late."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
