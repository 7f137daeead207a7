from typing import Any

PROBLEMS: tuple[str, ...]

def scan(props: bytes) -> dict[str, Any]: ...
