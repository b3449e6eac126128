"""What look-ahead, distillation and projection of remembered outputs have in common."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

from avalanche_ext import BERPlugin, DeviceDataPlugin, DRLPlugin, ERPlugin, PrecisionPlugin
from avalanche_ext.evaluation.accounting import bytes_by_kind, bytes_remembered
from avalanche_ext.training.plugins import online_distillation, online_lookahead
from tests.conftest import blobs, class_stream
from tests.experiments import checkpoint_cases
from tests.training.plugins.online_runs import (
    PLUGINS,
    Fixed,
    Watch,
    inputs,
    mlp,
    noisy_net,
    run,
    weights,
)

NOTHING = {
    "lookahead": {"lam": 0.0},
    "distillation": {"lam": 0.0},
    "projection": {"eps": math.inf},
}
every = pytest.mark.parametrize("kind", PLUGINS)
pytestmark = pytest.mark.filterwarnings("ignore:OnlineProjectionPlugin")


class Growing(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.classifier = IncrementalClassifier(16, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


# when it does nothing ---------------------------------------------------------------------------


@every
def test_weight_zero_and_no_memory_are_plain_training_bit_for_bit(kind):
    plain = weights(run(noisy_net(), []))
    for settings in (NOTHING[kind], {"mem": 0}, {**NOTHING[kind], "source": "previous_batch"}):
        plugin = PLUGINS[kind](**settings)
        strategy = run(noisy_net(), [plugin])
        assert torch.equal(weights(strategy), plain)
        assert plugin.last is None
        assert bytes_remembered(strategy) == 0
    assert not torch.equal(weights(run(noisy_net(), [PLUGINS[kind]()])), plain)


@every
def test_the_first_experience_is_plain_training_bit_for_bit(kind):
    plain = weights(run(mlp(), [], n=1))
    assert torch.equal(weights(run(mlp(), [PLUGINS[kind]()], n=1)), plain)
    generated = PLUGINS[kind](source=Fixed(inputs()))
    assert torch.equal(weights(run(mlp(), [generated], n=1)), plain)
    previous = PLUGINS[kind](source="previous_batch")
    assert not torch.equal(weights(run(mlp(), [previous], n=1)), plain)


@pytest.mark.parametrize("source", ["memory", "previous_batch"])
@every
def test_the_passes_move_neither_statistics_nor_the_random_state(kind, source, monkeypatch):
    # Without their steps (projection: within its bound) nothing of them may be left.
    for module in (online_lookahead, online_distillation):
        monkeypatch.setattr(module, "descend", lambda *args: None)
    settings = {"eps": 1e9} if kind == "projection" else {"lam": 0.1}
    plain = run(noisy_net(), [])
    end = torch.get_rng_state()
    model = noisy_net()
    model[4].weight.register_hook(lambda grad: grad)  # a hook of somebody else's stays
    strategy = run(model, [PLUGINS[kind](source=source, **settings)])
    assert torch.equal(weights(strategy), weights(plain))
    assert torch.equal(torch.get_rng_state(), end)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "optimizer_step" not in vars(strategy)


# where inputs come from -------------------------------------------------------------------------


@every
def test_inputs_of_the_reservoir_are_samples_of_earlier_experiences(kind):
    plugin, found = PLUGINS[kind](mem=30, n_inputs=7), []
    plugin.draw = lambda strategy: found.append(type(plugin).draw(plugin, strategy))
    stream = class_stream().train_stream
    strategy = run(mlp(), [plugin], stream=stream)
    assert found[:5] == [None] * 5  # 40 samples in batches of 8
    seen = [torch.stack([x for x, *_ in e.dataset]) for e in stream]
    for k, (x, tasks) in enumerate(found[5:]):
        assert x.shape == (7, 8)
        assert tasks.tolist() == [0] * 7
        past = torch.cat(seen[: 1 + k // 5])
        assert all((past == row).all(1).any() for row in x)
        assert len(x.unique(dim=0)) == 7
    assert not torch.equal(found[5][0], found[6][0])
    assert len(plugin.memory) == 30
    assert bytes_remembered(strategy) == 30 * (8 * 4 + 8 + 8)
    assert bytes_by_kind(strategy)["tensors"] == 0


@every
def test_the_previous_batch_is_the_mini_batch_before(kind):
    watch, found = Watch(), []
    plugin = PLUGINS[kind](source="previous_batch", n_inputs=100)
    plugin.draw = lambda strategy: found.append(type(plugin).draw(plugin, strategy))
    strategy = run(mlp(), [watch, plugin])
    assert found[0] is None
    for (x, tasks), step in zip(found[1:], watch.steps, strict=False):
        assert torch.equal(x, step["batch"][0])
        assert torch.equal(tasks, step["batch"][2])
    assert bytes_remembered(strategy) == 8 * 8 * 4 + 8 * 8
    few, found = PLUGINS[kind](source="previous_batch", n_inputs=3), []
    few.draw = lambda strategy: found.append(type(few).draw(few, strategy))
    run(mlp(), [few], n=1)
    for (x, _), step in zip(found[1:], watch.steps, strict=False):
        assert x.shape == (3, 8)
        assert all((step["batch"][0] == row).all(1).any() for row in x)


@pytest.mark.parametrize("form", ["x", "x, y"])
@every
def test_a_generator_is_asked_in_every_step_from_the_second_experience_on(kind, form):
    source = Fixed(inputs() if form == "x" else (inputs(), torch.zeros(5)))
    plugin = PLUGINS[kind](source=source, n_inputs=5)
    strategy = run(mlp(), [plugin])
    assert [n for n, _ in source.asked] == [5] * 10
    assert len({seed for _, seed in source.asked}) == 10
    assert bytes_remembered(strategy) == 0


@every
def test_the_memory_of_a_replay_plugin_is_borrowed(kind):
    replay = BERPlugin(20)
    plugin, found = PLUGINS[kind](source=replay, n_inputs=50), []
    plugin.draw = lambda strategy: found.append(type(plugin).draw(plugin, strategy))
    strategy = run(mlp(), [plugin, replay])
    assert [len(x) for x, _ in found[5:]] == [20] * 5 + [40] * 5  # all that there is
    assert bytes_remembered(strategy) == replay.memory.nbytes
    with pytest.raises(ValueError, match=r"memory of a BERPlugin that is not among"):
        run(mlp(), [PLUGINS[kind](source=BERPlugin(20))])


@every
def test_random_transforms_of_single_samples_leave_the_random_state_alone(kind, monkeypatch):
    monkeypatch.setattr(online_lookahead, "descend", lambda *args: None)
    monkeypatch.setattr(online_distillation, "descend", lambda *args: None)
    data = blobs()
    stream = nc_benchmark(
        data, data, 3, task_labels=False, train_transform=lambda x: x + torch.randn(8)
    ).train_stream
    settings = {"eps": 1e9} if kind == "projection" else {}
    plain = run(mlp(), [], stream=stream)
    plugin = PLUGINS[kind](**settings)
    assert torch.equal(weights(run(mlp(), [plugin], stream=stream)), weights(plain))
    assert plugin.last is not None


# work -------------------------------------------------------------------------------------------


@every
def test_a_step_passes_as_many_samples_whatever_came_before(kind):
    counts = []

    class Counted(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            counts.append(0)

    model = mlp()
    model.features[0].register_forward_hook(
        lambda m, x, y: counts.__setitem__(-1, counts[-1] + len(y))
    )
    stream = class_stream(6, n_classes=6).train_stream
    run(model, [Counted(), PLUGINS[kind](mem=12, n_inputs=5)], n=6, stream=stream)
    steps = -(-20 // 8)
    assert len({tuple(counts[k * steps : (k + 1) * steps]) for k in range(1, 6)}) == 1
    assert counts[-1] > counts[0]


# composition ------------------------------------------------------------------------------------


def settings_of(kind):
    more = {"distillation": {"steps": 2}, "projection": {"eps": 0.05}}
    return {"n_inputs": 8, **({} if kind == "projection" else {"lam": 0.05}), **more.get(kind, {})}


@pytest.mark.parametrize(("one", "two"), itertools.combinations(PLUGINS, 2))
def test_they_compose_with_each_other_in_either_order(one, two):
    def both(order):
        plugins = [PLUGINS[kind](**settings_of(kind)) for kind in (one, two)]
        return weights(run(mlp(), plugins[::order], n=2))

    together, alone = (
        both(1),
        [weights(run(mlp(), [PLUGINS[kind](**settings_of(kind))], n=2)) for kind in (one, two)],
    )
    assert torch.equal(together, both(-1))
    assert not any(torch.equal(together, w) for w in alone)


def test_distillation_is_not_projected():
    x, watch = inputs(4), Watch()
    projection = PLUGINS["projection"](source=Fixed(x))
    distillation = PLUGINS["distillation"](0.1, source=Fixed(inputs(seed=1)))
    model = mlp()
    run(model, [distillation, projection, watch], n=2)
    found = []
    for k in ("before", "after"):
        model.load_state_dict(watch.steps[6][k])
        found.append(model(x).detach())
    # The step leaves them; what brings the other outputs back does not ask.
    assert float((found[1] - found[0]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "other", [lambda: BERPlugin(10), lambda: ERPlugin(10), lambda: DRLPlugin(1e-2)],
    ids=["ber", "er", "drl"],
)  # fmt: skip
@every
def test_they_compose_with_replay_and_drl_in_either_order(kind, other):
    def trained(*plugins):
        return weights(run(mlp(), plugins, n=2))

    def ours():
        return PLUGINS[kind](**settings_of(kind))

    together = trained(ours(), other())
    assert torch.equal(together, trained(other(), ours()))
    assert not torch.equal(together, trained(other()))
    assert not torch.equal(together, trained(ours()))


@every
def test_a_compiled_network_is_what_it_is_uncompiled(kind):
    plain = weights(run(mlp(), [PLUGINS[kind]()], n=2))
    model = mlp()
    run(torch.compile(model, backend="eager"), [PLUGINS[kind]()], n=2)
    found = torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)


@every
def test_data_on_the_device_change_nothing(kind):
    plain = run(mlp(), [PLUGINS[kind]()])
    resident = run(mlp(), [DeviceDataPlugin(), PLUGINS[kind]()])
    assert torch.equal(weights(resident), weights(plain))


@pytest.mark.parametrize("source", ["memory", "previous_batch"])
@every
def test_a_growing_head(kind, source):
    plugin = PLUGINS[kind](source=source, **settings_of(kind))
    strategy = run(Growing(), [plugin])
    assert strategy.model.classifier.classifier.out_features == 6
    assert torch.isfinite(weights(strategy)).all()
    assert not torch.equal(weights(strategy), weights(run(Growing(), [])))


@every
def test_a_head_per_task(kind):
    stream = class_stream(task_labels=True).train_stream
    found = []

    class Tasks(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            found.append(plugin._draws)

    plugin = PLUGINS[kind](**settings_of(kind))
    torch.manual_seed(0)
    strategy = run(MTSimpleMLP(8, 16), [plugin, Tasks()], stream=stream)
    assert torch.isfinite(weights(strategy)).all()
    assert plugin.last is not None
    torch.manual_seed(0)
    assert not torch.equal(weights(strategy), weights(run(MTSimpleMLP(8, 16), [], stream=stream)))
    with pytest.raises(ValueError, match=r"no task label, which a MTSimpleMLP needs"):
        run(MTSimpleMLP(8, 16), [PLUGINS[kind](source=Fixed(inputs()))], stream=stream)


@every
def test_passes_are_float32_in_a_run_of_reduced_precision(kind):
    dtypes = []
    model = mlp()
    model.classifier.register_forward_hook(
        lambda m, x, y: dtypes.append((m.training, y.dtype)) if not m.training else None
    )
    plugin = PLUGINS[kind](**settings_of(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, [plugin])
    assert {dtype for _, dtype in dtypes} == {torch.float32}
    run(mlp(), [PLUGINS[kind](**settings_of(kind)), PrecisionPlugin("bf16")])
    run(mlp(), [PLUGINS[kind](**settings_of(kind)), PrecisionPlugin("fp16")])


# state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["memory", "previous_batch"])
@every
def test_pickles_and_copies_in_mid_stream_go_on_to_the_same_weights(kind, source):
    stream = class_stream().train_stream
    half = run(mlp(), [PLUGINS[kind](source=source)], n=2, stream=stream)
    random_state = torch.get_rng_state()
    ends = []
    for strategy in (pickle.loads(pickle.dumps(half)), copy.deepcopy(half), half):
        torch.set_rng_state(random_state)
        strategy.train(stream[2], eval_streams=[])
        ends.append(weights(strategy))
    whole = run(mlp(), [PLUGINS[kind](source=source)], stream=stream)
    assert all(torch.equal(end, weights(whole)) for end in ends)


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
    sources = {"lookahead": "previous_batch", "distillation": "memory", "projection": "memory"}
    monkeypatch.setitem(
        checkpoint_cases.CASES, "online",
        lambda optimizer: [PLUGINS[k](source=sources[k], **settings_of(k)) for k in PLUGINS],
    )  # fmt: skip
    Stop.at = -1
    whole = checkpoint_cases.train("online", tmp_path / "whole", None, [Stop()])
    for Stop.at in (4, 13, 23):  # within each of the three experiences
        with pytest.raises(Interrupted):
            checkpoint_cases.train("online", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("online", tmp_path / "parts", 1, [Stop()]) == whole


@every
def test_the_epochs_mean_is_logged(kind):
    values = []

    class Keep(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            values.append(None if plugin.last is None else float(plugin.last))

    plugin = PLUGINS[kind]()
    strategy = run(mlp(), [plugin, Keep()], evaluator=EvaluationPlugin(loggers=[]))
    names = [n for n in strategy.evaluator.get_all_metrics() if n.startswith(plugin.label)]
    assert len(names) == 1
    _, logged = strategy.evaluator.get_all_metrics()[names[0]]
    assert values[:5] == [None] * 5
    assert logged == pytest.approx([sum(values[5:10]) / 5, sum(values[10:]) / 5])
    assert str(plugin) == plugin.label


# errors -----------------------------------------------------------------------------------------


@every
def test_bad_sources_and_sizes(kind):
    plugin = PLUGINS[kind]
    for source in ("buffer", None, 3, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"expects source to be 'memory', 'previous_batch'"):
            plugin(source=source)
    with pytest.raises(ValueError, match="mem=10 and source='previous_batch'"):
        plugin(source="previous_batch", mem=10)
    for mem in (-1, 2.5):
        with pytest.raises(ValueError, match="mem"):
            plugin(mem=mem)
    for n in (None, 1.5, True):
        with pytest.raises(TypeError, match="n_inputs >= 1"):
            plugin(n_inputs=n)
    with pytest.raises(ValueError, match="n_inputs=0"):
        plugin(n_inputs=0)


@every
def test_inputs_of_another_shape_are_an_error(kind):
    with pytest.raises(ValueError, match=r"of shape \(4,\); those of the current batch have \(8,"):
        run(mlp(), [PLUGINS[kind](source=Fixed(inputs(width=4)))])


@every
def test_an_empty_experience_is_an_error(kind):
    stream = class_stream().train_stream
    empty = copy.copy(stream[0])
    empty.dataset = stream[0].dataset.subset([])
    with pytest.raises(ValueError, match="is empty"):
        run(mlp(), [PLUGINS[kind]()], n=1, stream=[empty])


@pytest.mark.parametrize("kind", ["lookahead", "distillation"])
def test_steps_that_diverge_are_an_error(kind):
    plugin = PLUGINS[kind](lam=1e4, source=Fixed(100 * inputs()))
    with pytest.raises(ValueError, match=r"no longer finite.*Lower the learning rate, or lam"):
        run(mlp(), [plugin], epochs=5)


@pytest.mark.parametrize("kind", ["distillation", "projection"])
def test_a_strategy_that_steps_by_itself_is_an_error(kind):
    from avalanche.training.supervised import Naive

    class Own(Naive):
        def optimizer_step(self):
            raise AssertionError("not called")

        def training_epoch(self, **kwargs):
            for batch in self.dataloader:
                self.mbatch = batch
                self._unpack_minibatch()
                self._before_training_iteration(**kwargs)
                self._after_training_iteration(**kwargs)

    model = mlp()
    strategy = Own(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), train_mb_size=8,
        plugins=[PLUGINS[kind]()], evaluator=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"around strategy.optimizer_step\(\), which Own"):
        strategy.train(class_stream().train_stream[0], eval_streams=[])
