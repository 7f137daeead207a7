"""Broker URLs: where a RabbitMQ is and how to talk to it. No sockets.

Source: RabbitMQ's URI specification and query parameters; Celery's ``broker_url`` (several URLs as a list or with ``;``
between) and ``broker_use_ssl``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote

from fastq.brokers import RABBITMQ
from fastq.errors import SettingsError
from fastq.net.tls import TLS_IGNORED, TLS_NAMES, TlsOptions, parse_tls
from fastq.net.urls import mask_one, parts_of, split_urls, warn_ignored

if TYPE_CHECKING:
    from fastq.settings import Settings

MECHANISMS = ("PLAIN", "AMQPLAIN", "EXTERNAL")

OTHER_NAMES = ("heartbeat", "auth_mechanism", "login_method")


@dataclass(frozen=True)
class AmqpUrl:
    """One broker. ``str()`` shows it without the password."""

    host: str = "localhost"
    port: int = 5672
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: TlsOptions | None = None
    mechanism: str | None = None
    heartbeat_s: float | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'amqps' if self.tls else 'amqp'}://{self.user}:**@{host}:{self.port}/{self.vhost}"


def parse_amqp_url(
    text: str, use_ssl: bool | Mapping[str, Any] | None = None, login_method: str | None = None
) -> AmqpUrl:
    """Return the broker that a URL names; the default is amqp://guest:guest@localhost:5672//. Raises SettingsError.

    What the URL says wins over ``login_method``.
    """
    parts = split_url(text)
    if parts.scheme not in RABBITMQ.schemes:
        raise unusable(text, f"unknown scheme {parts.scheme!r}; known: {', '.join(RABBITMQ.schemes)}")
    if parts.fragment or "@" in parts.path:
        raise unusable(text, "a user, password or virtual host with special characters")
    query = parse_query(text, parts)
    where = f"broker_use_ssl or {mask_one(text)}"
    options = parse_tls(where, use_ssl if isinstance(use_ssl, Mapping) else {}, OTHER_NAMES)
    options |= parse_tls(where, query, OTHER_NAMES)
    tls = TlsOptions(**options) if parts.scheme in RABBITMQ.tls_schemes or use_ssl or options else None
    return AmqpUrl(
        host=parts.hostname or "localhost",
        port=parts.port or (5671 if tls else 5672),
        user=unquote(parts.username or "guest"),
        password=unquote("guest" if parts.password is None else parts.password),
        # Celery's rule: "//" is the default virtual host "/", and so is no path at all.
        vhost=unquote(parts.path[1:]) or "/",
        tls=tls,
        mechanism=parse_mechanism(text, query.get("auth_mechanism") or query.get("login_method") or login_method),
        heartbeat_s=parse_seconds(text, query.get("heartbeat")),
    )


def split_url(text: str) -> SplitResult:
    """Return the parts of a URL. Raises SettingsError."""
    try:
        return parts_of(text)
    except ValueError as error:
        raise unusable(text, str(error)) from None


def unusable(text: str, reason: str) -> SettingsError:
    """Return the error for a URL that cannot be used; the password is not shown."""
    return SettingsError(
        f"broker URL {mask_one(text)!r}: {reason}. Expected amqp://user:password@host:5672/vhost, "
        "special characters percent-encoded (/ is %2F, @ is %40)"
    )


def parse_query(text: str, parts: SplitResult) -> dict[str, str]:
    """Return the URL's parameters. One that nobody reads is ignored with a warning."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = {*OTHER_NAMES, *TLS_NAMES, *(f"ssl_{name}" for name in TLS_NAMES), *TLS_IGNORED}
    for name in sorted(set(query) - known):
        warn_ignored(f"broker URL {mask_one(text)}", "parameter", name, known)
    return {name: value for name, value in query.items() if name in known}


def parse_mechanism(text: str, value: str | None) -> str | None:
    """Return the login mechanism that was asked for. Raises SettingsError for an unknown one."""
    if value is None:
        return None
    if value.upper() not in MECHANISMS:
        raise unusable(text, f"unknown auth_mechanism {value!r}; known: {', '.join(MECHANISMS)}")
    return value.upper()


def parse_seconds(text: str, value: str | None) -> float | None:
    """Return a span of time of a parameter. Raises SettingsError when it is not a number."""
    if value is None:
        return None
    if not value.isdecimal():
        raise unusable(text, f"heartbeat={value!r} is not a number of seconds")
    return float(value)


class Endpoints:
    """The brokers of a setting, in the order in which to try them: the one that worked last comes first."""

    def __init__(self, urls: str | Sequence[str], settings: Settings) -> None:
        method = settings.broker_login_method
        self.urls = [parse_amqp_url(text, settings.broker_use_ssl, method) for text in split_urls(urls)]
        if not self.urls:
            raise SettingsError("broker_url is empty; expected for example amqp://guest:guest@localhost:5672//")
        if settings.broker_failover_strategy == "shuffle":
            random.shuffle(self.urls)
        self._first = 0

    def __iter__(self) -> Iterator[AmqpUrl]:
        """Every broker once. The next round starts at the one that this round ended with."""
        start = self._first
        for place in range(start, start + len(self.urls)):
            self._first = place % len(self.urls)
            yield self.urls[self._first]

    def __str__(self) -> str:
        return ";".join(str(url) for url in self.urls)
