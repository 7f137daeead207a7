"""The test suite, laid out as the package is; what tests are written with is in ``support``."""

from pathlib import Path

#: The project's folder.
ROOT = Path(__file__).resolve().parent.parent
