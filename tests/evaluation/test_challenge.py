"""The challenge's scores against numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_ext.benchmarks import toy_core50
from avalanche_ext.evaluation.challenge import (
    CHALLENGE_WEIGHTS,
    ChallengeScores,
    average_validation_accuracy,
    average_validation_accuracy_seen,
    cl_score,
)
from avalanche_ext.evaluation.metrics import ChallengeMetrics


def test_perfect_on_what_was_seen_gives_five_ninths():
    perfect = [[1.0 if j <= i else 0.0 for j in range(9)] for i in range(9)]
    assert average_validation_accuracy(perfect) == pytest.approx(5 / 9)
    assert average_validation_accuracy_seen(perfect) == 1.0


def test_by_hand():
    matrix = [[0.9, 0.1], [0.5, 0.7]]
    assert average_validation_accuracy(matrix) == pytest.approx(0.55)
    assert average_validation_accuracy_seen(matrix) == pytest.approx(0.75)
    single = [[0.2], [0.4], [0.9]]
    assert average_validation_accuracy(single) == pytest.approx(0.5)
    assert average_validation_accuracy_seen(single) == pytest.approx(0.5)
    assert math.isnan(average_validation_accuracy([[0.9], [0.5, 0.7]]))


def test_the_score_is_the_weighted_sum():
    assert cl_score({"a": 0.5, "b": 1.0}, {"a": 0.4, "b": 0.6}) == pytest.approx(0.8)
    assert sum(CHALLENGE_WEIGHTS.values()) == pytest.approx(0.8)  # as announced, not 1
    total = {name: w / 0.8 for name, w in CHALLENGE_WEIGHTS.items()}
    assert cl_score(dict.fromkeys(total, 1.0), total) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "weights", "text"),
    [
        ({"a": 1.0}, {"b": 1.0}, "one weight per criterion"),
        ({"a": 1.2}, {"a": 1.0}, r"\[0, 1\], 1 the best; got {'a': 1.2}"),
        ({"a": math.nan}, {"a": 1.0}, r"\[0, 1\]"),
        ({"a": 1.0}, {"a": 0.8}, r"sum to 1; got .* sum to 0\.8"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.5, "b": -0.5}, "not negative"),
        (dict.fromkeys(CHALLENGE_WEIGHTS, 1.0), CHALLENGE_WEIGHTS, r"sum to 0\.8"),
    ],
)
def test_wrong_scores(values, weights, text):
    with pytest.raises(ValueError, match=text):
        cl_score(values, weights)


def test_before_the_end_there_are_fewer_rows_than_tasks():
    matrix = [[0.8, 0.1, 0.0], [0.4, 0.6, 0.2]]
    assert average_validation_accuracy(matrix) == pytest.approx(2.1 / 6)
    assert average_validation_accuracy_seen(matrix) == pytest.approx((0.8 + 0.5) / 2)
    assert average_validation_accuracy(matrix[:1]) == pytest.approx(0.3)
    assert average_validation_accuracy_seen(matrix[:1]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"got \(3, 2\)"):
        average_validation_accuracy([[0.1, 0.2]] * 3)


def test_scores_as_json():
    numbers = {
        "final_test_accuracy": 0.83, "average_validation_accuracy": 0.79, "minutes": 19.88,
        "mean_ram_mb": 16503.0, "max_ram_mb": 16600.0, "mean_disk_mb": 0.0, "max_disk_mb": 0.0,
        "average_validation_accuracy_seen": 0.79,
    }  # fmt: skip
    scores = ChallengeScores(**numbers)
    assert json.loads(json.dumps(scores.to_json())) == numbers


class Constant(nn.Module):
    """Answers one class, whatever it sees."""

    def __init__(self, label: int, classes: int = 10) -> None:
        super().__init__()
        self.label, self.classes, self.weight = label, classes, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        answers = torch.full((len(x),), self.label)
        return nn.functional.one_hot(answers, self.classes).float() + self.weight


@pytest.mark.parametrize(("track", "shares"), [("ni", [0.1] * 8), ("nc", [0.1])])
def test_metrics_of_a_network_that_answers_one_class(track, shares, tmp_path):
    benchmark = toy_core50(track, objects=10, frames=20, size=8)
    metrics = ChallengeMetrics(disk=tmp_path)
    model = Constant(4)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
        train_epochs=2, evaluator=EvaluationPlugin(metrics, strict_checks=False),
    )  # fmt: skip
    (tmp_path / "memory").write_bytes(b"x" * 2**19)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.valid_stream)
        assert "ChallengeTestAccuracy" not in metrics.result()
        so_far = metrics.result()["ChallengeAverageValidationAccuracy"]
        assert so_far == pytest.approx(0.1)  # of all classes, from the first experience on
        with pytest.raises(ValueError, match="has no final_test_accuracy yet"):
            metrics.scores()
    before = metrics.result()["ChallengeMinutes"]
    named = strategy.eval(benchmark.test_stream)
    values = metrics.result()
    assert values["ChallengeMinutes"] == before > 0
    assert values["ChallengeAverageValidationAccuracy"] == pytest.approx(sum(shares) / len(shares))
    assert values["ChallengeTestAccuracy"] == pytest.approx(0.1)
    assert values["ChallengeMeanDisk"] == values["ChallengeMaxDisk"] == 0.5
    assert 50 < values["ChallengeMeanRAM"] <= values["ChallengeMaxRAM"] < 50_000
    assert named["ChallengeTestAccuracy/eval_phase/test_stream"] == pytest.approx(0.1)
    assert len(metrics._ram) == 2 * len(benchmark.train_stream)
    scores = metrics.scores()
    assert sorted(scores.to_json().values()) == sorted(values.values())
    assert scores.final_test_accuracy == values["ChallengeTestAccuracy"]
    assert scores.average_validation_accuracy == values["ChallengeAverageValidationAccuracy"]
    assert scores.minutes == values["ChallengeMinutes"]
    assert scores.max_ram_mb == values["ChallengeMaxRAM"]
    assert scores.mean_disk_mb == values["ChallengeMeanDisk"]


def test_of_a_stream_of_tasks_the_average_is_over_all_of_them():
    """A network that answers label 12 is right on a fifth of the second of three tasks."""
    benchmark = toy_core50("nc", objects=20, train_sessions=1, frames=20, size=8)
    metrics, model = ChallengeMetrics(), Constant(12, 20)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
        evaluator=EvaluationPlugin(metrics, strict_checks=False),
    )  # fmt: skip
    seen = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.valid_stream)
        strategy.eval(benchmark.test_stream[:1])  # no part of the validation
        values = metrics.result()
        assert values["ChallengeAverageValidationAccuracy"] == pytest.approx(0.2 / 3)
        assert values["ChallengeTestAccuracy"] == 0
        seen.append(values["ChallengeAverageValidationAccuracySeen"])
    assert seen == pytest.approx([0, (0 + 0.1) / 2, (0 + 0.1 + 0.2 / 3) / 3])


def test_without_a_validation_stream_the_test_stream_stands_in():
    from tests.conftest import class_stream

    benchmark = class_stream(3)
    metrics, model = ChallengeMetrics(), Constant(2, 6)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
        evaluator=EvaluationPlugin(metrics, strict_checks=False),
    )  # fmt: skip
    for experience in benchmark.train_stream:
        strategy.train(experience)
        before = metrics.result()["ChallengeMinutes"]
        strategy.eval(benchmark.test_stream)
        assert metrics.result()["ChallengeMinutes"] == before
    scores = metrics.scores()
    assert scores.average_validation_accuracy == pytest.approx(0.5 / 3)
    assert scores.final_test_accuracy == pytest.approx(0.5 / 3)
    assert scores.average_validation_accuracy_seen == pytest.approx((0 + 0.25 + 0.5 / 3) / 3)


def test_a_missing_evaluation_leaves_the_average_out():
    benchmark = toy_core50("ni", objects=10, train_sessions=2, frames=20, size=8)
    metrics, model = ChallengeMetrics(), Constant(0)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
        evaluator=EvaluationPlugin(metrics, strict_checks=False),
    )  # fmt: skip
    strategy.train(benchmark.train_stream[0])
    strategy.train(benchmark.train_stream[1])
    strategy.eval(benchmark.valid_stream)
    assert "ChallengeAverageValidationAccuracy" not in metrics.result()
    assert metrics.result()["ChallengeMaxDisk"] == 0


def test_evaluation_inside_training_does_not_stop_the_clock(monkeypatch):
    from avalanche_ext.evaluation.metrics import challenge

    now = iter(range(10_000))
    monkeypatch.setattr(challenge.time, "perf_counter", lambda: float(next(now)))
    benchmark = toy_core50("ni", objects=10, train_sessions=1, frames=2, size=8)
    minutes = {}
    for every in (-1, 1):
        metrics, model = ChallengeMetrics(), Constant(0)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
            train_epochs=3, eval_every=every,
            evaluator=EvaluationPlugin(metrics, strict_checks=False),
        )  # fmt: skip
        strategy.train(benchmark.train_stream[0], eval_streams=[benchmark.valid_stream])
        minutes[every] = 60 * metrics.result()["ChallengeMinutes"]
    # The clock here counts its readings: start, two per epoch, the end; and those of evaluations.
    assert minutes[-1] == 7
    assert minutes[1] > 7


def test_a_metric_that_another_process_restores_goes_on_from_its_seconds():
    import pickle

    benchmark = toy_core50("ni", objects=10, train_sessions=1, frames=2, size=8)
    metrics, model = ChallengeMetrics(), Constant(0)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), train_mb_size=500,
        evaluator=EvaluationPlugin(metrics, strict_checks=False),
    )  # fmt: skip
    strategy.train(benchmark.train_stream[0])
    metrics.before_training_exp(strategy)
    copy = pickle.loads(pickle.dumps(metrics))
    copy.before_training_epoch(strategy)  # nothing is known of the time since the other's start
    assert copy.result()["ChallengeMinutes"] == metrics.result()["ChallengeMinutes"] > 0


def test_an_absent_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        ChallengeMetrics(disk=tmp_path / "absent")
