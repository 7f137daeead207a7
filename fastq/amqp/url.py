"""Broker URLs: where a RabbitMQ is and how to talk to it, and any URL without its secrets for logs. No sockets.

Source: RabbitMQ's URI specification and query parameters; Celery's ``broker_url`` (several URLs as a list or with ``;``
between) and ``broker_use_ssl``.
"""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from fastq.errors import SettingsError

if TYPE_CHECKING:
    import ssl

    from fastq.settings import Settings

logger = logging.getLogger(__name__)

SCHEMES = {"amqp": False, "amqps": True, "pyamqp": False, "librabbitmq": False}
WRONG_PLACE = "host or port is wrong, or the password has special characters"
MECHANISMS = ("PLAIN", "AMQPLAIN", "EXTERNAL")

# Celery's names, the same with ssl_ in front (Redis users write those), and the names of RabbitMQ's own URI parameters.
TLS_NAMES = {
    "ca_certs": "ca_file",
    "cacertfile": "ca_file",
    "certfile": "cert_file",
    "keyfile": "key_file",
    "password": "key_password",
    "server_hostname": "server_name",
    "server_name_indication": "server_name",
    "ciphers": "ciphers",
    "insecure": "insecure",
    "cert_reqs": "insecure",
    "verify": "insecure",
}
OTHER_NAMES = ("heartbeat", "auth_mechanism", "login_method")
# py-amqp's options that change nothing here: the protocol is TLS 1.2 or later whatever is asked for.
TLS_IGNORED = {"ssl_version", "do_handshake_on_connect", "suppress_ragged_eofs"}

SECRET_PARAMETER = re.compile(r"(?i)([?&][^=&]*(?:pass|secret|token|credential|api_?key)[^=&]*=)[^&\s'\"]*")
LOGIN = re.compile(r"(://[^:@/\s'\"]*:)[^\s'\"]+@")


def mask_url(url: str) -> str:
    """Return one URL, or several with ``;`` between, with ``**`` for passwords and for parameters that sound secret."""
    return ";".join(mask_one(part) for part in split_urls(url))


def mask_text(text: str) -> str:
    """Return a text with the passwords in its URLs masked, which end at the last ``@`` before a space or quote."""
    return SECRET_PARAMETER.sub(r"\1**", LOGIN.sub(r"\1**@", text))


def mask_one(url: str) -> str:
    """Return a single URL without its secrets; works on URLs that are too broken to parse."""
    scheme, separator, rest = url.partition("://")
    if not separator:  # with a typing error, or only what follows a scheme
        scheme, rest = "", url
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return SECRET_PARAMETER.sub(r"\1**", f"{scheme}{separator}{user}{colon}{'**' if colon else ''}{at}{place}")


def split_urls(urls: str | Sequence[str]) -> list[str]:
    """Return the single URLs of a setting: a list, or text with ``;`` before each further URL."""
    if not isinstance(urls, str):
        return [part for url in urls for part in split_urls(url)]
    return [part for part in re.split(r";(?=[A-Za-z][\w+.-]*://)", urls.strip().rstrip(";")) if part]


@dataclass(frozen=True)
class TlsOptions:
    """How to check the broker's certificate, and our own one if it asks for one."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    key_password: str | None = field(default=None, repr=False)
    server_name: str | None = None
    ciphers: str | None = None
    insecure: bool = False


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
    if parts.scheme not in SCHEMES:
        raise unusable(text, f"unknown scheme {parts.scheme!r}; known: {', '.join(SCHEMES)}")
    if parts.fragment or "@" in parts.path:
        raise unusable(text, "a user, password or virtual host with special characters")
    query = parse_query(text, parts)
    options = parse_tls(text, dict(use_ssl) if isinstance(use_ssl, Mapping) else {})
    options |= parse_tls(text, query)
    tls = TlsOptions(**options) if SCHEMES[parts.scheme] or use_ssl or options else None
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


def parts_of(text: str) -> SplitResult:
    """Return the parts of a URL. Raises ValueError, without Python's words: they show what it took for the port."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError(WRONG_PLACE) from None
    if "@" in parts.query and "@" not in parts.netloc:
        raise ValueError(WRONG_PLACE)  # a "?" in the password
    return parts


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


def warn_ignored(where: str, kind: str, name: str, known: Iterable[str]) -> None:
    """Log, once, that an option is not known and changes nothing."""
    _warn_once(f"{where}: unknown {kind} {name!r} is ignored; known: {', '.join(sorted(known))}")


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


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


def parse_tls(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TLS options among ``options`` by TlsOptions' names; an unknown one is ignored with a warning."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        short = name.removeprefix("ssl_")
        if name in TLS_IGNORED or name in OTHER_NAMES:
            continue
        if short not in TLS_NAMES:
            warn_ignored(f"broker_use_ssl or {mask_one(text)}", "TLS option", name, TLS_NAMES)
            continue
        if short in ("cert_reqs", "verify"):
            found["insecure"] = found.get("insecure", False) or means_unchecked(value)
        elif short == "insecure":
            found["insecure"] = found.get("insecure", False) or str(value).lower() in ("1", "true", "yes", "on")
        else:
            found[TLS_NAMES[short]] = value
    return found


def means_unchecked(value: object) -> bool:
    """Whether a ``cert_reqs`` or ``verify`` value turns the check of the broker's certificate off."""
    if isinstance(value, int):
        return int(value) == 0  # ssl.CERT_NONE
    return str(value).lower() in ("none", "cert_none", "ssl.cert_none", "verify_none", "0")


@functools.lru_cache(maxsize=64)
def tls_context(options: TlsOptions) -> ssl.SSLContext:
    """Return the context for a connection: TLS 1.2 or later, certificate and host verified. Raises SettingsError."""
    import ssl  # not at the top: it is slow to load, and children would carry it

    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file, options.key_password)
        if options.ciphers:
            context.set_ciphers(options.ciphers)
    except (OSError, ssl.SSLError) as error:
        files = [getattr(options, name.name) for name in fields(options) if name.name.endswith("_file")]
        raise SettingsError(
            f"TLS files {', '.join(repr(name) for name in files if name)} cannot be used: {error}. "
            "Check ca_certs, certfile and keyfile of broker_use_ssl"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.insecure:
        logger.warning("ssl_insecure is set: the broker's certificate and host name are NOT verified")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


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
