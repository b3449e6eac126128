"""Transfer, intransigence and images of an accuracy matrix: worked by hand, and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from avalanche_ext.evaluation.accuracy_matrix import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer_expandable_der,
    backward_transfer_gem,
    draw_accuracy_matrix,
    forgetting,
    forward_transfer_expandable_der,
    forward_transfer_gem,
    intransigence,
    matrix_metrics,
    seen_accuracies,
)

TRIANGLE = [[0.9], [0.8, 0.85], [0.6, 0.7, 0.9]]
SQUARE = [[0.9, 0.1, 0.2], [0.8, 0.85, 0.3], [0.6, 0.7, 0.9]]


def test_the_two_backward_transfers_differ():
    # GEM: (0.6 - 0.9 + 0.7 - 0.85) / 2
    assert backward_transfer_gem(TRIANGLE) == pytest.approx(-0.225)
    # ExpandableDER: (1/2 (0.8 - 0.9) + 1/3 (0.6 - 0.9 + 0.7 - 0.85)) / 2
    assert backward_transfer_expandable_der(TRIANGLE) == pytest.approx(-0.100)


def test_the_two_forward_transfers_differ():
    # GEM: what was known of experiences 2 and 3 before their training, over chance
    assert forward_transfer_gem(SQUARE, [0.5, 0.15, 0.05]) == pytest.approx((-0.05 + 0.25) / 2)
    # ExpandableDER: how well they were learnt, over a network that met them first
    assert forward_transfer_expandable_der(TRIANGLE, [0.1, 0.8, 0.95]) == pytest.approx(0.0)
    assert forward_transfer_expandable_der(TRIANGLE, [0.1, 0.7, 0.95]) == pytest.approx(0.05)


def test_intransigence_counts_the_first_experience_too():
    # (0.95 - 0.9 + 0.9 - 0.85 + 0.8 - 0.9) / 3
    assert intransigence(TRIANGLE, [0.95, 0.9, 0.8]) == pytest.approx(0.0, abs=1e-12)
    assert intransigence(TRIANGLE, [1.0, 0.9, 0.8]) == pytest.approx(0.05 / 3)


def test_accuracy_over_samples_is_not_that_over_experiences():
    samples = [50, 10, 10]
    assert seen_accuracies(TRIANGLE, samples) == pytest.approx(
        [0.9, (40 + 8.5) / 60, (30 + 7 + 9) / 70]
    )
    assert seen_accuracies(TRIANGLE) == pytest.approx([0.9, 0.825, 2.2 / 3])
    assert average_incremental_accuracy(TRIANGLE) == pytest.approx((0.9 + 0.825 + 2.2 / 3) / 3)
    assert average_incremental_accuracy(TRIANGLE, skip_first=True) == pytest.approx(
        (0.825 + 2.2 / 3) / 2
    )
    assert average_incremental_accuracy(TRIANGLE, samples) == pytest.approx(
        (0.9 + 48.5 / 60 + 46 / 70) / 3
    )
    with pytest.raises(ValueError, match=r"3; got 2"):
        seen_accuracies(TRIANGLE, [1, 2])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_every_metric_equals_its_formula_in_a_loop(n):
    draw = np.random.default_rng(n)
    a, b, alone, joint = draw.random((n, n)), draw.random(n), draw.random(n), draw.random(n)
    samples = draw.integers(1, 90, n)
    gem = der = fwt_gem = fwt_der = intransigent = forgot = over_samples = 0.0
    for i in range(n):
        intransigent += (joint[i] - a[i][i]) / n
        right = sum(a[i][j] * samples[j] for j in range(i + 1))
        over_samples += right / sum(samples[j] for j in range(i + 1)) / n
        if i < n - 1:
            gem += (a[n - 1][i] - a[i][i]) / (n - 1)
            forgot += (max(a[k][i] for k in range(i, n - 1)) - a[n - 1][i]) / (n - 1)
        if i > 0:
            der += sum(a[i][j] - a[j][j] for j in range(i + 1)) / (i + 1) / (n - 1)
            fwt_gem += (a[i - 1][i] - b[i]) / (n - 1)
            fwt_der += (a[i][i] - alone[i]) / (n - 1)
    assert matrix_metrics(a, samples=samples, initial=b, alone=alone, joint=joint) == pytest.approx(
        {
            "average_accuracy": a[-1].mean(),
            "average_incremental_accuracy": average_incremental_accuracy(a),
            "average_incremental_accuracy_samples": over_samples,
            "forgetting": forgot,
            "backward_transfer_gem": gem,
            "backward_transfer_expandable_der": der,
            "forward_transfer_gem": fwt_gem,
            "forward_transfer_expandable_der": fwt_der,
            "intransigence": intransigent,
        }
    )


def test_what_a_triangle_does_not_hold_is_left_out():
    found = matrix_metrics(TRIANGLE, initial=[0.1, 0.1, 0.1])
    assert "forward_transfer_gem" not in found  # nothing ahead was tested
    assert found["backward_transfer_gem"] == pytest.approx(-0.225)
    assert math.isnan(forward_transfer_gem(TRIANGLE, [0.1, 0.1, 0.1]))


@pytest.mark.filterwarnings("error")
def test_one_experience_has_no_transfer():
    assert matrix_metrics([[0.7]], initial=[0.1], alone=[0.2], joint=[0.8]) == pytest.approx(
        {
            "average_accuracy": 0.7,
            "average_incremental_accuracy": 0.7,
            "forgetting": 0.0,
            "intransigence": 0.1,
        }
    )
    assert math.isnan(average_incremental_accuracy([[0.7]], skip_first=True))


def test_one_test_experience_has_accuracies_only():
    column = [[0.2], [0.5], [0.6]]
    found = matrix_metrics(column, initial=[0.1] * 3, alone=[0.2] * 3, joint=[0.8] * 3)
    assert found == pytest.approx(
        {"average_accuracy": 0.6, "average_incremental_accuracy": 1.3 / 3}
    )
    assert math.isnan(forgetting(column))
    assert average_accuracy(column) == 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: backward_transfer_gem([[0.5], [0.5, 0.5], [0.5]]), r"3 rows of \[1, 2, 1\]"),
        (lambda: backward_transfer_gem([[0.5], [0.5] * 3, [0.5] * 3]), r"\[1, 3, 3\]"),
        (lambda: backward_transfer_gem([]), "0 rows"),
        (lambda: intransigence(TRIANGLE, [0.5]), "joint expects one accuracy per experience, 3"),
        (lambda: forward_transfer_gem(SQUARE, [0.5] * 4), "initial expects .* 3; got 4"),
        (lambda: forward_transfer_expandable_der(SQUARE, []), "alone expects"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_picture_leaves_what_was_not_tested_blank():
    texts = [t.get_text() for t in draw_accuracy_matrix(TRIANGLE, "t").axes[0].texts]
    assert texts == ["90", "80", "85", "60", "70", "90"]
    assert len(draw_accuracy_matrix([[0.2], [0.5]], "t").axes[0].texts) == 2
