"""Latent generative memory inside Avalanche's own loop, against losses computed by hand."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training.plugins import (
    AGEMPlugin,
    EvaluationPlugin,
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.evaluation.accounting import bytes_remembered
from avalanche_ext.models.backbones import SmallConvNet
from avalanche_ext.models.feature_memory import GaussianMemory
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.models.generators.wgan import WGAN
from avalanche_ext.models.mlp import MLP
from avalanche_ext.models.network_split import NetworkSplit
from avalanche_ext.training.plugins.latent_generative_memory import LatentGenerativeMemoryPlugin
from avalanche_ext.training.plugins.latent_replay import LatentReplayPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from avalanche_ext.training.supervised.generator_training import GeneratorTraining
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases

pytestmark = pytest.mark.filterwarnings("ignore:No loggers", "ignore:the generator has collapsed")

LGM = functools.partial(LatentGenerativeMemoryPlugin, "features.1")


def generator(kind=VAE, n_classes=6, **options):
    torch.manual_seed(7)
    sizes = {"hidden": (8,)} if kind is VAE else {"network": "mlp", "widths": (8,)}
    model = kind((16,), latent=4, n_classes=n_classes, value_range=None, **sizes)
    return GeneratorTraining(model=model, critic_steps=2, **options)


CASES = {
    "gaussian": lambda: LGM(),
    "diagonal": lambda: LGM(memory="diagonal", encoder="frozen", r="1/t"),
    "mixture": lambda: LGM(memory=GaussianMemory("full", components=2), r=0.3),
    "distill": lambda: LGM(encoder="distill", lam=0.5),
    "sdc": lambda: LGM(encoder="finetune", drift="sdc"),
    "prototypes": lambda: LGM(encoder="slow", drift="prototypes", prototypes=3),
    "vae": lambda: LGM(memory=generator()),
    "wgan": lambda: LGM(memory=generator(WGAN), encoder="frozen"),
    "built": lambda: LGM(memory="vae", encoder="distill"),
    "stored": lambda: LatentReplayPlugin("features.1", mem=20),
}


class Net(nn.Module):
    """A head that grows, and batch norm on both sides of the cut."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.top = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.classifier = IncrementalClassifier(12, 2)

    def forward(self, x):
        return self.classifier(self.top(self.body(x)))


def run(plugins, *, model=None, n=3, seed=1, stream=None, **options):
    torch.manual_seed(seed)
    strategy = naive(model or MLP(8, (16, 12), 6), plugins, **options)
    for experience in (stream or class_stream().train_stream)[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy


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

    def after_backward(self, strategy, **kwargs):
        self.steps[-1] |= {
            "loss": strategy.loss.item(), "rows": len(strategy.mb_output),
            "same": strategy.mb_x is self.steps[-1]["x"], "replay": self.plugin._replay,
            "teacher": getattr(self.plugin, "_teacher", None),
            "grads": {n: p.grad for n, p in strategy.model.named_parameters()},
        }  # fmt: skip


def probed(make, **options):
    plugin = make()
    probe = Probe(plugin)
    strategy = run([plugin, probe], **options)
    return strategy, plugin, probe.steps


# the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_weighted_sum_of_new_and_drawn(case):
    _, _, steps = probed(CASES[case])
    weight = {"mixture": 0.3, "stored": 0.5}.get(case, 1 / 3)
    first, last = steps[1], steps[13]
    assert first["replay"] is None
    want = F.cross_entropy(first["model"](first["x"]), first["y"])
    assert first["loss"] == pytest.approx(want.item(), rel=1e-6)
    u, y = last["replay"]
    assert not u.requires_grad
    assert u.shape == (8, 16)
    assert (u >= 0).all()
    net = last["model"]
    new = F.cross_entropy(net(last["x"]), last["y"])
    old = F.cross_entropy(net.classifier(net.features[2:](u)), y)
    want = weight * new + (1 - weight) * old
    if case in ("distill", "built"):
        lam = {"distill": 0.5, "built": 1.0}[case]
        moved = net.features[:2](last["x"]) - last["teacher"].module.features[:2](last["x"])
        assert moved.abs().max() > 1e-4
        want = want + lam * moved.square().sum(1).mean()
    assert last["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert last["same"]  # the batch and its output are new data alone
    assert last["rows"] == 8


@pytest.mark.parametrize("case", CASES)
def test_with_all_weight_on_new_data_it_is_naive_bit_for_bit(case):
    plugin = CASES[case]()
    plugin.r = 1
    assert torch.equal(weights(run([plugin])), weights(run([])))
    assert plugin.bytes_remembered == 0 or case in ("vae", "wgan")
    assert not torch.equal(weights(run([CASES[case]()])), weights(run([])))


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("diagonal", "wgan")])  # not frozen
@pytest.mark.parametrize("model", [None, Net])
def test_the_first_experience_is_naive_bit_for_bit(case, model):
    plugin = CASES[case]()
    if model is not None:
        plugin.layer = "body.2"
    calls = []
    plugin.memory.sample = lambda n, generator: calls.append(n)
    torch.manual_seed(1)
    pair = [model() if model else MLP(8, (16, 12), 6) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    found = run([plugin], n=1, model=pair[0])
    plain = run([], n=1, model=pair[1])
    state = zip(found.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in state)
    assert calls == []


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
        penalty, plugins = Penalty(size), [CASES["distill"]()]
        plugins.insert(place, penalty)
        run(plugins)
        losses.append(torch.tensor(penalty.losses))
    torch.testing.assert_close(losses[1] - losses[0], torch.full((15,), 100.0), rtol=0, atol=1e-4)


def test_labels_take_turns_over_old_classes_whatever_the_batch():
    _, _, steps = probed(CASES["gaussian"], batch=7)
    for k, step in enumerate(steps):
        old = 2 * (k // 6)  # six steps an experience, the last of 5 samples
        if old:
            counts = step["replay"][1].bincount(minlength=old)
            assert len(counts) == old
            assert counts.sum() == len(step["x"]) == (7 if k % 6 < 5 else 5)
            assert counts.max() - counts.min() <= 1
    for k in (1, 2):  # no draw is given twice
        drawn = torch.cat([step["replay"][0] for step in steps[6 * k : 6 * k + 6]])
        assert len(drawn.unique(dim=0)) == len(drawn) == 40


# what is written --------------------------------------------------------------------------------


def test_densities_are_those_of_the_encoders_features():
    plugin = LGM(memory="full")
    strategy = run([plugin])
    for experience in class_stream().train_stream:
        rows = [(x, y) for x, y, _ in experience.dataset]
        x, y = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
        u = strategy.model.features[:2](x).detach()
        for label in y.unique().tolist():
            mine, gaussian = u[y == label].double(), plugin.memory._gaussians[label][0]
            torch.testing.assert_close(gaussian.mean.double(), mine.mean(0), atol=1e-5, rtol=0)
            cov = gaussian.factor.double()
            torch.testing.assert_close(cov.T @ cov, mine.T.cov(), atol=1e-4, rtol=1e-4)
    assert plugin.seen == [0, 1, 2, 3, 4, 5]


def test_bytes_are_those_of_the_memory():
    strategy = run([LGM(memory=GaussianMemory(3))])
    assert bytes_remembered(strategy) == 6 * 4 * 16 * 4
    assert bytes_remembered(run([CASES["stored"]()])) == 20 * (16 * 4 + 8)
    vae = run([CASES["vae"]()]).plugins[0]
    assert vae.bytes_remembered == 4 * sum(
        p.numel() for p in vae.memory.training.model.parameters()
    )


def test_the_memory_moves_with_the_encoder_and_the_teacher_goes():
    plugin = LGM(memory="full", encoder="finetune", drift="linear")
    strategy = run([plugin], n=1)
    x = torch.stack([x for x, *_ in class_stream().train_stream[1].dataset])
    split = NetworkSplit(strategy.model, "features.1")
    before, mean = split.features(x).detach(), plugin.memory._gaussians[0][0].mean.clone()
    strategy.train(class_stream().train_stream[1], eval_streams=[])
    after = split.features(x).detach()
    twin = GaussianMemory()
    twin.write(torch.stack([mean, mean + 1]), torch.zeros(2, dtype=torch.int64))
    twin._gaussians[0][0].mean = mean
    twin.follow(before, after, "linear")
    torch.testing.assert_close(
        plugin.memory._gaussians[0][0].mean, twin._gaussians[0][0].mean, atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(mean, plugin.memory._gaussians[0][0].mean, atol=1e-2)
    assert plugin._teacher is None


def test_densities_follow_the_prototypes_of_their_class():
    plugin = LGM(encoder="finetune", drift="prototypes", prototypes=3)
    strategy = run([plugin], n=1)
    data = class_stream().train_stream[0].dataset
    split = NetworkSplit(strategy.model, "features.1")
    for label in (0, 1):  # those nearest to the mean, by a loop
        x = torch.stack([x for x, y, *_ in data if y == label])
        u = split.features(x).detach()
        nearest = sorted(range(len(u)), key=lambda i: float((u[i] - u.mean(0)).norm()))[:3]
        torch.testing.assert_close(plugin.images[label], x[nearest])
    images = {label: x.clone() for label, x in plugin.images.items()}
    before = {label: split.features(x).detach().mean(0) for label, x in images.items()}
    means = {label: plugin.memory._gaussians[label][0].mean.clone() for label in images}
    factors = {label: plugin.memory._gaussians[label][0].factor.clone() for label in images}
    strategy.train(class_stream().train_stream[1], eval_streams=[])
    for label, x in images.items():
        moved = split.features(x).detach().mean(0) - before[label]
        gaussian = plugin.memory._gaussians[label][0]
        torch.testing.assert_close(gaussian.mean, means[label] + moved, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(gaussian.mean, means[label], atol=1e-2)
        assert torch.equal(gaussian.factor, factors[label])
        assert torch.equal(plugin.images[label], x)
    assert plugin.bytes_remembered == plugin.memory.nbytes + 4 * 3 * 8 * 4
    assert list(plugin.images) == [0, 1, 2, 3]


# the encoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_slow_encoder_takes_a_share_of_the_optimizers_step(optimizer):
    """Of one step of both kinds, from the same weights, whatever the optimizer."""
    taken = {}
    for name, slow in (("whole", 1.0), ("tenth", 0.1), ("none", 0.0)):
        torch.manual_seed(0)
        strategy = naive(MLP(8, (16, 12), 6), [LGM(encoder="slow", slow=slow, drift="none")])
        strategy.optimizer = optimizer(strategy.model.parameters(), 0.05)
        stream = class_stream(n_per_class=4).train_stream
        strategy.train(stream[0], eval_streams=[])
        first = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
        strategy.train(stream[1], eval_streams=[])
        assert strategy.clock.train_iterations == 2  # one for each
        taken[name] = {n: p.detach() - first[n] for n, p in strategy.model.named_parameters()}
    for name, whole in taken["whole"].items():
        encoder = name.startswith("features.0")
        assert whole.abs().max() > 1e-3
        share = 0.1 if encoder else 1.0
        torch.testing.assert_close(taken["tenth"][name], share * whole, atol=1e-6, rtol=1e-4)
        assert bool(taken["none"][name].any()) == (not encoder)


def test_a_slow_encoder_that_takes_whole_steps_is_a_free_one():
    slow = run([LGM(encoder="slow", slow=1.0, drift="none")])
    torch.testing.assert_close(weights(slow), weights(run([LGM(encoder="finetune")])))


@pytest.mark.parametrize(
    ("encoder", "moves"),
    [("frozen", (False, False)), ("freeze_after_first", (True, False)),
     ("slow", (True, True)), ("distill", (True, True)), ("finetune", (True, True))],
)  # fmt: skip
def test_what_the_encoder_may_do(encoder, moves):
    plugin = LatentGenerativeMemoryPlugin("body.3", encoder=encoder)
    torch.manual_seed(0)
    model, stream, x = Net(), class_stream().train_stream, torch.randn(5, 8)
    strategy = naive(model, [plugin])
    strategy.optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-2)
    for k in range(3):
        state = copy.deepcopy(model.body.state_dict())
        top = copy.deepcopy(model.top.state_dict())
        before = model.eval().body(x)
        densities = pickle.dumps(plugin.memory._gaussians.get(0))
        strategy.train(stream[k], eval_streams=[])
        same = all(torch.equal(a, b) for a, b in
                   zip(state.values(), model.body.state_dict().values(), strict=True))  # fmt: skip
        may = moves[min(k, 1)]
        assert same == (not may)  # batch norm's statistics too
        assert torch.equal(model.eval().body(x), before) == (not may)
        assert any(not torch.equal(a, b) for a, b in
                   zip(top.values(), model.top.state_dict().values(), strict=True))  # fmt: skip
        if k and encoder not in ("slow", "distill"):
            assert pickle.dumps(plugin.memory._gaussians[0]) == densities


def test_drawn_features_teach_the_head_alone():
    class Alone(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter:
                strategy.loss = strategy.loss - strategy.plugins[0]._weight * F.cross_entropy(
                    strategy.mb_output, strategy.mb_y
                )

    plugin = LGM(encoder="finetune")
    probe = Probe(plugin)
    run([plugin, Alone(), probe], n=2)
    steps = probe.steps[6]["grads"]
    assert steps["features.0.weight"].abs().max() < 1e-6
    assert steps["features.2.weight"].abs().max() > 1e-3


def test_statistics_of_the_encoder_follow_new_data_alone():
    """The single sample of zeros in front of the cut leaves no trace."""
    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = Net()
        plugin = LatentGenerativeMemoryPlugin("body.1", encoder="finetune", r=0.999999999)
        strategy = naive(model, [plugin] if watched else [])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.classifier.requires_grad_(True)
        for experience in class_stream().train_stream[:2]:
            strategy.train(experience, eval_streams=[])
        found.append(model.body[1].running_mean.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("rival", [AGEMPlugin(4, 4), GEMPlugin(4, 0.5)], ids=["agem", "gem"])
@pytest.mark.parametrize("make", [
    lambda: LatentGenerativeMemoryPlugin("body.3"),
    lambda: LatentGenerativeMemoryPlugin("body.3", encoder="slow"),
    lambda: LatentGenerativeMemoryPlugin("body.3", encoder="distill"),
    lambda: LatentReplayPlugin("body.3", mem=20),
], ids=["frozen", "slow", "distilled", "stored"])  # fmt: skip
def test_a_plugin_that_puts_all_in_training_mode_does_not_move_what_is_held(make, rival):
    class Modes(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            modes.append([module.training for module in strategy.model.body])

    torch.manual_seed(0)
    model, modes = Net(), []
    strategy = naive(model, [make(), copy.deepcopy(rival), Modes()])
    stream = class_stream().train_stream
    strategy.train(stream[0], eval_streams=[])
    front, behind = copy.deepcopy(model.body[1]), copy.deepcopy(model.top[1])
    assert all(map(all, modes))
    modes.clear()
    strategy.train(stream[1], eval_streams=[])
    assert not any(map(any, modes))
    for (name, now), before in zip(model.body[1].named_buffers(), front.buffers(), strict=True):
        assert torch.equal(now, before), name
    assert not torch.equal(model.top[1].running_mean, behind.running_mean)


@pytest.mark.parametrize("encoder", ["slow", "distill"])
def test_where_the_encoder_is_held_its_statistics_are(encoder):
    """And the distance to the last encoder is 0 where it has not moved, batch norm or not."""

    class Losses(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.whole = []

        def before_backward(self, strategy, **kwargs):
            self.whole.append(float(strategy.loss.detach()))

    alone = LatentGenerativeMemoryPlugin("body.3", encoder=encoder, lam=0.0)
    held = LatentGenerativeMemoryPlugin("body.3", encoder=encoder, lam=1.0)
    found = []
    for plugin in (alone, held):
        torch.manual_seed(0)
        model, losses = Net(), Losses()
        strategy = naive(model, [plugin, losses], lr=0.02)
        stream = class_stream().train_stream
        strategy.train(stream[0], eval_streams=[])
        first = model.body[1].running_mean.clone()
        strategy.train(stream[1], eval_streams=[])
        assert torch.equal(model.body[1].running_mean, first)
        assert first.any()
        found.append(losses.whole)
    steps = len(class_stream().train_stream[0].dataset) // 8
    assert found[0][steps] == pytest.approx(found[1][steps], abs=1e-6)  # has not moved yet
    same = found[0][steps + 1 :] == pytest.approx(found[1][steps + 1 :], abs=1e-6)
    assert same == (encoder == "slow")  # which knows no distance


@pytest.mark.parametrize(("layer", "shape"), [("features.2", (4, 8, 8)), ("features.7", (6,))])
def test_maps_are_flattened_for_the_memory_alone(layer, shape):
    train = class_stream(width=3 * 8 * 8).train_stream

    class Images(SmallConvNet):
        def forward(self, x):
            return super().forward(x.unflatten(1, (3, 8, 8)))

    plugin = LatentGenerativeMemoryPlugin(layer, memory="diagonal")
    run([plugin], model=Images(6, 3, (4, 6)), stream=train)
    width = torch.Size(shape).numel()
    assert plugin.memory.sample(3)[0].shape == (3, width)
    assert plugin._shape == torch.Size(shape)
    assert plugin.bytes_remembered == 6 * 2 * width * 4


# what it is worth -------------------------------------------------------------------------------


def accuracy(make, *, seed=0, epochs=6):
    benchmark = split_digits()
    torch.manual_seed(seed)
    model = MLP(64, (64, 32), 10)
    strategy = naive(model, [make()], batch=16, epochs=epochs)
    strategy.optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    hits = []
    for experience in benchmark.test_stream:
        x, y, _ = map(torch.as_tensor, zip(*[(x.flatten().tolist(), y, t)
                      for x, y, t in experience.dataset], strict=True))  # fmt: skip
        hits.append(model(x).argmax(1) == y)
    return torch.cat(hits).float().mean().item()


def test_what_it_is_worth_on_real_digits():
    frozen = accuracy(lambda: LGM(encoder="frozen"))
    first = accuracy(CASES["gaussian"])
    finetune = accuracy(lambda: LGM(encoder="finetune"))
    assert frozen > 0.75
    assert first > 0.6
    assert finetune < 0.3


def test_a_memory_that_follows_is_worth_more_than_one_that_does_not():
    still, linear = (
        accuracy(lambda d=d: LGM(encoder="distill", lam=0.1, drift=d)) for d in ("none", "linear")
    )
    assert linear > still + 0.1


# Avalanche --------------------------------------------------------------------------------------


STOCK = {
    "lwf": lambda: LwFPlugin(alpha=0.5, temperature=2),
    "ewc": lambda: EWCPlugin(0.1),
    "replay": lambda: ReplayPlugin(mem_size=20),
    "ber": lambda: BERPlugin(4),
    "drl": lambda: DRLPlugin(1e-2),
}


@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("case", ["gaussian", "distill"])
def test_composes_with_other_plugins_in_either_order(case, stock):
    after = run([CASES[case](), STOCK[stock]()])
    before = run([STOCK[stock](), CASES[case]()])
    torch.testing.assert_close(weights(after), weights(before), rtol=0, atol=2e-5)
    assert not torch.equal(weights(after), weights(run([CASES[case]()])))


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


RESUMED = {
    "distilled": lambda: LatentGenerativeMemoryPlugin("body.1", encoder="distill"),
    "generated": lambda: LatentGenerativeMemoryPlugin("body.1", memory=generator()),
    "stored": lambda: LatentReplayPlugin("body.1", mem=9),
    "slow": lambda: LatentReplayPlugin("body.1", mem=9, encoder="slow"),
    "prototypes": lambda: LatentGenerativeMemoryPlugin(
        "body.1", encoder="distill", drift="prototypes", prototypes=2
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_ends_as_if_it_had_not_been(case, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_cases.CASES, "lgm", lambda optimizer: [RESUMED[case]()])
    Stop.at = -1
    whole = checkpoint_cases.train("lgm", tmp_path / "whole", None, [Stop()])
    for Stop.at in (13, 23):  # within the second and the third experience
        with pytest.raises(StoppedError):
            checkpoint_cases.train("lgm", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("lgm", tmp_path / "parts", 1, [Stop()]) == whole


@pytest.mark.parametrize("case", CASES)
def test_the_global_random_state_is_what_it_is_without(case):
    found = []
    for plugins in ([CASES[case]()], []):
        run(plugins, n=2)
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


def test_evaluation_in_mid_training_does_not_change_the_result_and_scores_real_data_alone():
    class Evaluate(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            with torch.random.fork_rng():
                strategy.eval(class_stream().test_stream[0])

    class Losses(SupervisedPlugin):
        def after_eval_iteration(self, strategy, **kwargs):
            want = F.cross_entropy(strategy.mb_output, strategy.mb_y)
            assert torch.equal(strategy.loss, want)

    for case in ("gaussian", "distill"):
        observed = run([CASES[case](), Evaluate(), Losses()])
        assert torch.equal(weights(observed), weights(run([CASES[case]()])))


@pytest.mark.parametrize("case", ["gaussian", "vae"])
def test_drawn_features_go_through_mixed_precision_as_the_data_does(case):
    dtypes = []
    model = MLP(8, (16, 12), 6)
    strategy = naive(model, [PrecisionPlugin("bf16"), CASES[case]()])
    strategy.train(class_stream().train_stream[0], eval_streams=[])
    hook = model.classifier.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    strategy.train(class_stream().train_stream[1], eval_streams=[])
    hook.remove()
    assert dtypes.count(torch.bfloat16) == 10  # new and drawn, five steps
    assert torch.isfinite(weights(strategy)).all()


def test_drawn_features_are_no_batch_of_the_strategys_loader():
    class Counting(Naive):
        batches = 0

        def forward(self):
            self.batches += 1
            return super().forward()

    torch.manual_seed(1)
    model = MLP(8, (16, 12), 6)
    strategy = Counting(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), train_mb_size=8,
        criterion=nn.CrossEntropyLoss(), plugins=[LGM()], evaluator=None,
    )  # fmt: skip
    for experience in class_stream().train_stream:
        strategy.train(experience, eval_streams=[])
    assert strategy.batches == 15
    assert torch.equal(weights(strategy), weights(run([LGM()])))


def test_what_it_finds_is_logged():
    found = {}

    class Logger:
        def log_metrics(self, values):
            found.update({v.name.split("/")[0]: v.value for v in values})

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    evaluator.loggers = [Logger()]
    probe = Probe(CASES["distill"]())
    strategy = run([probe.plugin, probe], n=2, evaluator=evaluator)
    losses = [
        F.cross_entropy(s["model"].classifier(s["model"].features[2:](s["replay"][0])),
                        s["replay"][1]).item() for s in probe.steps[5:]
    ]  # fmt: skip
    assert found["LatentGenerativeMemory_Loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["LatentGenerativeMemory_Bytes"] == probe.plugin.memory.nbytes
    x = torch.stack([x for x, *_ in class_stream().train_stream[1].dataset])
    before, after = (m.features[:2](x) for m in (probe.steps[5]["model"], strategy.model))
    moved = ((after - before).square().sum() / before.square().sum()).item()
    assert found["LatentGenerativeMemory_Drift"] == pytest.approx(moved, rel=1e-4)
    keeps = LGM(encoder="slow", drift="prototypes", prototypes=3)
    run([keeps], n=2, evaluator=evaluator)
    images = 4 * 3 * 8 * 4
    assert found["LatentGenerativeMemory_Bytes"] == keeps.memory.nbytes + images


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_on_strategy_and_model(case):
    strategy = run([CASES[case]()])
    assert "criterion" not in vars(strategy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in strategy.model.modules())
    plugin = strategy.plugins[0]
    assert plugin._split is None
    assert plugin._pool is None


def test_parts_of_an_online_stream_are_one_experience():
    stream = split_online_stream(class_stream().train_stream, 20, access_task_boundaries=True)
    plugin = CASES["gaussian"]()
    probe = Probe(plugin)
    run([plugin, probe], stream=list(stream), n=5)
    assert plugin.experiences == 3
    assert plugin.memory.classes == [0, 1, 2, 3]  # the third goes on, for all that is known
    assert plugin.memory._gaussians[2][0].count == 20
    assert [s["replay"] is None for s in probe.steps] == [True] * 6 + [False] * 9


def test_classes_that_come_back_are_drawn_from_all_that_they_had():
    plugin = CASES["gaussian"]()
    stream = class_stream().train_stream
    found = []

    class Weight(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            found.append(plugin._weight)

    strategy = run([plugin, Weight()], stream=[stream[0], stream[0], stream[1]])
    densities = plugin.memory._gaussians
    assert [[d.count for d in parts] for parts in densities.values()] == [[40], [40], [20], [20]]
    x = torch.stack([x for x, y, *_ in stream[0].dataset if y == 1])
    u = NetworkSplit(strategy.model, "features.1").features(x).detach()
    torch.testing.assert_close(densities[1][0].mean, u.mean(0))
    assert found == [1, 2 / 4, 2 / 6]  # classes are counted at each visit


def test_prototypes_of_a_class_that_comes_back_are_as_many():
    plugin = LGM(encoder="slow", slow=0.0, drift="prototypes", prototypes=3)
    stream, others = (class_stream(seed=s).train_stream for s in (0, 1))
    strategy = run([plugin], stream=[stream[0], others[0]])
    assert {label: x.shape for label, x in plugin.images.items()} == {0: (3, 8), 1: (3, 8)}
    split = NetworkSplit(strategy.model, "features.1")
    for label in (0, 1):  # the nearest of both visits, as the three of each visit can tell
        x = [torch.stack([x for x, y, *_ in s[0].dataset if y == label]) for s in (stream, others)]
        u = [split.features(part).detach() for part in x]
        means = u[0].mean(0), torch.cat(u).mean(0)
        pool = torch.cat([
            part[(v - mean).norm(dim=1).argsort()[:3]]
            for part, v, mean in zip(x, u, means, strict=True)
        ])  # fmt: skip
        far = (split.features(pool).detach() - means[1]).norm(dim=1)
        torch.testing.assert_close(plugin.images[label], pool[far.argsort()[:3]])


# degenerate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["gaussian", "diagonal", "full", "mixture"])
def test_one_class_and_one_sample_at_a_time(memory):
    stream = class_stream(6, n_per_class=1).train_stream
    plugin = LGM(memory=memory)
    strategy = run([plugin], stream=stream, n=6)
    assert torch.isfinite(weights(strategy)).all()
    assert plugin.memory.classes == [0, 1, 2, 3, 4, 5]
    assert strategy.clock.train_iterations == 6


# what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"memory": "gauss"}, "'gaussian'"),
        ({"encoder": "freeze"}, "'freeze_after_first'"),
        ({"drift": "lin"}, "'linear'"),
        ({"drift": "linear"}, "encoder is 'freeze_after_first'"),
        ({"drift": "sdc", "encoder": "distill", "memory": "vae"}, "GeneratorMemory"),
        ({"drift": "prototypes"}, "encoder is 'freeze_after_first'"),
        ({"drift": "prototypes", "encoder": "slow", "prototypes": 0}, "prototypes >= 1"),
        ({"encoder": "slow", "slow": 1.5}, r"slow in \[0, 1\]"),
        ({"r": 1.5}, "'class_ratio'"),
        ({"lam": -1}, "lam >= 0"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LGM(**options)


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="GaussianMemory"):
        LGM(memory=VAE((16,), n_classes=6, value_range=None))
    with pytest.raises(TypeError, match="name of one layer"):
        LatentGenerativeMemoryPlugin(["features.1"])
    with pytest.raises(ValueError, match="n_classes=0"):
        LGM(memory=generator(n_classes=0))
    with pytest.raises(ValueError, match=r"value_range=\(0.0, 1.0\)"):
        LGM(memory=GeneratorTraining(model=VAE((16,), n_classes=6)))


def test_a_layer_that_is_not_there_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"features\.1"):
        run([LatentGenerativeMemoryPlugin("feature.1")])


def test_one_head_does_not_look_at_task_labels():
    plain = run([CASES["gaussian"]()])
    labelled = run([CASES["gaussian"]()], stream=class_stream(task_labels=True).train_stream)
    assert torch.equal(weights(labelled), weights(plain))


def test_a_head_for_each_task_is_refused():
    with pytest.raises(ValueError, match="MultiTaskDecorator"):
        run([CASES["gaussian"]()], model=as_multitask(MLP(8, (16, 12), 6), "classifier"))


def test_a_network_from_compile_is_refused():
    model = torch.compile(MLP(8, (16, 12), 6), backend="eager")
    with pytest.raises(ValueError, match="CompilePlugin"):
        naive(model, [CASES["gaussian"]()]).train(class_stream().train_stream[0])


@pytest.mark.parametrize(("encoder", "n"), [("frozen", 0), ("freeze_after_first", 1)])
def test_a_cut_that_leaves_nothing_to_learn_is_refused(encoder, n):
    plugin = LatentGenerativeMemoryPlugin("classifier", encoder=encoder)
    strategy = run([plugin], n=n)
    with pytest.raises(ValueError, match="nothing is left to learn"):
        strategy.train(class_stream().train_stream[n], eval_streams=[])


def test_a_layer_without_features_is_refused():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.one, self.top = nn.Linear(8, 1), nn.Flatten(0), nn.Linear(1, 6)

        def forward(self, x):
            return self.top(self.one(self.low(x))[:, None])

    with pytest.raises(ValueError, match=r"layer 'one' gives one number|no row|shape"):
        run([LatentGenerativeMemoryPlugin("one")], model=Sum())


def test_a_generator_by_name_needs_an_output_for_every_class():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"no label for \[2, 3\].*n_classes"):
        run([LatentGenerativeMemoryPlugin("body.3", memory="vae")], model=Net())


def test_the_network_is_left_as_it_was_after_an_error():
    class Fails(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 7:
                raise KeyboardInterrupt

    plugin = CASES["distill"]()
    strategy = run([plugin], n=1)
    strategy.plugins.append(Fails())
    stream = class_stream().train_stream
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1], eval_streams=[])
    strategy.plugins.pop()
    strategy.train(stream[2], eval_streams=[])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in strategy.model.modules())


def test_another_network_in_mid_stream_is_refused():
    plugin = CASES["gaussian"]()
    run([plugin], n=1)
    with pytest.raises(ValueError, match=r"\(16,\) before, and now \(9,\)"):
        run([copy.deepcopy(plugin)], model=MLP(8, (9, 12), 6))


def test_an_empty_experience_is_refused():
    experience = class_stream().train_stream[0]
    experience._dataset = experience.dataset.subset([])
    with pytest.raises(ValueError, match="empty"):
        run([CASES["gaussian"]()], stream=[experience])
