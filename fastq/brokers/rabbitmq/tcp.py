"""A blocking TCP connection to RabbitMQ, with TLS where its URL says so; failures as one clear error each. No AMQP."""

from __future__ import annotations

import socket
import time

from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost
from fastq.net.tcp import avoid, connect_first, peer_of, tune_socket
from fastq.net.tls import tls_context, tls_failed


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
    address = peer_of(sock)
    try:
        sock.settimeout(max(deadline - time.monotonic(), 0.1))
        return context.wrap_socket(sock, server_hostname=url.tls.server_name or url.host)
    except OSError as error:
        sock.close()
        if isinstance(error, TimeoutError):
            avoid(address)
        raise tls_failed(url, error) from None


def unreachable(url: AmqpUrl, error: OSError) -> ConnectionLost:
    """Return the error for a broker that cannot be connected to."""
    reason = "time-out" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return ConnectionLost(f"cannot connect to RabbitMQ at {url}: {reason}. Is it running, and is broker_url right?")


def lost(url: AmqpUrl, error: Exception, doing: str) -> ConnectionLost:
    """Return the error for a connection that broke."""
    timed_out = isinstance(error, (TimeoutError, BlockingIOError))
    found = ConnectionLost(f"connection to RabbitMQ at {url} lost while {doing}: {'time-out' if timed_out else error}")
    found.timed_out = timed_out
    return found
