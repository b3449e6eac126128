"""The expandable network: growth, freezing, labels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.expandable_net import UNSEEN_LOGIT, ExpandableNet
from avalanche_ext.models.mlp import MLP


def net(*groups, name="mlp", shape=(8,), **options):
    network = ExpandableNet(build_backbone(name, 0, shape, hidden=(5,)), **options)
    network.n_outputs = max(network.n_outputs, 1 + max((max(g) for g in groups), default=0))
    for group in groups:
        network.grow(list(group))
    return network


def test_labels_arrive_in_any_order():
    network = net((4, 1), (0, 5))
    with torch.no_grad():
        network.classifier.weight.copy_(torch.arange(4.0)[:, None].expand(4, 10))
    x = torch.rand(3, 8)
    u = network.super_feature(x)
    z = network(x)
    assert z.shape == (3, 6)
    for unit, label in enumerate((4, 1, 0, 5)):
        torch.testing.assert_close(z[:, label], unit * u.sum(1))
    assert torch.equal(z[:, [2, 3]], torch.full((3, 2), UNSEEN_LOGIT))
    # The specification's case: old 4, 1 -> 0; new 0 -> 1; new 5 -> 2.
    assert network.auxiliary_labels(torch.tensor([4, 1, 0, 5])).tolist() == [0, 0, 1, 2]
    assert network.auxiliary.out_features == 3


def test_the_new_extractor_is_a_copy_and_the_old_one_is_frozen():
    network = net((0, 1), name="small_convnet", shape=(3, 8, 8), fold=False)
    network.train()
    network(torch.rand(4, 3, 8, 8))
    before = copy.deepcopy(network.extractors[0].state_dict())
    network.grow([2])
    first, second = network.extractors
    for name, value in second.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    network.train()
    assert not first.training
    assert second.training
    loss = network(torch.rand(4, 3, 8, 8)).square().sum()
    loss.backward()
    assert all(p.grad is None for p in first.parameters())
    for name, value in first.state_dict().items():  # running statistics too
        assert torch.equal(value, before[name])
    assert not torch.equal(second.features[1].running_mean, before["features.1.running_mean"])


@pytest.mark.parametrize("inherit", [True, False])
def test_the_classifier_keeps_its_old_block_on_request(inherit):
    network = net((0, 1), inherit=inherit)
    old = network.classifier.weight.detach().clone()
    x = torch.rand(3, 8)
    before = network(x)
    network.grow([2])
    assert network.classifier.weight.shape == (3, 10)
    assert torch.equal(network.classifier.weight[:2, :5], old) == inherit
    with torch.no_grad():
        network.classifier.weight[:2, 5:] = 0
    if inherit:  # old logits stay where the new features have no say
        torch.testing.assert_close(network(x)[:, :2], before[:, :2])


def test_parameters_of_ten_steps_of_the_papers_network():
    with torch.device("meta"):
        network = ExpandableNet(
            build_backbone("cifar_resnet18", 0, (3, 32, 32)), n_outputs=100, fold=False
        )
        for k in range(10):
            network.grow(list(range(10 * k, 10 * k + 10)))
        n = sum(p.numel() for p in network.extractors.parameters())
        n += network.classifier.weight.numel()
    assert n == 112_200_320


def test_before_training_everything_is_unseen():
    network = net(n_outputs=4)
    assert torch.equal(network(torch.rand(2, 8)), torch.full((2, 4), UNSEEN_LOGIT))


def test_evaluation_widens_the_output_and_grows_nothing():
    class Experience:
        classes_in_this_experience, current_experience = [7, 9], 3

    network = net((0, 1))
    network.eval()
    network.adaptation(Experience)
    assert (network.n_outputs, len(network.extractors)) == (10, 1)
    network.train()
    network.adaptation(Experience)
    network.adaptation(Experience)  # the same experience again
    assert (len(network.extractors), network.classes) == (2, [0, 1, 7, 9])


@pytest.mark.parametrize("backbone", [MLP(8, (), 3), nn.Linear(3, 4)])
def test_a_backbone_without_features_is_refused(backbone):
    if isinstance(backbone, MLP):
        del backbone.num_features
    with pytest.raises(ValueError, match="num_features or out_dim"):
        ExpandableNet(backbone)


def test_an_experience_without_a_new_class_is_refused():
    class Experience:
        classes_in_this_experience, current_experience = [1], 1

    with pytest.raises(ValueError, match="brings none"):
        net((0, 1)).adaptation(Experience)
