"""EWC, online EWC, SI, MAS, RWalk and L2 transfer inside Avalanche's own training loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training.plugins import (
    EvaluationPlugin,
    GEMPlugin,
    LwFPlugin,
    SupervisedPlugin,
)
from avalanche.training.plugins import SynapticIntelligencePlugin as AvalanchesSI
from torch import nn

from avalanche_ext import BERPlugin, CompilePlugin, DRLPlugin, FixedSizeClassifier, PrecisionPlugin
from avalanche_ext.training.importances import L2, Fisher, OutputNorm
from avalanche_ext.training.path_importances import FisherPath, PathIntegral
from avalanche_ext.training.plugins.parameter_anchor import (
    EWCPlugin,
    L2TransferPlugin,
    MASPlugin,
    OnlineEWCPlugin,
    ParameterAnchorPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from avalanche_ext.training.plugins.parameter_penalty import L2DecayPlugin
from avalanche_ext.training.plugins.slni import SLNIPlugin
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases
from tests.training.plugins.test_slni import dropout_net, equal, mlp, run, weights

# A weight for each that neither does nothing nor diverges on these tiny streams.
METHODS = {
    EWCPlugin: 1.0,
    OnlineEWCPlugin: 1.0,
    SynapticIntelligencePlugin: 1.0,
    MASPlugin: 0.1,
    RWalkPlugin: 1.0,
    L2TransferPlugin: 1.0,
}
ALL = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def make(method):
    return method(METHODS[method])


class Probe(SupervisedPlugin):
    """Every step's parameters before it, gradients, the loss and whether the model trains."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_forward(self, strategy, **kwargs):
        self.training = strategy.model.training

    def after_backward(self, strategy, **kwargs):
        named = dict(strategy.model.named_parameters())
        self.steps.append({
            "experience": strategy.clock.train_exp_counter,
            "training": self.training,
            "x": strategy.mb_x, "y": strategy.mb_y, "output": strategy.mb_output.detach(),
            "loss": float(strategy.loss.detach()),
            "theta": {n: p.detach().clone() for n, p in named.items()},
            "grad": {n: None if p.grad is None else p.grad.clone() for n, p in named.items()},
        })  # fmt: skip


class Constant(nn.Module):
    """One number, whatever the sample."""

    def __init__(self, start=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start]))

    def forward(self, x):
        return self.theta.expand(len(x), 1)


class Parabola:
    """The loss ``a / 2 (theta - u)^2`` of a ``Constant``, whatever the label."""

    def __init__(self, a, u):
        self.a, self.u = a, u

    def __call__(self, output, y):
        return 0.5 * self.a * (output - self.u).square().mean()


def parabolas(plugin, targets, *, a=2.0, lr=0.1, epochs=1, start=0.0):
    """Learn one parabola after another; where each left the number."""
    torch.manual_seed(0)
    strategy = naive(Constant(start), [plugin], lr=lr, epochs=epochs, batch=200)
    found = []
    for experience, u in zip(class_stream(len(targets)).train_stream, targets, strict=True):
        strategy._criterion = Parabola(a, u)
        strategy.train(experience)
        found.append(float(strategy.model.theta.detach()))
    return strategy, found


# nothing where nothing is asked for -------------------------------------------------------------


@ALL
def test_weight_zero_is_naive_bit_for_bit(method):
    plugin = method(0.0)
    nothing = run(dropout_net(), [])
    assert equal(weights(run(dropout_net(), [plugin]).model), weights(nothing.model))
    assert plugin.importance == {}
    assert plugin.last is None


@ALL
def test_the_first_experience_is_naive_bit_for_bit_and_the_second_is_not(method):
    for n, same in ((1, True), (2, False)):
        nothing = run(dropout_net(), [], n=n)
        ours = run(dropout_net(), [make(method)], n=n)
        assert equal(weights(ours.model), weights(nothing.model)) == same
        assert "backward" not in vars(ours)  # as it was before training


def test_avalanches_si_does_nothing_on_a_cpu_and_ours_does():
    nothing = run(mlp(), [])
    theirs = run(mlp(), [AvalanchesSI(1e6)])
    assert equal(weights(theirs.model), weights(nothing.model))
    plugin = SynapticIntelligencePlugin(1.0)
    ours = run(mlp(), [plugin])
    assert not equal(weights(ours.model), weights(nothing.model))
    assert plugin.quantiles([1.0])[0] > 0


# the term ---------------------------------------------------------------------------------------


@ALL
def test_loss_and_gradient_have_the_term(method):
    plugin, probe = make(method), Probe()
    first = run(mlp(), [plugin, probe], n=1)
    held = {n: (w.clone(), plugin.anchors[n].clone()) for n, w in plugin.importance.items()}
    assert equal(weights(first.model), [a for _, a in held.values()])
    torch.manual_seed(5)
    first.train(class_stream().train_stream[1])
    step = probe.steps[-1]
    model = mlp()
    model.load_state_dict(step["theta"])
    kappa = 0.5 if isinstance(plugin, EWCPlugin | OnlineEWCPlugin | L2TransferPlugin) else 1.0
    term = kappa * sum(
        (held[n][0] * (p - held[n][1]).square()).sum() for n, p in model.named_parameters()
    )
    loss = nn.functional.cross_entropy(model(step["x"]), step["y"]) + plugin.lam * term
    loss.backward()
    assert float(term.detach()) > 1e-6
    assert step["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(plugin.last, term.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(step["grad"][name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_the_minimum_between_anchor_and_target(lam):
    a, u = 2.0, -1.0
    _, found = parabolas(L2TransferPlugin(lam), [1.0, u], a=a, lr=0.2, epochs=40)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert found[1] == pytest.approx((a * u + lam * found[0]) / (a + lam), abs=1e-5)


def test_kappa_is_one_for_the_others():
    # Importance of the output's squared length: 2 |theta|, of a number that has reached 1.
    _, found = parabolas(MASPlugin(0.5), [1.0, -1.0], a=2.0, lr=0.2, epochs=40)
    stiffness = 2 * 0.5 * 2
    assert found[1] == pytest.approx((2 * -1 + stiffness) / (2 + stiffness), abs=1e-5)


def test_the_epochs_mean_is_published():
    plugin, probe = EWCPlugin(1.0), Probe()
    evaluator = EvaluationPlugin()
    torch.manual_seed(1)
    strategy = naive(mlp(), [plugin, probe], evaluator=evaluator, epochs=2)
    for experience in class_stream().train_stream[:2]:
        strategy.train(experience)
    found = {k: v for k, v in evaluator.get_all_metrics().items() if "EWC_R" in k}
    ((steps, values),) = found.values()
    cross_entropy = [float(nn.functional.cross_entropy(s["output"], s["y"])) for s in probe.steps]
    terms = [s["loss"] - c for s, c in zip(probe.steps, cross_entropy, strict=True)]
    want = [sum(terms[10:15]) / 5, sum(terms[15:]) / 5]
    assert values == pytest.approx(want, rel=1e-4)
    assert steps == [15, 20]


# importance over experiences --------------------------------------------------------------------


def separate_terms(lam, mode):
    """EWC with one Fisher and one optimum for each experience: memory grows with experiences."""

    class Separate(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.terms = []

        def before_backward(self, strategy, **kwargs):
            named = dict(strategy.model.named_parameters())
            for fisher, optimum in self.terms:
                for n, f in fisher.items():
                    term = (f * (named[n] - optimum[n]).square()).sum()
                    strategy.loss = strategy.loss + lam / 2 * term

        def after_training_exp(self, strategy, **kwargs):
            named = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
            self.terms.append((Fisher(mode).finish(strategy), named))

    return Separate()


def test_one_anchor_holds_all_separate_terms_of_ewc():
    stream = class_stream(4, n_classes=8).train_stream
    plugins = (
        separate_terms(3.0, "empirical"),
        EWCPlugin(3.0, fisher="empirical", anchor="each"),
        EWCPlugin(3.0, fisher="empirical"),
    )
    found = [run(mlp(12, classes=8), [p], stream=stream, n=4, lr=0.05) for p in plugins]
    slow, each, latest = (torch.cat([w.flatten() for w in weights(s.model)]) for s in found)
    torch.testing.assert_close(each, slow, rtol=1e-4, atol=1e-5)
    assert (latest - slow).abs().max() > 1e-3


@pytest.mark.parametrize("merge", ["sum", "mean", 0.5])
def test_experiences_add_up(merge):
    plugin = MASPlugin(0.25, merge=merge)
    _, thetas = parabolas(plugin, [1.0, -0.5, 0.8], lr=0.05, epochs=3, start=0.4)
    omegas = [2 * abs(theta) for theta in thetas]
    want = {
        "sum": sum(omegas),
        "mean": sum(omegas) / 3,
        0.5: omegas[0] / 4 + omegas[1] / 2 + omegas[2],
    }[merge]
    assert float(plugin.importance["theta"]) == pytest.approx(want, rel=1e-5)


def test_online_ewc_fades_and_without_decay_is_ewc():
    same = [
        weights(run(mlp(), [plugin]).model)
        for plugin in (EWCPlugin(1.0), OnlineEWCPlugin(1.0, decay_factor=1.0))
    ]
    assert equal(*same)
    plugin = OnlineEWCPlugin(1.0, decay_factor=0.0, fisher="argmax")
    strategy = run(mlp(), [plugin])
    last = class_stream().train_stream[2]
    strategy.experience = last
    strategy.clock.train_exp_counter = 2
    alone = Fisher("argmax").finish(strategy)
    for name, value in plugin.importance.items():
        torch.testing.assert_close(value, alone[name])


def test_si_leaves_the_anchors_gradient_out():
    lam, a, lr, eps = 4.0, 2.0, 0.05, 0.1
    plugin = SynapticIntelligencePlugin(lam, eps=eps)
    parabolas(plugin, [1.0, -1.0], a=a, lr=lr, epochs=6)
    theta, omega, held = 0.0, 0.0, 0.0
    for u in (1.0, -1.0):
        start, drop = theta, 0.0
        for _ in range(6):
            task = a * (theta - u)
            step = -lr * (task + 2 * lam * omega * (theta - held))
            drop -= task * step
            theta += step
        omega, held = omega + max(0, drop) / ((theta - start) ** 2 + eps), theta
    assert float(plugin.importance["theta"]) == pytest.approx(omega, rel=1e-4)
    assert float(plugin.anchors["theta"]) == pytest.approx(theta, rel=1e-4)


def test_rwalk_trains_in_training_mode_without_another_forward_pass():
    calls, probe = [], Probe()
    model = dropout_net()
    model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    run(model, [RWalkPlugin(1.0), probe])
    assert len(calls) == len(probe.steps) == 15
    assert all(calls)
    assert all(step["training"] for step in probe.steps)


def test_rwalk_that_has_not_moved_is_ewc_with_the_moving_fisher():
    probe, plugin = Probe(), RWalkPlugin(1.0, alpha=0.9)
    strategy = run(mlp(), [plugin, probe], n=1, lr=0.0)
    fisher = {}
    for step in probe.steps:
        for n, g in step["grad"].items():
            fisher[n] = g**2 if n not in fisher else 0.9 * g**2 + 0.1 * fisher[n]
    largest = max(float(f.max()) for f in fisher.values())
    for n, f in fisher.items():
        torch.testing.assert_close(plugin.importance[n], f / largest)
    # From here on it is EWC with that importance: the weight of EWC's term has another 1/2.
    ewc = ParameterAnchorPlugin(2.0, importance="ewc")
    ewc.importance = {n: f / largest for n, f in fisher.items()}
    ewc.anchors = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
    other = run(copy.deepcopy(strategy.model), [ewc], stream=class_stream().train_stream[1:2], n=1)
    torch.manual_seed(1)
    strategy.optimizer.param_groups[0]["lr"] = 0.1
    strategy.train(class_stream().train_stream[1])
    for one, two in zip(weights(strategy.model), weights(other.model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# growing ----------------------------------------------------------------------------------------


def growing(head):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), head())


@ALL
def test_new_rows_have_no_importance_and_old_ones_keep_theirs(method):
    plugin = make(method)
    strategy = run(growing(lambda: IncrementalClassifier(12, 2)), [plugin], n=1)
    name = "2.classifier.weight"
    old, place = plugin.importance[name].clone(), plugin.anchors[name].clone()
    assert old.shape == (2, 12)
    seen = []

    class Look(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            seen.append((plugin.importance[name].clone(), plugin.anchors[name].clone()))

    strategy.plugins.append(Look())
    strategy.train(class_stream().train_stream[1])
    for omega, anchor in seen:
        assert torch.equal(omega[:2], old)
        assert torch.equal(anchor[:2], place)
        assert not omega[2:].any()
        assert omega.shape == anchor.shape == (4, 12)
    assert plugin.importance[name].shape == (4, 12)
    assert plugin.importance[name][2:].any()


@ALL
def test_a_head_of_fixed_size_learns_like_a_growing_one(method):
    heads = (lambda: IncrementalClassifier(12, 2), lambda: FixedSizeClassifier(12, 6))
    one, two = (run(growing(head), [make(method)]).model for head in heads)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@ALL
def test_a_head_that_a_task_does_not_use_keeps_still(method):
    plugin, stream = make(method), class_stream(task_labels=True).train_stream
    torch.manual_seed(1)
    model = MTSimpleMLP(input_size=8, hidden_size=10)
    strategy = naive(model, [plugin])
    strategy.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    strategy.train(stream[0])
    head = model.classifier.classifiers["0"].classifier
    before, omega = copy.deepcopy(head.state_dict()), plugin.importance
    name = "classifier.classifiers.0.classifier.weight"
    assert omega[name].any()
    kept = omega[name].clone()
    strategy.train(stream[1])
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    if method in (EWCPlugin, MASPlugin, SynapticIntelligencePlugin):
        assert torch.equal(plugin.importance[name], kept)
    assert plugin.importance[name.replace("0.cl", "1.cl")].any()


def test_a_parameter_that_has_shrunk_is_refused_and_one_that_is_gone_forgotten():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    plugin = EWCPlugin(1.0)
    strategy = run(model, [plugin], n=1)
    model[0], model[2] = nn.Linear(8, 10), nn.Linear(10, 6)
    with pytest.raises(ValueError, match=r"EWCPlugin, parameter '0.weight': .*\(12, 8\)"):
        strategy.train(class_stream().train_stream[1])
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    strategy = run(model, [plugin := EWCPlugin(1.0)], n=1)
    model.add_module("3", nn.Identity())
    model[0] = nn.Sequential(nn.Linear(8, 12))
    strategy.train(class_stream().train_stream[1])
    assert set(plugin.importance) == set(plugin.anchors) == set(dict(model.named_parameters()))


def test_frozen_parameters_are_left_out_while_they_are():
    model, plugin, probe = mlp(), EWCPlugin(1.0, fisher="empirical"), Probe()
    strategy = run(model, [plugin, probe], n=1)
    kept = plugin.importance["features.0.weight"].clone()
    model.features[0].requires_grad_(False)
    strategy.train(class_stream().train_stream[1])
    assert probe.steps[-1]["grad"]["features.0.weight"] is None
    assert torch.equal(plugin.importance["features.0.weight"], kept)
    model.features[0].requires_grad_(True)
    strategy.train(class_stream().train_stream[2])
    assert (plugin.importance["features.0.weight"] >= kept).all()
    assert (plugin.importance["features.0.weight"] > kept).any()


# in company -------------------------------------------------------------------------------------


class Shrink(SupervisedPlugin):
    """Changes gradients before the step and weights after it."""

    def before_update(self, strategy, **kwargs):
        nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.5)

    def after_update(self, strategy, **kwargs):
        for p in strategy.model.parameters():
            p.data.mul_(0.999)


COMPANY = {
    "drl_ber": lambda: [DRLPlugin(1e-2), BERPlugin(10)],
    "slni": lambda: [SLNIPlugin(1e-2)],
    "l2_decay": lambda: [L2DecayPlugin(1e-2)],
    "gem": lambda: [GEMPlugin(10, 0.5)],
    "lwf": lambda: [LwFPlugin(1.0, 2.0)],
    "bf16": lambda: [PrecisionPlugin("bf16")],
    "clip": lambda: [Shrink()],
    "anchor": lambda: [L2TransferPlugin(0.1)],
}


@pytest.mark.parametrize("method", [EWCPlugin, SynapticIntelligencePlugin, RWalkPlugin])
@pytest.mark.parametrize("company", COMPANY)
def test_the_order_of_plugins_does_not_matter(method, company):
    alone = run(mlp(), COMPANY[company](), n=2)
    first = run(mlp(), [make(method), *COMPANY[company]()], n=2)
    last = run(mlp(), [*COMPANY[company](), make(method)], n=2)
    for one, two in zip(weights(first.model), weights(last.model), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert not equal(weights(first.model), weights(alone.model))


def test_scaled_gradients_are_true_ones_by_then():
    plugin, probe = SynapticIntelligencePlugin(1.0), Probe()
    precision = PrecisionPlugin("fp16")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run(mlp(), [plugin, precision, probe], n=2)
    exact = SynapticIntelligencePlugin(1.0)
    run(mlp(), [exact], n=2)
    for name, omega in plugin.importance.items():
        torch.testing.assert_close(omega, exact.importance[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("method", [EWCPlugin, MASPlugin, SynapticIntelligencePlugin])
def test_a_compiled_model_is_measured_like_another(method):
    one, two = (
        run(growing(lambda: IncrementalClassifier(12, 2)), [*extra, make(method)], n=2).model
        for extra in ([], [CompilePlugin(6, backend="eager")])
    )
    assert two._compiled_call_impl is not None
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b[: len(a)], rtol=1e-4, atol=1e-5)


@ALL
def test_dropout_and_random_draws_go_on_as_without_it(method):
    class Draws(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.states = []

        def before_training_epoch(self, strategy, **kwargs):
            self.states.append(torch.get_rng_state())

    without, beside = Draws(), Draws()
    run(dropout_net(), [without])
    run(dropout_net(), [make(method), beside])
    assert equal(without.states, beside.states)


# copies and interruptions -----------------------------------------------------------------------


class Stop(SupervisedPlugin):
    """Interrupt after so many steps; ``at`` belongs to the class, so it is no state of the run."""

    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations + 1 == Stop.at:
            raise InterruptedError


@pytest.mark.parametrize("method", [EWCPlugin, RWalkPlugin])
def test_an_interrupted_run_ends_as_if_it_had_not_been(method, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_cases.CASES, "anchor", lambda optimizer: [make(method)])
    monkeypatch.setattr(Stop, "at", -1)
    whole = checkpoint_cases.train("anchor", tmp_path / "whole", None, [Stop()])
    for Stop.at in (4, 13, 23):  # within each of the three experiences
        with pytest.raises(InterruptedError):
            checkpoint_cases.train("anchor", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("anchor", tmp_path / "parts", 1, [Stop()]) == whole


@ALL
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_with_the_same_numbers(method, clone):
    whole = run(dropout_net(), [make(method)])
    half = run(dropout_net(), [make(method)], n=1)
    random_state = torch.get_rng_state()
    half = clone(half)
    torch.set_rng_state(random_state)
    for experience in class_stream().train_stream[1:]:
        half.train(experience)
    assert equal(weights(half.model), weights(whole.model))


def test_a_copy_made_within_an_experience_has_the_plugins_whole_state():
    plugin, copies = RWalkPlugin(1.0, delta_t=3), []

    class Copy(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 7:
                copies.append(pickle.loads(pickle.dumps(plugin)))

    run(mlp(), [plugin, Copy()], n=2)
    (twin,) = copies
    assert vars(twin).keys() == vars(plugin).keys()
    assert twin.measure._steps == 3  # of the second experience
    assert twin.measure._fisher.keys() == plugin.measure._fisher.keys()


# bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ParameterAnchorPlugin(-1.0), ValueError, "finite lam >= 0"),
        (lambda: ParameterAnchorPlugin("1"), TypeError, "number lam >= 0"),
        (lambda: EWCPlugin(float("nan")), ValueError, "EWCPlugin expects a finite lam"),
        (lambda: ParameterAnchorPlugin(1.0, importance="fisher"), ValueError, "importance to be"),
        (lambda: ParameterAnchorPlugin(1.0, anchor="first"), ValueError, "anchor to be one of"),
        (lambda: ParameterAnchorPlugin(1.0, importance="l2", anchor="each"), ValueError, "adds up"),
        (
            lambda: EWCPlugin(1.0, fisher="separate"),
            ValueError,
            "EWCPlugin expects fisher to be one of",
        ),
        (lambda: OnlineEWCPlugin(1.0, decay_factor=2.0), ValueError, "from 0 to 1"),
        (lambda: EWCPlugin(1.0).quantiles([1.5]), ValueError, "from 0 to 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_importances_given_as_objects_are_copied():
    given = PathIntegral()
    one, two = (ParameterAnchorPlugin(1.0, importance=given) for _ in range(2))
    run(mlp(), [one, two], n=2)
    assert given._origin == {}
    assert one.measure is not two.measure


@pytest.mark.parametrize(
    ("key", "kind"),
    [("l2", L2), ("ewc", Fisher), ("si", PathIntegral), ("mas", OutputNorm), ("rwalk", FisherPath)],
)
def test_importances_by_name(key, kind):
    assert type(ParameterAnchorPlugin(1.0, importance=key).measure) is kind


def test_a_strategy_that_computes_gradients_elsewhere_is_refused():
    class Own(type(naive(mlp()))):
        def training_epoch(self, **kwargs):
            for batch in self.dataloader:
                self.mbatch = batch
                self._unpack_minibatch()
                self._before_training_iteration()
                self.loss = self._make_empty_loss()
                self.mb_output = self.forward()
                self.loss = self.loss + self.criterion()
                self._before_backward()
                self.loss.backward()
                self._after_backward()
                self.optimizer_step()
                self._after_training_iteration()

    model = mlp()
    strategy = Own(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        criterion=nn.CrossEntropyLoss(), plugins=[EWCPlugin(1.0)], evaluator=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"one strategy.backward\(\) per training iteration"):
        strategy.train(class_stream().train_stream[0])


def test_a_term_that_diverges_says_what_to_lower():
    with pytest.raises(ValueError, match=r"lam=1e\+30, largest importance .*lower one"):
        run(mlp(), [EWCPlugin(1e30)], n=2)


def test_an_empty_experience_is_refused():
    experience = class_stream().train_stream[0]
    experience.dataset = experience.dataset.subset([])
    with pytest.raises(ValueError, match="is empty"):
        naive(mlp(), [EWCPlugin(1.0)]).train(experience)


def test_quantiles():
    plugin = L2TransferPlugin(1.0)
    assert plugin.quantiles() == []
    run(mlp(), [plugin], n=1)
    assert plugin.quantiles([0.0, 1.0]) == [1.0, 1.0]
