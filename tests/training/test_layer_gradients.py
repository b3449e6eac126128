"""Sums of samples' gradients by layers against one backward pass for each sample, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.training.layer_gradients import LayerGradients

FUNCTIONS = {"square": torch.square, "abs": torch.abs}


class Tokens(nn.Module):
    """A linear layer that every position of a sample goes through."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(x)).mean((1, 2)))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5),
        nn.ReLU(inplace=True), nn.Conv2d(5, 4, (3, 2), padding="same", dilation=(1, 2)),
        nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1, padding="valid"), nn.Flatten(),
        nn.Linear(3 * 3 * 4, 3),
    )  # fmt: skip


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), (4,)),
    "batch_norm": (
        lambda: nn.Sequential(
            nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.BatchNorm1d(7, affine=False),
            nn.Linear(7, 3),
        ),
        (4,),
    ),
    "batch_norm_of_sequences": (
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(20, 3)), (5, 4),
    ),
    "convolutions": (convolutions, (2, 6, 7)),
    "tokens": (Tokens, (2, 5, 4)),
}  # fmt: skip


def made(name, n=9):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    model(3 * torch.randn(30, *shape, dtype=torch.float64) + 1)  # batch statistics of other samples
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
    x = torch.randn(n, *shape, dtype=torch.float64)
    return model.eval(), x, torch.randint(3, (n,))


def one_by_one(model, x, y, of):
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(len(x)):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, g in zip(sums, gradients, strict=True):
            sums[name] += 0 if g is None else of(g)
    return sums


def layered(model, room=1 << 20):
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return LayerGradients(model, parameters, room)


def loss_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y, reduction="sum")


@pytest.mark.parametrize("of", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_those_of_one_backward_pass_per_sample(name, of):
    model, x, y = made(name)
    layers = layered(model)
    assert layers.supported
    want = one_by_one(model, x, y, of)
    for room in (1 << 20, 1):  # all samples at a time, and one
        layers.room = room
        found = layers.sums(loss_of(model, x, y), of)
        assert found is not None
        assert found.keys() == want.keys()
        for key, total in found.items():
            torch.testing.assert_close(total, want[key], rtol=1e-10, atol=1e-12)
            assert not total.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_layers_and_those_out_of_reach():
    model, x, y = made("mlp")
    model[0].requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2).double())
    model.forward = lambda z: model[2](model[1](model[0](z)))
    found = layered(model).sums(loss_of(model, x, y), torch.square)
    assert found is not None
    assert list(found) == ["2.weight", "2.bias", "unused.weight", "unused.bias"]
    assert not found["unused.weight"].any()
    want = one_by_one(model, x, y, torch.square)
    torch.testing.assert_close(found["2.weight"], want["2.weight"])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(torch.relu(self.layer(x))))


class Elsewhere(Twice):
    """A weight that its layer does not tell everything about."""

    def forward(self, x):
        return self.head(torch.relu(F.linear(self.layer(x), self.layer.weight)))


class Shared(Twice):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.head(self.other(torch.relu(self.layer(x))))


@pytest.mark.parametrize("make", [Twice, Elsewhere])
def test_a_layer_that_does_not_tell_everything_is_noticed(make):
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(6, 4), torch.randint(3, (6,))
    layers = layered(model)
    assert layers.supported
    assert layers.sums(loss_of(model, x, y), torch.square) is None


def test_a_layer_that_runs_twice_in_a_later_batch_is_noticed():
    torch.manual_seed(0)
    model, x, y = Twice().eval(), torch.randn(6, 4), torch.randint(3, (6,))
    layers = layered(model)
    layers.checked = True  # as after a first batch that it passed once
    assert layers.sums(loss_of(model, x, y), torch.square) is None


@pytest.mark.parametrize(
    "model",
    [
        Shared(),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    ],
    ids=["shared", "groups", "circular", "no_statistics", "layer_norm", "weight_norm"],
)
def test_other_networks_are_not_taken(model):
    assert not layered(model).supported
