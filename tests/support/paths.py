"""Where the checkout and the tests' stored data are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST_DATA = ROOT / "tests" / "data"
MIMIC_UNITS = TEST_DATA / "mimic_units.npz"
"""Weights, inputs and scores of the published MIMIC units."""
