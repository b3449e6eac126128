"""Which channels live and die together, in networks whose answer is known."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from avalanche_ext.functional.channel_mask import gate, sparsity_loss, weight_counts
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.channel_groups import find_channel_groups
from tests.models.channel_nets import Flattened, ToyResNet


def groups_of(name, n_classes=0, **kwargs):
    return find_channel_groups(build_backbone(name, n_classes, (3, 32, 32)), **kwargs)


def test_resnet18_has_four_stage_gates_and_eight_inner_ones():
    groups = groups_of("cifar_resnet18", prune_output=True)
    assert sorted(groups.sizes) == sorted([64, 128, 256, 512] + 2 * [64, 128, 256, 512])
    assert len(groups.groups) == 12
    assert sum(groups.sizes) == 2880
    weighted = [layer for layer in groups.layers if layer.has_weights]
    assert len(weighted) == 20
    terms = groups.sparsity_terms([torch.ones(n) for n in groups.sizes])
    assert weight_counts(terms) == (11_159_232, 11_159_232)
    halves = list(gate(torch.zeros(2880), 50.0).split(groups.sizes))
    loss = sparsity_loss(groups.sparsity_terms(halves))
    assert loss.item() == pytest.approx(0.25003871, abs=1e-7)
    assert groups.sizes[groups.output] == 512


def test_the_stages_of_resnet18_hold_what_is_added_in_them():
    groups = groups_of("cifar_resnet18", prune_output=True)
    writes = {layer.name: layer.writes for layer in groups.layers}
    reads = {layer.name: layer.reads for layer in groups.layers}
    first = {"bn1", "layer1.0.bn2", "layer1.1.bn2"}
    last = {"layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"}
    for stage in (first, last):
        assert len({writes[name] for name in stage}) == 1
    assert writes["layer4.1.bn2"] == groups.output
    assert reads["layer2.0.downsample.0"] == reads["layer2.0.conv1"] == writes["bn1"]
    assert reads["conv1"] is None
    assert groups.pinned == {"input": "the input"}


def test_only_batch_norms_carry_masks_where_each_convolution_has_one():
    groups = groups_of("cifar_resnet18", prune_output=True)
    assert {layer.kind for layer in groups.layers if layer.gated} == {"norm"}
    assert sum(layer.gated for layer in groups.layers) == 20
    folds = {layer.name: layer.folds_into for layer in groups.layers if layer.kind == "norm"}
    assert len(folds) == 20
    assert folds["layer2.0.downsample.1"] == "layer2.0.downsample.0"


def test_inner_masks_leave_the_stages_whole():
    groups = groups_of("cifar_resnet18", residual="inner", prune_output=True)
    assert groups.sizes == 2 * [64] + 2 * [128] + 2 * [256] + 2 * [512]
    assert groups.output is None
    assert set(groups.pinned.values()) == {"the input", "added to others"}


def test_an_output_is_kept_whole_unless_it_is_features():
    features = groups_of("cifar_resnet18")
    assert sum(features.sizes) == 2880 - 512
    logits = groups_of("cifar_resnet18", 10)
    assert sum(logits.sizes) == 2880  # the features are inside now
    head = next(layer for layer in logits.layers if layer.name == "fc")
    assert head.is_head
    assert not head.has_weights
    assert head.reads == logits.index("layer4.0.conv2")


@pytest.mark.parametrize(("name", "n_groups", "n_channels", "n_weighted"), [
    # stem and two more stages, and an inner gate for each of 15 blocks
    ("cifar_resnet32", 3 + 15, 16 * 6 + 32 * 6 + 64 * 6, 31 + 2),
    ("small_convnet", 3, 32 + 64 + 128, 3),
    ("mlp", 2, 200, 2),
    # stem, 4 stages, 2 inner gates in each of 16 blocks
    ("resnet50", 1 + 4 + 32, 64 + 256 + 512 + 1024 + 2048
     + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512), 53),
])  # fmt: skip
def test_other_networks(name, n_groups, n_channels, n_weighted):
    groups = groups_of(name, prune_output=True)
    assert len(groups.groups) == n_groups
    assert sum(groups.sizes) == n_channels
    assert sum(layer.has_weights for layer in groups.layers) == n_weighted


def test_a_depthwise_convolution_writes_what_it_reads():
    groups = groups_of("mobilenetv2_100", prune_output=True)
    depthwise = [layer for layer in groups.layers if layer.kind == "depthwise"]
    assert len(depthwise) == 17
    assert all(layer.reads == layer.writes is not None for layer in depthwise)
    net = Flattened()
    terms = find_channel_groups(net).sparsity_terms([torch.ones(n) for n in (4, 5, 7)])
    # 3 to 4 channels and 4 to 5 at 9 weights, 4 filters of 9, and two linear layers
    assert weight_counts(terms) == (9 * 12 + 36 + 9 * 20 + 20 * 7, 464)


def test_convolutions_without_batch_norm_and_flattened_maps():
    groups = find_channel_groups(Flattened())
    gated = {layer.name for layer in groups.layers if layer.gated}
    assert gated == {"first", "depth", "second", "flat_bn", "hidden_bn"}
    pixels = {layer.name: layer.pixels for layer in groups.layers}
    assert pixels == {"first": 1, "depth": 1, "second": 1, "flat_bn": 4, "hidden": 4,
                      "hidden_bn": 1, "last": 1}  # fmt: skip
    folds = {layer.name: layer.folds_into for layer in groups.layers if layer.kind == "norm"}
    assert folds == {"flat_bn": None, "hidden_bn": "hidden"}


def test_a_pre_activation_stream_is_masked_where_it_is_read():
    groups = groups_of("resnetv2_50", prune_output=True)
    gated = {layer.name for layer in groups.layers if layer.gated}
    assert {"stages.0.blocks.0.norm1", "norm", "stages.1.blocks.0.conv3"} <= gated
    assert "stages.1.blocks.0.conv1" not in gated  # norm2 is all that reads it


def test_channels_of_grouped_convolutions_stay():
    groups = groups_of("resnext50_32x4d", prune_output=True)
    assert len(groups.groups) == 5  # the stem and the stages
    reason = groups.pinned["layer1.0.conv1"]
    assert reason == "read by the grouped convolution layer1.0.conv2"
    total = weight_counts(groups.sparsity_terms([torch.ones(n) for n in groups.sizes]))[1]
    net = build_backbone("resnext50_32x4d", 0, (3, 32, 32))
    assert total == sum(p.numel() for p in net.parameters() if p.ndim == 4)


def test_what_is_added_to_channels_that_stay_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv2d(3, 4, 3)
            self.before = nn.Conv2d(3, 4, 3)
            self.grouped = nn.Conv2d(4, 4, 1, groups=2)
            self.last = nn.Conv2d(4, 5, 1)
            self.head = nn.Conv2d(5, 2, 1)

        def forward(self, x):
            return self.head(self.last(self.plain(x) + self.grouped(self.before(x))))

    groups = find_channel_groups(Sum())
    assert [group.name for group in groups.groups] == ["last"]
    assert groups.pinned["plain"] == "written by the grouped convolution grouped"


class _Small(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.twin = nn.Conv2d(3, 4, 3)
        self.more = nn.Conv2d(3, 8, 3)
        self.prelu = nn.PReLU(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.norm = nn.GroupNorm(2, 4)
        self.operation = operation

    def forward(self, x):
        return self.operation(self, x, self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(("operation", "node", "what"), [
    (lambda net, x, y: y.sigmoid(), "sigmoid", "Tensor.sigmoid"),
    (lambda net, x, y: torch.exp(y), "exp", "exp"),
    (lambda net, x, y: torch.cat([y, net.twin(x)], 1), "cat", "cat"),
    (lambda net, x, y: y + 1, "add", "not a channel"),
    (lambda net, x, y: y * net.twin(x), "mul", "mul"),
    (lambda net, x, y: y + net.more(x), "add", "4 and 8 channels"),
    (lambda net, x, y: net.prelu(y), "prelu", "PReLU"),
    (lambda net, x, y: net.norm(y), "norm", "GroupNorm"),
    (lambda net, x, y: y + net.conv(x), "conv_1", "used twice"),
    (lambda net, x, y: y.flatten(2), "flatten", "axes 2 to -1"),
    (lambda net, x, y: y.view(-1, 4, 6, 6), "view", "Tensor.view"),
    (lambda net, x, y: y.mean(1, keepdim=True), "mean", r"axes \[1\]"),
    (lambda net, x, y: nn.functional.linear(y, x), "linear", "linear"),
])  # fmt: skip
def test_what_channels_cannot_be_followed_through_is_named(operation, node, what):
    with pytest.raises(ValueError, match=f"node '{node}'.*{what}.*another backbone"):
        find_channel_groups(_Small(operation))


@pytest.mark.parametrize(("name", "match"), [
    ("vit_tiny_patch16_224", "node 'flatten' in module 'patch_embed'"),
    ("densenet121", "node 'cat' in module 'features.denseblock1.denselayer1'"),
    ("efficientnet_b0", "node 'blocks_0_0_se_gate' in module 'blocks.0.0.se.gate': Sigmoid"),
])  # fmt: skip
def test_backbones_that_cannot_be_masked_say_where(name, match):
    with pytest.raises(ValueError, match=match):
        groups_of(name)


def test_a_forward_that_branches_on_its_input_is_an_error():
    with pytest.raises(ValueError, match=r"torch\.fx does not trace"):
        find_channel_groups(_Small(lambda net, x, y: y if x.sum() > 0 else -y))


def test_a_batch_norm_without_weight_keeps_its_channels():
    net = _Small(lambda net, x, y: net.plain(y) + net.twin(x))
    with pytest.raises(ValueError, match="normalised by plain"):
        find_channel_groups(net, prune_output=True)


def test_features_that_are_flattened_maps_cannot_be_pruned():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="global pooling"):
        find_channel_groups(net, prune_output=True)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_channel_groups(pooled, prune_output=True).sizes == [4]


def test_an_output_that_is_not_one_tensor_is_an_error():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x), x

    with pytest.raises(ValueError, match="one tensor"):
        find_channel_groups(Two())


def test_a_network_without_channels_to_prune_is_an_error():
    with pytest.raises(ValueError, match=r"may be pruned.*'0': 'the output'"):
        find_channel_groups(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"'shared', 'inner'.*'independent'"):
        find_channel_groups(ToyResNet(), residual="independent")


def test_tracing_leaves_the_network_as_it_was():
    net = ToyResNet().train()
    net.bn_a1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    find_channel_groups(net, prune_output=True)
    assert net.training
    assert not net.bn_a1.training
    assert net.bn_a2.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_groups_are_plain_data():
    groups = find_channel_groups(ToyResNet(), prune_output=True)
    assert pickle.loads(pickle.dumps(groups)) == groups
    assert groups.sizes == [8, 8, 16, 16, 32, 32, 5]
    assert groups.index("a3") == 4
    with pytest.raises(ValueError, match=r"'a4'; near: \['a"):
        groups.index("a4")
    with pytest.raises(ValueError, match="one mask of shape"):
        groups.sparsity_terms([torch.ones(8)])
