"""Redis URLs: where a server is, who logs in, and how its certificate is checked. No sockets.

Source: Celery's ``broker_url`` and ``result_backend`` for Redis (several with ``;`` between, ``sentinel://``,
``redis+socket://``), redis-py's parameters in URLs, Celery's ``broker_use_ssl`` and ``redis_backend_use_ssl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from urllib.parse import SplitResult, parse_qsl, unquote

from fastq.brokers import REDIS
from fastq.errors import SettingsError
from fastq.net.tls import TLS_IGNORED, TLS_NAMES, TlsOptions, parse_tls
from fastq.net.urls import mask_one, parts_of, split_urls, warn_ignored

if TYPE_CHECKING:
    from fastq.settings import Settings

#: Which of an application's two places a URL is for: each has settings of its own beside the URL.
Purpose: TypeAlias = Literal["broker", "results"]

DEFAULT_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
SOCKET_SCHEMES: Final = frozenset({"redis+socket", "redis+unix", "socket", "unix"})

#: redis-py's parameters that change nothing here: time-outs come from settings, connections are our own.
QUERY_IGNORED: Final = frozenset(
    {
        "client_name", "decode_responses", "driver_info", "encoding", "encoding_errors", "health_check_interval",
        "legacy_responses", "lib_name", "lib_version", "max_connections", "protocol", "retry_on_error",
        "retry_on_timeout", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options",
        "socket_read_size", "socket_timeout", "socket_type",
    }
)  # fmt: skip
QUERY_NAMES: Final = frozenset({"virtual_host", "db", "username", "password"})


@dataclass(frozen=True)
class RedisUrl:
    """One server, or one service that Sentinels know the master of. ``str()`` shows it without passwords."""

    host: str = "localhost"
    port: int = DEFAULT_PORT
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    #: A Unix socket; host and port mean nothing then.
    path: str = ""
    tls: TlsOptions | None = None
    #: Whom to ask for the master of ``service``; host and port mean nothing until then.
    sentinels: tuple[RedisUrl, ...] = ()
    #: The name that the Sentinels know the master by; a server reached so must be the master.
    service: str = ""

    def __str__(self) -> str:
        login = f"{self.username}:**@" if self.password else f"{self.username}@" if self.username else ""
        if self.path:
            return f"redis+socket://{login}{self.path}?virtual_host={self.db}"
        if self.sentinels:
            places = ",".join(sentinel.place for sentinel in self.sentinels)
            return f"sentinel://{login}{places}/{self.db} (master {self.service!r})"
        return f"{'rediss' if self.tls else 'redis'}://{login}{self.place}/{self.db}"

    @property
    def place(self) -> str:
        """Where the server is, without who logs in."""
        return self.path or f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_redis_url(text: str, settings: Settings, purpose: Purpose = "broker") -> list[RedisUrl]:
    """Return the servers that a URL, or several with ``;`` between, name: to be tried in turn. Raises SettingsError.

    ``purpose`` says whose TLS options, Sentinel options and default login apply. All ``sentinel://`` parts together are
    one item, as they name one master.
    """
    context = _Context(settings, purpose)
    parts = [_split(part) for part in split_urls(text)]
    if not parts:
        raise SettingsError(f"{context.setting} is empty; expected for example redis://localhost:6379/0")
    sentinels = [part for part in parts if part[1].scheme == "sentinel"]
    urls = [_parse_one(raw, split, context) for raw, split in parts if split.scheme != "sentinel"]
    return [*urls, _parse_sentinels(sentinels, context)] if sentinels else urls


class _Context:
    """What the settings say beside the URL."""

    def __init__(self, settings: Settings, purpose: Purpose) -> None:
        for_results = purpose == "results"
        self.setting = "result_backend" if for_results else "broker_url"
        self.tls_setting = "redis_backend_use_ssl" if for_results else "broker_use_ssl"
        self.options_setting = "result_backend_transport_options" if for_results else "broker_transport_options"
        self.tls: bool | Mapping[str, Any] = settings[self.tls_setting]
        self.options: Mapping[str, Any] = settings[self.options_setting]
        self.host = (settings.redis_host if for_results else None) or "localhost"
        self.port = (settings.redis_port if for_results else None) or DEFAULT_PORT
        self.db = (settings.redis_db if for_results else None) or 0
        self.username = (settings.redis_username if for_results else None) or ""
        self.password = (settings.redis_password if for_results else None) or ""


def _split(text: str) -> tuple[str, SplitResult]:
    # "redis" alone is the server of the settings redis_host, redis_port and so on.
    try:
        parts = parts_of(text if "://" in text else f"{text}://")
    except ValueError as error:
        raise unusable(text, str(error)) from None
    if parts.scheme not in REDIS.schemes:
        raise unusable(text, f"unknown scheme {parts.scheme!r}; known: {', '.join(sorted(REDIS.schemes))}")
    if parts.fragment or "@" in parts.path:
        raise unusable(text, "a user, password or path with special characters")
    return text, parts


def _parse_one(text: str, parts: SplitResult, context: _Context) -> RedisUrl:
    query = _parse_query(text, parts)
    tls_query = {name: value for name, value in query.items() if name.startswith("ssl_")}
    if tls_query and parts.scheme != "rediss":
        raise unusable(text, f"{sorted(tls_query)[0]} without TLS: write rediss:// for it")
    login: dict[str, Any] = {
        "username": unquote(parts.username or "") or query.get("username") or context.username,
        "password": unquote(parts.password or "") or query.get("password") or context.password,
    }
    if parts.scheme in SOCKET_SCHEMES:
        database = query.get("virtual_host") or query.get("db") or str(context.db)
        if not parts.path.strip("/"):
            raise unusable(text, "a Unix socket's path is missing")
        return RedisUrl(path=unquote(parts.path), db=_parse_database(text, database), **login)
    options = parse_tls(context.tls_setting, context.tls if isinstance(context.tls, Mapping) else {})
    options |= parse_tls(mask_one(text), tls_query)
    return RedisUrl(
        host=unquote(parts.hostname or "") or context.host,
        port=parts.port or context.port,
        db=_parse_database(text, parts.path.strip("/") or query.get("db") or str(context.db)),
        tls=TlsOptions(log="fastq.redis.url", **options) if parts.scheme == "rediss" or context.tls else None,
        **login,
    )


def _parse_sentinels(parts: list[tuple[str, SplitResult]], context: _Context) -> RedisUrl:
    service = context.options.get("master_name")
    if not isinstance(service, str) or not service:
        raise SettingsError(
            f"sentinel:// needs the master's name: {context.options_setting}={{'master_name': 'mymaster'}} "
            "(the name in `sentinel monitor` of sentinel.conf)"
        )
    text, first = parts[0]
    whole = _parse_one(text, first, context)
    own = context.options.get("sentinel_kwargs") or {}
    if not isinstance(own, Mapping):
        raise SettingsError(f"{context.options_setting}['sentinel_kwargs'] is not a dict")
    named = {name: value for name, value in own.items() if name.startswith("ssl_")}
    tls = TlsOptions(log="fastq.redis.url", **parse_tls(f"{context.options_setting}['sentinel_kwargs']", named))
    sentinels = tuple(
        RedisUrl(
            host=unquote(split.hostname or "") or "localhost",
            port=split.port or SENTINEL_PORT,
            username=str(own.get("username") or ""),
            password=str(own.get("password") or ""),
            tls=tls if own.get("ssl") or named else None,
        )
        for _, split in parts
    )
    return RedisUrl(
        db=whole.db, username=whole.username, password=whole.password, tls=whole.tls,
        sentinels=sentinels, service=service,
    )  # fmt: skip


def _parse_query(text: str, parts: SplitResult) -> dict[str, str]:
    """Return the URL's parameters. One that nobody reads is ignored with a warning."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "credential_provider" in query:
        raise unusable(text, "credential_provider is redis-py's; name username and password")
    known = {*QUERY_NAMES, *QUERY_IGNORED, *(f"ssl_{name}" for name in TLS_NAMES)}
    for name in query:
        if name not in known and not name.startswith("ssl_") and name not in TLS_IGNORED:
            warn_ignored(f"Redis URL {mask_one(text)}", "parameter", name, known)
    return query


def _parse_database(text: str, value: str) -> int:
    if not value.isdecimal():
        raise unusable(text, f"database {value!r} is not a number")
    return int(value)


def unusable(text: str, reason: str) -> SettingsError:
    """Return the error for a URL that cannot be used; the password is not shown."""
    return SettingsError(
        f"Redis URL {mask_one(text)!r}: {reason}. Expected redis://user:password@host:6379/0, special characters "
        "percent-encoded (/ is %2F, @ is %40)"
    )
