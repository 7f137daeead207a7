"""`python -m tests.soak`: mixed tasks under faults for some minutes; what was lost, run twice, and what grew.

FastQ's and Celery's applications on RabbitMQ and on Redis, each with two workers: nothing is killed in the first but
its younger child, so that its memory can be watched for the whole time; to the second everything happens. Exit code 1
when a task or a result is lost, a message stays, something grows, or a worker ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from bench.machine import cpu_model
from tests.soak.growth import Series, descriptors, memory_mib
from tests.soak.site import Application, Site
from tests.support.servers import RabbitMQ, Redis, ServerFailed

SAMPLE_S = 3.0
#: How long nothing may end before what is left counts as lost: longer than a lease (15 s), a delay (16 s) and a
#: store's pauses. Celery's visibility time-out is an hour.
SILENCE_S = 90.0
#: How often each fault is drawn, of 10.
FAULTS = {"kill a child": 3, "kill a worker": 2, "cut connections": 2, "stand still": 2, "restart a server": 1}
RELIABLE = {"fastq_reliable": True}
GROWTH_MIB = 3.0  # chosen: 2 bytes a task in an hour at 500 a second
#: In a few minutes: everything happens for the first time.
SHORT_GROWTH_MIB = 10.0
SHORT_MINUTES = 5.0


@dataclass
class Report:
    """What one site came to."""

    site: Site
    lost: list[int] = field(default_factory=list)
    lost_answers: list[int] = field(default_factory=list)
    held: int = 0
    for_ever: int = 0
    backlog: int = 0
    ended: int = 0  # workers that ended by themselves
    series: dict[str, Series] = field(default_factory=dict)


class Soak:
    """The servers, the sites on them, and what happens to them."""

    def __init__(self, options: argparse.Namespace, folder: Path, closing: contextlib.ExitStack) -> None:
        self.options = options
        self.generator = random.Random(options.seed)
        self.faults: Counter[str] = Counter()
        for name in ("rabbitmq", "redis"):
            (folder / name).mkdir()
        self.rabbitmq = RabbitMQ(folder / "rabbitmq").start()
        closing.callback(self.rabbitmq.close)
        self.rabbitmq_version = self.rabbitmq.evaluate("rabbit_misc:version()").strip('"')
        # What it has confirmed, a restart must bring back.
        self.redis = Redis(folder / "redis", {"appendonly": "yes", "appendfsync": "always"}).start()
        closing.callback(self.redis.close)
        self.sites = []
        for index, (application, broker) in enumerate(self._kinds()):
            place = folder / f"site{index + 1}"
            place.mkdir()
            site = Site(
                application,
                broker,
                self.redis,
                (2 * index, 2 * index + 1),
                place,
                options.program,
                self._settings(application, broker),
                options.seed + 100 * index,
            )
            closing.callback(site.close)
            self.sites.append(site)
        self.reports = [Report(site) for site in self.sites]

    def _kinds(self) -> list[tuple[Application, RabbitMQ | Redis]]:
        applications: list[Application] = ["fastq", "celery"] if self.options.program == "fastq" else ["celery"]
        return [(application, broker) for application in applications for broker in (self.rabbitmq, self.redis)]

    def _settings(self, application: Application, broker: RabbitMQ | Redis) -> dict[str, Any]:
        if application == "fastq":
            return {}
        if self.options.program == "celery" and not self.options.acks_late:
            return {}
        # Workflows are sent by Celery's own code, which asks for no confirms by itself.
        confirmed = {"broker_transport_options": {"confirm_publish": True}} if broker is self.rabbitmq else {}
        late = {"task_acks_late": True, "task_reject_on_worker_lost": True}
        return {**(RELIABLE if self.options.program == "fastq" else late), **confirmed}

    # -- the run

    def run(self) -> bool:
        """Return whether everything held."""
        for site in self.sites:
            site.start()
        began = time.monotonic()
        for site in self.sites:
            site.start_sending(self.options.rate / len(self.sites))
        end = began + self.options.minutes * 60
        fault_at = began + self.options.every
        while time.monotonic() < end:
            self._sample(time.monotonic() - began)
            self._revive()
            if time.monotonic() >= fault_at and time.monotonic() + self.options.every / 2 < end:
                self._do_something_bad()
                fault_at = max(fault_at + self.options.every, time.monotonic())
            time.sleep(max(0.0, min(SAMPLE_S, fault_at - time.monotonic())))
        for site in self.sites:
            site.stop_sending()
        self._drain()
        return self._judge()

    def _drain(self) -> None:
        ended, ended_at = -1, time.monotonic()
        while time.monotonic() - ended_at < SILENCE_S:
            self._revive()
            for site in self.sites:
                site.look()
            if not any(site.missing() or site.missing_answers() or held(site) for site in self.sites):
                break
            now_ended = sum(sum(site.tally.done) + site.answers for site in self.sites)
            if now_ended != ended:
                ended, ended_at = now_ended, time.monotonic()
            time.sleep(1.0)
        for report in self.reports:
            report.lost = report.site.missing()
            report.lost_answers = report.site.missing_answers()
            report.held = held(report.site)
            report.for_ever = report.site.keys_for_ever()

    def _judge(self) -> bool:
        return all(
            not (report.lost or report.lost_answers or report.held or report.for_ever or report.ended)
            and all(series.is_flat(self.warm_up_s) for series in report.series.values())
            for report in self.reports
        )

    # -- faults

    def _do_something_bad(self) -> None:
        draw = self.generator
        (kind,) = draw.choices(list(FAULTS), list(FAULTS.values()))
        index = draw.randrange(len(self.sites))
        steady, other = self.sites[index].workers
        worker = draw.choice((steady, other))
        proxies = self.sites[index].proxies[0 if worker is steady else 1]
        self.faults[kind] += 1
        where = f"{self.sites[index].name}, worker {1 if worker is steady else 2}"
        match kind:
            case "kill a child":
                # The oldest of the steady one is left, to be watched.
                children = worker.children()[1 if worker is steady else 0 :]
                if children:
                    os.kill(draw.choice(children), signal.SIGKILL)
            case "kill a worker":
                where = f"{self.sites[index].name}, worker 2"
                other.kill9() if draw.random() < 0.5 else other.kill9_parent()
                other.start()
            case "cut connections":
                reset = draw.random() < 0.5
                for proxy in proxies:
                    proxy.cut(reset)
            case "stand still":
                # Longer than a lease now and then.
                seconds = 18.0 if draw.random() < 0.1 else draw.uniform(1.0, 6.0)
                where += f", {seconds:.1f} s"
                with worker.standing_still():
                    time.sleep(seconds)
            case "restart a server":
                server = draw.choice((self.rabbitmq, self.redis))
                how = draw.choice(("stop", "kill9"))
                where = f"{type(server).__name__}, {how}"
                getattr(server, how)()
                server.start_again() if isinstance(server, RabbitMQ) else server.start()
        say(f"{kind}: {where}")

    def _revive(self) -> None:
        """Start again what has ended by itself, as systemd would."""
        for report in self.reports:
            for worker in report.site.workers:
                if worker.exit_code is not None:
                    say(f"{report.site.name}: a worker ended with exit code {worker.exit_code}")
                    report.ended += 1
                    worker.start()

    # -- what grows

    @property
    def warm_up_s(self) -> float:
        """What is needed for every task, queue and size of buffer to have been there once; at most 5 minutes."""
        return float(min(300.0, self.options.minutes * 60 / 3))

    def _sample(self, at_s: float) -> None:
        growth_mib = GROWTH_MIB if self.options.minutes > SHORT_MINUTES else SHORT_GROWTH_MIB
        for report in self.reports:
            report.site.look()
            steady = report.site.workers[0]
            children = steady.children()
            roles = {"main process": steady.pid, "oldest child": children[0] if children else 0}
            roles["zygote"] = next((pid for pid in steady.tree()[1:] if pid not in children), 0)
            for role, pid in roles.items():
                with contextlib.suppress(OSError):
                    resident, proportional = memory_mib(pid)
                    note(report, f"{role}, RSS", "MiB", growth_mib, at_s, resident)
                    note(report, f"{role}, PSS", "MiB", growth_mib + 1, at_s, proportional)
                    note(report, f"{role}, descriptors", "", 3.0, at_s, descriptors(pid))
            with contextlib.suppress(ServerFailed, RedisError):
                report.backlog = max(report.backlog, report.site.held())
                note(report, "queues" if report.site.vhost else "keys", "", 3.0, at_s, report.site.places())


def note(report: Report, title: str, unit: str, bound: float, at_s: float, value: float) -> None:
    report.series.setdefault(title, Series(title, unit, bound)).samples.append((at_s, value))


def held(site: Site) -> int:
    """Return how many messages its broker has; -1 when it does not answer."""
    try:
        return site.held()
    except (ServerFailed, RedisError):
        return -1


def say(text: str) -> None:
    """Tell what happens, apart from the results."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# -- the table


def table(soak: Soak) -> str:
    """Return the result as Markdown."""
    reports = soak.reports
    rows: list[tuple[str, list[object]]] = [
        ("sent", [len(r.site.sent) for r in reports]),
        ("done", [len(r.site.sent) - len(r.lost) for r in reports]),
        ("**lost**", [some(r.lost) for r in reports]),
        ("results read", [r.site.answers for r in reports]),
        ("**results lost**", [some(r.lost_answers) for r in reports]),
        ("run twice", [r.site.twice() for r in reports]),
        ("sent again by the sender", [len(r.site.repeated) for r in reports]),
        ("most messages at the broker", [r.backlog for r in reports]),
        ("**left at the broker**", [r.held for r in reports]),
        ("**results that never expire**", [r.for_ever for r in reports]),
        ("**workers ended by themselves**", [r.ended for r in reports]),
    ]
    for title in dict.fromkeys(title for report in reports for title in report.series):
        found = [report.series.get(title) for report in reports]
        unit = next((series.unit for series in found if series is not None), "")
        rows.append((title + (f" ({unit})" if unit else ""), [course(series, soak.warm_up_s) for series in found]))
    lines = ["| | " + " | ".join(report.site.name for report in reports) + " |", "|---" * (len(reports) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(map(str, cells)) + " |" for title, cells in rows]
    return "\n".join(lines)


def some(numbers: Sequence[int]) -> str:
    return f"{len(numbers)}" + (f" ({', '.join(map(str, numbers[:5]))}…)" if numbers else "")


def course(series: Series | None, warm_up_s: float) -> str:
    """Return the first and the last figure that were measured, the most, and the rise of the line between them."""
    measured = series.after(warm_up_s) if series is not None else []
    if series is None or not measured:
        return "–"
    digits = 1 if series.unit else 0
    mark = "" if series.is_flat(warm_up_s) else " **!**"
    first, last, most = measured[0][1], measured[-1][1], max(value for _, value in measured)
    rise = series.rise(warm_up_s)
    return f"{first:.{digits}f} → {last:.{digits}f}, most {most:.{digits}f}, line {rise:+.1f}{mark}"


def keep_series(soak: Soak, file: Path) -> None:
    """Write every sample down: (seconds since the start, value), by site and title."""
    found = {r.site.name: {title: series.samples for title, series in r.series.items()} for r in soak.reports}
    file.write_text(json.dumps(found), encoding="utf-8")


def heading(soak: Soak) -> str:
    """Return what was run, on what."""
    options = soak.options
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=False).stdout
    versions = [
        f"Python {platform.python_version()}",
        f"RabbitMQ {soak.rabbitmq_version}",
        redis.partition(" sha=")[0].replace(" server v=", " "),
    ]
    versions += [f"{name} {version(name)}" for name in ("fastq", "celery", "kombu")]
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(soak.faults.items()))
    mode = {"fastq": "fastq, reliable", "celery": "Celery" + (", late" if options.acks_late else ", as it comes")}
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores ({cpu_model()}), {', '.join(versions)}. "
        f"Workers: {mode[options.program]}; {options.minutes:g} min at {options.rate:g} tasks/s, seed {options.seed}; "
        f"warm-up {soak.warm_up_s:.0f} s; {sum(soak.faults.values())} faults: {faults}."
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="ci/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", nargs="?", type=float, default=10.0, help="how long is sent (default 10)")
    parser.add_argument("--rate", type=float, default=500.0, help="tasks a second, all together (default 500)")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between faults (default 10)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="what the faults are drawn from")
    parser.add_argument("--program", choices=("fastq", "celery"), default="fastq", help="celery: stock Celery's worker")
    parser.add_argument("--acks-late", action="store_true", help="celery with task_acks_late, reject_on_worker_lost")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where logs, ledgers and samples stay; must not exist"
    )
    return parser.parse_args(argv)


@contextlib.contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """A folder for servers, workers and ledgers."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fastq-soak-") as name:
        yield Path(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 when something was lost, stayed or grew."""
    options = arguments(argv)
    say(f"seed {options.seed}")
    with place(options.keep) as folder, contextlib.ExitStack() as closing:
        soak = Soak(options, folder, closing)
        holds = soak.run()
        keep_series(soak, folder / "series.json")
        print(f"{heading(soak)}\n\n{table(soak)}\n", flush=True)
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
