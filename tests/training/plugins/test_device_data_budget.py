"""What DeviceDataPlugin allocates, keeps for evaluation and gives back."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin

from avalanche_ext.training.loading.residence import TooLarge
from avalanche_ext.training.loading.resident_loader import ResidentLoader
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from tests.conftest import naive
from tests.training.plugins.device_runs import (
    SIDE,
    Album,
    assert_same,
    device_data,
    for_images,
    image_stream,
    leftovers,
    pixels,
    quietly,
    run,
    weights,
)

pytestmark = pytest.mark.filterwarnings("error:DeviceDataPlugin")  # none that is not expected

ROW = 3 * SIDE * SIDE + 8 + 8  # an image, its label and its task label
EXPERIENCE = 12 * ROW


# the argument -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, 1),
        (1000, 1000),
        (2.5e6, 2_500_000),
        ("100", 100),
        ("100B", 100),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        (" 2GiB ", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("1.5G", 1_500_000_000),
        (".5K", 500),
        ("3.KiB", 3 * 1024),
        ("7Mi", 7 * 2**20),
    ],
)
def test_budget_in_bytes(budget, expected):
    assert DeviceDataPlugin(budget).budget == expected


def test_default_budget():
    assert DeviceDataPlugin().budget == 2**31


BAD = [0, -1, 0.5, float("nan"), float("inf"), True, None, [1], "", "GB", "1.2.3GB", ".", "-5MB"]


@pytest.mark.parametrize("budget", [*BAD, "5TB", "2 GiBs", "0", "0.1", "1e9"])
def test_bad_budget(budget):
    with pytest.raises(ValueError, match=r"DeviceDataPlugin expects budget .*'2GiB'; got "):
        DeviceDataPlugin(budget)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"fallback": "quiet"}, "fallback to be one of"),
        ({"fallback": None}, "fallback to be one of"),
        ({"workers": -1}, "workers to be 0 or more; got -1"),
        ({"workers": 1.5}, "workers to be 0 or more; got 1.5"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        DeviceDataPlugin(**kwargs)


# too small --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_a_budget_below_one_batch_is_an_error_before_any_step(fallback):
    plugin = device_data(8 * ROW - 1, fallback=fallback)
    strategy = naive(for_images(), [plugin])
    before = weights(strategy.model)
    words = rf"budget={8 * ROW - 1} bytes\) .* 8 samples of {ROW} bytes need {8 * ROW}\. Raise"
    with pytest.raises(ValueError, match=words):
        strategy.train(image_stream().train_stream[0])
    assert torch.equal(before, weights(strategy.model))


def test_a_budget_of_one_batch_warns_only():
    with pytest.warns(UserWarning, match="budget are left"):
        run([device_data(8 * ROW)], image_stream().train_stream[:1], model=for_images)


REPLAY = {"naive": lambda: [], "stock": lambda: [ReplayPlugin(6)], "er": lambda: [ERPlugin(4)]}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("replay", REPLAY)
def test_what_does_not_fit_is_read_by_a_loader_and_said_once(replay, workers):
    stream = image_stream().train_stream
    plain = run(REPLAY[replay](), stream, model=for_images, epochs=3)
    plugin = device_data(EXPERIENCE - 1, workers=workers)
    with pytest.warns(UserWarning, match="DeviceDataPlugin") as caught:
        found = run([plugin, *REPLAY[replay]()], stream, model=for_images, epochs=3)
    assert_same(found, plain)
    said = [str(w.message) for w in caught if "DeviceDataPlugin" in str(w.message)]
    assert said == [
        f"DeviceDataPlugin: 12 samples of {ROW} bytes need {EXPERIENCE} bytes, and "
        f"{EXPERIENCE - 1} of the budget are left. They are read by a DataLoader with {workers} "
        f"worker processes instead, which is slower."
    ]


def test_what_fits_exactly_is_kept():
    plugin = device_data(EXPERIENCE)
    run([plugin], image_stream().train_stream, model=for_images)
    assert plugin.bytes_allocated == EXPERIENCE


def test_what_does_not_fit_is_an_error_on_request():
    plugin = device_data(EXPERIENCE - 1, fallback="error")
    with pytest.raises(TooLarge, match=f"12 samples of {ROW} bytes need {EXPERIENCE} bytes"):
        run([plugin], image_stream().train_stream, model=for_images)


def test_vectors_are_counted_with_their_labels():
    """For narrow samples, labels are most of what is stored."""

    class Numbers(Album):
        def __getitem__(self, i):
            return torch.tensor([float(i)]), self.targets[i]

    stream = image_stream(None, None, make=Numbers).train_stream

    def narrow():
        return torch.nn.Linear(1, 6)

    plugin = device_data(12 * 20)
    run([plugin], stream, model=narrow)
    assert plugin.bytes_allocated == 12 * (4 + 8 + 8)
    with pytest.warns(UserWarning, match=r"12 samples of 20 bytes need 240 bytes, and 239"):
        run([device_data(12 * 20 - 1)], stream[:1], model=narrow)


def test_tensors_that_are_there_already_cost_nothing():
    parts = [(torch.randn(12, 8), torch.arange(12) % 6)] * 2
    made = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])
    plugin = device_data(8 * 48)
    run([plugin, ERPlugin(3)], made.train_stream)
    assert plugin.bytes_allocated == 0


# what makes room --------------------------------------------------------------------------------


class Ledger(SupervisedPlugin):
    """The bytes allocated at every hook."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin, self.seen = plugin, []

    def __getattribute__(self, name):
        if name.startswith(("before_", "after_")):
            return lambda strategy, **kwargs: self.note()
        return super().__getattribute__(name)

    def note(self):
        self.seen.append(self.plugin.bytes_allocated)


@quietly()
@pytest.mark.parametrize("replay", REPLAY)
@pytest.mark.parametrize("budget", [EXPERIENCE, EXPERIENCE + 6 * ROW, 2 * EXPERIENCE, 100 * ROW])
@pytest.mark.parametrize("where", ["before", "after"])
def test_never_more_than_the_budget_is_allocated(budget, replay, where):
    plugin = device_data(budget)
    ledger = Ledger(plugin)
    plugins = [ledger, plugin] if where == "before" else [plugin, ledger]
    benchmark = image_stream()
    _, _, strategy = run(
        [*plugins, *REPLAY[replay]()], [], model=for_images, eval_every=1, epochs=2
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        strategy.eval(benchmark.test_stream)
    assert len(ledger.seen) > 100
    assert EXPERIENCE <= max(ledger.seen) <= budget
    assert plugin.bytes_allocated == sum(r.nbytes for r in plugin._residents.values())


def reads_of(strategy, experience, raw, *, train):
    """How many reads it takes to train on an experience, or to evaluate it."""
    before = raw.reads
    if train:
        strategy.train(experience, eval_streams=[])
    else:
        strategy.eval([experience])
    return raw.reads - before


@pytest.mark.parametrize("kept", [2, 3])
def test_what_was_used_longest_ago_is_dropped(kept):
    benchmark = image_stream()
    raw, stream = benchmark.raw[0], benchmark.train_stream
    _, _, strategy = run([device_data(kept * EXPERIENCE)], [], model=for_images)

    def reads(k):
        return reads_of(strategy, stream[k], raw, train=True)

    assert min(reads(k) for k in (0, 1)) >= 12
    assert reads(0) == 0  # used again: now the second is the oldest
    assert reads(2) >= 12
    assert reads(0) == 0
    assert (reads(1) == 0) == (kept == 3)


def test_evaluation_makes_tensors_once():
    benchmark = image_stream()
    raw = benchmark.raw[1]
    _, _, strategy = run([device_data()], [], model=for_images)
    first = [reads_of(strategy, e, raw, train=False) for e in benchmark.test_stream]
    again = [reads_of(strategy, e, raw, train=False) for e in benchmark.test_stream]
    strategy.train(benchmark.train_stream[0])
    third = [reads_of(strategy, e, raw, train=False) for e in benchmark.test_stream]
    assert min(first) >= 12
    assert again == third == [0, 0, 0]


def test_evaluation_gives_the_same_metrics():
    results = []
    for plugins in ([], [device_data()]):
        evaluator = EvaluationPlugin(
            accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
            loss_metrics(minibatch=True, epoch=True, experience=True, stream=True),
            loggers=[],
        )
        benchmark = image_stream()
        _, _, strategy = run(
            plugins, [], model=for_images, evaluator=evaluator, eval_every=1, epochs=2
        )
        strategy.eval(benchmark.test_stream)  # before any training
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[benchmark.test_stream])
            strategy.eval(benchmark.train_stream)
        results.append(evaluator.get_all_metrics())
        assert leftovers(strategy) == set()
    assert len(results[0]) == 2 * (2 + 3 + 3 + 2)
    assert dict(results[0]) == dict(results[1])


def test_evaluation_in_mid_training_keeps_the_training_tensors():
    """The budget holds two experiences; six are evaluated after every epoch."""
    benchmark = image_stream()
    plugin, kept = device_data(2 * EXPERIENCE), []

    class Watch(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            loader = strategy.dataloader
            source = plugin.resident_source(strategy, strategy.adapted_dataset)
            kept.append(isinstance(loader, ResidentLoader) and loader.source.sources[0] is source)

    _, _, strategy = run([plugin, Watch()], [], model=for_images, eval_every=1, epochs=3)
    train, test = benchmark.train_stream, benchmark.test_stream
    before = benchmark.raw[0].reads
    strategy.train(train[0], eval_streams=[test])
    assert benchmark.raw[0].reads - before <= 12 + 22
    assert kept == [True] * 6


# what is kept alive -----------------------------------------------------------------------------


def test_data_sets_of_past_experiences_are_not_kept_alive():
    plugin = device_data()
    strategy = naive(torch.nn.Linear(8, 6), [plugin])
    alive = []
    for k in range(4):
        parts = [(torch.randn(12, 8), torch.arange(12) % 6)]
        made = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0])
        leaf = made.train_stream[0].dataset._flat_data
        while hasattr(leaf, "_datasets"):
            leaf = leaf._datasets[0]
        alive.append(weakref.ref(leaf))
        strategy.train(made.train_stream[0], eval_streams=[])
        del made, leaf, parts
        gc.collect()
        assert [ref() is not None for ref in alive[:k]] == [False] * k


def test_a_pickled_plugin_holds_no_data():
    plugin = device_data()
    run([plugin], image_stream(n=600).train_stream, model=for_images)
    assert plugin.bytes_allocated == 600 * ROW
    restored = pickle.loads(pickle.dumps(plugin))
    assert restored.bytes_allocated == 0
    assert len(pickle.dumps(plugin)) < 8000 < pixels(600)[0].nbytes
