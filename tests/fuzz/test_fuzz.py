"""Half a minute of the message fuzz on each broker and application; ``./ci/fuzz`` runs as long as it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.fuzz import TARGETS, Generator, Target, corpus, fuzz
from tests.support.attacked_worker import Program
from tests.support.stage import Kind, open_stage

#: Seconds for each target.
FUZZ_S = float(os.environ.get("FASTQ_FUZZ_S", "30"))
#: The same messages each time: new ones are for ./ci/fuzz to find.
SEED = 4


@pytest.mark.rabbitmq
@pytest.mark.timeout(FUZZ_S + 300)
@pytest.mark.parametrize(("kind", "program"), TARGETS)
def test_random_messages_and_commands_harm_no_worker(
    kind: Kind, program: Program, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    target = Target(open_stage(kind, request, tmp_path), program)
    try:
        sent = fuzz([target], SEED, FUZZ_S)
        print(f"{sent} sent, memory {target.growth}")
        assert sent > len(corpus()) / 2
    finally:
        target.close()


def test_what_a_batch_holds_follows_from_its_seed() -> None:
    kept = corpus()
    assert len(kept) > 30
    first, second, other = (Generator(seed, 3, kept).attacks(50, "redis") for seed in (7, 7, 8))
    assert first == second != other
