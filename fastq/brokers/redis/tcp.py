"""A blocking connection to Redis, with TLS where its URL says so; failures as one clear error each. No commands."""

from __future__ import annotations

import socket
import time

from fastq.brokers.redis import login
from fastq.brokers.redis.url import RedisUrl
from fastq.net.tcp import avoid, connect_first, peer_of, tune_socket
from fastq.net.tls import tls_context


def connect_socket(url: RedisUrl, deadline: float) -> socket.socket:
    """Return a connected socket, with TLS where the URL says so. Raises ConnectionLost or SettingsError."""
    sock = _connect_plain(url, max(deadline - time.monotonic(), 0.001))
    if url.tls is None or url.path:
        return sock
    address = peer_of(sock)
    try:
        context = tls_context(url.tls)
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        return context.wrap_socket(sock, server_hostname=url.tls.server_name or url.host)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            avoid(address)
        if isinstance(error, OSError):
            raise login.tls_failed(url, error) from None
        raise


def _connect_plain(url: RedisUrl, timeout_s: float) -> socket.socket:
    try:
        if not url.path:
            sock = connect_first(url.host, url.port, timeout_s)
            tune_socket(sock)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(url.path)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise login.unreachable(url, error) from None
    return sock
