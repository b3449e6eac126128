"""The metrics of the accuracy matrix in real runs: a loop's numbers, Avalanche's names."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.evaluation.metrics import bwt_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import JointTraining

from avalanche_ext import MLP, BERPlugin
from avalanche_ext.evaluation.accuracy_matrix import matrix_metrics
from avalanche_ext.evaluation.metrics import AccuracyMatrixMetrics
from avalanche_ext.evaluation.metrics.matrix import METRICS
from tests.conftest import blobs, class_stream, naive


def strategy_with(*metrics, plugins=(), **kwargs):
    evaluator = EvaluationPlugin(*metrics, strict_checks=False)
    return naive(MLP(8, (16,), 6), list(plugins), evaluator=evaluator, **kwargs)


@torch.no_grad()
def by_hand(strategy, stream):
    """Accuracies of the stream's experiences, by hand."""
    strategy.model.eval()
    found = []
    for experience in stream:
        rows = [experience.dataset[k] for k in range(len(experience.dataset))]
        x, y = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        found.append(float((strategy.model(x).argmax(1) == y).double().mean()))
    return found


def emitted(results):
    """Values of the last evaluation under the short names."""
    by_name = {v: k for k, v in METRICS.items()}
    return {
        by_name[name.split("/")[0]]: value
        for name, value in results.items()
        if name.split("/")[0] in by_name
    }


@pytest.mark.parametrize("task_labels", [False, True])
def test_every_evaluation_emits_what_a_loop_computes(task_labels):
    alone, joint = [0.9, 0.8, 0.7], [1.0, 0.95, 0.9]
    metric = AccuracyMatrixMetrics(alone=alone, joint=joint)
    strategy = strategy_with(metric, bwt_metrics(stream=True), plugins=[BERPlugin(6)])
    benchmark = class_stream(task_labels=task_labels)
    strategy.eval(benchmark.test_stream)
    initial = by_hand(strategy, benchmark.test_stream)
    matrix = []
    for n, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience, eval_streams=[])
        results = strategy.eval(benchmark.test_stream)
        matrix.append(by_hand(strategy, benchmark.test_stream))
        expected = matrix_metrics(
            [row[:n] for row in matrix], samples=[40] * n, initial=initial[:n], alone=alone[:n],
            joint=joint[:n],
        )  # fmt: skip
        assert metric.result() == pytest.approx(expected)
        assert emitted(results) == pytest.approx(expected)
        if n > 1:  # Avalanche knows one of them, under another name
            theirs = results["StreamBWT/eval_phase/test_stream"]
            assert results["StreamBWT_GEM/eval_phase/test_stream"] == pytest.approx(theirs)
    assert len(expected) == len(METRICS)
    assert metric.matrix() == [pytest.approx(row) for row in matrix]


def test_names_carry_phase_and_stream_and_no_task():
    strategy = strategy_with(AccuracyMatrixMetrics())
    benchmark = class_stream(task_labels=True)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        results = strategy.eval(benchmark.test_stream)
    assert sorted(results) == sorted(
        f"{name}/eval_phase/test_stream"
        for key, name in METRICS.items()
        if key not in {"forward_transfer_gem", "forward_transfer_expandable_der", "intransigence"}
    )


def test_what_is_undefined_is_not_emitted():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    benchmark = class_stream()
    assert strategy.eval(benchmark.test_stream) == {}  # nothing was trained yet
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    found = emitted(strategy.eval(benchmark.test_stream))
    assert sorted(found) == [
        "average_accuracy", "average_incremental_accuracy",
        "average_incremental_accuracy_samples", "forgetting",
    ]  # fmt: skip
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    assert emitted(strategy.eval(benchmark.test_stream[1:2])) == found  # the old values stand
    assert metric.result() == {}  # experience 1 was not tested
    strategy.train(benchmark.train_stream[2], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert list(metric.result()) == ["average_accuracy"]  # the second row is missing
    assert [math.isnan(x) for x in metric.matrix()[1]] == [True] * 3


def test_an_evaluation_inside_an_experience_is_replaced_by_the_one_behind_it():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric, epochs=2, eval_every=1)
    benchmark = class_stream()
    matrix = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        matrix.append(by_hand(strategy, benchmark.test_stream))
    assert metric.matrix() == [pytest.approx(row) for row in matrix]


def test_columns_follow_the_order_of_training():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    benchmark = class_stream()
    matrix = []
    for k in (2, 0):
        strategy.train(benchmark.train_stream[k], eval_streams=[])
        strategy.eval(benchmark.test_stream)
        accuracies = by_hand(strategy, benchmark.test_stream)
        matrix.append([accuracies[2], accuracies[0]])
    assert metric.matrix() == [pytest.approx(row) for row in matrix]
    assert metric.result()["backward_transfer_gem"] == pytest.approx(matrix[1][0] - matrix[0][0])


def test_two_streams_do_not_mix():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    benchmark = class_stream()
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
        results = strategy.eval(benchmark.train_stream)
    assert metric.matrix("test")[-1] == pytest.approx(by_hand(strategy, benchmark.test_stream))
    assert metric.matrix("train")[-1] == pytest.approx(by_hand(strategy, benchmark.train_stream))
    assert "StreamBWT_GEM/eval_phase/train_stream" in results


def test_one_test_experience_gives_a_column_and_accuracies_only():
    from avalanche.benchmarks import ni_benchmark

    benchmark = ni_benchmark(blobs(), blobs(seed=1), n_experiences=4)
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    strategy.eval(benchmark.test_stream)
    column = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
        column.append(by_hand(strategy, benchmark.test_stream))
    assert metric.matrix() == [pytest.approx(row) for row in column]
    mean = sum(row[0] for row in column) / 4
    assert metric.result() == pytest.approx(
        {
            "average_accuracy": column[-1][0],
            "average_incremental_accuracy": mean,
            "average_incremental_accuracy_samples": mean,
        }
    )


def test_a_slice_of_one_experience_is_not_a_stream_of_one():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    benchmark = class_stream()
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream[:1])
    assert metric.result() == {}
    strategy.eval(benchmark.test_stream[:2])
    assert metric.result()["average_accuracy"] == pytest.approx(
        sum(by_hand(strategy, benchmark.test_stream[:2])) / 2
    )


def test_pieces_of_an_online_stream_count_as_their_experience():
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    benchmark = class_stream()
    matrix = []
    for experience in benchmark.train_stream:
        pieces = split_online_stream([experience], experience_size=10)
        for piece in pieces:
            strategy.train(piece, eval_streams=[])
        strategy.eval(benchmark.test_stream)
        matrix.append(by_hand(strategy, benchmark.test_stream))
    assert metric.matrix() == [pytest.approx(row) for row in matrix]
    assert metric.result() == pytest.approx({**matrix_metrics(matrix, samples=[40] * 3)})


def test_streams_that_do_not_correspond_emit_nothing():
    train, test = class_stream(3).train_stream, class_stream(2).test_stream
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    strategy.train(train[0], eval_streams=[])
    strategy.eval(test)
    assert metric.result() == {}


def test_joint_training_saw_every_experience():
    benchmark = class_stream()
    model = MLP(8, (16,), 6)
    metric = AccuracyMatrixMetrics()
    strategy = JointTraining(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        criterion=torch.nn.CrossEntropyLoss(), train_mb_size=8, eval_mb_size=64,
        evaluator=EvaluationPlugin(metric, strict_checks=False),
    )  # fmt: skip
    strategy.train(benchmark.train_stream)
    strategy.eval(benchmark.test_stream)
    mean = sum(by_hand(strategy, benchmark.test_stream)) / 3
    assert metric.result() == {"average_accuracy": pytest.approx(mean)}


def test_names_choose_and_mistakes_are_named():
    metric = AccuracyMatrixMetrics(["backward_transfer_gem"])
    strategy = strategy_with(metric)
    benchmark = class_stream()
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
    assert list(metric.result()) == ["backward_transfer_gem"]
    with pytest.raises(ValueError, match="Close: forgetting"):
        AccuracyMatrixMetrics(["forgeting"])
    strategy = strategy_with(AccuracyMatrixMetrics(joint=[]))
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    with pytest.raises(ValueError, match=r"joint expects .* got 0 for 1"):
        strategy.eval(benchmark.test_stream)


def test_a_pickled_metric_goes_on():
    benchmark = class_stream()
    metric = AccuracyMatrixMetrics()
    strategy = strategy_with(metric)
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    copy = pickle.loads(pickle.dumps(metric))
    strategy.evaluator.metrics.append(copy)
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert copy.result() == metric.result() != {}
