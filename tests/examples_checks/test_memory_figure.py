"""How many bytes of exemplars give the same accuracy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "memory_figure.py"


@pytest.fixture(scope="module")
def equal_bytes():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.equal_bytes


def point(size, accuracy):
    return {"bytes": size, "accuracy": {"mean": accuracy}}


CURVE = [point(100, 0.2), point(10_000, 0.6), point(20_000, 0.5), point(40_000, 0.9)]


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (0.4, 1000.0),  # half way in accuracy, and in the logarithm of the bytes
        (0.3, 100 * 10**0.5),
        (0.2, 100.0),
        (0.1, 100.0),
        (0.6, 10_000.0),  # where it is reached first
        (0.7, 20_000 * 2**0.5),
        (0.9, 40_000.0),
        (0.95, None),
    ],
)
def test_bytes_between_points_are_those_of_a_line_over_their_logarithm(
    accuracy, expected, equal_bytes
):
    found = equal_bytes(CURVE, accuracy)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-12))
