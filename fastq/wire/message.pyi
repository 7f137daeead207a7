from collections.abc import Mapping
from typing import Any

class Message:
    exchange: str
    routing_key: str
    props: bytes
    body: bytes
    id: str
    priority: int
    due: float | None
    expires: float | None
    def __init__(
        self,
        exchange: str,
        routing_key: str,
        props: bytes,
        body: bytes,
        id: str = "",
        priority: int = 0,
        due: float | None = None,
        expires: float | None = None,
    ) -> None: ...

class TaskTemplate:
    def __init__(
        self,
        name: str,
        *,
        exchange: str = "",
        routing_key: str = "celery",
        content_type: str = "application/json",
        content_encoding: str = "utf-8",
        eta: float | None = None,
        expires: float | None = None,
        retries: int = 0,
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
        group: str | None = None,
        group_index: int | None = None,
        shadow: str | None = None,
        ignore_result: bool = False,
        reply_to: str | None = None,
        priority: int | None = None,
        delivery_mode: int = 2,
        compression: str | None = None,
        origin: str = "",
        headers: Mapping[str, Any] | None = None,
    ) -> None: ...
    def message(
        self,
        task_id: str,
        body: bytes,
        argsrepr: str = "()",
        kwargsrepr: str = "{}",
        root_id: str | None = None,
        parent_id: str | None = None,
    ) -> Message: ...

def encode_task(
    name: str,
    task_id: str,
    body: bytes,
    *,
    exchange: str = "",
    routing_key: str = "celery",
    content_type: str = "application/json",
    content_encoding: str = "utf-8",
    argsrepr: str = "()",
    kwargsrepr: str = "{}",
    eta: float | None = None,
    expires: float | None = None,
    retries: int = 0,
    time_limit: float | None = None,
    soft_time_limit: float | None = None,
    root_id: str | None = None,
    parent_id: str | None = None,
    group: str | None = None,
    group_index: int | None = None,
    shadow: str | None = None,
    ignore_result: bool = False,
    reply_to: str | None = None,
    priority: int | None = None,
    delivery_mode: int = 2,
    compression: str | None = None,
    origin: str = "",
    headers: Mapping[str, Any] | None = None,
) -> Message: ...
def encode_properties(properties: Mapping[str, Any]) -> bytes: ...
