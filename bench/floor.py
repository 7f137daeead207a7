"""Builds and runs floor.c: the client on librabbitmq that does nothing but speak AMQP."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Literal

from tests.servers import RabbitMQ

SOURCE = Path(__file__).with_name("floor.c")
TIMEOUT_S = 300.0
QUEUE = "floor"

Command = Literal["fill", "drain", "publish", "confirm", "roundtrip"]


class Floor:
    """The compiled program and the broker that it talks to."""

    def __init__(self, folder: Path, rabbitmq: RabbitMQ) -> None:
        self._program = folder / "floor"
        self._rabbitmq = rabbitmq

    def run(self, command: Command, vhost: str, count: int) -> dict[str, float]:
        """Return what one command of floor.c measured."""
        if not self._program.exists():
            subprocess.run(["cc", "-O2", str(SOURCE), "-o", str(self._program), "-lrabbitmq"], check=True)
        arguments = [command, "127.0.0.1", str(self._rabbitmq.port), vhost, QUEUE, str(count)]
        done = subprocess.run(
            [str(self._program), *arguments], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        )
        figures: dict[str, float] = json.loads(done.stdout)
        return figures
