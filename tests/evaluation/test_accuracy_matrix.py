"""The numbers of an accuracy matrix, worked by hand."""

from __future__ import annotations

import pytest

from avalanche_ext.evaluation.accuracy_matrix import (
    average_accuracy,
    average_incremental_accuracy,
    draw_accuracy_matrix,
    forgetting,
)
from avalanche_ext.evaluation.tables import aggregate, as_markdown, as_text

MATRIX = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.0], [0.7, 0.5, 1.0]]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert average_accuracy(MATRIX) == pytest.approx(2.2 / 3)


def test_average_incremental_accuracy_looks_at_seen_experiences_only():
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)


def test_forgetting_is_the_fall_from_the_best_since_it_was_learnt():
    # experience 1: best 0.9, now 0.7; experience 2: best 0.8, now 0.5
    assert forgetting(MATRIX) == pytest.approx((0.2 + 0.3) / 2)
    # accuracy before an experience was trained on does not count as its best
    lucky = [[0.9, 0.95, 0.0], [0.6, 0.8, 0.0], [0.7, 0.5, 1.0]]
    assert forgetting(lucky) == pytest.approx((0.2 + 0.3) / 2)
    # what got better was not forgotten: the fall is negative
    assert forgetting([[0.5, 0.0], [0.75, 1.0]]) == pytest.approx(-0.25)
    assert forgetting([[0.7]]) == 0


def test_a_matrix_must_be_square():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        average_accuracy([[0.5, 0.5]])


def test_the_picture_holds_every_number():
    texts = [t.get_text() for t in draw_accuracy_matrix(MATRIX, "t").axes[0].texts]
    assert texts == ["90", "10", "0", "60", "80", "0", "70", "50", "100"]


def test_tables_show_mean_and_sample_deviation():
    row = {"title": "BER", "seeds": 2, "average_accuracy": aggregate([0.80, 0.90]),
           "bytes_remembered": aggregate([13600, 13600])}  # fmt: skip
    assert row["average_accuracy"]["sd"] == pytest.approx(0.1 / 2**0.5)
    assert as_markdown([row]).splitlines() == [
        "| method | seeds | accuracy % | memory bytes |",
        "| --- | ---: | ---: | ---: |",
        "| BER | 2 | 85.0 ± 7.1 | 13,600 |",
    ]
    assert as_text([row]).splitlines()[2] == "BER         2  85.0 ± 7.1        13,600"


def test_one_seed_has_no_deviation():
    assert aggregate([0.5]) == {"mean": 0.5, "sd": None, "values": [0.5]}
