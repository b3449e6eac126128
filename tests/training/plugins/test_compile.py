"""Compiled training against the same training uncompiled, and how often it compiles."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
import warnings

import pytest
import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import (
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch import nn

from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.compile import CompilePlugin
from avalanche_ext.training.plugins.drl import DRLPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from tests.conftest import class_stream, naive

CLASSES = 10
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
}


class Counting:
    """A backend that counts how often torch compiles."""

    def __init__(self, then="eager"):
        self.then = then
        self.graphs = 0

    def __call__(self, module, inputs):
        from torch._dynamo import lookup_backend

        self.graphs += 1
        return lookup_backend(self.then)(module, inputs)


def mlp(hidden=16):
    return MLP(8, (hidden,), CLASSES)


class Growing(nn.Module):
    """A feature layer, batch statistics, and Avalanche's growing head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.classifier = IncrementalClassifier(16)

    def forward(self, x):
        return self.classifier(self.features(x))


def benchmark(n_experiences=5, **options):
    # 2 classes of 19 samples: the last batch of an experience is a short one
    return class_stream(n_experiences, n_classes=CLASSES, n_per_class=19, **options)


def train(plugins=(), *, model=None, optimizer="momentum", bench=None, evaluate=True, **options):
    torch.manual_seed(1)
    model = (model or Growing)()
    strategy = naive(model, plugins, **options)
    strategy.optimizer = OPTIMIZERS[optimizer](model.parameters())
    bench = benchmark() if bench is None else bench
    torch.manual_seed(2)
    for exp in bench.train_stream:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            strategy.train(exp, eval_streams=[])
        if evaluate:
            with torch.random.fork_rng():
                strategy.eval(bench.test_stream[: exp.current_experience + 1])
    return strategy


class Uncompiled(CompilePlugin):
    """The head of fixed size, without compilation."""

    def _compile(self, strategy):
        pass


def tensors(strategy):
    """All weights and statistics; of the head, the units that are in use."""
    state = dict(strategy.model.state_dict())
    units = state.pop("classifier.units_in_use", None)
    if units is not None:
        for name in ("classifier.weight", "classifier.bias", "active_units"):
            state[f"classifier.{name}"] = state[f"classifier.{name}"][: int(units)]
    return state


def assert_same(one, two, rtol=1e-6, atol=1e-6):
    first, second = tensors(one), tensors(two)
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=rtol, atol=atol, msg=name)


# equality and counts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "backend"), [("sgd", "aot_eager"), ("momentum", "eager"), ("adam", "aot_eager")]
)
def test_the_weights_are_those_of_the_growing_head_and_it_compiles_twice(optimizer, backend):
    backend = Counting(backend)
    compiled = train([CompilePlugin(CLASSES, backend=backend)], optimizer=optimizer)
    assert_same(compiled, train(optimizer=optimizer))
    assert backend.graphs == 2  # training, evaluation
    assert isinstance(compiled.model.classifier, FixedSizeClassifier)
    assert not compiled.model.classifier.classifier.weight.isnan().any()


def test_the_first_experience_compiles_and_no_other_does():
    backend, counts = Counting(), []

    class Look(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            counts.append(backend.graphs)

    train([CompilePlugin(CLASSES, backend=backend), Look()], evaluate=False)
    assert counts == [1] * 5


def test_evaluation_on_all_classes_first_equals_the_growing_head():
    def run(plugins):
        torch.manual_seed(1)
        model, bench = Growing(), benchmark()
        strategy = naive(model, plugins)
        strategy.optimizer = OPTIMIZERS["momentum"](model.parameters())
        strategy.make_optimizer()  # Avalanche would keep the head from before the evaluation
        torch.manual_seed(2)
        strategy.eval(bench.test_stream)
        for exp in bench.train_stream:
            strategy.train(exp, eval_streams=[])
            strategy.eval(bench.test_stream)
        return strategy

    backend = Counting()
    compiled = run([CompilePlugin(CLASSES, backend=backend)])
    assert_same(compiled, run([]))
    assert backend.graphs == 2
    held = [id(p) for g in compiled.optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, compiled.model.parameters()))


def test_the_optimizer_holds_the_new_head_and_no_other():
    strategy = train([CompilePlugin(CLASSES, backend="eager")])
    held = [id(p) for g in strategy.optimizer.param_groups for p in g["params"]]
    assert held == [id(p) for p in strategy.model.parameters()]
    assert list(strategy.optimized_param_id) == list(dict(strategy.model.named_parameters()))


def test_a_model_that_was_trained_before_keeps_its_head():
    bench = benchmark()
    strategy = train(bench=benchmark(), evaluate=False)
    head = strategy.model.classifier.classifier.weight.detach().clone()
    strategy.plugins.insert(0, CompilePlugin(12, backend="eager"))
    strategy.optimizer.param_groups[0]["lr"] = 0.0
    strategy.train(bench.train_stream[0], eval_streams=[])
    assert torch.equal(strategy.model.classifier.classifier.weight[:CLASSES], head)
    held = {id(p) for g in strategy.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in strategy.model.parameters()}


def test_a_batch_of_one_sample_compiles_once_more():
    backend = Counting()
    train([CompilePlugin(CLASSES, backend=backend)], model=mlp, batch=37)
    assert backend.graphs == 3  # 38 samples: batches of 37 and of 1; evaluation


def test_a_plain_head_is_left_alone():
    backend = Counting()
    compiled = train([CompilePlugin(backend=backend)], model=mlp)
    assert type(compiled.model.classifier) is nn.Linear
    assert backend.graphs == 2
    assert_same(compiled, train(model=mlp), rtol=0, atol=0)


def test_two_models_do_not_share_the_limit_of_compilations():
    backend, bench = Counting(), benchmark(1)
    for width in range(5):
        train(
            [CompilePlugin(backend=backend)], model=functools.partial(mlp, 9 + width), bench=bench
        )
    assert backend.graphs == 10


def test_a_head_in_two_places_becomes_one():
    class Twice(Growing):
        def __init__(self):
            super().__init__()
            self.again = nn.ModuleList([self.classifier])

    strategy = train([CompilePlugin(CLASSES, backend="eager")], model=Twice)
    assert strategy.model.again[0] is strategy.model.classifier
    assert type(strategy.model.classifier) is FixedSizeClassifier


def test_a_model_that_is_only_a_head():
    class Flat(IncrementalClassifier):
        def __init__(self):
            super().__init__(8)

    def head():
        return IncrementalClassifier(8)

    compiled = train([CompilePlugin(CLASSES, backend="eager")], model=head)
    assert type(compiled.model) is FixedSizeClassifier
    plain = train(model=head)
    expected = plain.model.classifier.weight
    torch.testing.assert_close(compiled.model.classifier.weight, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match="not a Flat"):
        train([CompilePlugin(CLASSES, backend="eager")], model=Flat)


# composition --------------------------------------------------------------------------------

# method, and what it adds to two graphs
METHODS = {
    "replay": (lambda: [ReplayPlugin(mem_size=15)], 0),
    "lwf": (lambda: [LwFPlugin(alpha=1.0, temperature=2.0)], 0),
    "ewc": (lambda: [EWCPlugin(ewc_lambda=1.0)], 1),  # importances: evaluation with gradients
    "drl": (lambda: [DRLPlugin(1e-2)], 0),
    "drl-leaves": (lambda: [DRLPlugin(1e-3, layers="leaves")], 0),
    "drl+ber": (lambda: [DRLPlugin(1e-2), BERPlugin(mem=15)], 0),
    "drl+drl": (lambda: [DRLPlugin(1e-2), DRLPlugin(1e-3, layers="features.0")], 0),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_the_same_numbers_compiled(method):
    make, more = METHODS[method]
    backend = Counting()
    compiled = train([CompilePlugin(CLASSES, backend=backend), *make()])
    assert_same(compiled, train(make()))
    assert_same(compiled, train([Uncompiled(CLASSES, backend="eager"), *make()]), rtol=0, atol=0)
    assert backend.graphs == 2 + more


@pytest.mark.parametrize("method", ["drl", "drl+ber", "lwf"])
def test_a_method_in_front_of_it_with_autograd_traced_too(method):
    make, more = METHODS[method]
    backend = Counting("aot_eager")
    compiled = train([*make(), CompilePlugin(CLASSES, backend=backend)])
    assert_same(compiled, train(make()))
    assert backend.graphs == 2 + more


def test_gem_beside_drl():
    """GEM's reference gradients come from the model without DRL's hooks: one more graph."""

    def methods():
        return [GEMPlugin(8, 0.5), DRLPlugin(1e-2)]

    backend = Counting()
    compiled = train([CompilePlugin(backend=backend), *methods()], model=mlp)
    assert_same(compiled, train(methods(), model=mlp))
    assert backend.graphs == 3


def test_hooks_are_noticed_whichever_call_compiled_first():
    backend = Counting()
    strategy = train([CompilePlugin(backend=backend)], model=mlp, bench=benchmark(1))
    model, x = strategy.model.train(), torch.randn(8, 8)
    for _ in range(3):
        seen = []
        model(x)
        assert not seen
        handle = model.features.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        model(x)
        handle.remove()
        assert len(seen) == 1


@pytest.mark.parametrize(("precision", "first"), [("bf16", True), ("fp16", False)])
def test_mixed_precision_compiled(precision, first):
    backend = Counting("aot_eager")

    def run(compiled):
        plugin = PrecisionPlugin(precision)
        plugin.scaler = torch.amp.GradScaler("cpu", 2.0**7) if precision == "fp16" else None
        plugins = [plugin, DRLPlugin(1e-2), compiled]
        return train(plugins[:: 1 if first else -1], optimizer="sgd")

    compiled = run(CompilePlugin(CLASSES, backend=backend))
    assert_same(compiled, run(Uncompiled(CLASSES, backend="eager")))
    assert backend.graphs == 2


class MultiHead(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.classifier = MultiHeadClassifier(8)

    def forward(self, x, task_labels):
        return self.classifier(x, task_labels)


def test_a_multi_head_model_stays_as_it_is():
    bench = class_stream(2, task_labels=True)

    def run(plugins):
        return train(plugins, model=MultiHead, bench=bench, optimizer="sgd", evaluate=False)

    compiled = run([CompilePlugin(backend="eager")])
    assert_same(compiled, run([]))
    assert type(compiled.model.classifier) is MultiHeadClassifier
    with pytest.raises(ValueError, match=r"max_classes=10, but a MultiHeadClassifier"):
        run([CompilePlugin(10, backend="eager")])


# copies -------------------------------------------------------------------------------------


def test_copies_and_pickles_are_plain_modules():
    strategy = train([CompilePlugin(CLASSES, backend="eager")])
    model = strategy.model
    assert model._compiled_call_impl is not None
    assert not any("_orig_mod" in name for name in model.state_dict())
    x = torch.randn(4, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._compiled_call_impl is None
        assert not any(m._forward_hooks for m in twin.modules())
        torch.testing.assert_close(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("method", ["drl", "ewc"])
def test_a_pickled_strategy_compiles_again_and_goes_on_to_the_same_weights(method):
    bench, make = benchmark(), METHODS[method][0]
    whole = train([CompilePlugin(CLASSES, backend=Counting()), *make()], evaluate=False)
    torch.manual_seed(1)
    half = naive(Growing(), [CompilePlugin(CLASSES, backend=Counting()), *make()])
    half.optimizer = OPTIMIZERS["momentum"](half.model.parameters())
    torch.manual_seed(2)
    for exp in bench.train_stream[:2]:
        half.train(exp, eval_streams=[])
    state = torch.get_rng_state()
    resumed = pickle.loads(pickle.dumps(half))
    torch.set_rng_state(state)
    for exp in bench.train_stream[2:]:
        resumed.train(exp, eval_streams=[])
    assert_same(resumed, whole, rtol=0, atol=0)
    assert type(resumed.model._compiled_call_impl).__name__ == "_CompiledCall"
    assert resumed.plugins[0].backend.graphs > half.plugins[0].backend.graphs


# errors -------------------------------------------------------------------------------------


def test_a_growing_head_needs_max_classes():
    with pytest.raises(ValueError, match=r"needs max_classes.*'classifier'.*Growing"):
        train([CompilePlugin(backend="eager")])
    with pytest.raises(ValueError, match="needs max_classes"):
        naive(Growing(), [CompilePlugin(backend="eager")]).eval(benchmark().test_stream)


def test_more_classes_than_max_classes():
    with pytest.raises(ValueError, match=r"label 7 needs 8 units.*max_classes=7"):
        train([CompilePlugin(7, backend="eager")], evaluate=False)


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
def test_max_classes_is_a_count(bad, error):
    with pytest.raises(error, match="max_classes >= 1"):
        CompilePlugin(bad, backend="eager")


def test_an_unknown_backend_or_mode_names_what_there_is():
    with pytest.raises(ValueError, match=r"got 'inducktor'.*'inductor'.*'aot_eager'"):
        CompilePlugin(backend="inducktor")
    with pytest.raises(ValueError, match=r"'max-autotune'.*mode='fast'"):
        CompilePlugin(mode="fast")
    with pytest.raises(ValueError, match=r"mode='default' with backend='eager'"):
        CompilePlugin(backend="eager", mode="default")


def test_a_model_that_is_compiled_already_is_refused():
    def in_place():
        model = mlp()
        model.compile(backend="eager")
        return model

    for make in (in_place, lambda: torch.compile(mlp(), backend="eager")):
        with pytest.raises(ValueError, match="compiled already"):
            train([CompilePlugin(backend="eager")], model=make)


# the real thing -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["replay", "drl+ber"])
def test_inductor(method):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    make, _ = METHODS[method]
    compiled = train([CompilePlugin(CLASSES), *make()], optimizer="sgd")
    assert_same(compiled, train(make(), optimizer="sgd"), atol=1e-5)
