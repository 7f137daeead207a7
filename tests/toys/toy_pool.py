"""A pool as another package would bring it: so many children, each forked anew when it ends. No spares.

``fastq worker -P tests.toys.toy_pool:POOL``. The zygote forks the children and reports their ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
from socket import socket
from typing import Any

from fastq._child import Child
from fastq._core import Core
from fastq.pool import PoolKind, PoolOptions
from fastq.pool.process import STACKS_SIGNAL
from fastq.pool.zygote import Exited, Spawned, Zygote
from fastq.wire.pipe import RingReader


class ToyPool:
    """Keeps ``size`` children. The protocol is ``fastq.pool.Pool``."""

    companion = None

    def __init__(self, loop: asyncio.AbstractEventLoop, zygote: Zygote, options: PoolOptions) -> None:
        self.loop, self.zygote, self.options = loop, zygote, options
        self.size = options.concurrency
        self.core: Core
        self._asked: dict[int, tuple[int, socket, RingReader]] = {}  # by request
        self._children: dict[int, tuple[Child, socket, RingReader]] = {}  # by process id
        self._stopping = False
        self._changed = asyncio.Event()

    async def start(self, core: Core) -> None:
        self.core = core
        self.loop.add_reader(self.zygote.fd, self._on_reports)
        self._fill()
        await self._until(lambda: bool(self.pids))

    async def stop(self, deadline_s: float | None) -> None:
        self._stopping = True
        for child, _, _ in self._children.values():
            child.stop()
        try:
            await asyncio.wait_for(self._until(lambda: not self._children and not self._asked), deadline_s)
        except asyncio.TimeoutError:
            self.kill()
            await self._until(lambda: not self._children and not self._asked)

    def kill(self) -> None:
        self._stopping = True
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.loop.remove_reader(self.zygote.fd)
        self.zygote.close()

    def grow(self, n: int = 1) -> None:
        self.size += n
        self._fill()

    def shrink(self, n: int = 1) -> None:
        self.size = max(1, self.size - n)
        at_work = [child for child, _, _ in self._children.values() if not child.retiring]
        for child in sorted(at_work, key=lambda child: child.busy)[: max(0, len(at_work) - self.size)]:
            self._retire(child)

    def restart(self) -> None:
        for child, _, _ in self._children.values():
            self._retire(child)

    @property
    def pids(self) -> list[int]:
        return [pid for pid, (child, _, _) in self._children.items() if child.accepting or child.busy]

    def terminate(self, child: Child, signum: int) -> None:
        if child.pid in self._children:
            os.kill(child.pid, signum)

    def kill_child(self, child: Child) -> None:
        self.terminate(child, signal.SIGKILL)

    def dump_stack(self, child: Child) -> None:
        self.terminate(child, STACKS_SIGNAL)

    def stacks(self, child: Child) -> str:
        return self._children[child.pid][2].stacks() if child.pid in self._children else ""

    # --- what the message loop tells

    def child_ready(self, child: Child) -> None:
        child.activate(child.slot)
        self._changed.set()

    def child_full(self, child: Child) -> None:
        if not child.busy:
            child.stop()

    def child_drained(self, child: Child) -> None:
        child.stop()

    def child_broken(self, child: Child, reason: str) -> None:
        self.kill_child(child)

    # --- inside

    def _retire(self, child: Child) -> None:
        child.retire()
        self.child_full(child)

    def _fill(self) -> None:
        there = [child.slot for child, _, _ in self._children.values()] + [
            number for number, _, _ in self._asked.values()
        ]
        for number in [number for number in range(self.size) if number not in there][: self.size - len(there)]:
            request = max(self._asked, default=0) + 1
            self._asked[request] = (number, *self.zygote.spawn(request, number))

    def _on_reports(self) -> None:
        for report in self.zygote.reports():
            if isinstance(report, Exited):
                child, sock, _ = self._children.pop(report.pid)
                child.retire()
                is_expected = self._stopping or not child.busy
                self.core.remove_child(child, report.reason)
                child.close()
                sock.close()
                if not is_expected:
                    self.options.on_lost(f"child pid:{report.pid}", report.reason)
                continue
            number, sock, reader = self._asked.pop(report.request)
            if isinstance(report, Spawned):
                child = Child(self.core, number, report.pid, reader)
                self._children[report.pid] = child, sock, reader
                self.core.add_child(child)
                self.loop.create_task(self.loop.create_unix_connection(lambda child=child: child, sock=sock))
        if not self._stopping:
            self._fill()
        self._changed.set()

    async def _until(self, condition: Any) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


POOL = PoolKind(names=("toy",), prepare="fastq.pool.zygote:start_zygote", pool=ToyPool)
