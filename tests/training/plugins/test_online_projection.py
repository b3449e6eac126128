"""Online projection inside the training loop: what is kept stays, at any step size."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from torch import nn
from torch.nn import functional as F

from avalanche_ext.training.plugins.online_projection import OnlineProjectionPlugin, _rows_of
from tests.conftest import class_stream
from tests.training.plugins.online_runs import Fixed, Watch, inputs, mlp, noisy_net, run, state

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1.0),
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
}


class Convolutions(nn.Module):
    """Groups, strides, dilation, paddings, a 1-d convolution, an absent and a frozen bias."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Conv2d(1, 8, 5, stride=3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(8, 24, 2, stride=2, padding="valid", groups=2, bias=False)
        self.third = nn.Conv1d(24, 12, 3, padding=2, dilation=2)
        self.last = nn.Linear(12, 6)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.first(x.view(-1, 1, 8, 8)))
        x = torch.tanh(self.second(x)).flatten(2)
        return self.last(torch.tanh(self.third(x)).mean(2))


class Attention(nn.Module):
    """Packed weights, and a linear layer that is used without being called."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.embed(x.view(-1, 2, 4))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))


class Shared(nn.Module):
    """One layer called twice; ``tied``: and its weight once more under another bias."""

    def __init__(self, tied):
        torch.manual_seed(0)
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)
        if tied:
            self.last.weight = self.twice.weight
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        for layer in (self.twice, self.twice, self.last):
            x = torch.tanh(layer(x))
        return self.head(x)


class Growing(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 40), nn.ReLU())
        self.classifier = IncrementalClassifier(40, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


def outputs(model, x, *args):
    model.eval()
    with torch.no_grad():
        return model(x, *args)


def kept_and_learnt(model, x, plugin, *, optimizer="sgd", stream=None, **kwargs):
    """Train on two experiences; the drift of the outputs for ``x`` and the fall of the loss."""
    watch = Watch()
    run(model, [watch, plugin], n=2, optimizer=OPTIMIZERS[optimizer], stream=stream, **kwargs)
    second = watch.steps[len(watch.steps) // 2 :]
    found, losses = [], []
    for values in (second[0]["before"], second[-1]["after"]):
        model.load_state_dict(values)
        found.append(outputs(model, x))
        batches = zip(*(s["batch"][:2] for s in second), strict=True)
        rows, labels = (torch.cat(column) for column in batches)
        losses.append(float(F.cross_entropy(outputs(model, rows), labels)))
    return float((found[1] - found[0]).abs().max()), losses[0] - losses[1]


# the invariant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kept_outputs_stay_at_any_step_size_while_the_loss_falls(optimizer):
    x = inputs(6)
    plugin = OnlineProjectionPlugin(source=Fixed(x))
    drift, fall = kept_and_learnt(mlp(40, 30), x, plugin, optimizer=optimizer)
    assert drift < 2e-5  # ten large steps; each rounds the weights to float32
    assert fall > 0.5
    plain, _ = kept_and_learnt(
        mlp(40, 30), x, OnlineProjectionPlugin(math.inf), optimizer=optimizer
    )
    assert plain > 0.5


# Rounding errors of a layer's outputs are multiplied by the steps of the layers behind it.
@pytest.mark.parametrize(("rate", "rounding"), [(0.1, 1e-13), (1.0, 1e-12), (1000.0, 1e-5)])
def test_a_step_of_any_size_in_float64_is_exact(rate, rounding):
    x, model = inputs(12, 20), mlp(40, 30, in_features=20).double()

    class Double(OnlineProjectionPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            strategy.mbatch[0] = strategy.mbatch[0].double()
            if self._learnt:
                strategy.optimizer.param_groups[0]["lr"] = rate

    watch = Watch()
    stream = class_stream(width=20).train_stream
    run(model, [Double(source=Fixed(x.double())), watch], n=2, lr=0.05, stream=stream)
    before, after = watch.steps[5]["before"], watch.steps[5]["after"]
    found = []
    for values in (before, after):
        model.load_state_dict(values)
        found.append(outputs(model, x.double()))
    torch.testing.assert_close(*found, rtol=0, atol=rounding)
    moved = max(float((after[k] - v).abs().max()) for k, v in before.items())
    assert moved > 0.005 * rate


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_convolutions_of_all_kinds(optimizer):
    stream, x = class_stream(width=64).train_stream, inputs(1, 64)
    model = Convolutions()
    drift, _ = kept_and_learnt(
        model, x, OnlineProjectionPlugin(source=Fixed(x), n_inputs=1), optimizer=optimizer,
        stream=stream,
    )  # fmt: skip
    assert drift < 2e-5
    start = Convolutions()
    run(start, [], n=1, stream=stream, optimizer=OPTIMIZERS[optimizer])
    start, end = state(start), state(model)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == set(start) - {"last.bias"}


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
def test_rows_of_a_convolution_over_time(mode):
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode)
    x = torch.randn(3, 4, 9)
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    found = _rows_of(layer, x) @ weight.unflatten(0, (2, 3)).mT
    want = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mT.flatten(0, 1), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_shared_layers_and_tied_weights(optimizer):
    x = inputs(3)
    with pytest.warns(
        UserWarning, match=r"held still.*\['twice.weight', 'twice.bias', 'last.bias'"
    ):
        drift, fall = kept_and_learnt(
            Shared(tied=True), x, OnlineProjectionPlugin(source=Fixed(x)), optimizer=optimizer
        )
    assert drift < 2e-5
    assert fall > 0.01
    free, watch = OnlineProjectionPlugin(source=Fixed(x)), Watch()
    drift, _ = kept_and_learnt(Shared(tied=False), x, free, optimizer=optimizer)
    assert drift < 2e-5
    run(Shared(tied=False), [watch, OnlineProjectionPlugin(source=Fixed(x))], n=2)
    before, after = (watch.steps[5][k]["twice.weight"] for k in ("before", "after"))
    assert not torch.equal(before, after)


def test_what_is_neither_linear_nor_convolution_is_held_with_a_warning():
    x, model = inputs(3), Attention()
    with pytest.warns(UserWarning, match=r"held still.*in_proj_weight.*out_proj.weight.*norm.bias"):
        drift, fall = kept_and_learnt(model, x, OnlineProjectionPlugin(source=Fixed(x)))
    assert drift < 2e-5
    assert fall > 0.01


def test_a_growing_head():
    x, plugin = inputs(4), OnlineProjectionPlugin(source=Fixed(inputs(4)))
    model, found = Growing(), []

    class Watching(Watch):
        def before_training_iteration(self, strategy, **kwargs):
            found.append(outputs(strategy.model, x))
            strategy.model.train()

        def after_training_iteration(self, strategy, **kwargs):
            found.append(outputs(strategy.model, x))
            strategy.model.train()

    run(model, [plugin, Watching()], lr=0.3)
    assert found[-1].shape == (4, 6)
    for start, end in ((10, 19), (20, 29)):  # within the second and the third experience
        torch.testing.assert_close(found[end], found[start], rtol=0, atol=5e-5)
    assert not torch.allclose(found[9], found[0], atol=0.1)  # the first one trains freely


def test_heads_of_other_tasks_move_freely_and_their_own_stay():
    stream = class_stream(task_labels=True).train_stream
    torch.manual_seed(0)
    model = MTSimpleMLP(8, 40)
    plugin = OnlineProjectionPlugin(mem=4)
    strategy = run(model, [plugin], n=1, stream=stream, lr=0.5)
    memory = plugin.memory
    x = memory.gather(memory.index().slots)[0]
    before = outputs(model, x, 0)
    strategy.train(stream[1], eval_streams=[])
    torch.testing.assert_close(outputs(model, x, 0), before, rtol=0, atol=2e-5)
    rows = torch.stack([row for row, *_ in stream[1].dataset])
    labels = torch.tensor([y for _, y, *_ in stream[1].dataset])
    accuracy = (outputs(model, rows, 1).argmax(1) == labels).float().mean()
    assert accuracy > 0.9  # through its own head, which nothing holds


# bounds -----------------------------------------------------------------------------------------


def changes(model, before, after, x, norm):
    """The change of each layer's outputs at the inputs that it had before the step."""
    found, h = [], x.double()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, _ in layers:
        w0, b0, w1, b1 = (
            v[f"{name}.{p}"].double() for v in (before, after) for p in ("weight", "bias")
        )
        found.append(float(torch.linalg.matrix_norm(h @ (w1 - w0).T + (b1 - b0), norm)))
        h = torch.relu(h @ w0.T + b0)
    return found


@pytest.mark.parametrize(("norm", "order"), [("frobenius", "fro"), ("spectral", 2)])
@pytest.mark.parametrize(("eps_on", "bound"), [("step", 0.05), ("gradient", 0.05 * 0.7)])
def test_each_layers_outputs_change_by_no_more_than_the_bound(norm, order, eps_on, bound):
    watch, x, model = Watch(), inputs(12), mlp(40, 30)
    plugin = OnlineProjectionPlugin(0.05, norm=norm, eps_on=eps_on, source=Fixed(x))
    run(model, [plugin, watch], n=2, lr=0.7)
    for step in watch.steps[5:]:
        found = changes(model, step["before"], step["after"], x, order)
        assert max(found) < bound * (1 + 1e-3)
    if norm == "frobenius":  # the bound is met, not only kept
        first = watch.steps[5]
        found = changes(model, first["before"], first["after"], x, order)
        assert found == pytest.approx([bound] * 3, rel=1e-3)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_steps_within_the_bound_are_not_touched(norm):
    plugin = OnlineProjectionPlugin(1e9, norm=norm)
    ours, plain = run(mlp(), [plugin]), run(mlp(), [])
    assert all(map(torch.equal, state(ours.model).values(), state(plain.model).values()))
    assert float(plugin.last) == pytest.approx(1.0, abs=1e-12)


def test_the_logged_cosine_is_that_of_the_steps():
    watch, x = Watch(), inputs(6)
    plugin = OnlineProjectionPlugin(source=Fixed(x))
    run(mlp(40, 30), [plugin, watch], n=2, lr=0.5)
    step, model = watch.steps[-1], mlp(40, 30)
    model.load_state_dict(step["before"])
    F.cross_entropy(model(step["batch"][0]), step["batch"][1]).backward()
    planned = torch.cat([-p.grad.flatten() for p in model.parameters()])
    taken = torch.cat([(step["after"][k] - v).flatten() for k, v in step["before"].items()])
    want = F.cosine_similarity(taken, planned, dim=0)
    assert float(plugin.last) == pytest.approx(float(want), abs=1e-4)
    assert 0.05 < float(want) < 0.99


# warnings and errors ----------------------------------------------------------------------------


def test_as_many_inputs_as_a_layer_has_are_warned_of():
    with pytest.warns(UserWarning, match=r"span everything that layer 'features.0' can be given"):
        run(mlp(), [OnlineProjectionPlugin(source=Fixed(inputs(9)), n_inputs=9)], n=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "OnlineProjectionPlugin")
        run(mlp(), [OnlineProjectionPlugin(source=Fixed(inputs(8)), n_inputs=8)], n=2)


def test_batch_statistics_are_warned_of_once():
    with pytest.warns(UserWarning, match="OnlineProjectionPlugin") as caught:
        run(noisy_net(), [OnlineProjectionPlugin()])
    said = [str(w.message) for w in caught if "batch statistics" in str(w.message)]
    assert len(said) == 1
    assert "['1']" in said[0]


def test_a_network_without_anything_to_train_in_these_layers():
    model = mlp()
    model.features.requires_grad_(False)
    start = state(model)
    plugin = OnlineProjectionPlugin(n_inputs=4)
    run(model, [plugin])
    assert all(torch.equal(v, start[k]) for k, v in state(model).items() if "features" in k)
    assert plugin.last is not None
    scales = nn.Sequential(nn.Flatten(), nn.LayerNorm(8))
    with pytest.warns(UserWarning, match=r"held still.*'1.weight'"):
        run(scales, [still := OnlineProjectionPlugin()], n=2)
    assert still.last is None


def test_inputs_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="expects finite inputs"):
        run(mlp(), [OnlineProjectionPlugin(source=Fixed(inputs() / 0))], n=2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="eps=-1"):
        OnlineProjectionPlugin(-1)
    with pytest.raises(TypeError, match=r"a number eps >= 0; got '0'"):
        OnlineProjectionPlugin("0")
    with pytest.raises(ValueError, match="eps=nan"):
        OnlineProjectionPlugin(math.nan)
    with pytest.raises(ValueError, match="'frobenius', 'spectral'"):
        OnlineProjectionPlugin(norm="nuclear")
    with pytest.raises(ValueError, match="'step', 'gradient'"):
        OnlineProjectionPlugin(eps_on="loss")
