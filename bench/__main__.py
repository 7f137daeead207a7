"""`python -m bench`: compare fastq with other task queues and the floor on this machine, in interleaved runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench import machine, report
from bench.metrics import METRICS, Entrant, Metric, Plan
from bench.run import Bench, BenchError
from tests.support.servers import RabbitMQ, Redis, ServerMissing


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    names = ", ".join(metric.name for metric in METRICS)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    parser.add_argument("--tasks", type=int, default=5000, help="tasks of one run (default 5000)")
    parser.add_argument("--fast-tasks", type=int, help="tasks of one run of fastq and the floor (default 4 × --tasks)")
    parser.add_argument("--only", metavar="NAMES", help=f"metrics, separated by commas; io: all io-…: {names}")
    parser.add_argument("--systems", metavar="NAMES", help="entrants, separated by commas, such as fastq,celery,floor")
    parser.add_argument("--broker", choices=("amqp", "sqlite", "redis"), help="only what is measured on this broker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single run")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the main figures (.svg or .png)")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="show an earlier --json FILE again")
    parser.add_argument("--list", action="store_true", help="list the metrics and stop")
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> list[Metric]:
    """Return the metrics that the command line asks for, by a metric's name or by a family's, such as io."""
    families: dict[str, set[str]] = {}
    for metric in METRICS:
        families.setdefault(metric.name.partition("-")[0], set()).add(metric.name)
    known = {**families, **{metric.name: {metric.name} for metric in METRICS}}  # `drain` is drain alone
    only = options.only.split(",") if options.only else list(known)
    if unknown := set(only) - known.keys():
        raise SystemExit(f"unknown metric {sorted(unknown)[0]!r}; known: {', '.join(m.name for m in METRICS)}")
    names = set().union(*(known[name] for name in only))
    return [m for m in METRICS if m.name in names and options.broker in (None, m.broker)]


def installed(python: str, distributions: set[str]) -> set[str]:
    """Return which of the distributions an interpreter can import."""
    return {
        name
        for name in distributions
        if subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0
    }


@contextlib.contextmanager
def private_rabbitmq(needed: bool, folder: Path) -> Iterator[RabbitMQ | None]:
    """Run a RabbitMQ of our own while the body runs; none when no metric needs it."""
    if not needed:
        yield None
        return
    try:
        server = RabbitMQ(folder)
    except ServerMissing as error:
        raise SystemExit(str(error)) from None
    say("starting a private RabbitMQ")
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def private_redis(needed: bool, folder: Path) -> Iterator[Redis | None]:
    """Run a Redis of our own while the body runs; none when no metric needs it."""
    if not needed:
        yield None
        return
    folder.mkdir()
    try:
        server = Redis(folder)
    except ServerMissing as error:
        raise SystemExit(str(error)) from None
    server.start()
    try:
        yield server
    finally:
        server.close()


def say(text: str) -> None:
    """Tell how far it has come, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def measure_all(
    bench: Bench, metrics: Sequence[Metric], entrants: dict[str, list[Entrant]], plan: Plan, rounds: int
) -> list[report.Sample]:
    """Run A B C A B C …: what disturbs the machine for a while disturbs all alike."""
    samples: list[report.Sample] = []
    for metric in metrics:
        for round_number in range(1, rounds + 1):
            for entrant in entrants[metric.name]:
                began = time.monotonic()
                try:
                    figures = entrant.measure(bench, plan)
                except (BenchError, RuntimeError, subprocess.SubprocessError) as error:
                    say(f"{metric.name} {entrant.name}: FAILED: {error}")
                    continue
                samples.append(report.Sample(metric.name, entrant.name, round_number, figures))
                shown = ", ".join(f"{name} {report.number(value)}" for name, value in figures.items())
                say(
                    f"{metric.name} {round_number}/{rounds} {entrant.name}: {shown}  [{time.monotonic() - began:.1f} s]"
                )
    return samples


def show(
    options: argparse.Namespace,
    metrics: Sequence[Metric],
    described: machine.Machine,
    command: str,
    samples: Sequence[report.Sample],
) -> None:
    """Print the tables and draw the picture that was asked for."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    print(f"`{command}`\n\n{machine.sentence(described)}; {versions}.\n")
    for metric in metrics:
        if text := report.table(metric, samples):
            print(text + "\n")
    if options.picture:
        report.draw(options.picture, metrics, samples, machine.sentence(described))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 when an entrant could not be measured in any round."""
    options = arguments(argv)
    metrics = chosen(options)
    if options.list:
        print("\n".join(f"{metric.name:22} {metric.title}" for metric in metrics))
        return 0
    if options.picture and find_spec("matplotlib") is None:
        raise SystemExit("--picture needs matplotlib: pip install matplotlib")
    if options.source:
        show(options, metrics, *report.read_json(options.source))
        return 0
    peers = os.environ.get("FASTQ_BENCH_PEERS", sys.executable)
    needed = {name for metric in metrics for entrant in metric.entrants for name in entrant.needs}
    present = installed(sys.executable, needed & {"fastq"}) | installed(peers, needed - {"fastq"})
    wanted = set(options.systems.split(",")) if options.systems else None
    entrants = {
        metric.name: [
            entrant
            for entrant in metric.entrants
            if present.issuperset(entrant.needs) and (wanted is None or entrant.name.split(",")[0] in wanted)
        ]
        for metric in metrics
    }
    if missing := needed - present:
        say(f"not installed and left out: {', '.join(sorted(missing))}")
    plan = Plan(options.tasks, options.fast_tasks or 4 * options.tasks)

    with tempfile.TemporaryDirectory(prefix="fastq-bench-") as name:
        folder = Path(name)
        (folder / "rabbitmq").mkdir()
        brokers = {metric.broker for metric in metrics}
        with (
            private_rabbitmq("amqp" in brokers, folder / "rabbitmq") as rabbitmq,
            private_redis("redis" in brokers, folder / "redis") as redis,
        ):
            version = rabbitmq.evaluate("rabbit_misc:version()").strip('"') if rabbitmq else "none"
            described = machine.describe(peers, version)
            bench = Bench(peers, folder, rabbitmq, redis)
            samples = measure_all(bench, metrics, entrants, plan, options.rounds)
    described["load_after"] = machine.load()

    command = f"python -m bench {' '.join(sys.argv[1:] if argv is None else argv)}".rstrip()
    if options.json:
        report.write_json(options.json, described, command, samples)
    show(options, metrics, described, command, samples)
    measured = {(sample.metric, sample.entrant) for sample in samples}
    return 0 if all((m.name, e.name) in measured for m in metrics for e in entrants[m.name]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
