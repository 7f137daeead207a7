"""The Redis client, blocking and on a loop, against real servers: logins, TLS, Sentinel, every way to be cut off."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

import pytest
import uvloop

from fastq.brokers.redis import blocking
from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import RedisUrl, parse_redis_url
from fastq.errors import ConnectionLost, LocalProtocolError, RedisError, SettingsError
from fastq.net.tls import TlsOptions, tls_context
from fastq.settings import Settings
from tests.support.certificates import Authority
from tests.support.conformance import in_child
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Redis, RedisSentinel, free_ports, wait_until

pytestmark = pytest.mark.redis

T = TypeVar("T")
TIMEOUT_S = 5.0


def parse(text: str, **settings: Any) -> RedisUrl:
    (url,) = parse_redis_url(text, Settings(settings))
    return url


# --- URLs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://", RedisUrl()),
        ("redis", RedisUrl()),
        ("redis://h", RedisUrl("h")),
        ("redis://h:7/2", RedisUrl("h", 7, 2)),
        ("redis://h//3", RedisUrl("h", db=3)),
        ("redis://h?db=4", RedisUrl("h", db=4)),
        ("redis://:p%40%2F@h", RedisUrl("h", password="p@/")),
        ("redis://u:p@[::1]:7/1", RedisUrl("::1", 7, 1, "u", "p")),
        ("redis+socket:///run/r.sock?virtual_host=5", RedisUrl(db=5, path="/run/r.sock")),
        ("redis+socket://:pw@/run/r.sock", RedisUrl(path="/run/r.sock", password="pw")),
        ("unix:///run/r.sock?db=2&password=pw", RedisUrl(path="/run/r.sock", db=2, password="pw")),
        ("rediss://h", RedisUrl("h", tls=TlsOptions())),
        ("rediss://h?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=%2Fca", RedisUrl("h", tls=TlsOptions(ca_file="/ca"))),
        ("rediss://h?ssl_cert_reqs=none", RedisUrl("h", tls=TlsOptions(insecure=True))),
        ("rediss://h?ssl_check_hostname=false", RedisUrl("h", tls=TlsOptions(checks_host=False))),
        ("redis://h?socket_timeout=3&health_check_interval=25", RedisUrl("h")),
    ],
)
def test_a_url_is_read_as_celery_reads_it(text: str, expected: RedisUrl) -> None:
    assert parse(text) == expected


def test_several_urls_are_several_servers() -> None:
    urls = parse_redis_url("redis://:a;b@one;redis://two:7/1;", Settings())
    assert urls == [RedisUrl("one", password="a;b"), RedisUrl("two", 7, 1)]


def test_sentinels_are_one_place_with_a_login_of_their_own() -> None:
    options = {"master_name": "m", "sentinel_kwargs": {"password": "s", "socket_timeout": 1, "ssl": True}}
    url = parse("sentinel://:p@h:1/4;sentinel://h2", broker_transport_options=options | {"unrelated": 1})
    assert (url.service, url.db, url.password) == ("m", 4, "p")
    assert url.sentinels == (
        RedisUrl("h", 1, password="s", tls=TlsOptions()),
        RedisUrl("h2", 26379, password="s", tls=TlsOptions()),
    )


def test_tls_options_come_from_the_setting_of_the_purpose() -> None:
    settings = Settings(
        {
            "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_NONE},
            "redis_backend_use_ssl": {"ssl_cert_reqs": "required", "ssl_ca_certs": "ca", "ssl_keyfile": "k"},
        }
    )
    (broker,) = parse_redis_url("redis://h", settings)
    (results,) = parse_redis_url("rediss://h", settings, "results")
    assert broker.tls == TlsOptions(insecure=True)
    assert results.tls == TlsOptions(ca_file="ca", key_file="k")


@pytest.mark.parametrize("purpose", ["broker", "results"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ssl_check_hostname": "false"}, "ssl_check_hostname is false: the host name is NOT verified"),
        (
            {"ssl_cert_reqs": "none"},
            "TLS without checks (cert_reqs, insecure): certificate and host name are NOT verified",
        ),
        ({"ssl_check_hostname": "true", "ssl_cert_reqs": "required"}, ""),
    ],
)
def test_what_is_not_verified_is_said(
    caplog: pytest.LogCaptureFixture, purpose: Any, options: dict[str, str], said: str
) -> None:
    setting = {"broker": "broker_use_ssl", "results": "redis_backend_use_ssl"}[purpose]
    (by_url,) = parse_redis_url(f"rediss://h?{urlencode(options)}", Settings(), purpose)
    (by_setting,) = parse_redis_url("rediss://h", Settings({setting: options}), purpose)
    assert by_url == by_setting
    assert by_url.tls is not None
    tls_context.cache_clear()
    assert tls_context(by_url.tls).check_hostname is not bool(said)
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])


def test_what_the_url_of_results_leaves_out_comes_from_settings() -> None:
    names = {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p"}
    settings = Settings({f"redis_{name}": value for name, value in names.items()})
    assert parse_redis_url("redis://", settings, "results") == [RedisUrl(**names)]  # type: ignore[arg-type]
    assert parse_redis_url("redis://x:1/2", settings, "results") == [RedisUrl("x", 1, 2, "u", "p")]
    assert parse_redis_url("redis://", settings) == [RedisUrl()]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("http://h", {}, "unknown scheme 'http'"),
        ("redis://h/x", {}, "database 'x' is not a number"),
        ("redis://h:port", {}, "port"),
        ("redis://h?credential_provider=a.B", {}, "name username and password"),
        ("redis://h?ssl_cert_reqs=none", {}, "write rediss://"),
        ("redis+socket://", {}, "path is missing"),
        ("redis://:secret#x@h", {}, "special characters"),
        ("", {}, "broker_url is empty"),
        ("sentinel://h", {}, "'master_name'"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(text: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse(text, **settings)
    assert "secret" not in str(caught.value)


def test_what_nobody_reads_is_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        url = parse("redis://:secret@h?nonsense=1&lib_name=proj", broker_use_ssl={"ssl_validate_ocsp": False})
    assert url == RedisUrl("h", password="secret", tls=TlsOptions())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "unknown parameter 'nonsense' is ignored" in caplog.text
    assert "broker_use_ssl: unknown TLS option 'ssl_validate_ocsp' is ignored" in caplog.text
    assert "secret" not in caplog.text


def test_secrets_are_not_shown() -> None:
    options = {"master_name": "m", "sentinel_kwargs": {"password": "hidden"}}
    settings = Settings({"broker_transport_options": options, "redis_password": "hidden"})
    urls = parse_redis_url("redis://u:hidden@h/1;sentinel://:hidden@h", settings)
    shown = f"{urls} {[str(url) for url in urls]} {settings} {TlsOptions(key_password='hidden')}"
    assert "hidden" not in shown
    assert str(urls[0]) == "redis://u:**@h:6379/1"


# --- both clients as one


class Client(Protocol):
    def call(self, *command: Any) -> Any: ...
    def pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]: ...
    def close(self) -> None: ...


class OnLoop:
    """The asynchronous client with blocking methods. It is opened at once."""

    def __init__(self, urls: list[RedisUrl], timeout_s: float = TIMEOUT_S, name: str = "", **options: Any) -> None:
        self._loop = uvloop.new_event_loop()
        self.redis = AsyncRedis(urls, name, **options)
        try:
            self.run(self.redis.open(timeout_s))
        except BaseException:
            self._loop.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, 10 * TIMEOUT_S))

    def call(self, *command: Any) -> Any:
        return self.run(self.redis.call(*command))

    def pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        return self.run(self.redis.pipeline(commands))

    def lost(self) -> Exception:
        return self.run(self._lost())

    async def _lost(self) -> Exception:
        return await self.redis.lost

    def close(self) -> None:
        if not self._loop.is_closed():
            self.run(self.redis.close())
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()


Connect = Callable[..., Client]


@pytest.fixture(params=["blocking", "loop"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A function that returns a connected client of either kind to a URL."""
    clients: list[Client] = []

    def connect(text: str, timeout_s: float = TIMEOUT_S, name: str = "", **settings: Any) -> Client:
        urls = parse_redis_url(text, Settings(settings))
        if request.param == "loop":
            clients.append(OnLoop(urls, timeout_s, name))
        else:
            clients.append(BlockingRedis(urls, timeout_s, name))
            clients[-1].open()  # type: ignore[attr-defined]
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def start_redis(redis_server: Redis, tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    """A function that starts a server with lines of redis.conf."""
    servers: list[Redis] = []

    def start(kind: type[Redis] = Redis, *arguments: Any) -> Any:
        folder = tmp_path / f"redis{len(servers)}"
        folder.mkdir()
        servers.append(kind(folder, *arguments))
        return servers[-1].start()

    yield start
    for server in servers:
        server.close()


# --- commands


def test_commands_have_replies_and_errors(connect: Connect, redis_server: Redis) -> None:
    client = connect(redis_server.url(1), name="some name")
    assert client.call("SET", "key", b"\x00\xff") == b"OK"
    assert client.call("GET", "key") == b"\x00\xff"
    assert client.call("GET", "no-such-key") is None
    assert client.call("CLIENT", "GETNAME") == b"some_name"
    with pytest.raises(RedisError, match="WRONGTYPE") as caught:
        client.call("LPUSH", "key", 1)
    assert caught.value.code == "WRONGTYPE"
    one, error, three = client.pipeline([("INCR", "n"), ("NO-SUCH-COMMAND",), ("DEL", "n", "key")])
    assert (one, three) == (1, 2)
    assert isinstance(error, RedisError)
    assert client.pipeline([("ECHO", "x" * 3_000_000)]) == [b"x" * 3_000_000]


def test_the_database_of_the_url_is_used(connect: Connect, redis_server: Redis) -> None:
    two, three = connect(redis_server.url(2)), connect(redis_server.url(3))
    two.call("SET", "only-in", "two")
    assert three.call("GET", "only-in") is None
    with pytest.raises(SettingsError, match="has no database 99"):
        connect(redis_server.url(99))


def test_a_unix_socket(connect: Connect, start_redis: Callable[..., Redis]) -> None:
    server = start_redis(Redis, {"unixsocket": "redis.sock"})
    client = connect(f"redis+socket://{server.folder}/redis.sock?virtual_host=4")
    assert client.call("PING") == b"PONG"
    with pytest.raises(ConnectionLost, match=r"cannot connect to Redis at redis\+socket://.*No such file"):
        connect(f"redis+socket://{server.folder}/other.sock")


def test_users_and_passwords(connect: Connect, start_redis: Callable[..., Redis]) -> None:
    server = start_redis(Redis, {"requirepass": "pa@ss"})
    place = f"127.0.0.1:{server.port}/0"
    admin = connect(f"redis://:pa%40ss@{place}")
    admin.call("ACL", "SETUSER", "ann", "on", ">word", "~*", "&*", "+@all")
    assert connect(f"redis://ann:word@{place}").call("ACL", "WHOAMI") == b"ann"
    for login, remedy in (("", "wants a password"), (":wrong@", "Check user"), ("ann:wrong@", "Check user")):
        with pytest.raises(SettingsError, match=remedy) as caught:
            connect(f"redis://{login}{place}")
        assert "wrong" not in str(caught.value).replace("wrong password", "")


def test_a_password_that_nobody_asked_for(connect: Connect, redis_server: Redis) -> None:
    with pytest.raises(SettingsError, match="has no password: leave it out"):
        connect(f"redis://:x@127.0.0.1:{redis_server.port}")


def test_a_server_with_too_many_clients_is_tried_again(connect: Connect, start_redis: Callable[..., Redis]) -> None:
    server = start_redis(Redis, {"maxclients": "1"})
    wait_until(lambda: _can_connect(connect, server.url()), TIMEOUT_S, lambda: AssertionError("never had room"))
    for name in ("", "name"):
        with pytest.raises(ConnectionLost, match=r"takes no connection now.*max number of clients"):
            connect(server.url(1), name=name)


def _can_connect(connect: Connect, url: str) -> bool:
    try:  # the fixture's own look at the server may not have been forgotten yet
        connect(url)
    except ConnectionLost:
        return False
    return True


def test_the_first_server_that_answers_is_used(connect: Connect, redis_server: Redis) -> None:
    nobody = f"redis://127.0.0.1:{free_ports(1)}"
    assert connect(f"{nobody};{redis_server.url()}").call("PING") == b"PONG"
    with pytest.raises(ConnectionLost, match=r"no Redis can be reached: .*refused.*refused"):
        connect(f"{nobody};{nobody}")


def test_a_server_that_says_nothing_is_given_up_in_time(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
        assert 0.25 < time.monotonic() - began < 2.0


def test_a_server_that_speaks_something_else_is_no_redis(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def greet() -> None:
            connection, _ = other.accept()
            connection.sendall(b"220 mail.example.org\r\n")
            connection.recv(1000)
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ConnectionLost, match="does not speak Redis's protocol"):
            connect(f"redis://127.0.0.1:{port}")


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority", "fastq test authority")


@pytest.fixture
def tls_port(authority: Authority, start_redis: Callable[..., Redis]) -> int:
    certificate, key = authority.issue("redis")
    files = {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(authority.file)}
    port = free_ports(1)
    start_redis(Redis, {**files, "tls-port": str(port), "tls-auth-clients": "optional"})
    return port


def test_a_certificate_of_a_trusted_authority_lets_through(
    connect: Connect, authority: Authority, tls_port: int
) -> None:
    client = connect(f"rediss://127.0.0.1:{tls_port}/1?ssl_cert_reqs=required&ssl_ca_certs={authority.file}")
    big = "x" * 3_000_000
    assert client.pipeline([("SET", "big", big), ("GET", "big")]) == [b"OK", big.encode()]


def test_an_unknown_authority_is_refused_unless_checks_are_off(connect: Connect, tls_port: int) -> None:
    with pytest.raises(SettingsError, match="is not trusted"):
        connect(f"rediss://127.0.0.1:{tls_port}")
    assert connect(f"rediss://127.0.0.1:{tls_port}?ssl_cert_reqs=CERT_NONE").call("PING") == b"PONG"


def test_a_certificate_for_another_name_is_refused_unless_that_check_is_off(
    connect: Connect, authority: Authority, start_redis: Callable[..., Redis]
) -> None:
    certificate, key = authority.issue("elsewhere", "DNS:elsewhere.example")
    files = {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(authority.file)}
    port = free_ports(1)
    start_redis(Redis, {**files, "tls-port": str(port), "tls-auth-clients": "no"})
    url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.file}"
    with pytest.raises(SettingsError, match="is not trusted"):
        connect(url)
    assert connect(f"{url}&ssl_check_hostname=false").call("PING") == b"PONG"


def test_a_client_certificate_is_shown_when_asked_for(
    connect: Connect, authority: Authority, start_redis: Callable[..., Redis]
) -> None:
    certificate, key = authority.issue("strict")
    own, own_key = authority.issue("client")
    files = {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(authority.file)}
    port = free_ports(1)
    start_redis(Redis, {**files, "tls-port": str(port), "tls-auth-clients": "yes"})
    use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(authority.file)}
    with pytest.raises((ConnectionLost, SettingsError)):
        connect(f"redis://127.0.0.1:{port}", broker_use_ssl=use_ssl)
    with_own = use_ssl | {"ssl_certfile": str(own), "ssl_keyfile": str(own_key)}
    assert connect(f"redis://127.0.0.1:{port}", broker_use_ssl=with_own).call("PING") == b"PONG"


def test_tls_and_plain_do_not_mix(connect: Connect, tls_port: int, redis_server: Redis) -> None:
    with pytest.raises(ConnectionLost, match="write rediss://"):
        connect(f"redis://127.0.0.1:{tls_port}")
    with pytest.raises((SettingsError, ConnectionLost), match=r"TLS with|with TLS"):
        connect(f"rediss://127.0.0.1:{redis_server.port}")
    with pytest.raises(SettingsError, match="Check ca_certs"):
        connect(f"rediss://127.0.0.1:{tls_port}?ssl_ca_certs=/no/such/file")


# --- Sentinel


def test_the_master_is_found_and_a_failover_followed(connect: Connect, start_redis: Callable[..., Any]) -> None:
    fast = {"repl-ping-replica-period": "1", "repl-diskless-sync-delay": "0"}
    master = start_redis(Redis, fast)
    replica = start_redis(Redis, {**fast, "replicaof": f"127.0.0.1 {master.port}"})
    sentinel = start_redis(RedisSentinel, master.port)
    text = f"sentinel://127.0.0.1:{free_ports(1)};{sentinel.url(2)}"
    options = {"master_name": "mymaster"}
    client = connect(text, broker_transport_options=options)
    assert client.call("CONFIG", "GET", "port")[1] == str(master.port).encode()
    admin = BlockingRedis([RedisUrl("127.0.0.1", sentinel.port)], TIMEOUT_S)
    wait_until(
        lambda: b"online" in _replication(master) and bool(_replicas(admin)),
        20.0,
        lambda: AssertionError(f"no replica: {_replication(master)!r}"),
    )
    client.call("SET", "before", "failover")
    assert client.call("WAIT", 1, 3000) == 1
    master.kill9()
    with pytest.raises(ConnectionLost):
        client.call("GET", "before")
    wait_until(
        lambda: (
            admin.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")[1] == str(replica.port).encode()
            and b"role:master" in _replication(replica)
        ),
        30.0,
        lambda: AssertionError(sentinel.log()[-3000:]),
    )
    admin.close()
    again = connect(text, broker_transport_options=options)
    assert again.call("GET", "before") == b"failover"
    with pytest.raises(ConnectionLost, match="knows no master"):
        connect(text, broker_transport_options={"master_name": "other"})


def _replicas(admin: BlockingRedis) -> Any:
    return admin.call("SENTINEL", "REPLICAS", "mymaster")


def _replication(server: Redis) -> bytes:
    client = BlockingRedis([RedisUrl("127.0.0.1", server.port)], TIMEOUT_S)
    try:
        return bytes(client.call("INFO", "replication"))
    finally:
        client.close()


def test_a_server_that_is_no_master_any_more_is_left(connect: Connect, start_redis: Callable[..., Redis]) -> None:
    server = start_redis()
    client = connect(server.url())
    client.call("REPLICAOF", "127.0.0.1", free_ports(1))
    with pytest.raises(ConnectionLost, match="READONLY"):
        client.call("SET", "a", 1)


# --- cut off


def test_a_connection_cut_in_the_middle_is_one_error(
    connect: Connect, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = connect(f"redis://127.0.0.1:{proxy.port}")
    client.call("SET", "long", "x" * 100_000)
    proxy.cut_after(50_000)
    with pytest.raises(ConnectionLost):
        client.call("GET", "long")


def test_the_blocking_client_connects_again_by_itself(
    redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = BlockingRedis([parse(f"redis://127.0.0.1:{proxy.port}")], TIMEOUT_S)
    assert client.call("PING") == b"PONG"
    proxy.cut()
    with pytest.raises(ConnectionLost):
        client.call("PING")
    assert client.call("PING") == b"PONG"
    client.close()
    client.close()


def test_a_connection_that_was_closed_while_nobody_used_it_costs_no_error(
    redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "IDLE_CHECK_S", 0.0)
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = BlockingRedis([parse(f"redis://127.0.0.1:{proxy.port}")], TIMEOUT_S)
    assert client.call("PING") == b"PONG"
    proxy.cut()
    assert client.call("PING") == b"PONG"
    assert proxy.connections == 2
    client.close()


def test_a_reply_that_does_not_come_ends_the_connection(start_redis: Callable[..., Redis]) -> None:
    server = start_redis()
    client = BlockingRedis([parse(server.url())], 0.5)
    client.call("SET", "a", "first")
    server.pause()
    with pytest.raises(ConnectionLost, match=r"has not answered for 0\.5 s"):
        client.call("GET", "a")
    server.resume()
    assert client.call("PING") == b"PONG", "the late reply is not taken for this one"
    client.close()


@pytest.mark.parametrize("step", ["_await_replies", "_feed"])
def test_a_signal_between_a_command_and_its_reply_ends_the_connection(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    redis = BlockingRedis([parse(redis_server.url())], TIMEOUT_S, "test")
    redis.call("PING")

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(redis, step, strike)
        with pytest.raises(KeyboardInterrupt):
            redis.pipeline([("ECHO", "struck")])
    assert redis.pipeline([("ECHO", "next")]) == [b"next"]
    redis.close()


@pytest.mark.parametrize("subscribed", [False, True])
def test_a_stalled_server_is_noticed_by_the_loops_client(
    subscribed: bool, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = OnLoop([parse(f"redis://127.0.0.1:{proxy.port}")], health_check_interval_s=0.2)
    if subscribed:
        client.redis.subscribe("some-channel")
    client.run(asyncio.sleep(1.0))
    assert client.redis.is_open, "a server that only has nothing to say is not lost"
    proxy.stall()
    began = time.monotonic()
    assert "has not answered" in str(client.lost())
    assert time.monotonic() - began < 2.0
    with pytest.raises(ConnectionLost, match="has not answered"):
        client.call("PING")
    client.close()


def test_a_question_to_a_stalled_server_is_an_error_in_time(
    redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = OnLoop([parse(f"redis://127.0.0.1:{proxy.port}")], health_check_interval_s=0.2)
    proxy.stall()
    with pytest.raises(ConnectionLost, match="has not answered"):
        client.call("PING")
    client.close()


def test_a_process_that_was_stopped_does_not_blame_the_server(redis_server: Redis) -> None:
    client = OnLoop([parse(redis_server.url())], health_check_interval_s=0.1)
    client.run(asyncio.sleep(0.11))
    time.sleep(0.5)  # the loop does not run meanwhile
    client.run(asyncio.sleep(0.3))
    assert client.redis.is_open
    client.close()


def test_replies_go_to_whom_they_are_for(redis_server: Redis) -> None:
    client = OnLoop([parse(redis_server.url())])

    async def ask() -> list[Any]:
        batches: list[Any] = []
        done = asyncio.get_running_loop().create_future()
        for number in range(50):
            client.redis.send([("ECHO", number), ("ECHO", "x")], batches.append)
        client.redis.send([("PING",)], done.set_result)
        await done
        return batches

    assert client.run(ask()) == [[str(number).encode(), b"x"] for number in range(50)]
    client.close()


def test_nothing_is_called_back_after_the_connection_was_lost(redis_server: Redis) -> None:
    client = OnLoop([parse(redis_server.url())])
    calls: list[Any] = []
    client.run(client.redis.close())
    client.redis.send([("PING",)], calls.append)
    assert "was closed" in str(client.lost())
    assert calls == []
    client.close()


# --- subscriptions


def test_messages_of_subscriptions_are_pushed(redis_server: Redis) -> None:
    other, client = BlockingRedis([parse(redis_server.url())], TIMEOUT_S), OnLoop([parse(redis_server.url())])
    pushes: list[Any] = []

    async def listen() -> None:
        came = asyncio.Event()
        client.redis.on_push = lambda push: (pushes.append(push), came.set())  # type: ignore[assignment,func-returns-value]
        client.redis.subscribe("one", "two")
        client.redis.psubscribe("p*")
        while len(pushes) < 3:
            await came.wait()
            came.clear()
        other.pipeline([("PUBLISH", "two", "hello"), ("PUBLISH", "pp", "you")])
        while len(pushes) < 5:
            await came.wait()
            came.clear()

    client.run(listen())
    assert pushes[:3] == [[b"subscribe", b"one", 1], [b"subscribe", b"two", 2], [b"psubscribe", b"p*", 3]]
    assert pushes[3:] == [[b"message", b"two", b"hello"], [b"pmessage", b"p*", b"pp", b"you"]]
    with pytest.raises(LocalProtocolError, match="listens to channels"):
        client.redis.send([("GET", "a")], pushes.append)
    client.close()
    other.close()


def test_messages_are_read_by_the_blocking_client(redis_server: Redis) -> None:
    other, client = (BlockingRedis([parse(redis_server.url())], TIMEOUT_S) for _ in range(2))
    client.subscribe("channel")
    assert client.read_push(time.monotonic() + TIMEOUT_S) == [b"subscribe", b"channel", 1]
    other.call("PUBLISH", "channel", "text")
    assert client.read_push(time.monotonic() + TIMEOUT_S) == [b"message", b"channel", b"text"]
    began = time.monotonic()
    assert client.read_push(began + 0.1) is None
    assert time.monotonic() - began >= 0.1
    client.unsubscribe("channel")
    assert client.read_push(time.monotonic() + TIMEOUT_S) == [b"unsubscribe", b"channel", 0]
    with pytest.raises(LocalProtocolError, match="listens to channels"):
        client.call("GET", "a")
    client.close()
    with pytest.raises(ConnectionLost, match="there is no connection"):
        client.read_push(time.monotonic() + TIMEOUT_S)
    other.close()


def test_a_stalled_server_is_noticed_by_who_listens(
    redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "PING_EVERY_S", 0.2)
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    client = BlockingRedis([parse(f"redis://127.0.0.1:{proxy.port}")], TIMEOUT_S)
    client.subscribe("channel")
    assert client.read_push(time.monotonic() + TIMEOUT_S) is not None
    assert client.read_push(time.monotonic() + 1.0) is None, "a silent channel is no fault"
    proxy.stall()
    with pytest.raises(ConnectionLost, match="has not answered"):
        client.read_push(time.monotonic() + TIMEOUT_S)
    client.close()


# --- forks


def test_a_child_has_a_connection_of_its_own(redis_server: Redis) -> None:
    client = BlockingRedis([parse(redis_server.url())], TIMEOUT_S)
    mine = client.call("CLIENT", "ID")
    theirs = in_child(lambda: client.call("CLIENT", "ID"))
    assert theirs.startswith("returned ")
    assert theirs != f"returned {mine}"
    assert client.call("CLIENT", "ID") == mine
    client.close()
