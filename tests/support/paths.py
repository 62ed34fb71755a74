"""Where the checkout and the tests' stored files are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "stored"
MIMIC_UNITS = STORED / "mimic_units.npz"
"""Weights, inputs and scores of the published MIMIC units."""
