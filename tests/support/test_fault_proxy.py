"""The fault proxy itself: what it promises to a test holds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    acceptor.join(5)
    for thread in threads:
        thread.join(5)


@pytest.fixture
def proxy(echo: int) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo) as started:
        yield started


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (chunk := connection.recv(count - len(data))):
        data += chunk
    return data


def test_bytes_pass_unchanged_and_are_counted(proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 1000
    with connect(proxy) as connection:
        connection.sendall(data)
        assert receive(connection, len(data)) == data
    assert proxy.connections == 1
    assert proxy.bytes == {"to_server": len(data), "to_client": len(data)}


def test_the_url_keeps_everything_but_host_and_port(proxy: FaultProxy) -> None:
    assert proxy.url("amqp://a:b@example:5672/v?x=1") == f"amqp://a:b@127.0.0.1:{proxy.port}/v?x=1"
    assert proxy.url("redis://example/0") == f"redis://127.0.0.1:{proxy.port}/0"


def test_a_stalled_proxy_holds_bytes_back_until_it_resumes(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        proxy.stall()
        connection.sendall(b"b")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.resume()
        connection.settimeout(5)
        assert receive(connection, 1) == b"b"


def test_latency_delays_a_round_trip_by_both_directions(proxy: FaultProxy) -> None:
    proxy.latency_s = 0.05
    with connect(proxy) as connection:
        began = time.monotonic()
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        assert time.monotonic() - began >= 0.1


def test_a_cut_resets_the_client(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_cut_in_order_ends_the_stream(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        proxy.cut(reset=False)
        assert connection.recv(1) == b""


def test_cut_after_sends_just_so_many_bytes(proxy: FaultProxy) -> None:
    proxy.cut_after(5, "to_server")
    with connect(proxy) as connection:
        connection.sendall(b"abc")
        assert receive(connection, 3) == b"abc"
        connection.sendall(b"defg")
        with pytest.raises(ConnectionResetError):
            receive(connection, 100)
    assert proxy.bytes["to_server"] == 5


def test_a_half_open_connection_is_silent_to_the_client(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        proxy.half_open()
        connection.sendall(b"b")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_a_refusing_proxy_resets_new_connections(proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), connect(proxy) as connection:  # connect() itself may see the reset
        connection.recv(1)
    proxy.refuse(False)
    with connect(proxy) as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
