"""The documents are true: their Python runs and prints what they say, and what they name exists.

Each heading of README.md and docs/tasks.md with Python blocks is a story. A block whose first line is a comment with a
file name is that file; the other blocks run in order, beside a real worker of the application in those files. A comment
behind a `print` is what it prints.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from fastq.cli import COMMANDS, group
from fastq.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/operating.md",
    "docs/tasks.md",
)
WITH_STORIES = ("README.md", "docs/tasks.md")

HEADING = re.compile(r"^#{1,3} (.+)$")
FILE_NAME = re.compile(r"# ([\w/]+\.py)\n")
PRINTED = re.compile(r"^ *print\(.*?\)  # (.*)$", re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
NO_SETTINGS = {"task_id"}
SETTING = re.compile(r"`((?:broker|task|worker|result|fastq|accept|enable)_[a-z_]+)")

#: What runs a story, in the story's folder: a worker for the application of the modules, beside it the scripts.
STAGE = """
import contextlib, importlib, json
from fastq import FastQ
from fastq.testing import worker

story = json.load(open("story.json"))
modules = [importlib.import_module(name) for name in story["modules"]]
apps = [value for module in modules for value in vars(module).values() if isinstance(value, FastQ)]
for app in apps[:1]:
    app.load_tasks()
with worker(apps[0], concurrency=2) if apps else contextlib.nullcontext():
    scope = {"__name__": "story"}
    for number, script in enumerate(story["scripts"], 1):
        exec(compile(script, f"block {number}", "exec"), scope)
"""


@dataclass
class Story:
    """The Python of one heading."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    scripts: list[str] = field(default_factory=list)

    def add(self, block: str) -> None:
        found = FILE_NAME.match(block)
        if found:
            self.files[found[1]] = block
        else:
            self.scripts.append(block)

    @property
    def modules(self) -> list[str]:
        """The files to import, by module name; tests are for pytest."""
        names = [name for name in self.files if not Path(name).name.startswith("test_")]
        return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]

    @property
    def tests(self) -> list[str]:
        return [name for name in self.files if Path(name).name.startswith("test_")]

    @property
    def text(self) -> str:
        return "\n".join([*self.files.values(), *self.scripts])


def blocks_of(document: str) -> Iterator[tuple[str, str, str]]:
    """Yield (heading, language, text) of each fenced block."""
    heading, language, lines = document, None, list[str]()
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        if language is not None and line == "```":
            yield heading, language, "\n".join(lines) + "\n"
            language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("```"):
            language, lines = line.removeprefix("```").strip(), []
        elif match := HEADING.match(line):
            heading = match[1]


def stories() -> list[Story]:
    every = list[Story]()
    for document in WITH_STORIES:
        found: dict[str, Story] = {}
        for heading, language, text in blocks_of(document):
            if language == "python":
                found.setdefault(heading, Story(f"{document}: {heading}")).add(text)
        every += found.values()
    return every


def run(*arguments: str, folder: Path, env: dict[str, str]) -> str:
    """Run this interpreter in a folder and return what it wrote to standard output; fail with everything it said."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.title)
def test_the_examples_print_what_they_say(story: Story, tmp_path: Path) -> None:
    for name, text in story.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "story.json").write_text(
        json.dumps({"modules": story.modules, "scripts": story.scripts}), encoding="utf-8"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    if "amqp://" in story.text:
        # The same program on another broker: that is what these variables are for.
        url = f"sqlite:///{tmp_path / 'fastq.db'}"
        env |= {"FASTQ_BROKER_URL": url, "FASTQ_RESULT_BACKEND": url}
    if story.modules or story.scripts:
        printed = run("-c", STAGE, folder=tmp_path, env=env)
        promised = [text for script in story.scripts for text in PRINTED.findall(script)]
        assert printed.splitlines() == promised
    for name in story.tests:
        run("-m", "pytest", "-q", "-p", "no:cacheprovider", name, folder=tmp_path, env=env)


def test_the_guides_have_examples() -> None:
    found = [story.title for story in stories()]
    assert any(title.startswith("README.md") for title in found)
    assert len(found) > 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text(encoding="utf-8")
    dead = [link for link in LINK.findall(text) if "://" not in link and not (folder / link).exists()]
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    known = Settings()
    assert [name for name in SETTING.findall(text) if name not in known and name not in NO_SETTINGS] == []


def fastq_lines(document: str) -> Iterator[str]:
    """Yield the `fastq ...` command lines of the shell blocks, without prompts and comments."""
    for _, language, text in blocks_of(document):
        if language in ("sh", "console", "ini"):
            for line in text.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|[$/=] ?|bin/)fastq ((?:-|\w).*?)(?:  #.*)?$", line)
                if found:
                    yield found[1]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_that_are_shown_exist(document: str) -> None:
    context = click.Context(group)
    for line in fastq_lines(document):
        words = line.split()
        name = next((word for word in words if word in COMMANDS), None)
        known = {option for param in group.params for option in param.opts}
        if name is not None:
            command = group.get_command(context, name)
            assert command is not None
            shown = (param for param in command.params if not getattr(param, "hidden", False))
            known |= {option for param in shown for option in (*param.opts, *param.secondary_opts)}
        unknown = [word for word in words if re.match(r"--?[A-Za-z]", word) and word.split("=")[0] not in known]
        assert unknown == [], line


def tree_of(document: str) -> set[str]:
    """Return the paths in a document's tree of the package: the first word of each line, indented below its folder."""
    paths: set[str] = set()
    for _, language, text in blocks_of(document):
        if language == "text" and "fastq/\n" in text:
            for line in text.split("fastq/\n", 1)[1].splitlines():
                names = re.match(r"  ([\w./]+(?:, [\w./]+)*)", line)
                if names:
                    paths.update(names[1].split(", "))
    return paths


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    named = {path.rstrip("/") for path in tree_of("docs/architecture.md")}
    package = ROOT / "fastq"
    there = {path.name for path in package.iterdir() if path.suffix != ".so" and path.name != "__pycache__"}
    assert named == there
