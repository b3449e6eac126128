"""What a masked generator has made it makes for ever; capacity is counted and grows."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import astuple

import pytest
import torch
from torch import nn

from avalanche_ext.models.generators.base import Generator
from avalanche_ext.models.generators.discriminator import UNSEEN_LOGIT, Discriminator
from avalanche_ext.models.generators.masked import MASKS, MaskedGenerator
from avalanche_ext.models.modes import evaluating

KINDS = list(itertools.product(("mlp", "conv"), MASKS))


def tiny(kind=("mlp", "units"), **options):
    torch.manual_seed(0)
    network, masks = kind
    options = {"n_classes": 6, "widths": (7, 5) if network == "mlp" else (6,), "latent": 3,
               "s_max": 50.0, **options}  # fmt: skip
    return MaskedGenerator((1, 4, 4), network=network, masks=masks, **options)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def learn(model, classes, *, steps=12, lam=0.5):
    """A task: some steps of Adam towards random images, then the masks are made binary."""
    model.begin_task(classes)
    model.train()
    optimizer = torch.optim.Adam(model.sample_parameters(), 0.05)
    for step in range(steps):
        model.anneal(step + 1, steps)
        y = torch.tensor(list(classes) * 4)
        made = model.make(model.noise(len(y), draws(step)), y)
        loss = (made - 2 * torch.rand(made.shape) + 1).square().mean() + lam * model.sparsity()
        optimizer.zero_grad()
        loss.backward()
        model.hold()
        optimizer.step()
        model.clamp_embeddings()
    return model.end_task()


def fixed_samples(model, classes):
    """Samples of fixed noise, class by class and of all classes at once."""
    z = model.noise(9, draws(5))
    with torch.no_grad(), evaluating(model):
        alone = [model.decode(z, torch.full((9,), c)) for c in classes]
        single = [model.decode(z[:1], torch.tensor([c])) for c in classes]
        mixed = model.decode(z, torch.tensor(list(classes) * 9)[:9])
    return [*alone, *single, mixed]


# nothing is forgotten ---------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_old_samples_are_the_same_bit_for_bit_after_later_tasks(kind, expand):
    model, want = tiny(kind, expand=expand), []
    shapes = [tuple(layer.weight.shape) for layer in model.hidden]
    for t in range(3):
        learn(model, [2 * t, 2 * t + 1])
        for old, samples in want:
            found = fixed_samples(model, old)
            assert all(torch.equal(a, b) for a, b in zip(found, samples, strict=True))
        want.append(([2 * t, 2 * t + 1], fixed_samples(model, [2 * t, 2 * t + 1])))
    grown = [tuple(layer.weight.shape) for layer in model.hidden] != shapes
    assert grown == expand


@pytest.mark.parametrize("kind", KINDS)
def test_protected_weights_keep_every_bit_and_others_learn(kind):
    model = tiny(kind)
    learn(model, [0])
    learn(model, [1])
    seen = []
    begin = model.begin_task

    def watched(classes):
        begin(classes)  # it grows
        seen.extend((x.weight.detach().clone(), x.protected) for x in model.hidden)

    model.begin_task = watched
    learn(model, [2])
    for layer, (weight, protected) in zip(model.hidden, seen, strict=True):
        assert protected.any()
        assert torch.equal(layer.weight[protected], weight[protected])
        assert (layer.weight != weight)[~protected].any()


def test_a_weight_between_reserved_channels_is_protected():
    model = tiny(expand=False)
    model.begin_task([0])
    assert not any(layer.protected.any() for layer in model.hidden)
    for layer in model.hidden:
        with torch.no_grad():
            layer.tasks[0].embedding.fill_(-1.0)[[0, 2]] = 1.0
    model.end_task()
    model.begin_task([1])
    first, second = (layer.protected for layer in model.hidden)
    for i, j in itertools.product(range(7), range(3 + 6)):
        assert first[i, j] == (i in (0, 2))  # the noise serves every task
    for i, j in itertools.product(range(5), range(7)):
        assert second[i, j] == (i in (0, 2) and j in (0, 2))


def test_a_weight_with_an_open_gate_is_protected():
    model = tiny(("mlp", "weights"), expand=False)
    model.begin_task([0])
    masks = [layer.tasks[0].embedding >= 0 for layer in model.hidden]
    model.end_task()
    model.begin_task([1])
    for layer, mask in zip(model.hidden, masks, strict=True):
        assert torch.equal(layer.protected, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_old_tasks_stay_in_training_mode_too(kind):
    model = tiny(kind)
    learn(model, [0, 1])
    model.begin_task([2])
    model.train()
    old = [copy.deepcopy(layer.tasks[0].state_dict()) for layer in model.hidden]
    new = [layer.tasks[1].norm.running_mean.clone() for layer in model.hidden]
    model.make(model.noise(8, draws()), torch.tensor([0, 2] * 4))
    for layer, before, mean in zip(model.hidden, old, new, strict=True):
        after = layer.tasks[0].state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not torch.equal(layer.tasks[1].norm.running_mean, mean)
        assert not any(p.requires_grad for p in layer.tasks[0].parameters())
    assert not any(p.requires_grad for p in model.outputs[0].parameters())
    assert all(p.requires_grad for p in model.outputs[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_the_middle_of_a_task_goes_on_alike(kind):
    model = tiny(kind)
    learn(model, [0, 1])
    model.begin_task([3])
    twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    found = []
    for one in (model, *twins):
        torch.manual_seed(7)
        one.train()
        one.make(one.noise(6, draws()), torch.tensor([3] * 6)).sum().backward()
        one.end_task()
        found.append(fixed_samples(one, [0, 1, 3]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_layer_by_layer(masks, training):
    model = tiny(("mlp", masks), value_range=(0.0, 4.0)).double()
    model.begin_task([1, 4])
    model.train(training)
    model.s = 20.0
    z, y = torch.randn(5, 3).double(), torch.tensor([1, 4, 4, 1, 1])
    twin = copy.deepcopy(model)
    found = model.decode(z, y)
    h = torch.cat([z, nn.functional.one_hot(y, 6).double()], 1)
    for layer in twin.hidden:
        e = layer.tasks[0].embedding
        m = torch.sigmoid(20 * e) if training else (e >= 0).double()
        out = h @ (layer.weight * m).T if masks == "weights" else h @ layer.weight.T
        if training:
            out = (out - out.mean(0)) / (out.var(0, unbiased=False) + 1e-5).sqrt()
        else:
            out = out / (1 + 1e-5) ** 0.5  # statistics have not been taken yet
        h = out.relu() if masks == "weights" else out.relu() * m
    out = (h @ twin.outputs[0].weight.T + twin.outputs[0].bias).tanh()
    torch.testing.assert_close(found, (2 * out + 2).view(5, 1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_with_open_masks_a_deconvolution_is_torchs(kind):
    model = tiny(kind)
    model.begin_task([0])
    with torch.no_grad():
        for layer in model.hidden:
            layer.tasks[0].embedding.fill_(1.0)
    model.eval()
    z, y = torch.randn(4, 3), torch.zeros(4).long()
    h = torch.cat([z, nn.functional.one_hot(y, 6)], 1)
    if kind[0] == "conv":  # a vector to a map of 2 x 2 is a linear layer
        weight = model.hidden[0].weight
        h = (h @ weight.flatten(2).permute(1, 0, 2).flatten(1)).view(4, 6, 2, 2)
    else:
        for layer in list(model.hidden)[:-1]:
            h = (h @ layer.weight.T / (1 + 1e-5) ** 0.5).relu()
        h = h @ model.hidden[-1].weight.T
    h = (h / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(model.make(z, y), model.outputs[0](h).tanh().view(4, 1, 4, 4))


def test_a_batch_of_several_tasks_is_in_the_order_of_its_labels():
    model = tiny()
    learn(model, [0, 5])
    learn(model, [2])
    z, y = torch.randn(7, 3), torch.tensor([2, 0, 5, 2, 2, 0, 5])
    made = model.eval().decode(z, y)
    for rows in ([0, 3, 4], [1, 2, 5, 6]):
        assert torch.equal(made[rows], model.decode(z[rows], y[rows]))


def test_about_half_of_the_gates_begin_open_and_one_always_stays():
    model = tiny(("mlp", "weights"), widths=(60, 50))
    model.begin_task([0])
    for layer in model.hidden:
        part = layer.tasks[0]
        assert part.embedding.std().item() == pytest.approx(0.01, rel=0.1)
        assert 0.4 < part.binary().float().mean() < 0.6
        with torch.no_grad():
            part.embedding.copy_(-1 - torch.rand(part.embedding.shape))
        assert part.binary().sum() == 1
    model.clamp_embeddings()
    with torch.no_grad():
        model.hidden[0].tasks[0].embedding.fill_(9.0)
    model.clamp_embeddings()
    assert model.hidden[0].tasks[0].embedding.max() == 6


def test_the_scale_goes_from_one_end_to_the_other():
    model = tiny()
    scales = []
    for b in range(1, 6):
        model.anneal(b, 5)
        scales.append(model.s)
    assert scales == pytest.approx([1 / 50, 12.515, 25.01, 37.505, 50])


# capacity ---------------------------------------------------------------------------------------


def test_what_a_task_takes_of_the_free_capacity():
    model = tiny(widths=(4,), expand=False)
    layer = model.hidden[0]
    model.begin_task([0])
    with torch.no_grad():
        layer.tasks[0].embedding.copy_(torch.tensor([1.0, -1, -1, -1]))
    assert astuple(model.end_task()["layer0"]) == (1, 1, 0, 3)
    model.begin_task([1])
    model.s = 5.0
    with torch.no_grad():
        layer.tasks[1].embedding.copy_(torch.tensor([0.0, 0, 6, -6]))
    assert model.sparsity().item() == pytest.approx((0.5 + 1 + 0) / 3)
    model.sparsity().backward()
    slope = layer.tasks[1].embedding.grad
    assert slope[0] == 0  # reuse is free
    assert slope[1].item() == pytest.approx(0.25 / 3)
    with torch.no_grad():
        layer.tasks[1].embedding[1] = 1.0
    # Channels 0, 1 and 2 are open; 0 was there before.
    assert astuple(model.end_task()["layer0"]) == (3, 2, 1, 1)


def test_the_regulariser_grows_with_the_network():
    model = tiny(widths=(4,))
    for classes in ([0], [1]):
        model.begin_task(classes)
        with torch.no_grad():
            model.hidden[0].tasks[-1].embedding.fill_(-1.0)[:2] = 1.0
        model.end_task()
    model.begin_task([2])  # two more for those of the first task, none for the second
    assert model.hidden[0].weight.shape == (6, 9)
    model.s = 5.0
    with torch.no_grad():
        model.hidden[0].tasks[-1].embedding.fill_(0.0)
    assert model.sparsity().item() == pytest.approx(6 / 4 * 0.5)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_capacity_adds_up_and_growth_keeps_what_was_free(kind, expand):
    model = tiny(kind, expand=expand)
    at_first = [layer.reserved.numel() for layer in model.hidden]
    reserved = [0 for _ in at_first]
    for c in range(4):
        model.begin_task([c])
        shapes = [layer.weight.shape for layer in model.hidden]
        model.end_task()
        for k, (layer, name) in enumerate(zip(model.hidden, model.capacity[-1], strict=True)):
            taken = model.capacity[-1][name]
            assert taken.used == taken.new + taken.reused == int(layer.tasks[-1].mask.sum())
            reserved[k] += taken.new
            assert reserved[k] == int(layer.reserved.sum())
            gates = shapes[k].numel() if kind[1] == "weights" else shapes[k][0]
            assert reserved[k] + taken.free == gates == layer.reserved.numel()
            free = taken.free + taken.new  # when the task began
            assert not expand or free >= at_first[k]
            assert not expand or kind[1] == "weights" or free == at_first[k]
    assert len(model.capacity) == 4


def test_growth_copies_what_there_is():
    model = tiny()
    learn(model, [0])
    new = [taken.new for taken in model.capacity[0].values()]
    before = [(layer.weight.detach().clone(), layer.reserved) for layer in model.hidden]
    model.begin_task([1])
    more_in = 0
    for layer, (weight, reserved), more in zip(model.hidden, before, new, strict=True):
        n_out, n_in = weight.shape
        assert layer.weight.shape == (n_out + more, n_in + more_in)
        assert torch.equal(layer.weight[:n_out, :n_in], weight)
        assert torch.equal(layer.reserved[:n_out], reserved)
        assert not layer.reserved[n_out:].any()
        assert layer.weight[n_out:].std() > 0.1
        more_in = more
    assert model.outputs[1].in_features == 5 + new[-1]


def test_weights_are_grown_into_channels():
    model = tiny(("mlp", "weights"))
    learn(model, [0])
    new = [taken.new for taken in model.capacity[0].values()]
    model.begin_task([1])
    more = [-(-new[0] // 9), -(-new[1] // 7)]
    assert model.hidden[0].weight.shape == (7 + more[0], 9)
    assert model.hidden[1].weight.shape == (5 + more[1], 7 + more[0])


# as any generator -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_generator_of_all_classes_so_far(kind):
    model = tiny(kind, value_range=(-1.0, 3.0))
    assert isinstance(model, Generator)
    assert model.conditional
    learn(model, [4, 1])
    learn(model, [2])
    x, y = model.sample(8, generator=draws())
    assert x.shape == (8, 1, 4, 4)
    assert -1 <= x.min() < x.max() <= 3
    assert sorted(torch.bincount(y).tolist()[1:]) == [0, 2, 3, 3]
    assert torch.equal(model.sample(8, generator=draws())[0], x)
    assert model.training
    assert model.sample(1, [1])[0].shape == (1, 1, 4, 4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 9, 13), (3, 16, 16)])
def test_a_border_makes_other_sizes(shape):
    model = MaskedGenerator(shape, n_classes=2, widths=(4, 3), latent=5)
    model.begin_task([0, 1])
    assert model.sample(2)[0].shape == (2, *shape)


def test_features_have_no_bounds():
    model = MaskedGenerator((5,), n_classes=2, network="mlp", widths=(64,), value_range=None)
    model.begin_task([0])
    with torch.no_grad():
        model.outputs[0].bias.fill_(7.0)
    assert model.sample(50)[0].mean() > 5


def test_classes_that_come_again_are_refused():
    model = tiny()
    learn(model, [0, 1])
    with pytest.raises(ValueError, match=r"classes \[1\] come again"):
        model.begin_task([1, 2])
    with pytest.raises(ValueError, match="n_classes=7"):
        model.begin_task([6])
    with pytest.raises(ValueError, match=r"learnt, \[0, 1\]"):
        model.sample(3, [2])
    with pytest.raises(ValueError, match="needs labels"):
        model.decode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"learnt, \[0, 1\]; got labels \[0, 5\]"):
        model.decode(torch.zeros(2, 3), torch.tensor([0, 5]))


def test_a_task_begins_when_the_one_before_has_ended():
    model = tiny()
    model.begin_task([0, 1])
    for classes in ([0, 1], [2, 3]):
        with pytest.raises(ValueError, match=r"task of classes \[0, 1\] has not ended"):
            model.begin_task(classes)
    model.end_task()
    model.begin_task([2, 3])
    assert model.tasks == [[0, 1], [2, 3]]


def test_a_state_dict_of_other_tasks_is_refused():
    source, same, other, fresh = tiny(), tiny(), tiny(), tiny()
    learn(source, [0, 1])
    learn(same, [0, 1], steps=1)
    learn(other, [2, 3])
    same.load_state_dict(source.state_dict())
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    assert torch.equal(same.eval().decode(z, y), source.eval().decode(z, y))
    for model, tasks in ((other, r"\[\[2, 3\]\]"), (fresh, r"\[\]")):
        with pytest.raises(ValueError, match=rf"own tasks, {tasks}; got one of \[\[0, 1\]\]"):
            model.load_state_dict(source.state_dict())


@pytest.mark.parametrize("masks", MASKS)
def test_what_a_task_leaves_behind_holds_no_gradients(masks):
    model = tiny(("mlp", masks))
    learn(model, [0, 1])
    assert [
        n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad
    ] == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"masks": "channels"}, "'channels'"),
        ({"network": "cnn"}, "'cnn'"),
        ({"widths": ()}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"n_classes": 0}, "n_classes=0"),
        ({"s_max": 0.0}, "s_max=0"),
        ({"s_max": float("inf")}, "s_max=inf"),
        ({"latent": 0}, "latent=0"),
        ({"value_range": None, "network": "conv"}, "value_range=None"),
        ({"network": "conv", "widths": (4, 4)}, "at least 8 pixels"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    given = {"n_classes": 3, "network": "mlp", "widths": (4,), **options}
    with pytest.raises(ValueError, match=match):
        MaskedGenerator((1, 4, 4), **given)


# the discriminator ------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_discriminator_knows_the_classes_that_it_has_been_shown(network):
    model = Discriminator((1, 4, 4), n_classes=5, network=network, widths=(6,),
                          value_range=(0.0, 8.0))  # fmt: skip
    x = 8 * torch.rand(3, 1, 4, 4)
    assert torch.equal(model(x), torch.full((3, 5), UNSEEN_LOGIT))
    model.learn_classes([1, 4])
    model.learn_classes([0])
    value, logits = model.judge(x / 4 - 1)
    plain = model.critic(x / 4 - 1)
    assert torch.equal(model(x), logits)
    assert torch.equal(value, plain[0])
    assert torch.equal(logits[:, [0, 1, 4]], plain[1][:, [0, 1, 4]])
    assert (logits[:, [2, 3]] == UNSEEN_LOGIT).all()


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_restart_draws_all_weights_and_keeps_the_parameters(network):
    model = Discriminator((1, 4, 4), n_classes=3, network=network, widths=(6,))
    model.learn_classes([2])
    before = [(p, p.detach().clone()) for p in model.parameters()]
    model.restart()
    for p, (same, old) in zip(model.parameters(), before, strict=True):
        assert p is same
        assert (p != old).all()
    assert model.known.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"network": "cnn"}, "'cnn'"), ({"widths": ()}, "width"), ({"n_classes": 0}, "n_classes=0"),
     ({"network": "conv", "value_range": None}, "value_range=None")],
)  # fmt: skip
def test_bad_arguments_of_a_discriminator_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Discriminator((1, 4, 4), **{"n_classes": 3, "network": "mlp", "widths": (4,), **options})
    with pytest.raises(ValueError, match="n_classes=4"):
        Discriminator((4,), n_classes=3, network="mlp").learn_classes([1, 3])
