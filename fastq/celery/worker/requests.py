"""A message as Celery's worker code sees it: ``kombu.Message`` and ``celery.worker.request.Request`` from a delivery.

Made only for what is rare in the main process: failures that no child can record, receivers of its signals. And the
other way round: messages of protocol 1, put into today's form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import celery
from celery.utils.imports import symbol_by_name
from kombu import serialization
from kombu.message import Message

from fastq.codecs import json
from fastq.codecs._walk import members, short_repr
from fastq.errors import DecodeError
from fastq.wire.message import encode_properties
from fastq.wire.properties import decode_properties, readable_properties

#: What is read in the main process: bytes of a body, and how deep it may be nested.
_MAX_BYTES = 1024 * 1024
_MAX_BODY_DEPTH = 512


def message_of(app: celery.Celery, found: Mapping[str, Any], channel: Any = None) -> Message:
    """Return the delivery, as ``Delivery.describe`` gives it, as a kombu message."""
    properties = dict(decode_properties(found["props"], bounded=False))
    headers = properties.pop("headers", None) or {}
    info = {
        "exchange": found["exchange"],
        "routing_key": found["routing_key"],
        "redelivered": found["redelivered"],
        "priority": properties.get("priority"),
        "delivery_tag": None,
    }
    return Message(
        body=found["body"],
        channel=channel,
        content_type=properties.get("content_type"),
        content_encoding=properties.get("content_encoding"),
        delivery_info=info,
        properties=properties,
        headers=headers,
        accept=serialization.prepare_accept_content(app.conf.accept_content),
    )


def request_of(
    app: celery.Celery,
    found: Mapping[str, Any],
    hostname: str,
    eventer: Any = None,
    on_ack: Callable[..., None] | None = None,
    on_reject: Callable[..., None] | None = None,
) -> Any:
    """Return Celery's Request for a delivery of a known task; the task's own Request class if it names one."""
    message = message_of(app, found)
    task = app.tasks[message.headers["task"]]
    request = symbol_by_name(task.Request)(
        message,
        on_ack=on_ack or _nothing,
        on_reject=on_reject or _nothing,
        hostname=hostname,
        eventer=eventer,
        app=app,
        task=task,
    )
    request.acknowledged = found["acknowledged"]
    return request


def _nothing(*args: object) -> None:
    pass


def waiting_on(app: celery.Celery, props: bytes, body: bytes) -> dict[str, Any]:
    """Return, as fields of a request, what waits for the end of a message that no child reads: error callbacks, chord,
    the rest of a chain, and by which group and root.

    None where it is not told: only plain JSON of a moderate size is read here, and only where it is accepted.
    """
    properties = readable_properties(props)
    headers = properties.get("headers") or {}
    embed: dict[str, Any] = {}
    if _is_plain_json(app, properties, headers) and len(body) <= _MAX_BYTES:
        with contextlib.suppress(DecodeError):
            parts = json.decode_plain(body, _MAX_BODY_DEPTH)
            if isinstance(parts, list) and len(parts) == 3 and isinstance(parts[2], dict):
                embed = parts[2]
    chord = embed.get("chord")
    names = {name: headers.get(name) for name in ("group", "root_id", "parent_id")}
    index = headers.get("group_index")
    return {
        "errbacks": _signatures(embed.get("errbacks")),
        "chain": _signatures(embed.get("chain")),
        "chord": chord if isinstance(chord, dict) else None,
        "group_index": index if isinstance(index, int) else None,
        **{name: value if isinstance(value, str) else None for name, value in names.items()},
    }


def _is_plain_json(app: celery.Celery, properties: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    encoding = properties.get("content_encoding") or json.content_encoding
    return (
        _takes_json(properties.get("content_type"), serialization.prepare_accept_content(app.conf.accept_content))
        and isinstance(encoding, str)
        and encoding.lower() == json.content_encoding
        and headers.get("compression") is None
    )


def _takes_json(content_type: object, accept: set[str] | None) -> bool:
    return content_type == json.content_type and (accept is None or content_type in accept)


def _signatures(found: object) -> list[dict[str, Any]] | None:
    if not isinstance(found, list):
        return None
    return [each for each in found if isinstance(each, dict)] or None


# --- protocol 1 -------------------------------------------------------------------------------------------------------

#: Fields of an old message's body, and what the header is called today.
_MOVED = {
    "task": "task",
    "id": "id",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "group": "group",
    "group_index": "group_index",
    "shadow": "shadow",
    "eta": "eta",
    "expires": "expires",
    "retries": "retries",
    "timelimit": "timelimit",
    "origin": "origin",
}


_FOLLOW_UPS = ("callbacks", "errbacks", "chord")

#: This is read in the main process. Of JSON the arguments are not: they are passed on as they are.
_MAX_YAML_BYTES = 16 * 1024  # measured: 0.1 s at worst
_MAX_FIELD_BYTES = 64 * 1024
_MAX_DEPTH = 32


def modern_form(app: celery.Celery, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
    """Return properties and body of a protocol 1 message as protocol 2; None when it is no such message."""
    try:
        return _modern_form(app, props, body)
    except Exception:  # bytes of anybody's, by a serializer of anybody's: the caller counts it as malformed
        return None


def _modern_form(app: celery.Celery, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
    properties = dict(decode_properties(props))
    content_type = properties.get("content_type") or json.content_type
    accept = serialization.prepare_accept_content(app.conf.accept_content)
    if _takes_json(content_type, accept):
        fields, encoding, payload = _read_json(body)
    else:
        fields, encoding, payload = _read_other(body, content_type, accept)
    if not isinstance(fields.get("task"), str):
        return None
    headers = {name: fields.get(old) for old, name in _MOVED.items()}
    for name in ("eta", "expires"):
        moment = headers[name]
        if isinstance(moment, datetime):  # YAML has a form for it, and pickle
            headers[name] = moment.isoformat()
    if headers["group"] is None:
        headers["group"] = fields.get("taskset")
    headers["lang"] = "py"
    headers["argsrepr"], headers["kwargsrepr"] = fields["argsrepr"], fields["kwargsrepr"]
    headers.update(properties.pop("headers", None) or {})
    properties.update(headers=headers, content_type=content_type, content_encoding=encoding)
    if isinstance(headers["id"], str):  # else it is refused for its id
        properties.setdefault("correlation_id", headers["id"])
    return encode_properties(properties), payload


def _read_json(body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """Return the fields of a JSON body, and encoding and body of the same call in today's form."""
    parts = {name.decode(): part for name, part in (members(body) or {}).items()}
    args, kwargs = _or_empty(parts.get("args"), b"[]"), _or_empty(parts.get("kwargs"), b"{}")
    fields = {
        name: json.decode_plain(parts[name], _MAX_DEPTH)
        for name in (*_MOVED, "taskset")
        if name in parts and len(parts[name]) <= _MAX_FIELD_BYTES
    }
    fields["argsrepr"], fields["kwargsrepr"] = _text_of(args), _text_of(kwargs)
    embed = b", ".join(b'"%b": %b' % (name.encode(), parts.get(name, b"null")) for name in _FOLLOW_UPS)
    return fields, json.content_encoding, b'[%b, %b, {%b, "chain": null}]' % (args, kwargs, embed)


def _or_empty(part: bytes | None, empty: bytes) -> bytes:
    if part is None or part == b"null":
        return empty
    if part[:1] != empty[:1]:
        raise DecodeError(f"{part[:80]!r} is not {empty!r} nor like it")
    return part


def _text_of(part: bytes) -> str:
    if len(part) > _MAX_FIELD_BYTES:
        return part[:1000].decode("utf-8", "replace") + "..."
    return short_repr(json.decode_plain(part, _MAX_BODY_DEPTH))


def _read_other(body: bytes, content_type: str, accept: set[str] | None) -> tuple[dict[str, Any], str, bytes]:
    """Return the same of a body in another serializer."""
    name = serialization.registry.type_to_name[content_type]
    # Without a reader, kombu would read it as text in whatever encoding the message names.
    is_readable = content_type in serialization.registry._decoders
    if not is_readable or len(body) > (_MAX_YAML_BYTES if name == "yaml" else _MAX_BYTES):
        raise DecodeError(f"{len(body)} bytes of {content_type} are not read here")
    fields = serialization.loads(body, content_type, "utf-8", accept)
    args, kwargs = fields.get("args") or (), fields.get("kwargs") or {}
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
        raise DecodeError("the arguments are no list, or the keyword arguments no mapping")
    fields["argsrepr"], fields["kwargsrepr"] = short_repr(args), short_repr(kwargs)
    embed = {"chain": None, **{each: fields.get(each) for each in _FOLLOW_UPS}}
    _, encoding, payload = serialization.dumps((args, kwargs, embed), serializer=name)
    return fields, encoding, payload.encode() if isinstance(payload, str) else payload
