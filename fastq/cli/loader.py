"""Finding the application that ``-A`` names: ``module``, ``module:attribute`` or ``module.attribute``.

It may be a FastQ or a Celery application; the latter is found where Celery finds it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from fastq.app import FastQ
from fastq.cli.errors import Failure, Misuse, describe
from fastq.errors import FastqError
from fastq.modules import not_found
from fastq.worker.process.exitcodes import EX_FAILURE, exit_code_of

if TYPE_CHECKING:
    import celery

    Application: TypeAlias = FastQ | celery.Celery

#: Attributes of a module, and submodules of a package, that are looked at before any other.
_NAMES = ("app", "fastq", "celery")

#: Files of a package in which an application is likely to be, for a hint.
_LIKELY = ("app", "application", "tasks", "main", "worker", "queue")


def find_any_app(spec: str) -> Application:
    """Return the application: the attribute named, else one of the usual names, else any in the module.

    Raises Misuse when there is none of that name, Failure when a module does not import.
    """
    add_working_directory()
    name, colon, attribute = spec.partition(":")
    _refuse_path(name, colon + attribute)
    _refuse_library(name)
    if colon:
        return _checked(_attribute(_import(name, spec), attribute, spec), spec)
    found = _import_or_attribute(name, spec)
    if not isinstance(found, ModuleType):
        return _checked(found, spec)
    # In Celery's order: what a package's submodule holds goes before what the package itself names in another way.
    app = _app_in(found, _NAMES) or _app_in_submodule(found, spec) or _only_app_in(found, spec)
    if app is None:
        raise Misuse(f"module {name!r} holds no application. {_where_else(found)}")
    _tell_of_others(found, app)
    return app


def default_celery_app(config: str) -> Any:
    """Return the application that Celery has without being given one. Raises Failure when it cannot be configured."""
    from fastq.celery.conf.settings import default_app

    add_working_directory()
    try:
        if config:
            importlib.import_module(config)  # Celery goes on without one that is not there
        return default_app()
    except (Exception, SystemExit) as error:
        named = f"module {config!r} does not import (--config {config})" if config else "celeryconfig does not import"
        raise _import_failure(named, error) from error


def is_celery(found: object) -> bool:
    """Return whether it is a Celery application; one that is, has imported Celery."""
    base = sys.modules.get("celery.app.base")
    return base is not None and isinstance(found, base.Celery)


def import_module(name: str, option: str) -> ModuleType:
    """Import a module of the user's. Raises Misuse when it is not found, Failure when it does not import."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the user's own module fails to find is a fault inside that one.
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise Misuse(
                f"module {name!r} was not found ({option}); looked in {os.getcwd()} and on the Python path. "
                "Check the name, start in the project's folder, or give --workdir"
            ) from error
        raise _import_failure(f"module {name!r} does not import ({option})", error) from error
    except (Exception, SystemExit) as error:
        raise _import_failure(f"module {name!r} does not import ({option})", error) from error


def load_tasks(load: Callable[[], object], app: Application) -> None:
    """Have an application load its tasks. Raises SettingsError when it names a module that is not there, Failure when
    one does not import."""
    try:
        load()
    except FastqError:
        raise
    except ModuleNotFoundError as error:  # Celery's loaders do not say who names it
        for setting in ("imports", "include"):
            names = app.conf[setting] or ()
            for module in (names,) if isinstance(names, str) else names:
                if (told := not_found(module, f"setting {setting!r}", error)) is not None:
                    raise told from error
        raise _import_failure("a module of include, imports or autodiscover_tasks does not import", error) from error
    except (Exception, SystemExit) as error:
        raise _import_failure("a module of include, imports or autodiscover_tasks does not import", error) from error


def add_working_directory() -> None:
    """Make modules in the current directory importable, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def _import(name: str, spec: str) -> ModuleType:
    return import_module(name, f"-A {spec}")


def _import_or_attribute(name: str, spec: str) -> object:
    """Return the module of that dotted name, or else the attribute of the module before the last dot."""
    parent, _, last = name.rpartition(".")
    try:
        return _import(name, spec)
    except Misuse:
        if not parent or not hasattr(module := _import_or_none(parent), last):
            raise
        return getattr(module, last)


def _import_or_none(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _attribute(module: ModuleType, path: str, spec: str) -> object:
    found: object = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            known = sorted(key for key, value in vars(module).items() if _is_app(value))
            hint = f"; it holds {', '.join(known)}" if known else ""
            raise Misuse(f"module {module.__name__!r} has no attribute {path!r} (-A {spec}){hint}") from None
    return found


def _is_app(found: object) -> bool:
    return isinstance(found, FastQ) or is_celery(found)


def _app_in(module: ModuleType, names: Sequence[str] = ()) -> Any:
    """Return an application that the module holds, by one of the names, else the usual ones first; None for none."""
    candidates = [getattr(module, name, None) for name in names or (*_NAMES, *vars(module))]
    return next((found for found in candidates if _is_app(found)), None)


def _apps_in(module: ModuleType) -> dict[str, Any]:
    """Return the different applications that a module holds, by their first name in it."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if _is_app(value) and not any(value is known for known in found.values()):
            found[name] = value
    return found


def _only_app_in(module: ModuleType, spec: str) -> Any:
    """Return the application of a module. Raises Misuse when there are several and no name says which."""
    found = _apps_in(module)
    if len(found) > 1 and not any(map(is_celery, found.values())):  # Celery takes the first
        words = ", ".join(f"-A {spec}:{name}" for name in found)
        raise Misuse(f"module {spec!r} holds {len(found)} applications. Name one of them: {words}")
    return next(iter(found.values()), None)


def _tell_of_others(module: ModuleType, app: Any) -> None:
    """Say which application was taken where a module holds others that are its own as well."""
    others = [name for name, found in _apps_in(module).items() if found is not app and not is_celery(found)]
    if others and app in vars(module).values():
        words = ", ".join(f"-A {module.__name__}:{name}" for name in others)
        click.echo(f"{module.__name__!r} holds several applications; taken: {app!r}. The others: {words}", err=True)


def _where_else(module: ModuleType) -> str:
    """Return what to name instead of a module without an application."""
    for folder in getattr(module, "__path__", ()):
        for name in _LIKELY:
            if Path(folder, f"{name}.py").exists():
                return f"Perhaps it is in {module.__name__}/{name}.py: -A {module.__name__}.{name}"
    return f"Name its attribute: -A {module.__name__}:<attribute>"


def _refuse_path(name: str, attribute: str) -> None:
    """Raise Misuse for a file's name where a module's is meant."""
    is_file = name.endswith(".py") and not _is_package(name.removesuffix(".py"))
    if not is_file and "/" not in name and not name.startswith("."):
        return
    path = os.path.relpath(name) if "/" in name or name.startswith("./") else name
    parts = path.removesuffix(".py").strip("/.").split("/")
    if path.startswith("..") or not all(part.isidentifier() for part in parts):
        raise Misuse(f"-A {name} is a path; -A takes a module. Give its folder by --workdir, then -A {parts[-1]}")
    raise Misuse(f"-A {name} is a path; -A takes a module: -A {'.'.join(parts)}{attribute}")


def _refuse_library(name: str) -> None:
    """Raise Misuse for the library's own name, which a project's file or folder may have as well."""
    if name.partition(".")[0] == "fastq":
        raise Misuse(
            f"-A {name} is the library itself, not an application. "
            "A file or folder of yours that is called fastq cannot be imported beside it: rename it"
        )


def _is_package(name: str) -> bool:
    """Whether ``name.py`` may be a module ``py`` inside a package."""
    return os.path.isdir(name.replace(".", "/"))


def _app_in_submodule(module: ModuleType, spec: str) -> Any:
    if not hasattr(module, "__path__"):
        return None
    for name in ("fastq", "celery"):
        try:
            if (found := _app_in(_import(f"{module.__name__}.{name}", spec))) is not None:
                return found
        except Misuse:
            continue
    return None


def _checked(found: object, spec: str) -> Any:
    if _is_app(found):
        return found
    if isinstance(found, ModuleType) and (app := _app_in(found)) is not None:
        return app
    raise Misuse(f"{spec!r} is a {type(found).__name__}, not an application. Name the FastQ or Celery object with -A")


def _import_failure(what: str, error: BaseException) -> Failure:
    code = exit_code_of(error) if isinstance(error, FastqError) else EX_FAILURE
    return Failure(f"{what}: {describe(error)}, at {_place_of(error)}. Correct it and start again", code)


def _place_of(error: BaseException) -> str:
    """Return file:line of the fault: in the project if the traceback passes through it, else where it was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    places = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    project = os.path.join(os.getcwd(), "")
    own = [f for f in places if f.filename.startswith(project) and "site-packages" not in f.filename]
    place = (own or places)[-1]
    return f"{place.filename}:{place.lineno}"
