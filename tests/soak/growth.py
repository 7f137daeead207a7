"""What a process or a broker has over time, and whether it grows: samples and the line through them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20


@dataclass
class Series:
    """One figure over time; ``bound`` is how much the line through it may rise between the warm-up and the end."""

    title: str
    unit: str
    bound: float
    samples: list[tuple[float, float]] = field(default_factory=list)  # (seconds since the start, value)

    def after(self, warm_up_s: float) -> list[tuple[float, float]]:
        return [sample for sample in self.samples if sample[0] >= warm_up_s]

    def rise(self, warm_up_s: float) -> float:
        """Return by how much the fitted line rises over the time that was measured; 0 when there is none."""
        measured = self.after(warm_up_s)
        if len(measured) < 3:
            return 0.0
        return slope(measured) * (measured[-1][0] - measured[0][0])

    def is_flat(self, warm_up_s: float) -> bool:
        return self.rise(warm_up_s) <= self.bound


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Return the rise per second of the line with the least squares."""
    middle_x = sum(x for x, _ in samples) / len(samples)
    middle_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - middle_x) ** 2 for x, _ in samples)
    return sum((x - middle_x) * (y - middle_y) for x, y in samples) / spread if spread else 0.0


def memory_mib(pid: int) -> tuple[float, float]:
    """Return the resident and the proportional set size. Raises OSError when the process has gone."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    )
    resident, proportional = (int(fields[name].split()[0]) * 1024 / MIB for name in ("Rss", "Pss"))
    return resident, proportional


def descriptors(pid: int) -> int:
    """Return how many files, sockets and pipes are open. Raises OSError when the process has gone."""
    return len(os.listdir(f"/proc/{pid}/fd"))
