"""Bridges between spaces whose relation is known."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from avalanche_ext.functional.linear_map import ridge
from avalanche_ext.models.bridges import Bridges, align


def rotation(d=6):
    return torch.linalg.qr(torch.randn(d, d))[0]


def spaces(n=4, rows=200, d=6):
    """The same samples in spaces that are turned against each other, oldest first."""
    found = [torch.randn(rows, d)]
    for _ in range(n - 1):
        found.append(found[-1] @ rotation(d).T + torch.randn(d))
    return found


def row(features, kind="linear", **options):
    bridges = Bridges(kind, **options)
    r2 = [bridges.extend(new, old, torch.Generator().manual_seed(k))
          for k, (old, new) in enumerate(itertools.pairwise(features))]  # fmt: skip
    return bridges, r2


@pytest.mark.parametrize("compose", ["chain", "direct"])
def test_turned_spaces_are_led_back_exactly(compose):
    features = spaces()
    bridges, r2 = row(features, compose=compose, lam=0.0)
    assert bridges.newest == 3
    assert r2 == pytest.approx([1.0] * 3, abs=1e-6)
    new = torch.randn(5, 6)  # samples that the bridges were not fitted on
    path = [new]
    for old, later in itertools.pairwise(features):
        weight, bias = ridge(old, later, 0.0)
        path.append(path[-1] @ weight.T + bias)
    for space in range(4):
        torch.testing.assert_close(bridges(path[3], space), path[space], atol=1e-4, rtol=0)
    head = nn.Linear(6, 3)
    torch.testing.assert_close(head(bridges(path[3], 0)), head(new), atol=1e-4, rtol=0)


def test_the_newest_space_is_left_as_it_is():
    bridges, _ = row(spaces(2))
    u = torch.randn(3, 6)
    assert bridges(u, 1) is u
    assert Bridges()(u, 0) is u


def test_a_chain_applies_its_bridges_one_after_the_other():
    features = [torch.randn(50, 6) for _ in range(3)]
    bridges, _ = row(features, lam=0.5)
    weights = [ridge(new, old, 0.5) for old, new in itertools.pairwise(features)]
    u = torch.randn(4, 6)
    once = u @ weights[1][0].T + weights[1][1]
    torch.testing.assert_close(bridges(u, 1), once)
    torch.testing.assert_close(bridges(u, 0), once @ weights[0][0].T + weights[0][1])


def test_direct_maps_aim_at_what_the_maps_before_gave():
    features = [torch.randn(50, 6) for _ in range(3)]
    bridges, _ = row(features, compose="direct", lam=0.5)
    first = ridge(features[1], features[0], 0.5)
    target = features[1] @ first[0].T + first[1]
    for space, aim in ((0, target), (1, features[1])):
        weight, bias = ridge(features[2], aim, 0.5)
        torch.testing.assert_close(bridges.maps[space].weight, weight)
        torch.testing.assert_close(bridges.maps[space].bias, bias)


def test_spaces_may_differ_in_size():
    old, new = torch.randn(40, 3), torch.randn(40, 7)
    bridges, _ = row([old, new])
    assert bridges(torch.randn(5, 7), 0).shape == (5, 3)


def test_a_network_finds_what_no_affine_map_does():
    new = torch.randn(400, 2)
    old = torch.stack([new[:, 0].abs(), new[:, 1].abs()], 1)
    _, linear = row([old, new])
    network, bent = row([old, new], "mlp")
    assert linear[0] < 0.1
    assert bent[0] > 0.9
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_a_network_asks_no_random_numbers_but_its_generators():
    features = spaces(2, rows=30)
    state = torch.get_rng_state()
    (a, _), (b, _) = row(features, "mlp"), row(features, "mlp")
    assert torch.equal(torch.get_rng_state(), state)
    other = Bridges("mlp")
    other.extend(features[1], features[0], torch.Generator().manual_seed(9))
    u = torch.randn(3, 6)
    assert torch.equal(a(u, 0), b(u, 0))
    assert not torch.equal(a(u, 0), other(u, 0))


@pytest.mark.parametrize("compose", ["chain", "direct"])
def test_networks_that_were_trained_apart_are_aligned(compose):
    features = spaces()
    bridges = align(features, compose=compose, lam=0.0)
    for space in range(4):
        torch.testing.assert_close(bridges(features[3], space), features[space], atol=1e-4, rtol=0)
    torn = [torch.randn(50, 4) for _ in range(3)]
    direct = align(torn, compose="direct")
    torch.testing.assert_close(direct.maps[0].weight, ridge(torn[2], torn[0])[0])


def test_bridges_can_be_copied_and_pickled():
    features = spaces(3)
    bridges, _ = row(features)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(bridges)))
    assert torch.equal(twin(features[2], 0), bridges(features[2], 0))
    assert sum(p.numel() for p in bridges.parameters()) == 2 * (6 * 6 + 6)


@pytest.mark.parametrize("options", [{"kind": "cubic"}, {"compose": "tree"}, {"lam": -1.0}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match="'linear' or 'mlp'"):
        Bridges(**options)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="spaces 0 to 0; got a request for 1"):
        Bridges()(torch.zeros(1, 2), 1)
    with pytest.raises(ValueError, match="got 1"):
        align([torch.zeros(3, 2)])
