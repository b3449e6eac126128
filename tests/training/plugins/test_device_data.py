"""DeviceDataPlugin changes where samples come from, and not one bit of what is learnt from them."""

from __future__ import annotations

from functools import cache

import pytest
from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer

from avalanche_ext.training.loading.resident_loader import ResidentLoader
from avalanche_ext.training.loading.sources import TensorSource
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.drl import DRLPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
from avalanche_ext.training.storage_policy.exemplar_memory import (
    ClassBalancedMemory,
    ReservoirMemory,
)
from tests.training.plugins.device_runs import (
    Batches,
    assert_same,
    device_data,
    leftovers,
    mlp,
    placed,
    run,
    stream,
    with_dropout,
)

pytestmark = pytest.mark.filterwarnings("error:DeviceDataPlugin")  # none that is not expected


def nothing():
    return []


def replay():
    return [ReplayPlugin(12, batch_size_mem=5)]


def small_replay():
    """A memory smaller than the batch: its sampler starts again in the middle of the epoch."""
    return [ReplayPlugin(6, batch_size_mem=4)]


def lwf():
    return [LwFPlugin(alpha=1, temperature=2)]


def ewc():
    return [EWCPlugin(ewc_lambda=10)]


STOCK = {
    "naive": nothing,
    "replay": replay,
    "small replay": small_replay,
    "lwf": lwf,
    "ewc": ewc,
    "replay, lwf and ewc": lambda: [*replay(), *lwf(), *ewc()],
}
OURS = {
    "er": lambda: [ERPlugin(5)],
    "er, few": lambda: [ERPlugin(5, batch_size_mem=3)],
    "er, total batch": lambda: [ERPlugin(5, total_batch=True)],
    "ber": lambda: [BERPlugin(5)],
    "ber, max groups": lambda: [BERPlugin(5, max_groups=1)],
    "ber, balanced": lambda: [BERPlugin(5, mode="balanced")],
    "ber, by class": lambda: [BERPlugin(6, group_by="class")],
    "shuffle": lambda: [ShuffleReplayPlugin(5)],
    "drl and ber": lambda: [DRLPlugin(lam=1e-2), BERPlugin(5)],
    "er and ber": lambda: [ERPlugin(5), BERPlugin(4)],
    "er twice": lambda: [ERPlugin(5), ERPlugin(7)],
    "er and shuffle": lambda: [ERPlugin(5), ShuffleReplayPlugin(3)],
    "er and replay": lambda: [ERPlugin(5), *small_replay()],
    "replay and ber": lambda: [*small_replay(), BERPlugin(5)],
    "er, our classes": lambda: [ERPlugin(storage_policy=ClassBalancedMemory(9))],
    "ber, our reservoir": lambda: [
        BERPlugin(group_by="class", storage_policy=ReservoirMemory(9)),
    ],
    "er, their classes": lambda: [ERPlugin(storage_policy=ClassBalancedBuffer(9))],
    "ber, their classes": lambda: [BERPlugin(storage_policy=ClassBalancedBuffer(9))],
    "shuffle, their reservoir": lambda: [
        ShuffleReplayPlugin(storage_policy=ReservoirSamplingBuffer(9))
    ],
}
METHODS = {**STOCK, **OURS}


@cache
def plain(method, data, epochs, dropout, options):
    """The run without the plugin."""
    model = with_dropout if dropout else mlp
    return run(METHODS[method](), stream(data), model=model, epochs=epochs, train=dict(options))[:2]


def check(method, data, where="first", *, epochs=2, dropout=False, **options):
    expected = plain(method, data, epochs, dropout, tuple(options.items()))
    plugin, loaders = device_data(), []

    class Watch(Batches):
        def before_training_iteration(self, strategy, **kwargs):
            loader = strategy.dataloader
            loaders.append(getattr(loader, "current", loader))

    plugins = [*placed(METHODS[method](), where, plugin), Watch()]
    model = with_dropout if dropout else mlp
    found = run(plugins, stream(data), model=model, epochs=epochs, train=options)
    assert_same(found, expected)
    assert leftovers(found[2]) == set()
    return loaders


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("data", ["nc", "class incremental, label-less"])
@pytest.mark.parametrize("method", ["naive", "replay", "small replay", "ewc"])
def test_avalanches_own_plugins_learn_the_same(method, data, where):
    loaders = check(method, data, where)
    assert all(isinstance(loader, ResidentLoader) for loader in loaders)
    assert len(loaders) == 3 * 2 * 5


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("method", ["lwf", "replay, lwf and ewc"])
def test_plugins_with_a_teacher_learn_the_same(method, where):
    check(method, "nc with task labels", where)


DATA = [
    "nc",
    "nc with task labels",
    "class incremental",
    "class incremental, label-less",
    "tensors",
    "several tasks",
]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("method", ["naive", "small replay"])
def test_every_kind_of_benchmark(method, dropout, data):
    check(method, data, dropout=dropout)


@pytest.mark.parametrize("method", ["naive", "small replay", "er", "shuffle"])
@pytest.mark.parametrize("options", [{"drop_last": True}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("data", ["nc", "several tasks", "class incremental, label-less"])
def test_options_of_train(data, options, method):
    check(method, data, dropout=True, **options)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("method", OURS)
def test_our_replay_plugins_learn_the_same(method, where):
    loaders = check(method, "nc with task labels", where, dropout=True)
    assert {type(loader) for loader in loaders} <= {ResidentLoader, TensorSource}
    assert len(loaders) >= 3 * 2 * 5
