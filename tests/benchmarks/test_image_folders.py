"""Streams from folders of images, on small trees in both layouts; colours tell the images apart."""

from __future__ import annotations

import pickle
import shutil

import avalanche.benchmarks.datasets as avalanche_datasets
import numpy as np
import pytest
import torch
from PIL import Image

from avalanche_ext.benchmarks import split_image_folder
from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN, CHALLENGE_STD
from avalanche_ext.benchmarks.streams import hold_out, split_by_class
from avalanche_ext.recipes import with_settings
from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.settings import to_json
from avalanche_ext.recipes.streams import BENCHMARKS, ImageFolder
from tests.conftest import naive

# Sorted as text: n10 comes before n2.
NAMES = ("n01", "n10", "n2", "n30", "n31", "n4")
TRAIN, TEST = 5, 2
SUFFIXES = ("JPEG", "jpg", "png", "PNG", "jpeg")
STEP = 40  # wide enough apart for JPEG


def paint(path, *colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), tuple(STEP * c for c in colour)).save(path)


def torchvision_tree(root):
    for k in (3, 1, 5, 0, 4, 2):
        for i in range(TRAIN):
            paint(root / "train" / NAMES[k] / f"{NAMES[k]}_{i}.{SUFFIXES[i]}", k, i, 1)
        for i in range(TEST):
            paint(root / "val" / NAMES[k] / f"val_{i}{k}.JPEG", k, i, 2)
    (root / "train" / "n01" / "boxes.txt").write_text("no image")
    (root / "train" / "n01" / "._n01_0.JPEG").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "readme.txt").write_text("no class")
    return root


def tiny_tree(root):
    lines = []
    for k, name in enumerate(NAMES):
        for i in range(TRAIN):
            paint(root / "train" / name / "images" / f"{name}_{i}.JPEG", k, i, 1)
        (root / "train" / name / f"{name}_boxes.txt").write_text("no image")
        for i in range(TEST):
            paint(root / "val" / "images" / f"val_{10 * i + k}.JPEG", k, i, 2)
            lines.append(f"val_{10 * i + k}.JPEG\t{name}\t0\t32\t44\t62")
    order = np.random.default_rng(0).permutation(len(lines))
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines[i] for i in order) + "\n")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return torchvision_tree(tmp_path_factory.mktemp("torchvision"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_tree(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["torchvision", "tiny"])
def root(request, tree, tiny):
    return tree if request.param == "torchvision" else tiny


@pytest.fixture
def copy(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "copy")


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def stored(experience):
    """(class, number, part) of each image, and the labels and task labels it comes with."""
    dataset = experience.dataset.remove_current_transform_group()
    images, labels, tasks = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    colours = [image.getpixel((8, 8)) for image in images]
    return [tuple(round(c / STEP) for c in colour) for colour in colours], labels, tasks


@pytest.fixture
def tiny_copy_of_five(tiny, tmp_path):
    """Without annotations of one class."""
    root = shutil.copytree(tiny, tmp_path / "five")
    file = root / "val" / "val_annotations.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "\tn31\t" not in line))
    return root


# the split --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6])
def test_every_image_comes_once_with_its_classes_place_in_the_sorted_names(root, n):
    benchmark = split_image_folder(root, n)
    for stream, per_class, part in (
        (benchmark.train_stream, TRAIN, 1),
        (benchmark.test_stream, TEST, 2),
    ):
        assert len(stream) == n
        seen = []
        for k, experience in enumerate(stream):
            marks, labels, tasks = stored(experience)
            assert set(labels) == set(range(k * 6 // n, (k + 1) * 6 // n))
            assert [m[0] for m in marks] == list(labels)
            assert set(tasks) == {0}
            seen += marks
        assert sorted(seen) == [(k, i, part) for k in range(6) for i in range(per_class)]
    assert benchmark.n_classes == 6


ORDER = (4, 0, 5, 2, 1, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_order": ORDER},
        {"class_order": ORDER, "scenario": "task"},
        {"class_order": ORDER, "scenario": "domain"},
        {"class_order": ORDER, "first_classes": 2},
        {"class_order": ORDER, "train_per_experience": 4, "seed": 3},
        {"class_order": ORDER, "validation": True},
        {"validation": True, "train_per_experience": 3, "first_classes": 4},
    ],
)
def test_the_split_is_that_of_the_same_labels_in_tensors(root, options):
    train, test = (
        (torch.tensor([(k, i, part) for k in range(6) for i in range(n)]),
         torch.arange(6).repeat_interleave(n))
        for n, part in ((TRAIN, 1), (TEST, 2))
    )  # fmt: skip
    of_tensors = dict(options)
    if of_tensors.pop("validation", False):
        train, test = hold_out(train)
    n = 3 if options.get("first_classes") != 2 else 5
    expected = split_by_class(train, test, n, **of_tensors)
    found = split_image_folder(root, n, **options)
    for name in ("train_stream", "test_stream"):
        for a, b in zip(getattr(expected, name), getattr(found, name), strict=True):
            rows = [(tuple(x.tolist()), int(y), int(t)) for x, y, t in a.dataset]
            ours = list(zip(*stored(b), strict=True))
            # Annotations come in an order of their own.
            assert rows == (ours if name == "train_stream" else sorted(ours, key=rows.index))


def test_labels_of_each_scenario_by_hand(root):
    names = {0: "n31", 1: "n01", 2: "n4", 3: "n2", 4: "n10", 5: "n30"}
    assert tuple(NAMES.index(names[k]) for k in range(6)) == ORDER
    for scenario, labels, tasks in (
        ("class", [(0, 1), (2, 3), (4, 5)], (0, 0, 0)),
        ("task", [(0, 1)] * 3, (0, 1, 2)),
        ("domain", [(0, 1)] * 3, (0, 0, 0)),
    ):
        benchmark = split_image_folder(root, 3, scenario=scenario, class_order=ORDER)
        for k, experience in enumerate(benchmark.test_stream):
            marks, given, task = stored(experience)
            by_class = {NAMES[m[0]]: label for m, label in zip(marks, given, strict=True)}
            assert by_class == dict(zip((names[2 * k], names[2 * k + 1]), labels[k], strict=True))
            assert set(task) == {tasks[k]}


def test_validation_holds_out_training_images_and_leaves_val_alone(root, tmp_path):
    shutil.copytree(root / "train", tmp_path / "train")  # and no val
    benchmark = split_image_folder(tmp_path, 2, validation=True)
    train, test = (
        [m for e in stream for m in stored(e)[0]]
        for stream in (benchmark.train_stream, benchmark.test_stream)
    )
    assert sorted(train + test) == [(k, i, 1) for k in range(6) for i in range(TRAIN)]
    assert [sum(m[0] == k for m in test) for k in range(6)] == [1] * 6


def test_some_of_the_classes_by_a_list_or_a_file(root, tmp_path):
    chosen = ["n31", "n10", "n2"]
    file = tmp_path / "classes.txt"
    file.write_text("n31\n\n n10 \nn2\n")
    for classes in (chosen, tuple(chosen), file, str(file)):
        benchmark = split_image_folder(root, 3, classes=classes)
        assert benchmark.n_classes == 3
        for k, place in enumerate((1, 2, 4)):
            marks, labels, _ = stored(benchmark.train_stream[k])
            assert marks == [(place, i, 1) for i in range(TRAIN)]
            assert set(labels) == {k}
            assert sorted(stored(benchmark.test_stream[k])[0]) == [
                (place, i, 2) for i in range(TEST)
            ]


def test_images_are_read_when_they_are_asked_for(copy):
    benchmark = split_image_folder(copy, 2)
    dataset = benchmark.train_stream[0].dataset
    (copy / "train" / "n01" / "n01_0.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"n01_0\.JPEG"):
        dataset[0]
    assert dataset[1][0].shape == (3, 224, 224)


def test_grey_images_become_colour_images(copy):
    path = copy / "val" / "n01" / "val_00.JPEG"
    Image.new("L", (20, 16), 100).save(path)
    x, y, _ = split_image_folder(copy, 2, size=14).test_stream[0].dataset[0]
    assert (x.shape, y) == ((3, 14, 14), 0)


def test_the_home_folder_may_be_a_tilde(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    (tree.parent / "some.txt").write_text("n01")
    benchmark = split_image_folder(f"~/{tree.name}", 1, classes="~/some.txt")
    assert benchmark.n_classes == 1


# transforms -------------------------------------------------------------------------------------


@pytest.fixture
def one_image(copy):
    """Put an image in the place of all training images of the first class."""

    def put(pixels):
        for old in (copy / "train" / "n01").iterdir():
            old.unlink()
        Image.fromarray(pixels).save(copy / "train" / "n01" / "only.png")
        return copy

    return put


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normal(pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CHALLENGE_MEAN, CHALLENGE_STD))
    return (torch.tensor(pixels).permute(2, 0, 1).float() / 255 - mean) / std


@pytest.mark.parametrize(("size", "height"), [(224, 256), (56, 64), (14, 16)])
def test_evaluation_takes_the_middle_of_an_image_of_the_usual_height(one_image, size, height):
    pixels = noise(height, height + 10)
    benchmark = split_image_folder(one_image(pixels), 1, size=size)
    top = (height - size) // 2
    expected = normal(pixels[top : top + size, top + 5 : top + 5 + size])
    torch.testing.assert_close(benchmark.train_stream[0].dataset.eval()[0][0], expected)
    x = benchmark.test_stream[0].dataset.eval()[0][0]
    assert (x.shape, x.dtype) == ((3, size, size), torch.float32)


def test_evaluation_scales_the_shorter_side_first(one_image):
    pixels = noise(16, 24)
    dataset = split_image_folder(one_image(pixels), 1, size=21).train_stream[0].dataset
    # 8 / 7 * 21 = 24 rows; of 24 and 36, 2 (1.5, to even) and 8 (7.5, to even) are cut in front.
    scaled = np.array(Image.fromarray(pixels).resize((36, 24), Image.Resampling.BILINEAR))
    torch.testing.assert_close(dataset.eval()[0][0], normal(scaled[2:23, 8:29]))


def test_training_images_are_cropped_and_mirrored_at_random(one_image):
    """Brightness rises by 8 a pixel from left to right; in a mirrored image it falls."""
    pixels = np.broadcast_to(8 * np.arange(32, dtype=np.uint8)[:, None], (32, 32, 3)).copy()
    dataset = split_image_folder(one_image(pixels), 1, size=16).train_stream[0].dataset
    draws = torch.stack([dataset[0][0] for _ in range(40)])
    assert draws.shape == (40, 3, 16, 16)
    rows = draws[:, 0, 0]
    assert torch.equal(rows[:, None].expand(-1, 16, -1), draws[:, 0])
    rises = (rows.diff() >= 0).all(1)
    assert torch.equal(rises, ~(rows.diff() <= 0).all(1))
    assert 10 < rises.sum() < 30
    # Brightness that a crop spans, as a part of the image's: sqrt(8 % * 3 / 4) at least.
    reach = (rows.amax(1) - rows.amin(1)) * CHALLENGE_STD[0] / (8 * 31 / 255)
    assert reach.min() > 0.15
    assert reach.min() < 0.5 < 0.8 < reach.max() <= 1.001


def test_without_augmentation_training_images_are_those_of_evaluation(one_image):
    benchmark = split_image_folder(one_image(noise(20, 20)), 1, size=14, augment=False)
    dataset = benchmark.train_stream[0].dataset
    assert torch.equal(dataset.train()[0][0], dataset.eval()[0][0])


def test_a_benchmark_can_be_pickled_and_trained_on(tree):
    benchmark = split_image_folder(tree, 2, size=8)
    experience = benchmark.train_stream[1]
    again = pickle.loads(pickle.dumps(experience.dataset))
    assert torch.equal(again.eval()[3][0], experience.dataset.eval()[3][0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    strategy = naive(model, [], lr=0.01, batch=5)
    tested = benchmark.test_stream[1].dataset.eval()
    x = torch.stack([tested[i][0] for i in range(len(tested))])
    y = torch.tensor(list(tested.targets))
    before = torch.nn.functional.cross_entropy(model(x), y)
    strategy.train(experience, eval_streams=[])
    assert torch.nn.functional.cross_entropy(model(x), y) < 0.8 * before


# what is wrong ----------------------------------------------------------------------------------


def test_absent_folders(tmp_path, copy):
    words = "train/CLASS/.*val/CLASS/.*val_annotations.txt.*root=; nothing is downloaded"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no/train does not exist.*{words}"):
        split_image_folder(tmp_path / "no", 2)
    (tmp_path / "empty" / "train" / ".hidden").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"empty/train holds no folders.*{words}"):
        split_image_folder(str(tmp_path / "empty"), 2)
    shutil.rmtree(copy / "val")
    with pytest.raises(FileNotFoundError, match=f"{copy}/val does not exist.*{words}"):
        split_image_folder(copy, 2)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images(copy, part):
    for path in (copy / part / "n2").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{part}/n2 holds no images that end in .jpg"):
        split_image_folder(copy, 2)
    left = [name for name in NAMES if name != "n2"]
    assert split_image_folder(copy, 5, classes=left).n_classes == 5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_three_images_are_enough_to_hold_one_out(copy, n):
    for path in sorted((copy / "train" / "n30").glob("n30*"))[n:]:
        path.unlink()
    if n == 3:
        benchmark = split_image_folder(copy, 6, validation=True)
        assert len(benchmark.train_stream[3].dataset) == 2
        assert len(benchmark.test_stream[3].dataset) == 1
        return
    with pytest.raises(ValueError, match=f"takes 3 or more; 'n30' has {n}"):
        split_image_folder(copy, 2, validation=True)


def test_a_tested_class_that_is_not_trained(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "train" / "n31")
    words = "has class 'n31', which is none of the 5 .* such as .*n30.*classes=."
    with pytest.raises(ValueError, match=words):
        split_image_folder(copy, 5)
    # Who names the classes wants no others.
    left = [name for name in NAMES if name != "n31"]
    assert split_image_folder(copy, 5, classes=left).n_classes == 5


def test_a_trained_class_that_is_not_tested(copy, tiny_copy_of_five):
    shutil.rmtree(copy / "val" / "n31")
    words = "has no images of 1 of the 6 classes, the first of which is 'n31'"
    for root, place in ((copy, "val"), (tiny_copy_of_five, "val/val_annotations.txt")):
        with pytest.raises(ValueError, match=f"{root}/{place} {words}"):
            split_image_folder(root, 2)


@pytest.mark.parametrize(
    "line", ["val_0.JPEG n01 0 32 44 62", "val_0.JPEG", "", "\tn01\t0", "a\t\t"]
)
def test_an_annotation_that_cannot_be_read(tiny_copy, line):
    file = tiny_copy / "val" / "val_annotations.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(ValueError, match=r"line 4: expected an image, a tab, its class") as error:
        split_image_folder(tiny_copy, 2)
    assert f"got {line!r}" in str(error.value)
    assert r"'val_0.JPEG\tn03444034\t0\t32\t44\t62'" in str(error.value)


def test_annotations_or_annotated_images_that_are_absent(tiny_copy):
    file = tiny_copy / "val" / "val_annotations.txt"
    first = file.read_text().split("\t")[0]
    (tiny_copy / "val" / "images" / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"images/{first} is missing.*lists it in line 1"):
        split_image_folder(tiny_copy, 2)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is missing: it gives"):
        split_image_folder(tiny_copy, 2)
    shutil.rmtree(tiny_copy / "val" / "images")
    file.write_text(f"{first}\tn01\n")
    with pytest.raises(FileNotFoundError, match=f"images/{first} is missing"):
        split_image_folder(tiny_copy, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"classes": ["n01", "n32"]},
            "classes names 'n32', which .* 6 .* such as n2, n31, n30.*unpack",
        ),
        ({"classes": ["n01", "zebra"]}, "classes names 'zebra', .* such as n01, n10, n2. Correct"),
        ({"classes": ["n01", "n2", "n01"]}, "one name or more, each once; got n01 more than once"),
        ({"classes": []}, "one name or more, each once; got none"),
        ({"class_order": (0, 1)}, "class_order must be a permutation"),
        ({"scenario": "online"}, "scenario to be one of"),
        ({"n_experiences": 4}, "6 classes cannot be cut into 4"),
        ({"first_classes": 5}, "first_classes=5 of 6 leaves 1"),
        ({"train_per_experience": 0}, "train_per_experience >= 1"),
        ({"size": 0}, "whole number of pixels as size.*got 0"),
        ({"size": 56.0}, "whole number of pixels as size.*got 56.0"),
        ({"size": True}, "whole number of pixels as size.*got True"),
    ],
)
def test_bad_arguments(tree, options, words):
    with pytest.raises(ValueError, match=words):
        split_image_folder(tree, **{"n_experiences": 3, **options})


def test_a_file_of_classes_that_is_absent(tree):
    with pytest.raises(FileNotFoundError, match="classes='n01' expects a text file"):
        split_image_folder(tree, 1, classes="n01")


# recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "classes", "size"),
    [("imagenet100", 100, 224), ("tinyimagenet", 200, 56), ("imagenet", 1000, 224)],
)
def test_the_settings_know_the_data_set(dataset, classes, size):
    settings = ImageFolder(dataset=dataset)
    assert (settings.n_classes, settings.n_outputs) == (classes, classes)
    assert settings.in_shape == (3, size, size)
    assert len(settings.ordered(1993)) == classes
    assert ImageFolder(dataset=dataset, scenario="task").n_outputs == classes // 10
    assert settings.smoke() == ImageFolder(dataset=dataset, train_per_experience=40, size=32)
    assert BENCHMARKS["ImageFolder"] is ImageFolder


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("imagenet100", "imagenet100"), ("tinyimagenet", "tinyimagenet/tiny-imagenet-200")],
)
def test_the_settings_look_in_avalanches_data_folder(root, tmp_path, monkeypatch, dataset, folder):
    monkeypatch.setattr(avalanche_datasets, "default_dataset_location", lambda n: tmp_path / n)
    settings = ImageFolder(dataset=dataset, total_classes=6, n_experiences=3, size=14)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{folder}/train does not exist"):
        settings.build(0)
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).symlink_to(root)
    assert settings.build(0).n_classes == 6


def test_the_settings_build_what_they_say(tree, tmp_path):
    (tmp_path / "four.txt").write_text("n4\nn10\nn01\nn31\n")
    settings = ImageFolder(
        root=str(tree), classes=str(tmp_path / "four.txt"), total_classes=4, n_experiences=2,
        first_classes=1, size=14, augment=False, validation=True, train_per_experience=3,
    )  # fmt: skip
    order = tuple(np.random.RandomState(7).permutation(4))
    places = [(0, 1, 4, 5)[i] for i in order]
    for built in (settings, settings.smoke()):
        benchmark = built.build(0, order_seed=7)
        marks, _, _ = stored(benchmark.train_stream[0])
        assert {m[0] for m in marks} == {places[0]}
        assert [m[2] for e in benchmark.test_stream for m in stored(e)[0]] == [1] * 4
        sizes = [len(e.dataset) for e in benchmark.train_stream]
        assert sizes == ([3, 3] if built is settings else [4, 12])
        size = 14 if built is settings else 32
        assert benchmark.train_stream[0].dataset[0][0].shape == built.in_shape == (3, size, size)


@pytest.mark.parametrize("augment", [True, False])
def test_the_settings_augment_or_not(one_image, augment):
    root = str(one_image(noise(20, 20)))
    settings = ImageFolder(root=root, total_classes=6, n_experiences=1, size=14, augment=augment)
    dataset = settings.build(0).train_stream[0].dataset
    assert torch.equal(dataset.train()[0][0], dataset.eval()[0][0]) is not augment


def test_the_settings_hold_the_folder_to_the_number_of_classes(tree):
    with pytest.raises(ValueError, match=r"expects 100 classes .* brings 6. Set total_classes=6"):
        ImageFolder(root=str(tree), n_experiences=2).build(0)


def test_an_unknown_data_set_lists_the_known():
    with pytest.raises(ValueError, match=r"no dataset 'tiny'. Close: tinyimagenet. There are ima"):
        ImageFolder(dataset="tiny")


def test_the_settings_are_read_from_text_and_written():
    recipe = Recipe(name="er/mine", method="er", benchmark=ImageFolder())
    text = {"benchmark.dataset": "tinyimagenet", "benchmark.size": "64", "benchmark.root": "/a"}
    changed = with_settings(recipe, text)
    assert changed.benchmark == ImageFolder(dataset="tinyimagenet", size=64, root="/a")
    assert to_json(changed)["benchmark"]["kind"] == "ImageFolder"
