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

MORE_IS_BETTER = {"tasks_s"}
SHORT = {
    "worker_us": "CPU",
    "producer_us": "CPU",
    "tasks_s": "rate",
    "p50_ms": "p50",
    "pss_mb": "PSS",
    "held_mb": "PSS",
    "start_s": "time",
}
OURS, THEIRS = "#c2410c", "#94a3b8"
PICTURE = (
    ("drain", "worker_us"),
    ("drain-results", "worker_us"),
    ("drain-sqlite", "worker_us"),
    ("publish", "producer_us"),
    ("roundtrip", "p50_ms"),
    ("roundtrip-sqlite", "p50_ms"),
    ("io-noop", "worker_us"),
    ("io-sleep", "worker_us"),
    ("io-gevent", "worker_us"),
    ("io-threads", "worker_us"),
    ("io-memory", "held_mb"),
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
    """Return how many times better the entrant is than the baseline: needs less, or has the higher rate."""
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
    baselines = [(entrant, figure) for entrant, figure in metric.baselines if entrant in present]
    against = [f"{SHORT.get(figure, 'ratio')} against {entrant}" for entrant, figure in baselines]
    header = [metric.title, *(UNITS[name] for name in names), *against]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, figures in measured:
        ratios = [ratio(samples, metric.name, name, entrant, figure) for entrant, figure in baselines]
        rows.append(
            [
                name,
                *(str(figures[figure]) if figure in figures else "–" for figure in names),
                *("–" if value is None else f"{number(value)} ×" for value in ratios),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_json(path: Path, machine: Machine, command: str, samples: Sequence[Sample]) -> None:
    """Write everything that was measured, each run by itself."""
    record = {"command": command, "machine": machine, "samples": [asdict(sample) for sample in samples]}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> tuple[Machine, str, list[Sample]]:
    """Return what write_json() wrote: machine, command, samples."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["machine"], record["command"], [Sample(**sample) for sample in record["samples"]]


def draw(path: Path, metrics: Sequence[Metric], samples: Sequence[Sample], caption: str) -> None:
    """Draw the main figures as bars from zero. Needs matplotlib, which the extra `bench` brings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        (metric, figure, bars)
        for name, figure in PICTURE
        for metric in metrics
        if metric.name == name and (bars := bars_of(metric, figure, samples))
    ]
    if not shown:
        return
    heights = [len(bars) + 1.2 for _, _, bars in shown]
    canvas, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.32 * sum(heights) + 0.4), squeeze=False, height_ratios=heights
    )
    for axis, (metric, figure, bars) in zip(axes[:, 0], shown, strict=True):
        names, spreads = zip(*reversed(bars), strict=True)
        reach = [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]
        colours = [OURS if name.startswith("fastq") else THEIRS for name in names]
        axis.barh(names, [each.median for each in spreads], xerr=reach, color=colours, ecolor="#334155", height=0.7)
        axis.set_title(f"{metric.title}: {UNITS[figure]}", fontsize=9, loc="left")
        for position, each in enumerate(spreads):
            axis.annotate(f"  {each}", (each.high, position), va="center", fontsize=8)
        axis.set_xlim(0, max(each.high for each in spreads) * 1.25)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(labelsize=8, length=0)
    canvas.text(0.01, 0.006, caption, fontsize=6, color="#475569")
    canvas.tight_layout(rect=(0, 0.02, 1, 1))
    canvas.savefig(path)
    pyplot.close(canvas)


def bars_of(metric: Metric, figure: str, samples: Sequence[Sample]) -> list[tuple[str, Spread]]:
    """Return one figure of every entrant that was measured, in the table's order."""
    found = [(entrant.name, figures_of(samples, metric.name, entrant.name)) for entrant in metric.entrants]
    return [(name, figures[figure]) for name, figures in found if figure in figures]
