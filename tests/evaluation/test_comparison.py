"""Verdicts at the edges of the intervals, and rows that must not share a table."""

from __future__ import annotations

import math

import pytest

from avalanche_ext.evaluation.comparison import compare, merge, published_of
from avalanche_ext.evaluation.tables import aggregate

# mean 0.5, sample deviation 0.1, so a standard error of 0.05 over four seeds
FOUR = {"mean": 0.5, "sd": 0.1, "values": [0.4, 0.5, 0.5, 0.6]}
ONE = {"mean": 0.5, "sd": None, "values": [0.5]}


def figure(value, deviation):
    return {"value": value, "deviation": deviation, "source": "Table 1"}


@pytest.mark.parametrize(
    ("measured", "value", "deviation", "verdict"),
    [
        (FOUR, 0.5, 0.02, "within"),
        (FOUR, 0.569, 0.02, "within"),  # 0.55 reaches 0.549
        (FOUR, 0.571, 0.02, "below"),  # 0.55 does not reach 0.551
        (FOUR, 0.431, 0.02, "within"),
        (FOUR, 0.429, 0.02, "above"),
        (FOUR, 0.549, None, "within"),  # the measured interval alone
        (FOUR, 0.551, None, "below"),
        (FOUR, 0.449, None, "above"),
        (ONE, 0.519, 0.02, "within"),  # the published interval alone
        (ONE, 0.521, 0.02, "below"),
        (ONE, 0.479, 0.02, "above"),
        (ONE, 0.5, None, "undecided"),
        (ONE, 0.9, None, "undecided"),
        (aggregate([0.5, 0.5, 0.5]), 0.51, None, "below"),  # no spread is an interval too
    ],
)
def test_the_verdict_is_whether_the_intervals_overlap(measured, value, deviation, verdict):
    found = compare(measured, figure(value, deviation))
    assert found.verdict == verdict
    assert found.gap == pytest.approx(0.5 - value)
    assert (found.value, found.deviation, found.source) == (value, deviation, "Table 1")


def test_the_published_deviation_is_not_divided_by_our_seeds():
    assert compare(FOUR, figure(0.5 + 0.05 + 0.079, 0.08)).verdict == "within"
    assert compare(FOUR, figure(0.5 + 0.05 + 0.081, 0.08)).verdict == "below"
    assert 0.1 / math.sqrt(4) == pytest.approx(0.05)


def test_another_protocol_gets_no_verdict():
    found = compare(FOUR, figure(0.5, 0.02), same_protocol=False)
    assert (found.verdict, found.gap) == ("other protocol", 0.0)
    row = {"title": "X", "a": FOUR, "published": [{"quantity": "a", **figure(0.5, 0.02)}]}
    assert published_of(row, ["a"])["a"].verdict == "within"
    assert published_of({**row, "changed": ["epochs"]}, ["a"])["a"].verdict == "other protocol"


def test_a_figure_without_ours_has_no_gap():
    found = compare(None, figure(0.5, 0.02))
    assert (found.gap, found.verdict) == (None, "")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ([("accuracy", 0.5)], "Close: average_accuracy"),
        ([("average_accuracy", 77.8)], "77.8. Is it in percent"),
        ([("average_accuracy", 0.5), ("average_accuracy", 0.6)], "two published figures"),
    ],
)
def test_a_figure_that_cannot_be_meant_is_refused(figures, message):
    row = {"title": "X", "published": [{"quantity": q, **figure(v, None)} for q, v in figures]}
    with pytest.raises(ValueError, match=message):
        published_of(row, ["average_accuracy", "seconds"])


def row(title, **protocol):
    return {"title": title, "protocol": {"epochs": 1, "mem": 300, **protocol}}


def test_rows_of_one_protocol_merge_and_keep_their_run():
    rows = merge({"a": [row("Naive"), row("ER")], "b": [row("Naive"), row("BER")]})
    assert [r["title"] for r in rows] == ["Naive (a)", "ER", "Naive (b)", "BER"]


def test_rows_of_unequal_protocol_are_refused_with_the_fields():
    tables = {"a": [row("Naive")], "b": [row("ER", epochs=5), row("BER", mem=600, lr=0.1)]}
    with pytest.raises(ValueError, match="unequal protocol") as refused:
        merge(tables)
    message = str(refused.value)
    assert "epochs is 1 for 'Naive' in a, 5 for 'ER' in b" in message
    assert "mem is 300 for 'Naive' in a, 600 for 'BER' in b" in message
    assert "lr is (absent) for 'Naive' in a, 0.1 for 'BER' in b" in message


def test_a_row_of_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="'ER' in b is not on record"):
        merge({"a": [row("Naive")], "b": [{"title": "ER"}]})
