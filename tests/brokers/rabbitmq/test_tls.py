"""TLS to RabbitMQ: a good certificate lets through, a bad one is refused with a clear line, in producers and workers.

The broker is a real one; a proxy in front of it ends the TLS, so that every test can have a certificate of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastq.brokers.rabbitmq.consumer import AmqpConsumer
from fastq.brokers.rabbitmq.on_loop import AmqpLoopPublisher
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.rabbitmq.url import parse_amqp_url
from fastq.errors import FastqError, PublishError, SettingsError
from fastq.net.tls import tls_context
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.certificates import Authority

pytestmark = pytest.mark.rabbitmq


class TlsProxy:
    """A loopback port that speaks TLS and forwards what is inside to a plain port."""

    def __init__(self, context: ssl.SSLContext, target: int) -> None:
        self.port = 0
        self._context, self._target = context, target
        self._loop = asyncio.new_event_loop()
        # A client that refuses the certificate is what the tests are about, not an error of the proxy.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, target_writer), self._pump(target_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.transport.abort()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return Authority(tmp_path_factory.mktemp("tls") / "ca", "tests")


Serve = Callable[..., str]


@pytest.fixture
def serve(amqp_url: str) -> Iterator[Serve]:
    """A function that returns the amqps:// URL of a proxy with this certificate in front of the broker."""
    proxies: list[TlsProxy] = []

    def start(files: tuple[Path, Path], newest: ssl.TLSVersion | None = None, clients: Path | None = None) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if newest is not None:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = newest
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(*files)
        proxies.append(TlsProxy(context, parse_amqp_url(amqp_url).port))
        return f"amqps://guest:guest@127.0.0.1:{proxies[-1].port}/{parse_amqp_url(amqp_url).vhost}"

    yield start
    for proxy in proxies:
        proxy.close()


def publish(url: str, **use_ssl: Any) -> int:
    """Publish three messages and return how many there are now."""
    settings = Settings({"broker_url": url, "broker_use_ssl": use_ssl, "fastq_publish_timeout": 5.0})
    with contextlib.closing(AmqpPublisher(url, settings)) as publisher:
        for messages in ([task()], [task(), task(bytes(300_000))]):
            publisher.publish(messages)
        return publisher.depth("q")


def publish_on_loops(url: str, **use_ssl: Any) -> int:
    """Publish three messages from each kind of event loop and return how many there are now."""
    settings = Settings({"broker_url": url, "broker_use_ssl": use_ssl, "fastq_publish_timeout": 5.0})

    async def work() -> None:
        publisher = AmqpLoopPublisher(url, settings)
        try:
            for messages in ([task()], [task(), task(bytes(300_000))]):
                await publisher.publish(messages)
        finally:
            await publisher.close()

    asyncio.run(work())
    uvloop.run(work())
    with contextlib.closing(AmqpPublisher(url, settings)) as publisher:
        return publisher.depth("q")


def task(body: bytes = b"[[],{},{}]") -> Any:
    return encode_task("t.noop", new_id(), body, routing_key="q")


def open_consumer(url: str, **use_ssl: Any) -> None:
    """Connect as a worker does, receive, and close."""

    async def work() -> None:
        consumer = AmqpConsumer(url, Settings({"broker_url": url, "broker_use_ssl": use_ssl}))
        await consumer.open()
        await consumer.consume(["q"], 10)
        await consumer.close()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 30))
    finally:
        loop.close()


def assert_refused(url: str, problem: str, **use_ssl: Any) -> None:
    for connect in (publish, publish_on_loops, open_consumer):
        with pytest.raises(SettingsError, match=problem) as caught:
            connect(url, **use_ssl)
        assert "\n" not in str(caught.value)


def test_a_good_certificate_lets_through(authority: Authority, serve: Serve) -> None:
    url = serve(authority.issue("good"))
    assert publish(url, ca_certs=str(authority.file)) == 3
    open_consumer(url, ca_certs=str(authority.file))
    assert publish(f"{url}?cacertfile={authority.file}") == 6
    assert publish_on_loops(url, ca_certs=str(authority.file)) == 12


def test_the_name_to_check_can_be_given(authority: Authority, serve: Serve) -> None:
    url = serve(authority.issue("named", host="DNS:broker.example"))
    assert_refused(url, "not trusted.*127.0.0.1.*server_hostname", ca_certs=str(authority.file))
    assert publish(url, ca_certs=str(authority.file), server_hostname="broker.example") == 3
    open_consumer(url, ca_certs=str(authority.file), server_hostname="broker.example")


def test_an_unknown_authority_is_refused(authority: Authority, serve: Serve, tmp_path: Path) -> None:
    url = serve(authority.issue("unknown"))
    assert_refused(url, r"not trusted.*ca_certs")
    other = Authority(tmp_path / "other", "other")
    assert_refused(url, r"not trusted.*ca_certs", ca_certs=str(other.file))


def test_a_self_signed_certificate_is_refused(authority: Authority, serve: Serve) -> None:
    assert_refused(serve((authority.file, authority.folder / "ca.key")), "not trusted.*self.signed")


@pytest.mark.parametrize(("years", "problem"), [((2001, 2002), "expired"), ((2040, 2041), "not yet valid")])
def test_a_certificate_out_of_its_time_is_refused(
    years: tuple[int, int], problem: str, authority: Authority, serve: Serve
) -> None:
    url = serve(authority.issue(f"year{years[0]}", years=years))
    assert_refused(url, f"not trusted.*{problem}", ca_certs=str(authority.file))


def test_old_versions_of_the_protocol_are_refused(authority: Authority, serve: Serve) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        url = serve(authority.issue("old"), newest=ssl.TLSVersion.TLSv1_1)
    for connect in (publish, open_consumer):
        with pytest.raises(FastqError, match=r"TLS 1\.2 or later"):
            connect(url, ca_certs=str(authority.file))


def test_a_plain_port_is_told_apart(authority: Authority, amqp_url: str) -> None:
    url = amqp_url.replace("amqp://", "amqps://")
    for connect in (publish, open_consumer):
        with pytest.raises(FastqError, match=r"TLS with .* failed|closed the connection"):
            connect(url, ca_certs=str(authority.file))


def test_tls_is_told_apart_from_a_plain_url(authority: Authority, serve: Serve) -> None:
    url = serve(authority.issue("plain")).replace("amqps://", "amqp://")
    for connect in (publish, open_consumer):
        with pytest.raises(FastqError, match=r"amqps://|does not speak AMQP"):
            connect(url)


def test_checks_can_be_turned_off_and_that_is_logged(
    authority: Authority, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    tls_context.cache_clear()
    url = serve(authority.issue("insecure", host="DNS:elsewhere"))
    assert publish(f"{url}?ssl_insecure=true") == 3
    assert "NOT verified" in caplog.text
    open_consumer(f"{url}?ssl_insecure=true")


def test_a_certificate_of_ours_is_shown_when_the_broker_asks(authority: Authority, serve: Serve) -> None:
    url = serve(authority.issue("mutual"), clients=authority.file)
    certificate, key = authority.issue("client", host="DNS:client")
    own = {"ca_certs": str(authority.file), "certfile": str(certificate), "keyfile": str(key)}
    assert publish(url, **own) == 3
    open_consumer(url, **own)
    for connect in (publish, open_consumer):
        with pytest.raises(FastqError, match=r"TLS with|closed the connection|lost while"):
            connect(url, ca_certs=str(authority.file))


def test_a_publisher_over_tls_waits_no_longer_than_it_may(authority: Authority, serve: Serve, rabbitmq: Any) -> None:
    url = serve(authority.issue("slow"))
    settings = Settings(
        {"broker_url": url, "broker_use_ssl": {"ca_certs": str(authority.file)}, "fastq_publish_timeout": 0.5}
    )
    with contextlib.closing(AmqpPublisher(url, settings)) as publisher:
        publisher.publish([task()])
        rabbitmq.block_publishers()
        try:
            # The alarm reaches the connection a moment after it was raised.
            with pytest.raises(PublishError, match="blocks publishers"):
                all(publisher.publish([task()]) is None for _ in range(500))
        finally:
            rabbitmq.unblock_publishers()
        publisher.publish([task()])
