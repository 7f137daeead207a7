"""The configuration as others may see it, without secrets, and the text for bug reports."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from fastq.brokers import RABBITMQ, try_broker
from fastq.brokers.rabbitmq.url import split_url
from fastq.net.urls import mask_text, mask_url, scheme_of, split_urls
from fastq.version import __version__

if TYPE_CHECKING:
    from fastq.settings import Settings

_MASK: Final = "********"
#: Celery's list of words, and what holds key files' passwords.
_SECRET: Final = re.compile("API|TOKEN|KEY|SECRET|PASS|PROFANITIES_LIST|SIGNATURE|DATABASE|BEAT_DBURI|CREDENTIAL", re.I)
_URLS: Final = frozenset({"broker_url", "result_backend"})
_URL: Final = re.compile("URL|URI|BACKEND$", re.I)
_LIBRARIES: Final = ("hiredis", "orjson", "uvloop", "psutil", "click")


def configuration(settings: Settings, with_defaults: bool = False) -> dict[str, Any]:
    """Return the settings that were changed, or all, with secrets masked; every value has a JSON form."""
    names = sorted(name for name in dir(type(settings)) if name in settings) if with_defaults else settings.changes()
    return {name: shown(name, settings[name]) for name in dict.fromkeys([*names, *sorted(_URLS)])}


def shown(name: str, value: Any) -> Any:
    """Return the value of a setting, or of a key inside of one, without secrets."""
    if name not in _URLS and _SECRET.search(name):
        return _MASK
    if isinstance(value, Mapping):
        return {str(key): shown(str(key), each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [shown(name, each) for each in value]
    if value is None or isinstance(value, (int, float, bool)):
        return value
    return without_password(name, value if isinstance(value, str) else repr(value))


def without_password(name: str, text: str) -> str:
    """Return the text of a setting with the passwords in its URLs masked; one that is to be a URL may be misspelt."""
    return mask_url(text) if _URL.search(name) else mask_text(text)


def software() -> str:
    """Return the versions of fastq and of what it is built on."""
    return " ".join([f"fastq:{__version__}", *(f"{name}:{_version(name)}" for name in _LIBRARIES)])


def report_text(settings: Settings) -> str:
    """Return what a bug report should say of this installation."""
    results = mask_url(settings.result_backend or "disabled")
    lines = [
        "",
        f"software -> {software()}",
        f"            py:{platform.python_version()}",
        f"platform -> system:{platform.system()} arch:{', '.join(filter(None, platform.architecture()))}",
        f"            kernel version:{platform.release()} imp:{platform.python_implementation()}",
        f"settings -> transport:{scheme_of(settings.broker_url)} results:{results}",
        "",
        *(f"{name}: {value!r}" for name, value in configuration(settings).items()),
        "",
    ]
    return "\n".join(lines)


def broker_info(settings: Settings) -> dict[str, Any]:
    """Return where the broker is, under kombu's names; the first one when several are tried in turn."""
    urls = split_urls(settings.broker_url or "")
    parts = split_url(urls[0] if urls else "")
    broker = try_broker(urls[0] if urls else "") or RABBITMQ
    is_tls = parts.scheme in broker.tls_schemes
    return {
        "hostname": parts.hostname or "localhost",
        "userid": unquote(parts.username) if parts.username else broker.user,
        "virtual_host": unquote(parts.path[1:]) or broker.virtual_host,
        "port": parts.port or broker.ports.get(parts.scheme, 0),
        "insist": False,
        "ssl": bool(settings.broker_use_ssl) or is_tls,
        "transport": parts.scheme,
        "connect_timeout": settings.broker_connection_timeout,
        "transport_options": shown("", settings.broker_transport_options),
        "login_method": "PLAIN" if broker.speaks_amqp else None,
        "uri_prefix": None,
        "heartbeat": settings.broker_heartbeat,
        "failover_strategy": settings.broker_failover_strategy,
        "alternates": [mask_url(url) for url in urls[1:]],
        "credential_provider": None,
    }


def _version(name: str) -> str:
    from importlib import metadata  # few workers are ever asked for it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
