"""Metrics that stay on the device: Avalanche's names and numbers, no reading in between."""

from __future__ import annotations

import pickle

import pytest
import torch
from avalanche.evaluation import metrics as avalanche_metrics
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext import MLP, BERPlugin
from avalanche_ext.evaluation.metrics import device
from avalanche_ext.evaluation.metrics.device import DeviceAccuracy, DeviceLoss
from tests.conftest import class_stream, naive

ACCURACY = {"epoch": True, "experience": True, "stream": True, "trained_experience": True}
LOSS = {"epoch": True, "experience": True, "stream": True}


def logged(module, *, task_labels):
    torch.manual_seed(0)
    evaluator = EvaluationPlugin(
        module.accuracy_metrics(**ACCURACY), module.loss_metrics(**LOSS), strict_checks=False
    )
    strategy = naive(MLP(8, (16,), 6), [BERPlugin(5)], epochs=2, evaluator=evaluator)
    benchmark = class_stream(task_labels=task_labels)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
    return evaluator.get_all_metrics()


@pytest.mark.parametrize("task_labels", [False, True])
def test_names_steps_and_numbers_are_avalanches(task_labels):
    ours = logged(device, task_labels=task_labels)
    theirs = logged(avalanche_metrics, task_labels=task_labels)
    assert sorted(ours) == sorted(theirs)
    assert any("Top1_Acc_Epoch" in name for name in ours)
    assert any("Loss_Exp" in name for name in ours)
    for name, (steps, values) in theirs.items():
        assert ours[name][0] == steps
        assert ours[name][1] == pytest.approx(values, rel=1e-12, abs=1e-15)


def test_accuracy_worked_by_hand():
    accuracy = DeviceAccuracy()
    assert accuracy.result() == 0
    accuracy.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))  # 1 of 2
    accuracy.update(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 1, 1]))  # 3 of 4
    assert accuracy.result() == 4 / 6
    accuracy.reset()
    assert accuracy.result() == 0


def test_loss_is_weighted_by_samples():
    loss = DeviceLoss()
    loss.update(torch.tensor([2.0]), 3)
    loss.update(torch.tensor(6.0, requires_grad=True), 1)
    assert loss.result() == (2 * 3 + 6) / 4


def test_an_update_never_reads_the_device():
    """On the meta device a tensor has no value: reading one raises."""
    accuracy, loss = DeviceAccuracy(), DeviceLoss()
    for _ in range(2):
        accuracy.update(torch.empty(4, 3, device="meta"), torch.empty(4, device="meta"))
        loss.update(torch.empty((), device="meta"), 4)
    for metric in (accuracy, loss):
        with pytest.raises((RuntimeError, NotImplementedError)):
            metric.result()


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="got 2 and 3"):
        DeviceAccuracy().update(torch.zeros(2, 3), torch.zeros(3))


def test_metrics_can_be_pickled_in_mid_epoch():
    accuracy = DeviceAccuracy()
    accuracy.update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert pickle.loads(pickle.dumps(accuracy)).result() == 0.5


def test_no_metric_of_the_lists_reads_a_value_per_step():
    """Training on tensors that cannot be read: only the reports would."""

    class Step:
        mb_output = torch.empty(4, 3, device="meta")
        mb_y = torch.empty(4, device="meta")
        loss = torch.empty((), device="meta")
        experience = type("Experience", (), {"current_experience": 0})

    for metric in [*device.accuracy_metrics(**ACCURACY), *device.loss_metrics(**LOSS)]:
        metric.update(Step)
        with pytest.raises((RuntimeError, NotImplementedError)):
            metric.result()
