"""The plugin inside Avalanche's own training loop, against terms computed by hand."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.functional.drl import FORMS, DRLForm
from avalanche_ext.models.mlp import MLP
from tests.conftest import blobs, class_stream, naive
from tests.functional.test_drl import oracle

LAM = 0.01


class Probe(SupervisedPlugin):
    """Keep every step's batch, loss and the model before it; count hooks when none should be."""

    def __init__(self, tasks=None) -> None:
        super().__init__()
        self.tasks = tasks
        self.steps: list[dict] = []
        self.hooks = 0

    def before_forward(self, strategy, **kwargs):
        if self.tasks is not None:
            strategy.mbatch[-1] = self.tasks(len(strategy.mb_y))
        self.steps.append({"model": copy.deepcopy(bare_copy(strategy.model))})

    def before_backward(self, strategy, **kwargs):
        self.hooks += count_hooks(strategy.model)

    def after_backward(self, strategy, **kwargs):
        self.steps[-1] |= {
            "loss": strategy.loss.detach().clone(), "x": strategy.mb_x, "y": strategy.mb_y,
            "task": strategy.mb_task_id, "cross_entropy": F.cross_entropy(
                strategy.mb_output.detach(), strategy.mb_y),
        }  # fmt: skip


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy without the hooks that are attached during the forward pass."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(layers, keys, form="drl") -> dict[str, float]:
    """The two terms and the loss from the definition, pair by pair."""
    between, within, n_between, n_within = oracle(layers, keys)
    terms = {"L_bt": between / max(n_between, 1), "L_wi": within / max(n_within, 1)}
    terms["L_DR"] = {
        "eq3": terms["L_bt"] - terms["L_wi"],
        "drl": terms["L_bt"] + terms["L_wi"],
        "challenge": 0.5 * (between + within) / len(keys) ** 2,
        "followup": (between + 2 * within) / len(keys) ** 2,
    }[form]
    return terms


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.state_dict().values()]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(model, plugins, *, stream=None, seed=1, n=3, **kwargs):
    """Train on the first ``n`` experiences from a fixed random state; the strategy."""
    stream = class_stream().train_stream if stream is None else stream
    torch.manual_seed(seed)
    strategy = naive(model, plugins, **kwargs)
    for experience in stream[:n]:
        strategy.train(experience)
    return strategy


def first_step(model, plugin, *, probe=None, **kwargs) -> dict:
    """The first step, and by how much it lies above the cross entropy, divided by ``lam``."""
    probe = probe or Probe()
    run(model, [plugin, probe], n=1, **kwargs)
    assert probe.hooks == 0
    step = probe.steps[0]
    step["term"] = float((step["loss"] - step["cross_entropy"]) / plugin.lam)
    return step


def hidden(model: MLP, x):
    """Every post-activation output and the logits of an MLP, without hooks."""
    outputs = []
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            outputs.append(x)
    return [*outputs, model.classifier(x)]


# the value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layers", "pick"),
    [
        ("auto", slice(None)),
        ("logits", slice(2, 3)),
        ("features.1", slice(0, 1)),
        (["features.3", "logits"], slice(1, 3)),
        (nn.ReLU, slice(0, 2)),
    ],
)
def test_the_loss_is_cross_entropy_plus_lam_times_the_term(layers, pick, form):
    plugin = DRLPlugin(LAM, form=form, layers=layers)
    step = first_step(MLP(8, (16, 12), 6), plugin)
    want = by_hand(hidden(step["model"], step["x"])[pick], step["y"], form)
    assert step["term"] == pytest.approx(want["L_DR"], rel=1e-4, abs=1e-4)


def test_normalize_uses_cosine_similarities():
    step = first_step(MLP(8, (16, 12), 6), DRLPlugin(LAM, normalize=True))
    rows = [F.normalize(h, dim=1) for h in hidden(step["model"], step["x"])]
    assert step["term"] == pytest.approx(by_hand(rows, step["y"])["L_DR"], abs=1e-4)


@pytest.mark.parametrize(("form", "change"), [("eq3", 0.017), ("drl", 0.039)])
def test_lam_1e_3_changes_the_loss_of_the_closed_form_by_exactly(form, change):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).double()
    model[0].weight.data = torch.eye(2, dtype=torch.float64)
    data = TensorDataset(torch.tensor([[1.0, 2], [3, 4], [5, 6]]).double(), torch.tensor([0, 0, 1]))
    data.targets = [0, 0, 1]
    stream = nc_benchmark(data, data, 1, task_labels=False).train_stream
    plugin = DRLPlugin(1e-3, form=form, layers="0")
    probe = Probe()
    run(model, [plugin, probe], stream=stream, batch=3)
    loss, cross_entropy = probe.steps[0]["loss"], probe.steps[0]["cross_entropy"]
    # Avalanche adds the loss up in float32
    assert float(loss) == pytest.approx(float(cross_entropy) + change, abs=2e-7)
    assert float(plugin.last["L_DR"]) == pytest.approx(1000 * change, rel=1e-12)


def test_the_first_update_is_the_gradient_of_cross_entropy_plus_the_term():
    probe, lr = Probe(), 0.1
    strategy = run(MLP(8, (16,), 6), [DRLPlugin(LAM), probe], n=1, lr=lr, batch=40)
    step = probe.steps[0]
    model, y = step["model"], step["y"]
    rows = hidden(model, step["x"])
    loss = F.cross_entropy(rows[-1], y)
    same = (y[:, None] == y).float()
    for h in rows:
        gram = h @ h.T
        loss = loss + LAM * (gram * (1 - same)).sum() / (1 - same).sum()
        loss = loss + LAM * (gram * (same - torch.eye(len(y)))).sum() / (same.sum() - len(y))
    loss.backward()
    for before, after in zip(model.parameters(), strategy.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - lr * before.grad, rtol=1e-4, atol=1e-6)


def test_pool_gap_takes_spatial_means_of_maps_and_leaves_vectors():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 6),
    )  # fmt: skip
    stream = class_stream(width=16).train_stream
    steps = {}
    for pool in (None, "gap"):
        step = first_step(copy.deepcopy(model), DRLPlugin(LAM, pool=pool), stream=stream)
        maps = step["model"][:3](step["x"])
        rows = [maps.mean((2, 3)) if pool else maps, step["model"](step["x"])]
        want = by_hand(rows, step["y"])["L_DR"]
        assert step["term"] == pytest.approx(want, rel=1e-4, abs=1e-4)
        steps[pool] = want
    assert abs(steps[None] - steps["gap"]) > 0.1


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b, self.c = (
                nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 6))  # fmt: skip

        def rows(self, x):
            h1 = self.act(self.a(x))
            h2 = self.act(self.b(h1))
            return [h1, h2, self.c(h2)]

        def forward(self, x):
            return self.rows(x)[-1]

    step = first_step(Twice(), DRLPlugin(LAM))
    want = by_hand(step["model"].rows(step["x"]), step["y"])["L_DR"]
    assert step["term"] == pytest.approx(want, abs=1e-4)


def test_a_layer_that_several_modules_share_counts_once():
    model = SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0)
    step = first_step(model, DRLPlugin(LAM, layers="leaves"))
    rows = [step["model"].get_features(step["x"]), step["model"](step["x"])]
    assert step["term"] == pytest.approx(by_hand(rows, step["y"])["L_DR"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Sequential has no activation modules")
@pytest.mark.parametrize("last", [nn.Linear(16, 6), nn.Sequential(nn.Linear(16, 6), nn.Tanh())])
@pytest.mark.parametrize("layers", ["auto", ["1", "logits"], ["1"], lambda name, m: name == "1"])
def test_logits_that_a_layer_records_too_count_once(last, layers):
    step = first_step(
        nn.Sequential(nn.Linear(8, 16), copy.deepcopy(last)), DRLPlugin(LAM, layers=layers)
    )
    h = step["model"][0](step["x"])
    rows = [step["model"][1](h)]
    if layers == "auto" and isinstance(last, nn.Linear):  # no activation: linear layers instead
        rows.append(h)
    assert step["term"] == pytest.approx(by_hand(rows, step["y"])["L_DR"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("class_key", ["y", "task_y"])
def test_class_key_task_y_keeps_equal_labels_of_different_tasks_apart(class_key):
    probe = Probe(tasks=lambda size: torch.arange(size) % 2)
    step = first_step(MLP(8, (16,), 6), DRLPlugin(LAM, class_key=class_key), probe=probe)
    rows = hidden(step["model"], step["x"])
    keys = {"y": step["y"], "task_y": 100 * step["task"] + step["y"]}
    want = {name: by_hand(rows, key)["L_DR"] for name, key in keys.items()}
    assert step["term"] == pytest.approx(want[class_key], rel=1e-4)
    assert abs(want["y"] - want["task_y"]) > 0.01


# heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["logits", "classifier"])
def test_masked_units_of_an_incremental_head_do_not_count(layers):
    model = nn.Sequential()
    model.add_module("features", nn.Linear(8, 16))
    model.add_module("classifier", IncrementalClassifier(16, initial_out_features=6))
    probe = Probe()
    run(model, [DRLPlugin(LAM, layers=layers), probe], n=2)
    for step, seen in ((probe.steps[0], 2), (probe.steps[-1], 4)):
        logits = step["model"](step["x"])
        assert (logits[:, seen:] == -1000).all()
        want = by_hand([logits[:, :seen]], step["y"])["L_DR"]
        term = float((step["loss"] - step["cross_entropy"]) / LAM)
        assert term == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_an_incremental_head_grows_under_the_plugin():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), IncrementalClassifier(16))
    probe = Probe()
    run(model, [DRLPlugin(LAM), probe])
    assert [step["model"](step["x"]).shape[1] for step in probe.steps[::5]] == [2, 4, 6]
    step = probe.steps[-1]
    h = step["model"][:2](step["x"])
    term = float((step["loss"] - step["cross_entropy"]) / LAM)
    want = by_hand([h, step["model"][2](h)], step["y"])["L_DR"]
    assert term == pytest.approx(want, rel=1e-3)


def test_layers_added_between_experiences_are_found():
    model, probe = MLP(8, (16,), 6), Probe()
    strategy = run(model, [DRLPlugin(LAM), probe], n=1)
    model.features.extend([nn.Linear(16, 16), nn.ReLU()])
    strategy.train(class_stream().train_stream[1])
    step = probe.steps[5]
    rows = hidden(step["model"], step["x"])
    assert len(rows) == 3
    term = float((step["loss"] - step["cross_entropy"]) / LAM)
    assert term == pytest.approx(by_hand(rows, step["y"])["L_DR"], rel=1e-3)


@pytest.mark.parametrize("class_key", ["y", "task_y"])
def test_a_multi_head_model_with_task_labels(class_key):
    model = MTSimpleMLP(input_size=8, hidden_size=16)
    model.features[2].p = 0.0
    probe = Probe()
    stream = class_stream(task_labels=True).train_stream
    run(model, [DRLPlugin(LAM, class_key=class_key), probe], stream=stream)
    for step, active in ((probe.steps[0], [0, 1]), (probe.steps[-1], [4, 5])):
        model, x = step["model"], step["x"]
        logits = model(x, step["task"])
        masked = [u for u in range(logits.shape[1]) if u not in active]
        assert (logits[:, masked] == -1000).all()
        want = by_hand([model.features(x), logits[:, active]], step["y"])["L_DR"]
        term = float((step["loss"] - step["cross_entropy"]) / LAM)
        assert term == pytest.approx(want, rel=1e-3, abs=1e-3)


# layers that cannot take part -------------------------------------------------------------------


def test_frozen_layers_are_skipped():
    model = MLP(8, (16, 12), 6)
    model.features[0].requires_grad_(False)
    step = first_step(model, DRLPlugin(LAM))
    want = by_hand(hidden(step["model"], step["x"])[1:], step["y"])["L_DR"]
    assert step["term"] == pytest.approx(want, rel=1e-4, abs=1e-4)


class Odd(nn.Module):
    """With modules whose outputs do not have one row per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fold, self.mean = nn.Linear(8, 12), nn.Flatten(0, 1), Mean()
        self.lstm, self.unused, self.b = nn.LSTM(12, 12), nn.Linear(1, 1), nn.Linear(12, 6)

    def forward(self, x):
        h = self.a(x)
        self.fold(h.unflatten(1, (2, 6)))
        return self.b(h) + self.mean(h) + 0 * self.lstm(h)[0].sum()


class Mean(nn.Module):
    """A scalar."""

    def forward(self, x):
        return x.mean()


def test_presets_skip_outputs_without_one_row_per_sample():
    step = first_step(Odd(), DRLPlugin(LAM, layers="leaves"))
    h = step["model"].a(step["x"])
    want = by_hand([h, step["model"].b(h)], step["y"])["L_DR"]
    assert step["term"] == pytest.approx(want, rel=1e-4, abs=1e-4)


def frozen_mlp() -> MLP:
    model = MLP(8, (16,), 6)
    model.features.requires_grad_(False)
    return model


def called_compiled():
    model = torch.compile(MLP(8, (16,), 6), backend="eager")
    model.train()(torch.randn(8, 8))
    return model


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (frozen_mlp, "features.1", "'features.1' leaves DRL nothing to train"),
        (Odd, ["fold"], r"layer 'fold' gives shape \(16, 6\) for a batch of 8"),
        (Odd, ["a", "mean"], r"layer 'mean' gives shape \(\) for a batch of 8"),
        (Odd, ["a", "lstm"], r"\['lstm'\] gave no tensor"),
        (Odd, ["a", "unused", "logits"], r"\['unused'\] gave no tensor"),
        (called_compiled, "auto", r"\['features.1'\] gave no tensor.*compiled"),
        (lambda: MLP(8, (16,), 6), ["features.7"], "'features.7'.*Close"),
        (lambda: nn.DataParallel(MLP(8, (16,), 6)), "auto", "DataParallel splits"),
    ],
)
def test_a_layer_that_cannot_be_used_stops_before_any_weight_changes(make, layers, message):
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        run(model, [DRLPlugin(LAM, layers=layers)])
    assert equal(weights(model), before)
    assert count_hooks(model) == 0


# arguments and data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lam": -1e-9}, ValueError, "a finite lam >= 0"),
        ({"lam": float("nan")}, ValueError, "a finite lam >= 0"),
        ({"lam": float("inf")}, ValueError, "a finite lam >= 0"),
        ({"lam": True}, TypeError, "a number lam"),
        ({"lam": "1e-3"}, TypeError, "a number lam"),
        ({"form": "eq4"}, ValueError, r"form to be one of \['eq3', 'drl', .*'eq4'"),
        ({"form": None}, ValueError, "form to be one of"),
        ({"form": DRLForm(1, 1, "sum")}, ValueError, "form.reduction.*'pairs', 'batch'.*'sum'"),
        ({"pool": "max"}, ValueError, r"pool to be one of \[None, 'gap'\]; got 'max'"),
        ({"class_key": "task"}, ValueError, r"class_key to be one of \['y', 'task_y'\]"),
        ({"layers": []}, ValueError, "at least one layer"),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(arguments, error, message):
    with pytest.raises(error, match=f"DRLPlugin expects {message}"):
        DRLPlugin(**arguments)


def test_everything_but_lam_is_keyword_only():
    with pytest.raises(TypeError):
        DRLPlugin(1e-3, "drl")


@pytest.mark.parametrize("lam", [0, LAM])
def test_labels_outside_the_head_are_refused_before_any_weight_changes(lam):
    model = MLP(8, (16,), 4)
    strategy = run(model, [DRLPlugin(lam)], n=2)
    before = weights(model)
    with pytest.raises(ValueError, match="labels 4 to 5, but the model's output has 4 units"):
        strategy.train(class_stream().train_stream[2])
    assert equal(weights(model), before)


@pytest.mark.parametrize("lam", [0, LAM])
def test_an_empty_experience_is_refused(lam):
    experience = class_stream().train_stream[1]
    experience._dataset = as_classification_dataset(experience.dataset).subset([])
    with pytest.raises(ValueError, match="experience 1 of the training stream is empty"):
        run(MLP(8, (16,), 6), [DRLPlugin(lam)], stream=[experience])


@pytest.mark.parametrize(
    ("repeat", "class_key", "count"), [(True, "y", 1), (True, "task_y", 0), (False, "y", 0)]
)
def test_labels_that_repeat_across_tasks_warn_once(repeat, class_key, count):
    stream = nc_benchmark(
        blobs(), blobs(), 3, task_labels=True, class_ids_from_zero_in_each_exp=repeat
    ).train_stream
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(MLP(8, (16,), 6), [DRLPlugin(LAM, class_key=class_key)], stream=stream)
    found = [str(w.message) for w in caught if "DRL treats them as one class" in str(w.message)]
    assert len(found) == count
    assert all("occurs in tasks 0 and 1" in message for message in found)


@pytest.mark.parametrize("form", ["eq3", FORMS["eq3"]], ids=["name", "DRLForm"])
def test_divergence_of_the_printed_equation_names_its_cause(form):
    model, probe = MLP(8, (16,), 6), Probe()
    with pytest.raises(ValueError, match=r'no longer finite \(step \d+.*lam=0\.1.*form="eq3"'):
        run(model, [DRLPlugin(0.1, form=form), probe], n=1, epochs=100)
    assert len(probe.steps) > 5  # the first steps are fine, and the first bad one is not taken
    assert all(torch.isfinite(step["loss"]).all() for step in probe.steps[:-1])
    assert "loss" not in probe.steps[-1]
    assert count_hooks(model) == 0


def test_divergence_of_another_form_is_not_blamed_on_the_printed_equation():
    with pytest.raises(ValueError, match="lower lam or the learning rate") as error:
        run(MLP(8, (16,), 6), [DRLPlugin(10.0)], n=1, lr=10.0, epochs=20)
    assert "eq3" not in str(error.value)


# reports ----------------------------------------------------------------------------------------


def test_epoch_means_are_published_and_last_holds_the_last_step():
    plugin, probe, evaluator = DRLPlugin(LAM), Probe(), EvaluationPlugin()
    run(MLP(8, (16,), 6), [plugin, probe], n=1, epochs=2, evaluator=evaluator, batch=16)
    terms = [by_hand(hidden(s["model"], s["x"]), s["y"]) for s in probe.steps]
    assert len(terms) == 6  # 16 + 16 + 8 samples, twice
    metrics = evaluator.get_all_metrics()
    for name in ("L_bt", "L_wi", "L_DR"):
        (key,) = [k for k in metrics if k.startswith(f"DRL_{name}/train_phase/train_stream")]
        when, got = metrics[key]
        want = [sum(t[name] for t in terms[a : a + 3]) / 3 for a in (0, 3)]
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
        assert len(set(when)) == 2
    assert set(plugin.last) == {"L_bt", "L_wi", "L_DR"}
    for name, value in plugin.last.items():
        assert not value.requires_grad
        assert float(value) == pytest.approx(terms[-1][name], rel=1e-4, abs=1e-4)


def test_weight_zero_publishes_nothing():
    evaluator = EvaluationPlugin()
    plugin = DRLPlugin(0)
    run(MLP(8, (16,), 6), [plugin], evaluator=evaluator)
    assert evaluator.get_all_metrics() == {}
    assert plugin.last == {}


# what it leaves alone ---------------------------------------------------------------------------


def dropout_net() -> SimpleMLP:
    torch.manual_seed(0)
    return SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0.5)


def test_weight_zero_is_plain_training_bit_for_bit():
    plain = run(dropout_net(), [])
    assert equal(weights(run(dropout_net(), [DRLPlugin(0)]).model), weights(plain.model))
    assert not equal(weights(run(dropout_net(), [DRLPlugin(LAM)]).model), weights(plain.model))


def test_batches_of_one_sample_are_plain_training_bit_for_bit():
    plain = run(dropout_net(), [], batch=1, n=1)
    assert equal(
        weights(run(dropout_net(), [DRLPlugin(1.0)], batch=1, n=1).model), weights(plain.model)
    )


def test_it_draws_no_random_numbers():
    run(dropout_net(), [])
    state = torch.get_rng_state()
    run(dropout_net(), [DRLPlugin(LAM)])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [lambda: BERPlugin(12), lambda: ReplayPlugin(12)])
def test_the_order_of_the_plugins_does_not_matter(other):
    one = run(dropout_net(), [DRLPlugin(LAM), other()])
    two = run(dropout_net(), [other(), DRLPlugin(LAM)])
    assert equal(weights(one.model), weights(two.model))


class EvalEveryStep(SupervisedPlugin):
    """Evaluate after every step, with a random state of its own."""

    def __init__(self, stream) -> None:
        super().__init__()
        self.stream = stream

    def after_training_iteration(self, strategy, **kwargs):
        with torch.random.fork_rng():
            strategy.eval(self.stream)


def test_evaluation_in_mid_training_changes_no_weight():
    plain = run(dropout_net(), [DRLPlugin(LAM)])
    evaluated = run(dropout_net(), [DRLPlugin(LAM), EvalEveryStep(class_stream().test_stream)])
    assert equal(weights(plain.model), weights(evaluated.model))


def test_no_hook_outlives_a_forward_pass_or_training():
    probe, plugin = Probe(), DRLPlugin(LAM, layers="leaves")
    strategy = run(MLP(8, (16,), 6), [plugin, probe])
    assert len(probe.steps) == 15
    assert probe.hooks == 0
    assert count_hooks(strategy.model) == 0
    strategy.eval(class_stream().test_stream)
    assert count_hooks(strategy.model) == 0


def test_no_graph_is_held_between_experiences():
    plugin = DRLPlugin(LAM)
    run(MLP(8, (16,), 6), [plugin], n=1)
    held = [v for v in vars(plugin).values() if isinstance(v, torch.Tensor)]
    assert not any(v.requires_grad for v in [*held, *plugin.last.values()])
    assert plugin._recorder.pop() == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_between_experiences_continues_with_the_same_numbers(clone):
    whole = run(dropout_net(), [DRLPlugin(LAM)])
    model, plugin = dropout_net(), DRLPlugin(LAM)
    run(model, [plugin], n=1)
    model, plugin = clone((model, plugin))
    strategy = naive(model, [plugin])
    for experience in class_stream().train_stream[1:]:
        strategy.train(experience)
    assert equal(weights(model), weights(whole.model))


class CopyEveryStep(SupervisedPlugin):
    """Copy another plugin after every step."""

    def __init__(self, plugin, clone) -> None:
        super().__init__()
        self.plugin, self.clone, self.copies = plugin, clone, []

    def after_training_iteration(self, strategy, **kwargs):
        self.copies.append(self.clone(self.plugin))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_it_can_be_copied_inside_an_experience(clone):
    plugin = DRLPlugin(LAM)
    copier = CopyEveryStep(plugin, clone)
    run(dropout_net(), [plugin, copier], n=1)
    assert len(copier.copies) == 5
    assert copier.copies[-1].last == plugin.last
    assert copier.copies[0].last != plugin.last


def small_timm(n_classes):
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=n_classes, img_size=16,
        patch_size=8, depth=1, embed_dim=24, num_heads=2,
    )  # fmt: skip


def resnet(n_classes):
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=n_classes)


@pytest.mark.parametrize(
    ("make", "tensors"), [(resnet, 3), (small_timm, 2)], ids=["resnet", "timm"]
)
def test_residual_and_timm_models_train_with_replay_on_their_default_layers(make, tensors):
    from avalanche.benchmarks import tensors_benchmark

    from avalanche_ext import BERPlugin

    x, y = torch.rand(24, 3, 16, 16), torch.arange(24) // 6
    parts = [(x[:12], y[:12]), (x[12:], y[12:])]
    benchmark = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])
    recorded = []

    torch.manual_seed(0)
    plugin = DRLPlugin(1e-4)
    kept = plugin._representations

    def watched(logits, batch_size):
        found = kept(logits, batch_size)
        recorded.append([tuple(h.shape) for h in found])
        return found

    plugin._representations = watched
    strategy = naive(make(4), [plugin, BERPlugin(6)], lr=0.01, batch=6)
    before = [p.detach().clone() for p in strategy.model.parameters()]
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    assert [len(shapes) for shapes in recorded] == [tensors] * 4
    assert {shapes[-1] for shapes in recorded} == {(6, 4), (12, 4)}
    assert all(torch.isfinite(p).all() for p in strategy.model.parameters())
    after = strategy.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
