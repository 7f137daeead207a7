"""Calls in the worker's own process: what is a child's main elsewhere, without being a process."""

from __future__ import annotations

import sys
import threading
from typing import Any

from fastq.running.child import EX_RECYCLE, Children
from fastq.wire.pipe import ChildPipe


class Here:
    """Runs a child's calls in the thread that calls it. Again, with another pipe, after a call that was ended."""

    def __init__(self, children: Children) -> None:
        self._child = children.first
        self._has_begun = False

    def __call__(self, sock: int, shared: int, number: int, group: int = 0) -> int:
        """Run calls until the pipe ends. Raises what ends a child: SystemExit, or what its code has failed with."""
        pipe = ChildPipe(sock, shared)
        if not self._has_begun:
            self._has_begun = True
            self._child.begin_here(is_main=threading.current_thread() is threading.main_thread())
        detach = self._child.attach_here(pipe)
        try:
            self._child.serve(pipe)
        finally:
            awaiting: Any = sys.modules.get("fastq.awaiting")
            if awaiting is not None:
                awaiting.close_here()
            detach()
        return EX_RECYCLE
