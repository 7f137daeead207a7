"""Where an application stands, so that another interpreter finds it again: by module and name.

Imports what it is told to import; looks into no application.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from fastq.errors import SettingsError
from fastq.modules import MAIN_NAMES

#: They know the application that is the current one, by names that are not its own.
_LIBRARIES: Final = ("fastq", "celery")


@dataclass(frozen=True, slots=True)
class Origin:
    """How a command has found its application: ``named`` is what -A says, the others are options of the same names."""

    named: str = ""
    config: str = ""
    broker: str = ""
    result_backend: str = ""
    is_default: bool = False  # it is Celery's default application, which no module needs to hold

    def lay_over(self, app: Any, import_module: Callable[[str], object]) -> None:
        """Lay configuration and URLs over those of a FastQ application; Celery hears of them by the environment."""
        if self.config:
            app.config_from_object(import_module(self.config))
        if self.broker:
            app.conf.broker_url = self.broker
        if self.result_backend:
            app.conf.result_backend = self.result_backend


@dataclass(frozen=True, slots=True)
class Place:
    """A module and the name that it holds the application by, with dots. ``program``: the one to run before, or ""."""

    module: str
    name: str
    program: str = ""

    def find(self) -> Any:
        """Import the module and return the application. Raises SettingsError when it is not there."""
        found = _attribute(import_module(self.module), self.name)
        if found is None:
            raise SettingsError(
                f"a spawned child finds no application at {self.module}:{self.name}, where the worker's main process "
                "has it. Make it there at every import, or have children forked (--pool-start-method fork)"
            )
        return found


def place_of(app: object, named: str = "") -> Place:
    """Return where an application is. ``named`` is what -A says. Raises SettingsError when no module holds it."""
    module, _, name = named.partition(":")
    if name and module in sys.modules and _attribute(sys.modules[module], name) is app:
        return Place(module, name)
    # Those below the module that was named go first; a program last, which is run anew for it.
    names = sorted(sys.modules, key=lambda each: (each in MAIN_NAMES, not f"{each}.".startswith(f"{module}.")))
    for each in names:
        if each.partition(".")[0] in _LIBRARIES:
            continue
        for key, value in list(getattr(sys.modules[each], "__dict__", {}).items()):
            if value is app:
                return Place("__main__", key, _program()) if each in MAIN_NAMES else Place(each, key)
    raise SettingsError(
        f"children cannot be spawned: no module holds the application {app!r} by a name, so a fresh interpreter cannot "
        "import it. Make it a variable of a module, or have children forked (--pool-start-method fork)"
    )


def _program() -> str:
    """Return the program that runs: its file, or its module's name."""
    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    if spec is not None and not spec.name.endswith("__main__"):  # which multiprocessing would not run
        return str(spec.name)
    file: str | None = getattr(program, "__file__", None)
    if not file:
        raise SettingsError(
            "children cannot be spawned: the application was made in a program that has no file. "
            "Write it into a module, or have children forked (--pool-start-method fork)"
        )
    return os.path.abspath(file)


def _attribute(module: object, path: str) -> Any:
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
