"""Modules that an application names, found and imported; of what is missing the name that is nearest to it is told."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import cast

from fastq.errors import SettingsError

#: What the running program is called as a module; the second in a process that multiprocessing has spawned.
MAIN_NAMES = ("__main__", "__mp_main__")


def import_object(path: str) -> object:
    """Return a module by name, or what ``module:attribute`` names. Raises SettingsError when it is not there."""
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except ModuleNotFoundError as error:
        if not _is_about(module, error):
            raise
        raise SettingsError(f"the module with settings {module!r} is not found; is it on sys.path?") from error
    except AttributeError as error:
        raise SettingsError(f"module {module!r} has no {attribute!r} with settings") from error


def import_named(module: str, where: str) -> None:
    """Import a module that the application names. Raises SettingsError, with the nearest one, when it is not there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (told := not_found(module, where, error)) is None:
            raise
        raise told from error


def not_found(module: str, where: str, error: ModuleNotFoundError) -> SettingsError | None:
    """Return the error that names the module, and the nearest one; None when another one is missing."""
    if not _is_about(module, error):
        return None
    return SettingsError(f"{where} names {module!r}, which is not found{_near_module(error.name or module)}")


def _is_about(module: str, error: ModuleNotFoundError) -> bool:
    """Return whether it is this module, or a package of it, that is not there, and not one that it imports."""
    return error.name is not None and (module == error.name or module.startswith(error.name + "."))


def _near_module(name: str) -> str:
    """Return a hint at the module that has nearly this name."""
    import difflib  # only needed on the way to an error
    import pkgutil

    package, _, last = name.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else [os.getcwd(), *sys.path]
    known = [each.name for each in pkgutil.iter_modules(path)]
    near = difflib.get_close_matches(last, known, 1)
    if not near:
        return f"; looked in {', '.join(path or ())}" if package else "; is it on the Python path?"
    found = f"{package}.{near[0]}" if package else near[0]
    return f"; did you mean {found!r}?"


def import_related(package: str, related_name: str) -> None:
    """Import a package's module of tasks, if it has one; an import that fails inside it is an error as anywhere."""
    module = f"{package}.{related_name}" if related_name else package
    import_named(package, "autodiscover_tasks()")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise


def main_module_name(module: str, app_name: str | None) -> str:
    """Return the name under which a worker would import the program that is running; without a file, the app's."""
    main = sys.modules.get(module) or sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return cast("str", spec.name).removesuffix(".__main__")  # python -m package.module
    file = getattr(main, "__file__", None)
    if not file:
        return app_name or "__main__"
    path = Path(file).resolve()
    parts = [path.stem]
    # A script inside a package: the worker imports it by its full name.
    while (path.parent / "__init__.py").exists():
        path = path.parent
        parts.insert(0, path.name)
    found = ".".join(parts)
    # A namespace package has no such file; the application may say where it is.
    return app_name if app_name is not None and app_name.endswith(f".{found}") else found
