"""A message as Celery's worker code sees it: ``kombu.Message`` and ``celery.worker.request.Request`` from a delivery.

Made only for what is rare in the main process: failures that no child can record, receivers of its signals. And the
other way round: messages of protocol 1, put into today's form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import celery
from celery.utils.imports import symbol_by_name
from celery.utils.saferepr import saferepr
from kombu import serialization
from kombu.message import Message

from fastq.wire.message import encode_properties
from fastq.wire.properties import decode_properties


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


def modern_form(app: celery.Celery, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
    """Return properties and body of a protocol 1 message as protocol 2; None when it is no such message."""
    try:
        return _modern_form(app, props, body)
    except Exception:  # bytes of anybody's, by a serializer of anybody's: the caller counts it as malformed
        return None


def _modern_form(app: celery.Celery, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
    properties = dict(decode_properties(props))
    content_type = properties.get("content_type") or "application/json"
    fields = serialization.loads(
        body,
        content_type,
        properties.get("content_encoding") or "utf-8",
        serialization.prepare_accept_content(app.conf.accept_content),
    )
    if not isinstance(fields, dict) or not isinstance(fields.get("task"), str):
        return None
    args, kwargs = fields.get("args") or (), fields.get("kwargs") or {}
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
        return None
    headers = {name: fields.get(old) for old, name in _MOVED.items()}
    for name in ("eta", "expires"):
        moment = headers[name]
        if isinstance(moment, datetime):  # YAML has a form for it, and pickle
            headers[name] = moment.isoformat()
    if headers["group"] is None:
        headers["group"] = fields.get("taskset")
    headers["lang"] = "py"
    headers["argsrepr"], headers["kwargsrepr"] = saferepr(args), saferepr(kwargs)
    headers.update(properties.pop("headers", None) or {})
    embed = {"callbacks": fields.get("callbacks"), "errbacks": fields.get("errbacks"), "chain": None}
    embed["chord"] = fields.get("chord")
    name = serialization.registry.type_to_name.get(content_type)
    content_type, encoding, payload = serialization.dumps((args, kwargs, embed), serializer=name)
    properties.update(headers=headers, content_type=content_type, content_encoding=encoding)
    if isinstance(headers["id"], str):  # else it is refused for its id
        properties.setdefault("correlation_id", headers["id"])
    return encode_properties(properties), payload.encode() if isinstance(payload, str) else payload
