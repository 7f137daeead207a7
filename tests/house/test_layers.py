"""Imports point down only, and no two modules need each other.

Imports in functions count, Cython's cimports, and those for type checkers alone; a stub counts as its module.
Source of the order: docs/architecture.md.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import fastq.version
from tests import ROOT

PACKAGE = ROOT / "fastq"

# A part may import parts of lower levels; within a level only what FRIENDS says.
LEVELS: dict[int, tuple[str, ...]] = {
    7: ("__init__", "__main__", "cli", "celery", "testing", "pytest_plugin"),
    6: ("worker",),
    5: ("running",),
    4: ("shared", "app", "task", "eager", "sending", "steps", "result", "request"),
    3: ("bus", "brokers", "results", "pool"),
    2: ("_core", "_ledger", "_waiting", "codecs", "interfaces", "_child", "tap", "link"),
    1: ("wire", "net"),
    0: ("version", "errors", "states", "settings", "printable", "plugins", "queues", "guard", "modules", "awaiting"),
}
LEVEL_OF = {part: level for level, parts in LEVELS.items() for part in parts}
FRIENDS = {
    "__main__": {"cli"},
    "cli": {"celery"},  # -A may name a Celery application
    "celery": {"cli"},  # patch(): a program that starts Celery's worker gets the command line's
    "testing": {"celery"},
    "pytest_plugin": {"testing", "celery"},  # the fixtures that users' tests get
    "__init__": {"celery"},  # the public names, wherever they stand
    "shared": {"app", "task", "request", "sending"},
    "app": {"task", "result", "request", "sending", "steps"},
    "task": {"eager", "result", "request", "sending", "steps"},
    "eager": {"request", "steps"},
    "steps": {"request"},
    "result": {"request"},
    "sending": {"steps", "result", "request"},
    "_core": {"_ledger", "_waiting", "interfaces", "_child", "link"},
    "_ledger": {"_waiting", "_child", "link"},
    "_waiting": {"link"},
    "_child": {"link"},
    "tap": {"link"},
    "brokers": {"bus"},
    "results": {"brokers"},  # a store may use the connection of a broker, never the other way round
    "codecs": {"interfaces"},
    "interfaces": {"_child", "link"},  # what stands above sees the seams by the nouns that pass through them
    "settings": {"errors", "states"},
    "queues": {"errors", "settings"},
    "plugins": {"errors"},
    "modules": {"errors"},
}

CYTHON_FROM = re.compile(r"^\s*from\s+(fastq[\w.]*)\s+c?import\s+\(?\s*([\w*]+(?:\s+as\s+\w+)?(?:\s*,\s*\w+)*)", re.M)
CYTHON_IMPORT = re.compile(r"^\s*c?import\s+(fastq[\w.]*)", re.M)


def sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*") if path.suffix in suffixes)


def part_of(module: str) -> str:
    """Return the part (file or folder right below fastq/) that a dotted module belongs to."""
    _, _, rest = module.partition(".")
    first = rest.split(".")[0]
    is_part = first and ((PACKAGE / first).is_dir() or any(PACKAGE.glob(f"{first}.py*")))
    return first if is_part else "__init__"


def python_imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cython_imports(text: str) -> Iterator[str]:
    for module, names in CYTHON_FROM.findall(text):
        yield from (f"{module}.{name.split()[0]}" for name in names.split(","))
    yield from CYTHON_IMPORT.findall(text)


def imports(path: Path) -> set[str]:
    """Return every imported name of a source file, as dotted text."""
    text = path.read_text(encoding="utf-8")
    return set(python_imports(text) if path.suffix in (".py", ".pyi") else cython_imports(text))


def own_part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.split(".")[0]


def edges() -> Iterator[tuple[Path, str, str]]:
    """Yield (file, its part, imported part), once each, for every import of fastq by fastq from another part."""
    for path in sources(".py", ".pyi", ".pyx", ".pxd"):
        here = own_part(path)
        named = {part_of(name) for name in imports(path) if name == "fastq" or name.startswith("fastq.")}
        yield from ((path, here, there) for there in sorted(named - {here}))


def is_allowed(here: str, there: str) -> bool:
    if there in FRIENDS.get(here, ()):
        return True
    return LEVEL_OF[there] < LEVEL_OF[here]


def module_of(path: Path) -> str:
    """Return the dotted name of a module, a package under its own."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Return which modules of fastq each one imports."""
    paths = sources(".py", ".pyi", ".pyx", ".pxd")
    graph: dict[str, set[str]] = {module_of(path): set() for path in paths}
    for path in paths:
        here = module_of(path)
        for name in imports(path):
            # ``from package import name``: the module of that name, or something that the package itself holds.
            there = name if name in graph else name.rpartition(".")[0]
            if there in graph and there != here:
                graph[here].add(there)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the largest sets of modules that all reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, left = set[str](), [start]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        reached[start] = found
    together = {frozenset(there for there in reached[here] if here in reached[there]) for here in graph}
    return sorted((set(each) for each in together if each), key=sorted)


#: Until what both need of each other stands in modules of its own.
def test_no_two_modules_need_each_other() -> None:
    assert list(circles(module_graph())) == []


def test_nobody_imports_the_package_of_users() -> None:
    assert {here for here, named in module_graph().items() if "fastq" in named} == set()


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]


def test_every_part_has_a_level() -> None:
    parts = {own_part(path) for path in sources(".py", ".pyx")}
    assert parts - LEVEL_OF.keys() == set(), "give the new part a level in LEVELS and in docs/architecture.md"


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}: {here} (level {LEVEL_OF[here]}) imports {there} (level {LEVEL_OF[there]})"
        for path, here, there in edges()
        if not is_allowed(here, there)
    ]
    assert wrong == []


def test_the_vocabulary_needs_only_the_standard_library() -> None:
    foreign = {
        (path.name, name.split(".")[0])
        for path in sources(".py")
        if LEVEL_OF[own_part(path)] == 0
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | {"fastq"}
    }
    assert foreign == set()


def test_wire_has_no_sockets_and_no_clock() -> None:
    banned = re.compile(r"^\s*(?:from|c?import)\s+(socket|ssl|asyncio|selectors|select|time|uvloop)\b", re.M)
    found = [
        f"{path.name}: {match.group(1)}"
        for path in sources(".py", ".pyx", ".pxd")
        if own_part(path) == "wire"
        for match in banned.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_compiled_module_has_a_stub() -> None:
    missing = [path.name for path in sources(".pyx") if not path.with_suffix(".pyi").exists()]
    assert missing == []


def test_the_package_is_typed_for_its_users() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_all_names_what_the_package_offers() -> None:
    package = importlib.import_module("fastq")
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert missing == []
    assert len(package.__all__) == len(set(package.__all__))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastq")
        for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}
    assert public - set(package.__all__) == set(), "imported in fastq/__init__.py but not in __all__"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from fastq.wire.buffer cimport Buffer, read_u32", {"fastq.wire.buffer.Buffer", "fastq.wire.buffer.read_u32"}),
        ("cimport fastq._core as c", {"fastq._core"}),
        ("def f():\n    from fastq import errors", {"fastq.errors"}),
        ("from fastq.link cimport (\n    Source,\n    Sink)", {"fastq.link.Source", "fastq.link.Sink"}),
        ("from libc.string cimport memcpy", set()),
    ],
)
def test_the_check_sees_every_form_of_cython_import(text: str, expected: set[str]) -> None:
    assert set(cython_imports(text)) == expected


def test_the_check_sees_imports_in_functions_and_those_for_types() -> None:
    text = "if TYPE_CHECKING:\n    import fastq.cli\ndef f():\n    from fastq.app import FastQ\n"
    assert set(python_imports(text)) == {"fastq.cli", "fastq.app.FastQ"}


def test_the_version_is_that_of_the_metadata() -> None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert found is not None
    assert fastq.__version__ == fastq.version.__version__ == found[1]


def test_a_worker_forks_before_it_imports_an_event_loop() -> None:
    """What is there at the fork costs every child memory and time; a loop, TLS and pickle are a tenth of both."""
    unwanted = {"asyncio", "ssl", "uvloop", "pickle", "difflib", "logging.handlers", "tempfile"}
    code = "import sys, fastq.cli.worker, fastq.worker.worker, fastq.running.application\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert unwanted.isdisjoint(done.stdout.split())


def test_a_spawned_child_of_a_celery_application_imports_what_it_needs() -> None:
    """Each pays for it anew: FastQ's own application, senders and stores, and a result store that nobody has named."""
    unwanted = {"fastq.app", "fastq.task", "fastq.running.runner", "fastq.results", "fastq.brokers", "redis", "asyncio"}
    code = "import sys, fastq.celery.worker.spawned, fastq.celery.running.child\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert unwanted.isdisjoint(done.stdout.split())
