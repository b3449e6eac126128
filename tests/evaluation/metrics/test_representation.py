"""Transfer of the representation along training, against probes made by hand."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from avalanche.benchmarks import nc_benchmark, split_online_stream
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import JointTraining
from torch import nn

from avalanche_ext import DeviceDataPlugin, ExpandableDER, Schedule, build_backbone
from avalanche_ext.evaluation.metrics.representation import RepresentationTransfer
from avalanche_ext.evaluation.representation import representation_accuracies
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.models.mlp import MLP
from tests.conftest import blobs, naive


def hard_stream(n_experiences=3, **options):
    """Classes that overlap in part; the test set is drawn from the same classes."""
    from torch.utils.data import TensorDataset

    data = blobs(40, width=8)
    x = data.tensors[0] + 2 * torch.randn(240, 8, generator=torch.Generator().manual_seed(5))
    halves = []
    for k in (0, 1):
        halves.append(TensorDataset(x[k::2], data.tensors[1][k::2]))
        halves[-1].targets = data.targets[k::2]
    return nc_benchmark(
        *halves, n_experiences, task_labels=False, shuffle=False,
        fixed_class_order=list(range(6)), **options,
    )  # fmt: skip


def row(model, stream, order, **options):
    train, test = (
        [part[k].dataset for k in order] for part in (stream.train_stream, stream.test_stream)
    )
    return representation_accuracies(model, train, test, **options)


class Copies(SupervisedPlugin):
    """The model as it is when an experience ends."""

    def __init__(self):
        super().__init__()
        self.models = []

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


def trained(stream, metric, plugins=(), order=(0, 1, 2), **options):
    torch.manual_seed(0)
    strategy = naive(
        MLP(8, (6,), 6), list(plugins), evaluator=EvaluationPlugin(metric), epochs=2, **options
    )
    for k in order:
        strategy.train(stream.train_stream[k])
    return strategy


def test_the_matrix_and_the_transfers_against_probes_and_loops():
    stream, copies = hard_stream(), Copies()
    alone = [0.9, 0.4, 0.65]
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream, alone=alone)
    strategy = trained(stream, metric, [copies])
    rows = [row(model, stream, range(i + 1)) for i, model in enumerate(copies.models)]
    assert metric.matrix() == rows
    assert len({round(a, 6) for row in rows for a in row}) > 3  # something to tell apart
    bwt = fwt = 0.0
    for i in (1, 2):
        bwt += sum(rows[i][j] - rows[j][j] for j in range(i + 1)) / (i + 1) / 2
        fwt += (rows[i][i] - alone[i]) / 2
    assert metric.result() == pytest.approx({"RepresentationBWT": bwt, "RepresentationFWT": fwt})
    first = sum(rows[1][j] - rows[j][j] for j in (0, 1)) / 2
    published = strategy.evaluator.get_all_metrics()
    name = "RepresentationBWT/train_phase/train_stream"
    steps, values = published[name]
    assert values == pytest.approx([first, bwt])
    assert steps == [20, 30]  # 10 steps an experience; nothing behind the first
    assert set(published) == {name, name.replace("BWT", "FWT")}


def test_without_references_there_is_no_forward_transfer():
    stream = hard_stream()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    assert metric.matrix() == []
    trained(stream, metric)
    assert set(metric.result()) == {"RepresentationBWT"}
    metric.reset()
    assert (metric.matrix(), metric.result()) == ([], {})


def test_l2_reaches_the_probe():
    stream, copies = hard_stream(), Copies()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream, l2=10.0)
    trained(stream, metric, [copies])
    last = [row(copies.models[-1], stream, range(3), l2=l2) for l2 in (10.0, 1e-3)]
    assert metric.matrix()[-1] == last[0] != last[1]


def test_a_single_experience_defines_nothing():
    stream = hard_stream(1)
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream, alone=[0.5])
    trained(stream, metric, order=[0])
    assert len(metric.matrix()) == 1
    assert metric.result() == {}


def test_rows_follow_the_order_of_training_and_repetition_replaces_the_last():
    stream, copies = hard_stream(), Copies()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    trained(stream, metric, [copies], order=[2, 0, 2])
    assert metric.matrix() == [
        row(copies.models[0], stream, [2]),
        row(copies.models[2], stream, [2, 0]),
    ]


def test_an_online_stream_is_measured_behind_whole_experiences():
    stream, copies = hard_stream(), Copies()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    torch.manual_seed(0)
    strategy = naive(MLP(8, (6,), 6), [copies], evaluator=EvaluationPlugin(metric))
    for part in split_online_stream(stream.train_stream[:2], experience_size=20):
        strategy.train(part)
    assert len(copies.models) == 4
    assert metric.matrix() == [row(copies.models[2 * i + 1], stream, range(i + 1)) for i in (0, 1)]


def test_joint_training_has_the_last_row_alone():
    stream = hard_stream()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    model = MLP(8, (6,), 6)
    strategy = JointTraining(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        criterion=nn.CrossEntropyLoss(), train_mb_size=8, evaluator=EvaluationPlugin(metric),
    )  # fmt: skip
    strategy.train(stream.train_stream)
    want = row(model, stream, range(3))
    matrix = metric.matrix()
    assert matrix[2] == want
    assert all(math.isnan(a) for row in matrix[:2] for a in row)
    assert metric.result() == {}


def test_it_changes_nothing_of_the_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(8, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3)
            )
            self.classifier = nn.Linear(9, 6)

        def forward(self, x):
            return self.classifier(self.body(x))

    def state(make):
        stream = hard_stream()
        torch.manual_seed(0)
        metrics = [make(stream)] if make else []
        strategy = naive(Net(), evaluator=EvaluationPlugin(*metrics), epochs=2)
        for experience in stream.train_stream:
            strategy.train(experience)
        values = strategy.model.state_dict().values()
        return torch.cat([v.double().flatten() for v in values]), torch.get_rng_state()

    measured = state(lambda s: RepresentationTransfer(s.train_stream, s.test_stream))
    for a, b in zip(measured, state(None), strict=True):
        assert torch.equal(a, b)


def test_expandable_der_is_measured_by_its_super_feature():
    stream, copies = hard_stream(), Copies()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    RNGManager.set_random_seeds(0)
    strategy = ExpandableDER(
        backbone=build_backbone("mlp", 0, (8,), hidden=(4,)), mem=18, schedule=Schedule(0.05, 1),
        train_epochs=2, train_mb_size=8, eval_mb_size=64, evaluator=EvaluationPlugin(metric),
        plugins=[DeviceDataPlugin(), copies],
    )  # fmt: skip
    for experience in stream.train_stream:
        strategy.train(experience)
    assert metric.matrix() == [
        row(model, stream, range(i + 1)) for i, model in enumerate(copies.models)
    ]
    assert strategy.model.widths == [4, 4, 4]


def test_a_pickled_strategy_goes_on():
    stream = hard_stream()
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream, alone=[0.5] * 3)
    whole = trained(stream, metric, order=[0, 1])
    whole.experience = None  # Avalanche's, which pickle refuses
    stored, state = pickle.dumps(whole), torch.get_rng_state()
    whole.train(stream.train_stream[2])
    resumed = pickle.loads(stored)
    (copy_of_metric,) = resumed.evaluator.metrics
    assert copy_of_metric.matrix() == metric.matrix()[:2]
    torch.set_rng_state(state)
    resumed.train(stream.train_stream[2])
    assert copy_of_metric.matrix() == metric.matrix()
    assert copy_of_metric.result() == metric.result()


def test_a_checkpoint_goes_on(tmp_path):
    def build():
        stream = hard_stream()
        metric = RepresentationTransfer(stream.train_stream, stream.test_stream, alone=[0.5] * 3)
        RNGManager.set_random_seeds(0)
        strategy = naive(MLP(8, (6,), 6), evaluator=EvaluationPlugin(metric), epochs=2)
        return stream, metric, strategy, Checkpoints(tmp_path, strategy, stream)

    stream, metric, _, checkpoints = build()
    for k in range(3):
        if k == 2:
            checkpoints.save(2, {"done": 2})
        checkpoints.train(k, stream.train_stream[k])
    again, resumed, _, checkpoints = build()
    assert checkpoints.resume() == {"done": 2}
    assert resumed.matrix() == metric.matrix()[:2]
    checkpoints.train(2, again.train_stream[2])
    assert resumed.matrix() == metric.matrix()
    assert resumed.result() == metric.result()


def test_bad_arguments():
    stream = hard_stream()
    with pytest.raises(ValueError, match=r"test_stream for each of the 3 .* got 2"):
        RepresentationTransfer(stream.train_stream, stream.test_stream[:2])
    with pytest.raises(ValueError, match=r"alone for each of the 3 .* got 4"):
        RepresentationTransfer(stream.train_stream, stream.test_stream, alone=[0.1] * 4)
    with pytest.raises(ValueError, match="RepresentationTransfer expects l2 > 0; got 0"):
        RepresentationTransfer(stream.train_stream, stream.test_stream, l2=0)


def test_what_cannot_be_measured_is_refused_before_it_is_trained():
    stream = hard_stream()
    metric = RepresentationTransfer(stream.train_stream[1:], stream.test_stream[1:])
    with pytest.raises(ValueError, match=r"experiences \[1, 2\]; training is on experience 0"):
        trained(stream, metric)
    metric = RepresentationTransfer(stream.train_stream, stream.test_stream)
    model = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 6, 1), nn.Flatten())
    strategy = naive(model, evaluator=EvaluationPlugin(metric))
    with pytest.raises(ValueError, match="Sequential are not known: it has no linear layer"):
        strategy.train(stream.train_stream[0])
    assert strategy.clock.train_iterations == 0
