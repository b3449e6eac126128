"""Importances against closed forms, whatever the batches, on a network that is left as it was."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset, TransformGroups, as_classification_dataset
from avalanche.models import IncrementalClassifier, MTSimpleMLP, MultiHeadClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from avalanche_ext.functional.importance import sampled_labels
from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.training import layer_gradients, sample_gradients
from avalanche_ext.training.importances import L2, Fisher, OutputNorm, trainable
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.path_importances import FisherPath, PathIntegral
from tests.conftest import class_stream

MEASURES = [Fisher("sampled"), Fisher("empirical"), Fisher("argmax"), OutputNorm()]
IDS = ["sampled", "empirical", "argmax", "mas"]


def samples(n=13, *shape, classes=3, seed=0, transforms=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *(shape or (4,)), generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    tensors = TensorDataset(x, y)
    tensors.targets = y.tolist()
    return x, y, as_classification_dataset(tensors, transform_groups=transforms)


def finish(measure, model, dataset, *, batch=5, learnt=0):
    strategy = types.SimpleNamespace(
        model=model, experience=types.SimpleNamespace(dataset=dataset), train_mb_size=batch,
        device=torch.device("cpu"), clock=types.SimpleNamespace(train_exp_counter=learnt),
    )  # fmt: skip
    return measure.finish(strategy)


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


class ConvNet(nn.Module):
    """What an importance pass can get wrong: batch statistics, dropout, in-place layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Flatten(),
        )  # fmt: skip
        self.classifier = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        return self.classifier(self.features(x))


def conv_net():
    torch.manual_seed(0)
    model = ConvNet()
    model(torch.randn(20, 2, 6, 6))  # statistics that are not those of the samples
    return model.train()


def oracle(model, x, labels, of, tasks=None):
    """One backward pass per sample, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(x)):
        model.zero_grad()
        z = model(x[k : k + 1], *(() if tasks is None else (tasks[k : k + 1],)))
        (z.square().sum() if labels is None else F.cross_entropy(z, labels[k : k + 1])).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += of(p.grad)
    return {name: total / len(x) for name, total in sums.items()}


# closed forms -----------------------------------------------------------------------------------


def test_fisher_of_a_linear_classifier_in_closed_form():
    # Of one sample very often: the mean over drawn labels is p (1 - p) x^2, to 4 standard errors.
    n, model = 20_000, nn.Linear(4, 3)
    x = torch.randn(1, 4)
    tensors = TensorDataset(x.expand(n, 4), torch.zeros(n, dtype=torch.int64))
    tensors.targets = [0] * n
    found = finish(Fisher(), model, as_classification_dataset(tensors), batch=2000)
    p = torch.softmax(model(x)[0].detach(), 0)
    want = p * (1 - p)
    spread = (p * (1 - p) * (1 - 2 * p) ** 2 / n).sqrt()
    assert ((found["bias"] - want).abs() <= 4 * spread + 1e-6).all()
    torch.testing.assert_close(found["weight"], found["bias"][:, None] * x.square())


@pytest.mark.parametrize("mode", ["sampled", "empirical", "argmax"])
def test_fisher_takes_the_labels_that_its_mode_says(mode):
    x, y, dataset = samples(classes=3)
    model = nn.Linear(4, 3)
    p = torch.softmax(model(x).detach().double(), 1)
    uniform = torch.rand(13, generator=seeded(torch.initial_seed(), 2), dtype=torch.float64)
    pairs = zip(uniform, p, strict=True)
    drawn = [next(k for k in range(3) if u < row[: k + 1].sum()) for u, row in pairs]
    labels = {"sampled": torch.tensor(drawn), "empirical": y, "argmax": p.argmax(1)}
    assert len({tuple(v.tolist()) for v in labels.values()}) == 3
    error = (p - F.one_hot(labels[mode], 3)).float()
    found = finish(Fisher(mode), model, dataset, learnt=2)
    torch.testing.assert_close(found["weight"], (error**2).T @ x**2 / 13)
    torch.testing.assert_close(found["bias"], (error**2).mean(0))


def test_another_experience_draws_other_labels_and_the_same_one_the_same():
    _, _, dataset = samples(60)
    model = nn.Linear(4, 3)
    first, again, second = (finish(Fisher(), model, dataset, learnt=k) for k in (0, 0, 1))
    close(first, again)
    assert not torch.equal(first["weight"], second["weight"])


def test_mas_of_a_linear_layer_in_closed_form():
    x, _, dataset = samples()
    model = nn.Linear(4, 3, bias=False)
    want = 2 * model(x).abs().T.detach() @ x.abs() / 13
    torch.testing.assert_close(finish(OutputNorm(), model, dataset)["weight"], want)


def test_a_convolutional_network_matches_one_backward_pass_per_sample():
    x, y, dataset = samples(13, 2, 6, 6)
    model = conv_net()
    close(finish(Fisher("empirical"), model, dataset), oracle(model, x, y, torch.square))
    close(finish(OutputNorm(), model, dataset), oracle(model, x, None, torch.abs))


# how the pass is made ---------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES, ids=IDS)
def test_the_size_of_batches_and_of_chunks_does_not_matter(measure, monkeypatch):
    _, _, dataset = samples(13, 2, 6, 6)
    model, supported = conv_net(), layer_gradients._is_supported
    reference = finish(measure, model, dataset, batch=13)
    assert all((omega > 0).any() for omega in reference.values())
    for batch in (1, 4):
        close(finish(measure, model, dataset, batch=batch), reference)
    seen = []
    whole = sample_gradients.per_sample_sums
    monkeypatch.setattr(
        sample_gradients, "per_sample_sums",
        lambda *args, chunk=0, **kwargs: seen.append(chunk) or whole(*args, chunk=chunk, **kwargs),
    )  # fmt: skip
    size = sum(4 * p.numel() for p in model.parameters()) + 1
    for fit, chunk in ((3, 0), (4, 4), (7, 7)):
        seen.clear()
        monkeypatch.setitem(sample_gradients._GRADIENT_BYTES, "cpu", fit * size)
        close(finish(measure, model, dataset), reference)
        assert seen == []  # by layers
        monkeypatch.setattr(layer_gradients, "_is_supported", lambda module: False)
        close(finish(measure, model, dataset), reference)
        assert set(seen) == {chunk}
        monkeypatch.setattr(layer_gradients, "_is_supported", supported)


@pytest.mark.parametrize("measure", MEASURES, ids=IDS)
def test_the_pass_leaves_network_and_random_states_alone(measure):
    _, _, dataset = samples(13, 2, 6, 6)
    model = conv_net()
    model.features[3].eval()  # one layer in another mode than the rest
    modes = [module.training for module in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert any("running_mean" in name for name in state)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    finish(measure, model, dataset)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.classifier.weight.grad, torch.ones(3, 64))
    assert model.features[0].weight.grad is None


@pytest.mark.parametrize("measure", MEASURES, ids=IDS)
def test_samples_come_through_the_evaluation_transforms(measure):
    def fail(x):
        raise AssertionError("a training transform")

    transforms = TransformGroups({"train": (fail, None), "eval": (lambda x: 2 * x, None)})
    x, y, dataset = samples(transforms=transforms)
    doubled = TensorDataset(2 * x, y)
    doubled.targets = y.tolist()
    model = nn.Linear(4, 3)
    assert isinstance(dataset, AvalancheDataset)
    close(finish(measure, model, dataset.train()),
          finish(measure, model, as_classification_dataset(doubled)))  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def test_a_network_that_cannot_be_vectorised_is_taken_one_sample_at_a_time():
    x, y, dataset = samples(9, 6, 4)
    model = Recurrent()
    with pytest.warns(UserWarning, match="one sample at a time") as caught:
        found = finish(Fisher("empirical"), model, dataset, batch=4)
    assert len(caught) == 1  # not once per batch
    close(found, oracle(model, x, y, torch.square))


def test_frozen_parameters_are_left_out():
    _, _, dataset = samples(13, 2, 6, 6)
    model = conv_net()
    everything = finish(Fisher("empirical"), model, dataset)
    model.features.requires_grad_(False)
    found = finish(Fisher("empirical"), model, dataset)
    assert list(found) == ["classifier.weight", "classifier.bias"]
    torch.testing.assert_close(found["classifier.weight"], everything["classifier.weight"])
    assert list(finish(L2(), model, dataset)) == list(found)


def test_fisher_needs_logits():
    _, _, dataset = samples()
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))
    with pytest.raises(ValueError, match=r"expects logits \(B, C\)"):
        finish(Fisher(), model, dataset)
    assert finish(OutputNorm(), model, dataset)["0.weight"].shape == (6, 4)


# heads ------------------------------------------------------------------------------------------


def adapted(model, stream):
    model.train()
    for experience in stream:
        for module in model.modules():
            if hasattr(module, "pre_adapt"):
                module.pre_adapt(None, experience)
                break
    return model


@pytest.mark.parametrize("measure", MEASURES, ids=IDS)
def test_heads_of_tasks(measure):
    stream = class_stream(task_labels=True).train_stream
    model = adapted(MTSimpleMLP(input_size=8, hidden_size=5), stream)
    assert [len(h.classifier.bias) for h in model.classifier.classifiers.values()] == [2, 4, 6]
    mixed = stream[0].dataset.subset(range(10)).concat(stream[1].dataset.subset(range(15)))
    x, y, tasks = (torch.stack([torch.as_tensor(row[k]) for row in mixed]) for k in range(3))
    with torch.no_grad():
        z = model.eval()(x, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = finish(measure, model, mixed, batch=7)
    if isinstance(measure, OutputNorm):
        want = oracle(model, x, None, torch.abs, tasks)
    else:
        uniform = torch.rand(25, generator=seeded(torch.initial_seed(), 0), dtype=torch.float64)
        labels = {"sampled": sampled_labels(z, uniform), "empirical": y, "argmax": z.argmax(1)}
        want = oracle(model, x, labels[measure.mode], torch.square, tasks)
    close(found, want)
    assert found["classifier.classifiers.1.classifier.weight"].any()
    assert not found["classifier.classifiers.2.classifier.weight"].any()


def test_l2_leaves_out_classes_that_have_not_been_trained_on():
    stream = class_stream(3).train_stream
    growing = nn.Sequential(adapted(IncrementalClassifier(8, 6), stream[:1]))
    fixed = nn.Sequential(adapted(FixedSizeClassifier(8, 7, initial_out_features=2), stream[:1]))
    unmasked = nn.Sequential(IncrementalClassifier(8, 6, masking=False))
    _, _, dataset = samples()
    for model, rows in ((growing, 6), (fixed, 7)):
        found = finish(L2(), model, dataset)
        assert found["0.classifier.bias"].tolist() == [1, 1] + [0] * (rows - 2)
        assert found["0.classifier.weight"].sum(1).tolist() == [8, 8] + [0] * (rows - 2)
    assert finish(L2(), unmasked, dataset)["0.classifier.bias"].tolist() == [1] * 6
    assert finish(L2(), growing[0], dataset)["classifier.bias"].tolist() == [1, 1] + [0] * 4


def test_l2_leaves_out_heads_that_have_not_been_trained():
    stream = class_stream(3, task_labels=True).train_stream
    head = adapted(MultiHeadClassifier(8, initial_out_features=2), stream[1:2])
    found = finish(L2(), nn.Sequential(head), samples()[2])
    assert found["0.classifiers.0.classifier.bias"].tolist() == [0, 0]
    # Labels 2 and 3, of which the head has the units 0 to 3.
    assert found["0.classifiers.1.classifier.bias"].tolist() == [0, 0, 1, 1]


# along the way ----------------------------------------------------------------------------------


class Path:
    """Steps on a loss of one parameter vector, with a measure that watches them."""

    def __init__(self, measure, theta, optimizer=torch.optim.SGD, **options):
        self.model = nn.ParameterDict({"theta": nn.Parameter(torch.tensor(theta))})
        self.measure = measure
        self.theta = self.model["theta"]
        self.optimizer = optimizer(self.model.parameters(), **options)
        measure.start(trainable(self.model))

    def step(self, loss):
        self.optimizer.zero_grad()
        value = loss(self.theta)
        value.backward()
        self.measure.before_step(trainable(self.model))
        self.optimizer.step()
        self.measure.after_step(trainable(self.model))
        return float(value.detach() - loss(self.theta.detach()))

    def finish(self):
        return self.measure.finish(types.SimpleNamespace(model=self.model))["theta"]


def parabola(a):
    return lambda theta: 0.5 * a * theta.square().sum()


@pytest.mark.parametrize(("a", "eta"), [(1.0, 0.1), (3.0, 0.2), (0.5, 1.5)])
def test_si_over_the_drop_of_the_loss_in_closed_form(a, eta):
    path = Path(PathIntegral(eps=0.5), [1.7], lr=eta)
    drop = path.step(parabola(a))
    way = float(path.theta.detach()) - 1.7
    omega = float(path.finish()) * (way**2 + 0.5)
    assert omega / drop == pytest.approx(1 / (1 - a * eta / 2), rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.05}),
    ],
)
def test_si_measures_the_way_that_the_optimizer_really_goes(optimizer, options):
    measure = PathIntegral(eps=0.01)
    path = Path(measure, [1.0, -2.0], optimizer, **options)
    omega, start = torch.zeros(2), path.theta.detach().clone()
    for _ in range(7):
        gradient = 3 * path.theta.detach().clone()
        before = path.theta.detach().clone()
        path.step(parabola(3.0))
        omega -= gradient * (path.theta.detach() - before)
    want = omega.clamp(min=0) / ((path.theta.detach() - start).square() + 0.01)
    torch.testing.assert_close(path.finish(), want)
    assert (want > 0).all()


def test_a_way_uphill_has_no_importance():
    path = Path(PathIntegral(), [1.0], lr=0.1, maximize=True)
    path.step(parabola(1.0))
    assert path.finish().tolist() == [0.0]


def test_what_others_make_of_the_gradient_is_not_measured():
    path = Path(PathIntegral(), [1.0], lr=0.1)
    parabola(2.0)(path.theta).backward()
    path.measure.before_step(trainable(path.model))
    path.theta.grad.mul_(-3)  # clipping and projection change it in place
    path.theta.data.sub_(0.5)
    path.measure.after_step(trainable(path.model))
    assert float(path.finish()) == pytest.approx(2 * 0.5 / (0.25 + 0.1))


def test_each_experience_begins_anew():
    path = Path(PathIntegral(), [1.0], lr=0.1)
    path.step(parabola(1.0))
    first = path.finish()
    assert path.measure._origin == path.measure._drop == {}  # no copies between experiences
    path.measure.start(trainable(path.model))
    assert path.finish().tolist() == [0.0]
    path.measure.start(trainable(path.model))
    path.step(parabola(1.0))
    theta, step = 0.9, 0.09
    assert float(path.finish()) == pytest.approx(theta * step / (step**2 + 0.1), rel=1e-5)
    assert float(first) == pytest.approx(0.1 / (0.1**2 + 0.1), rel=1e-5)


@pytest.mark.parametrize("measure", [PathIntegral(), FisherPath(delta_t=2)])
def test_an_experience_that_was_broken_off_leaves_nothing(measure):
    found = []
    for broken_off in (False, True):
        path = Path(copy.deepcopy(measure), [1.0, 2.0], lr=0.1)
        if broken_off:
            for _ in range(3):
                path.measure.before_step({})  # steps without a gradient, and then some with
                path.measure.after_step(trainable(path.model))
            path.measure._drop = {"theta": torch.tensor([9.0, 0.0])}
            path.measure._scores = {"theta": torch.tensor([0.0, 9.0])}
            path.measure.start(trainable(path.model))
        for _ in range(3):
            path.step(parabola(1.0))
        found.append(path.finish())
    assert torch.equal(*found)


def slow_rwalk(steps, alpha, delta_t, eps):
    """RWalk over experiences of ``(gradient, before, after)`` steps, number by number."""
    fisher, mean, found = None, None, []
    for experience in steps:
        score = 0.0
        for at in range(0, len(experience), delta_t):
            stretch, drop = experience[at : at + delta_t], 0.0
            for g, before, after in stretch:
                fisher = g**2 if fisher is None else alpha * g**2 + (1 - alpha) * fisher
                drop = drop - g * (after - before)
            moved = stretch[-1][2] - stretch[0][1]
            score = score + drop.clamp(min=0) / (0.5 * fisher * moved**2 + eps)
        mean = score if mean is None else (mean + score) / 2
        found.append(fisher / fisher.max() + mean / mean.max())
    return found


@pytest.mark.parametrize("delta_t", [1, 3, 10])
def test_rwalk_matches_a_slow_one(delta_t):
    path = Path(FisherPath(alpha=0.7, delta_t=delta_t, eps=1e-3), [1.0, -2.0, 0.5], lr=0.1)
    record, found = [], []
    curvature = torch.tensor([1.0, 4.0, 0.3])
    for k in range(3):
        path.measure.start(trainable(path.model))
        record.append([])
        for _ in range(7):
            before = path.theta.detach().clone()
            path.step(lambda t, k=k: 0.5 * (curvature * (t - k).square()).sum())
            gradient = curvature * (before - k)
            record[-1].append((gradient, before, path.theta.detach().clone()))
        found.append(path.finish())
    for got, want in zip(found, slow_rwalk(record, 0.7, delta_t, 1e-3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rwalk_without_a_way_is_the_moving_fisher():
    path = Path(FisherPath(alpha=0.9), [1.0, 2.0], lr=0.0)
    for a in (1.0, 3.0):
        path.step(parabola(a))
    fisher = (0.1 * 1 + 0.9 * 9) * torch.tensor([1.0, 4.0])
    torch.testing.assert_close(path.finish(), fisher / fisher.max())


def test_a_batch_with_every_sample_twice_gives_the_same():
    x, y, _ = samples()
    for measure in (PathIntegral(), FisherPath(delta_t=2)):
        found = []
        for times in (1, 2):
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            watching = copy.deepcopy(measure)
            watching.start(trainable(model))
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(x.repeat(times, 1)), y.repeat(times)).backward()
                watching.before_step(trainable(model))
                optimizer.step()
                watching.after_step(trainable(model))
            found.append(watching.finish(types.SimpleNamespace(model=model)))
        for name in found[0]:
            torch.testing.assert_close(*(f[name] for f in found), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", [PathIntegral(), FisherPath(delta_t=2)])
def test_a_head_that_grows_within_the_way(measure):
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 3)), "idle": torch.ones(2)})
    measure.start(trainable(model))
    for rows in (2, 2, 4, 4):
        if rows != len(model["w"]):
            model["w"] = nn.Parameter(F.pad(model["w"].detach(), (0, 0, 0, 2)))
        model["w"].grad = torch.ones(rows, 3)
        measure.before_step(trainable(model))
        with torch.no_grad():
            model["w"][:2] -= 0.5
        measure.after_step(trainable(model))
    found = measure.finish(types.SimpleNamespace(model=model))["w"]
    assert found.shape == (4, 3)
    if isinstance(measure, PathIntegral):
        torch.testing.assert_close(found[:2], torch.full((2, 3), 2 / (4 + 0.1)))
        assert not found[2:].any()


# settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fisher("online"), "mode to be one of"),
        (lambda: Fisher(merge="max"), "merge to be one of"),
        (lambda: Fisher(merge=1.5), "from 0 to 1"),
        (lambda: Fisher(merge=-0.1), "merge >= 0"),
        (lambda: OutputNorm(merge=float("nan")), "merge >= 0"),
        (lambda: PathIntegral(eps=0), "eps and expects it > 0"),
        (lambda: FisherPath(alpha=0), "alpha above 0"),
        (lambda: FisherPath(alpha=1.1), "alpha above 0"),
        (lambda: FisherPath(delta_t=None), "a number of steps"),
        (lambda: FisherPath(delta_t=0), "delta_t >= 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_how_experiences_add_up():
    assert Fisher().shares(3) == (1.0, 1.0)
    assert Fisher(merge=0.25).shares(3) == (0.25, 1.0)
    assert Fisher(merge="mean").shares(4) == (0.75, 0.25)
