"""YAML through PyYAML's safe loader: plain values only, no tags that build objects."""

from __future__ import annotations

from typing import Any

import yaml

from fastq.errors import DecodeError, EncodeError

name = "yaml"
content_type = "application/x-yaml"
content_encoding = "utf-8"

# The C versions are about ten times as fast; PyYAML may have been built without them.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def encode(value: Any) -> bytes:
    """Return the value as YAML. Raises EncodeError."""
    try:
        text: str = yaml.dump(_lists(value), Dumper=_Dumper, allow_unicode=True)
        return text.encode("utf-8")
    except (yaml.YAMLError, RecursionError, UnicodeEncodeError) as error:
        raise EncodeError(f"no YAML form: {error}") from error


def decode(data: bytes) -> Any:
    """Return the value in a YAML text. Raises DecodeError."""
    try:
        return yaml.load(data, Loader=_Loader)  # noqa: S506 - one of the two safe loaders
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DecodeError(f"not YAML: {error}") from error


def _lists(value: Any) -> Any:
    """Return the outer tuple as a list: a message body is a tuple here, and safe YAML knows only lists."""
    return [list(item) if isinstance(item, tuple) else item for item in value] if isinstance(value, tuple) else value
