"""Cutting networks: both halves together are the whole, whatever kind of network it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from avalanche.models import MTSimpleMLP, as_multitask
from torch import nn

from avalanche_ext.models.backbones import CIFARResNet, SmallConvNet
from avalanche_ext.models.mlp import MLP
from avalanche_ext.models.network_split import NetworkSplit, as_written


class Inplace(nn.Module):
    """A linear layer whose output the next one overwrites."""

    def __init__(self):
        super().__init__()
        self.low, self.act, self.top = nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.top(self.act(self.low(x)))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.top = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.top(self.low(x) + x)


class Twice(Inplace):
    """Calls one layer before and behind another; only the first call is the cut."""

    def forward(self, x):
        return self.top(self.act(self.low(self.act(self.low(x))[:, :1].expand(-1, 6))))


class Unused(Inplace):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Shapes(nn.Module):
    """A layer whose output has no row per sample."""

    def __init__(self):
        super().__init__()
        self.total, self.top = nn.Flatten(0), nn.Linear(6, 3)

    def forward(self, x):
        self.total(x)
        return self.top(x)


NETS = {
    "mlp": (lambda: MLP(6, (5, 4), 3), "features.1", (6,), (5,)),
    "last": (lambda: MLP(6, (5, 4), 3), "features.3", (6,), (4,)),
    "inplace": (Inplace, "low", (6,), (5,)),
    "conv": (lambda: SmallConvNet(4, 3, (4, 6)), "features.2", (3, 8, 8), (4, 8, 8)),
    "residual": (lambda: CIFARResNet(1, 5), "layer2", (3, 16, 16), (32, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_head_of_the_features_is_the_network(name):
    make, layer, shape, inner = NETS[name]
    net = make().eval()
    x = torch.randn(7, *shape)
    split = NetworkSplit(net, layer)
    u = split.features(x)
    assert u.shape == (7, *inner)
    kept = u.clone()
    torch.testing.assert_close(split.head(u, x), net(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(u, kept)  # though a layer behind works in place
    split.check(x)
    assert split.outputs == net(x).shape[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    pickle.loads(pickle.dumps(split))


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_the_head_are_those_of_the_whole(name):
    make, layer, shape, _ = NETS[name]
    net = make().double().eval()
    x = torch.randn(5, *shape, dtype=torch.float64)
    split = NetworkSplit(net, layer)
    below, _ = split.encoder_parts(x[:2])
    behind = {n: p for n, p in net.named_parameters() if n not in below}
    whole = torch.autograd.grad(net(x).square().sum(), list(behind.values()))
    u = split.features(x).detach()
    alone = torch.autograd.grad(split.head(u, x).square().sum(), list(behind.values()))
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_parts_in_front_are_those_that_the_features_depend_on():
    net = NETS["residual"][0]()
    below, ran = NetworkSplit(net, "layer2").encoder_parts(torch.randn(2, 3, 16, 16))
    top = {n.split(".")[0] for n in below}
    assert top == {"conv1", "bn1", "layer1", "layer2"}
    assert {n for n in dict(net.named_parameters()) if n.split(".")[0] in top} == set(below)
    assert net.layer1[0].bn2 in ran
    assert net.layer2 in ran
    assert net.layer3[0].bn1 not in ran
    assert net not in ran
    frozen = Inplace()
    frozen.low.requires_grad_(False)
    assert NetworkSplit(frozen, "low").encoder_parts(torch.randn(2, 6))[0] == {}


@torch.no_grad()
def test_the_head_does_not_run_for_features_and_one_sample_runs_for_the_head():
    net = MLP(6, (5, 4), 3)
    rows = {}
    for name in ("features.0", "classifier"):
        net.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: rows.setdefault(name, []).append(len(out))
        )
    split, x = NetworkSplit(net, "features.1"), torch.randn(7, 6)
    u = split.features(x)
    assert rows == {"features.0": [7]}
    split.head(u, x)
    assert rows == {"features.0": [7, 1], "classifier": [7]}


@pytest.mark.parametrize(
    "multi", [lambda: MTSimpleMLP(6, 5), lambda: as_multitask(MLP(6, (5,), 2), "classifier")]
)
def test_the_input_of_a_head_per_task(multi):
    net = multi().eval()
    x = torch.randn(4, 6)
    split = NetworkSplit(net, "classifier", "input")
    u = split.features(x, 0)
    assert u.shape == (4, 5)
    assert (u >= 0).all()
    torch.testing.assert_close(net.classifier(u, 0), net(x, 0))
    with split.replaced(2 * u):
        torch.testing.assert_close(net(x, 0), net.classifier(2 * u, 0))


def test_one_hears_a_copy():
    net, heard = Inplace(), []
    x = torch.randn(4, 6)
    split = NetworkSplit(net, "low")
    handle = split.listen(heard.append)
    net(x)
    handle.remove()
    net(x)
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], split.features(x))
    assert (heard[0] < 0).any()
    assert heard[0].requires_grad


@pytest.mark.parametrize("net", [Skip, Twice])
def test_a_connection_past_the_layer_is_refused(net):
    model = net()
    with pytest.raises(ValueError, match="depend on its output alone"):
        NetworkSplit(model, "low").check(torch.randn(2, 6))


def test_a_network_that_has_diverged_is_told_so():
    model = Inplace()
    model.top.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="diverged"):
        NetworkSplit(model, "low").check(torch.randn(2, 6))


@pytest.mark.parametrize(
    ("net", "layer", "match"),
    [
        (Inplace, "lo", "low"),
        (Inplace, "*o*", "2 layers"),
        (Unused, "spare", "None for a batch of 3"),
        (Shapes, "total", r"shape \(18,\)"),
    ],
)
def test_what_is_no_place_to_cut_is_refused(net, layer, match):
    with pytest.raises(ValueError, match=match):
        NetworkSplit(net(), layer).features(torch.randn(3, 6))


def test_compiled_modules_run_as_written_and_are_compiled_again_afterwards():
    net, calls = Inplace(), []
    plain = copy.deepcopy(net)

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    net.compile(backend=backend)
    compiled, x = net._compiled_call_impl, torch.randn(3, 6)
    torch.testing.assert_close(NetworkSplit(net, "low").features(x), plain.low(x))
    with as_written(net):
        net(x)
    assert calls == []
    assert net._compiled_call_impl is compiled
    net(x)
    assert len(calls) == 1
