"""URLs of any server: taken apart, several in one text told apart, and shown without their secrets. No sockets."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

logger = logging.getLogger("fastq.amqp.url")

#: What is said of a URL that Python cannot take apart, in place of its words.
WRONG_PLACE: Final = "host or port is wrong, or the password has special characters"

SCHEME: Final = re.compile(r"[A-Za-z][\w+.-]*")
#: A part of somebody else's in place of a scheme: ``module:NAME``.
PLACE: Final = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")

SECRET_PARAMETER: Final = re.compile(r"(?i)([?&][^=&]*(?:pass|secret|token|credential|api_?key)[^=&]*=)[^&\s'\"]*")
LOGIN: Final = re.compile(r"(://[^:@/\s'\"]*:)[^\s'\"]+@")


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


def scheme_of(urls: str | Sequence[str] | None) -> str:
    """Return the scheme of a URL, or of the first of several, which may be a ``module:NAME``; a word alone is one.

    Nothing for what is neither: it may be a password.
    """
    scheme, separator, _ = next(iter(split_urls(urls or "")), "").partition("://")
    if SCHEME.fullmatch(scheme):
        return scheme.lower()
    return scheme if separator and PLACE.fullmatch(scheme) else ""


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


def warn_ignored(where: str, kind: str, name: str, known: Iterable[str]) -> None:
    """Log, once, that an option is not known and changes nothing."""
    _warn_once(f"{where}: unknown {kind} {name!r} is ignored; known: {', '.join(sorted(known))}")


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
