"""A TCP proxy that misbehaves on request: delay, stall, cut, half-open, cut at a byte. It knows no protocol.

It runs in a thread of its own; every method may be called from the test's thread and has taken effect when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

Direction = Literal["to_server", "to_client"]
CHUNK_BYTES = 65_536
CALL_TIMEOUT_S = 10.0

T = TypeVar("T")


class FaultProxy:
    """A loopback port that forwards to host:port until told to do something worse."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0
        self.latency_s = 0.0  # added to each chunk, in each direction
        self.connections = 0  # accepted since the start
        self.bytes: dict[Direction, int] = {"to_server": 0, "to_client": 0}
        self._refusing = False
        self._cut_after: dict[Direction, int | None] = {"to_server": None, "to_client": None}
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing: dict[Direction, asyncio.Event] = {"to_server": asyncio.Event(), "to_client": asyncio.Event()}
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._ready = threading.Event()

    def start(self) -> FaultProxy:
        """Return self when the port accepts connections."""
        self._thread.start()
        if not self._ready.wait(CALL_TIMEOUT_S):
            raise TimeoutError("the fault proxy did not start")
        return self

    def close(self) -> None:
        """Drop every connection and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_TIMEOUT_S)

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def url(self, url: str) -> str:
        """Return the URL with its host and port replaced by the proxy's."""
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
        return urlunsplit(parts._replace(netloc=netloc))

    # -- faults

    def stall(self) -> None:
        """Forward nothing more, in either direction, while every connection stays open: a network that hangs."""
        for flowing in self._flowing.values():
            self._call(flowing.clear)

    def hold_replies(self) -> None:
        """Forward nothing more to the client: a server that takes everything and is slow to answer."""
        self._call(self._flowing["to_client"].clear)

    def resume(self) -> None:
        """Forward again, first what was held back."""
        for flowing in self._flowing.values():
            self._call(flowing.set)

    def cut(self, reset: bool = True) -> int:
        """Close every connection on both sides, with RST or in order, and return how many there were."""
        return self._call(lambda: self._cut_all(reset))

    def half_open(self) -> None:
        """Drop the server's side of every connection and tell the client nothing: a peer that lost its power."""
        self._call(self._half_open_all)

    def cut_after(self, count: int, direction: Direction = "to_client") -> None:
        """Reset each connection once `count` more bytes have gone in that direction; the byte after is never sent."""
        self._call(lambda: self._cut_after.__setitem__(direction, count))

    def refuse(self, refusing: bool = True) -> None:
        """Reset new connections at once: a port where nothing answers."""
        self._call(lambda: setattr(self, "_refusing", refusing))

    def altered(self, direction: Direction, chunk: bytes) -> bytes:
        """Return what is forwarded instead of a chunk; for a proxy that means harm."""
        return chunk

    # -- inside, on the proxy's thread

    def _call(self, function: Callable[[], T]) -> T:
        async def on_loop() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(CALL_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accepted, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        for flowing in self._flowing.values():
            flowing.set()
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self._cut_all(reset=False)
            self._loop.run_until_complete(self._end_tasks())
            self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets the transports' connection_lost callbacks run

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            _close(writer, reset=True)
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _close(writer, reset=True)
            return
        pair = _Pair(writer, server_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._pump(pair, "to_server", reader, server_writer),
                self._pump(pair, "to_client", server_reader, writer),
            )
        except asyncio.CancelledError:
            # The proxy is being closed; asyncio's stream server would report a cancelled handler as an error.
            return
        finally:
            if not pair.half_open:
                self._pairs.discard(pair)
                pair.close(reset=False)

    async def _pump(
        self, pair: _Pair, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while chunk := await reader.read(CHUNK_BYTES):
                await self._delay(direction)
                chunk = self.altered(direction, chunk)
                limit = self._cut_after[direction]
                if limit is not None and len(chunk) > limit:
                    writer.write(chunk[:limit])
                    self._count(direction, limit)
                    await writer.drain()
                    pair.close(reset=True)
                    return
                # Counted first: what the peer has must be in the figures by then.
                self._count(direction, len(chunk))
                writer.write(chunk)
                await writer.drain()
        if not pair.half_open and not writer.is_closing() and writer.can_write_eof():
            with contextlib.suppress(OSError):
                writer.write_eof()

    async def _delay(self, direction: Direction) -> None:
        await self._flowing[direction].wait()
        if self.latency_s:
            await asyncio.sleep(self.latency_s)

    def _count(self, direction: Direction, count: int) -> None:
        self.bytes[direction] += count
        limit = self._cut_after[direction]
        if limit is not None:
            self._cut_after[direction] = max(0, limit - count)

    def _cut_all(self, reset: bool) -> int:
        pairs = list(self._pairs)
        self._pairs.clear()
        for pair in pairs:
            pair.close(reset)
        # What was cut once must not cut the next connection at its first byte.
        self._cut_after = {"to_server": None, "to_client": None}
        return len(pairs)

    def _half_open_all(self) -> None:
        for pair in self._pairs:
            pair.half_open = True
            _close(pair.server, reset=True)


class _Pair:
    """The two ends of one forwarded connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.half_open = False

    def close(self, reset: bool) -> None:
        """Close both ends."""
        _close(self.client, reset)
        _close(self.server, reset)


def _close(writer: asyncio.StreamWriter, reset: bool) -> None:
    transport = writer.transport
    raw = transport.get_extra_info("socket")
    if reset and raw is not None and not transport.is_closing():
        # Linger of zero seconds: close() sends RST and drops what was not sent.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        writer.close()
