from typing import Any

class Call:
    props: bytes
    body: bytes
    exchange: str
    routing_key: str
    name: str
    id: str
    retries: int
    deliveries: int
    redelivered: bool
    wants_result: bool
    wants_report: bool
    is_own: bool
    soft_time_limit: float
    time_limit: float
    json_body: bool
    seq: int
    @property
    def started_s(self) -> float: ...
    def success_meta(self, value: bytes) -> bytes | None: ...
    def properties(self) -> dict[str, Any]: ...
    def headers(self) -> dict[str, Any]: ...
