"""DGM: losses of every step, what is kept of earlier tasks, interruptions, Avalanche around it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch.nn import functional as F

from avalanche_ext.benchmarks import split_digits
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.functional.generative import gradient_penalty
from avalanche_ext.models.generators.discriminator import UNSEEN_LOGIT, Discriminator
from avalanche_ext.models.generators.masked import MASKS, MaskedGenerator
from avalanche_ext.models.modes import evaluating
from avalanche_ext.training.supervised.dgm import DGM
from tests.conftest import blobs, class_stream

pytestmark = pytest.mark.filterwarnings("ignore:No loggers")


def build(masks="units", plugins=(), *, seed=3, shape=(8,), n_classes=6, **options):
    torch.manual_seed(seed)
    common = {"n_classes": n_classes, "network": "mlp", "value_range": None}
    sizes = {"widths": (9, 7), "latent": 4, "s_max": 100.0}
    sizes.update({k: options.pop(k) for k in ("expand", "s_max") if k in options})
    return DGM(
        model=Discriminator(shape, widths=(16,), **common),
        generator=MaskedGenerator(shape, masks=masks, **sizes, **common),
        plugins=list(plugins),
        **{"train_mb_size": 8, "eval_mb_size": 64, "lr": 1e-2, "lam": 0.5, **options},
    )


def train(strategy, experiences=slice(None), stream=None):
    for experience in (stream or class_stream()).train_stream[experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def weights(strategy):
    parts = [*strategy.model.parameters(), *strategy.generator.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def fixed_samples(generator, classes):
    z = torch.randn(6, generator.latent, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), evaluating(generator):
        return [generator.decode(z, torch.full((6,), c)) for c in classes]


class Probe(SupervisedPlugin):
    """Each step's batch and loss, with the networks and the random state before the step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_forward(self, strategy, **kwargs):
        self.steps.append({
            "x": strategy.mb_x, "y": strategy.mb_y, "model": copy.deepcopy(strategy.model),
            "generator": copy.deepcopy(strategy.generator), "draws": strategy._draws.clone_state(),
        })  # fmt: skip

    def before_backward(self, strategy, **kwargs):
        self.steps[-1].update(
            loss=strategy.loss.item(), output=strategy.mb_output.detach(),
            after=strategy._draws.clone_state(), scale=strategy.generator.s,
            model_then=copy.deepcopy(strategy.model),
            generator_then=copy.deepcopy(strategy.generator),
        )  # fmt: skip


# one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS)
def test_the_loss_of_the_discriminator_term_by_term(masks):
    probe = Probe()
    train(build(masks, [probe]))
    for k, (step, share) in enumerate(zip((2, 7, 14), (1.0, 1 / 2, 1 / 3), strict=True)):
        found = probe.steps[step]
        x, y, model, generator, draws = (
            found[n] for n in ("x", "y", "model", "generator", "draws")
        )
        generator.s = found["scale"]
        value, logits = model.judge(x)
        want = F.cross_entropy(logits[:, : 2 * k + 2], y)  # of the classes so far
        if k:
            old_x, old_y = generator.sample(8, list(range(2 * k)), draws)
            replay = F.cross_entropy(model.judge(old_x)[1][:, : 2 * k + 2], old_y)
            want = share * want + (1 - share) * replay
        fake = generator.make(torch.randn(8, 4, generator=draws), y).detach()
        u = torch.rand(8, generator=draws)
        penalty = gradient_penalty(lambda v: model.judge(v)[0], x, fake, u)  # noqa: B023
        want = want + model.judge(fake)[0].mean() - value.mean() + 10 * penalty.mean()
        assert found["loss"] == pytest.approx(want.item(), rel=1e-4)
        assert torch.equal(found["output"], logits)  # what metrics see is the new data


@pytest.mark.parametrize(("masks", "lam"), [("units", 0.5), ("weights", 0.5), ("units", 0.0)])
def test_the_generators_step_is_adams_on_its_own_loss_with_earlier_tasks_held(masks, lam):
    probe = Probe()
    strategy = train(build(masks, [probe], lam=lam, expand=False), slice(0, 1))
    strategy.train_epochs = 1
    train(strategy, slice(1, 2))
    first, second = probe.steps[5:7]  # of the second experience
    generator, draws = first["generator_then"], first["after"]
    judge = second["model"].judge  # the discriminator has taken its step by then
    y = generator.labels(8, [2, 3], draws)
    value, logits = judge(generator.make(torch.randn(8, 4, generator=draws), y))
    loss = (F.cross_entropy(logits, y, reduction="none") - value).mean()
    if lam:
        masks_now = [torch.sigmoid(generator.s * layer.tasks[1].embedding)
                     for layer in generator.hidden]  # fmt: skip
        free = [1 - layer.reserved.float() for layer in generator.hidden]
        taken = sum((m * f).sum() for m, f in zip(masks_now, free, strict=True))
        want = taken / sum(f.sum() for f in free)
        torch.testing.assert_close(generator.sparsity(), want)
        loss = loss + lam * generator.sparsity()
    optimizer = torch.optim.Adam(generator.sample_parameters(), 1e-2, (0.5, 0.999), fused=True)
    loss.backward()
    for layer in generator.hidden:
        layer.weight.grad[layer.protected] = 0
    optimizer.step()
    found, want = (dict(g.named_parameters()) for g in (second["generator"], generator))
    assert all(torch.equal(found[k], want[k]) for k in want)


def test_the_generator_steps_after_every_so_many_batches():
    probe = Probe()
    train(build(plugins=[probe], critic_steps=3), slice(0, 1))
    states = [torch.cat([p.flatten() for p in s["generator"].parameters()]) for s in probe.steps]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(states)]
    assert moved == [False, False, True, False]


def test_the_scale_grows_over_all_batches_of_an_experience():
    probe = Probe()
    train(build(plugins=[probe], train_epochs=2), slice(0, 2))
    want = [0.01 + (100 - 0.01) * b / 9 for b in range(10)]
    assert [s["scale"] for s in probe.steps] == pytest.approx(2 * want)


def test_replays_are_drawn_once_per_step_and_balanced_over_old_classes():
    strategy, calls = build(), []
    sample = strategy.generator.sample

    def watched(n, classes=None, generator=None):
        calls.append(sample(n, classes, generator))
        return calls[-1]

    strategy.generator.sample = watched
    train(strategy)
    assert len(calls) == 10  # five steps in each of two experiences
    for k, (x, y) in enumerate(calls):
        counts = torch.bincount(y, minlength=6)
        n_old = 2 if k < 5 else 4
        assert counts[:n_old].tolist() == [8 // n_old] * n_old
        assert not counts[n_old:].any()
        assert not x.requires_grad


def test_experiences_weigh_as_many_as_they_have_classes():
    found = []

    class Weights(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            found.append(strategy._weight)

    stream = nc_benchmark(
        blobs(), blobs(seed=1), 2, task_labels=False, shuffle=False, per_exp_classes={0: 4},
        fixed_class_order=list(range(6)),
    )  # fmt: skip
    strategy = train(build(plugins=[Weights()]), stream=stream)
    assert strategy.generator.tasks == [[0, 1, 2, 3], [4, 5]]
    assert found == pytest.approx([1.0, 2 / 6])


def test_every_experience_and_every_seed_draws_other_numbers():
    seeds = []

    class Seeds(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            seeds.append(strategy._draws.initial_seed())

    for seed in (1, 2):
        train(build(plugins=[Seeds()], seed=seed), slice(0, 2))
    assert len(set(seeds)) == 4


# nothing is forgotten ---------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_old_samples_and_protected_weights_keep_every_bit(masks, expand):
    strategy, want = build(masks, expand=expand, train_epochs=2), []
    held = []

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 0:
                held[:] = [(x.weight.detach().clone(), x.protected)
                           for x in strategy.generator.hidden]  # fmt: skip

    strategy.plugins.append(Watch())
    for k in range(3):
        train(strategy, slice(k, k + 1))
        for classes, samples in want:
            found = fixed_samples(strategy.generator, classes)
            assert all(torch.equal(a, b) for a, b in zip(found, samples, strict=True))
        for layer, (weight, protected) in zip(strategy.generator.hidden, held, strict=True):
            assert protected.any() == (k > 0)
            assert torch.equal(layer.weight[protected], weight[protected])
            assert not torch.equal(layer.weight, weight)
        classes = [2 * k, 2 * k + 1]
        want.append((classes, fixed_samples(strategy.generator, classes)))


def test_embeddings_stay_where_they_can_come_back():
    far = build(lr=5.0)
    far.generator.clamp_embeddings = lambda: None

    class Largest(SupervisedPlugin):
        found = 0.0

        def after_training_iteration(self, strategy, **kwargs):
            parts = (layer.tasks[-1] for layer in strategy.generator.hidden)
            self.found = max(self.found, *(float(p.embedding.detach().abs().max()) for p in parts))

    for strategy, inside in ((build(lr=5.0), True), (far, False)):
        largest = Largest()
        strategy.plugins.append(largest)
        train(strategy, slice(0, 1))
        assert (largest.found <= 6) == inside


def test_each_experience_begins_with_optimizers_and_a_discriminator_of_its_own():
    for restart in (True, False):
        probe = Probe()
        strategy = train(build(plugins=[probe], restart=restart), slice(0, 2))
        end, begin = (torch.cat([p.flatten() for p in s["model"].parameters()])
                      for s in probe.steps[4:6])  # fmt: skip
        # One step apart, or anew.
        assert ((end - begin).abs().max() > 0.1) == restart
        for optimizer, parameters in (
            (strategy.optimizer, list(strategy.model.parameters())),
            (strategy.sample_optimizer, strategy.sample_optimizer.param_groups[0]["params"]),
        ):
            assert {int(s["step"]) for s in optimizer.state.values()} == {5}
            assert {id(p) for p in optimizer.state} == {id(p) for p in parameters}


# Avalanche --------------------------------------------------------------------------------------


def test_before_training_every_class_is_as_likely():
    strategy = build(evaluator=EvaluationPlugin(accuracy_metrics(stream=True), strict_checks=False))
    result = strategy.eval(class_stream().test_stream)
    # Equal logits: class 0, one of six.
    (accuracy,) = [v for k, v in result.items() if k.startswith("Top1_Acc_Stream")]
    assert accuracy == pytest.approx(1 / 6)
    train(strategy, slice(0, 1))
    assert (strategy.model(torch.randn(2, 8))[:, 2:] == UNSEEN_LOGIT).all()
    result = strategy.eval(class_stream().test_stream)
    (accuracy,) = [v for k, v in result.items() if k.startswith("Top1_Acc_Stream")]
    assert 1 / 6 < accuracy <= 1 / 3


def test_evaluation_in_between_does_not_change_the_result():
    plain = weights(train(build(), slice(0, 2)))
    assert torch.equal(weights(train(build(eval_every=1), slice(0, 2))), plain)


class Names(BaseLogger):
    def __init__(self):
        super().__init__()
        self.found = []

    def log_single_metric(self, name, value, x_plot):
        self.found.append((name, value))


def test_capacity_is_published():
    logger = Names()
    strategy = build(evaluator=EvaluationPlugin(loggers=[logger]))
    train(strategy)
    found = [(n.split("/")[0], v) for n, v in logger.found if n.startswith("DGM_")]
    want = [
        (f"DGM_{kind.capitalize()}_{layer}", float(getattr(taken, kind)))
        for task in strategy.generator.capacity
        for layer, taken in task.items()
        for kind in ("used", "new", "reused", "free")
    ]
    assert found == want
    assert len(found) == 3 * 2 * 4


@pytest.mark.parametrize("masks", MASKS)
def test_one_class_at_a_time(masks):
    stream = class_stream(6)
    strategy = train(build(masks), slice(0, 4), stream)
    assert strategy.generator.tasks == [[0], [1], [2], [3]]
    y = strategy.generator.sample(8)[1]
    assert sorted(torch.bincount(y).tolist()) == [2, 2, 2, 2]
    assert strategy._weight == 0.25
    assert torch.isfinite(weights(strategy)).all()


def test_a_batch_of_one():
    strategy = train(build(train_mb_size=13), slice(0, 2))  # 13, 13, 13, 1
    assert torch.isfinite(weights(strategy)).all()
    strategy = train(build(train_mb_size=1), slice(0, 1))
    assert strategy.steps == 40


@pytest.mark.parametrize("masks", MASKS)
def test_a_strategy_pickled_in_mid_stream_goes_on_to_the_same_weights(masks):
    whole = train(build(masks))
    half = train(build(masks), slice(0, 2))
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


@pytest.mark.parametrize("masks", MASKS)
def test_training_that_is_interrupted_ends_the_same(masks, tmp_path):
    def go(folder):
        benchmark = class_stream()
        strategy = build(masks, [Stop()], train_epochs=2)
        checkpoints = Checkpoints(folder, strategy, benchmark, every=1)
        for k in range(checkpoints.resume().get("done", 0), 3):
            checkpoints.train(k, benchmark.train_stream[k])
            checkpoints.save(k + 1, {"done": k + 1})
        return weights(strategy), fixed_samples(strategy.generator, range(6))

    Stop.at = -1
    whole, samples = go(tmp_path / "whole")
    for Stop.at in (4, 10, 17, 23):  # 10 and 20 are first batches
        with pytest.raises(StoppedError):
            go(tmp_path / "parts")
    Stop.at = -1
    found, made = go(tmp_path / "parts")
    assert torch.equal(found, whole)
    assert all(torch.equal(a, b) for a, b in zip(made, samples, strict=True))


@pytest.mark.parametrize("masks", MASKS)
def test_one_seed_gives_one_result(masks):
    first, second, other = (
        weights(train(build(masks, seed=s, expand=False), slice(0, 2))) for s in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("masks", ["weights", pytest.param("units", marks=pytest.mark.slow)])
def test_split_digits_is_remembered(masks):
    torch.manual_seed(0)
    common = {"n_classes": 10, "network": "mlp"}
    strategy = DGM(
        model=Discriminator((1, 8, 8), widths=(64,), **common),
        generator=MaskedGenerator((1, 8, 8), masks=masks, widths=(48,), latent=16, **common),
        restart=False, lam=1.0, train_mb_size=32, train_epochs=12, eval_mb_size=512,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), strict_checks=False),
    )  # fmt: skip
    benchmark = split_digits(5)
    train(strategy, stream=benchmark)
    result = strategy.eval(benchmark.test_stream)
    (accuracy,) = [v for k, v in result.items() if k.startswith("Top1_Acc_Stream")]
    assert accuracy > 0.6  # a network without a memory has 0.2


# what is wrong ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="Linear"):
        DGM(model=torch.nn.Linear(2, 2), generator=build().generator)
    with pytest.raises(TypeError, match="MaskedGenerator"):
        DGM(model=build().model, generator=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="same n_classes"):
        DGM(model=build(n_classes=5).model, generator=build().generator)
    with pytest.raises(ValueError, match="lam"):
        build(lam=-1.0)
    with pytest.raises(ValueError, match="critic_steps"):
        build(critic_steps=0)


def test_streams_that_do_not_fit_are_refused():
    strategy = train(build(), slice(0, 1))
    with pytest.raises(ValueError, match=r"classes \[0, 1\] come again"):
        train(strategy, slice(0, 1))
    with pytest.raises(ValueError, match="n_classes=6"):
        train(build(n_classes=4), slice(2, 3))
    with pytest.raises(ValueError, match=r"in_shape=\(8,\)"):
        train(build(shape=(5,)), slice(0, 1))


def test_a_loss_that_is_no_longer_finite_is_an_error():
    with pytest.raises(ValueError, match="diverged"):
        train(build(lr=1e18), slice(0, 1))
