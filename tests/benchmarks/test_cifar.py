"""Split CIFAR-100 on a file of numbered images, and, where it is there, on the real one."""

from __future__ import annotations

from types import SimpleNamespace

import avalanche.benchmarks.datasets as avalanche_datasets
import numpy as np
import pytest
import torch
import torchvision.datasets
from torchvision.transforms.v2 import functional as F

from avalanche_ext.benchmarks import split_cifar10, split_cifar100, split_svhn
from avalanche_ext.benchmarks.cifar import CIFAR100_MEAN, CIFAR100_STD, load_cifar100
from tests.conftest import DATA_ROOT, naive
from tests.training.plugins.device_runs import device_data

CLASSES, TRAIN, TEST = 20, 10, 3


def numbered(n_per_class, first):
    """Images whose first pixel holds the class, the number within it, and ``first``."""
    generator = np.random.default_rng(first)
    x = generator.integers(0, 256, (CLASSES * n_per_class, 32, 32, 3), dtype=np.uint8)
    y = np.arange(len(x)) % CLASSES
    x[:, 0, 0] = np.stack([y, np.arange(len(x)) // CLASSES, np.full(len(x), first)], axis=1)
    order = generator.permutation(len(x))
    return x[order], y[order]


PARTS = {"train": numbered(TRAIN, 1), "test": numbered(TEST, 2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    arrays = {f"{c}_{part}": v for part, pair in PARTS.items() for c, v in zip("xy", pair)}  # noqa: B905
    np.savez(folder / "cifar100.npz", classes=np.array(["name"]), **arrays)
    return folder


def stored(experience):
    """The tensors below an experience's transforms: images, and labels as they are given out."""
    dataset = experience.dataset.remove_current_transform_group()
    x, y, t = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(x), torch.tensor(y), torch.tensor(t)


def marks(images):
    """(class, number, part) of each image."""
    return [tuple(row) for row in images[:, :, 0, 0].tolist()]


def test_images_and_labels_are_loaded(root):
    for part, (x, y) in zip(load_cifar100(root), PARTS.values(), strict=True):
        images, labels = part
        assert (images.dtype, images.shape) == (torch.uint8, (len(x), 3, 32, 32))
        assert images.is_contiguous()
        assert torch.equal(images, torch.from_numpy(x).permute(0, 3, 1, 2))
        assert (labels.dtype, labels.tolist()) == (torch.int64, y.tolist())


@pytest.mark.parametrize("n", [1, 2, 4, 20])
def test_every_image_comes_once(root, n):
    benchmark = split_cifar100(n, root=root)
    for stream, per_class, part in (
        (benchmark.train_stream, TRAIN, 1),
        (benchmark.test_stream, TEST, 2),
    ):
        seen = []
        for k, experience in enumerate(stream):
            x, y, t = stored(experience)
            assert (x.dtype, x.shape[1:]) == (torch.uint8, (3, 32, 32))
            width = CLASSES // n
            assert set(y.tolist()) == set(range(k * width, (k + 1) * width))
            assert [m[0] for m in marks(x)] == y.tolist()
            assert set(t.tolist()) == {0}
            seen += marks(x)
        assert sorted(seen) == [(c, i, part) for c in range(CLASSES) for i in range(per_class)]


def test_ten_experiences_by_default(root):
    assert len(split_cifar100(root=root).train_stream) == 10


@pytest.mark.parametrize(
    ("scenario", "labels", "tasks"),
    [
        ("class", [[0, 1], [2, 3], [4, 5]], [0, 0, 0]),
        ("task", [[0, 1]] * 3, [0, 1, 2]),
        ("domain", [[0, 1]] * 3, [0, 0, 0]),
    ],
)
def test_order_and_choice_of_classes(root, scenario, labels, tasks):
    """Six of the classes make a smaller benchmark; labels follow the order of arrival."""
    order = [7, 3, 19, 0, 11, 4]
    benchmark = split_cifar100(3, class_order=order, scenario=scenario, root=root)
    for stream, per_class in ((benchmark.train_stream, TRAIN), (benchmark.test_stream, TEST)):
        assert len(stream) == 3
        for k, experience in enumerate(stream):
            x, y, t = stored(experience)
            assert len(y) == 2 * per_class
            assert sorted(set(y.tolist())) == labels[k]
            assert set(t.tolist()) == {tasks[k]}
            known = dict(zip(order[2 * k : 2 * k + 2], labels[k], strict=True))
            assert [known[m[0]] for m in marks(x)] == y.tolist()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"class_order": [0, 1, 99], "n_experiences": 3}, "class_order must be a permutation"),
        ({"class_order": [0, 1, 1], "n_experiences": 3}, "class_order must be a permutation"),
        ({"class_order": [0, 1, 2], "n_experiences": 2}, "3 classes cannot be cut into 2"),
        ({"n_experiences": 3}, "20 classes cannot be cut into 3"),
        ({"scenario": "online"}, "scenario to be one of"),
    ],
)
def test_bad_arguments(root, kwargs, words):
    with pytest.raises(ValueError, match=words):
        split_cifar100(**kwargs, root=root)


def test_fewer_training_images(root):
    one, two, other = (
        split_cifar100(4, train_per_experience=7, seed=s, root=root) for s in (0, 0, 1)
    )
    for a, b, c in zip(one.train_stream, two.train_stream, other.train_stream, strict=True):
        mine = marks(stored(a)[0])
        assert len(set(mine)) == 7
        assert mine == marks(stored(b)[0]) != marks(stored(c)[0])
    assert [len(e.dataset) for e in one.test_stream] == [5 * TEST] * 4


def test_validation_images_come_from_the_training_images_and_are_not_trained_on(root):
    benchmark = split_cifar100(4, validation=True, root=root)
    train, test = (
        [m for e in stream for m in marks(stored(e)[0])]
        for stream in (benchmark.train_stream, benchmark.test_stream)
    )
    assert not set(train) & set(test)
    assert sorted(train + test) == [(c, i, 1) for c in range(CLASSES) for i in range(TRAIN)]
    for c in range(CLASSES):
        assert sum(m[0] == c for m in test) == TRAIN // 5


# transforms -------------------------------------------------------------------------------------


def normal(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR100_MEAN, CIFAR100_STD))
    return (images / 255 - mean) / std


def given(dataset, n=20):
    return torch.stack([dataset[i][0] for i in range(n)])


def test_evaluation_only_normalises(root):
    benchmark = split_cifar100(4, root=root)
    for experience in (benchmark.test_stream[1], benchmark.train_stream[1]):
        x = given(experience.dataset.eval(), 15)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, normal(stored(experience)[0][:15]))


def test_training_images_without_augmentation_are_those_of_evaluation(root):
    dataset = split_cifar100(4, augment=False, root=root).train_stream[2].dataset
    assert torch.equal(given(dataset.train()), given(dataset.eval()))


def test_training_images_are_shifted_and_mirrored(root):
    """Each is one of 9 x 9 windows of the padded image, mirrored or not; black is padded."""
    experience = split_cifar100(4, root=root).train_stream[0]
    x, images = given(experience.dataset.train()), stored(experience)[0][:20]
    found = []
    for row, image in zip(x, images, strict=True):
        padded = F.pad(image, [4])
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        both = torch.stack([windows, windows.flip(-1)]).permute(0, 2, 3, 1, 4, 5)
        hits = torch.isclose(normal(both), row, atol=1e-6).flatten(3).all(3).nonzero().tolist()
        assert len(hits) == 1
        found.append(tuple(hits[0]))
    assert {flip for flip, *_ in found} == {0, 1}
    assert len({top for _, top, _ in found}) > 3
    assert len({left for *_, left in found}) > 3


def test_training_runs_on_bytes(root):
    """The transforms can all be moved to batches: nothing falls back to single samples."""
    benchmark = split_cifar100(4, root=root)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 20))
    plugin = device_data(50 * 10**6, fallback="error")
    strategy = naive(model, [plugin], lr=1e-3, batch=25)
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert plugin.bytes_allocated == 0  # read from where they are


# where the data are -----------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Avalanche's data folder, empty."""
    folder = tmp_path / "data" / "cifar100"
    monkeypatch.setattr(avalanche_datasets, "default_dataset_location", lambda name: folder)
    return folder


def test_absent_data(nowhere):
    words = (
        rf"CIFAR-100 is not in {nowhere} or {nowhere.parent}: neither cifar100\.npz \(with "
        r"x_train, y_train, x_test, y_test\) nor torchvision's cifar-100-python\. Name the folder "
        r"with root=, or pass download=True\."
    )
    with pytest.raises(FileNotFoundError, match=words):
        load_cifar100()
    with pytest.raises(FileNotFoundError, match=words):
        split_cifar100()


def test_absent_data_in_a_folder_of_your_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-100 is not in {tmp_path}: neither"):
        split_cifar100(root=tmp_path)


@pytest.mark.parametrize("place", ["its own folder", "the folder above"])
def test_avalanches_folder_is_the_default(nowhere, root, place):
    folder = nowhere if place == "its own folder" else nowhere.parent
    folder.mkdir(parents=True)
    (folder / "cifar100.npz").symlink_to(root / "cifar100.npz")
    assert len(load_cifar100()[0][1]) == CLASSES * TRAIN


def test_a_folder_can_be_given_as_text(root):
    assert len(load_cifar100(str(root))[1][1]) == CLASSES * TEST


@pytest.mark.parametrize("download", [False, True])
def test_torchvisions_files(tmp_path, monkeypatch, download):
    asked = []

    def fake(folder, train, download):
        asked.append((folder, train, download))
        x, y = PARTS["train" if train else "test"]
        return SimpleNamespace(data=x, targets=y.tolist())

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    if not download:
        (tmp_path / "cifar-100-python").mkdir()
    (x, y), (x_test, _) = load_cifar100(tmp_path, download)
    assert asked == [(str(tmp_path), True, download), (str(tmp_path), False, download)]
    assert torch.equal(x, torch.from_numpy(PARTS["train"][0]).permute(0, 3, 1, 2))
    assert (y.dtype, y.tolist()) == (torch.int64, PARTS["train"][1].tolist())
    assert len(x_test) == CLASSES * TEST


# CIFAR-10 and SVHN ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), [("cifar10", split_cifar10), ("svhn", split_svhn)])
def test_the_other_data_sets_in_one_packed_file(tmp_path, name, split):
    (x, y), (x_test, y_test) = ((x[y < 10], y[y < 10]) for x, y in PARTS.values())
    np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    benchmark = split(root=tmp_path, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert len(benchmark.train_stream) == 5
    images, labels, _ = stored(benchmark.train_stream[1])
    assert sorted({(m[0], k) for m, k in zip(marks(images), labels.tolist(), strict=True)}) == [
        (6, 3), (7, 2),
    ]  # fmt: skip
    found = given(benchmark.test_stream[0].dataset.eval(), 6)
    torch.testing.assert_close(found, stored(benchmark.test_stream[0])[0] / 127.5 - 1)
    with pytest.raises(FileNotFoundError, match=rf"neither {name}\.npz"):
        split(root=tmp_path / "elsewhere")


def test_svhn_as_torchvision_keeps_it(tmp_path, monkeypatch):
    """Channels first, labels as an array, parts by name."""

    def fake(folder, split, download):
        x, y = PARTS[split]
        return SimpleNamespace(data=x.transpose(0, 3, 1, 2), labels=y % 10)

    monkeypatch.setattr(torchvision.datasets, "SVHN", fake)
    (tmp_path / "train_32x32.mat").touch()
    images, labels, _ = stored(split_svhn(1, root=tmp_path).train_stream[0])
    x, y = PARTS["train"]
    assert torch.equal(images, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert labels.tolist() == (y % 10).tolist()


# the real data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    for folder in (DATA_ROOT / "cifar100", DATA_ROOT):
        if (folder / "cifar100.npz").is_file() or (folder / "cifar-100-python").is_dir():
            return load_cifar100(folder)
    pytest.skip(f"real CIFAR-100 is not in {DATA_ROOT}")


@pytest.mark.data
def test_real_data(real, monkeypatch):
    (x, y), (x_test, y_test) = real
    assert (x.shape, x_test.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    assert x.dtype == x_test.dtype == torch.uint8
    assert y.bincount().tolist() == [500] * 100
    assert y_test.bincount().tolist() == [100] * 100
    pixels = x[::10].double() / 255
    for found, expected in (
        (pixels.mean((0, 2, 3)), CIFAR100_MEAN),
        (pixels.std((0, 2, 3)), CIFAR100_STD),
    ):
        assert (found - torch.tensor(expected)).abs().max() < 0.005


@pytest.mark.data
def test_real_benchmark(real, monkeypatch):
    monkeypatch.setattr("avalanche_ext.benchmarks.cifar.load_cifar100", lambda *_: real)
    benchmark = split_cifar100(10)
    assert [len(e.dataset) for e in benchmark.train_stream] == [5000] * 10
    assert [len(e.dataset) for e in benchmark.test_stream] == [1000] * 10
    x, y, t = benchmark.train_stream[3].dataset[0]
    assert (x.dtype, x.shape, int(t)) == (torch.float32, (3, 32, 32), 0)
    assert 30 <= int(y) < 40
    assert x.abs().max() < 3
