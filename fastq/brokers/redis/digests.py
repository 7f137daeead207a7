"""Lua scripts by their digests: a server is sent one whole only when it does not know it, or has forgotten it.

Which scripts there are is for those who have them to say. Source: Redis's documentation of EVALSHA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from fastq.brokers.redis.login import Command
from fastq.errors import RedisError

_TEXTS: Final[dict[str, str]] = {}


def run_script(text: str, keys: Sequence[str], *arguments: str | bytes | float) -> Command:
    """Return the command that runs a script which the server knows."""
    return ("EVALSHA", _digest(text), len(keys), *keys, *arguments)


def is_script(command: Command) -> bool:
    """Whether a command is one of ``run_script``."""
    return command[0] == "EVALSHA"


def is_unknown(reply: Any) -> bool:
    """Whether a server says that it does not know a script: after SCRIPT FLUSH, a failover or a restart."""
    return isinstance(reply, RedisError) and reply.code == "NOSCRIPT"


def spelled_out(command: Command) -> Command:
    """Return the command that does the same and has the script in it, which makes it known."""
    return ("EVAL", _TEXTS[str(command[1])], *command[2:])


@lru_cache(maxsize=64)
def _digest(text: str) -> str:
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    _TEXTS[digest] = text
    return digest
