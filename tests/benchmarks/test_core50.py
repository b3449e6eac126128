from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from avalanche_ext.benchmarks import core50, write_core50_tree
from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN, CHALLENGE_STD, NC_ORDER

TRAIN = (1, 2, 4, 5, 6, 8, 9, 11)


def marked(root: Path) -> Path:
    """The tree with session, object and frame painted into each first pixel."""
    for path in (root / "core50_128x128").rglob("*.png"):
        _, session, obj, frame = path.stem.split("_")
        image = Image.open(path).convert("RGB")
        image.putpixel((0, 0), (int(session), int(obj), int(frame)))
        image.save(path, compress_level=1)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return marked(write_core50_tree(tmp_path_factory.mktemp("core50") / "root", size=8))


def sizes(stream):
    return [len(e.dataset) for e in stream]


def classes(experience):
    return sorted(set(map(int, experience.dataset.targets)))


def where(x):
    pixel = x[:, 0, 0] * torch.tensor(CHALLENGE_STD) + torch.tensor(CHALLENGE_MEAN)
    return tuple((255 * pixel).round().int().tolist())


def test_ni(tree):
    benchmark = core50("ni", root=tree)
    assert sizes(benchmark.train_stream) == [100] * 8
    assert sizes(benchmark.test_stream) == [300]
    assert sizes(benchmark.valid_stream) == [15]
    assert {e.task_label for e in benchmark.train_stream} == {0}
    assert all(classes(e) == list(range(50)) for e in benchmark.train_stream)
    for k, session in enumerate(TRAIN):
        x, y, t = benchmark.train_stream[k].dataset[99]
        assert (where(x), y, t) == ((session, 50, 1), 49, 0)


def test_nc_has_task_labels_and_nine_test_experiences(tree):
    benchmark = core50("nc", root=tree)
    assert sizes(benchmark.train_stream) == [160] + [80] * 8
    assert sizes(benchmark.test_stream) == [60] + [30] * 8
    assert sizes(benchmark.valid_stream) == [3] + [2] * 8
    for stream in (benchmark.train_stream, benchmark.test_stream, benchmark.valid_stream):
        assert [e.task_label for e in stream] == list(range(9))
    for stream in (benchmark.train_stream, benchmark.test_stream):
        assert classes(stream[0]) == list(range(10))
        assert classes(stream[3]) == [20, 21, 22, 23, 24]
        # Run 0 of CORe50 brings objects 27, 32, 37, 42, 47 in its fourth experience.
        assert {where(x)[1] for x, *_ in stream[3].dataset} == {27, 32, 37, 42, 47}
    assert benchmark.n_classes_per_exp == [10] + [5] * 8


def test_nic_has_391_experiences_in_their_order(tree):
    benchmark = core50("nic", root=tree)
    assert sizes(benchmark.train_stream) == [20] + [2] * 390
    assert sizes(benchmark.test_stream) == [300]
    shown = [where(x)[:2] for e in benchmark.train_stream for x, *_ in e.dataset]
    assert shown[::2] == shown[1::2]
    assert set(shown) == {(s, o) for s in TRAIN for o in range(1, 51)}
    # Sorted by name, list 100 would come before list 11.
    for k in (11, 99, 100, 101, 390):
        lists = tree / "NIC_v2_391" / "run0" / f"train_batch_{k}_filelist.txt"
        name, label = lists.read_text().split()[:2]
        assert name.startswith("s{}/o{}/".format(*where(benchmark.train_stream[k].dataset[0][0])))
        assert classes(benchmark.train_stream[k]) == [int(label)]


def test_the_valid_stream_is_every_twentieth_test_image(tree):
    benchmark = core50("ni", root=tree)
    test, valid = benchmark.test_stream[0].dataset, benchmark.valid_stream[0].dataset
    for k in range(15):
        assert torch.equal(valid[k][0], test[20 * k][0])
        assert valid[k][1] == test[20 * k][1]
    assert {where(x)[0] for x, *_ in test} == {3, 7, 10}


def test_default_transforms_are_the_challenges(tree):
    dataset = core50("ni", root=tree).train_stream[0].dataset
    draws = [dataset[5][0] for _ in range(8)]  # a random flip would show
    assert all(torch.equal(draws[0], d) for d in draws[1:])
    assert draws[0].shape == (3, 8, 8)
    own = core50("ni", root=tree, train_transform=lambda image: image.size)
    assert own.train_stream[0].dataset[0][0] == (8, 8)
    assert isinstance(own.test_stream[0].dataset.eval()[0][0], torch.Tensor)
    assert isinstance(own.valid_stream[0].dataset.eval()[0][0], torch.Tensor)


def test_categories(tree):
    benchmark = core50("nc", root=tree, object_lvl=False)
    assert classes(benchmark.train_stream[0]) == list(range(10))
    for experience in (*benchmark.test_stream, *benchmark.train_stream):
        assert all((where(x)[1] - 1) // 5 == y for x, y, _ in experience.dataset)


@pytest.mark.parametrize(("track", "n"), [("ni", 6), ("nc", 9), ("nic", 291)])
def test_validation_holds_out_whole_training_sessions(tree, track, n):
    benchmark = core50(track, root=tree, validation=True)
    assert len(benchmark.train_stream) == n
    seen, tested = (
        {where(x)[0] for e in stream for x, *_ in e.dataset}
        for stream in (benchmark.train_stream, benchmark.test_stream)
    )
    assert (seen, tested) == (set(TRAIN[:6]), {9, 11})
    assert sum(sizes(benchmark.test_stream)) == 200


@pytest.mark.parametrize("track", ["ni", "nic"])
def test_it_agrees_with_avalanches_own(tree, track, tmp_path):
    from avalanche.benchmarks.classic import CORe50

    copy = shutil.copytree(tree, tmp_path / "copy")  # Avalanche writes into it
    theirs = CORe50(scenario={"ni": "ni", "nic": "nicv2_391"}[track], dataset_root=copy)
    ours = core50(track, root=tree)
    assert sizes(theirs.train_stream) == sizes(ours.train_stream)
    for k in (0, 1, 7):
        mine, other = ours.train_stream[k].dataset, theirs.train_stream[k].dataset
        assert list(mine.targets) == list(other.targets)
    mine, other = (b.test_stream[0].dataset.eval() for b in (ours, theirs))
    for k in (0, 7, 299):
        assert torch.equal(mine[k][0], other[k][0])
        assert mine[k][1] == other[k][1]


def test_the_tree_is_only_read(tree):
    before = sorted(p.name for p in tree.iterdir())
    for track in ("ni", "nc", "nic"):
        core50(track, root=tree)
    assert sorted(p.name for p in tree.iterdir()) == before


def test_the_pickles_say_what_the_lists_say(tree):
    paths, labels, lup, names = (
        pickle.loads((tree / f"{name}.pkl").read_bytes())
        for name in ("paths", "labels", "LUP", "labels2names")
    )
    assert len(paths) == len(set(paths)) == 1100
    for key, folder, n in (
        ("ni", "batches_filelists/NI_inc", 8),
        ("nc", "batches_filelists/NC_inc", 9),
        ("nicv2_391", "NIC_v2_391", 391),
    ):
        assert len(lup[key][0]) == len(labels[key][0]) == n + 1
        text = (tree / folder / "run0" / "test_filelist.txt").read_text()
        rows = zip(lup[key][0][-1], labels[key][0][-1], strict=True)
        assert text == "".join(f"{paths[i]} {y}\n" for i, y in rows)
    assert names["nc"][0][10] == "glass5"  # object 30
    assert NC_ORDER[10] == 30


def test_a_tree_overwrites_nothing(tree):
    with pytest.raises(FileExistsError, match="overwrites nothing"):
        write_core50_tree(tree)


@pytest.mark.data
def test_real_frames(core50_frames, tmp_path):
    root = write_core50_tree(tmp_path, frames=1, size=8)
    used = []
    for k, path in enumerate(sorted((root / "core50_128x128" / "s1").rglob("*.png"))):
        path.write_bytes(core50_frames[k].read_bytes())
        used.append(core50_frames[k])
    x, y, _ = core50("ni", root=root).train_stream[0].dataset[3]
    name = sorted((root / "core50_128x128" / "s1").rglob("*.png")).index(
        root / "core50_128x128/s1/o4/C_01_04_000.png"
    )
    pixels = torch.tensor(list(Image.open(used[name]).convert("RGB").getpixel((60, 64))))
    assert x.shape == (3, 128, 128)
    assert y == 3
    expected = (pixels / 255 - torch.tensor(CHALLENGE_MEAN)) / torch.tensor(CHALLENGE_STD)
    torch.testing.assert_close(x[:, 64, 60], expected)


def test_missing_files_are_named(tmp_path, tree):
    with pytest.raises(FileNotFoundError, match=r"core50_128x128 is missing.*toy_core50"):
        core50("ni", root=tmp_path)
    (tmp_path / "core50_128x128").mkdir()
    with pytest.raises(FileNotFoundError, match=r"NIC_v2_391/run0/train_batch_00_filelist.txt"):
        core50("nic", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="run1"):
        core50("ni", run=1, root=tree)
    with pytest.raises(FileNotFoundError, match="core50_32x32"):
        core50("ni", mini=True, root=tree)


@pytest.mark.parametrize(("name", "value"), [("track", "nicv2"), ("run", 10)])
def test_wrong_arguments(name, value, tree):
    with pytest.raises(ValueError, match=name):
        core50(**{"track": "ni", name: value}, root=tree)


def test_lists_that_cannot_be_are_refused(tmp_path):
    root = write_core50_tree(tmp_path, frames=1, size=8)
    lists = root / "batches_filelists" / "NC_inc" / "run0"
    first = lists / "train_batch_00_filelist.txt"
    text = first.read_text()
    first.write_text("".join(line + "\n" for line in text.splitlines() if not line.endswith(" 3")))
    with pytest.raises(ValueError, match=r"label 3 .* is tested but in no training list"):
        core50("nc", root=root)
    first.write_text("s1/o1/C_01_01_000.png\n")
    with pytest.raises(ValueError, match=r"line 1: expected .*path, space, label"):
        core50("nc", root=root)
    first.write_text("")
    with pytest.raises(ValueError, match="lists no images"):
        core50("nc", root=root)
    first.write_text(text)
    shutil.rmtree(root / "core50_128x128" / "s3" / "o1")
    with pytest.raises(FileNotFoundError, match=r"test_filelist\.txt lists it"):
        core50("nc", root=root)
