"""What all generators keep to; autoencoders and adversarial pairs by themselves."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.models.generators.base import GenerativeModel, Generator
from avalanche_ext.models.generators.build import GENERATORS, build_generator
from avalanche_ext.models.generators.networks import ConditionalNorm, ConvCritic, ConvGenerator
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.models.generators.wgan import WGAN

TINY = {
    "vae": lambda **k: VAE((1, 4, 4), hidden=(8,), latent=3, **k),
    "conv": lambda **k: WGAN((1, 4, 4), widths=(4,), latent=3, **k),
    "mlp": lambda **k: WGAN((1, 4, 4), network="mlp", widths=(8, 6), latent=3, **k),
}
KINDS = [(name, c) for name in TINY for c in (0, 5)]


def tiny(kind, seen=(0, 1, 2), **options):
    torch.manual_seed(0)
    name, n_classes = kind
    model = TINY[name](n_classes=n_classes, **options)
    model.learn_classes(seen)
    return model


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def count(module):
    return sum(p.numel() for p in module.parameters())


# sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_datas_shape_and_range_and_no_gradient(kind):
    model = tiny(kind, value_range=(-0.5, 3.0))
    assert isinstance(model, Generator)
    x, y = model.sample(7, generator=draws())
    assert x.shape == (7, 1, 4, 4)
    assert not x.requires_grad
    assert -0.5 <= x.min() < x.max() <= 3.0
    assert (y is None) == (kind[1] == 0)
    if y is not None:
        assert sorted(torch.bincount(y).tolist()) == [2, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_sample_and_torchs_own_state_is_left_alone(kind):
    model, state = tiny(kind), torch.get_rng_state()
    first, again, other = (model.sample(4, generator=draws(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    plain = model.sample(4)[0]
    torch.manual_seed(3)
    assert torch.equal(model.sample(4)[0], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_leaves_modes_and_statistics_alone(kind):
    model = tiny(kind).train()
    part = list(model.children())[-1]
    part.eval()
    before = copy.deepcopy(model.state_dict())
    model.sample(1)  # one sample has no batch statistics
    assert model.training
    assert not part.training
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after if k != "_extra_state")


@pytest.mark.parametrize("name", TINY)
def test_classes_are_those_asked_for_and_balanced_over_many_draws(name):
    model, generator = tiny((name, 5)), draws()
    assert set(model.sample(4, [2], generator)[1].tolist()) == {2}
    counts = torch.zeros(5)
    for _ in range(300):
        y = model.sample(4, generator=generator)[1]
        batch = torch.bincount(y, minlength=5)
        assert batch[:3].max() - batch[:3].min() <= 1
        counts += batch
    assert counts.sum() == 1200
    assert (counts[:3] - 400).abs().max() < 40  # the odd one is not always the same class
    assert counts[3:].sum() == 0


@pytest.mark.parametrize("name", TINY)
def test_a_request_that_cannot_be_met_says_why(name):
    with pytest.raises(ValueError, match=r"learnt, \[0, 1, 2\]; got a request for \[4\]"):
        tiny((name, 5)).sample(3, [4])
    with pytest.raises(ValueError, match="request for none"):
        tiny((name, 5), seen=()).sample(3)
    with pytest.raises(ValueError, match="built without labels"):
        tiny((name, 0)).sample(3, [1])
    with pytest.raises(ValueError, match="n >= 1"):
        tiny((name, 0)).sample(0)
    with pytest.raises(ValueError, match="n_classes=6"):
        tiny((name, 5)).learn_classes([1, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_it_was_not_built_for_is_refused(kind):
    model = tiny(kind)
    model.check_data(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"in_shape=\(1, 5, 5\)"):
        model.check_data(torch.rand(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"-0\.42 to 2\.8"):
        model.check_data(torch.tensor([-0.42, 2.8]).repeat(1, 8).view(1, 1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_copied_and_loaded_generators_make_the_same_samples(kind):
    model = tiny(kind)
    want = model.sample(3, generator=draws())[0]
    loaded = tiny(kind, seen=())
    loaded.load_state_dict(model.state_dict())
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), loaded):
        assert twin.seen == [0, 1, 2]
        assert torch.equal(twin.sample(3, generator=draws())[0], want)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: VAE((1, 4, 4), latent=0), "latent=0"),
        (lambda: VAE(()), "shape of a sample"),
        (lambda: VAE((4,), hidden=()), "hidden layer"),
        (lambda: VAE((4,), value_range=(1.0, 0.0)), "value_range"),
        (lambda: WGAN((1, 8, 8)), "at least 16 pixels"),
        (lambda: WGAN((64,)), "network='mlp'"),
        (lambda: WGAN((1, 32, 32), value_range=None), "value_range with 'conv'"),
        (lambda: WGAN((1, 32, 32), network="cnn"), "'cnn'"),
        (lambda: WGAN((1, 32, 32), widths=()), "width"),
        (lambda: build_generator("smal_vae", (1, 8, 8), 10), "small_vae"),
    ],
)
def test_bad_arguments_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()


# sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts", "want"),
    [
        (VAE((1, 28, 28)), [""], [1_069_784]),
        (build_generator("small_vae", (1, 28, 28), 10), [""], [558_928]),
        (build_generator("ac_wgan", (1, 28, 28), 10), ["generator", "critic"], [525_569, 279_563]),
        (build_generator("ac_wgan", (3, 32, 32), 10), ["generator"], [527_171]),
    ],
)
def test_networks_have_the_papers_sizes(model, parts, want):
    assert [count(model.get_submodule(p)) for p in parts] == want


@pytest.mark.parametrize(
    ("name", "shape"),
    [*itertools.product(GENERATORS, [(1, 28, 28), (3, 32, 32)]),
     *((n, (1, 8, 8)) for n in GENERATORS if n.startswith("tiny"))],
)  # fmt: skip
def test_every_named_generator_makes_its_sizes(name, shape):
    model = build_generator(name, shape, 10)
    model.learn_classes([3, 4])
    x, y = model.sample(2)
    assert x.shape == (2, *shape)
    assert model.conditional == name.endswith(("cvae", "ac_wgan"))
    assert y is None or set(y.tolist()) == {3, 4}


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 9, 13), (3, 16, 16)])
def test_a_border_makes_other_sizes_and_the_critic_sees_every_pixel(shape):
    widths = (4, 3)
    made = ConvGenerator(shape, 5, widths, 0)(torch.randn(2, 5), None)
    assert made.shape == (2, *shape)
    critic = ConvCritic(shape, widths, 0)
    x = torch.randn(1, *shape, requires_grad=True)
    critic(x)[0].sum().backward()
    assert (x.grad != 0).all()


def test_the_critics_border_is_dark():
    critic = ConvCritic((1, 10, 9), (4, 3), 0)
    assert sum(critic.border) > 0
    bare, dark = copy.deepcopy(critic), F.pad(torch.randn(2, 1, 10, 9), critic.border, value=-1.0)
    bare.border = (0, 0, 0, 0)
    left, right, top, bottom = critic.border
    inside = dark[..., top : dark.shape[2] - bottom, left : dark.shape[3] - right]
    assert torch.equal(critic(inside)[0], bare(dark)[0])


def test_every_part_has_its_own_mode_again_after_sampling():
    model = WGAN((8,), network="mlp", widths=(8,), latent=4, value_range=None).eval()
    model.generator.train()
    model.sample(2)
    assert model.generator.training
    assert not model.critic.training


def test_what_is_cut_off_is_the_border():
    small, large = (ConvGenerator((2, *sides), 5, (4, 3), 0) for sides in ((9, 13), (12, 16)))
    small.load_state_dict(large.state_dict())
    z = torch.randn(2, 5)
    cut = large.eval()(z, None)[..., 1:10, 1:14]
    torch.testing.assert_close(small.eval()(z, None), cut)


# autoencoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("n_classes", [0, 5])
def test_the_loss_is_the_negative_elbo_with_one_draw(bounded, n_classes):
    model = tiny(("vae", n_classes), value_range=(-1.0, 1.0) if bounded else None).double()
    x, y = 2 * torch.rand(3, 1, 4, 4).double() - 1, torch.tensor([0, 2, 1])
    found = model.data_loss(x, y, draws())
    noise = torch.randn(3, 3, generator=draws(), dtype=torch.float64)
    for b in range(3):
        label = F.one_hot(y[b], 5).double() if n_classes else torch.zeros(0).double()
        u = (x[b].flatten() + 1) / 2 if bounded else x[b].flatten()
        h = torch.relu(model.encoder.features[0](torch.cat([u, label])))
        mean, logvar = model.mean(h), model.logvar(h)
        z = mean + (logvar / 2).exp() * noise[b]
        out = model.decoder(torch.cat([z, label])[None])[0]
        kl = 0.5 * sum(m**2 + v.exp() - 1 - v for m, v in zip(mean, logvar, strict=True))
        if bounded:
            p = torch.sigmoid(out)
            nll = -(u * p.log() + (1 - u) * (1 - p).log()).sum()
        else:
            nll = 0.5 * (u - out).square().sum()
        assert found[b].item() == pytest.approx((nll + kl).item())


def test_a_conditional_autoencoder_learns_what_each_class_looks_like():
    model = VAE((6,), hidden=(16,), latent=2, n_classes=3)
    model.learn_classes([0, 2])
    y = torch.tensor([0, 2]).repeat(16)
    x = torch.where(y[:, None] == 0, torch.tensor([1.0, 1, 1, 0, 0, 0]), 0.1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.data_loss(x, y, draws()).mean().backward()
        optimizer.step()
    bright, dark = (model.sample(64, [c])[0].mean(0) for c in (0, 2))
    torch.testing.assert_close(bright, x[0], rtol=0, atol=0.1)
    torch.testing.assert_close(dark, x[1], rtol=0, atol=0.1)


def test_labels_are_needed_where_they_are_part_of_the_input():
    for name in TINY:
        with pytest.raises(ValueError, match="needs labels"):
            tiny((name, 5)).decode(torch.randn(2, 3))


# adversarial pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [0, 5])
def test_the_critics_loss_term_by_term(n_classes):
    model = tiny(("mlp", n_classes)).double()
    x, y = torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 2, 1])
    found = model.data_loss(x, y, draws())
    generator = draws()
    noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    share = torch.rand(3, generator=generator).double()
    real = 2 * x - 1
    fake = model.generator(noise, y if n_classes else None).detach()
    for b in range(3):
        between = (share[b] * real[b] + (1 - share[b]) * fake[b])[None].requires_grad_()
        (slope,) = torch.autograd.grad(model.critic(between)[0].sum(), between)
        want = model.critic(fake[b][None])[0] - model.critic(real[b][None])[0]
        want = want + 10 * (slope.norm() - 1) ** 2
        if n_classes:
            logits = model.critic(real[b][None])[1]
            want = want - torch.log_softmax(logits, 1)[0, y[b]]
        assert found[b].item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("n_classes", [0, 5])
def test_the_generators_loss_is_minus_the_value_and_the_error_of_the_class(n_classes):
    model = tiny(("mlp", n_classes))
    found = model.sample_loss(6, draws())
    generator = draws()
    y = model.labels(6, None, generator)
    value, logits = model.critic(model.generator(model.noise(6, generator), y))
    want = -value if y is None else -value + F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", [("conv", 5), ("mlp", 0)])
def test_each_loss_trains_its_own_half(kind):
    model = tiny(kind)
    data, sample = model.data_parameters(), model.sample_parameters()
    assert {*map(id, data)}.isdisjoint(map(id, sample))
    assert len(data) + len(sample) == len(list(model.parameters()))
    model.data_loss(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])).mean().backward()
    assert all(p.grad is not None for p in data)
    assert all(p.grad is None for p in sample)
    model.zero_grad()
    model.sample_loss(4).mean().backward()
    assert all(p.grad is not None for p in sample)


def test_an_autoencoder_has_no_loss_without_data():
    with pytest.raises(NotImplementedError, match="VAE is not adversarial"):
        tiny(("vae", 0)).sample_loss(3)
    bare = GenerativeModel((2,), 1, 0, None)
    with pytest.raises(NotImplementedError, match="decode"):
        bare.decode(torch.zeros(1, 1))
    with pytest.raises(NotImplementedError, match="data_loss"):
        bare.data_loss(torch.zeros(1, 2), torch.zeros(1))


def test_conditional_norm_scales_each_sample_by_its_class():
    norm = ConditionalNorm(2, 3)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([[1.0, 1], [2, 3], [0, 0]]))
        norm.shift.copy_(torch.tensor([[0.0, 0], [1, -1], [5, 6]]))
    x, y = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 2, 1])
    plain = nn.BatchNorm2d(2, affine=False)(x)
    want = plain * norm.scale[y][..., None, None] + norm.shift[y][..., None, None]
    torch.testing.assert_close(norm(x, y), want)
    alone = ConditionalNorm(2, 0)
    torch.testing.assert_close(alone(x, None), plain)


def test_a_critic_gives_each_sample_a_value_of_its_own():
    # The gradient penalty takes the slope of one sample's value at this sample.
    model = tiny(("conv", 5))
    x = torch.rand(3, 1, 4, 4)
    alone = torch.cat([model.critic(row[None])[0] for row in x])
    torch.testing.assert_close(model.critic(x)[0], alone)


# frozen copies ----------------------------------------------------------------------------------


def test_a_frozen_copy_stays_what_it_is():
    model = tiny(("conv", 0)).train()
    model.sample_loss(4).sum().backward()
    frozen = FrozenCopy(model)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(p.grad is not None for p in model.parameters())
    assert model.training
    frozen.train()
    assert not any(m.training for m in frozen.modules())
    before = frozen.module.sample(3, generator=draws())[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(frozen.module.sample(3, generator=draws())[0], before)
    linear = nn.Linear(2, 3)
    assert torch.equal(FrozenCopy(linear)(torch.ones(1, 2)), linear(torch.ones(1, 2)))


# replay alignment -------------------------------------------------------------------------------


def moved(kind, **options):
    """A generator that has learnt something: its batch norms hold statistics of their own."""
    model = tiny(kind, **options)
    for _ in range(3):
        model.sample_loss(8, draws())
    return model


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_alignment_and_its_gradient_are_exactly_zero_at_the_copy(name):
    model = moved((name, 5))
    before = FrozenCopy(model).module
    model.learn_classes([3, 4])
    statistics = copy.deepcopy(dict(model.named_buffers()))
    loss = model.alignment_loss(before, 16, draws())
    loss.mean().backward()
    assert loss.shape == (16,)
    assert torch.equal(loss, torch.zeros(16))
    assert all(not p.grad.any() for p in model.generator.parameters())
    assert model.training
    assert not before.training
    assert all(torch.equal(statistics[k], v) for k, v in model.named_buffers())


def test_with_the_batchs_own_statistics_a_generator_differs_from_its_copy():
    model = moved(("conv", 5))
    before = FrozenCopy(model).module
    y, z = before.labels(16, None, draws()), before.noise(16, draws())
    assert (model.generator(z, y) - before.generator(z, y)).square().sum() > 1e-3


def test_a_generator_that_is_off_by_a_constant_is_as_far_as_pixels_and_constant_say():
    model = moved(("mlp", 5), value_range=None)
    before = FrozenCopy(model).module
    with torch.no_grad():
        model.generator.layers.classifier.bias += 0.25
    loss = model.alignment_loss(before, 6, draws())
    torch.testing.assert_close(loss, torch.full((6,), 16 * 0.25**2))


def test_alignment_asks_for_the_classes_of_the_earlier_generator_in_the_networks_range():
    model = moved(("mlp", 5), value_range=(10.0, 30.0))
    before = FrozenCopy(model).module
    model.learn_classes([4])
    with torch.no_grad():
        model.generator.layers.features[0].weight[:, 3 + 4] += 100  # the column of class 4
    assert not model.alignment_loss(before, 9, draws()).any()
    with torch.no_grad():
        model.generator.layers.features[0].weight[:, 3 + 1] += 1
    generator = draws()
    y, z = before.labels(9, None, generator), before.noise(9, generator)
    assert sorted(torch.bincount(y).tolist()) == [3, 3, 3]
    # A tenth of the distance in data of a range of 20.
    want = ((model.decode(z, y) - before.decode(z, y)) / 10).square().flatten(1).sum(1)
    torch.testing.assert_close(model.alignment_loss(before, 9, draws()), want)


def test_samples_of_some_classes_train_on_those_alone():
    model = tiny(("mlp", 5))
    model.sample_loss(64, draws(), [1]).sum().backward()
    columns = model.generator.layers.features[0].weight.grad[:, 3:]
    assert columns[:, 1].any()
    assert not columns[:, [0, 2, 3, 4]].any()


def test_the_critics_class_head_classifies_data():
    model = tiny(("conv", 5), value_range=(0.0, 4.0))
    x = 4 * torch.rand(3, 1, 4, 4)
    assert torch.equal(model.classify(x), model.critic(x / 2 - 1)[1])
    with pytest.raises(ValueError, match="no class head"):
        tiny(("conv", 0)).classify(x / 4)
