"""The linear probe against scikit-learn and by hand, and one row of a representation's matrix."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as make_taskaware,
)
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.models import IncrementalClassifier, as_multitask
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_ext.evaluation import representation
from avalanche_ext.evaluation.representation import (
    features_of,
    linear_probe,
    representation_accuracies,
)
from avalanche_ext.models.expandable_net import ExpandableNet
from avalanche_ext.models.mlp import MLP
from tests.conftest import class_stream, naive


@pytest.fixture(scope="module")
def digits():
    images = load_digits()
    return torch.from_numpy(images.data).float(), torch.from_numpy(images.target)


def data(x, y, transforms=None):
    dataset = TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
    dataset.targets = torch.as_tensor(y).tolist()
    return as_classification_dataset(dataset, transform_groups=transforms)


# the probe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_the_probe_has_the_minimum_of_scikit_learn(digits, l2):
    (x, x_test), (y, y_test) = (part.split([1400, 397]) for part in digits)
    probe = linear_probe(x, y, l2=l2)
    theirs = LogisticRegression(C=1 / (l2 * 1400), tol=1e-9, max_iter=3000)
    z, z_test = ((rows.double() - probe.mean) / probe.scale for rows in (x, x_test))
    theirs.fit(z.numpy(), y.numpy())

    def loss(weight, bias):
        total = 0.0
        for row, label in zip(z @ weight + bias, y, strict=True):
            total += float(row.logsumexp(0) - row[label])
        return total / 1400 + l2 / 2 * float((weight**2).sum())

    coefficients = torch.from_numpy(theirs.coef_).T
    want = loss(coefficients, torch.from_numpy(theirs.intercept_))
    assert loss(probe.weight, probe.bias) == pytest.approx(want, abs=1e-9)
    assert torch.allclose(probe.weight, coefficients, atol=2e-4)
    found = probe.predict(x_test)
    assert found.tolist() == theirs.predict(z_test.numpy()).tolist()
    assert float((found == y_test).double().mean()) == theirs.score(z_test, y_test) > 0.87


def test_two_points_by_hand():
    # W = (-a, a): the slope (1 - sigmoid(2 a)) - l2 a is 0 at a = 1/2 for this l2.
    l2 = 2 * (1 - 1 / (1 + math.exp(-1)))
    probe = linear_probe(torch.tensor([[10.0], [14.0]]), torch.tensor([3, 7]), l2=l2)
    assert probe.weight.tolist()[0] == pytest.approx([-0.5, 0.5], abs=1e-6)
    assert probe.bias.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert (probe.mean.item(), probe.scale.item()) == (12, 2)
    assert probe.classes.tolist() == [3, 7]
    logits = probe.logits(torch.tensor([[16.0]]))  # two deviations above the mean
    assert logits.tolist()[0] == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_scale_and_place_of_the_features_do_not_matter(digits):
    x, y = digits[0][:300], digits[1][:300]
    probe = linear_probe(x, y)
    moved = linear_probe(1e3 * x - 50, y)
    assert torch.allclose(moved.weight, probe.weight, atol=2e-4)
    assert torch.equal(moved.predict(1e3 * x - 50), probe.predict(x))


def test_features_that_do_not_vary_are_left_out():
    x = torch.randn(40, 3)
    y = (x[:, 0] > 0).long()
    dead = torch.cat([x, torch.full((40, 1), 0.1), torch.zeros(40, 1)], dim=1)
    dead[0, 3] += 8e-9  # within float32's rounding
    probe = linear_probe(dead, y)
    assert probe.scale[3:].tolist() == [1, 1]
    assert probe.weight[3:].abs().max() < 1e-8
    assert torch.allclose(probe.weight[:3], linear_probe(x, y).weight, atol=1e-5)


def test_the_same_features_give_the_same_probe_and_no_random_number_is_drawn(digits):
    x, y = digits[0][:200], digits[1][:200]
    before = torch.get_rng_state()
    with torch.no_grad():  # as plugins may call it
        first, second = linear_probe(x, y), linear_probe(x, y)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    assert not first.weight.requires_grad
    assert torch.equal(first.bias, second.bias)


def test_a_choice_of_classes():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    probe = linear_probe(x, torch.tensor([2, 5, 9, 11]), l2=1e-4)
    assert probe.predict(x).tolist() == [2, 5, 9, 11]
    assert probe.predict(x, [11, 2]).tolist() == [2, 2, 11, 11]
    assert probe.predict(x, {5}).tolist() == [5] * 4
    assert probe.predict(x[:0], [2, 5]).tolist() == []
    for classes in ([], [2, 3]):
        with pytest.raises(ValueError, match=r"classes among \[2, 5, 9, 11\].*got \["):
            probe.predict(x, classes)


def test_one_class():
    probe = linear_probe(torch.randn(5, 3), torch.full((5,), 4))
    assert not probe.weight.any()
    assert probe.predict(torch.randn(3, 3)).tolist() == [4, 4, 4]


def test_one_sample_of_each_class():
    probe = linear_probe(torch.eye(3), torch.arange(3))
    assert probe.predict(torch.eye(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("x", "y", "l2", "message"),
    [
        (torch.ones(3, 2, 1), torch.ones(3), 1.0, r"got \(3, 2, 1\) and \(3,\)"),
        (torch.ones(3, 2), torch.ones(2), 1.0, r"got \(3, 2\) and \(2,\)"),
        (torch.ones(0, 2), torch.ones(0), 1.0, r"N and D at least 1; got \(0, 2\)"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2), 1.0, "finite features"),
        (torch.ones(3, 2), torch.ones(3), 0.0, "l2 > 0; got 0"),
        (torch.ones(3, 2), torch.ones(3), -1.0, "finite l2 >= 0"),
    ],
)
def test_bad_arguments_of_the_probe(x, y, l2, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(x, y, l2=l2)


def test_a_probe_that_is_not_at_its_minimum_says_so(digits, monkeypatch):
    monkeypatch.setattr(representation, "_MOST_STEPS", 3)
    with pytest.warns(UserWarning, match=r"stopped before its minimum.*Raise l2 \(it is 0.001\)"):
        linear_probe(digits[0][:200], digits[1][:200])


# features -----------------------------------------------------------------------------------


class Growing(nn.Module):
    """A linear layer that is made after the head, and a head that grows."""

    def __init__(self):
        super().__init__()
        self.head = IncrementalClassifier(5, 3)
        self.body = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).relu())


def test_features_are_the_input_of_the_layer_that_is_called_last():
    x = torch.randn(4, 8)
    mlp, growing = MLP(8, (16, 12), 6), Growing()
    assert torch.equal(features_of(mlp, x), mlp.features(x))
    assert torch.equal(features_of(growing, x), growing.body(x).relu())
    compiled = torch.compile(mlp, backend="eager")
    compiled(x)  # from now on it would not call a new hook
    assert torch.equal(features_of(compiled, x), mlp.features(x))
    assert torch.equal(features_of(nn.Linear(8, 3), x), x)
    assert not any(m._forward_pre_hooks for m in [*mlp.modules(), *growing.modules()])


def test_features_of_a_super_feature():
    net = ExpandableNet(MLP(8, (5,), 0))
    net.grow([0, 1])
    net.grow([2])
    x = torch.randn(4, 8)
    assert features_of(net, x).shape == (4, 10)
    assert torch.equal(features_of(net, x), net.super_feature(x))


def test_features_behind_a_head_for_each_task():
    stream = class_stream(2, task_labels=True)
    model = as_multitask(MLP(8, (16,), 6), "classifier")
    strategy = naive(model)
    for e in stream.train_stream:
        strategy.train(e)
    x, _, t = (torch.as_tensor(column) for column in stream.test_stream[1].dataset[0])
    want = model.model.features(x[None])
    assert torch.equal(features_of(model, x[None], t[None]), want)
    seen = [e.dataset for e in stream.train_stream]
    accuracies = representation_accuracies(model, seen, seen)
    assert min(accuracies) > 0.9


def test_features_that_cannot_be_found():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x):
            return self.head(x.reshape(-1, 2)).reshape(len(x), -1)

    class Unused(Positions):
        def forward(self, x):
            return x

    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"Conv2d are not known: it has no linear layer"):
        features_of(nn.Conv2d(1, 1, 1), x)
    with pytest.raises(ValueError, match=r"batch of 4 samples .* given \(16, 2\)\. Give it a meth"):
        features_of(Positions(), x)
    with pytest.raises(ValueError, match="given nothing"):
        features_of(model := Unused(), x)
    assert not model.head._forward_pre_hooks


# a row of the matrix ------------------------------------------------------------------------


def line():
    """Classes 0, 2, 1, 3 along a line: experience 0 has the ends of one half, 1 of the other."""
    train = [
        data([[0.0], [0.1], [2.0], [2.1]], [0, 0, 1, 1]),
        data([[1.0], [1.1], [3.0], [3.1]], [2, 2, 3, 3]),
    ]
    test = [
        # 0.9 and 1.3 are nearest to class 2; among 0 and 1 only the answer for 0.6 is wrong.
        data([[0.0], [0.6], [0.9], [1.3], [2.1]], [0, 1, 0, 1, 1]),
        data([[1.0], [1.1], [1.2], [2.9], [3.0]], [2, 3, 3, 3, 3]),
    ]
    return train, test


def test_a_row_by_hand():
    train, test = line()
    model = nn.Linear(1, 4)  # its features are its inputs
    assert representation_accuracies(model, train[:1], test[:1], l2=1e-6) == [0.8]
    assert representation_accuracies(model, train, test, l2=1e-6) == [0.8, 0.6]
    # Among all four classes 0.9 and 1.3 would be taken for class 2.
    x = torch.cat([torch.stack([s[0] for s in e]) for e in train])
    probe = linear_probe(x, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), l2=1e-6)
    assert probe.predict(torch.tensor([[0.9], [1.3]])).tolist() == [2, 2]


def test_the_same_label_of_two_tasks_is_two_classes():
    parts = [([[0.0], [2.0]], [0, 1], [0, 0]), ([[10.0], [12.0]], [1, 0], [1, 1])]
    told, untold = [], [data(x, y) for x, y, _ in parts]
    for x, y, t in parts:
        dataset = TensorDataset(torch.tensor(x), torch.tensor(y))
        dataset.targets = y
        told.append(make_taskaware(dataset, task_labels=t))
    model = nn.Linear(1, 2)
    assert representation_accuracies(model, told, told, l2=1e-6) == [1.0, 1.0]
    # One class of both ends and one of the middle cannot be told apart along a line.
    assert sum(representation_accuracies(model, untold, untold, l2=1e-6)) < 2


def test_batches_do_not_matter():
    x, y = torch.randn(90, 8).double(), torch.arange(90) % 3
    x[:, 0] += y
    train, test = [data(x[:60], y[:60])], [data(x[60:], y[60:])]
    model = MLP(8, (16,), 3).double()
    rows = [representation_accuracies(model, train, test, batch_size=b) for b in (7, 512)]
    assert rows[0] == rows[1]
    assert 0.4 < rows[0][0] < 1


def test_what_is_seen_is_the_evaluation_transform_of_a_network_in_evaluation_mode():
    train, test = line()
    transforms = TransformGroups({"train": (lambda x: 0 * x, None), "eval": (lambda x: -x, None)})
    turned = [data([s[0].tolist() for s in e], [s[1] for s in e], transforms) for e in train]
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(1, 4)).train()
    back = [data([(-s[0]).tolist() for s in e], [s[1] for s in e])
            for e in test]  # fmt: skip
    assert representation_accuracies(model, turned, back, l2=1e-6) == [0.8, 0.6]


def test_it_leaves_everything_as_it_was():
    def draw(x):
        return x + 0 * (torch.rand(()) + np.random.rand() + random.random())  # noqa: NPY002

    groups = TransformGroups({"train": (None, None), "eval": (draw, None)})
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    seen = [data(x, y, groups)]
    norms = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    model = nn.Sequential(nn.Linear(4, 5), *norms, nn.Dropout(), nn.Linear(5, 3)).train()
    model[1].eval()  # a frozen part
    model[0].weight.grad = torch.ones(5, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with_gradient = []
    model.register_forward_pre_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    representation_accuracies(model, seen, seen)
    assert with_gradient == [False, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(5, 4))
    assert model[4].weight.grad is None
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_modes_come_back_after_an_error():
    model = nn.Conv2d(1, 1, 1).train()
    with pytest.raises(ValueError, match="no linear layer"):
        representation_accuracies(model, *line())
    assert model.training


def test_a_class_without_a_test_sample_and_an_experience_of_one_class():
    model = nn.Linear(1, 4)
    train = [data([[0.0]], [0]), data([[1.0], [2.0]], [1, 2])]
    test = [data([[0.9]], [0]), data([[1.1], [1.2]], [1, 1])]
    assert representation_accuracies(model, train[:1], test[:1]) == [1.0]
    assert representation_accuracies(model, train, test) == [1.0, 1.0]
    strange = [data([[0.9]], [3])]  # a label that the experience does not have
    assert representation_accuracies(model, train[:1], strange) == [0.0]


def test_bad_arguments_of_a_row():
    model, (train, test) = nn.Linear(1, 4), line()
    with pytest.raises(ValueError, match=r"one test set for each.*got 2 and 1"):
        representation_accuracies(model, train, test[:1])
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        representation_accuracies(model, [], [])
    empty = test[0].subset([])
    with pytest.raises(ValueError, match="one of them is empty"):
        representation_accuracies(model, train, [empty, test[1]])
    with pytest.raises(ValueError, match="batch_size >= 1"):
        representation_accuracies(model, train, test, batch_size=0)
