"""DeviceDataPlugin beside loaders of other plugins, and through pickling, copies and crashes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedInfiniteDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
)
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torchvision.transforms import Compose, Lambda, ToTensor

from avalanche_ext.training.loading.resident_loader import ResidentLoader
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from tests.conftest import naive
from tests.training.plugins.device_runs import (
    Batches,
    assert_same,
    benchmark,
    device_data,
    for_images,
    image_stream,
    leftovers,
    mlp,
    placed,
    quietly,
    random_states,
    run,
    stream,
    weights,
    with_dropout,
)

pytestmark = pytest.mark.filterwarnings("error:DeviceDataPlugin")  # none that is not expected

# loaders of other plugins -----------------------------------------------------------------------


class Own:
    """A loader of a kind that nobody knows: the data in order, ten at a time."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return -(-len(self.dataset) // 10)

    def __iter__(self):
        for start in range(0, len(self.dataset), 10):
            stop = min(len(self.dataset), start + 10)
            yield self.dataset.collate_fn([self.dataset[i] for i in range(start, stop)])


class Subclass(DataLoader):
    pass


class Backwards(MultiDatasetDataLoader):
    """A subclass with an order of its own."""

    def __init__(self, dataset, size):
        super().__init__([dataset], [size], shuffle=False)

    def __iter__(self):
        return reversed(list(super().__iter__()))


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from (self.dataset[i] for i in range(len(self.dataset)))


class OneByOne(BatchSampler):
    """Draws each batch from the global state when it is asked for, as long as asked."""

    def __init__(self, n, size, batches):
        super().__init__(RandomSampler(range(n)), size, False)
        self.n, self.batches = n, batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            yield torch.randint(self.n, (self.batch_size,)).tolist()


def halves(rows):
    """A collate function that does something to the batch."""
    x, *rest = default_collate(rows)
    return [x / 2, *rest]


class Loads(SupervisedPlugin):
    """Another plugin that sets the loader."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = self.make(strategy.adapted_dataset)


UNKNOWN = {
    "Own": Own,
    "Subclass": lambda d: Subclass(d, 8, shuffle=True),
    "Backwards": lambda d: Backwards(d, 8),
    "DataLoader": lambda d: DataLoader(d, 8, shuffle=True, collate_fn=halves),
    "MultiDatasetDataLoader": lambda d: MultiDatasetDataLoader(
        [d], [8], shuffle=True, collate_fn=halves
    ),
    "DataLoader of a stream": lambda d: DataLoader(Stream(d), 8),
    "DataLoader without batches": lambda d: DataLoader(
        d, batch_size=None, collate_fn=lambda row: [c[None] for c in map(torch.as_tensor, row)]
    ),
}


@pytest.mark.parametrize("replay", [None, ERPlugin, BERPlugin])
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loader_of_an_unknown_kind_is_left_alone_with_a_warning(name, where, replay):
    def plugins():
        return [Loads(UNKNOWN[name]), *([replay(4)] if replay else [])]

    def rows(record):
        return [[len(x) for x, *_ in batches] for batches in record.trained]

    plain, mine = Batches(), Batches()
    expected = run([*plugins(), plain], stream("nc"), epochs=2)
    with pytest.warns(UserWarning, match="is left as it is") as caught:
        found = run([*placed(plugins(), where, device_data()), mine], stream("nc"), epochs=2)
    assert_same(found, expected)
    said = [str(w.message) for w in caught if "DeviceDataPlugin" in str(w.message)]
    assert len(said) == 1
    assert f"the {name.split()[0]} that another plugin has put in place is left" in said[0]
    assert rows(mine) == rows(plain)
    if replay and not name.startswith("DataLoader"):
        added = rows(mine)[2][0] - rows(mine)[0][0]
        assert added == {ERPlugin: 8, BERPlugin: 16}[replay]


KNOWN = {
    "shuffled": lambda d: DataLoader(d, 8, shuffle=True),
    "in order": lambda d: DataLoader(d, 7, drop_last=True),
    "with replacement": lambda d: DataLoader(
        d, 8, sampler=RandomSampler(d, replacement=True, num_samples=50)
    ),
    "weighted": lambda d: DataLoader(d, 8, sampler=WeightedRandomSampler([1.0, 2.0] * 20, 30)),
    "own generator": lambda d: DataLoader(
        d, 8, shuffle=True, generator=torch.Generator().manual_seed(8)
    ),
    "drawn in each step": lambda d: DataLoader(d, batch_sampler=OneByOne(len(d), 5, 6)),
    "two data sets": lambda d: MultiDatasetDataLoader(
        [d, d.subset(range(5))], [6, 3], shuffle=True, oversample_small_datasets=True
    ),
    "two data sets, one ends": lambda d: MultiDatasetDataLoader(
        [d, d.subset(range(5))], [6, 3], shuffle=True
    ),
    "replay": lambda d: ReplayDataLoader(
        d, d.subset([3, 1]), batch_size=9, batch_size_mem=3, oversample_small_tasks=True,
        shuffle=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_loader_of_a_known_kind_is_gathered_as_it_would_have_been_read(name, where):
    expected = run([Loads(KNOWN[name])], stream("nc"), model=with_dropout, epochs=2)
    kinds = set()

    class Watch(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            kinds.add(type(strategy.dataloader))

    plugins = [*placed([Loads(KNOWN[name])], where, device_data(fallback="error")), Watch()]
    assert_same(run(plugins, stream("nc"), model=with_dropout, epochs=2), expected)
    assert kinds == {ResidentLoader}


def test_a_loader_that_never_ends_can_be_left():
    class Stop(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 8:
                strategy.stop_training()

    def endless(dataset):
        return GroupBalancedInfiniteDataLoader([dataset], batch_size=8, shuffle=True)

    def once(*first):
        return run([*first, Loads(endless), Stop()], stream("nc"), model=with_dropout)

    assert_same(once(device_data(fallback="error")), once())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("data", ["nc", "class incremental, label-less"])
def test_the_random_state_follows_that_of_worker_processes(data, persistent):
    """``strategy.train(num_workers=...)``: workers that stay are seeded once only."""
    train = {"num_workers": 1, "persistent_workers": persistent}
    expected = run([], stream(data)[:2], epochs=3, train=train)
    assert_same(run([device_data()], stream(data)[:2], epochs=3, train=train), expected)


# pickling and copying ---------------------------------------------------------------------------


def restored(strategy):
    return pickle.loads(pickle.dumps(strategy))


def plugins_of(kind):
    return {
        "naive": [],
        "stock": [ReplayPlugin(6, batch_size_mem=4), LwFPlugin(1, 2)],
        "er": [ERPlugin(5)],
    }[kind]


def data_of(name):
    if name == "vectors":
        return stream("nc"), with_dropout
    return image_stream(Compose([ToTensor()]), None).train_stream, for_images


@pytest.mark.parametrize("clone", [restored, copy.deepcopy])
@pytest.mark.parametrize("kind", ["naive", "stock", "er"])
@pytest.mark.parametrize("data", ["vectors", "images"])
def test_a_strategy_can_be_copied_between_experiences(data, kind, clone):
    experiences, model = data_of(data)
    expected = run(plugins_of(kind), experiences, model=model, epochs=2)
    _, _, strategy = run([device_data(), *plugins_of(kind)], experiences[:1], model=model, epochs=2)
    for experience in experiences[1:]:
        strategy = clone(strategy)
        assert leftovers(strategy) == set()
        strategy.train(experience, eval_streams=[])
    assert_same((weights(strategy.model), random_states()), expected)


# With or without the plugin: graphs cannot be copied, Avalanche's streams cannot be pickled.
NOT_COPIED = ("mb_output", "loss", "experience", "_eval_streams")


class Save(SupervisedPlugin):
    """Copies the strategy in one of its hooks, in the middle of an epoch."""

    def __init__(self, hook, clone):
        super().__init__()
        self.clone, self.copies = clone, []
        self.hook = hook

    def save(self, strategy, hook):
        if hook == self.hook and strategy.clock.train_iterations == 7:
            self.hook = None  # the copy is not to copy itself again
            kept = {name: getattr(strategy, name) for name in NOT_COPIED}
            vars(strategy).update(dict.fromkeys(NOT_COPIED))
            self.copies.append((self.clone(strategy), torch.get_rng_state()))
            vars(strategy).update(kept)

    def before_training_iteration(self, strategy, **kwargs):
        self.save(strategy, "before_training_iteration")

    def before_forward(self, strategy, **kwargs):
        self.save(strategy, "before_forward")

    def after_update(self, strategy, **kwargs):
        self.save(strategy, "after_update")


@pytest.mark.parametrize("clone", [restored, copy.deepcopy])
@pytest.mark.parametrize("hook", ["before_training_iteration", "before_forward", "after_update"])
@pytest.mark.parametrize("kind", ["naive", "stock", "er"])
@pytest.mark.parametrize("data", ["vectors", "images"])
def test_a_strategy_can_be_copied_in_mid_epoch(data, kind, hook, clone):
    """The run goes on undisturbed; the copy trains as that of a run without the plugin does."""
    experiences, model = data_of(data)
    found = []
    for first in ([], [device_data()]):
        save = Save(hook, clone)
        outcome = run(
            [*first, save, *plugins_of(kind)], experiences[:1], model=model, epochs=4, batch=4
        )
        ((twin, state),) = save.copies
        torch.set_rng_state(state)
        assert twin is not outcome[2]
        assert not torch.equal(weights(twin.model), outcome[0])
        for experience in experiences[1:]:
            twin.train(experience, eval_streams=[])
        assert leftovers(twin) == leftovers(outcome[2]) == set()
        found.append((outcome, (weights(twin.model), random_states())))
    (plain, plain_twin), (mine, my_twin) = found
    assert_same(mine, plain)
    assert_same(my_twin, plain_twin)


def test_the_copy_calls_its_own_plugins():
    """A copy made in mid-epoch holds lists of hooks; they must be those of the copied plugins."""
    save = Save("before_forward", copy.deepcopy)
    record = Batches()
    _, _, strategy = run([device_data(), save, record], stream("nc")[:1], epochs=2)
    ((twin, _),) = save.copies
    seen = len(record.trained[0])
    twin.mbatch = strategy.mbatch = [torch.zeros(1, 8), torch.zeros(1), torch.zeros(1)]
    twin._before_forward()
    assert len(record.trained[0]) == seen
    assert len(twin.plugins[2].trained[0]) == 8
    assert vars(twin)["_before_forward"].strategy is twin


def hidden(image):
    return ToTensor()(image)


@quietly()
@pytest.mark.parametrize("kind", ["naive", "er"])
def test_a_strategy_can_be_pickled_while_worker_processes_read(kind):
    made = image_stream(Lambda(hidden), Lambda(hidden))
    save = Save("before_forward", restored)
    plugins = [device_data(workers=1), save, *plugins_of(kind)]
    _, _, strategy = run(plugins, made.train_stream[:2], model=for_images, epochs=4)
    ((twin, _),) = save.copies
    assert type(twin.plugins[0]) is type(strategy.plugins[0])


# what is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["naive", "stock", "er"])
def test_nothing_is_left_in_the_strategy(kind):
    _, _, strategy = run([device_data(), *plugins_of(kind)], stream("nc"), epochs=2, eval_every=1)
    assert leftovers(strategy) == set()
    strategy.eval(benchmark("nc").test_stream)
    assert leftovers(strategy) == set()
    assert strategy.dataloader == []


@pytest.mark.parametrize("where", ["first", "last"])
def test_nothing_is_left_between_epochs_and_evaluated_experiences(where):
    found = []

    class Look(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            found.append(leftovers(strategy))

        def after_eval(self, strategy, **kwargs):
            found.append(leftovers(strategy))

        def before_training_epoch(self, strategy, **kwargs):
            if where == "last":  # DeviceDataPlugin comes later in the list
                found.append(leftovers(strategy))

        def after_training_epoch(self, strategy, **kwargs):
            if where == "first":
                found.append(leftovers(strategy))

    plugins = placed([Look()], where, device_data())
    _, _, strategy = run(plugins, [], epochs=3, eval_every=1)
    strategy.train(stream("nc"), eval_streams=[benchmark("nc").test_stream])
    assert found == [set()] * (3 * (1 + 3 + 3) + 1)


def test_nothing_is_left_after_early_stopping():
    class Stop(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 1:
                strategy.stop_training()

    found, expected = (
        run([*first, Stop()], stream("nc"), epochs=4) for first in ([device_data()], [])
    )
    assert_same(found, expected)
    assert found[2].clock.train_iterations == 3 * 2 * 5
    assert leftovers(found[2]) == set()


def test_avalanches_early_stopping_learns_the_same():
    def once(*first):
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
        stop = EarlyStoppingPlugin(2, "test_stream")
        torch.manual_seed(0)
        strategy = naive(mlp(), [*first, stop], evaluator=evaluator, eval_every=1, epochs=9)
        for experience in stream("nc"):
            strategy.train(experience, eval_streams=[benchmark("nc").test_stream])
        assert leftovers(strategy) == set()
        return weights(strategy.model), random_states(), strategy

    one, other = once(device_data()), once()
    assert_same(one, other)
    assert one[2].clock.train_iterations == other[2].clock.train_iterations < 9 * 3 * 5


class Break(SupervisedPlugin):
    def __init__(self, hook, at=7):
        super().__init__()
        self.hook, self.at = hook, at

    def __getattribute__(self, name):
        if name.startswith(("before_", "after_")) and name == self.hook:
            return lambda strategy, **kwargs: self.check(strategy)
        return super().__getattribute__(name)

    def check(self, strategy):
        if strategy.clock.train_iterations >= self.at:
            self.at = 10**9
            raise RuntimeError("broken off")


@pytest.mark.parametrize("hook", ["before_forward", "after_update", "after_eval_forward"])
@pytest.mark.parametrize("kind", ["naive", "stock", "er"])
def test_a_strategy_trains_again_after_an_exception_in_mid_epoch(kind, hook):
    test = benchmark("nc").test_stream

    def once(*first):
        plugins = [*first, Break(hook), *plugins_of(kind)]
        _, _, strategy = run(plugins, [], model=with_dropout, epochs=2, eval_every=1)
        with pytest.raises(RuntimeError, match="broken off"):
            strategy.train(stream("nc"), eval_streams=[test])
        late = Batches()
        strategy.plugins.insert(0, late)
        for experience in stream("nc"):
            strategy.train(experience, eval_streams=[test])
        assert [len(batches) for batches in late.trained] == [10, 10, 10]
        assert len(late.evaluated) == 3 * 3 * (1 + 2)  # initially, and after each epoch
        assert leftovers(strategy) == set()
        return weights(strategy.model), random_states()

    assert_same(once(device_data()), once())
