"""Mistakes in the set-up become errors that say what was expected and what came."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avalanche_ext.training.checks import (
    check_experience,
    check_labels_fit,
    check_nonnegative,
    check_one_of,
)


@pytest.mark.parametrize("value", [0, 0.0, 3, 1e-12, np.float32(0.5), np.int64(2)])
def test_finite_numbers_from_zero_up_are_accepted(value):
    assert check_nonnegative("Owner", lam=value) is None


@pytest.mark.parametrize("value", [-1, -1e-12, float("nan"), float("inf"), -float("inf")])
def test_negative_and_not_finite_numbers_are_refused(value):
    with pytest.raises(ValueError, match=rf"Owner expects a finite lam >= 0; got lam={value}\."):
        check_nonnegative("Owner", ok=1, lam=value)


@pytest.mark.parametrize("value", [True, False, "1", None, [1.0], 1j])
def test_what_is_not_a_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="Owner expects a number lam >= 0; got"):
        check_nonnegative("Owner", lam=value)


def test_one_of_lists_what_is_allowed():
    assert check_one_of("Owner", "pool", None, (None, "gap")) is None
    with pytest.raises(ValueError, match=r"Owner expects pool to be one of \[None, 'gap'\]; got 3"):
        check_one_of("Owner", "pool", 3, (None, "gap"))


def test_an_empty_experience_is_named_by_its_index():
    experience = SimpleNamespace(dataset=[], current_experience=4)
    with pytest.raises(ValueError, match="experience 4 of the training stream is empty"):
        check_experience(SimpleNamespace(experience=experience))
    experience.dataset = [0]
    assert check_experience(SimpleNamespace(experience=experience)) is None


def strategy(output, classes=None, labels=(0,)):
    experience = SimpleNamespace(classes_in_this_experience=classes)
    return SimpleNamespace(mb_output=output, mb_y=torch.tensor(labels), experience=experience)


@pytest.mark.parametrize("classes", [[0, 2], {2}, None, []])
def test_labels_that_fit_the_head_are_accepted(classes):
    assert check_labels_fit(strategy(torch.zeros(2, 3), classes, labels=(0, 2))) is None


@pytest.mark.parametrize(
    ("classes", "labels", "named"),
    [
        ([0, 3], (0, 1), "labels 0 to 3"),  # also where the first batch lacks the label
        (None, (1, 3), "labels 1 to 3"),
        ({-1, 2}, (2, 2), "labels -1 to 2"),
    ],
)
def test_labels_outside_the_head_are_refused(classes, labels, named):
    with pytest.raises(ValueError, match=rf"{named}, .* 3 units \(labels 0 to 2\)"):
        check_labels_fit(strategy(torch.zeros(2, 3), classes, labels))


@pytest.mark.parametrize("output", [torch.zeros(2), torch.zeros(2, 3, 4, 4), {"a": 1}])
def test_outputs_that_are_no_class_scores_are_not_judged(output):
    assert check_labels_fit(strategy(output, [0, 99])) is None
