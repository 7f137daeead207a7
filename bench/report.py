"""Tables, JSON and a picture out of what the rounds measured. Ratios are taken within a round, then their median."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.machine import Machine
from bench.metrics import UNITS, Metric
from bench.run import Figures

# The first figure of a metric is the one that ratios are made of; "more is better" turns them round.
MORE_IS_BETTER = {"tasks_s"}
PICTURE = (
    ("drain", "worker_us"),
    ("drain-results", "worker_us"),
    ("drain-sqlite", "worker_us"),
    ("publish", "producer_us"),
    ("roundtrip", "p50_ms"),
    ("roundtrip-sqlite", "p50_ms"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one entrant of one metric measured in one round."""

    metric: str
    entrant: str
    round: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over all rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)}..{number(self.high)})"


def number(value: float) -> str:
    """Return a figure with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and greatest. No run is thrown away."""
    return Spread(median(values), min(values), max(values))


def figures_of(samples: Iterable[Sample], metric: str, entrant: str) -> dict[str, Spread]:
    """Return every figure of one line, by name."""
    mine = [sample.figures for sample in samples if sample.metric == metric and sample.entrant == entrant]
    names = mine[0].keys() if mine else ()
    return {name: spread([figures[name] for figures in mine]) for name in names}


def ratio(samples: Iterable[Sample], metric: str, entrant: str, baseline: str, figure: str) -> float | None:
    """Return how many times less the entrant needs than the baseline (more, for a rate), as the median over rounds."""
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.metric == metric and figure in sample.figures:
            by_round.setdefault(sample.round, {})[sample.entrant] = sample.figures[figure]
    pairs = [(row[entrant], row[baseline]) for row in by_round.values() if entrant in row and baseline in row]
    ratios = [mine / theirs if figure in MORE_IS_BETTER else theirs / mine for mine, theirs in pairs if mine and theirs]
    return median(ratios) if ratios else None


def table(metric: Metric, samples: Sequence[Sample]) -> str:
    """Return one metric as a Markdown table; "" when nothing was measured."""
    measured = [
        (entrant.name, figures)
        for entrant in metric.entrants
        if (figures := figures_of(samples, metric.name, entrant.name))
    ]
    if not measured:
        return ""
    names = list(measured[0][1])
    present = {name for name, _ in measured}
    baselines = [name for name in metric.baselines if name in present]
    header = [metric.title, *(UNITS[name] for name in names), *(f"× {baseline}" for baseline in baselines)]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, figures in measured:
        ratios = [ratio(samples, metric.name, name, baseline, names[0]) for baseline in baselines]
        rows.append(
            [
                name,
                *(str(figures[figure]) if figure in figures else "–" for figure in names),
                *("–" if value is None else number(value) for value in ratios),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_json(path: Path, machine: Machine, command: str, samples: Sequence[Sample]) -> None:
    """Write everything that was measured, each run by itself."""
    record = {"command": command, "machine": machine, "samples": [asdict(sample) for sample in samples]}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(path: Path, metrics: Sequence[Metric], samples: Sequence[Sample], caption: str) -> None:
    """Draw the main figures as bars on a logarithmic scale. Needs matplotlib, which the extra `bench` brings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        (metric, figure)
        for name, figure in PICTURE
        for metric in metrics
        if metric.name == name and any(sample.metric == name for sample in samples)
    ]
    if not shown:
        return
    canvas, axes = pyplot.subplots(len(shown), 1, figsize=(9, 1.7 * len(shown) + 0.6), squeeze=False)
    for axis, (metric, figure) in zip(axes[:, 0], shown, strict=True):
        lines = [
            (entrant.name, figures_of(samples, metric.name, entrant.name)[figure])
            for entrant in reversed(metric.entrants)
            if figures_of(samples, metric.name, entrant.name)
        ]
        values = [value.median for _, value in lines]
        reach = [[v.median - v.low for _, v in lines], [v.high - v.median for _, v in lines]]
        colours = ["#c2410c" if name.startswith("fastq") else "#94a3b8" for name, _ in lines]
        axis.barh([name for name, _ in lines], values, xerr=reach, color=colours, ecolor="#334155", height=0.65)
        axis.set_xscale("log")
        axis.set_title(f"{metric.title}: {UNITS[figure]}", fontsize=9, loc="left")
        for position, (_, value) in enumerate(lines):
            axis.annotate(f" {value}", (value.high, position), va="center", fontsize=8)
        axis.margins(x=0.35)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    canvas.text(0.01, 0.004, caption, fontsize=6, color="#475569")
    canvas.tight_layout(rect=(0, 0.015, 1, 1))
    canvas.savefig(path)
    pyplot.close(canvas)
