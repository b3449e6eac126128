"""SLNI inside Avalanche's own training loop, against terms computed by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    SupervisedPlugin,
)
from torch import nn
from torch.nn import functional as F

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.experiments.data_index import DataIndex
from avalanche_ext.experiments.state import capture, restore
from avalanche_ext.functional.inhibition import InhibitionForm
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.activation_penalty import L1RepPlugin
from avalanche_ext.training.plugins.parameter_anchor import ParameterAnchorPlugin
from avalanche_ext.training.plugins.parameter_penalty import OrthRegPlugin
from avalanche_ext.training.plugins.slni import NeuronImportance, SLNIPlugin
from avalanche_ext.training.representation_penalty import hidden_fc_relus
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases
from tests.functional.test_inhibition import oracle

LAM = 0.01


class Probe(SupervisedPlugin):
    """Keep every step's batch, loss and the model before it; count hooks when none should be."""

    def __init__(self):
        super().__init__()
        self.steps, self.hooks = [], 0

    def before_forward(self, strategy, **kwargs):
        model = copy.deepcopy(strategy.model)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.steps.append({"model": model})

    def before_backward(self, strategy, **kwargs):
        self.hooks += count_hooks(strategy.model)

    def after_backward(self, strategy, **kwargs):
        cross_entropy = F.cross_entropy(strategy.mb_output.detach(), strategy.mb_y)
        self.steps[-1] |= {
            "x": strategy.mb_x, "y": strategy.mb_y,
            "term": float(strategy.loss.detach() - cross_entropy),
        }  # fmt: skip


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run(model, plugins, *, stream=None, n=3, seed=1, **kwargs):
    stream = class_stream().train_stream if stream is None else stream
    torch.manual_seed(seed)
    strategy = naive(model, plugins, **kwargs)
    for experience in stream[:n]:
        strategy.train(experience)
    return strategy


def weights(model):
    return [p.detach().clone() for p in model.state_dict().values()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hidden(model, x):
    """Every post-ReLU output of an MLP, without hooks."""
    found = []
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            found.append(x)
    return found


def mlp(*widths, classes=6):
    torch.manual_seed(0)
    return MLP(8, widths or (16, 12), classes)


def first_term(model, plugin, **kwargs):
    """The first step, its ``term`` divided by ``lam``."""
    probe = Probe()
    run(model, [plugin, probe], n=1, **kwargs)
    assert probe.hooks == 0
    step = probe.steps[0]
    step["term"] /= plugin.lam
    return step


# the value --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reach"),
    [
        ({}, 1 / 6),
        ({"sigma": 2.0}, 2.0),
        ({"sigma": "N/2.5"}, 1 / 2.5),
        ({"form": "sni"}, None),
        ({"form": "slnid"}, 1 / 6),  # nothing is important yet
        ({"form": "snid"}, None),
        ({"form": "released"}, 1 / 6),
    ],
)
def test_the_loss_is_cross_entropy_plus_lam_times_the_sum_over_hidden_layers(settings, reach):
    plugin = SLNIPlugin(LAM, **settings)
    step = first_term(mlp(), plugin)
    want = 0.0
    for h in hidden(step["model"], step["x"]):
        width = h.shape[1]
        want += oracle(h, reach if reach in (None, 2.0) else reach * width)
    assert step["term"] == pytest.approx(want, rel=2e-4)


@pytest.mark.parametrize(
    ("layers", "pick"),
    [("features.3", [1]), (["features.1"], [0]), (nn.ReLU, [0, 1]), ("features.[13]", [0, 1])],
)
def test_layers_by_name_pattern_and_type(layers, pick):
    step = first_term(mlp(), SLNIPlugin(LAM, form="sni", layers=layers))
    rows = hidden(step["model"], step["x"])
    assert step["term"] == pytest.approx(sum(oracle(rows[k]) for k in pick), rel=2e-4)


def test_the_first_update_is_the_gradient_of_the_whole_objective():
    probe, lr = Probe(), 0.1
    strategy = run(mlp(), [SLNIPlugin(LAM, sigma=3.0), probe], n=1, lr=lr, batch=40)
    step = probe.steps[0]
    model = step["model"]
    loss = F.cross_entropy(model(step["x"]), step["y"])
    for h in hidden(model, step["x"]):
        i = torch.arange(h.shape[1], dtype=torch.float32)
        gauss = torch.exp(-((i[:, None] - i) ** 2) / 18) - torch.eye(len(i))
        loss = loss + LAM * ((h @ gauss) * h).sum() / len(h)
    loss.backward()
    for before, after in zip(model.parameters(), strategy.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - lr * before.grad, rtol=1e-4, atol=1e-6)


def test_reduction_and_sign_are_the_forms():
    form = InhibitionForm(local=False, discount=False, reduction="pair_mean")
    step = first_term(mlp(16), SLNIPlugin(LAM, form=form))
    (h,) = hidden(step["model"], step["x"])
    assert step["term"] == pytest.approx(oracle(h) / (16 * 15), rel=1e-3)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6))
    before = weights(model)
    with pytest.raises(ValueError, match=r"SLNIPlugin expects activations >= 0.*\['1'\] give -"):
        run(model, [SLNIPlugin(LAM, layers="1")])
    assert equal(weights(model), before)
    form = InhibitionForm(local=True, discount=False, signed="abs_moment")
    step = first_term(model, SLNIPlugin(LAM, form=form, layers="1", sigma=1.5))
    h = step["model"][:2](step["x"]).detach().double()
    moments, i = h.T @ h / len(h), torch.arange(10.0).double()
    gauss = torch.exp(-((i[:, None] - i) ** 2) / 4.5) - torch.eye(10)
    assert step["term"] == pytest.approx(float((gauss * moments.abs()).sum()), rel=1e-3)


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(80, 12), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(12, 6),
    )  # fmt: skip


@pytest.mark.parametrize("conv", ["pool", "location"])
def test_feature_maps_have_to_be_asked_for(conv):
    stream = class_stream(width=16).train_stream
    with pytest.raises(ValueError, match=r"'2' gives shape \(8, 5, 4, 4\).*conv=\"pool\""):
        run(conv_net(), [SLNIPlugin(LAM, layers="2")], stream=stream)
    step = first_term(conv_net(), SLNIPlugin(LAM, layers="2", conv=conv, sigma=1.0), stream=stream)
    maps = step["model"][:3](step["x"])
    rows = maps.mean((2, 3)) if conv == "pool" else maps.permute(0, 2, 3, 1).reshape(-1, 5)
    assert step["term"] == pytest.approx(oracle(rows, 1.0), rel=1e-3)


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b, self.c = (
                nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 6))  # fmt: skip

        def rows(self, x):
            h1 = self.act(self.a(x))
            return h1, self.act(self.b(h1))

        def forward(self, x):
            return self.c(self.rows(x)[1])

    plugin = SLNIPlugin(LAM, form="snid")
    step = first_term(Twice(), plugin)
    want = sum(oracle(h) for h in step["model"].rows(step["x"]))
    assert step["term"] == pytest.approx(want, rel=2e-4)
    assert {n: len(a) for n, a in plugin.importance.items()} == {"act": 9, "act#2": 7}


# layers -----------------------------------------------------------------------------------------


def test_relus_between_fully_connected_layers():
    assert hidden_fc_relus(mlp()) == ["features.1", "features.3"]
    assert hidden_fc_relus(conv_net()) == ["5"]
    simple = SimpleMLP(num_classes=6, input_size=8, hidden_size=16, hidden_layers=2)
    assert hidden_fc_relus(simple) == ["features.1", "features.3.1"]
    assert hidden_fc_relus(MTSimpleMLP(input_size=8)) == ["features.1"]
    output = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    assert hidden_fc_relus(output) == []
    with pytest.raises(ValueError, match=r"Sequential has none.*Name hidden layers"):
        run(output, [SLNIPlugin(LAM)])
    with pytest.raises(ValueError, match="logits do not count"):
        run(output, [SLNIPlugin(LAM, layers="1")])


@pytest.mark.parametrize("name", ["resnet18", "resnet"])
def test_a_residual_network_is_penalised_at_its_classifiers_input(name):
    if name == "resnet":
        from torchvision.models import ResNet
        from torchvision.models.resnet import BasicBlock

        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    else:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, pretrained=False, num_classes=4)
    from avalanche.benchmarks import tensors_benchmark

    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    stream = tensors_benchmark([(x, y)], [(x, y)], task_labels=[0]).train_stream
    plugin = SLNIPlugin(1e-4, form="slnid")
    run(model, [plugin], stream=stream, n=1, lr=0.01)
    assert [(n, len(a)) for n, a in plugin.importance.items()] == [("fc", 512)]
    assert plugin.importance["fc"].max() > 0


def test_frozen_layers_are_skipped():
    model = mlp()
    model.features[0].requires_grad_(False)
    step = first_term(model, SLNIPlugin(LAM, form="sni"))
    want = oracle(hidden(step["model"], step["x"])[1])
    assert step["term"] == pytest.approx(want, rel=1e-3)
    model.features.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves SLNIPlugin nothing to train"):
        run(model, [SLNIPlugin(LAM)])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.fold = nn.Linear(8, 12), nn.ReLU(), nn.Flatten(0, 1)
        self.unused, self.b = nn.ReLU(), nn.Linear(12, 6)

    def forward(self, x):
        h = self.act(self.a(x))
        self.fold(h.unflatten(1, (2, 6)))
        return self.b(h)


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (Odd, ["fold"], r"layer 'fold' gives shape \(16, 6\) for a batch of 8"),
        (Odd, ["act", "unused"], r"\['unused'\] gave no tensor"),
        (mlp, ["features.7"], "'features.7'.*Close"),
        (lambda: nn.DataParallel(mlp()), "auto", "DataParallel splits"),
    ],
)
def test_a_layer_that_cannot_be_used_stops_before_any_weight_changes(make, layers, message):
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        run(model, [SLNIPlugin(LAM, layers=layers)])
    assert equal(weights(model), before)
    assert count_hooks(model) == 0


# importance -------------------------------------------------------------------------------------


def gradients_by_hand(model, experience, objective, at):
    """Eq. 5, one sample at a time."""
    model = copy.deepcopy(model).eval()
    found = [torch.zeros(layer.out_features) for layer in model.features[::2]]
    for k in range(len(experience.dataset)):
        x, y = experience.dataset[k][0][None], torch.tensor([experience.dataset[k][1]])
        rows = hidden(model, x)
        logits = model.classifier(rows[-1])
        scalar = logits.square().sum() if objective == "output_l2" else F.cross_entropy(logits, y)
        for total, h, g in zip(found, rows, torch.autograd.grad(scalar, rows), strict=True):
            total += (g * (h > 0) if at == "pre" else g).abs()[0]
    return [total / len(experience.dataset) for total in found]


@pytest.mark.parametrize("at", ["pre", "post"])
@pytest.mark.parametrize("objective", ["output_l2", "loss"])
def test_importance_is_eq_5_sample_by_sample(objective, at):
    stream = class_stream().train_stream
    settings = NeuronImportance(objective=objective, at=at)
    plugin = SLNIPlugin(LAM, form="slnid", importance=settings)
    strategy = run(mlp(), [plugin], n=1, batch=7)
    want = gradients_by_hand(strategy.model, stream[0], objective, at)
    assert list(plugin.importance) == ["features.1", "features.3"]
    for got, value in zip(plugin.importance.values(), want, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)
        assert not got.requires_grad


@pytest.mark.parametrize("accumulate", ["sum", "mean", "max"])
def test_importance_is_accumulated_over_experiences(accumulate):
    class Copy(SupervisedPlugin):
        found: list = []  # noqa: RUF012

        def after_training_exp(self, strategy, **kwargs):
            Copy.found.append(copy.deepcopy(strategy.model))

    Copy.found = []
    settings = NeuronImportance(objective="output_l2", accumulate=accumulate)
    plugin = SLNIPlugin(LAM, form="slnid", importance=settings)
    run(mlp(), [Copy(), plugin])
    stream = class_stream().train_stream
    each = [
        gradients_by_hand(model, experience, "output_l2", "pre")
        for model, experience in zip(Copy.found, stream, strict=True)
    ]
    for k, got in enumerate(plugin.importance.values()):
        values = torch.stack([measured[k] for measured in each])
        want = {"sum": values.sum(0), "mean": values.mean(0), "max": values.amax(0)}[accumulate]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_criterion_reductions_give_one_importance():
    found = []
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        plugin = SLNIPlugin(LAM, form="slnid", importance=NeuronImportance(objective="loss"))
        strategy = naive(mlp(), [plugin], lr=0.0)
        strategy._criterion = criterion
        strategy.train(class_stream().train_stream[0])
        found.append(plugin.importance["features.3"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("companion", "objective"),
    [
        ([], "loss"),
        ([MASPlugin()], "output_l2"),
        ([ParameterAnchorPlugin(0.1, importance="mas")], "output_l2"),
        ([EWCPlugin(1.0)], "loss"),
        ([ParameterAnchorPlugin(0.1, importance="ewc")], "loss"),
    ],
)
def test_auto_goes_by_the_companion(companion, objective):
    found = []
    for choice in ("auto", objective):
        plugin = SLNIPlugin(LAM, form="slnid", importance=NeuronImportance(objective=choice))
        run(mlp(), [*copy.deepcopy(companion), plugin], n=1)
        found.append(plugin.importance["features.1"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("form", ["slnid", "released"])
def test_the_second_experience_is_discounted_with_gain(form):
    probe, gain = Probe(), 3.0
    settings = NeuronImportance(objective="output_l2", gain=gain)
    plugin = SLNIPlugin(LAM, form=form, importance=settings, sigma=2.0)
    strategy = run(mlp(16), [plugin, probe], n=1)
    alpha = gain * plugin.importance["features.1"]
    strategy.train(class_stream().train_stream[1])
    step = probe.steps[5]
    (h,) = hidden(step["model"], step["x"])
    combine = "min" if form == "released" else "product"
    want = oracle(h, 2.0, alpha, combine)
    assert step["term"] / LAM == pytest.approx(want, rel=1e-3)
    assert want < 0.8 * oracle(h, 2.0)


def test_the_first_experience_of_slnid_is_slni_and_later_ones_are_not():
    def trained(form, n):
        return weights(run(mlp(), [SLNIPlugin(0.05, form=form)], n=n).model)

    assert equal(trained("slnid", 1), trained("slni", 1))
    assert not equal(trained("slnid", 2), trained("slni", 2))


def test_the_released_preset():
    plugin = SLNIPlugin.released_code(1e-3, layers="features.1")
    assert (plugin.lam, plugin.form, plugin.layers) == (1e-3, "released", "features.1")
    assert dataclasses.astuple(plugin.measure) == ("auto", "pre", "sum", 1.0)


def test_measuring_leaves_model_modes_gradients_and_random_state_alone():
    model = SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0.5)
    model.features[2].eval()
    model.features.append(nn.BatchNorm1d(16))
    plugin = SLNIPlugin(LAM, form="slnid")
    strategy = run(model, [], n=1)
    strategy.experience = class_stream().train_stream[0]
    state, before = torch.get_rng_state(), weights(model)
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    plugin.after_training_exp(strategy)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(weights(model), before)
    assert equal([p.grad for p in model.parameters()], grads)
    assert [m.training for m in model.modules()] == modes
    assert plugin.importance["features.1"].max() > 0


def test_a_layer_that_grows_keeps_the_importance_of_its_old_units():
    plugin = SLNIPlugin(LAM, form="slnid", importance=NeuronImportance(objective="output_l2"))
    strategy = run(mlp(10), [plugin], n=1)
    old = plugin.importance["features.1"].clone()
    strategy.model.features[0] = nn.Linear(8, 14)
    strategy.model.classifier = nn.Linear(14, 6)
    strategy.train(class_stream().train_stream[1])
    new = plugin.importance["features.1"]
    assert new.shape == (14,)
    assert (new[:10] >= old).all()


def test_heads_with_task_labels_and_growing_heads():
    model = MTSimpleMLP(input_size=8, hidden_size=16)
    plugin = SLNIPlugin(LAM, form="slnid", importance=NeuronImportance(objective="output_l2"))
    run(model, [plugin], stream=class_stream(task_labels=True).train_stream)
    assert plugin.importance["features.1"].max() > 0
    growing = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), IncrementalClassifier(16))
    plugin = SLNIPlugin(LAM, form="slnid")
    run(growing, [plugin])
    assert plugin.importance["1"].max() > 0


# arguments and data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, "a finite lam >= 0"),
        ({"lam": True}, TypeError, "a number lam"),
        ({"form": "slnidd"}, ValueError, "form to be one of.*'slni'"),
        ({"sigma": 0}, ValueError, 'finite number of units > 0.*got 0.*form="sni"'),
        ({"sigma": -2.0}, ValueError, "finite number of units > 0"),
        ({"sigma": float("inf")}, ValueError, "finite number of units > 0"),
        ({"sigma": "N/0"}, ValueError, "finite number of units > 0"),
        ({"sigma": "width/6"}, ValueError, "such as \"N/6\"; got 'width/6'"),
        ({"conv": "mean"}, ValueError, r"conv to be one of \['error', 'pool', 'location'\]"),
        ({"layers": []}, ValueError, "at least one layer"),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(arguments, error, message):
    with pytest.raises(error, match=f"SLNIPlugin expects.*{message}"):
        SLNIPlugin(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "sni", "sigma": 2.0}, "form='sni' has no locality; got sigma=2.0"),
        ({"form": "slni", "importance": NeuronImportance()}, "form='slni' has no discount"),
        ({"layers": "logits"}, "penalises hidden layers; got layers='logits'"),
        ({"layers": ["features.1", "logits"]}, "penalises hidden layers"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SLNIPlugin(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "fisher"}, "objective to be one of"),
        ({"at": "mid"}, "at to be one of"),
        ({"accumulate": "ema"}, "accumulate to be one of"),
        ({"gain": -1.0}, "a finite gain >= 0"),
    ],
)
def test_bad_settings_of_importance(arguments, message):
    with pytest.raises(ValueError, match=f"NeuronImportance expects {message}"):
        NeuronImportance(**arguments)


@pytest.mark.parametrize("lam", [0, LAM])
def test_an_empty_experience_is_refused(lam):
    experience = class_stream().train_stream[1]
    experience._dataset = as_classification_dataset(experience.dataset).subset([])
    with pytest.raises(ValueError, match="experience 1 of the training stream is empty"):
        run(mlp(), [SLNIPlugin(lam)], stream=[experience])


def test_a_weight_that_kills_a_layer_warns_and_says_so():
    model = mlp(16)
    with pytest.warns(
        UserWarning, match=r"'features.1' was active for \d+ % of.*lam=5.0.*ten times"
    ):
        run(model, [SLNIPlugin(5.0, form="sni")], n=1, epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no unit of layer")
        run(mlp(16), [SLNIPlugin(1e-4)], n=1, epochs=2)


def test_a_value_that_is_no_longer_finite_names_its_cause():
    with pytest.raises(ValueError, match=r"penalty is no longer finite \(step \d+.*lam=1e-05"):
        run(mlp(), [SLNIPlugin(1e-5)], lr=1e12, epochs=30, n=1)


# reports ----------------------------------------------------------------------------------------


def test_epoch_means_are_published_and_last_holds_the_last_step():
    plugin, probe, evaluator = SLNIPlugin(LAM), Probe(), EvaluationPlugin()
    run(mlp(), [plugin, probe], n=1, epochs=2, evaluator=evaluator, batch=16)
    terms = [step["term"] / LAM for step in probe.steps]
    assert len(terms) == 6  # 16 + 16 + 8 samples, twice
    ((key, (when, got)),) = evaluator.get_all_metrics().items()
    assert key.startswith("SLNI_R/train_phase/train_stream")
    assert got == pytest.approx([sum(terms[:3]) / 3, sum(terms[3:]) / 3], rel=1e-3)
    assert len(set(when)) == 2
    step = probe.steps[-1]
    rows = hidden(step["model"], step["x"])
    want = {f"features.{2 * k + 1}": oracle(h, h.shape[1] / 6) for k, h in enumerate(rows)}
    assert {n: float(v) for n, v in plugin.last.items()} == pytest.approx(want, rel=1e-4)
    assert not any(v.requires_grad for v in plugin.last.values())


def test_it_makes_hidden_representations_sparse():
    stream = class_stream().train_stream
    x = torch.stack([stream[0].dataset[k][0] for k in range(40)])

    def active(plugins):
        model = run(mlp(64), plugins, n=1, epochs=20).model
        return float((hidden(model, x)[0] > 0).float().mean())

    assert active([SLNIPlugin(3e-2)]) < 0.6 * active([])


# what it leaves alone ---------------------------------------------------------------------------


def dropout_net():
    torch.manual_seed(0)
    return SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0.5)


@pytest.mark.parametrize("form", ["slni", "slnid"])
def test_weight_zero_is_plain_training_bit_for_bit(form):
    plain = weights(run(dropout_net(), []).model)
    plugin, evaluator = SLNIPlugin(0, form=form), EvaluationPlugin()
    assert equal(weights(run(dropout_net(), [plugin], evaluator=evaluator).model), plain)
    assert plugin.last == plugin.importance == evaluator.get_all_metrics() == {}
    assert not equal(weights(run(dropout_net(), [SLNIPlugin(LAM, form=form)]).model), plain)


@pytest.mark.parametrize("form", ["slni", "slnid"])
def test_it_draws_no_random_numbers(form):
    run(dropout_net(), [])
    state = torch.get_rng_state()
    run(dropout_net(), [SLNIPlugin(LAM, form=form)])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "other",
    [
        lambda: DRLPlugin(1e-3), lambda: BERPlugin(12), lambda: LwFPlugin(1.0, 2.0),
        lambda: MASPlugin(0.1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["slni", "slnid"])
def test_the_order_of_the_plugins_does_not_matter(other, form):
    one = run(dropout_net(), [SLNIPlugin(LAM, form=form), other()])
    two = run(dropout_net(), [other(), SLNIPlugin(LAM, form=form)])
    for a, b in zip(weights(one.model), weights(two.model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_no_hook_and_no_graph_outlives_training():
    probe, plugin = Probe(), SLNIPlugin(LAM, form="slnid")
    strategy = run(mlp(), [plugin, probe])
    assert probe.hooks == 0
    assert count_hooks(strategy.model) == 0
    strategy.eval(class_stream().test_stream)
    assert count_hooks(strategy.model) == 0
    held = [v for v in vars(plugin).values() if isinstance(v, torch.Tensor)]
    assert not any(v.requires_grad for v in [*held, *plugin.last.values()])
    assert plugin._recorder.pop() == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_between_experiences_continues_with_the_same_numbers(clone):
    whole_plugin = SLNIPlugin(LAM, form="slnid")
    whole = run(dropout_net(), [whole_plugin])
    model, plugin = dropout_net(), SLNIPlugin(LAM, form="slnid")
    run(model, [plugin], n=1)
    model, plugin = clone((model, plugin))
    strategy = naive(model, [plugin])
    for experience in class_stream().train_stream[1:]:
        strategy.train(experience)
    assert equal(weights(model), weights(whole.model))
    assert torch.equal(plugin.importance["features.1"], whole_plugin.importance["features.1"])


@pytest.mark.parametrize("form", ["slnid", InhibitionForm(True, True, reduction="pair_mean")])
def test_its_state_can_be_written_as_tensors_and_values(form):
    benchmark = class_stream()
    whole = run(dropout_net(), [SLNIPlugin(LAM, form=form)], stream=benchmark.train_stream)
    half = run(dropout_net(), [SLNIPlugin(LAM, form=form)], stream=benchmark.train_stream, n=1)
    index, random_state = DataIndex(benchmark), torch.get_rng_state()
    state = {"model": half.model.state_dict(), "plugin": capture(half.plugins[0], index)}
    fresh = naive(dropout_net(), [SLNIPlugin(LAM, form=form)])
    restore(fresh.plugins[0], state["plugin"], index)
    fresh.model.load_state_dict(state["model"])
    assert fresh.plugins[0].importance["features.1"].max() > 0
    torch.set_rng_state(random_state)
    for experience in benchmark.train_stream[1:]:
        fresh.train(experience)
    assert equal(weights(fresh.model), weights(whole.model))


def test_data_is_measured_with_its_evaluation_transforms():
    from torch.utils.data import TensorDataset

    x, y = torch.randn(20, 8), torch.arange(20) % 2
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    stream = nc_benchmark(
        data, data, 1, task_labels=False, train_transform=lambda v: 0 * v,
        eval_transform=lambda v: v,
    ).train_stream  # fmt: skip
    plugin = SLNIPlugin(LAM, form="slnid", importance=NeuronImportance(objective="output_l2"))
    model = mlp(16, classes=2)
    nn.init.zeros_(model.features[0].bias)
    nn.init.zeros_(model.classifier.bias)
    run(model, [plugin], stream=stream, n=1, lr=0.0)
    assert plugin.importance["features.1"].max() > 0  # zeros would have no active unit


class Interrupted(Exception):  # noqa: N818 - a way out, not an error
    """Stands for the end of the process."""


class Stop(SupervisedPlugin):
    """End at a training step; the number is not part of the state."""

    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise Interrupted


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setitem(
        checkpoint_cases.CASES, "slnid",
        lambda optimizer: [
            SLNIPlugin(0.05, form="slnid", importance=NeuronImportance(objective="output_l2")),
            L1RepPlugin(1e-3), OrthRegPlugin(1e-3),
        ],
    )  # fmt: skip
    Stop.at = -1
    whole = checkpoint_cases.train("slnid", tmp_path / "whole", None, [Stop()])
    for Stop.at in (4, 13, 23):  # within each of the three experiences
        with pytest.raises(Interrupted):
            checkpoint_cases.train("slnid", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("slnid", tmp_path / "parts", 1, [Stop()]) == whole
