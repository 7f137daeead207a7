"""TCP sockets to a broker, with TLS where its URL says so; failures as one clear error each. No AMQP.

Blocking callers use ``connect_socket``; an event loop makes its own socket, and takes the rest from here.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence

from fastq.amqp.addresses import connect_first
from fastq.amqp.url import AmqpUrl, tls_context
from fastq.errors import ConnectionLost, FastqError, SettingsError


def connect_socket(url: AmqpUrl, deadline: float) -> socket.socket:
    """Return a connected socket, with TLS where the URL says so. Raises ConnectionLost or SettingsError."""
    try:
        sock = connect_first(url.host, url.port, max(deadline - time.monotonic(), 0.1))
    except OSError as error:
        raise unreachable(url, error) from None
    tune_socket(sock)
    if url.tls is None:
        return sock
    context = tls_context(url.tls)
    try:
        sock.settimeout(max(deadline - time.monotonic(), 0.1))
        return context.wrap_socket(sock, server_hostname=url.tls.server_name or url.host)
    except OSError as error:
        sock.close()
        raise tls_failed(url, error) from None


def tune_socket(sock: socket.socket) -> None:
    """Send small writes at once, and notice a peer that is gone within about 20 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux names; elsewhere the system's own, longer spans hold.
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 20000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


TLS_REMEDY = "Name its authority in broker_use_ssl['ca_certs'], or a server_hostname if it is for another name"


def unreachable(url: AmqpUrl, error: OSError) -> ConnectionLost:
    """Return the error for a broker that cannot be connected to."""
    reason = "time-out" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return ConnectionLost(f"cannot connect to RabbitMQ at {url}: {reason}. Is it running, and is broker_url right?")


def tls_failed(url: object, error: Exception, remedy: str = TLS_REMEDY) -> FastqError:
    """Return the error for a TLS handshake that failed: certificates are settings, the rest may pass.

    ``remedy`` says where an authority is named for this kind of server.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return SettingsError(f"the certificate of {url} is not trusted: {error.verify_message}. {remedy}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return SettingsError(f"TLS with {url} failed: {error.reason or error}. Does that port speak TLS 1.2 or later?")
    return ConnectionLost(f"TLS with {url} failed: {error}. Does that port speak TLS 1.2 or later?")


def none_reachable(failures: Sequence[ConnectionLost], what: str = "broker") -> ConnectionLost:
    """Return the only error, or one that names them all."""
    if len(failures) == 1:
        return failures[0]
    return ConnectionLost(f"no {what} can be reached: " + "; ".join(str(error) for error in failures))


def lost(url: AmqpUrl, error: Exception, doing: str) -> ConnectionLost:
    """Return the error for a connection that broke."""
    timed_out = isinstance(error, (TimeoutError, BlockingIOError))
    found = ConnectionLost(f"connection to RabbitMQ at {url} lost while {doing}: {'time-out' if timed_out else error}")
    found.timed_out = timed_out
    return found
