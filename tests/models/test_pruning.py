"""Surgery, folding, recalibration: what comes out gives what the masked network gave."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from avalanche_ext.evaluation.accounting import count_parameters, flops_per_sample
from avalanche_ext.functional.channel_mask import weight_counts
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.channel_gates import GatedNetwork
from avalanche_ext.models.channel_groups import find_channel_groups
from avalanche_ext.models.mlp import MLP
from avalanche_ext.models.pruning import (
    build_from_manifest,
    fold_batch_norms,
    prune_channels,
    recalibrate_batch_norms,
)
from tests.models.channel_nets import Flattened, ToyResNet, binary, lively, random_keep

SMALL, LARGE = (3, 8, 8), (3, 32, 32)
NETWORKS = {
    "toy": (ToyResNet, SMALL),
    "toy_bias": (lambda: ToyResNet(bias=True), SMALL),
    "flattened": (Flattened, SMALL),
    "mlp": (lambda: MLP(12, (20, 10), 0), (3, 2, 2)),
    "small_convnet": (lambda: build_backbone("small_convnet", 0, SMALL), SMALL),
    "cifar_resnet18": (lambda: build_backbone("cifar_resnet18", 0, LARGE), LARGE),
    "cifar_resnet32": (lambda: build_backbone("cifar_resnet32", 0, LARGE), LARGE),
    "timm_resnet18": (lambda: build_backbone("resnet18", 0, LARGE), LARGE),
    "bottleneck": (lambda: build_backbone("resnet50", 0, LARGE), LARGE),
    "depthwise": (lambda: build_backbone("mobilenetv2_050", 0, LARGE), LARGE),
    "preact": (lambda: build_backbone("resnetv2_18", 0, LARGE), LARGE),
}
CASES = [
    *((name, "shared", 1) for name in NETWORKS),
    *((name, "inner", 1) for name in ("toy", "cifar_resnet32")),
    *((name, "shared", 8) for name in ("toy_bias", "flattened", "mlp", "cifar_resnet32")),
]


@pytest.mark.parametrize(("name", "residual", "multiple"), CASES)
def test_the_pruned_network_gives_the_kept_features(name, residual, multiple):
    make, shape = NETWORKS[name]
    net = lively(make())
    groups, keep = random_keep(net, residual=residual)
    x = torch.randn(3, *shape)
    masked = GatedNetwork(net, groups=groups).eval()(x, binary(groups, keep))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    pruned = prune_channels(net, groups, keep, channel_multiple=multiple)
    small = pruned.network.eval()
    with torch.no_grad():
        ours, folded = small(x), fold_batch_norms(small)(x)
    expected = masked.detach()
    if groups.output is not None:
        kept = pruned.kept[groups.output]
        closed = torch.ones(expected.shape[1], dtype=torch.bool).index_fill(0, kept, False)
        assert (expected[:, closed] == 0).all()
        expected = expected[:, kept]
    assert expected.abs().max() > 0.01
    assert small.num_features == ours.shape[1] == expected.shape[1]
    scale = max(1.0, float(expected.abs().max()))
    assert (ours - expected).abs().max() <= 1e-5 * scale
    assert (folded - expected).abs().max() <= 1e-5 * scale
    # The network that was pruned is as it was, the other of its class, and as narrow as counted.
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert type(small) is type(net)
    kept_weights, _ = weight_counts(groups.sparsity_terms(binary(groups, pruned.kept)))
    weights = sum(
        small.get_submodule(layer.name).weight.numel()
        for layer in groups.layers
        if layer.has_weights
    )
    assert weights == int(kept_weights)


@pytest.mark.parametrize("name", ["toy", "flattened", "mlp", "cifar_resnet32"])
def test_in_double_precision_only_rounding_is_left(name):
    make, shape = NETWORKS[name]
    net = lively(make()).double()
    groups, keep = random_keep(net)
    x = torch.randn(3, *shape, dtype=torch.float64)
    masked = GatedNetwork(net, groups=groups).eval()(x, binary(groups, keep, torch.float64))
    small = prune_channels(net, groups, keep).network.eval()
    torch.testing.assert_close(small(x), masked[:, keep[groups.output]], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fold_batch_norms(small)(x), small(x), rtol=1e-11, atol=1e-12)


def test_parameters_of_a_pruned_resnet18_follow_the_formula():
    net = build_backbone("cifar_resnet18", 0, LARGE)
    groups = find_channel_groups(net, prune_output=True)
    n = {group.name: 10 + 3 * k for k, group in enumerate(groups.groups)}
    keep = [torch.arange(n[group.name]) for group in groups.groups]
    small = prune_channels(net, groups, keep).network
    stages = [n["conv1"], *(n[f"layer{i}.0.conv2"] for i in (2, 3, 4))]
    expected = 27 * stages[0] + 2 * stages[0]
    before = stages[0]
    for i, g in enumerate(stages, 1):
        for j in (0, 1):
            h = n[f"layer{i}.{j}.conv1"]
            expected += 9 * before * h + 2 * h + 9 * h * g + 2 * g
            if i > 1 and j == 0:
                expected += before * g + 2 * g
            before = g
    assert count_parameters(small) == expected
    assert small.num_features == stages[-1]


def test_a_head_reads_the_kept_features_and_stays_as_wide():
    net = lively(build_backbone("cifar_resnet32", 10, LARGE))
    groups, keep = random_keep(net, prune_output=False)
    x = torch.randn(2, *LARGE)
    masked = GatedNetwork(net, groups=groups).eval()(x, binary(groups, keep))
    small = prune_channels(net, groups, keep).network
    assert small.fc.weight.shape == (10, 32)
    assert (small.fc.out_features, small.fc.in_features) == (10, 32)
    torch.testing.assert_close(small(x), masked, rtol=1e-5, atol=1e-5)


def test_with_all_channels_kept_the_network_is_the_same():
    net = lively(ToyResNet())
    groups = find_channel_groups(net, prune_output=True)
    same = prune_channels(net, groups, [torch.arange(n) for n in groups.sizes]).network
    ours, theirs = same.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    x = torch.randn(2, *SMALL)
    assert torch.equal(same(x), net(x))


def test_indices_select_rows_and_columns_of_each_weight():
    net = Flattened()
    groups = find_channel_groups(net)
    pruned = prune_channels(net, groups, [[3, 0], [2, 4], [1]])
    small = pruned.network
    assert pruned.manifest["kept"] == {"first": [0, 3], "second": [2, 4], "hidden": [1]}
    assert torch.equal(small.first.weight, net.first.weight[[0, 3]])
    assert torch.equal(small.depth.weight, net.depth.weight[[0, 3]])
    assert (small.depth.groups, small.depth.in_channels, small.depth.out_channels) == (2, 2, 2)
    assert torch.equal(small.second.weight, net.second.weight[[2, 4]][:, [0, 3]])
    columns = [8, 9, 10, 11, 16, 17, 18, 19]
    assert torch.equal(small.flat_bn.running_var, net.flat_bn.running_var[columns])
    assert torch.equal(small.hidden.weight, net.hidden.weight[[1]][:, columns])
    assert torch.equal(small.hidden.bias, net.hidden.bias[[1]])
    assert torch.equal(small.last.weight, net.last.weight[:, [1]])
    assert (small.second.in_channels, small.flat_bn.num_features) == (2, 8)


def test_the_pruned_network_trains():
    net = ToyResNet().train()
    net.stem.weight.requires_grad_(False)
    groups, keep = random_keep(net)
    small = prune_channels(net, groups, keep).network
    assert small.training
    assert not small.stem.weight.requires_grad
    small(torch.randn(4, *SMALL)).sum().backward()
    assert small.a1.weight.grad.shape == (4, 4, 3, 3)
    assert not [m for m in small.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_memory_formats_stay():
    net = ToyResNet().to(memory_format=torch.channels_last)
    groups, keep = random_keep(net)
    weight = prune_channels(net, groups, keep).network.a2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_widths_are_rounded_up_as_far_as_there_are_channels():
    net = lively(ToyResNet())
    groups = find_channel_groups(net, prune_output=True)  # 8, 8, 16, 16, 32, 32, 5
    keep = [[7], range(8), [1, 2, 15], range(9), range(31), range(16), [4]]
    pruned = prune_channels(net, groups, list(map(list, keep)), channel_multiple=8)
    assert [len(k) for k in pruned.kept] == [8, 8, 8, 16, 32, 16, 5]
    assert pruned.kept[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 15]
    x = torch.randn(2, *SMALL)
    thin = prune_channels(net, groups, list(map(list, keep))).network
    out = pruned.network(x)
    torch.testing.assert_close(out[:, 4:], thin(x), rtol=1e-5, atol=1e-5)
    assert (out[:, :4] == 0).all()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["toy", "flattened", "depthwise"])
def test_a_state_dictionary_loads_with_the_manifest_alone(name, folded):
    make, shape = NETWORKS[name]
    net = lively(make())
    groups, keep = random_keep(net)
    pruned = prune_channels(net, groups, keep, channel_multiple=2)
    small = fold_batch_norms(pruned.network) if folded else pruned.network.eval()
    manifest = json.loads(json.dumps(pruned.manifest))
    fresh = build_from_manifest(make(), manifest, folded=folded).eval()
    fresh.load_state_dict(small.state_dict())
    x = torch.randn(2, *shape)
    assert torch.equal(fresh(x), small(x))


def test_a_manifest_of_another_network_is_an_error():
    net = ToyResNet()
    manifest = prune_channels(net, *random_keep(net)).manifest
    with pytest.raises(ValueError, match="manifest is of a network with channels"):
        build_from_manifest(Flattened(), manifest)


@pytest.mark.parametrize(("keep", "match"), [
    ([[0]], "each of the 3 groups; got 1"),
    ([[0], [], [0]], "no channel of 'second'"),
    ([[0, 4], [0], [0]], "0 to 3 for 'first'"),
    ([[0, -1], [0], [0]], "0 to 3 for 'first'"),
    ([[0, 0], [0], [0]], "different indices"),
])  # fmt: skip
def test_indices_that_do_not_fit_are_errors(keep, match):
    net = Flattened()
    with pytest.raises(ValueError, match=match):
        prune_channels(net, find_channel_groups(net), keep)


def test_a_multiple_below_one_is_an_error():
    net = Flattened()
    with pytest.raises(ValueError, match="channel_multiple must be >= 1; got 0"):
        prune_channels(net, *random_keep(net, prune_output=False), channel_multiple=0)


def test_half_of_all_channels_cost_about_a_quarter():
    net = build_backbone("cifar_resnet18", 0, LARGE)
    groups, keep = random_keep(net)
    small = fold_batch_norms(prune_channels(net, groups, keep).network)
    x = torch.randn(1, *LARGE)
    dense, pruned = flops_per_sample(net, x), flops_per_sample(small, x)
    assert dense == 1_110_835_200
    stem = 2 * 27 * 64 * 32 * 32
    assert pruned == (dense - stem) // 4 + stem // 2


# folding --------------------------------------------------------------------------------------


def test_folding_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0), nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[0].bias.fill_(1.0)
        for name, value in {"weight": 3.0, "bias": 0.5, "running_mean": 5.0}.items():
            getattr(net[1], name).fill_(value)
        net[1].running_var.fill_(4.0)
    folded = fold_batch_norms(net)
    # gamma / sqrt(v) = 1.5, so W' = 3 and b' = 1.5 (1 - 5) + 0.5
    assert folded[0].weight.item() == 3
    assert folded[0].bias.item() == -5.5
    assert isinstance(folded[1], nn.Identity)
    assert not folded.training
    assert net.training
    assert isinstance(net[1], nn.BatchNorm2d)


def test_no_batch_norm_is_left_but_in_pre_activation_networks():
    for name, left in (("cifar_resnet32", 0), ("depthwise", 0), ("preact", 9)):
        net = lively(NETWORKS[name][0]())
        folded = fold_batch_norms(net)
        norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == left
        x = torch.randn(2, *LARGE)
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_stays_where_its_input_is_read_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    net = lively(Twice())
    x = torch.randn(2, *SMALL)
    assert torch.equal(fold_batch_norms(net)(x), net(x))


def test_a_batch_norm_without_statistics_cannot_be_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="'1' keeps no running statistics"):
        fold_batch_norms(net)


# recalibration --------------------------------------------------------------------------------


def test_recalibration_is_the_mean_over_the_batches():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.train()(torch.randn(5, 2))  # statistics that shall be forgotten
    net[3].eval()
    net[0].momentum = 0.3
    batches = [torch.randn(n, 2) + n for n in (4, 6, 9)]
    assert recalibrate_batch_norms(net, iter(batches)) == 3
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    var = torch.stack([x.var(0) for x in batches]).mean(0)
    torch.testing.assert_close(net[0].running_mean, mean)
    torch.testing.assert_close(net[0].running_var, var)
    hidden = [net[2]((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()) for x in batches]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    torch.testing.assert_close(net[3].running_mean, mean, rtol=1e-4, atol=1e-5)  # no dropout
    assert [m.training for m in net] == [True, True, True, False]
    assert [net[0].momentum, net[3].momentum] == [0.3, 0.1]


def test_a_masked_and_its_pruned_network_recalibrate_to_the_same():
    net = lively(ToyResNet())
    groups, keep = random_keep(net)
    gated = GatedNetwork(net, groups=groups).eval()
    with torch.no_grad():
        gated.embeddings[0].copy_(torch.cat(binary(groups, keep)) - 0.5)
    small = prune_channels(net, groups, gated.kept()).network
    batches = [torch.randn(5, *SMALL) for _ in range(3)]
    recalibrate_batch_norms(gated, batches)
    recalibrate_batch_norms(small, batches)
    for k, name in ((0, "stem_bn"), (3, "bn_a2"), (5, "bn_a3")):
        layer = next(layer for layer in groups.layers if layer.name == name)
        wide = net.get_submodule(name).running_mean[keep[layer.writes]]
        torch.testing.assert_close(small.get_submodule(name).running_mean, wide, msg=f"{k}")


def test_recalibration_without_batches_leaves_everything_and_is_an_error():
    net = lively(ToyResNet()).train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_norms(net, [])
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.stem_bn.momentum == 0.1


def test_a_network_without_batch_norm_has_nothing_to_recalibrate():
    assert recalibrate_batch_norms(MLP(4, (3,), 0), []) == 0
