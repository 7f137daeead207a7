"""YAML through PyYAML's safe loader: plain values only, no tags that build objects, aliases within a bound.

An alias costs its reader nothing until the value is written out again, or merged: a few lines of aliases to lines of
aliases are gigabytes then.
"""

from __future__ import annotations

import itertools
from typing import Any

import yaml

from fastq.errors import DecodeError, EncodeError

name = "yaml"
content_type = "application/x-yaml"
content_encoding = "utf-8"

#: Chosen: what aliases may add up to, in characters and values: so much, or so many times the text.
_MIN_BOUND = 1 << 20
_MAX_RATIO = 10
#: Chosen: days, hours, minutes, seconds, and some; reading one takes the square of its parts.
_MAX_PARTS = 16
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

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


def decode(data: bytes | str) -> Any:
    """Return the value in a YAML text. Raises DecodeError."""
    loader = None
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        _written_size(node, {}, max(_MIN_BOUND, _MAX_RATIO * len(data)))
        return loader.construct_document(node)
    except DecodeError:
        raise
    except Exception as error:  # PyYAML raises what comes for a scalar that is not what its tag says
        raise DecodeError(f"not YAML: {type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _written_size(node: yaml.Node, sizes: dict[int, int], bound: int) -> int:
    """Return the characters and values that a node is without aliases. Raises DecodeError beyond the bound."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and node.value.count(":") > _MAX_PARTS:
            raise DecodeError(f"a number to the base 60 of more than {_MAX_PARTS} parts")
        return 1 + len(node.value)
    known = sizes.get(id(node))
    if known is not None:
        if known < 0:
            raise DecodeError("a YAML alias inside of what it stands for")
        return known
    sizes[id(node)] = -1
    pairs = isinstance(node, yaml.MappingNode)
    size = 1
    for child in itertools.chain.from_iterable(node.value) if pairs else node.value:
        size += _written_size(child, sizes, bound)
        if size > bound:
            raise DecodeError(f"YAML whose aliases multiply to more than {bound} characters")
    sizes[id(node)] = size
    return size


def _lists(value: Any) -> Any:
    """Return the outer tuple as a list: a message body is a tuple here, and safe YAML knows only lists."""
    return [list(item) if isinstance(item, tuple) else item for item in value] if isinstance(value, tuple) else value
