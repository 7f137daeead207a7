"""Commands about the memory of the main process, for hunting leaks."""

from __future__ import annotations

import gc
from collections import deque
from typing import Final

from fastq.worker.remote.commands.command import Command, WorkerView

_UNITS: Final = ((2**40, "TB"), (2**30, "GB"), (2**20, "MB"), (2**10, "KB"), (0, "b"))

#: Chosen: what is drawn by Graphviz, and looked through here, grows with both.
_MAX_OBJECTS: Final = 1000
_MAX_LEVELS: Final = 20

#: What ``memsample`` has seen since the last ``memdump``; chosen: a sample a minute for a day and a half.
_samples: deque[str] = deque(maxlen=2048)


def memsample(view: WorkerView, **_: object) -> str:
    """Sample current RSS memory usage."""
    _samples.append(resident())
    return _samples[-1]


def memdump(view: WorkerView, samples: int = 10, **_: object) -> str:
    """Dump statistics of previous memsample requests."""
    every = max(1, len(_samples) // max(1, int(samples)))
    shown = list(_samples)[::every][: int(samples)]
    _samples.clear()
    gc.collect()
    head = ["- rss (sample):", *(f"-    > {sample}," for sample in shown)] if shown else []
    return "\n".join([*head, f"- rss (end): {resident()}.", ""])


def objgraph(view: WorkerView, num: int = 200, max_depth: int = 10, type: str = "Request") -> dict[str, str]:
    """Create graph of uncollected objects (memory-leak debugging)."""
    try:
        import objgraph as drawing
    except ImportError:
        raise ImportError("Requires the objgraph library") from None  # Celery's words
    import tempfile  # brings much with it

    with tempfile.NamedTemporaryFile(prefix="cobjg", suffix=".png", delete=False) as file:
        objects = drawing.by_type(type)[: max(0, min(num, _MAX_OBJECTS))]
        known = set(map(id, objects))
        drawing.show_backrefs(
            objects, max_depth=min(max_depth, _MAX_LEVELS), highlight=lambda each: id(each) in known, filename=file.name
        )
        return {"filename": file.name}


def resident() -> str:
    """Return the resident memory of this process, as ``60.051MB``."""
    from psutil import Process  # few workers are ever asked for it

    count = Process().memory_info().rss
    size, unit = next((size, unit) for size, unit in _UNITS if count >= size)
    value = count / size if size else count
    return f"{int(value) if value == int(value) else format(value, '.5')}{unit}"


COMMANDS: Final = (
    Command("inspect", memsample),
    Command("inspect", memdump, "[n_samples=10]", arguments=(("samples", int),)),
    Command(
        "inspect",
        objgraph,
        "[object_type=Request] [num=200 [max_depth=10]]",
        arguments=(("type", str), ("num", int), ("max_depth", int)),
    ),
)
