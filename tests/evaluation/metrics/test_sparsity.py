"""Shares of active units and quantiles of importance, counted by hand."""

from __future__ import annotations

import pytest
import torch
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_ext.evaluation.metrics.sparsity import HISTOGRAM_EDGES, SparsityMetrics
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.slni import NeuronImportance, SLNIPlugin
from tests.conftest import class_stream, naive


def evaluated(metric, model=None, plugins=(), stream=None, n=1):
    benchmark = class_stream()
    torch.manual_seed(0)
    model = MLP(8, (16, 12), 6) if model is None else model
    strategy = naive(model, plugins, evaluator=EvaluationPlugin(metric))
    for experience in benchmark.train_stream[:n]:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream if stream is None else stream)
    return strategy, benchmark


def rows(strategy, benchmark):
    x = torch.stack([e.dataset[k][0] for e in benchmark.test_stream for k in range(40)])
    first = strategy.model.features[:2](x)
    return {"features.1": first, "features.3": strategy.model.features[2:](first)}


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("used", [0.01, 0.3])
def test_shares_over_the_whole_stream(threshold, used):
    metric = SparsityMetrics(threshold=threshold, used=used)
    strategy, benchmark = evaluated(metric)
    want = {}
    for name, h in rows(strategy, benchmark).items():
        active = (h > threshold).float()
        want[f"ActiveShare_{name}"] = active.mean().item()
        want[f"UsedShare_{name}"] = (active.mean(0) > used).float().mean().item()
    assert metric.result() == pytest.approx(want)
    published = strategy.evaluator.get_all_metrics()
    assert {k.split("/")[0]: v[1] for k, v in published.items()} == {
        k: [v] for k, v in metric.result().items()
    }
    assert all("eval_phase/test_stream" in key for key in published)


def test_a_second_evaluation_starts_again_and_leaves_no_hook():
    metric = SparsityMetrics()
    strategy, benchmark = evaluated(metric)
    first = metric.result()
    strategy.eval(benchmark.test_stream)
    assert metric.result() == first
    strategy.eval(benchmark.test_stream[:1])
    x = torch.stack([benchmark.test_stream[0].dataset[k][0] for k in range(40)])
    want = (strategy.model.features[:2](x) > 0).float().mean().item()
    assert metric.result()["ActiveShare_features.1"] == pytest.approx(want)
    assert abs(want - first["ActiveShare_features.1"]) > 1e-3
    assert not any(m._forward_hooks for m in strategy.model.modules())
    metric.reset()
    assert metric.result() == {}


def test_quantiles_of_importance():
    metric = SparsityMetrics(quantiles=(0.0, 0.25, 1.0))
    settings = NeuronImportance(objective="output_l2")
    plugin = SLNIPlugin(1e-3, form="slnid", importance=settings)
    evaluated(metric, plugins=[plugin], n=2)
    alpha = plugin.importance["features.3"].double().sort().values
    found = metric.result()
    assert found["Importance_q00_features.3"] == pytest.approx(alpha[0].item())
    assert found["Importance_q100_features.3"] == pytest.approx(alpha[-1].item())
    low, high = alpha[2].item(), alpha[3].item()  # position 11 / 4 = 2.75
    assert found["Importance_q25_features.3"] == pytest.approx(low + 0.75 * (high - low))
    assert sum(key.startswith("Importance") for key in found) == 6


def test_histograms_count_every_activation_by_magnitude():
    metric = SparsityMetrics(histogram=True)
    strategy, benchmark = evaluated(metric)
    edges = (0.0, *HISTOGRAM_EDGES, float("inf"))
    for name, h in rows(strategy, benchmark).items():
        counts = metric.histograms[name]
        assert counts.sum() == h.numel() == 120 * h.shape[1]
        for k in range(len(HISTOGRAM_EDGES) + 1):
            inside = (h <= edges[k + 1]) & ((h > edges[k]) if k else torch.ones_like(h) > 0)
            assert counts[k] == inside.sum()
    assert evaluated(plain := SparsityMetrics())
    assert plain.histograms == {}


def test_feature_maps_negative_values_and_logits():
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6)
    )
    metric = SparsityMetrics(layers=["2", "4"], threshold=0.1)
    _, benchmark = evaluated(metric, model)
    x = torch.stack([e.dataset[k][0] for e in benchmark.test_stream for k in range(40)])
    want = (model[:3](x).abs() > 0.1).float().mean().item()
    assert metric.result()["ActiveShare_2"] == pytest.approx(want)
    assert "ActiveShare_4" not in metric.result()  # the logits


def test_it_changes_nothing_of_the_training():
    def trained(metrics):
        torch.manual_seed(0)
        model = SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0.5)
        strategy = naive(model, evaluator=EvaluationPlugin(*metrics), eval_every=1, epochs=2)
        stream = class_stream()
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[stream.test_stream])
        return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])

    assert torch.equal(trained([SparsityMetrics(histogram=True)]), trained([]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "a finite threshold >= 0"),
        ({"used": -0.1}, "a finite used >= 0"),
        ({"quantiles": (0.5, 1.5)}, r"quantiles 0 to 1; got \[0.5, 1.5\]"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=f"SparsityMetrics expects {message}"):
        SparsityMetrics(**settings)


def test_layers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"features\.9"):
        evaluated(SparsityMetrics(layers="features.9"))
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Flatten(0), nn.Unflatten(0, (-1, 12)))
    with pytest.raises(ValueError, match=r"layer '2' gives shape \(480,\) for 40 samples"):
        evaluated(SparsityMetrics(layers="2"), model)
