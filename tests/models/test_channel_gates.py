"""Networks under masks, against masks laid on by hooks, layer by layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.channel_gates import GatedNetwork
from avalanche_ext.models.channel_groups import find_channel_groups
from avalanche_ext.models.mlp import MLP
from tests.models.channel_nets import Flattened, ToyResNet, binary, lively, masked_by_hooks


def gated(network, **kwargs):
    groups = find_channel_groups(network, prune_output=True)
    generator = torch.Generator().manual_seed(1)
    return GatedNetwork(network, groups=groups, generator=generator, **kwargs)


NETWORKS = {
    "toy": (lambda: ToyResNet(), (3, 8, 8)),
    "toy_bias": (lambda: ToyResNet(bias=True), (3, 8, 8)),
    "flattened": (lambda: Flattened(), (3, 8, 8)),
    "mlp": (lambda: MLP(12, (7, 5), 0), (3, 2, 2)),
    "small_convnet": (lambda: build_backbone("small_convnet", 0, (3, 8, 8)), (3, 8, 8)),
    "mobilenet": (lambda: build_backbone("mobilenetv2_050", 0, (3, 32, 32)), (3, 32, 32)),
    "preact": (lambda: build_backbone("resnetv2_18", 0, (3, 32, 32)), (3, 32, 32)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_act_as_if_each_layers_output_were_multiplied(name, training):
    make, shape = NETWORKS[name]
    net = gated(lively(make()).double()).double().train(training)
    masks = [m.detach() for m in net.masks(hard=False)]
    masks = [torch.rand_like(m) for m in masks]
    x = torch.randn(6, *shape, dtype=torch.float64)
    twin = copy.deepcopy(net.network)
    expected = masked_by_hooks(twin, net.groups, masks, x)
    torch.testing.assert_close(net(x, masks), expected, rtol=1e-9, atol=1e-9)
    # Batch statistics move as they would, in the network itself.
    ours, theirs = net.network.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-9)


def test_open_masks_change_nothing():
    net = gated(lively(ToyResNet()))
    x = torch.randn(3, 3, 8, 8)
    ones = [torch.ones(n) for n in net.groups.sizes]
    assert torch.equal(net(x, ones), net.network(x))
    assert net.eval().masks()[0].tolist() == [1] * 8  # drawn from 0 to 2: all open
    assert torch.equal(net(x), net.network(x))


def test_closed_channels_of_the_features_are_exactly_zero():
    net = gated(lively(build_backbone("cifar_resnet32", 0, (3, 32, 32)))).eval()
    with torch.no_grad():
        net.embeddings[0].normal_()
    masks = net.masks()
    out = net(torch.randn(2, 3, 32, 32))
    closed = masks[net.groups.output] == 0
    assert 0 < closed.sum() < 64
    assert (out[:, closed] == 0).all()
    assert (out[:, ~closed] != 0).any()


def test_a_mask_behind_batch_norm_scales_the_features_by_as_much():
    net = gated(build_backbone("small_convnet", 0, (3, 8, 8))).train()
    x = torch.randn(4, 3, 8, 8)
    ones = [torch.ones(n) for n in net.groups.sizes]
    scaled = net(x, [*ones[:2], 0.25 * ones[2]])
    torch.testing.assert_close(scaled, 0.25 * net(x, ones))
    # In front of the next batch norm a common scale is normalised away (up to its epsilon).
    within = net(x, [0.25 * ones[0], *ones[1:]])
    torch.testing.assert_close(within, net(x, ones), rtol=0.02, atol=0.02)


def test_the_gradients_of_the_embeddings_are_those_of_the_plain_sigmoid():
    net = gated(lively(Flattened()).double(), s_max=30.0).double().train()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    net.anneal(3, 3)
    e = net.embeddings[0]
    net(x).square().sum().backward()
    masks = [m.detach().requires_grad_() for m in net.masks()]
    net(x, masks).square().sum().backward()
    slope = e.detach().sigmoid() * (1 - e.detach().sigmoid())
    torch.testing.assert_close(e.grad, torch.cat([m.grad for m in masks]) * slope)
    assert (e.grad != 0).all()


def test_weights_get_the_gradient_through_the_mask():
    net = gated(lively(Flattened()).double()).double().eval()
    masks = [torch.rand(n, dtype=torch.float64) for n in net.groups.sizes]
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    net(x, masks).square().sum().backward()
    twin = copy.deepcopy(net.network)
    twin.zero_grad()
    masked_by_hooks(twin, net.groups, masks, x).square().sum().backward()
    for (name, ours), theirs in zip(net.network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-9, atol=1e-9)


def test_training_uses_soft_masks_and_evaluation_hard_ones():
    net = gated(ToyResNet(), s_max=10.0)
    with torch.no_grad():
        net.embeddings[0].normal_()
    net.anneal(1, 5)
    soft = torch.cat(net.train().masks())
    torch.testing.assert_close(soft, torch.sigmoid(0.1 * net.embeddings[0]))
    assert torch.cat(net.eval().masks()).unique().tolist() == [0, 1]
    assert torch.equal(torch.cat(net.masks(hard=False)), soft)
    held = net.s
    net.anneal(5, 5)
    assert net.s is held  # a captured graph reads the same memory
    assert held.item() == 10
    assert held.ndim == 0


def test_soft_masks_at_a_large_scale_are_the_hard_ones():
    net = gated(lively(ToyResNet()), s_max=1e6).eval()
    with torch.no_grad():
        net.embeddings[0].normal_()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(net(x, net.masks(hard=False)), net(x))


def test_each_task_has_embeddings_of_its_own():
    net = gated(ToyResNet())
    first = net.embeddings[0].clone()
    second = net.add_task(torch.Generator().manual_seed(2), -1.0, 1.0)
    assert len(net.embeddings) == 2
    assert -1 <= second.min() < 0 < second.max() <= 1
    net(torch.randn(3, 3, 8, 8)).sum().backward()  # the last task by default
    assert net.embeddings[0].grad is None
    assert net.embeddings[1].grad.abs().sum() > 0
    assert torch.equal(torch.cat(net.masks(0, hard=False)), torch.sigmoid(100 * first))
    same = gated(ToyResNet())
    assert torch.equal(same.embeddings[0], first)  # the generator alone decides


def test_the_sparsity_loss_of_hard_masks_counts_the_kept_weights():
    net = gated(ToyResNet()).eval()
    keep = [torch.arange(n) for n in (4, 3, 10, 5, 20, 11, 2)]
    masks = binary(net.groups, keep)
    # 3 x 3 stem and two per stage, 1 x 1 shortcuts, 4 columns per channel of the linear layer
    sizes = dict(zip([g.name for g in net.groups.groups], (4, 3, 10, 5, 20, 11, 2), strict=True))
    stem, a1, a2, b2, a3, b3, rows = (sizes[n] for n in ("stem", "a1", "a2", "b2", "a3", "b3",
                                                         "rows"))  # fmt: skip
    kept = 9 * (3 * stem + stem * a1 + a1 * stem + stem * a2 + a2 * b2 + b2 * a3 + a3 * b3)
    kept += stem * b2 + b2 * b3 + 4 * b3 * rows
    total = 9 * (3 * 8 + 8 * 8 * 2 + 8 * 16 + 16 * 16 + 16 * 32 + 32 * 32) + 8 * 16 + 16 * 32
    total += 4 * 32 * 5
    assert net.sparsity_loss(masks).item() == pytest.approx(kept / total, rel=1e-6)
    shares = {"stem": stem / 8, "a1": stem * a1 / 64, "rows": b3 * rows / 160}
    with torch.no_grad():
        net.embeddings[0].copy_(torch.cat(masks) - 0.5)
    found = net.kept_share()
    assert {name: found[name] for name in shares} == pytest.approx(shares)
    assert net.sparsity_loss().item() == pytest.approx(kept / total, rel=1e-6)
    assert [k.tolist() for k in net.kept()] == [k.tolist() for k in keep]


def test_a_group_never_closes_altogether():
    net = gated(ToyResNet(), min_share=0.1).eval()
    assert net.least == [1, 1, 2, 2, 4, 4, 1]
    with torch.no_grad():
        net.embeddings[0].copy_(torch.arange(117.0))
        net.embeddings[0][:8] = -torch.arange(1.0, 9.0)
    with pytest.warns(UserWarning, match=r"stem \(0 of 8 open, 1 kept\); those of largest"):
        kept = net.kept()
    assert kept[0].tolist() == [0]
    assert net.masks()[0].tolist() == [1] + 7 * [0]  # evaluation sees what surgery will leave


def test_one_channel_stays_whatever_the_share():
    net = gated(ToyResNet(), min_share=0.0)
    assert net.least == [1] * 7


def test_no_warning_where_nothing_had_to_be_rescued(recwarn):
    net = gated(ToyResNet())
    with torch.no_grad():
        net.embeddings[0][1:8] = -1.0  # one of 8 is open: the least there may be
    assert net.kept()[0].tolist() == [0]
    assert not recwarn.list


def test_the_share_kept_of_depthwise_filters_is_that_of_the_channels():
    net = gated(Flattened())
    with torch.no_grad():
        net.embeddings[0].copy_(torch.cat([torch.arange(n) % 2 - 0.5 for n in (4, 5, 7, 6)]))
    expected = {"first": 1 / 2, "depth": 1 / 2, "second": 1 / 2 * 2 / 5, "hidden": 2 / 5 * 3 / 7,
                "last": 3 / 7 * 1 / 2}  # fmt: skip
    assert net.kept_share() == pytest.approx(expected)


def test_embeddings_stay_within_their_limit():
    net = gated(ToyResNet())
    with torch.no_grad():
        net.embeddings[0][:3] = torch.tensor([9.0, -9.0, 5.0])
    net.clamp_embeddings()
    assert net.embeddings[0][:3].tolist() == [6, -6, 5]


def test_the_share_of_ambiguous_gates():
    net = gated(ToyResNet(), s_max=100.0)
    with torch.no_grad():
        net.embeddings[0].fill_(1.0)[:39] = 0.01
    assert net.ambiguous_share() == pytest.approx(39 / 117)


def test_copies_and_state_dictionaries_give_the_same():
    net = gated(lively(ToyResNet())).train()
    net.add_task()
    net.anneal(2, 7)
    x = torch.randn(3, 3, 8, 8)
    fresh = gated(ToyResNet())
    fresh.add_task()
    fresh.load_state_dict(net.state_dict())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh.train()]
    expected = net(x)
    for twin in copies:
        assert torch.equal(twin(x), expected)
        assert twin.s == net.s
    assert set(net.network.state_dict()) == set(ToyResNet().state_dict())


def test_a_compiled_step_is_not_compiled_again_when_the_scale_grows():
    net = gated(lively(ToyResNet())).train()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(3, 3, 8, 8)
    for b in range(1, 5):
        net.anneal(b, 4)
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_hat_keeps_the_outputs_of_an_earlier_task():
    torch.manual_seed(0)
    net = GatedNetwork(MLP(6, (8, 8), 3), s_max=50.0)
    head = net.network.classifier
    with torch.no_grad():
        net.embeddings[0].normal_()
    net.add_task()
    before = net.masks(0, hard=True)
    protect = net.gradient_masks(before)
    assert set(protect) == {f"features.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}
    x = torch.randn(9, 6)
    head.requires_grad_(False)  # HAT has a head per task
    expected = net(x, before)
    weights = {k: net.network.features[k].weight.clone() for k in (0, 2)}
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        for name, factor in protect.items():
            net.network.get_parameter(name).grad.mul_(factor)
        optimizer.step()
    assert torch.equal(net(x, before), expected)
    for k in (0, 2):  # what was free has moved
        weight, old = net.network.features[k].weight, weights[k]
        free = (protect[f"features.{k}.weight"] > 0).expand_as(weight)
        assert 0 < free.sum() < free.numel()
        assert (weight[free] != old[free]).any()


def test_gradient_masks_of_convolutions_norms_and_flattened_maps():
    net = gated(Flattened())
    sizes = net.groups.sizes
    before = [torch.rand(n) for n in sizes]
    found = net.gradient_masks(before)
    named = dict(net.network.named_parameters())
    assert set(found) == set(named)
    for name, factor in found.items():
        assert torch.broadcast_shapes(factor.shape, named[name].shape) == named[name].shape
    first, second, hidden, _ = before
    torch.testing.assert_close(found["depth.weight"].flatten(), 1 - first)
    torch.testing.assert_close(found["flat_bn.bias"], 1 - second.repeat_interleave(4))
    torch.testing.assert_close(
        found["second.weight"][3, 2, 0, 0], 1 - torch.minimum(second[3], first[2])
    )
    torch.testing.assert_close(
        found["hidden.weight"][6, 9], 1 - torch.minimum(hidden[6], second[2])
    )


@pytest.mark.parametrize(("kwargs", "match"), [
    ({"s_max": 0.0}, "s_max > 0"), ({"compensation": "full"}, "'exact', 'hat', 'none'"),
    ({"min_share": 1.5}, "min_share from 0 to 1"),
])  # fmt: skip
def test_settings_out_of_range_are_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        GatedNetwork(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), **kwargs)


def test_masks_of_wrong_sizes_are_errors():
    net = gated(ToyResNet())
    with pytest.raises(ValueError, match="one mask of shape"):
        net(torch.randn(1, 3, 8, 8), [torch.ones(8)])
