"""A generator on a stream: losses of every step, what is kept of the past, interruptions."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training.plugins import SupervisedPlugin

from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.models.generators.wgan import WGAN
from avalanche_ext.training.supervised.generator_training import GeneratorTraining
from tests.conftest import blobs, class_stream

pytestmark = pytest.mark.filterwarnings("ignore:No loggers", "ignore:the generator has collapsed")

KINDS = {
    "vae": lambda c: VAE((8,), hidden=(16,), latent=4, n_classes=c, value_range=None),
    "wgan": lambda c: WGAN(
        (8,), network="mlp", widths=(16,), latent=4, n_classes=c, value_range=None
    ),
}

ALIGNED = {"r": 1.0, "alignment": 0.3}
SETTINGS = [("vae", {}), ("wgan", {}), ("wgan", ALIGNED)]


def build(kind="vae", n_classes=0, plugins=(), *, seed=3, **options):
    torch.manual_seed(seed)
    options = {"train_mb_size": 8, "lr": 1e-2, "critic_steps": 2, **options}
    return GeneratorTraining(model=KINDS[kind](n_classes), plugins=list(plugins), **options)


def train(strategy, experiences=slice(None), **options):
    for experience in class_stream().train_stream[experiences]:
        strategy.train(experience, eval_streams=[], **options)
    return strategy


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


class Probe(SupervisedPlugin):
    """Each step's batch and loss, with the networks and the random state before the step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_forward(self, strategy, **kwargs):
        self.steps.append({
            "x": strategy.mb_x, "y": strategy.mb_y, "model": copy.deepcopy(strategy.model),
            "previous": strategy.previous, "draws": strategy._draws.clone_state(),
            "critic_steps": strategy.steps,
        })  # fmt: skip

    def before_backward(self, strategy, **kwargs):
        self.steps[-1]["loss"] = strategy.loss.item()
        self.steps[-1]["rows"] = len(strategy.mb_output)


# one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [0, 6])
@pytest.mark.parametrize(("r", "third"), [("1/t", 1 / 3), ("class_ratio", 1 / 3), (0.9, 0.9)])
def test_the_loss_weighs_new_and_replayed_samples(kind, n_classes, r, third):
    probe = Probe()
    train(build(kind, n_classes, [probe], r=r))
    assert [s["rows"] for s in probe.steps] == [8] * 5 + [16] * 10
    for step, weight in ((probe.steps[2], 1.0), (probe.steps[12], third)):
        x, y, draws = step["x"], step["y"], step["draws"]
        if step["previous"] is not None:
            old_x, old_y = step["previous"].module.sample(8, generator=draws)
            x, y = torch.cat([x, old_x]), torch.cat([y, y if old_y is None else old_y])
        losses = step["model"].data_loss(x, y, draws)
        want = weight * losses[:8].mean()
        if weight < 1:
            want = want + (1 - weight) * losses[8:].mean()
        assert step["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_classes_of_unequal_experiences_share_the_weight():
    strategy = build(r="class_ratio")
    found = []
    for classes in ([0], [1, 2, 3], [4, 5]):
        experience = class_stream().train_stream[0]
        experience.classes_in_this_experience = classes
        strategy.begin(experience)
        found.append(strategy._weight)
        strategy.finish()
    assert found == pytest.approx([1, 3 / 4, 2 / 6])


def test_the_first_experience_is_a_plain_loop_over_the_data():
    strategy = build()
    model = copy.deepcopy(strategy.model)
    train(strategy, slice(0, 1), shuffle=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
    torch.manual_seed(3)
    twin = build()
    twin.begin(class_stream().train_stream[0])
    draws = twin._draws
    x = torch.stack([row[0] for row in class_stream().train_stream[0].dataset])
    for batch in x.split(8):
        optimizer.zero_grad()
        model.data_loss(batch, torch.zeros(8).long(), draws).mean().backward()
        optimizer.step()
    assert torch.equal(weights(strategy), torch.cat([p.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("kind", KINDS)
def test_driven_by_another_loop_it_learns_the_same(kind):
    whole = train(build(kind, 6), shuffle=False)
    driven = build(kind, 6)
    for experience in class_stream().train_stream:
        columns = [torch.stack(c) for c in zip(*((row[0], torch.tensor(row[1]))
                   for row in experience.dataset), strict=True)]  # fmt: skip
        driven.begin(experience, torch.device("cpu"))
        for x, y in zip(*(c.split(8) for c in columns), strict=True):
            driven.step(x, y, None)
        driven.finish()
    assert torch.equal(weights(driven), weights(whole))


def test_replay_that_is_given_is_not_drawn_again():
    strategy = train(build(), slice(0, 1))
    strategy.begin(class_stream().train_stream[1])
    state, x = strategy._draws.get_state(), torch.randn(8, 8)
    strategy.step(x, torch.zeros(8).long(), (torch.full((3, 8), 5.0), None))
    twin = torch.Generator()
    twin.set_state(state)
    torch.randn(11, 4, generator=twin)  # noise of eleven rows, no more
    assert torch.equal(strategy._draws.get_state(), twin.get_state())


def test_every_experience_and_every_seed_draws_other_numbers():
    seeds = []
    for seed in (1, 2):
        strategy = build(seed=seed)
        for experience in class_stream().train_stream[:2]:
            strategy.begin(experience)
            seeds.append(strategy._draws.initial_seed())
            strategy.finish()
    assert len(set(seeds)) == 4


# an adversarial pair ----------------------------------------------------------------------------


def test_the_generator_steps_after_every_so_many_batches():
    probe = Probe()
    train(build("wgan", 0, [probe], critic_steps=3), slice(0, 1))
    generators = [torch.cat([p.flatten() for p in s["model"].generator.parameters()])
                  for s in probe.steps]  # fmt: skip
    critics = [torch.cat([p.flatten() for p in s["model"].critic.parameters()])
               for s in probe.steps]  # fmt: skip
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(generators)]
    assert moved == [False, False, True, False]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(critics))


def test_one_generators_step_is_adams_on_its_own_loss():
    strategy = build("wgan", 6, critic_steps=1)
    strategy.begin(class_stream().train_stream[0])
    x, y = torch.randn(8, 8), torch.tensor([0, 1] * 4)
    strategy.step(x, y, None)
    twin = build("wgan", 6, critic_steps=1)
    twin.begin(class_stream().train_stream[0])
    model, draws = twin.model, twin._draws
    for parameters, loss in (
        (model.critic.parameters(), lambda: model.data_loss(x, y, draws)),
        (model.generator.parameters(), lambda: model.sample_loss(8, draws)),
    ):
        optimizer = torch.optim.Adam(parameters, 1e-2, (0.0, 0.9), fused=True)
        optimizer.zero_grad()
        loss().mean().backward()
        optimizer.step()
    assert torch.equal(weights(strategy), weights(twin))


@pytest.mark.parametrize(("kind", "reset", "want"), [
    ("vae", None, 10), ("vae", True, 5), ("wgan", None, 5), ("wgan", False, 10),
])  # fmt: skip
def test_adam_begins_anew_where_it_shall(kind, reset, want):
    strategy = train(build(kind, reset_optimizer=reset), slice(0, 2))
    state = next(iter(strategy.optimizer.state.values()))
    assert int(state["step"]) == want


# Memory Replay GANs -----------------------------------------------------------------------------


def mergan(plugins=(), **options):
    return build("wgan", 6, plugins, **options)


def test_replays_of_joint_retraining_have_the_labels_that_they_were_asked_for():
    strategy = train(mergan(r="class_ratio"), slice(0, 1))
    strategy.begin(class_stream().train_stream[1])
    asked, loss = [], strategy.model.data_loss
    sample = strategy.previous.module.sample

    def watched(n, **options):
        asked.append(sample(n, **options))
        return asked[-1]

    seen = []
    strategy.previous.module.sample = watched
    strategy.model.data_loss = lambda x, y, g: seen.append((x, y)) or loss(x, y, g)
    x, y = torch.randn(8, 8), torch.tensor([2, 3] * 4)
    strategy.step(x, y, None)
    (old_x, old_y), (all_x, all_y) = asked[0], seen[0]
    assert sorted(torch.bincount(old_y).tolist()) == [4, 4]  # of classes 0 and 1
    assert torch.equal(all_x, torch.cat([x, old_x]))
    assert torch.equal(all_y, torch.cat([y, old_y]))
    assert strategy._weight == 0.5


def slopes(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_replay_alignment_is_a_term_of_the_generators_loss_alone():
    strategy = train(mergan(r=1.0, alignment=0.3, critic_steps=1), slice(0, 1))
    strategy.begin(class_stream().train_stream[1])
    twin, draws = copy.deepcopy(strategy.model), strategy._draws.clone_state()
    x, y = torch.randn(8, 8), torch.tensor([2, 3] * 4)
    strategy.step(x, y, None)
    want = twin.data_loss(x, y, draws).mean()  # the critic sees new data alone
    assert strategy.loss.item() == pytest.approx(want.item())
    strategy.mbatch = [x, y, y]
    draws = strategy._draws.clone_state()
    with torch.no_grad():  # by now the generator has left its copy
        found = strategy.sample_criterion()
        own = strategy.model.sample_loss(8, draws, [2, 3]).mean()
        distance = strategy.model.alignment_loss(strategy.previous.module, 8, draws).mean()
    assert distance > 0
    assert found.item() == pytest.approx((own + 0.3 * distance).item())


def test_at_the_copy_alignment_changes_no_gradient():
    found = []
    for alignment in (0.0, 5.0):
        strategy = train(mergan(r=1.0, alignment=alignment), slice(0, 1))
        strategy.begin(class_stream().train_stream[1])
        strategy.mbatch = [torch.zeros(8, 8), torch.tensor([2, 3] * 4), None]
        strategy.model.zero_grad()
        strategy.sample_criterion().backward()
        found.append(slopes(strategy.model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_alignment_a_weight_of_one_is_plain_fine_tuning():
    strategy = train(mergan(r=1.0, alignment=0.0), slice(0, 2), shuffle=False)
    twin = mergan()
    model = twin.model
    for t, experience in enumerate(class_stream().train_stream[:2]):
        model.learn_classes([2 * t, 2 * t + 1])
        draws = torch.Generator().manual_seed(_seed_of(strategy, t + 1))
        optimizers = [
            torch.optim.Adam(part.parameters(), 1e-2, (0.0, 0.9), fused=True)
            for part in (model.critic, model.generator)
        ]
        x, y = (torch.stack(c) for c in zip(*((row[0], torch.tensor(row[1]))
                for row in experience.dataset), strict=True))  # fmt: skip
        for step, at in enumerate(torch.arange(40).split(8)):
            optimizers[0].zero_grad()
            model.data_loss(x[at], y[at], draws).mean().backward()
            optimizers[0].step()
            if step % 2:
                optimizers[1].zero_grad()
                model.sample_loss(8, draws, [2 * t, 2 * t + 1]).mean().backward()
                optimizers[1].step()
    assert torch.equal(weights(strategy), weights(twin))
    aligned = train(mergan(r=1.0, alignment=0.3), slice(0, 2), shuffle=False)
    assert not torch.equal(weights(aligned), weights(twin))
    first = [weights(train(mergan(r=1.0, alignment=a), slice(0, 1))) for a in (0.0, 0.3)]
    assert torch.equal(*first)  # nothing to align in the first experience


def _seed_of(strategy, experience):
    twin = mergan()
    for e in class_stream().train_stream[:experience]:
        twin.begin(e)
        seed = twin._draws.initial_seed()
        twin.finish()
    return seed


def test_the_generator_that_is_aligned_with_stays_as_it_is():
    probe = Probe()
    train(mergan([probe], r=1.0, alignment=0.3))
    previous = probe.steps[5]["previous"]
    assert all(step["previous"] is previous for step in probe.steps[5:10])
    before = probe.steps[5]["model"].state_dict()
    after = previous.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "_extra_state")
    assert all(p.grad is None for p in previous.parameters())
    assert [s["rows"] for s in probe.steps] == [8] * 15


def test_both_forms_keep_old_classes_and_fine_tuning_does_not():
    def means(model):
        draws = torch.Generator().manual_seed(0)
        return torch.stack([model.sample(100, [c], draws)[0].mean(0) for c in (0, 1)])

    def moved(**options):
        strategy = train(mergan(train_epochs=30, critic_steps=1, lr=5e-3, **options), slice(0, 1))
        before = means(strategy.model)
        train(strategy, slice(1, 2))
        return (means(strategy.model) - before).square().mean().sqrt().item()

    replayed, aligned, tuned = (
        moved(**o) for o in ({"r": "class_ratio"}, {"r": 1.0, "alignment": 1.0}, {"r": 1.0})
    )
    assert replayed < 0.7 * tuned
    assert aligned < 0.1 * tuned


# the past ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_before_is_frozen_for_an_experience_and_dropped_after_it(kind):
    probe = Probe()
    strategy = train(build(kind, 0, [probe]))
    before = torch.cat([p.flatten() for p in probe.steps[5]["model"].parameters()])
    for step in probe.steps[5:10]:
        assert step["previous"] is probe.steps[5]["previous"]
        parameters = list(step["previous"].parameters())
        assert torch.equal(torch.cat([p.flatten() for p in parameters]), before)
        assert all(p.grad is None and not p.requires_grad for p in parameters)
    assert strategy.previous is None
    assert strategy._probe is None


def test_replay_keeps_what_r_of_one_forgets():
    def error(r):
        strategy = build("vae", 6, r=r, train_epochs=30)
        train(strategy, slice(0, 2))
        data = blobs()
        want = torch.stack([data.tensors[0][data.tensors[1] == c].mean(0) for c in (0, 1)])
        made = torch.stack([strategy.model.sample(200, [c])[0].mean(0) for c in (0, 1)])
        return (made - want).square().mean().sqrt().item()

    assert error("1/t") < 1.2
    assert error(1.0) > 1.5


# Avalanche --------------------------------------------------------------------------------------


def test_evaluation_gives_one_number_and_does_not_change_the_result():
    class Evaluate(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            with torch.random.fork_rng():
                strategy.eval(class_stream().test_stream)

    class Losses(SupervisedPlugin):
        found: list[float] = []  # noqa: RUF012

        def after_eval_iteration(self, strategy, **kwargs):
            self.found.append(strategy.loss.item())

    for kind in KINDS:
        plain = train(build(kind))
        assert torch.equal(weights(train(build(kind, 0, [Evaluate()]))), weights(plain))
        plain.plugins.insert(0, Losses())
        Losses.found = []
        for _ in range(2):
            plain.eval(class_stream().test_stream)
        half = len(Losses.found) // 2
        assert half > 0
        assert Losses.found[:half] == Losses.found[half:]


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_a_strategy_pickled_in_mid_stream_goes_on_to_the_same_weights(kind, options):
    whole = train(build(kind, 6, **options))
    half = train(build(kind, 6, **options), slice(0, 2))
    stored, state = pickle.dumps(half), torch.get_rng_state()
    torch.manual_seed(99)
    resumed = pickle.loads(stored)
    torch.set_rng_state(state)
    assert torch.equal(weights(train(resumed, slice(2, None))), weights(whole))


class StoppedError(Exception):
    pass


class Stop(SupervisedPlugin):
    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise StoppedError


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_training_that_is_interrupted_within_an_experience_ends_the_same(kind, options, tmp_path):
    def go(folder):
        benchmark = class_stream()
        strategy = build(kind, 6, [Stop()], train_epochs=2, **options)
        checkpoints = Checkpoints(folder, strategy, benchmark, every=1)
        for k in range(checkpoints.resume().get("done", 0), 3):
            checkpoints.train(k, benchmark.train_stream[k])
            checkpoints.save(k + 1, {"done": k + 1})
        return weights(strategy)

    Stop.at = -1
    whole = go(tmp_path / "whole")
    for Stop.at in (4, 17, 23):
        with pytest.raises(StoppedError):
            go(tmp_path / "parts")
    Stop.at = -1
    assert torch.equal(go(tmp_path / "parts"), whole)


class Begun(SupervisedPlugin):
    """At each ``train``: the generator before, the weight of new data, the classes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def before_training_exp(self, strategy, **kwargs):
        earlier = None if strategy.previous is None else id(strategy.previous)
        self.found.append((earlier, strategy._weight, list(strategy.model.seen)))


def test_sub_experiences_of_a_stream_online_are_one_experience():
    stream, begun = class_stream().train_stream, Begun()
    strategy = build(n_classes=6, plugins=[begun])
    for part in split_online_stream(stream, 1, access_task_boundaries=True):
        strategy.train(part, eval_streams=[])
    assert strategy.experiences == 3
    parts = [begun.found[k : k + 40] for k in (0, 40, 80)]
    for k, found in enumerate(parts):
        # The classes of all its parts are known from the first one on.
        assert {(w, tuple(seen)) for _, w, seen in found} == {
            (1 / (k + 1), tuple(range(2 * k + 2)))
        }
    # One generator before each experience, another one for the next.
    assert [len({earlier for earlier, *_ in found}) for found in parts] == [1, 1, 1]
    assert len({found[0][0] for found in parts}) == 3


def test_an_online_experience_is_looked_at_when_the_next_one_begins():
    strategy = build(lr=1e-9)
    with torch.no_grad():
        strategy.model.decoder.classifier.weight.zero_()
    stream = class_stream().train_stream[:2]
    first, last, following, _ = split_online_stream(stream, 20, access_task_boundaries=True)
    strategy.train([first, last], eval_streams=[])
    with pytest.warns(UserWarning, match="collapsed: .* on experience 1 "):
        strategy.train(following, eval_streams=[])


def test_an_experience_that_was_broken_off_counts_as_one():
    strategy, begun = build(n_classes=6), Begun()
    strategy.plugins += [begun, Stop()]
    Stop.at = 2
    with pytest.raises(StoppedError):
        train(strategy, slice(0, 1))
    Stop.at = -1
    train(strategy, slice(1, 3))
    assert strategy.experiences == 3
    assert strategy.previous is None
    assert begun.found[2][1:] == (1 / 3, [0, 1, 2, 3, 4, 5])


# what is wrong ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="GenerativeModel"):
        GeneratorTraining(model=torch.nn.Linear(2, 2))
    for r in ("t", -0.1, 1.5, True, None):
        with pytest.raises(ValueError, match="'class_ratio'"):
            build(r=r)
    with pytest.raises(ValueError, match="critic_steps"):
        build(critic_steps=0)
    with pytest.raises(ValueError, match="alignment"):
        build("wgan", 6, alignment=-1.0)
    for kind, n_classes in (("vae", 6), ("wgan", 0)):
        with pytest.raises(ValueError, match=r"such as WGAN.* n_classes="):
            build(kind, n_classes, alignment=0.1)


def test_data_that_does_not_fit_is_refused_at_the_first_batch():
    strategy = GeneratorTraining(model=VAE((3, 5)), train_mb_size=8)
    with pytest.raises(ValueError, match=r"in_shape=\(8,\)"):
        train(strategy)
    strategy = GeneratorTraining(model=VAE((8,)), train_mb_size=8)
    with pytest.raises(ValueError, match="value_range"):
        train(strategy)
    with pytest.raises(ValueError, match="no label for"):
        train(build("vae", 3))


def test_a_loss_that_is_no_longer_finite_is_an_error():
    with pytest.raises(ValueError, match="diverged"):
        train(build(lr=1e18))


def test_collapse_is_reported_with_its_evidence():
    strategy = build(lr=1e-9)
    with torch.no_grad():
        strategy.model.decoder.classifier.weight.zero_()
    with pytest.warns(UserWarning, match=r"collapsed: after 5 updates on experience 1 .* data \d"):
        train(strategy, slice(0, 1))
    strategy = build(train_epochs=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(strategy, slice(0, 1))


def test_a_generator_that_took_no_step_is_reported():
    with pytest.warns(
        UserWarning, match=r"not trained on experience 1: .*critic_steps=6 .* were 5"
    ):
        train(build("wgan", critic_steps=6), slice(0, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the generator was not trained")
        train(build("wgan", critic_steps=5), slice(0, 1))
        train(build("vae", critic_steps=6), slice(0, 1))


def test_a_batch_of_one_and_data_of_one_value_say_nothing_of_collapse():
    strategy = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for x in (torch.randn(1, 8), torch.ones(4, 8)):
            strategy.begin(class_stream().train_stream[0])
            strategy.step(x, torch.zeros(len(x)).long(), None)
            strategy.finish()
