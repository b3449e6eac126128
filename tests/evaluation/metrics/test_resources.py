"""Parameters, operations and bytes: the literature's figures, and small nets counted by hand."""

from __future__ import annotations

import pytest
import torch
import torchvision
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.models.icarl_resnet import make_icarl_net
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from torch import nn

from avalanche_ext import DGM, MLP, BERPlugin, Discriminator, DRLPlugin, MaskedGenerator
from avalanche_ext.evaluation.accounting import (
    bytes_by_kind,
    bytes_remembered,
    count_parameters,
    flops_per_sample,
    memory_mib,
)
from avalanche_ext.evaluation.metrics import ResourceMetrics
from tests.conftest import class_stream, naive


def test_operations_of_a_small_net_counted_by_hand():
    # 8 * 16 and 16 * 6 multiply-adds, whatever the batch
    assert flops_per_sample(MLP(8, (16,), 6), torch.zeros(5, 8)) == 2 * (8 * 16 + 16 * 6)
    # 3 x 3 kernel over 2 channels, in 4 groups of outputs, at 6 x 6 places
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert flops_per_sample(net, torch.zeros(1, 2, 8, 8)) == 2 * (9 * 2 * 4 * 36)
    with pytest.raises(ValueError, match="at least one sample"):
        flops_per_sample(net, torch.zeros(0, 2, 8, 8))


def test_counting_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    flops_per_sample(net, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_compiled_net_counts_like_the_net():
    net = MLP(8, (16,), 6)
    compiled = torch.compile(net, backend=lambda graph, inputs: lambda *_: [torch.zeros(1, 6)])
    compiled(torch.zeros(1, 8))
    assert flops_per_sample(compiled, torch.zeros(1, 8)) == 2 * (8 * 16 + 16 * 6)


def test_the_literatures_networks():
    with torch.device("meta"):
        resnet32, resnet18 = make_icarl_net(100), torchvision.models.resnet18(num_classes=100)
        assert count_parameters(resnet32) == 463_504 + 100 * 64 + 100
        assert round(flops_per_sample(resnet32, torch.empty(1, 3, 32, 32)) / 1e9, 3) == 0.138
        assert round(flops_per_sample(resnet18, torch.empty(1, 3, 224, 224)) / 1e9, 3) == 3.627
        cifar = torchvision.models.resnet18(num_classes=100)
        cifar.conv1, cifar.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        assert count_parameters(cifar) == 11_220_132
        assert round(flops_per_sample(cifar, torch.empty(1, 3, 32, 32)) / 1e9, 3) == 1.111


def test_memory_of_networks_and_images_on_one_scale():
    assert round(memory_mib(463_504, 0), 2) == 1.77
    assert round(memory_mib(0, 2000 * 3072), 2) == 5.86
    assert round(memory_mib(463_504, 2000 * 3072), 1) == 7.6
    assert 4 * 463_504 // 3072 == 603  # one network in CIFAR images
    # nine more networks are 5431 images: 7431 of them weigh what ten networks and 2000 do
    assert round(memory_mib(463_504, 7431 * 3072), 1) == 23.5
    assert memory_mib(10 * 463_504, 2000 * 3072) == pytest.approx(23.5, abs=0.05)


def evaluator(metric):
    return EvaluationPlugin(metric, strict_checks=False)


class Growing(nn.Module):
    """One more layer of 8 x 2 + 2 numbers per experience."""

    def __init__(self):
        super().__init__()
        self.classifier = IncrementalClassifier(8, initial_out_features=2)

    def forward(self, x):
        return self.classifier(x)


def run(strategy, benchmark):
    """Train, and test what was seen: a test of what lies ahead would grow the head."""
    found = []
    for n, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience, eval_streams=[])
        found.append(strategy.eval(benchmark.test_stream[:n]))
    return found


def test_a_growing_net_has_a_size_at_the_end_and_a_mean():
    metric = ResourceMetrics()
    strategy = naive(Growing(), [BERPlugin(6)], evaluator=evaluator(metric))
    name = "{}/eval_phase/test_stream"
    results = run(strategy, class_stream())
    sizes = [n * 9 for n in (2, 4, 6)]
    assert [r[name.format("StreamParameters")] for r in results] == sizes
    assert [r[name.format("StreamParametersMean")] for r in results] == [18, 27, 36]
    assert [r[name.format("StreamFlopsPerSample")] for r in results] == [32, 64, 96]
    # 6 exemplars of 8 float32 numbers, a label and a task label
    assert results[-1][name.format("StreamBytesRemembered")] == bytes_remembered(strategy) > 6 * 32


def test_the_mean_of_a_net_that_doubles_is_the_published_one():
    # one network of 11.2 M more per experience: papers print 11.2 (T + 1) / 2
    for n, published in ((5, 33.6), (10, 61.6), (20, 117.6), (50, 285.6)):
        metric = ResourceMetrics(flops=False)
        metric._trained = n
        metric._parameters = {k: round(11.2e6 * k) for k in range(1, n)}  # earlier evaluations
        parameters = [nn.Parameter(torch.empty(round(11.2e6 * n), device="meta"))]
        strategy = naive(MLP(8, (16,), 6))
        strategy.model = nn.ParameterList(parameters)
        strategy.experience = class_stream().test_stream[0]
        strategy.is_training = False
        metric.before_eval(strategy)
        values = {v.name.split("/")[0]: v.value for v in metric.after_eval(strategy)}
        assert round(values["StreamParametersMean"] / 1e6, 1) == published
        assert values["StreamParameters"] / 1e6 == pytest.approx(11.2 * n)


def test_a_head_grown_for_the_evaluation_is_not_counted_as_learnt():
    metric = ResourceMetrics(flops=False)
    strategy = naive(Growing(), evaluator=evaluator(metric))
    benchmark = class_stream()
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert metric.result()["StreamParameters"] == 2 * 9
    assert count_parameters(strategy.model) == 6 * 9


def test_no_mean_where_an_experience_was_not_evaluated():
    metric = ResourceMetrics(flops=False)
    strategy = naive(MLP(8, (16,), 6), [ReplayPlugin(4)], evaluator=evaluator(metric))
    benchmark = class_stream()
    strategy.train(benchmark.train_stream[:2], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    found = metric.result()
    assert "StreamParametersMean" not in found
    assert "StreamFlopsPerSample" not in found
    assert found["StreamParameters"] == 8 * 16 + 16 + 16 * 6 + 6
    assert found["StreamBytesRemembered"] >= 4 * 32


def test_with_task_labels_the_right_head_is_counted():
    class Net(MultiTaskModule):
        def __init__(self):
            super().__init__()
            self.classifier = MultiHeadClassifier(8, initial_out_features=2)

        def forward(self, x, task_labels):
            return self.classifier(x, task_labels)

    metric = ResourceMetrics()
    strategy = naive(Net(), evaluator=evaluator(metric))
    run(strategy, class_stream(task_labels=True))
    assert metric.result()["StreamFlopsPerSample"] == 2 * 8 * 2


def test_bytes_by_kind_of_methods_that_keep_other_things():
    from avalanche.training.plugins import EWCPlugin, LwFPlugin

    stream = class_stream(2)
    parameters = 4 * (8 * 16 + 16 + 16 * 6 + 6)
    kinds = {}
    plugins = {
        "plain": [], "ewc": [EWCPlugin(1.0)], "lwf": [LwFPlugin(1.0, 2.0)],
        "ber": [BERPlugin(mem=5)], "drl": [DRLPlugin(lam=1e-3)],
        "both": [EWCPlugin(1.0), BERPlugin(mem=5)],
    }  # fmt: skip
    for name, used in plugins.items():
        strategy = naive(MLP(8, (16,), 6), used)
        for experience in stream.train_stream:
            strategy.train(experience)
        kinds[name] = bytes_by_kind(strategy)
    assert kinds["drl"] == kinds["plain"]
    assert kinds["plain"] == {"exemplars": 0, "networks": 0, "tensors": 0}
    # EWC: importances and weights behind each of two experiences.
    assert kinds["ewc"] == {"exemplars": 0, "networks": 0, "tensors": 4 * parameters}
    assert kinds["lwf"] == {"exemplars": 0, "networks": parameters, "tensors": 0}
    exemplars = bytes_remembered(strategy)
    assert kinds["ber"] == {"exemplars": exemplars, "networks": 0, "tensors": 0}
    assert exemplars == 2 * 5 * (4 * 8 + 8 + 8)
    assert kinds["both"] == {**kinds["ewc"], "exemplars": exemplars}


def test_a_generator_that_the_strategy_holds_is_a_network():
    sizes = {"n_classes": 3, "network": "mlp", "widths": (5,), "value_range": None}
    generator = MaskedGenerator((4,), latent=2, **sizes)
    strategy = DGM(model=Discriminator((4,), **sizes), generator=generator, evaluator=None)
    held = sum(t.nbytes for t in (*generator.parameters(), *generator.buffers()))
    assert bytes_by_kind(strategy) == {"exemplars": 0, "networks": held, "tensors": 0}
    assert held > 0
