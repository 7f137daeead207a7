"""Builds and runs floor.c: the client that does nothing but speak to a broker."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).with_name("floor.c")
TIMEOUT_S = 300.0
QUEUE = "floor"

Command = Literal["fill", "drain", "publish", "confirm", "roundtrip", "lpush"]


class Floor:
    """The compiled program."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "floor"

    def run(self, command: Command, port: int, vhost: str, count: int) -> dict[str, float]:
        """Return what one command of floor.c measured with the broker at a local port; Redis has no vhosts."""
        if not self._program.exists():
            subprocess.run(["cc", "-O2", str(SOURCE), "-o", str(self._program), "-lrabbitmq"], check=True)
        arguments = [command, "127.0.0.1", str(port), vhost, QUEUE, str(count)]
        done = subprocess.run(
            [str(self._program), *arguments], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        )
        figures: dict[str, float] = json.loads(done.stdout)
        return figures
