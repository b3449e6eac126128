"""Similarities against hand-worked numbers and a loop; the measurement leaves no trace."""

from __future__ import annotations

import copy
import math
import pickle
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark, tensors_benchmark
from avalanche.evaluation import PluginMetric
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from avalanche_ext import MLP, GradientDiversity
from avalanche_ext.evaluation.metrics import similarity_report
from tests.conftest import blobs, class_stream, naive

PAIRS = ("different", "same")


def convolutional() -> nn.Module:
    """A network with batch statistics and dropout, its statistics away from their start."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(48, 4),
    )  # fmt: skip
    model(torch.randn(16, 1, 6, 6) + 1)
    return model


def images(n: int = 10):
    return torch.randn(n, 1, 6, 6), torch.arange(n) % 4


def add_hundred(x: torch.Tensor) -> torch.Tensor:
    return x + 100


class Words(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return "word", index


def by_loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient similarities from one backward pass per sample, pair by pair."""
    model = copy.deepcopy(model).eval()
    rows = []
    for k in range(len(y)):
        model.zero_grad()
        F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    out = torch.empty(len(y), len(y))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            out[i, j] = (a @ b) / (a.norm() * b.norm())
    return out


def with_metric(metric: GradientDiversity, benchmark, model: nn.Module, **kwargs):
    evaluator = EvaluationPlugin(metric, loggers=[])
    strategy = naive(model, evaluator=evaluator, **kwargs)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return evaluator


# the report ---------------------------------------------------------------------------------


def test_a_linear_model_gives_the_numbers_worked_by_hand():
    """With two classes p - onehot(y) is +-(q, -q), so a gradient's cosine is +-cos(x_i, x_j)."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(2 * torch.eye(2))  # logits 2 x: representations as alike as inputs
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [4.0, 3.0]])
    y = torch.tensor([0, 0, 1, 1])

    report = similarity_report(model, x, y, "logits")

    cosines = torch.tensor([0.0, 0.8, 0.8, 0.96])  # pairs 13, 14, 23, 24
    torch.testing.assert_close(report.input.different, cosines)
    torch.testing.assert_close(report.representation.different, cosines)
    torch.testing.assert_close(report.gradient.different, -cosines)
    torch.testing.assert_close(report.gradient.same, torch.tensor([0.6, 0.6]))  # pairs 12, 34
    assert not report.separable
    values = report.values()
    assert values["Similarity_input_different"] == pytest.approx(0.64)
    assert values["Similarity_gradient_different"] == pytest.approx(-0.64)
    assert values["Similarity_gradient_same"] == pytest.approx(0.6)
    sd = math.sqrt((0.64**2 + 2 * 0.16**2 + 0.32**2) / 3)
    assert values["Similarity_sd_gradient_different"] == pytest.approx(sd)
    assert values["Similarity_r_representation_different"] == pytest.approx(-1)
    assert values["Similarity_r_input_different"] == pytest.approx(-1)


def test_correlations_are_of_the_gradient_with_each_of_the_others():
    model = MLP(8, (6,), 3)
    x, y = torch.randn(12, 8), torch.arange(12) % 3
    report = similarity_report(model, x, y)
    values = report.values()
    for kind in PAIRS:
        gradient = getattr(report.gradient, kind).numpy()
        for what in ("input", "representation"):
            other = getattr(getattr(report, what), kind).numpy()
            expected = np.corrcoef(gradient, other)[0, 1]
            assert values[f"Similarity_r_{what}_{kind}"] == pytest.approx(expected, abs=1e-5)
    assert len(values) == 16
    assert all(isinstance(v, float) for v in values.values())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_agree_with_a_loop_over_samples(chunk_size):
    model, (x, y) = convolutional(), images()
    report = similarity_report(model, x, y, chunk_size=chunk_size)
    expected = by_loop(model, x, y)
    i, j = torch.triu_indices(len(y), len(y), 1)
    same = y[i] == y[j]
    torch.testing.assert_close(report.gradient.same, expected[i, j][same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        report.gradient.different, expected[i, j][~same], atol=1e-5, rtol=1e-4
    )


def test_frozen_parameters_are_no_part_of_the_gradient():
    model, (x, y) = convolutional(), images()
    model[0].requires_grad_(False)
    report = similarity_report(model, x, y)
    expected = by_loop(model, x, y)
    i, j = torch.triu_indices(len(y), len(y), 1)
    torch.testing.assert_close(
        report.gradient.same, expected[i, j][y[i] == y[j]], atol=1e-5, rtol=1e-4
    )


def test_the_representation_is_every_hidden_layer_and_the_logits_concatenated():
    model = MLP(8, (6, 5), 3)
    x, y = torch.randn(7, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    h1 = torch.relu(model.features[0](x))
    h2 = torch.relu(model.features[2](h1))
    rows = torch.cat([h1, h2, model.classifier(h2)], 1).detach()
    i, j = torch.triu_indices(7, 7, 1)
    expected = F.cosine_similarity(rows[i], rows[j])
    report = similarity_report(model, x, y)
    torch.testing.assert_close(report.representation.same, expected[y[i] == y[j]])
    torch.testing.assert_close(report.representation.different, expected[y[i] != y[j]])
    inputs = F.cosine_similarity(x[i], x[j])
    torch.testing.assert_close(report.input.same, inputs[y[i] == y[j]])
    torch.testing.assert_close(report.input.different, inputs[y[i] != y[j]])


def test_constants_of_masked_units_do_not_count_as_representation():
    head = IncrementalClassifier(4, 3)
    with torch.no_grad():
        head.active_units[:] = torch.tensor([1, 1, 0])
        head.classifier.bias.zero_()
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    logits = (x @ head.classifier.weight.T)[:, :2].detach()
    i, j = torch.triu_indices(6, 6, 1)
    expected = F.cosine_similarity(logits[i], logits[j])[y[i] == y[j]]
    report = similarity_report(nn.Sequential(head), x, y, "logits")
    torch.testing.assert_close(report.representation.same, expected)


def test_separable_means_that_every_pair_of_one_class_is_more_alike():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
    assert similarity_report(model, x, torch.tensor([0, 0, 1, 1]), "logits").separable
    assert not similarity_report(model, x, torch.tensor([0, 1, 0, 1]), "logits").separable
    # same .995 and .740 (mean .867), different at most .860: more alike on average is not enough
    x[3] = torch.tensor([1.0, 0.9])
    assert not similarity_report(model, x, torch.tensor([0, 0, 1, 1]), "logits").separable


def test_what_is_not_defined_is_left_out():
    model, x = MLP(8, (6,), 3), torch.randn(3, 8)
    one_class = similarity_report(model, x, torch.zeros(3, dtype=torch.long)).values()
    assert "Similarity_gradient_same" in one_class
    assert not any("different" in name for name in one_class)
    one_pair = similarity_report(model, x[:2], torch.tensor([0, 1])).values()
    assert set(one_pair) == {
        f"Similarity_{what}_different" for what in ("input", "representation", "gradient")
    }
    constant = similarity_report(model, torch.ones(4, 8), torch.tensor([0, 0, 1, 1])).values()
    assert constant["Similarity_input_same"] == pytest.approx(1)
    assert not any("_r_" in name for name in constant)


# nothing is changed -------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer, in place or anew, and draws random numbers."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.linear(x)


def test_the_measurement_leaves_no_trace_on_the_model_or_the_random_state():
    model, (x, y) = convolutional(), images()
    model.train()
    model[1].eval()  # a module with a mode of its own keeps it
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    identities = [id(p.grad) for p in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    similarity_report(model, x, y)

    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [id(p.grad) for p in model.parameters()] == identities
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_that_the_forward_pass_changes_are_put_back(in_place):
    model = Counting(in_place).train()
    buffer = model.calls
    states = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    # torch.func differentiates no model that changes a buffer in place
    with pytest.raises(ValueError, match="in-place") if in_place else nullcontext():
        similarity_report(model, torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), "logits")
    assert model.calls is buffer
    assert float(model.calls) == 0
    assert (np.random.get_state()[1] == states[0]).all()  # noqa: NPY002
    assert random.getstate() == states[1]


def test_the_model_is_restored_after_an_error_too():
    model = MLP(8, (6,), 3).train()
    with pytest.raises(ValueError, match="no module of MLP"):
        similarity_report(model, torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), "claßifier")
    assert all(m.training for m in model.modules())


def test_a_run_with_the_metric_ends_with_the_same_weights_bit_for_bit():
    ends = []
    for metrics in ([], [GradientDiversity(20)]):
        torch.manual_seed(3)
        model = SimpleMLP(num_classes=6, input_size=8, hidden_size=10, drop_rate=0.5)
        evaluator = EvaluationPlugin(*metrics, loggers=[])
        strategy = naive(model, evaluator=evaluator, epochs=2)
        for experience in class_stream().train_stream:
            strategy.train(experience)
        ends.append((model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert torch.equal(ends[0][1], ends[1][1])


# the metric ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task_labels", [False, True])
def test_values_arrive_in_the_evaluator_once_per_experience(task_labels):
    metric = GradientDiversity(30)
    evaluator = with_metric(metric, class_stream(task_labels=task_labels), MLP(8, (10,), 6))
    names = {
        f"Similarity_{what}{kind}/train_phase/train_stream"
        for kind in PAIRS
        for what in (
            "input_", "representation_", "gradient_", "sd_input_", "sd_representation_",
            "sd_gradient_", "r_input_", "r_representation_",
        )
    }  # fmt: skip
    assert set(evaluator.get_last_metrics()) == names
    for name in names:
        steps, values = evaluator.get_all_metrics()[name]
        assert steps == [5, 10, 15]  # 40 samples each in batches of 8
        assert all(type(v) is float and -1 - 1e-6 <= v <= 1 + 1e-6 for v in values)
    last = {name.split("/")[0]: v for name, v in evaluator.get_last_metrics().items()}
    assert metric.result() == last
    assert isinstance(metric, PluginMetric)
    assert str(metric) == "Similarity"


def test_the_values_are_those_of_the_report_on_the_given_probe():
    data = blobs(seed=5)
    x, y = data.tensors
    evaluators, results = [], []
    for probe in (data, (x, y), class_stream(seed=5).train_stream[0].dataset):
        torch.manual_seed(0)
        model = MLP(8, (10,), 6)
        metric = GradientDiversity(200, probe=probe, layers="logits")
        evaluators.append(with_metric(metric, class_stream(), model))
        results.append(metric.result())
    assert results[0] == results[1]
    expected = similarity_report(model, x, y, "logits").values()
    assert results[0] == pytest.approx(expected, abs=1e-5)
    assert results[2] != results[0]


def test_a_large_probe_is_thinned_by_seed():
    data = blobs()
    probes = [GradientDiversity(10, probe=data, seed=s) for s in (0, 0, 1)]
    assert all(len(p._y) == 10 for p in probes)
    assert torch.equal(probes[0]._x, probes[1]._x)
    assert not torch.equal(probes[0]._x, probes[2]._x)
    for x, y in zip(probes[0]._x, probes[0]._y, strict=True):
        assert int(data.tensors[1][(data.tensors[0] == x).all(1)][0]) == int(y)


def test_the_probe_is_a_sample_of_all_experiences_seen_so_far():
    metric = GradientDiversity(60)
    strategy = naive(MLP(8, (10,), 6), evaluator=EvaluationPlugin(metric, loggers=[]))
    seen = []
    for k, experience in enumerate(class_stream().train_stream):
        strategy.train(experience)
        assert len(metric._y) == min(60, 40 * (k + 1))
        assert metric._y.max() < 2 * (k + 1)
        seen.append(set(metric._y.tolist()))
    assert seen[-1] == set(range(6))
    kept = metric._x.clone()
    strategy.train(experience)  # again: its samples are not drawn twice
    assert torch.equal(metric._x, kept)
    assert len(torch.unique(metric._x, dim=0)) == 60


def test_the_probe_is_seen_without_the_training_augmentation():
    train = blobs()
    benchmark = nc_benchmark(
        train, blobs(seed=1), 3, task_labels=False, shuffle=False, train_transform=add_hundred
    )  # fmt: skip
    metric = GradientDiversity(30)
    with_metric(metric, benchmark, MLP(8, (10,), 6), lr=1e-6)
    assert metric._x.abs().max() < 50


def test_the_probe_is_uniform_over_samples_not_over_experiences():
    sizes = (300, 100)
    parts = [(torch.full((n, 8), float(k)), torch.arange(n) % 2) for k, n in enumerate(sizes)]
    counts = []
    for seed in range(20):
        metric = GradientDiversity(40, seed=seed)
        benchmark = tensors_benchmark(
            train_tensors=parts, test_tensors=parts, task_labels=[0, 0]
        )  # fmt: skip
        for experience in benchmark.train_stream:
            metric._add(experience.dataset.eval(), seed + 1000 * experience.current_experience)
        counts.append(int((metric._x[:, 0] == 1).sum()))
    assert 7 < np.mean(counts) < 13  # 40 x 100 / 400 = 10, standard error 0.6


def test_reset_forgets_the_stream_and_keeps_a_given_probe():
    metric = GradientDiversity(10)
    with_metric(metric, class_stream(), MLP(8, (10,), 6))
    metric.reset()
    assert metric.result() is None
    assert len(metric._y) == 0
    given = GradientDiversity(10, probe=blobs())
    given.reset()
    assert len(given._y) == 10


def test_the_metric_can_be_pickled_between_experiences():
    metric = GradientDiversity(20)
    model = MLP(8, (10,), 6)
    with_metric(metric, class_stream(), model)
    again = pickle.loads(pickle.dumps(metric))
    assert again.result() == metric.result()
    assert torch.equal(again._x, metric._x)


def test_an_experience_of_one_class_gives_what_is_defined():
    x = torch.randn(12, 8)
    parts = [(x, torch.zeros(12, dtype=torch.long)), (x + 1, torch.ones(12, dtype=torch.long))]
    benchmark = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])
    evaluator = with_metric(GradientDiversity(24), benchmark, MLP(8, (10,), 2))
    curves = evaluator.get_all_metrics()
    assert len(curves["Similarity_gradient_same/train_phase/train_stream"][0]) == 2
    assert len(curves["Similarity_gradient_different/train_phase/train_stream"][0]) == 1


# bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_samples": 1}, ValueError, "n_samples >= 2"),
        ({"n_samples": 2.5}, TypeError, "integer n_samples"),
        ({"n_samples": True}, TypeError, "integer n_samples"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size >= 1"),
        ({"loss": "ce"}, TypeError, "function"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"probe": 3}, TypeError, "two tensors"),
        ({"probe": Words()}, TypeError, "samples that are tensors; got str"),
        ({"probe": torch.zeros(3, 2)}, TypeError, "two tensors"),
        ({"probe": (torch.zeros(3, 2), torch.zeros(2))}, ValueError, r"\(3, 2\) and \(2,\)"),
        ({"probe": (torch.zeros(1, 2), torch.zeros(1))}, ValueError, "at least 2 samples"),
        ({"probe": [("x", 0), ("y", 1), ("z", 2)]}, TypeError, "two tensors"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_an_error_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        GradientDiversity(**kwargs)


def test_arguments_after_the_first_are_keywords():
    with pytest.raises(TypeError):
        GradientDiversity(10, None)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.sum().item() > 0 else 1)


class NoisyAlways(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class Dictionary(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


def frozen() -> nn.Module:
    return MLP(8, (6,), 6).requires_grad_(False)


def batch_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 6)
    )


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Branching(8, 6), ValueError, "per-sample gradients of Branching could not be"),
        (lambda: NoisyAlways(8, 6), ValueError, "per-sample gradients of NoisyAlways could not"),
        (lambda: Dictionary(8, 6), TypeError, "returned dict"),
        (frozen, ValueError, "no trainable parameter"),
        (batch_statistics, ValueError, "statistics of the batch"),
        (lambda: nn.Linear(8, 2), ValueError, "labels 0 to 5"),
    ],
)
def test_a_model_that_cannot_be_measured_says_why(model, error, message):
    x, y = torch.randn(6, 8), torch.arange(6)
    with pytest.raises(error, match=message):
        similarity_report(model(), x, y, "logits")


def test_a_model_that_cannot_be_measured_is_refused_before_its_first_update():
    model = Branching(8, 6)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="per-sample gradients of Branching"):
        with_metric(GradientDiversity(layers="logits"), class_stream(), model)
    assert torch.equal(model.weight, before)


def test_a_model_with_a_head_per_task_is_refused_by_name():
    model = MTSimpleMLP(input_size=8, hidden_size=6)
    with pytest.raises(TypeError, match="MTSimpleMLP needs the task label"):
        with_metric(GradientDiversity(), class_stream(task_labels=True), model)


@pytest.mark.parametrize(
    ("x", "y"), [((1, 8), (1,)), ((4, 8), (3,)), ((4, 8), (4, 1))], ids=["one", "length", "shape"]
)
def test_a_batch_of_the_wrong_shape_is_refused(x, y):
    with pytest.raises(ValueError, match="similarity_report expects"):
        similarity_report(MLP(8, (6,), 3), torch.randn(x), torch.zeros(y, dtype=torch.long))


def test_a_layer_without_the_batch_as_first_axis_is_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.ReLU(),
                          nn.Unflatten(0, (-1, 2)), nn.Flatten(), nn.Linear(6, 2))  # fmt: skip
    with pytest.raises(ValueError, match="layer '3' gives 8 rows for 4 samples"):
        similarity_report(model, torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
