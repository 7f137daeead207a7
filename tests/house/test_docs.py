"""The documents are true: their Python runs and prints what they say, and what they name exists.

Each heading with Python blocks of README.md, docs/tasks.md and docs/celery.md is a story. A block whose first line is a
comment with a file name is that file; the other blocks run in order, beside a real worker of the application in those
files. A comment behind a `print` is what it prints. In docs/celery.md the worker is the command `fastq worker`, or the
file itself where it is a program, and what follows `$ fastq` in a console block is what that command prints.
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

import celery
import click
import pytest
import redis
from celery.app.defaults import DEFAULTS

from fastq.celery.conf.carried import CARRIED, How
from fastq.cli import COMMANDS, group
from fastq.codecs import compression
from fastq.settings import Settings
from tests import ROOT
from tests.support.servers import Redis
from tests.support.worker_process import WorkerProcess

DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/celery.md",
    "docs/extending.md",
    "docs/internals.md",
    "docs/operating.md",
    "docs/pools.md",
    "docs/tasks.md",
    "docs/troubleshooting.md",
)
WITH_STORIES = ("README.md", "docs/tasks.md", "docs/pools.md")
OF_CELERY = "docs/celery.md"

HEADING = re.compile(r"^#{1,3} (.+)$")
FILE_NAME = re.compile(r"# ([\w/]+\.py)\n")
PRINTED = re.compile(r"^ *print\(.*?\)  # (.*)$", re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
#: Names of the same form that are something else.
NO_SETTINGS = {"task_id", "task_received", "worker_process_init", "worker_ready"} | {
    *("fastq_app", "fastq_worker", "fastq_worker_options", "fastq_eager")  # fixtures
}
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
with worker(apps[0], concurrency=2, pool="prefork") if apps else contextlib.nullcontext():
    scope = {"__name__": "story"}
    for number, script in enumerate(story["scripts"], 1):
        exec(compile(script, f"block {number}", "exec"), scope)
"""

#: What runs a story of a Celery application; the worker is another process.
CELERY_STAGE = """
import json

scope = {"__name__": "story"}
for number, script in enumerate(json.load(open("story.json"))["scripts"], 1):
    exec(compile(script, f"block {number}", "exec"), scope)
"""
BROKER_DATABASE, RESULT_DATABASE = 12, 13


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

    @property
    def printed(self) -> list[str]:
        """What the scripts say that they print."""
        return [text for script in self.scripts for text in PRINTED.findall(script)]

    def write(self, folder: Path) -> None:
        """Lay the files out."""
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        story = {"modules": self.modules, "scripts": self.scripts}
        (folder / "story.json").write_text(json.dumps(story), encoding="utf-8")


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


def stories(*documents: str) -> list[Story]:
    every = list[Story]()
    for document in documents:
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


@pytest.mark.parametrize("story", stories(*WITH_STORIES), ids=lambda story: story.title)
def test_the_examples_print_what_they_say(story: Story, tmp_path: Path) -> None:
    story.write(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    if "amqp://" in story.text:
        # The same program on another broker: that is what these variables are for.
        url = f"sqlite:///{tmp_path / 'fastq.db'}"
        env |= {"FASTQ_BROKER_URL": url, "FASTQ_RESULT_BACKEND": url}
    if story.modules or story.scripts:
        assert run("-c", STAGE, folder=tmp_path, env=env).splitlines() == story.printed
    for name in story.tests:
        # The installed package brings it as an entry point; one that is being worked on may not have that yet.
        words = ("-q", "-p", "no:cacheprovider", "-p", "fastq.pytest_plugin", name)
        run("-m", "pytest", *words, folder=tmp_path, env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


class Script(WorkerProcess):
    """A file that starts a worker by itself."""

    def __init__(self, folder: Path, file: str, env: dict[str, str]) -> None:
        super().__init__(folder, env=env)
        self._command = [sys.executable, file]


@pytest.mark.redis
@pytest.mark.parametrize("story", stories(OF_CELERY), ids=lambda story: story.title)
def test_the_examples_with_celery_print_what_they_say(story: Story, tmp_path: Path, redis_server: Redis) -> None:
    urls = [redis_server.url(database) for database in (BROKER_DATABASE, RESULT_DATABASE)]
    for url in urls:
        with redis.Redis.from_url(url) as client:
            client.flushdb()
    story.write(tmp_path)
    env = dict(zip(("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"), urls, strict=True))
    [module] = story.modules
    starts_itself = "__main__" in story.files[f"{module}.py"]
    worker = Script(tmp_path, f"{module}.py", env) if starts_itself else WorkerProcess(tmp_path, app=module, env=env)
    try:
        worker.start()
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        printed = run("-c", CELERY_STAGE, folder=tmp_path, env={**os.environ, **env, "PYTHONPATH": path})
        assert printed.splitlines() == story.printed
        assert worker.stop() == 0
    finally:
        worker.kill9()


def commands_with_output() -> list[tuple[str, str]]:
    """Return the command lines of docs/celery.md that are followed by what they print, and that."""
    blocks = [text for _, language, text in blocks_of(OF_CELERY) if language == "console"]
    return [(line.removeprefix("$ fastq "), output) for line, _, output in (text.partition("\n") for text in blocks)]


@pytest.mark.parametrize(("line", "output"), commands_with_output(), ids=lambda text: text.partition("\n")[0])
def test_commands_print_what_is_shown(line: str, output: str, tmp_path: Path) -> None:
    stories(OF_CELERY)[0].write(tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    printed = run("-m", "fastq", *line.split(), folder=tmp_path, env=env | {"PYTHONPATH": str(ROOT)})
    assert printed.replace(celery.__version__, "*") == re.sub(r"(?<=Celery )[\d.]+", "*", output)


def test_the_toys_of_the_page_on_extending_are_the_tests_own() -> None:
    blocks = [text for _, language, text in blocks_of("docs/extending.md") if language == "python"]
    shown = [(ROOT / found[1], text[found.end() :]) for text in blocks if (found := FILE_NAME.match(text))]
    assert {path.stem for path, _ in shown} == {"toy_broker", "folder_store", "toy_pool"}
    for path, text in shown:
        assert text.strip() in path.read_text(encoding="utf-8"), path


def test_the_guides_have_examples() -> None:
    found = [story.title for story in stories(*WITH_STORIES)]
    assert any(title.startswith("README.md") for title in found)
    assert len(found) > 10
    assert len(stories(OF_CELERY)) >= 3
    assert commands_with_output()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text(encoding="utf-8")
    dead = [link for link in LINK.findall(text) if "://" not in link and not (folder / link).exists()]
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    of_celery = NO_SETTINGS.union(DEFAULTS, CARRIED)
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        known = of_celery if document == OF_CELERY or "(Celery)" in line else NO_SETTINGS
        assert [name for name in SETTING.findall(line) if name not in Settings() and name not in known] == []


def test_settings_that_are_not_carried_are_named() -> None:
    text = (ROOT / OF_CELERY).read_text(encoding="utf-8")
    missing = [name for name, entry in CARRIED.items() if entry.how is How.MISSING or entry.accepts is not None]
    assert [name for name in missing if f"`{name}`" not in text] == []


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


def test_the_table_of_options_has_every_option_of_the_worker() -> None:
    table = [line for line in (ROOT / "docs/operating.md").read_text().splitlines() if line.startswith("| `-")]
    command = group.get_command(click.Context(group), "worker")
    assert command is not None
    shown = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    missing = [each.opts for each in shown if not any(f"`{name}" in line for name in each.opts for line in table)]
    assert missing == []


def test_the_compressions_that_are_named_are_known() -> None:
    (named,) = re.findall(r'\(`compression="(.+?)`\)', (ROOT / "docs/tasks.md").read_text())
    assert all(map(compression.is_known, re.findall(r"\w+", named)))


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


def test_no_hint_of_ours_installs_the_other_fastq() -> None:
    """PyPI has another project of this name: extras are installed from a clone, libraries by their own names."""
    code = (path for folder in ("fastq", "bench", "tests") for path in (ROOT / folder).rglob("*.py"))
    texts = [*(ROOT / name for name in DOCUMENTS), *code]
    pattern = re.compile(r"""pip install ['"]?fastq\[""")
    assert [path.name for path in texts if pattern.search(path.read_text("utf-8"))] == []
