"""Replay plugins beside other plugins, other memories, evaluation, and copies of themselves."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.storage_policy import (
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    ParametricBuffer,
    ReservoirSamplingBuffer,
)
from torch.utils.data import DataLoader, default_collate

from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.drl import DRLPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
from avalanche_ext.training.storage_policy.exemplar_memory import (
    ClassBalancedMemory,
    ExemplarMemory,
    ExperienceBalancedMemory,
    ReservoirMemory,
)
from tests.conftest import class_stream, naive
from tests.training.plugins.replaying import Recorder, linear, numbered, origins, trained, weights

PLUGINS = {"BER": BERPlugin, "ER": ERPlugin, "Shuffle": ShuffleReplayPlugin}
STREAM = numbered([20, 12, 17])


def mlp():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 6))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: BERPlugin(mem=5), lambda: DRLPlugin(lam=1e-3)),
        (lambda: ShuffleReplayPlugin(mem=5), lambda: DRLPlugin(lam=1e-3)),
        (lambda: BERPlugin(mem=5), lambda: ERPlugin(mem=7)),
        (lambda: BERPlugin(mem=5), lambda: ShuffleReplayPlugin(mem=3)),
        (lambda: BERPlugin(mem=5, mode="balanced"), lambda: ERPlugin(mem=7)),
        (lambda: BERPlugin(mem=5), lambda: ReplayPlugin(10)),
        (lambda: ERPlugin(mem=5), lambda: ReplayPlugin(10)),
        (lambda: BERPlugin(mem=5), lambda: LwFPlugin(alpha=1, temperature=2)),
        (lambda: ERPlugin(mem=5), lambda: EWCPlugin(ewc_lambda=1)),
    ],
    ids=[
        "DRL",
        "Shuffle-DRL",
        "ER",
        "Shuffle",
        "balanced-ER",
        "stock-BER",
        "stock-ER",
        "LwF",
        "EWC",
    ],
)
def test_order_of_plugins_does_not_change_a_bit(one, other):
    forth = trained([one(), other()], STREAM, model=mlp(), epochs=2)
    back = trained([other(), one()], STREAM, model=mlp(), epochs=2)
    alone = trained([one()], STREAM, model=mlp(), epochs=2)
    assert forth[0] == back[0]
    assert torch.equal(forth[1], back[1])
    assert not torch.equal(forth[1], alone[1])


@pytest.mark.parametrize("plugin", [BERPlugin, ERPlugin])
@pytest.mark.parametrize("first", [True, False])
def test_rows_are_added_to_those_of_avalanches_replay(plugin, first):
    plugins = [plugin(mem=20), ReplayPlugin(12, batch_size_mem=3)]
    batches, _ = trained(plugins if first else plugins[::-1], STREAM)
    for t, added in ((1, 8), (2, 16 if plugin is BERPlugin else 8)):
        for batch in batches[t][:-1]:
            counts = Counter(o == t for o in origins(batch))
            assert counts == {True: 8, False: 3 + added}


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShuffleReplayPlugin(mem=5),
        lambda: BERPlugin(mem=5, mode="balanced"),
        lambda: ERPlugin(mem=5, total_batch=True),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_plugins_that_reshape_the_batch_refuse_avalanches_replay(make, first):
    plugins = [make(), ReplayPlugin(12)]
    with pytest.raises(ValueError, match=r"need the current data itself.*ReplayDataLoader"):
        trained(plugins if first else plugins[::-1], STREAM)


class Replaces(SupervisedPlugin):
    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.replace)

    def replace(self, strategy, **kwargs):
        strategy.dataloader = DataLoader(
            strategy.adapted_dataset, 5, collate_fn=strategy.adapted_dataset.collate_fn
        )


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_that_replaces_the_loader_afterwards_is_an_error_before_any_step(name):
    model = linear()
    plugins = [PLUGINS[name](mem=5), Replaces("before_training_epoch")]
    trained(plugins, STREAM[:1], model=model)
    before = weights(model)
    strategy = naive(model, copy.deepcopy(plugins))
    with pytest.raises(ValueError, match=f"{name} put its loader in place, but .*DataLoader"):
        strategy.train(STREAM[1])
    assert torch.equal(before, weights(model))


def test_two_of_one_kind_keep_their_own_memories():
    batches, _ = trained([BERPlugin(mem=2), BERPlugin(mem=9)], STREAM, epochs=4)
    for batch in batches[2]:
        assert {o: n for o, n in Counter(origins(batch)).items() if o < 2} == {0: 16, 1: 16}
    assert 9 <= len({n for b in batches[2] for n in b[0] if n < 1000}) <= 11


def test_two_of_one_kind_draw_independently():
    batches, _ = trained([ERPlugin(mem=20), ERPlugin(mem=20)], STREAM[:2])
    for numbers, *_ in batches[1]:
        assert numbers[-16:-8] != numbers[-8:]


OURS = [ClassBalancedMemory, ExperienceBalancedMemory, ReservoirMemory]
THEIRS = [ClassBalancedBuffer, ExperienceBalancedBuffer, ReservoirSamplingBuffer]


def parametric(mem):
    return ParametricBuffer(mem, groupby="class")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ERPlugin(mem_scope="total", storage_policy=ReservoirMemory(9)), "a scope"),
        (
            lambda: BERPlugin(group_by="class", storage_policy=ExperienceBalancedMemory(9)),
            "grouped by 'experience'",
        ),
    ],
)
def test_a_memory_and_a_setting_of_the_memory_are_not_both_taken(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", [*OURS, *THEIRS, parametric], ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", PLUGINS)
def test_every_storage_policy_is_replayed(name, policy):
    groupless = name == "BER" and policy in (ReservoirMemory, ReservoirSamplingBuffer)
    group_by = {"group_by": "class"} if groupless else {}
    plugin = PLUGINS[name](storage_policy=policy(12), **group_by)
    groups = []

    class Watch(Recorder):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            groups.append(len(plugin.memory.index(plugin.group_by if name == "BER" else None).keys))

    watch = Watch()
    torch.manual_seed(0)
    strategy = naive(linear(), [plugin, watch])
    for exp in STREAM:
        strategy.train(exp)
    for t, n in ((1, 12), (2, 17)):
        past = sum(o < t for b in watch.batches[t] for o in origins(b))
        steps = -(-n // 8)
        assert past == {"BER": 8 * groups[t] * steps, "ER": 8 * steps, "Shuffle": 12}[name]
    assert plugin.storage_policy.max_size == len(plugin.memory) == 12
    assert plugin.bytes_remembered == 12 * (4 * 4 + 8 + 8)


def test_ber_by_experience_cannot_draw_from_a_reservoir():
    with pytest.raises(ValueError, match="cannot be drawn from by 'experience'"):
        trained([BERPlugin(storage_policy=ReservoirMemory(9))], STREAM)


class Reseed(SupervisedPlugin):
    """Evaluation draws from the global state, with any plugin; this is not what is asked here."""

    def before_training_exp(self, strategy, **kwargs):
        torch.manual_seed(strategy.experience.current_experience)


@pytest.mark.parametrize("name", PLUGINS)
def test_evaluation_changes_no_weight(name):
    runs = []
    for evaluated in (False, True):
        model, recorder = linear(), Recorder()
        strategy = naive(
            model, [PLUGINS[name](mem=5), recorder, Reseed()], eval_every=1 if evaluated else -1
        )
        if evaluated:
            strategy.eval(STREAM)
        for exp in STREAM:
            strategy.train(exp, eval_streams=[STREAM])
        runs.append((recorder.batches, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("clone", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
@pytest.mark.parametrize("name", PLUGINS)
def test_a_copied_plugin_goes_on_exactly_where_it_was(name, clone):
    straight, final = trained([PLUGINS[name](mem=5)], STREAM, epochs=2)
    model, plugin, batches = linear(), PLUGINS[name](mem=5), []
    torch.manual_seed(0)
    for exp in STREAM:
        plugin, recorder = clone(plugin), Recorder()
        state = torch.get_rng_state()
        strategy = naive(model, [plugin, recorder], lr=0.01, epochs=2)
        torch.set_rng_state(state)
        strategy.train(exp, eval_streams=[])
        batches += recorder.batches
    assert batches == straight
    assert torch.equal(weights(model), final)


@pytest.mark.parametrize("name", PLUGINS)
def test_pickling_in_mid_epoch_disturbs_nothing_and_keeps_the_memory(name):
    plain = trained([PLUGINS[name](mem=5)], STREAM)
    plugin, copies = PLUGINS[name](mem=5), []

    class Saver(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            copies.append(pickle.loads(pickle.dumps((plugin, strategy.dataloader))))
            held = plugin.memory.index(plugin.group_by)
            again = copies[-1][0].memory.index(plugin.group_by)
            assert held.slots.tolist() == again.slots.tolist()
            if len(held):
                theirs = copies[-1][0].memory.gather(again.slots)
                assert torch.equal(plugin.memory.gather(held.slots)[0], theirs[0])

    saved = trained([plugin, Saver()], STREAM)
    assert saved[0] == plain[0]
    assert torch.equal(saved[1], plain[1])
    restored, loader = copies[-1]
    assert loader.parts[0].source is restored.memory
    assert len(loader) == len(plain[0][2])
    restored.memory.post_adapt(None, STREAM[2])
    assert torch.equal(
        restored.memory.gather(restored.memory.index().slots)[0],
        plugin.memory.gather(plugin.memory.index().slots)[0],
    )


@pytest.mark.parametrize("name", PLUGINS)
def test_the_callers_objects_stay_as_they_were(name):
    plugins, model = [PLUGINS[name](mem=5)], linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    before = (list(plugins), copy.deepcopy(optimizer.defaults))
    data = [[exp.dataset[i][0].clone() for i in range(len(exp.dataset))] for exp in STREAM]
    strategy = naive(model, plugins)
    strategy.optimizer = optimizer
    for exp in STREAM:
        strategy.train(exp)
    assert (plugins, optimizer.defaults) == before
    assert strategy.optimizer is optimizer
    for exp, rows in zip(STREAM, data, strict=True):
        assert all(torch.equal(exp.dataset[i][0], x) for i, x in enumerate(rows))


class Log(BaseLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_single_metric(self, name, value, x_plot):
        self.rows.append((name, value, x_plot))


@pytest.mark.parametrize("name", PLUGINS)
def test_exemplars_and_bytes_are_logged_once_per_experience(name):
    log = Log()
    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), loggers=[log])
    strategy = naive(linear(), [PLUGINS[name](mem=5)], evaluator=evaluator)
    for exp in STREAM:
        strategy.train(exp)
    logged = {}
    for metric, value, step in log.rows:
        logged.setdefault(metric.split("/")[0], []).append((value, step))
    per_sample = 4 * 4 + 8 + 8
    steps = {"Shuffle": [3, 6, 10]}.get(name, [3, 5, 8])
    assert logged[f"{name}_Exemplars"] == list(zip([5.0, 10.0, 15.0], steps, strict=True))
    assert [v for v, _ in logged[f"{name}_Bytes"]] == [n * per_sample for n in (5, 10, 15)]


# mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", PLUGINS.values())
@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"mem": -1}, ValueError, "mem >= 0"),
        ({"mem": 1.5}, ValueError, "whole number mem"),
        ({"mem": "5"}, TypeError, "number mem"),
        ({"mem_scope": "task"}, ValueError, "mem_scope to be one of"),
        ({"storage_policy": 200}, TypeError, "storage_policy to be a memory .* got int"),
        ({"storage_policy": [1]}, TypeError, "storage_policy to be a memory .* got list"),
        (
            {"mem": 7, "storage_policy": ReservoirMemory(8)},
            ValueError,
            "mem=7 and a storage_policy for 8 samples",
        ),
    ],
)
def test_bad_arguments_of_every_plugin(plugin, kwargs, error, words):
    with pytest.raises(error, match=words):
        plugin(**kwargs)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BERPlugin(mode="even"), ValueError, "mode to be one of"),
        (lambda: BERPlugin(group_by=None), ValueError, "group_by to be one of"),
        (lambda: BERPlugin(group_by="label"), ValueError, "group_by to be one of"),
        (lambda: BERPlugin(max_groups=0), ValueError, "max_groups >= 1"),
        (lambda: BERPlugin(max_groups=1.5), TypeError, "whole number max_groups"),
        (lambda: BERPlugin(max_groups=2, mode="balanced"), ValueError, "max_groups in mode"),
        (lambda: ERPlugin(batch_size_mem=0), ValueError, "batch_size_mem >= 1"),
        (lambda: ERPlugin(batch_size_mem=2.5), TypeError, "whole number batch_size_mem"),
        (lambda: ERPlugin(batch_size_mem=2, total_batch=True), ValueError, "not together"),
    ],
)
def test_bad_arguments_of_one_plugin(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_mem_and_a_policy_that_agree_are_fine():
    memory = ExemplarMemory(7)
    assert ERPlugin(7, storage_policy=memory).memory is memory
    assert ERPlugin().memory.max_size == 200


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (lambda: BERPlugin(mem=1, mem_scope="total"), r"mem=1 in total .* each of 2 groups"),
        (lambda: BERPlugin(mem=1, group_by="class"), r"mem=1 per experience .* each of 2 groups"),
    ],
)
def test_too_small_a_memory_is_refused_before_training(plugin, words):
    model, made = linear(), plugin()
    strategy = naive(model, [made])
    fits = made.memory.mem_scope == "total"  # the first experience does, and the second does not
    if fits:
        strategy.train(STREAM[0])
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        strategy.train(STREAM[1])
    assert torch.equal(before, weights(model))
    assert len(made.memory) == fits


@pytest.mark.parametrize("name", PLUGINS)
def test_an_empty_experience_is_named(name):
    exp = copy.copy(STREAM[1])
    exp.dataset = exp.dataset.subset([])
    with pytest.raises(ValueError, match="experience 1 of the training stream is empty"):
        trained([PLUGINS[name](mem=5)], [STREAM[0], exp])


@pytest.mark.parametrize("name", PLUGINS)
def test_labels_outside_the_head_are_an_error_before_any_weight_changes(name):
    model, plugin = linear(width=3), PLUGINS[name](mem=5)
    strategy = naive(model, [plugin])
    strategy.train(STREAM[0])
    before = weights(model)
    with pytest.raises(ValueError, match="labels 2 to 3, but the model's output has 3 units"):
        strategy.train(STREAM[1])
    assert torch.equal(before, weights(model))
    assert len(plugin.memory) == 5


class OwnBatches(SupervisedPlugin):
    """A loader over the current data with a batch size and a collate function of its own."""

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = DataLoader(strategy.adapted_dataset, 4, collate_fn=doubled)


def doubled(samples):
    x, *rest = default_collate(samples)
    return [2 * x, *rest]


def test_another_plugins_dataloader_is_added_to_not_replaced():
    seen = []

    class Watch(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            seen.append((strategy.experience.current_experience, strategy.mb_x.clone()))

    stream = class_stream()
    strategy = naive(MLP(8, (4,), 6), [OwnBatches(), ERPlugin(6), Watch()])
    for experience in stream.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
    x = torch.stack([sample[0] for sample in stream.train_stream[1].dataset])
    first = next(batch for k, batch in seen if k == 1)
    assert torch.equal(first[:4], 2 * x[:4])
    assert len(first) == 4 + 8
