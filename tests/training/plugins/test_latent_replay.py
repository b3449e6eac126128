"""Latent replay: what is stored, how it is weighted. What it shares is tested with its twin."""

from __future__ import annotations

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch.nn import functional as F

from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.latent_replay import LatentReplayPlugin
from tests.conftest import class_stream, naive

pytestmark = pytest.mark.filterwarnings("ignore:No loggers")


def run(plugins, n=3):
    torch.manual_seed(1)
    strategy = naive(MLP(8, (16, 12), 6), plugins)
    for experience in class_stream().train_stream[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy


@pytest.mark.parametrize("n", [None, 20])
def test_new_and_stored_ones_are_one_concatenated_batch(n):
    plugin, found = LatentReplayPlugin("features.1", mem=12, n=n), []

    class Probe(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter < 2:
                return
            u, y = plugin._replay
            net = strategy.model
            u = torch.cat([net.features[:2](strategy.mb_x), u])
            y = torch.cat([strategy.mb_y, y])
            want = F.cross_entropy(net.classifier(net.features[2:](u)), y)
            found.append((strategy.loss.item(), want.item(), len(y)))

    run([plugin, Probe()])
    assert len(found) == 5
    for loss, want, rows in found:
        assert loss == pytest.approx(want, rel=1e-5)
        assert rows == 8 + (n or 8)


def test_stored_ones_are_activations_of_the_classes_samples():
    plugin = LatentReplayPlugin("features.1", mem=13)
    strategy = run([plugin])
    u, y = plugin.memory.sample(300, torch.Generator())
    for experience in class_stream().train_stream:
        x = torch.stack([x for x, *_ in experience.dataset])
        labels = torch.tensor([label for _, label, _ in experience.dataset])
        real = strategy.model.features[:2](x)
        for label in labels.unique():
            mine, stored = real[labels == label], u[y == label]
            assert len(stored.unique(dim=0)) == (3 if label == 0 else 2)
            assert (stored[:, None] - mine).abs().amax(2).amin(1).max() < 1e-5


def test_the_memory_is_the_papers_unless_it_is_said():
    assert LatentReplayPlugin("features.1").memory.mem == 1500
    plugin = LatentReplayPlugin("features.1", mem_bytes=1000)
    run([plugin])
    assert plugin.bytes_remembered == 13 * (16 * 4 + 8)


def test_activations_age_where_the_encoder_learns():
    for encoder, same in (("finetune", False), ("freeze_after_first", True)):
        strategy = run([LatentReplayPlugin("features.1", mem=12, encoder=encoder)], 1)
        x = torch.stack([x for x, *_ in class_stream().train_stream[0].dataset])
        before = strategy.model.features[:2](x)
        strategy.train(class_stream().train_stream[1], eval_streams=[])
        assert torch.equal(before, strategy.model.features[:2](x)) == same


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mem": 0}, "mem >= 1"),
        ({"mem": 3, "mem_bytes": 40}, "give one of the two"),
        ({"encoder": "distill"}, "'finetune'"),
        ({"n": 0}, "n >= 1"),
        ({"r": "half"}, "'class_ratio'"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LatentReplayPlugin("features.1", **options)


def test_a_memory_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"memory of 3 samples .* 4 classes"):
        run([LatentReplayPlugin("features.1", mem=3)])
