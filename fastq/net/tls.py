"""TLS to any server: Celery's names for its options, the context they make, and what a failed handshake means.

Source: Celery's ``broker_use_ssl`` and ``redis_backend_use_ssl``, RabbitMQ's URI parameters, redis-py's in URLs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fastq.errors import ConnectionLost, FastqError, SettingsError
from fastq.net.urls import warn_ignored

if TYPE_CHECKING:
    import ssl

#: Fields of TlsOptions by Celery's names, each with or without ``ssl_`` in front, and by those of RabbitMQ's own URIs.
TLS_NAMES: Final = {
    "ca_certs": "ca_file",
    "cacertfile": "ca_file",
    "ca_path": "ca_folder",
    "ca_data": "ca_data",
    "certfile": "cert_file",
    "keyfile": "key_file",
    "password": "key_password",
    "keyfile_password": "key_password",
    "server_hostname": "server_name",
    "server_name_indication": "server_name",
    "check_hostname": "checks_host",
    "ciphers": "ciphers",
    "insecure": "insecure",
    "cert_reqs": "insecure",
    "verify": "insecure",
}
#: What changes nothing here: the protocol is TLS 1.2 or later whatever is asked for.
TLS_IGNORED: Final = frozenset(
    {"ssl", "version", "ssl_version", "min_version", "do_handshake_on_connect", "suppress_ragged_eofs"}
)
TLS_REMEDY: Final = "Name its authority in broker_use_ssl['ca_certs'], or a server_hostname if it is for another name"


@dataclass(frozen=True)
class TlsOptions:
    """How to check the server's certificate, and our own one if it asks for one."""

    ca_file: str | None = None
    ca_folder: str | None = None
    ca_data: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    key_password: str | None = field(default=None, repr=False)
    server_name: str | None = None
    ciphers: str | None = None
    checks_host: bool = True
    insecure: bool = False
    #: Under which name it is logged that something is not checked.
    log: str = field(default="fastq.amqp.url", compare=False)


def parse_tls(where: str, options: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Return the TLS options among ``options`` by TlsOptions' names; of an unknown one only a warning names ``where``.

    ``others`` are names that somebody else reads.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        short = name.removeprefix("ssl_")
        if name in others or name in TLS_IGNORED or short in TLS_IGNORED:
            continue
        if short not in TLS_NAMES:
            warn_ignored(where, "TLS option", name, TLS_NAMES)
            continue
        if short in ("cert_reqs", "verify"):
            found["insecure"] = found.get("insecure", False) or _means_unchecked(value)
        elif short == "insecure":
            found["insecure"] = found.get("insecure", False) or str(value).lower() in ("1", "true", "yes", "on")
        elif short == "check_hostname":
            found["checks_host"] = str(value).lower() not in ("0", "false", "no", "off")
        else:
            found[TLS_NAMES[short]] = value
    return found


def _means_unchecked(value: object) -> bool:
    """Whether a ``cert_reqs`` or ``verify`` value turns the check of the server's certificate off."""
    if isinstance(value, int):
        return int(value) == 0  # ssl.CERT_NONE
    return str(value).lower() in ("none", "cert_none", "ssl.cert_none", "verify_none", "0")


@functools.lru_cache(maxsize=64)
def tls_context(options: TlsOptions) -> ssl.SSLContext:
    """Return the context for a connection: TLS 1.2 or later, certificate and host verified. Raises SettingsError."""
    import ssl  # not at the top: it is slow to load, and children would carry it

    try:
        context = ssl.create_default_context(cafile=options.ca_file, capath=options.ca_folder, cadata=options.ca_data)
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file, options.key_password)
        if options.ciphers:
            context.set_ciphers(options.ciphers)
    except (OSError, ssl.SSLError) as error:
        files = (options.ca_file, options.ca_folder, options.cert_file, options.key_file)
        raise SettingsError(
            f"TLS files {', '.join(repr(name) for name in files if name)} cannot be used: {error}. "
            "Check ca_certs, certfile and keyfile, with ssl_ in front for Redis"
        ) from None
    logger = logging.getLogger(options.log)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = options.checks_host
    if options.insecure:
        logger.warning("TLS without checks (cert_reqs, insecure): certificate and host name are NOT verified")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif not options.checks_host:
        logger.warning("ssl_check_hostname is false: the host name is NOT verified")
    return context


def tls_failed(url: object, error: Exception, remedy: str = TLS_REMEDY) -> FastqError:
    """Return the error for a TLS handshake that failed: certificates are settings, the rest may pass.

    ``remedy`` says where an authority is named for this kind of server.
    """
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        return SettingsError(f"the certificate of {url} is not trusted: {error.verify_message}. {remedy}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return SettingsError(f"TLS with {url} failed: {error.reason or error}. Does that port speak TLS 1.2 or later?")
    return ConnectionLost(f"TLS with {url} failed: {error}. Does that port speak TLS 1.2 or later?")
