"""Tests, in the folders of the package; `worlds` holds what they are made in, markers say what they start."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
