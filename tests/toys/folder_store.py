"""The least that a result store has to be: a folder with a file for each result, which tells nobody of anything.

Named by ``tests.toys.folder_store:STORE:///folder``. It proves the seams that the stores of servers stand on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastq._core import Core
from fastq.errors import ConnectionLost, EncodeError
from fastq.interfaces import SaveItem
from fastq.results import Store
from fastq.results.base import WaitingStore
from fastq.results.place import Place
from fastq.results.writing import Writer, WritingSaver
from fastq.settings import Settings


class Folder(Place[bytes], Writer):
    """Both halves: where results are looked for, and how they are written."""

    patience_s = 5.0

    def __init__(self, url: str) -> None:
        self.path = Path(url.partition("://")[2])

    def look(self, task_ids: Sequence[str]) -> Mapping[str, bytes]:
        self._check()
        files = {task_id: self.file(task_id) for task_id in task_ids}
        return {task_id: file.read_bytes() for task_id, file in files.items() if file.exists()}

    def store_many(self, results: Sequence[SaveItem]) -> None:
        self._check()
        for task_id, _, meta, _, _ in results:
            file = self.file(task_id)
            fresh = file.with_suffix(".new")
            fresh.write_bytes(meta)
            fresh.rename(file)

    def open(self, until: float = 0.0) -> None:
        self._check()

    def file(self, task_id: str) -> Path:
        try:
            return self.path / hashlib.sha256(task_id.encode()).hexdigest()
        except UnicodeError as error:
            raise EncodeError(f"no task has the id {task_id!r}") from error

    def _check(self) -> None:
        if not self.path.is_dir():
            raise ConnectionLost(f"{self.path} is not there. Is it mounted?")


class FolderStore(WaitingStore[bytes]):
    """The caller's half."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.folder = Folder(url)
        super().__init__(self.folder)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        self.folder.store_many([(task_id, state, meta, "", 0)])

    def forget(self, task_id: str) -> None:
        self.folder.file(task_id).unlink(missing_ok=True)


def open_saver(url: str, settings: Settings, core: Core | None) -> WritingSaver:
    """Return the worker's half."""
    return WritingSaver(Folder(url))


STORE = Store(schemes=("folder",), store=FolderStore, saver=open_saver)
