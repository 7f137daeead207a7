"""``fastq events --dump``: print the events of all workers, Celery's included, as they come. Needs no application.

The lines are those of ``celery events --dump``. Monitors that need Celery's objects (cameras, the curses screen) are
Celery's own to run: they read fastq's events too.
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
from fastq.cli.options import misplaced_globals, refused
from fastq.codecs.json import decode_event
from fastq.errors import ConnectionLost
from fastq.worker.exitcodes import EX_OK

if TYPE_CHECKING:
    from fastq.transport.bus import BlockingBus

_NAMED_TASKS: Final = 4096  # as many as Celery's dump remembers
_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 10.0
_WORDS: Final = {"worker-offline": "shutdown", "worker-online": "started", "worker-heartbeat": "heartbeat"}
_OTHERWISE: Final = "use --dump, or Celery's own, which shows fastq's workers too: celery -A <module> events"

Event = dict[str, Any]


@click.command("events")
@click.option("-d", "--dump", is_flag=True, help="Print every event as it comes.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=None, help="End after so many events.")
@refused("-c", "--camera", why=_OTHERWISE + " --camera ...")
@refused("-F", "--frequency", "--freq", why=_OTHERWISE + " --camera ...")
@refused("-r", "--maxrate", why=_OTHERWISE + " --camera ...")
@refused("--detach", takes_value=False, why=_OTHERWISE + " --detach ...")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, dump: bool, limit: int | None) -> int:
    """Print the events that workers send; Ctrl-C ends it. Tasks tell of themselves when started with -E."""
    if not dump:
        raise Misuse(f"the screen of `events` is not carried by this version of fastq; {_OTHERWISE}")
    from fastq.transport.bus import open_blocking_bus

    app = settings.load_app()
    app.finalize()
    bus = open_blocking_bus(str(app.conf.broker_url), app.conf)
    dumper = Dumper(click.echo)
    click.echo("-> evdump: starting capture...")
    try:
        for event in islice(capture(bus), limit):
            dumper.show(event)
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
            click.echo(f"-> Connection lost, attempting reconnect: {error}", err=True)
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
        # Lone surrogates, as in names of files, have no form on a terminal.
        self._write(line.encode("utf-8", "backslashreplace").decode())

    def _task(self, kind: str, rest: Event) -> str:
        task_id = str(rest.pop("uuid", "?"))
        if kind in ("task-received", "task-sent"):
            name, args, kwargs = (rest.pop(field, "") for field in ("name", "args", "kwargs"))
            self._tasks[task_id] = f"{name}({task_id}) args={args} kwargs={kwargs}"
            if len(self._tasks) > _NAMED_TASKS:
                self._tasks.popitem(last=False)
        return self._tasks.get(task_id, "")


def _seconds(value: object) -> float:
    return value if isinstance(value, (int, float)) and 0 <= value < 2**38 else 0.0
