"""Data sets turned into tensors, against the data sets themselves, sample by sample."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.benchmarks.utils.transforms import MultiParamCompose, MultiParamTransformCallable
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms import (
    CenterCrop,
    Compose,
    ConvertImageDtype,
    Lambda,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
)

from avalanche_ext.training.loading.batch_transforms import BatchCompose, RandomFlip
from avalanche_ext.training.loading.batch_transforms import UnmovableTransform as Unmovable
from avalanche_ext.training.loading.residence import TooLarge, layout_key, make_resident
from tests.training.plugins.device_runs import SIDE, TO_FLOAT, Album, Pictures, pixels

CPU = torch.device("cpu")
PLENTY = 10**9
PIXELS = 3 * SIDE * SIDE


def plus_one(y):
    return y + 1


def tripled(y):
    return 3 * y


def both(x, y):
    return x, y + 1


def view(data, transform=None, y_transform=None, *, tasks=0, evaluated=None):
    """An Avalanche data set with transform groups."""
    n = len(data.targets)
    tasks = [tasks] * n if isinstance(tasks, int) else tasks
    groups = None
    if transform is not None or y_transform is not None:
        pair = transform if callable(transform) and y_transform is None else None
        pair = (transform, y_transform) if pair is None else pair
        groups = {"train": pair, "eval": evaluated}
    return classification_dataset(
        data, targets=list(data.targets), task_labels=tasks, transform_groups=groups
    )


def tensors(n=12, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    data = TensorDataset(x.to(dtype), torch.arange(n) % 3)
    data.targets = (torch.arange(n) % 3).tolist()
    return data


def resident(dataset, *, room=PLENTY, **kwargs):
    return make_resident(dataset, CPU, room=room, **kwargs)


def assert_gives(source, dataset):
    """Every sample, and samples out of order and twice."""
    n = len(dataset)
    assert len(source) == n
    for at in (list(range(n)), [n - 1, 0, 0]):
        mine = source.gather(torch.tensor(at))
        theirs = dataset.collate_fn([dataset[i] for i in at])
        assert [(c.dtype, c.shape) for c in mine] == [(c.dtype, c.shape) for c in theirs]
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


NORM = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
FLOAT = Compose([ConvertImageDtype(torch.float32), NORM])
ALBUM = Album(*pixels(12))
DATASETS = {
    "floats": lambda: view(tensors()),
    "bytes": lambda: view(tensors(dtype=torch.uint8)),
    "bytes made float": lambda: view(tensors(dtype=torch.uint8), FLOAT),
    "part of the bytes": lambda: view(tensors(dtype=torch.uint8), FLOAT).subset([5, 5, 0, 11]),
    "two tensor data sets": lambda: view(tensors(), tasks=1).concat(view(tensors(7, seed=1))),
    "interleaved": lambda: view(tensors()).concat(view(tensors(5, seed=1))).subset([13, 0, 16, 4]),
    "labels changed": lambda: view(tensors(), None, plus_one),
    "labels changed, bytes": lambda: view(tensors(dtype=torch.uint8), FLOAT, plus_one),
    "labels changed twice": lambda: AvalancheDataset(
        [view(tensors(), None, plus_one)], transform_groups={"train": (None, tripled)}
    ),
    "images": lambda: view(ALBUM, TO_FLOAT),
    "images, labels changed": lambda: view(ALBUM, TO_FLOAT, plus_one),
    "images of several tasks": lambda: view(ALBUM, TO_FLOAT, tasks=[2, 0, 1] * 4).subset([3, 1, 7]),
    "images, halves": lambda: view(ALBUM, ToTensor()).subset([1, 2]).concat(
        view(Album(*pixels(5, seed=3)), ToTensor())
    ),
    "pictures": lambda: view(Pictures(*pixels(12), transform=TO_FLOAT)),
    "pictures, labels changed": lambda: view(
        Pictures(*pixels(12), transform=TO_FLOAT, target_transform=plus_one), None, tripled
    ),
    "pictures by torch's subset": lambda: view_of_subset(Pictures(*pixels(12), transform=TO_FLOAT)),
    "resized": lambda: view(ALBUM, Compose([Resize(6), CenterCrop(5), ToTensor()])),
    "images, joined by torch": lambda: view_of_joined(),
    "frozen": lambda: AvalancheDataset(
        [view(ALBUM, ToTensor(), evaluated=ToTensor()).freeze_transforms()],
        transform_groups={"train": (NORM, None)},
    ),
    "of several parameters": lambda: view(
        ALBUM, MultiParamCompose([ToTensor(), MultiParamTransformCallable(NORM)])
    ),
}  # fmt: skip


def view_of_subset(data):
    part = Subset(Subset(data, range(1, 11)), [7, 0, 3])
    part.targets = [data.targets[i] for i in (8, 1, 4)]
    return view(part)


def view_of_joined():
    parts = [Pictures(*pixels(n, seed=n), transform=TO_FLOAT) for n in (4, 3)]
    joined = ConcatDataset(parts)
    joined.targets = [*pixels(4)[1], *pixels(3)[1]]
    return view(joined)


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_those_of_the_data_set(name):
    dataset = DATASETS[name]()
    made = resident(dataset)
    assert_gives(made.source, dataset)
    images = made.source.columns[0]
    if "resized" not in name and "float" not in name.split():
        expected = torch.uint8 if "image" in name or "byte" in name else images.dtype
        assert images.dtype == expected
    assert made.row_bytes == images[:1].nbytes + 16


@pytest.mark.parametrize("name", ["images", "pictures", "two tensor data sets"])
def test_samples_read_by_worker_processes(name):
    dataset = DATASETS[name]()
    assert_gives(resident(dataset, workers=1).source, dataset)


@pytest.mark.parametrize("group", ["train", "eval"])
def test_each_group_has_its_own_transforms(group):
    data = view(ALBUM, ToTensor(), evaluated=TO_FLOAT).with_transforms(group)
    assert_gives(resident(data).source, data)


def test_without_task_labels():
    data = AvalancheDataset(
        [tensors()], data_attributes=[DataAttribute(tensors().targets, "targets")]
    )
    made = resident(data)
    assert_gives(made.source, data)
    assert made.row_bytes == 4 * PIXELS + 8


@pytest.mark.parametrize("n", [1, 255, 256, 257])
def test_every_sample_is_where_it_belongs(n):
    """Around the size of the pieces in which samples are read."""
    dataset = view(Album(*pixels(n)), ToTensor()).subset(list(range(n))[::-1])
    assert_gives(resident(dataset).source, dataset)


# bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "row"),
    [("images", 12, PIXELS + 16), ("two tensor data sets", 19, 4 * PIXELS + 16)],
)
def test_bytes_that_are_allocated(name, n, row):
    dataset = DATASETS[name]()
    made = resident(dataset, room=n * row)
    assert (made.nbytes, made.row_bytes) == (n * row, row)
    assert sum(c.nbytes for c in made.source.columns) == n * row
    words = f"{n} samples of {row} bytes need {n * row:,} bytes, and {n * row - 1:,} of the budget"
    with pytest.raises(TooLarge, match=words) as caught:
        resident(dataset, room=n * row - 1)
    assert (caught.value.nbytes, caught.value.row_bytes) == (n * row, row)


def test_tensors_that_are_there_are_not_copied():
    data = tensors(dtype=torch.uint8)
    dataset = view(data, FLOAT).subset([5, 0, 2])
    made = resident(dataset, room=0)
    assert made.nbytes == 0
    assert made.source.columns[0].data_ptr() == data.tensors[0].data_ptr()
    assert_gives(made.source, dataset)


def test_tensors_on_another_device_are_copied():
    meta = torch.device("meta")  # holds shapes only: enough to see what is asked of it
    data = view(tensors(dtype=torch.uint8))
    with pytest.raises(TooLarge, match=f"12 samples of {PIXELS + 16} bytes"):
        make_resident(data, meta, room=12 * (PIXELS + 16) - 1)


def test_too_large_data_are_not_read():
    album = Album(*pixels(300))
    with pytest.raises(TooLarge):
        resident(view(album, ToTensor()), room=1000)
    assert album.reads <= 20


# the random state -------------------------------------------------------------------------------


class Noisy(Album):
    """Every read draws from torch's global state, and comes out the same but for ``share``."""

    def __init__(self, arrays, targets, share=0.0):
        super().__init__(arrays, targets)
        self.share = share

    def __getitem__(self, i):
        noisy = float(torch.rand(())) < self.share
        x, y = super().__getitem__(i)
        return (Image.fromarray(255 - np.asarray(x)) if noisy else x), y


@pytest.mark.parametrize(
    ("name", "workers"), [*((n, 0) for n in [*DATASETS, "noisy"]), ("images", 1), ("noisy", 1)]
)
def test_the_global_random_state_is_left_alone(name, workers):
    crop = Compose([RandomCrop(SIDE, padding=1), ToTensor()])
    dataset = view(Noisy(*pixels(12)), crop) if name == "noisy" else DATASETS[name]()
    before = torch.get_rng_state()
    resident(dataset, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_samples_that_are_random_by_themselves_are_refused(share, seed):
    torch.manual_seed(seed)

    class Random(Noisy):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return (x if share < 1 else Image.fromarray(torch.randint(
                256, (SIDE, SIDE, 3), dtype=torch.uint8).numpy())), y  # fmt: skip

    before = torch.get_rng_state()
    with pytest.raises(Unmovable, match=r"Random gives another sample each time it is read"):
        resident(view(Random(*pixels(24), share), ToTensor()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["subset", "joined", "subset of joined"])
def test_random_transforms_inside_torchs_views_are_found(kind):
    """They would be applied once and for all otherwise."""
    flip = Compose([RandomHorizontalFlip(), ToTensor()])
    data = Pictures(*pixels(6), transform=flip)
    if "joined" in kind:
        data = ConcatDataset([data, Pictures(*pixels(3), transform=flip)])
    if "subset" in kind:
        data = Subset(data, range(6))
    data.targets = [*pixels(6)[1], *pixels(len(data) - 6)[1]]
    made = resident(view(data))
    assert made.source.columns[0].dtype == torch.uint8
    assert isinstance(made.source.transform.steps[0], RandomFlip)


# keys -------------------------------------------------------------------------------------------


def test_keys_of_equal_views():
    data = view(ALBUM, ToTensor(), evaluated=TO_FLOAT)
    part = data.subset([3, 1, 7])
    keys = [
        layout_key(part),
        layout_key(part.train()),
        layout_key(data.subset([3, 1, 7])),
        layout_key(data.subset([7, 1, 0, 3]).subset([3, 1, 0])),
        layout_key(copy.copy(part)),
        layout_key(part.subset([0, 1, 2])),
    ]
    assert len(set(keys)) == 1
    assert hash(keys[0]) is not None
    twice = view(tensors()).concat(data)
    assert layout_key(twice) == layout_key(twice.train())


def test_keys_of_different_views():
    data = view(ALBUM, ToTensor(), evaluated=TO_FLOAT)
    other = view(Album(*pixels(12)), ToTensor())
    halves = other.concat(data)
    bare = AvalancheDataset([ALBUM], data_attributes=[DataAttribute(ALBUM.targets, "targets")])
    views = {
        "all": data,
        "evaluation": data.eval(),
        "rows": data.subset([3, 1, 7]),
        "other rows": data.subset([3, 1, 8]),
        "another order": data.subset([1, 3, 7]),
        "one more": data.subset([3, 1, 7, 7]),
        "another data set": other,
        "joined": halves,
        "joined, another place": halves.subset([0, 13, 1]),
        "joined, yet another": halves.subset([0, 1, 13]),
        "joined the other way": data.concat(other),
        "another transform": data.replace_current_transform_group(ToTensor()),
        "a further transform": AvalancheDataset([data], transform_groups={"train": (NORM, None)}),
        "no transform": data.remove_current_transform_group(),
        "another task": view(ALBUM, data._flat_data._transform_groups["train"], tasks=1),
        "no task": bare,
    }
    keys = {name: layout_key(v) for name, v in views.items()}
    assert len(set(keys.values())) == len(keys)


def test_keys_of_the_same_samples_in_two_tasks():
    """Everything is the same but the task label: what is kept of one does not do for the other."""
    data = tensors()
    one, two = view(data, tasks=1), view(data, tasks=[1] * 11 + [2])
    assert layout_key(one) == layout_key(view(data, tasks=[1] * 12)) != layout_key(two)


@pytest.mark.parametrize("dataset", [AvalancheDataset([]), ALBUM, [1], view(ALBUM).subset([])])
def test_no_key(dataset):
    assert layout_key(dataset) is None


# what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [AvalancheDataset([]), ALBUM, tensors(), [(1, 2)]])
def test_empty_and_foreign_data_sets(dataset):
    with pytest.raises(Unmovable, match=f"{type(dataset).__name__} is not a filled Avalanche"):
        resident(dataset)


def test_attributes_beyond_task_labels():
    logits = DataAttribute(torch.zeros(12, 3), "logits", use_in_getitem=True)
    dataset = AvalancheDataset([view(tensors())], data_attributes=[logits])
    with pytest.raises(Unmovable, match=r"samples carry \['targets_task_labels', 'logits'\]"):
        resident(dataset)


def test_attributes_that_are_no_column_do_not_matter():
    hidden = DataAttribute(torch.zeros(12, 3), "logits")
    dataset = AvalancheDataset([view(tensors())], data_attributes=[hidden])
    assert_gives(resident(dataset).source, dataset)


class Sizes(Album):
    """Images ``odd`` are one pixel wider."""

    def __init__(self, arrays, targets, *odd):
        super().__init__(arrays, targets)
        for k in odd:
            self.images[k] = self.images[k].resize((SIDE + 1, SIDE))


@pytest.mark.parametrize("odd", [[1], [299], range(256, 300)])
def test_samples_of_different_size(odd):
    with pytest.raises(Unmovable, match=r"differ in shape or type \(the first is \(3, 4, 4\)"):
        resident(view(Sizes(*pixels(300), *odd), ToTensor()))


def test_samples_of_different_size_that_are_resized_first():
    dataset = view(Sizes(*pixels(12), 1), Compose([Resize((SIDE, SIDE)), ToTensor()]))
    assert_gives(resident(dataset).source, dataset)


class Of(Dataset):
    """Given samples."""

    def __init__(self, samples):
        self.samples = samples
        self.targets = [0] * len(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([(X, 0), (X.double(), 0)], r"differ in shape or type .*torch\.float32"),
        ([(X, 0.5)] * 2, r"labels must be whole numbers to be stored; got 0\.5"),
        ([(X, torch.tensor([0, 1]))] * 2, "labels must be whole numbers"),
        ([(X, torch.tensor(0.5))] * 2, "labels must be whole numbers"),
        ([(X, "cat")] * 2, "labels must be whole numbers to be stored; got 'cat'"),
        ([(X, 0, 7)] * 2, r"samples on the device differ from those of the data set itself"),
        ([(X, torch.tensor(3, dtype=torch.int32))] * 2, "samples on the device differ"),
        ([([1.0, 2.0], 0)] * 2, "list"),
        ([("text", 0)] * 2, "str"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_stored(samples, words, workers):
    with pytest.raises(Unmovable, match=words):
        resident(view(Of(samples)), workers=workers)


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_labels_of_any_kind(label):
    dataset = view(Of([(X, label)] * 3))
    assert_gives(resident(dataset).source, dataset)


@pytest.mark.parametrize("dataset", ["tensors", "album"])
def test_a_transform_of_x_and_y_together(dataset):
    data = tensors() if dataset == "tensors" else ALBUM
    joint = MultiParamTransformCallable(both)
    with pytest.raises(Unmovable, match=r"both|together"):
        resident(view(data, joint))


def test_a_transform_of_x_and_y_together_inside_torchvisions_data_set():
    data = Pictures(*pixels(12), transforms=both)
    with pytest.raises(Unmovable, match=r"Pictures transforms x and y together by .*both"):
        resident(view(data, ToTensor()))


def test_a_plain_data_set_that_transforms_by_itself():
    class Own(Album):
        transform = ToTensor()

    with pytest.raises(Unmovable, match=r"Own applies its own transform ToTensor\(\)"):
        resident(view(Own(*pixels(12))))


def test_parts_with_different_random_transforms():
    flip, crop = RandomHorizontalFlip(), RandomCrop(SIDE, padding=1)
    parts = [view(ALBUM, Compose([t, ToTensor()])) for t in (flip, crop)]
    with pytest.raises(Unmovable, match="different random transforms"):
        resident(parts[0].concat(parts[1]))
    alike = [view(ALBUM, Compose([RandomHorizontalFlip(), ToTensor()])) for _ in range(2)]
    assert len(resident(alike[0].concat(alike[1])).source) == 24


def test_parts_joined_by_torch_with_different_transforms():
    parts = [Pictures(*pixels(4), transform=t) for t in (ToTensor(), TO_FLOAT)]
    data = ConcatDataset(parts)
    data.targets = pixels(4)[1] * 2
    with pytest.raises(Unmovable, match="ConcatDataset have different transforms"):
        resident(view(data))


def test_a_transform_that_cannot_be_moved_is_named():
    with pytest.raises(Unmovable, match="Lambda"):
        resident(view(ALBUM, Compose([Lambda(plus_one), ToTensor()])))


def test_images_that_nothing_makes_a_tensor_of():
    with pytest.raises(Unmovable, match=r"leaves samples as Image, not as tensors; add ToTensor"):
        resident(view(ALBUM))


def test_random_transforms_are_left_to_each_batch():
    flip = Compose([RandomHorizontalFlip(p=1.0), ToTensor()])
    made = resident(view(ALBUM, flip))
    assert isinstance(made.source.transform, BatchCompose)
    arrays = torch.from_numpy(pixels(12)[0]).permute(0, 3, 1, 2)
    assert torch.equal(made.source.columns[0], arrays)
    x = made.source.gather(torch.arange(12), torch.Generator())[0]
    assert torch.equal(x, arrays.flip(-1) / 255)


def test_random_transforms_of_tensors():
    flip = Compose([RandomHorizontalFlip(p=1.0), ConvertImageDtype(torch.float32)])
    data = tensors(dtype=torch.uint8)
    for y_transform, nbytes, labels in ((None, 0, [0, 2]), (plus_one, 12 * (PIXELS + 16), [1, 3])):
        made = resident(view(data, flip, y_transform))
        assert made.nbytes == nbytes
        x, y, t = made.source.gather(torch.tensor([3, 2]))
        assert torch.equal(x, data.tensors[0][[3, 2]].flip(-1) / 255)
        assert (y.tolist(), t.tolist()) == (labels, [0, 0])


def test_labels_that_the_data_set_itself_knows_better():
    """The attribute ``targets`` says one thing, the samples another: samples count."""
    data = tensors()
    data.targets = [9] * 12
    dataset = view(data)
    assert_gives(resident(dataset).source, dataset)
