"""Deep generative replay inside Avalanche's own loop, against losses computed by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch import nn
from torch.nn import functional as F

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.functional.generative import soft_cross_entropy
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.models.generators.wgan import WGAN
from avalanche_ext.models.mlp import MLP
from avalanche_ext.recipes import find_recipe
from avalanche_ext.training.plugins.dgr import DGRPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from avalanche_ext.training.replay_sources import ExactReplay, NoiseReplay
from avalanche_ext.training.supervised.generator_training import GeneratorTraining
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases

pytestmark = pytest.mark.filterwarnings(
    "ignore:No loggers", "ignore:the generator has collapsed", "ignore:none of the"
)


def generator(kind="vae", n_classes=0, **options):
    torch.manual_seed(7)
    make = {
        "vae": lambda: VAE((8,), hidden=(16,), latent=4, n_classes=n_classes, value_range=None),
        "wgan": lambda: WGAN(
            (8,), network="mlp", widths=(16,), latent=4, n_classes=n_classes, value_range=None
        ),
    }[kind]
    options = {"train_mb_size": 8, "critic_steps": 2, **options}
    return GeneratorTraining(model=make(), **options)


CASES = {
    "hard": lambda: DGRPlugin(generator()),
    "soft": lambda: DGRPlugin(generator(), labels="soft", r="class_ratio"),
    "conditional": lambda: DGRPlugin(generator(n_classes=6), labels="source", prefetch=3),
    "after": lambda: DGRPlugin(generator(), schedule="after", n=5),
    "adversarial": lambda: DGRPlugin(generator("wgan", 6), r=0.3),
    "interleaved_pair": lambda: DGRPlugin(generator("wgan"), schedule="interleaved"),
    "noise": lambda: DGRPlugin(NoiseReplay((8,), value_range=(-4.0, 4.0)), labels="soft"),
    "exact": lambda: DGRPlugin(ExactReplay(), labels="source"),
}


class Net(nn.Module):
    """A head that grows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.classifier = IncrementalClassifier(16, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


def run(plugins, *, model=None, n=3, seed=1, stream=None, **options):
    torch.manual_seed(seed)
    strategy = naive(model or MLP(8, (16,), 6), plugins, **options)
    for experience in (stream or class_stream().train_stream)[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


class Probe(SupervisedPlugin):
    """What every step has drawn, scored and added up."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin, self.steps = plugin, []

    def before_forward(self, strategy, **kwargs):
        self.steps.append({"x": strategy.mb_x, "y": strategy.mb_y,
                           "model": copy.deepcopy(strategy.model)})  # fmt: skip

    def before_backward(self, strategy, **kwargs):
        source = self.plugin.source
        self.steps[-1] |= {
            "loss": strategy.loss.item(), "rows": len(strategy.mb_output),
            "same": strategy.mb_x is self.steps[-1]["x"], "replay": self.plugin._replay,
            "teacher": self.plugin._teacher, "previous": getattr(source, "previous", None),
        }  # fmt: skip


def probed(make, **options):
    plugin = make()
    probe = Probe(plugin)
    strategy = run([plugin, probe], **options)
    return strategy, plugin, probe.steps


# the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_weighted_sum_of_new_and_replayed(case):
    _, plugin, steps = probed(CASES[case])
    weight = {"adversarial": 0.3}.get(case, 1 / 3)
    first, last = steps[1], steps[13]
    assert first["replay"] is None
    want = F.cross_entropy(first["model"](first["x"]), first["y"])
    assert first["loss"] == pytest.approx(want.item(), rel=1e-6)
    x, y = last["replay"]
    assert not x.requires_grad
    output = last["model"](x)
    if plugin.labels == "source":
        replay = F.cross_entropy(output, y)
    else:
        teacher = last["teacher"](x)[:, :4]  # classes 0 to 3 were seen before
        if plugin.labels == "soft":
            replay = soft_cross_entropy(output, teacher).mean()
        else:
            replay = F.cross_entropy(output, teacher.argmax(1))
    new = F.cross_entropy(last["model"](last["x"]), last["y"])
    want = weight * new + (1 - weight) * replay
    assert last["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert last["same"]  # the batch and its output are new data alone
    assert last["rows"] == 8
    assert len(x) == (5 if case == "after" else 8)


def test_equal_counts_are_one_concatenated_batch():
    _, _, steps = probed(CASES["hard"], n=2)
    step = steps[7]
    x = torch.cat([step["x"], step["replay"][0]])
    y = torch.cat([step["y"], step["teacher"](step["replay"][0])[:, :2].argmax(1)])
    assert step["loss"] == pytest.approx(F.cross_entropy(step["model"](x), y).item(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_all_weight_on_new_data_it_is_naive_bit_for_bit(case):
    plugin = CASES[case]()
    plugin.r = 1.0
    before = copy.deepcopy(getattr(plugin.source, "model", nn.Linear(1, 1)).state_dict())
    assert torch.equal(weights(run([plugin])), weights(run([])))
    after = getattr(plugin.source, "model", None)
    if after is not None:
        assert equal(before, after.state_dict())
    assert not torch.equal(weights(run([CASES[case]()])), weights(run([])))


@pytest.mark.parametrize("case", CASES)
def test_the_first_experience_is_naive_bit_for_bit(case):
    assert torch.equal(weights(run([CASES[case]()], n=1)), weights(run([], n=1)))


class Penalty(SupervisedPlugin):
    """Another plugin's term, and what the whole loss was."""

    def __init__(self, size):
        super().__init__()
        self.size, self.losses = size, []

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + self.size

    def after_backward(self, strategy, **kwargs):
        self.losses.append(strategy.loss.item())


@pytest.mark.parametrize("place", [0, 1])
def test_the_terms_of_other_plugins_are_not_scaled(place):
    losses = []
    for size in (0.0, 100.0):
        penalty, plugins = Penalty(size), [CASES["hard"]()]
        plugins.insert(place, penalty)
        run(plugins)
        losses.append(torch.tensor(penalty.losses))
    torch.testing.assert_close(losses[1] - losses[0], torch.full((15,), 100.0), rtol=0, atol=1e-4)


class Stub(NoiseReplay):
    """Replays ``value``, and counts."""

    def __init__(self, value):
        super().__init__((8,))
        self.value, self.calls = value, []

    def replay(self, n, generator):
        self.calls.append(n)
        return torch.full((n, 8), self.value) + torch.arange(n)[:, None], None


def test_it_is_the_replayed_samples_that_are_scored():
    found = [run([DGRPlugin(Stub(v))], n=2) for v in (0.0, 3.0)]
    assert not torch.equal(weights(found[0]), weights(found[1]))


# what is replayed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["hard", "after", "adversarial", "interleaved_pair", "conditional"]
)
def test_all_replay_comes_from_before_the_experience(case):
    strategy, plugin, steps = probed(CASES[case])
    for k in (1, 2):
        mine = steps[5 * k : 5 * k + 5]
        previous, teacher = mine[0]["previous"], mine[0]["teacher"]
        solver = steps[5 * k]["model"]  # nothing grows here, so it is the one before as well
        assert all(s["previous"] is previous and s["teacher"] is teacher for s in mine)
        frozen = [*previous.parameters(), *(teacher.parameters() if teacher else ())]
        assert all(p.grad is None and not p.requires_grad for p in frozen)
        if teacher is not None:
            x = torch.randn(4, 8)
            assert torch.equal(teacher(x), solver(x))
    optimized = {id(p) for g in strategy.optimizer.param_groups for p in g["params"]}
    assert optimized == {id(p) for p in strategy.model.parameters()}
    assert plugin._teacher is None
    assert plugin.source.previous is None


@pytest.mark.parametrize("case", ["hard", "soft", "noise"])
def test_labels_are_of_classes_seen_before(case):
    plugin = CASES[case]()
    run([plugin], stream=class_stream().train_stream)
    assert plugin.seen == [0, 1, 2, 3, 4, 5]
    assert plugin.label_counts.sum() == 40
    assert plugin.label_counts[4:].sum() == 0


def test_a_solver_that_grows_is_taught_by_the_one_that_had_not_grown():
    _, _, steps = probed(CASES["soft"], model=Net())
    assert [steps[k]["teacher"](torch.randn(1, 8)).shape[1] for k in (5, 10)] == [2, 4]
    x, _ = steps[12]["replay"]
    new = F.cross_entropy(steps[12]["model"](steps[12]["x"]), steps[12]["y"])
    replay = soft_cross_entropy(steps[12]["model"](x), steps[12]["teacher"](x)).mean()
    assert steps[12]["loss"] == pytest.approx((new / 3 + 2 * replay / 3).item(), rel=1e-5)


def test_samples_are_made_for_several_steps_at_once():
    source = Stub(1.0)
    _, _, steps = probed(lambda: DGRPlugin(source, prefetch=4, n=6), n=2)
    assert source.calls == [24, 24]  # five steps
    rows = [s["replay"][0][:, 0].tolist() for s in steps[5:]]
    assert rows[:4] == [[1.0 + 6 * k + i for i in range(6)] for k in range(4)]
    assert rows[4] == rows[0]
    source.calls.clear()
    run([DGRPlugin(source)], n=2)
    assert source.calls == [8] * 5


def test_the_generator_learns_from_the_samples_that_the_solver_sees():
    seen = []

    class Listener(GeneratorTraining):
        def step(self, x, y, replay):
            seen.append((x, y, replay))
            super().step(x, y, replay)

    source = Listener(model=generator().model)
    _, _, steps = probed(lambda: DGRPlugin(source))
    assert len(seen) == 15
    for (x, y, replay), step in zip(seen, steps, strict=True):
        assert x is step["x"]
        assert y is step["y"]
        assert replay is step["replay"]
    assert seen[4][2] is None
    assert seen[5][2] is not None


@pytest.mark.parametrize(("schedule", "steps"), [("before", [10, 10]), ("after", [0, 10])])
def test_the_sources_own_loop_runs_before_or_after_the_solver(schedule, steps):
    source = generator(train_epochs=2)
    found = []

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            found.append(source.steps)

        def after_training_exp(self, strategy, **kwargs):
            found.append(source.steps)

    run([DGRPlugin(source, schedule=schedule), Watch()], n=1)
    assert found == steps
    assert source.experiences == 1


def test_every_experience_and_every_seed_draws_other_numbers():
    seeds = []

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            seeds.append(strategy.plugins[0]._draws.initial_seed())

    for seed in (1, 2):
        run([CASES["noise"](), Watch()], n=2, seed=seed)
    assert len(set(seeds)) == 4


def test_an_adversarial_source_learns_before_the_solver_by_default():
    assert DGRPlugin(generator("wgan")).schedule == "before"
    assert DGRPlugin(generator()).schedule == "interleaved"


# rivals -----------------------------------------------------------------------------------------


def test_exact_replay_draws_every_earlier_sample_with_its_label():
    stream, source = class_stream().train_stream, ExactReplay()
    for experience in stream[:2]:
        source.begin(experience, torch.device("cpu"))
        source.finish()
    source.begin(stream[2], torch.device("cpu"))
    x, y = source.replay(8000, torch.Generator().manual_seed(0))
    known = {tuple(row[0].tolist()): int(row[1]) for e in stream[:2] for row in e.dataset}
    counts = dict.fromkeys(known, 0)
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        assert known[tuple(row)] == label
        counts[tuple(row)] += 1
    assert len(counts) == 80
    assert min(counts.values()) > 60  # 100 each is expected
    assert max(counts.values()) < 150
    # Any part of what is drawn is of all experiences: steps take it in order.
    for part in y.split(1000):
        assert 400 < (part < 2).sum() < 600


@pytest.mark.parametrize("number", [int, float])
def test_noise_is_uniform_over_the_datas_range(number):
    x, y = NoiseReplay((2, 3), value_range=(number(-1), number(3))).replay(5000, torch.Generator())
    assert y is None
    assert x.shape == (5000, 2, 3)
    assert x.min() >= -1
    assert x.max() <= 3
    assert x.mean().item() == pytest.approx(1.0, abs=0.03)
    assert x.var().item() == pytest.approx(16 / 12, abs=0.03)


def test_what_replay_is_worth_on_real_digits():
    def accuracy(make):
        benchmark = split_digits(train_per_experience=80)
        torch.manual_seed(0)
        model = MLP(64, (64,), 10)
        plugins = [] if make is None else [make()]
        strategy = naive(model, plugins, batch=40, epochs=20)
        strategy.optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[])
        hits = []
        for experience in benchmark.test_stream:
            x, y, _ = map(torch.as_tensor, zip(*[(x.flatten().tolist(), y, t)
                          for x, y, t in experience.dataset], strict=True))  # fmt: skip
            hits.append(model(x).argmax(1) == y)
        return torch.cat(hits).float().mean()

    def conditional():
        model = VAE((1, 8, 8), hidden=(64,), latent=8, n_classes=10)
        return DGRPlugin(GeneratorTraining(model=model, lr=3e-3), labels="source")

    exact = accuracy(lambda: DGRPlugin(ExactReplay(), labels="source"))
    noise = accuracy(lambda: DGRPlugin(NoiseReplay((1, 8, 8)), labels="soft"))
    replay, nothing = accuracy(conditional), accuracy(None)
    assert exact > 0.75
    assert replay > 0.5
    assert max(noise, nothing) < 0.3


# Avalanche --------------------------------------------------------------------------------------


STOCK = {
    "lwf": lambda: LwFPlugin(alpha=0.5, temperature=2),
    "ewc": lambda: EWCPlugin(0.1),
    "replay": lambda: ReplayPlugin(mem_size=20),
    "ber": lambda: BERPlugin(4),
    "drl": lambda: DRLPlugin(1e-2),
}


@pytest.mark.parametrize("stock", STOCK)
def test_composes_with_other_plugins_in_either_order(stock):
    after = run([CASES["hard"](), STOCK[stock]()])
    before = run([STOCK[stock](), CASES["hard"]()])
    torch.testing.assert_close(weights(after), weights(before), rtol=0, atol=2e-5)
    assert not torch.equal(weights(after), weights(run([CASES["hard"]()])))


@pytest.mark.parametrize("case", CASES)
def test_a_strategy_pickled_in_mid_stream_goes_on_to_the_same_weights(case):
    stream = class_stream().train_stream
    whole, half = run([CASES[case]()]), run([CASES[case]()], n=2)
    stored, state = pickle.dumps(half), torch.get_rng_state()
    twin = copy.deepcopy(half)
    before = weights(twin).clone()
    torch.manual_seed(99)
    resumed = pickle.loads(stored)
    torch.set_rng_state(state)
    resumed.train(stream[2], eval_streams=[])
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(weights(twin), before)


class StoppedError(Exception):
    pass


class Stop(SupervisedPlugin):
    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise StoppedError


@pytest.mark.parametrize("case", ["soft", "adversarial", "exact"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(case, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_cases.CASES, "dgr", lambda optimizer: [CASES[case]()])
    Stop.at = -1
    whole = checkpoint_cases.train("dgr", tmp_path / "whole", None, [Stop()])
    for Stop.at in (4, 13, 23):  # within each of the three experiences
        with pytest.raises(StoppedError):
            checkpoint_cases.train("dgr", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("dgr", tmp_path / "parts", 1, [Stop()]) == whole


def test_evaluation_in_mid_training_does_not_change_the_result_and_scores_real_data_alone():
    class Evaluate(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            with torch.random.fork_rng():
                strategy.eval(class_stream().test_stream[0])

    class Losses(SupervisedPlugin):
        def after_eval_iteration(self, strategy, **kwargs):
            want = F.cross_entropy(strategy.mb_output, strategy.mb_y)
            assert torch.equal(strategy.loss, want)

    observed = run([CASES["hard"](), Evaluate(), Losses()])
    assert torch.equal(weights(observed), weights(run([CASES["hard"]()])))


@pytest.mark.parametrize("lookahead", [1, 3])
def test_composes_with_a_strategy_that_counts_its_batches(lookahead):
    recipe = dataclasses.replace(
        find_recipe("expandable_der/split_digits").smoke(), lookahead=lookahead
    )
    found = []
    for place in ("plugins", "before"):
        RNGManager.set_random_seeds(3)
        model = VAE((1, 8, 8), hidden=(16,), latent=4)
        plugin = DGRPlugin(GeneratorTraining(model=model))
        strategy = build_strategy(recipe, plugins=[plugin] if place == "plugins" else [])
        if place == "before":
            strategy.plugins.insert(0, plugin)
        for experience in recipe.benchmark.build(0).train_stream[:3]:
            strategy.train(experience, eval_streams=[])
        found.append(weights(strategy))
        assert plugin.label_counts.sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


def test_replay_goes_through_mixed_precision_as_the_data_does():
    dtypes = []
    model = MLP(8, (16,), 6)
    hook = model.classifier.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    strategy = naive(model, [PrecisionPlugin("bf16"), CASES["hard"]()])
    strategy.train(class_stream().train_stream[0], eval_streams=[])
    dtypes.clear()
    strategy.train(class_stream().train_stream[1], eval_streams=[])
    hook.remove()
    assert dtypes.count(torch.bfloat16) == 10  # new and replayed, five steps; the teacher's apart


def test_what_it_finds_is_logged():
    found = {}

    class Logger:
        def log_metrics(self, values):
            found.update({v.name: v.value for v in values})

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    evaluator.loggers = [Logger()]
    plugin = DGRPlugin(ExactReplay(), labels="source", n=64)
    run([plugin], evaluator=evaluator)
    loss = next(v for k, v in found.items() if k.startswith("DGR_Loss"))
    spread = next(v for k, v in found.items() if k.startswith("DGR_LabelKL"))
    assert 0 < loss < 5
    p = plugin.label_counts[:4] / plugin.label_counts.sum()
    assert spread == pytest.approx(float((p * (4 * p).log()).sum()), abs=1e-6)
    assert spread < 0.05


def test_nothing_is_left_on_the_strategy():
    strategy = run([CASES["hard"]()])
    assert "criterion" not in vars(strategy)


# what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": "one-hot"}, "'hard'"),
        ({"labels": "source"}, "n_classes"),
        ({"r": 2.0}, "'class_ratio'"),
        ({"schedule": "during"}, "interleaved"),
        ({"n": 0}, "n >= 1"),
        ({"prefetch": 0}, "prefetch >= 1"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DGRPlugin(NoiseReplay((8,)), **options)


def test_a_bare_network_is_no_source():
    with pytest.raises(TypeError, match="GeneratorTraining"):
        DGRPlugin(VAE((8,)))
    with pytest.raises(ValueError, match="value_range"):
        NoiseReplay((8,), value_range=None)


@pytest.mark.parametrize("case", ["hard", "soft"])
def test_one_head_does_not_look_at_task_labels(case):
    plain = run([CASES[case]()])
    labelled = run([CASES[case]()], stream=class_stream(task_labels=True).train_stream)
    assert torch.equal(weights(labelled), weights(plain))


def test_a_head_for_each_task_is_refused():
    stream = class_stream(task_labels=True).train_stream
    with pytest.raises(ValueError, match=r"task labels \[0, 1\].*MultiTaskDecorator"):
        run([CASES["hard"]()], model=as_multitask(MLP(8, (16,), 6), "classifier"), stream=stream)


def test_an_empty_experience_is_refused():
    experience = class_stream().train_stream[0]
    experience._dataset = experience.dataset.subset([])
    with pytest.raises(ValueError, match="empty"):
        run([CASES["hard"]()], stream=[experience])


def test_a_class_that_is_never_replayed_is_reported_with_the_count():
    class Mute(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            with torch.no_grad():
                strategy.model.classifier.bias[0] = 1e6  # what is labelled next is all of class 0

    def go(n, **options):
        run([DGRPlugin(NoiseReplay((8,)), n=n), Mute()], n=2, **options)

    with pytest.warns(UserWarning, match="none of the 200 .* experience 2 was labelled 1:"):
        go(40)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "none of the")
        go(39)  # too few to say


def test_sub_experiences_of_a_stream_online_are_one_experience():
    stream = split_online_stream(class_stream().train_stream, 20, access_task_boundaries=True)
    plugin = CASES["hard"]()
    probe = Probe(plugin)
    run([plugin, probe], stream=list(stream), n=4)
    assert plugin.experiences == 2
    assert plugin.source.experiences == 2
    assert [s["replay"] is None for s in probe.steps] == [True] * 6 + [False] * 6
    assert probe.steps[6]["teacher"] is probe.steps[11]["teacher"]
