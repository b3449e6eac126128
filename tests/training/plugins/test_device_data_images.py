"""Images: stored as bytes, transformed in batches, augmented anew at every draw."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import (
    CenterCrop,
    ColorJitter,
    Compose,
    Lambda,
    Normalize,
    PILToTensor,
    RandomCrop,
    RandomHorizontalFlip,
    RandomRotation,
    ToTensor,
)

from avalanche_ext.training.loading.batch_transforms import UnmovableTransform
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
from tests.training.plugins.device_runs import (
    SIDE,
    TO_FLOAT,
    Album,
    Batches,
    Pictures,
    assert_same,
    device_data,
    for_images,
    image_stream,
    pixels,
    placed,
    quietly,
    run,
    weights,
)

pytestmark = pytest.mark.filterwarnings("error:DeviceDataPlugin")  # none that is not expected

RANDOM = Compose([RandomCrop(SIDE, padding=1), RandomHorizontalFlip(), ToTensor()])
PER_IMAGE = 3 * SIDE * SIDE


# what is stored ---------------------------------------------------------------------------------


def own_transform():
    """The data set applies its transform itself, as torchvision's do."""
    train = Pictures(*pixels(), transform=TO_FLOAT)
    test = Pictures(*pixels(seed=1), transform=TO_FLOAT)
    return nc_benchmark(train, test, 3, task_labels=False, seed=3)


def raw_class_incremental():
    train = Pictures(*pixels(), transform=TO_FLOAT)
    test = Pictures(*pixels(seed=1), transform=TO_FLOAT)
    return class_incremental_benchmark({"train": train, "test": test}, num_experiences=3, seed=3)


def own_and_groups():
    """Half of the work is done by the data set, the other half by Avalanche's groups."""

    def make(arrays, targets):
        return Pictures(arrays, targets, transform=ToTensor())

    norm = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return image_stream(norm, norm, make=make)


IMAGE_DATA = {
    "own transform": own_transform,
    "raw class incremental": raw_class_incremental,
    "groups over pictures": lambda: image_stream(make=Pictures),
    "groups over a plain data set": image_stream,
    "own transform and groups": own_and_groups,
}
REPLAY = {
    "naive": lambda: [],
    "stock": lambda: [ReplayPlugin(6, batch_size_mem=4)],
    "er": lambda: [ERPlugin(4)],
    "ber": lambda: [BERPlugin(4)],
    "shuffle": lambda: [ShuffleReplayPlugin(4)],
    "er, their classes": lambda: [ERPlugin(storage_policy=ClassBalancedBuffer(6))],
}


@pytest.mark.parametrize("replay", REPLAY)
@pytest.mark.parametrize("data", IMAGE_DATA)
def test_pictures_learn_the_same(data, replay):
    benchmark = IMAGE_DATA[data]()
    found = []
    for where in (None, "first", "last"):
        plugin = device_data()
        plugins = REPLAY[replay]()
        plugins = placed(plugins, where, plugin) if where else plugins

        def model():
            return for_images(dropout=0.5)

        found.append(run(plugins, benchmark.train_stream, model=model, epochs=2))
        if where and replay == "naive":
            assert plugin.bytes_allocated == 36 * (PER_IMAGE + 8 + 8)
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("plugin", [ERPlugin, BERPlugin, ShuffleReplayPlugin])
def test_exemplars_are_bytes_too(plugin):
    replay = plugin(5)
    run([device_data(), replay], image_stream().train_stream, model=for_images)
    ((images, _), (labels, _), (tasks, _)) = replay.memory.locate(torch.arange(15))
    assert (images.dtype, labels.dtype, tasks.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert images.shape == (15, 3, SIDE, SIDE)
    assert replay.bytes_remembered == 15 * (PER_IMAGE + 8 + 8)
    arrays = {a.transpose(2, 0, 1).tobytes() for a in pixels()[0]}
    stored = [image.numpy().tobytes() for image in images]
    assert len(set(stored)) == 15
    assert set(stored) < arrays


def test_each_picture_is_read_once_for_all_epochs_and_the_memory():

    def reads(epochs, plugins):
        benchmark = image_stream()
        run([*plugins, ERPlugin(5)], benchmark.train_stream, model=for_images, epochs=epochs)
        return benchmark.raw[0].reads

    assert reads(1, [device_data()]) == reads(4, [device_data()]) <= 36 + 3 * 22  # and some checks
    assert reads(4, []) > 36 * 4


# random transforms ------------------------------------------------------------------------------


def outcomes(arrays):
    """Every image that crop, flip and conversion can make: ``{bytes: (image, outcome)}``."""
    known = {}
    for k, array in enumerate(arrays):
        x = torch.from_numpy(array).permute(2, 0, 1).float() / 255
        padded = F.pad(x, (1, 1, 1, 1))
        for n, (top, left, flip) in enumerate(itertools.product(range(3), range(3), (0, 1))):
            window = padded[:, top : top + SIDE, left : left + SIDE]
            window = window.flip(-1) if flip else window
            known[window.contiguous().numpy().tobytes()] = (k, n)
    assert len(known) == 18 * len(arrays)
    return known


KNOWN = outcomes(pixels()[0])
UNCHANGED = 2 * 4  # the window in the middle, not mirrored


def seen(batches):
    """``(image, outcome)`` of each row of each batch; an unknown image is an error."""
    return [[KNOWN[row.contiguous().numpy().tobytes()] for row in x] for x, *_ in batches]


def augmented(plugins, *, seed=0, epochs=3, benchmark=None, **options):
    """The batches of a run on randomly cropped and mirrored images."""
    record = Batches()
    stream = (benchmark or image_stream(RANDOM, ToTensor())).train_stream
    found = run([*plugins, record], stream, model=for_images, seed=seed, epochs=epochs, **options)
    return [seen(batches) for batches in record.trained], record, found


@pytest.mark.parametrize("replay", REPLAY)
@pytest.mark.parametrize("where", ["first", "last"])
def test_every_row_is_a_possible_outcome_of_its_image(replay, where):
    trained, record, _ = augmented(placed(REPLAY[replay](), where, device_data()))
    for t, batches in enumerate(trained):
        labels = [batch[1].tolist() for batch in record.trained[t]]
        for rows, y in zip(batches, labels, strict=True):
            assert [k % 6 for k, _ in rows] == y
        current = [(k, n) for rows in batches for k, n in rows if k % 6 in (2 * t, 2 * t + 1)]
        assert sorted(k for k, _ in current) == sorted(
            k for k in range(36) if k % 6 in (2 * t, 2 * t + 1) for _ in range(3)
        )
        first, last = current[:12], current[-12:]
        assert len({n for _, n in first}) >= 4  # rows of one epoch differ
        assert sum(dict(first)[k] == n for k, n in last) <= 6  # and epochs do
        if t and replay != "naive":
            past = [(k, n) for rows in batches for k, n in rows if k % 6 < 2 * t]
            drawn = {}
            for k, n in past:
                drawn.setdefault(k, set()).add(n)
            assert len(past) >= 8
            assert max(len(ns) for ns in drawn.values()) >= 2  # anew at each replay


def test_outcomes_are_uniform():
    trained, _, _ = augmented([device_data()], epochs=50)
    counts = torch.zeros(18)
    for rows in itertools.chain.from_iterable(trained):
        for _, n in rows:
            counts[n] += 1
    assert counts.sum() == 36 * 50
    expected = 36 * 50 / 18
    assert ((counts - expected) ** 2 / expected).sum() < 40.8  # 0.1 % of the time with 17 d.o.f.


def assert_outcomes_differ(one, other):
    """By place in the epoch, between two epochs and between two seeds, not only by image."""
    batches = one[0][0][:2], one[0][0][2:4], other[0][0][:2]
    epochs = [[row for rows in b for row in rows] for b in batches]
    assert [sorted(k for k, _ in e) for e in epochs] == [sorted(k for k, _ in epochs[0])] * 3
    assert len({tuple(n for _, n in e) for e in epochs}) == 3


@pytest.mark.parametrize("replay", ["naive", "stock", "er"])
def test_the_same_seed_gives_the_same_run_and_another_one_another(replay):
    def once(seed):
        return augmented([device_data(), *REPLAY[replay]()], seed=seed)

    one, again, other = once(0), once(0), once(1)
    assert one[0] == again[0]
    assert_same(one[2], again[2])
    assert_outcomes_differ(one, other)


@pytest.mark.parametrize("replay", ["naive", "stock", "er"])
def test_order_and_random_state_are_those_of_a_run_without_random_transforms(replay):
    """Only the outcomes of the transforms differ, not the samples of any batch."""
    trained, _, found = augmented([device_data(), *REPLAY[replay]()])
    plain, _, theirs = augmented(REPLAY[replay](), benchmark=image_stream(ToTensor(), ToTensor()))
    assert [[[k for k, _ in r] for r in b] for b in trained] == [
        [[k for k, _ in r] for r in b] for b in plain
    ]
    assert found[1] == theirs[1]


def test_evaluation_uses_the_eval_transforms():
    metrics = []
    for plugins in ([], [device_data()]):
        record = Batches()
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True), loss_metrics(experience=True), loggers=[]
        )
        benchmark = image_stream(RANDOM, ToTensor())
        _, _, strategy = run([*plugins, record], [], model=for_images, evaluator=evaluator)
        metrics.append(strategy.eval(benchmark.train_stream))
        rows = [row for batches in record.evaluated for b in seen(batches) for row in b]
        assert sorted(rows) == [(k, UNCHANGED) for k in range(36)]
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == 6


# transforms that cannot be moved ----------------------------------------------------------------


def brighter(image):
    return image.point(lambda v: min(255, v + 10))


UNMOVABLE = Compose([Lambda(brighter), ToTensor()])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("replay", ["naive", "stock", "er", "shuffle"])
def test_what_cannot_be_moved_is_read_by_a_loader_and_named(replay, workers):
    benchmark = image_stream(UNMOVABLE, UNMOVABLE)
    plain = run(REPLAY[replay](), benchmark.train_stream, model=for_images, epochs=2)
    plugin = device_data(workers=workers)
    with pytest.warns(UserWarning, match=r"DeviceDataPlugin: Lambda\(\)") as caught:
        found = run([plugin, *REPLAY[replay]()], benchmark.train_stream, model=for_images, epochs=2)
    assert_same(found, plain)
    assert plugin.bytes_allocated == 0
    named = [w for w in caught if "DeviceDataPlugin" in str(w.message)]
    assert len(named) == 1
    assert f"with {workers} worker processes" in str(named[0].message)


def test_what_cannot_be_moved_is_an_error_on_request():
    benchmark = image_stream(UNMOVABLE, UNMOVABLE)
    with pytest.raises(UnmovableTransform, match="Lambda"):
        run([device_data(fallback="error")], benchmark.train_stream, model=for_images)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (Lambda(brighter), "Lambda"),
        (RandomRotation(10), "RandomRotation"),
        (Compose([RandomHorizontalFlip(), Lambda(brighter)]), "Lambda"),
        (CenterCrop(3), r"CenterCrop.* is for single samples; give it to the data set"),
        (Compose([CenterCrop(3), RandomHorizontalFlip()]), r"CenterCrop.* is for single samples"),
        (PILToTensor(), "PILToTensor.* is for single samples"),
        (Compose([RandomHorizontalFlip(), CenterCrop(3)]), "CenterCrop"),
    ],
)
def test_an_augmentation_that_cannot_be_moved_is_refused(augment, words):
    with pytest.raises(UnmovableTransform, match=words):
        DeviceDataPlugin(augment=augment)


@pytest.mark.parametrize("augment", [None, Compose([]), []])
def test_no_augmentation(augment):
    assert DeviceDataPlugin(augment=augment).augment is None


# augment ----------------------------------------------------------------------------------------

AUGMENT = Compose([RandomCrop(SIDE, padding=1), RandomHorizontalFlip()])


def to_tensor(image):
    """As ``ToTensor``, but hidden: data that must be read by a ``DataLoader``."""
    return ToTensor()(image)


@quietly()
@pytest.mark.parametrize("transform", [ToTensor(), Lambda(to_tensor)], ids=["kept", "read"])
@pytest.mark.parametrize("replay", ["naive", "stock", "er", "er, their classes"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_augment_changes_training_batches_alone(where, replay, transform):
    benchmark = image_stream(transform, transform)
    plugins = placed(REPLAY[replay](), where, device_data(augment=AUGMENT))
    trained, record, found = augmented(plugins, epochs=2, benchmark=benchmark)
    plain, _, theirs = augmented(REPLAY[replay](), epochs=2, benchmark=benchmark)
    for mine, original in zip(trained, plain, strict=True):
        assert [[k for k, _ in r] for r in mine] == [[k for k, _ in r] for r in original]
        assert all(n == UNCHANGED for r in original for _, n in r)
        assert len({n for r in mine for _, n in r}) > 8
    if replay != "naive":
        past = [n for rows in trained[2] for k, n in rows if k % 6 < 4]
        assert len(set(past)) > 4
    assert found[1] == theirs[1]
    assert not torch.equal(found[0], theirs[0])
    found[2].eval(benchmark.train_stream)
    rows = [n for batches in record.evaluated for b in seen(batches) for _, n in b]
    assert rows == [UNCHANGED] * 36


def test_augment_comes_after_the_data_sets_own_transforms():
    """Colours are changed after the conversion to float, where they are not rounded."""
    record = Batches()
    plugin = device_data(augment=ColorJitter(brightness=(0.5, 0.5)))
    run([plugin, record], image_stream(ToTensor(), ToTensor()).train_stream, model=for_images)
    images = torch.from_numpy(pixels()[0]).permute(0, 3, 1, 2).float() / 255
    for x, *_ in itertools.chain.from_iterable(record.trained):
        assert x.dtype == torch.float32
        for row in x:
            assert (row == images * 0.5).flatten(1).all(1).sum() == 1


@pytest.mark.parametrize("seed", [3, 4])
def test_augment_repeats_with_the_seed(seed):
    def once(seed):
        plugins = [device_data(augment=AUGMENT), ERPlugin(4)]
        benchmark = image_stream(ToTensor(), ToTensor())
        return augmented(plugins, seed=seed, benchmark=benchmark)

    one, again, other = once(seed), once(seed), once(seed + 1)
    assert one[0] == again[0]
    assert torch.equal(one[2][0], again[2][0])
    assert_outcomes_differ(one, other)


def test_a_plain_data_set_with_a_transform_of_its_own_is_not_frozen():
    """It could be random, and nobody can see it; so it is read anew every time."""

    class Own(Album):
        transform = staticmethod(RANDOM)

        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return self.transform(x), y

    benchmark = image_stream(None, None, make=Own)
    plugin, record = device_data(), Batches()
    with pytest.warns(UserWarning, match="Own applies its own transform"):
        run([plugin, record], benchmark.train_stream[:1], model=for_images, epochs=6)
    rows = [row for b in seen(record.trained[0]) for row in b]
    assert len({n for _, n in rows}) > 8


class Sizes(Album):
    """Every second image is wider."""

    def __init__(self, arrays, targets):
        super().__init__(arrays, targets)
        self.images = [
            im.resize((SIDE + i % 2, SIDE), Image.Resampling.NEAREST)
            for i, im in enumerate(self.images)
        ]


@quietly()
def test_what_is_refused_is_not_tried_again_in_each_epoch():
    def reads(epochs, plugins):
        benchmark = image_stream(RANDOM, ToTensor(), make=Sizes)
        stream = benchmark.train_stream[:1]
        run(plugins, stream, model=for_images, epochs=epochs, eval_every=-1)
        return benchmark.raw[0].reads

    tried = reads(1, [device_data()]) - reads(1, [])
    assert reads(5, [device_data()]) == reads(5, []) + tried
    assert tried > 12


@quietly()
def test_what_is_refused_is_not_pickled():
    plugin = device_data()
    stream = image_stream(RANDOM, ToTensor(), make=Sizes, n=600).train_stream
    run([plugin], stream[:1], model=for_images)
    assert len(pickle.dumps(plugin)) < 8000 < pixels(600)[0].nbytes


def test_images_of_different_size_are_read_by_a_loader():
    crop = Compose([RandomCrop(SIDE), ToTensor()])
    benchmark = image_stream(crop, crop, make=Sizes)
    before = for_images()
    with pytest.warns(UserWarning, match=r"samples differ in shape or type .*resize them"):
        found = run([device_data()], benchmark.train_stream, model=for_images)
    assert not torch.equal(found[0], weights(before))
