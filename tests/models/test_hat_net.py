"""HATNet against a two-layer network with masks, worked by hand in float64."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from avalanche_ext.functional.channel_mask import compensate_hat
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.hat_net import UNKNOWN_LOGIT, HATNet
from avalanche_ext.models.mlp import MLP
from tests.conftest import class_stream


def net(tasks=(), **kwargs):
    """Two hidden layers of 5 and 4 units, and the tasks ``(label, classes)``."""
    model = HATNet(MLP(6, (5, 4), 0), **kwargs)
    for label, classes in tasks:
        model.add_task(label, classes)
        model.max_class_label = max(model.max_class_label, *(c + 1 for c in classes))
    return model


TWO = ((7, [0, 1]), (3, [2, 4, 5]))


def experience(index, labels, classes):
    return SimpleNamespace(
        current_experience=index, task_labels=labels, classes_in_this_experience=classes
    )


def by_hand(model, x, position, s):
    """Logits of one task, the masks multiplied onto the activations."""
    first, second = model.gates.network.features[0], model.gates.network.features[2]
    m = torch.sigmoid(s * model.gates.embeddings[position])
    h = m[:5] * torch.relu(x @ first.weight.T + first.bias)
    h = m[5:] * torch.relu(h @ second.weight.T + second.bias)
    z = h @ model.heads[position].weight.T + model.heads[position].bias
    out = torch.full((len(x), model.max_class_label), UNKNOWN_LOGIT, dtype=x.dtype)
    out[:, model.classes[position]] = z
    return out


# values -----------------------------------------------------------------------------------------


def test_masks_multiply_the_activations_of_every_layer_before_the_tasks_head():
    model = net(TWO, s_max=3.0).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    model.gates.anneal(2, 5)
    scale = 1 / 3 + (3 - 1 / 3) / 4
    assert model.gates.s.item() == pytest.approx(scale)
    model.train()  # the newest task at the scale of the batch, others at the last one
    torch.testing.assert_close(model.forward_single_task(x, 3), by_hand(model, x, 1, scale))
    torch.testing.assert_close(model.forward_single_task(x, 7), by_hand(model, x, 0, 3.0))
    model.eval()
    torch.testing.assert_close(model.forward_single_task(x, 3), by_hand(model, x, 1, 3.0))
    torch.testing.assert_close(model.forward_single_task(x, 7), by_hand(model, x, 0, 3.0))
    assert model.gates.s.item() == pytest.approx(scale)


def test_a_batch_of_several_tasks_is_that_of_each():
    model = net(TWO)
    x = torch.randn(12, 6)
    labels = torch.tensor([3, 7, 9, 7, 3, 3, 9, 7, 7, 3, 7, 7])
    for mode in (True, False):
        model.train(mode)
        mixed = model(x, labels)
        for label in (3, 7, 9):
            mine = labels == label
            torch.testing.assert_close(mixed[mine], model(x[mine], label))
        assert not torch.equal(model(x, 3), model(x, 7))


def test_labels_of_other_tasks_and_tasks_that_were_not_trained_on():
    model = net(TWO)
    z = model(torch.randn(8, 6), torch.tensor([7] * 4 + [3] * 4))
    assert z.shape == (8, 6)
    assert (z[:4, 2:] == UNKNOWN_LOGIT).all()
    assert (z[4:][:, [0, 1, 3]] == UNKNOWN_LOGIT).all()
    assert z[:4, :2].abs().max() < 10
    assert z[4:][:, [2, 4, 5]].abs().max() < 10
    strange = model(torch.randn(8, 6), 5)
    assert strange.unique().tolist() == [UNKNOWN_LOGIT]
    loss = nn.functional.cross_entropy(strange, torch.arange(8) % 6)
    assert loss.item() == pytest.approx(torch.tensor(6.0).log().item())


def test_all_tasks_at_once():
    model = net(TWO).eval()
    model.known_train_tasks_labels = {3, 7}
    x = torch.randn(4, 6)
    found = model(x, None)
    assert found.keys() == {3, 7}
    assert torch.equal(found[7], model(x, 7))


def test_the_gradient_of_the_embeddings_is_the_compensated_one():
    torch.manual_seed(1)
    model = net(TWO, s_max=20.0).double().train()
    x = torch.randn(9, 6, dtype=torch.float64)
    model.gates.anneal(3, 5)
    s = model.gates.s
    twin = copy.deepcopy(model)
    model(x, 3)[:, [2, 4, 5]].square().sum().backward()
    by_hand(twin, x, 1, s)[:, [2, 4, 5]].square().sum().backward()
    found, e = model.gates.embeddings[1].grad, twin.gates.embeddings[1]
    torch.testing.assert_close(found, compensate_hat(e.grad, e.detach(), s, 20.0))
    assert (found != 0).any()
    assert model.gates.embeddings[0].grad is None


def test_what_earlier_tasks_use_is_the_largest_of_their_masks():
    model = net((*TWO, (0, [0])), s_max=2.0)
    with torch.no_grad():
        values = [0.0, 1, -1], [2.0, 0, -3], [9.0, 9, 9]
        for e, value in zip(model.gates.embeddings, values, strict=True):
            e[:3] = torch.tensor(value)
            e[3:] = -6
    gate = {v: 1 / (1 + torch.tensor(-2.0 * v).exp().item()) for v in (-3, -1, 0, 1, 2)}
    assert [u.tolist() for u in model.used(0)] == [[0] * 5, [0] * 4]
    assert model.used(1)[0][:3].tolist() == pytest.approx([gate[0], gate[1], gate[-1]])
    assert model.used(2)[0][:3].tolist() == pytest.approx([gate[2], gate[1], gate[-1]])
    assert model.used(2)[0][3:].tolist() == pytest.approx([6.144e-06] * 2, rel=1e-3)
    model.gates.anneal(1, 9)  # the scale of the moment plays no part
    assert model.used(1)[0][0].item() == 0.5
    assert not any(u.requires_grad for u in model.used(3))


def test_hard_masks_are_binary_and_leave_a_channel_open():
    model = net(TWO, hard=True, s_max=2.0)
    with torch.no_grad():
        model.gates.embeddings[0].copy_(torch.tensor([0.1, -0.1, 0, -1, 1, -4, -3, -2, -1]))
    assert torch.cat(model.final_masks(0)).tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 1]
    x = torch.randn(5, 6)
    assert torch.equal(model.eval()(x, 7), model.train()(x, 7))
    soft = net(TWO, s_max=2.0)
    soft.load_state_dict(model.state_dict())
    assert not torch.equal(soft.eval()(x, 7), model.eval()(x, 7))


# growth -----------------------------------------------------------------------------------------


def test_a_task_brings_its_head_and_embeddings_and_freezes_the_others():
    model = net(TWO[:1])
    first = [p for name, p in model.named_parameters() if ".0" in name and "network" not in name]
    kept = [p.detach().clone() for p in first]
    assert len(first) == 3
    assert all(p.requires_grad for p in model.parameters())
    model.add_task(3, [2, 4, 5])
    assert not any(p.requires_grad for p in first)
    assert all(torch.equal(p, old) for p, old in zip(first, kept, strict=True))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"gates.embeddings.0", "heads.0.weight", "heads.0.bias"}
    assert [head.out_features for head in model.heads] == [2, 3]
    assert model.tasks == [7, 3]


def test_embeddings_are_drawn_from_a_standard_normal():
    torch.manual_seed(0)
    model = HATNet(MLP(2, (4000,), 0))
    model.add_task(0, [0])
    model.add_task(1, [0])
    for e in model.gates.embeddings:
        assert abs(e.mean().item()) < 0.05
        assert e.std().item() == pytest.approx(1, abs=0.05)


def test_adaptation_adds_tasks_in_training_alone_and_draws_nothing_in_evaluation():
    model = net().eval()
    state = torch.get_rng_state()
    model.adaptation(experience(0, [1], [4]))
    assert (model.tasks, model.max_class_label) == ([], 5)
    assert torch.equal(state, torch.get_rng_state())
    assert model(torch.randn(2, 6), 1).shape == (2, 5)
    model.train().adaptation(experience(0, [1], [0, 1]))
    assert (model.tasks, model.classes) == ([1], [[0, 1]])
    head = model.heads[0].weight.detach().clone()
    model.adaptation(experience(0, [1], {1, 0}))  # once more the same experience
    assert torch.equal(model.heads[0].weight, head)
    model.adaptation(experience(1, [0], [0, 1]))
    assert model.tasks == [1, 0]
    assert model.known_train_tasks_labels == {0, 1}


@pytest.mark.parametrize("labels", [[0], [1], [5, 6], []])
def test_an_experience_needs_a_task_label_of_its_own(labels):
    model = net().train()
    model.adaptation(experience(0, [0], [0, 1]))
    model.adaptation(experience(1, [1], [0, 1]))
    with pytest.raises(ValueError, match=r"experience 2 has the task labels .*scenario='task'"):
        model.adaptation(experience(2, labels, [0, 1]))
    no_labels = experience(2, [], [0, 1])
    del no_labels.task_labels
    with pytest.raises(ValueError, match="one task per experience"):
        model.adaptation(no_labels)
    assert model.tasks == [0, 1]


def test_avalanches_own_experiences_are_understood():
    model = net().train()
    for e in class_stream(3, task_labels=True).train_stream:
        model.adaptation(e)
    assert (model.tasks, model.classes) == ([0, 1, 2], [[0, 1], [2, 3], [4, 5]])
    assert model(torch.randn(2, 6), torch.tensor([0, 2])).shape == (2, 6)


# batch statistics -------------------------------------------------------------------------------


def test_each_task_has_batch_statistics_of_its_own():
    torch.manual_seed(0)
    model = HATNet(build_backbone("small_convnet", 0, (1, 8, 8)))
    model.max_class_label = 2
    norm = model.gates.network.features[1]
    with torch.no_grad():
        norm.running_mean.fill_(0.5)
    model.add_task(0, [0, 1])
    model.add_task(1, [0, 1])
    x = torch.randn(16, 1, 8, 8)
    before = model.eval()(x, 0), model(x, 1)
    assert not torch.equal(*before)
    model.train()(x, 1)
    maps = model.gates.network.features[0](x)
    mean, _, count = list(model.statistics[1].buffers())[:3]
    torch.testing.assert_close(mean, 0.9 * 0.5 + 0.1 * maps.mean((0, 2, 3)))
    assert count == 1
    assert norm.running_mean.unique().item() == 0.5
    assert torch.equal(model.eval()(x, 0), before[0])
    assert not torch.equal(model(x, 1), before[1])


# objects ----------------------------------------------------------------------------------------


def test_copies_and_state_dictionaries_give_the_same():
    model = net(TWO, s_max=30.0).train()
    model.gates.anneal(2, 3)
    x, labels = torch.randn(6, 6), torch.tensor([3, 7] * 3)
    fresh = net(TWO, s_max=30.0)
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.train()):
        assert torch.equal(twin(x, labels), model(x, labels))
    model.add_task(0, [1])
    assert len(fresh.heads) == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HATNet(nn.Sequential(nn.Linear(3, 4), nn.ReLU())), "num_features or out_dim"),
        (lambda: net(s_max=0.0), "s_max > 0"),
        (lambda: net(s_max=float("inf")), "s_max > 0"),
        (lambda: net(compensation="full"), "'exact', 'hat', 'none'"),
        (lambda: HATNet(build_backbone("vit_tiny_patch16_224", 0, (3, 224, 224))), "followed"),
    ],
)
def test_what_it_cannot_use_is_an_error(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_backbone_with_a_classifier_is_refused():
    model = HATNet(MLP(6, (5, 4), 3))
    model.adaptation(experience(0, (0,), (0, 1)))
    with pytest.raises(ValueError, match=r"HATNet expects features \(B, 4\).*got \(2, 3\)"):
        model(torch.randn(2, 6), torch.zeros(2, dtype=torch.int64))
