"""Broker URLs: what they mean, what is refused, and that no password is ever shown."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from fastq.brokers.rabbitmq.url import AmqpUrl, Endpoints, parse_amqp_url
from fastq.errors import SettingsError
from fastq.net.tls import TlsOptions, tls_context
from fastq.net.urls import mask_url, split_urls
from fastq.settings import Settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amqp://", AmqpUrl()),
        ("amqp://localhost", AmqpUrl()),
        ("amqp://localhost//", AmqpUrl()),
        ("amqp://localhost/%2F", AmqpUrl()),
        ("pyamqp://guest@broker/jobs", AmqpUrl(host="broker", vhost="jobs")),
        ("amqp://u:p%40ss%2Fw%3Ard@broker:5673/my%2Fhost", AmqpUrl("broker", 5673, "u", "p@ss/w:rd", "my/host")),
        ("amqp://u:@broker", AmqpUrl("broker", 5672, "u", "")),
        ("amqp://[::1]:5673//", AmqpUrl("::1", 5673)),
        ("amqps://broker", AmqpUrl("broker", 5671, tls=TlsOptions())),
        ("amqp://broker?heartbeat=30&auth_mechanism=external", AmqpUrl("broker", mechanism="EXTERNAL", heartbeat_s=30)),
        (
            "amqps://broker/?cacertfile=/ca.pem&certfile=/me.pem&keyfile=/key.pem&server_name_indication=other",
            AmqpUrl(
                "broker", 5671, tls=TlsOptions("/ca.pem", cert_file="/me.pem", key_file="/key.pem", server_name="other")
            ),
        ),
        ("amqps://broker/?ssl_insecure=true", AmqpUrl("broker", 5671, tls=TlsOptions(insecure=True))),
        ("amqps://broker/?ssl_insecure=false", AmqpUrl("broker", 5671, tls=TlsOptions())),
        ("amqps://broker/?verify=verify_none", AmqpUrl("broker", 5671, tls=TlsOptions(insecure=True))),
    ],
)
def test_a_url_names_a_broker(text: str, expected: AmqpUrl) -> None:
    assert parse_amqp_url(text) == expected


@pytest.mark.parametrize(
    ("use_ssl", "expected"),
    [
        (False, None),
        (None, None),
        ({}, None),
        (True, TlsOptions()),
        ({"ca_certs": "/ca.pem"}, TlsOptions(ca_file="/ca.pem")),
        ({"ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": ssl.CERT_REQUIRED}, TlsOptions(ca_file="/ca.pem")),
        ({"cert_reqs": ssl.CERT_NONE}, TlsOptions(insecure=True)),
        ({"cert_reqs": "CERT_NONE", "insecure": False}, TlsOptions(insecure=True)),
        (
            {"keyfile": "/k", "certfile": "/c", "ssl_version": 17, "server_hostname": "x"},
            TlsOptions(cert_file="/c", key_file="/k", server_name="x"),
        ),
    ],
)
def test_broker_use_ssl_turns_tls_on(use_ssl: Any, expected: TlsOptions | None) -> None:
    assert parse_amqp_url("amqp://broker:5672", use_ssl).tls == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("amqp://u:secret@broker:port//", "[Pp]ort"),
        ("amqp://u:secret@broker:99999//", "[Pp]ort"),
        ("amqp://u:sec#ret@broker//", "special characters"),
        ("amqp://u:sec/secret@broker//", "special characters|[Pp]ort"),
        ("http://u:secret@broker//", "unknown scheme 'http'"),
        ("amqp://u:secret@broker//?heartbeat=soon", "not a number"),
        ("amqp://u:secret@broker//?auth_mechanism=magic", "unknown auth_mechanism 'magic'"),
    ],
)
def test_a_broken_url_is_one_clear_line_without_its_password(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        parse_amqp_url(text)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "amqp://user:password@host:5672/vhost" in str(caught.value)


def test_what_nobody_reads_is_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        url = parse_amqp_url("amqp://u:secret@broker//?heartbeet=3", {"ca_cert": "/ca.pem", "ssl_validate_ocsp": False})
    assert url == AmqpUrl("broker", 5671, "u", "secret", tls=TlsOptions())
    assert len(caplog.records) == 3
    assert "unknown parameter 'heartbeet' is ignored" in caplog.text
    assert "unknown TLS option 'ca_cert' is ignored" in caplog.text
    assert "secret" not in caplog.text


def test_missing_tls_files_are_named() -> None:
    with pytest.raises(SettingsError, match=r"'/nowhere/ca\.pem'"):
        tls_context(TlsOptions(ca_file="/nowhere/ca.pem"))


def test_tls_is_strict_unless_asked_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    strict = tls_context(TlsOptions())
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert strict.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert not caplog.records
    tls_context.cache_clear()
    loose = tls_context(TlsOptions(insecure=True))
    assert (loose.verify_mode, loose.check_hostname) == (ssl.CERT_NONE, False)
    assert "NOT verified" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amqp://guest:guest@localhost:5672//", "amqp://guest:**@localhost:5672//"),
        ("amqp://guest@localhost", "amqp://guest@localhost"),
        ("amqp://u:p@a//;amqp://u:q@b//", "amqp://u:**@a//;amqp://u:**@b//"),
        ("amqp://u:p;q@a//;amqp://u:q@b//", "amqp://u:**@a//;amqp://u:**@b//"),
        ("amqp://u:p@s/s:w@host", "amqp://u:**@host"),
        ("redis://:secret@host/0", "redis://:**@host/0"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        (
            "amqps://h//?certfile=/c&ssl_password=secret&heartbeat=3",
            "amqps://h//?certfile=/c&ssl_password=**&heartbeat=3",
        ),
        ("rpc://", "rpc://"),
        ("", ""),
    ],
)
def test_masked_urls_show_no_secret(text: str, expected: str) -> None:
    assert mask_url(text) == expected


def test_a_parsed_url_shows_no_secret() -> None:
    url = parse_amqp_url("amqps://u:secret@broker/jobs?ssl_password=secret")
    assert "secret" not in f"{url} {url!r}"
    assert str(url) == "amqps://u:**@broker:5671/jobs"
    assert str(AmqpUrl("::1")) == "amqp://guest:**@[::1]:5672//"


def test_several_urls_come_as_a_list_or_with_semicolons() -> None:
    assert split_urls(" amqp://a//;amqp://b//; ") == ["amqp://a//", "amqp://b//"]
    assert split_urls(["amqp://a//", "amqp://b//;amqp://c//"]) == ["amqp://a//", "amqp://b//", "amqp://c//"]


def hosts(endpoints: Endpoints) -> list[str]:
    return [url.host for url in endpoints]


def test_round_robin_starts_where_the_last_round_ended() -> None:
    endpoints = Endpoints("amqp://a;amqp://b;amqp://c", Settings())
    assert hosts(endpoints) == ["a", "b", "c"]
    # Nobody took the connection: the round ended at c.
    assert hosts(endpoints) == ["c", "a", "b"]
    for url in endpoints:
        if url.host == "a":
            break
    assert hosts(endpoints) == ["a", "b", "c"]


def test_the_login_method_is_the_urls_or_else_the_settings() -> None:
    settings = Settings({"broker_login_method": "AMQPLAIN"})
    urls = list(Endpoints("amqp://a;amqp://b?auth_mechanism=PLAIN", settings))
    assert [url.mechanism for url in urls] == ["AMQPLAIN", "PLAIN"]
    with pytest.raises(SettingsError, match="unknown auth_mechanism 'MAGIC'"):
        Endpoints("amqp://a", Settings({"broker_login_method": "MAGIC"}))


def test_shuffle_tries_each_one() -> None:
    names = [f"h{number}" for number in range(20)]
    endpoints = Endpoints([f"amqp://{name}" for name in names], Settings({"broker_failover_strategy": "shuffle"}))
    tried = hosts(endpoints)
    assert sorted(tried) == sorted(names)
    assert tried != names


def test_no_url_at_all_is_refused() -> None:
    with pytest.raises(SettingsError, match="empty"):
        Endpoints("", Settings())
