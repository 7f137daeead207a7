"""``fastq events``: print the events of all workers, Celery's included: a short line a task, or with ``--dump`` all.

Needs no application. The lines of ``--dump`` are those of ``celery events --dump``. With a Celery application screen
and cameras are Celery's own, as they need Celery's objects: they read fastq's events too.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

from fastq.cli import Globals
from fastq.cli.errors import Misuse
from fastq.cli.loader import is_celery
from fastq.cli.options import misplaced_globals
from fastq.codecs.json import decode_event
from fastq.errors import ConnectionLost
from fastq.printable import printable
from fastq.worker.process.exitcodes import EX_OK

if TYPE_CHECKING:
    from fastq.interfaces import BlockingBus

_NAMED_TASKS: Final = 4096  # as many as Celery's dump remembers
_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 10.0
_WORDS: Final = {"worker-offline": "shutdown", "worker-online": "started", "worker-heartbeat": "heartbeat"}
_ENDS: Final = frozenset({"task-succeeded", "task-failed", "task-retried", "task-revoked", "task-rejected"})

Event = dict[str, Any]


@click.command("events")
@click.option("-d", "--dump", is_flag=True, help="Print every event as it comes.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=None, help="End after so many events.")
@click.option("-c", "--camera", default="", help="Celery applications: class that is shown snapshots.")
@click.option("-F", "--frequency", "--freq", default="", help="Celery applications: seconds between snapshots.")
@click.option("-r", "--maxrate", default="", help="Celery applications: most snapshots in a time, such as 10/m.")
@click.option("--detach", is_flag=True, hidden=True)
@misplaced_globals
@click.pass_obj
def command(
    settings: Globals, /, dump: bool, limit: int | None, camera: str, frequency: str, maxrate: str, detach: bool
) -> int:
    """Print a line for each task that ends, or all events; Ctrl-C ends it. Workers tell of tasks when started with -E.

    With a Celery application and without --dump it is Celery's screen.
    """
    given = (("--camera", camera), ("--frequency", frequency), ("--maxrate", maxrate))
    words = [f"{option}={value}" for option, value in given if value] + (["--detach"] if detach else [])
    if words or not (dump or limit):
        app = settings.load_any_app() if settings.app or settings.application is not None else None
        if is_celery(app):
            from fastq.celery.cli.commands import run as run_celery

            return run_celery(app, "events", [*words, *(["--dump"] if dump else [])], settings.words())
        if words:
            option = words[0].partition("=")[0]
            raise Misuse(
                f"option {option} of `events` needs a Celery application: celery -A <module> events {option} ..."
            )
    from fastq.brokers import open_blocking_bus

    app = settings.load_app()
    app.finalize()
    bus = open_blocking_bus(str(app.conf.broker_url), app.conf)
    printer = Dumper(click.echo) if dump else Summary(click.echo)
    if dump:
        click.echo("-> evdump: starting capture...")
    try:
        for event in islice(capture(bus), limit):
            printer.show(event)
    finally:
        bus.close()
    return EX_OK


def capture(bus: BlockingBus) -> Iterator[Event]:
    """Yield the events of all workers as they come, for ever. Raises ConnectionLost when the first connection fails."""
    pause_s = 0.0
    while True:
        try:
            messages = bus.events()
            # As Celery's: everybody shows that it is there, so that nobody has to wait for the next heartbeat.
            bus.tell("heartbeat", {})
            pause_s = _FIRST_PAUSE_S
            for _, body in messages:
                yield from events_in(body)
        except ConnectionLost as error:
            if not pause_s:
                raise
            click.echo(printable(f"-> Connection lost, attempting reconnect: {error}"), err=True)
            bus.close()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)


def events_in(body: bytes) -> Iterator[Event]:
    """Yield the events of a message, which holds one or a list; what is no event is passed over."""
    try:
        decoded = decode_event(body)
    except ValueError:
        return
    for event in decoded if isinstance(decoded, list) else [decoded]:
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            yield {**event, "local_received": time.time()}


class Dumper:
    """Writes events as lines; remembers which task an id belongs to, as only its first event says that."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._tasks: OrderedDict[str, str] = OrderedDict()

    def show(self, event: Mapping[str, Any]) -> None:
        """Write one event."""
        rest = dict(event)
        kind, host = rest.pop("type").lower(), rest.pop("hostname", "?")
        moment = datetime.fromtimestamp(_seconds(rest.pop("timestamp", 0)), timezone.utc)
        words = _WORDS.get(kind) or kind.replace("-", " ")
        task = f" {self._task(kind, rest)}" if kind.startswith("task-") else ""
        fields = ", ".join(f"{name}={rest[name]}" for name in sorted(rest))
        line = f"{host} [{moment}] {words}{':' if fields else ''}{task} {fields}"
        self._write(printable(line))

    def _task(self, kind: str, rest: Event) -> str:
        task_id = str(rest.pop("uuid", "?"))
        if kind in ("task-received", "task-sent"):
            name, args, kwargs = (rest.pop(field, "") for field in ("name", "args", "kwargs"))
            self._tasks[task_id] = f"{name}({task_id}) args={args} kwargs={kwargs}"
            if len(self._tasks) > _NAMED_TASKS:
                self._tasks.popitem(last=False)
        return self._tasks.get(task_id, "")


class Summary:
    """Writes one short line for each task that has ended."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._names: OrderedDict[str, str] = OrderedDict()

    def show(self, event: Mapping[str, Any]) -> None:
        """Write a line if the event is a task's end."""
        kind, task_id = event["type"].lower(), str(event.get("uuid", "?"))
        if event.get("name"):
            self._names[task_id] = str(event["name"])
            if len(self._names) > _NAMED_TASKS:
                self._names.popitem(last=False)
        if kind not in _ENDS:
            return
        moment = datetime.fromtimestamp(_seconds(event.get("timestamp", 0))).astimezone()
        runtime = event.get("runtime")
        more = _duration(runtime) if isinstance(runtime, (int, float)) else str(event.get("exception", ""))
        words = (kind.removeprefix("task-"), f"{self._names.get(task_id, '?')}[{task_id}]", event.get("hostname", "?"))
        self._write(printable(" ".join([f"{moment:%H:%M:%S}", *map(str, words), more.partition("\n")[0]]).rstrip()))


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _seconds(value: object) -> float:
    return value if isinstance(value, (int, float)) and 0 <= value < 2**38 else 0.0
