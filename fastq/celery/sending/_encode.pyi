from collections.abc import Callable
from typing import Any

def task_properties(
    content_type: str,
    content_encoding: str,
    headers: dict[str, Any],
    delivery_mode: int | None,
    priority: int | None,
    correlation_id: str,
    reply_to: str,
    expiration: str | None,
) -> bytes: ...

class PropertiesTemplate:
    def __init__(
        self,
        content_type: str,
        content_encoding: str,
        headers: dict[str, Any],
        delivery_mode: int | None,
        priority: int | None,
        expiration: str | None,
    ) -> None: ...
    def fill(self, task_id: str, argsrepr: str, kwargsrepr: str, origin: str, reply_to: str) -> bytes: ...

def short_repr(value: Any, max_size: int, max_levels: int) -> str | None: ...
def dump_json(value: Any, default: Callable[[Any], Any]) -> bytes: ...
def read_setting(maps: list[Any], keys: tuple[str, ...], default: Any) -> Any: ...
