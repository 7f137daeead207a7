"""The steps that every application has, the outermost first."""

from __future__ import annotations

from typing import Final

from fastq.steps import Step
from fastq.steps.handlers import AfterReturn, OwnHandlers
from fastq.steps.retry import Retrying

BUILT_IN: Final[tuple[Step, ...]] = (Retrying(), AfterReturn(), OwnHandlers())
