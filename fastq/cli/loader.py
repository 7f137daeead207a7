"""Finding the application that ``-A`` names: ``module``, ``module:attribute`` or ``module.attribute``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType

from fastq.app import FastQ
from fastq.cli.errors import Failure, Misuse, describe
from fastq.errors import FastqError
from fastq.worker.exitcodes import EX_FAILURE, exit_code_of


def find_app(spec: str) -> FastQ:
    """Return the application: the attribute named, else ``app``, ``fastq`` or a FastQ of the module or its ``.fastq``.

    Raises Misuse when there is none of that name, Failure when a module does not import.
    """
    add_working_directory()
    name, colon, attribute = spec.partition(":")
    if colon:
        return _checked(_attribute(_import(name, spec), attribute, spec), spec)
    found = _import_or_attribute(name, spec)
    if not isinstance(found, ModuleType):
        return _checked(found, spec)
    app = _app_in(found) or _app_in_submodule(found, spec)
    if app is None:
        raise Misuse(f"module {name!r} holds no FastQ application. Name its attribute: -A {name}:<attribute>")
    return app


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


def load_tasks(app: FastQ) -> None:
    """Import the modules that the application's settings name. Raises Failure when one does not import."""
    try:
        app.load_tasks()
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
            known = sorted(key for key, value in vars(module).items() if isinstance(value, FastQ))
            hint = f"; it holds {', '.join(known)}" if known else ""
            raise Misuse(f"module {module.__name__!r} has no attribute {path!r} (-A {spec}){hint}") from None
    return found


def _app_in(module: ModuleType) -> FastQ | None:
    for name in ("app", "fastq"):
        found = getattr(module, name, None)
        if isinstance(found, FastQ):
            return found
    return next((value for value in vars(module).values() if isinstance(value, FastQ)), None)


def _app_in_submodule(module: ModuleType, spec: str) -> FastQ | None:
    if not hasattr(module, "__path__"):
        return None
    try:
        return _app_in(_import(f"{module.__name__}.fastq", spec))
    except Misuse:
        return None


def _checked(found: object, spec: str) -> FastQ:
    if isinstance(found, FastQ):
        return found
    if isinstance(found, ModuleType) and (app := _app_in(found)):
        return app
    kind = type(found)
    if kind.__module__.partition(".")[0] == "celery":
        raise Misuse(f"{spec!r} is a Celery application, which this version of fastq cannot run. Make it a fastq.FastQ")
    raise Misuse(f"{spec!r} is a {kind.__name__}, not a FastQ application. Name the FastQ object with -A")


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
