from typing import Any, Final

TAGGED: Final = 1
LONG_INTEGER: Final = 2
HUGE_INTEGER: Final = 4
TOO_DEEP: Final = 8

def is_plain(value: Any) -> bool: ...
def survey(data: bytes, max_depth: int = 512) -> int: ...
def short_repr(value: Any, limit: int = 1024) -> str: ...
