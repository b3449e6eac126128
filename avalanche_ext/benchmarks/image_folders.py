"""Class-incremental streams from folders of images: ImageNet, parts of it, Tiny ImageNet.

Two layouts are read, each as it is distributed:

* torchvision's: ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``;
* Tiny ImageNet's: ``train/CLASS/images/*.JPEG``, ``val/images/*.JPEG`` and
  ``val/val_annotations.txt``, with an image and its class on each line.

Images end in ``.jpg``, ``.jpeg`` or ``.png``, in small or capital letters. The number of a class is
its place among the sorted names. ``val`` is the test stream, as in the literature: ImageNet's own
test labels were never published. Nothing is downloaded; the folder is only read.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN as IMAGENET_MEAN
from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_STD as IMAGENET_STD
from avalanche_ext.benchmarks.streams import Images, cut_by_class, hold_out

__all__ = ["split_image_folder"]

SUFFIXES = (".jpg", ".jpeg", ".png")
ANNOTATIONS = "val_annotations.txt"


def split_image_folder(
    root: str | Path,
    n_experiences: int,
    *,
    scenario: str = "class",
    classes: Sequence[str] | str | Path | None = None,
    class_order: Sequence[int] | None = None,
    first_classes: int | None = None,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
    size: int = 224,
    augment: bool = True,
) -> Any:
    """A folder of images, or some of its classes, in experiences of classes of their own.

    Training images are cropped at random (area 8 to 100 %, aspect 3:4 to 4:3), scaled to ``size``
    and mirrored at random. In evaluation the shorter side becomes ``8 / 7 * size`` and the middle
    is taken: 256 and 224 for ImageNet; for Tiny ImageNet, with ``size=56``, the middle of an image
    that keeps its 64 pixels. Both are then normalised with ImageNet's mean and deviation.

    Args:
        root: Folder that holds ``train`` and ``val``.
        n_experiences: A divisor of the number of classes.
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental, see ``split_by_class``.
        classes: Names of the classes to use, or a text file with one on each line; all by
            default. They are numbered in the order of their names, whatever the order here;
            ``val`` may then hold classes that ``train`` lacks.
        class_order: All numbers of classes in the order of arrival; ascending by default.
        first_classes: Classes of the first experience, where it is larger (half of them in B50).
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on a fifth of each class's training images instead; for choosing settings.
            ``val`` is not looked at then.
        seed: Seed of ``train_per_experience``.
        size: Height and width of the images that the network sees; 56 for Tiny ImageNet.
        augment: Whether training images are cropped and mirrored at random; otherwise they are
            as in evaluation.

    Returns:
        An Avalanche benchmark with images ``(3, size, size)`` and one test experience for each
        training experience; images are read from disk when they are asked for. Its ``n_classes``
        counts the classes.

    Raises:
        FileNotFoundError: If a folder, its classes or its images are absent.
        ValueError: If the annotations cannot be understood, ``train`` and ``val`` or ``classes``
            name different classes, or the stream asked for does not exist.

    References:
        O. Russakovsky et al. (2015), ImageNet Large Scale Visual Recognition Challenge, IJCV.
        Y. Le, X. Yang (2015), Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N.
    """
    from avalanche.benchmarks import paths_benchmark

    train_transform, eval_transform = _transforms(size, augment)
    base = Path(root).expanduser()
    folders = _class_folders(base / "train")
    names = sorted(folders) if classes is None else _chosen(classes, folders)
    files, train = _numbered({name: _images(folders[name]) for name in names})
    if validation:
        _check_enough(names, train)
        test_files = files
        train, test = hold_out(train)
    else:
        test_files, test = _numbered(_test_images(base / "val", names, classes is None))
    train_parts, test_parts = cut_by_class(
        train, test, n_experiences, scenario=scenario, class_order=class_order,
        first_classes=first_classes, train_per_experience=train_per_experience, seed=seed,
    )  # fmt: skip
    benchmark: Any = paths_benchmark(
        _listed(files, train_parts), _listed(test_files, test_parts),
        task_labels=list(range(n_experiences)) if scenario == "task" else [0] * n_experiences,
        train_transform=train_transform, eval_transform=eval_transform,
    )  # fmt: skip
    benchmark.n_classes = len(names)
    return benchmark


def _transforms(size: int, augment: bool) -> tuple[Any, Any]:
    """From a PIL image: the transforms of training and of evaluation."""
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )

    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"split_image_folder expects a whole number of pixels as size, such as 224 for "
            f"ImageNet or 56 for Tiny ImageNet; got {size!r}."
        )
    to_float = [ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    middle = Compose([Resize(round(size * 8 / 7)), CenterCrop(size), *to_float])
    if not augment:
        return middle, middle
    return Compose([RandomResizedCrop(size), RandomHorizontalFlip(), *to_float]), middle


def _class_folders(part: Path) -> dict[str, Path]:
    """The folders of the classes by name; hidden folders are none."""
    inside = part.iterdir() if part.is_dir() else ()
    found = {p.name: p for p in inside if p.is_dir() and not p.name.startswith(".")}
    if not found:
        state = "holds no folders" if part.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{part} {state}. Expected a folder of images for each class, train/CLASS/*.JPEG and "
            f"val/CLASS/*.JPEG, or Tiny ImageNet as it is distributed (train/CLASS/images/*.JPEG, "
            f"val/images/*.JPEG and val/{ANNOTATIONS}). Unpack the data set there, or name the "
            f"folder that holds train and val with root=; nothing is downloaded."
        )
    return found


def _images(folder: Path) -> list[str]:
    """Paths of the images in a class's folder, or in ``images`` below it, sorted."""
    inner = folder / "images"
    place = inner if inner.is_dir() else folder
    found = sorted(
        name for name in os.listdir(place)
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )  # fmt: skip
    if not found:
        raise FileNotFoundError(
            f"{place} holds no images that end in {', '.join(SUFFIXES)}. Unpack this class again, "
            f"or leave it out with classes=."
        )
    return [f"{place}/{name}" for name in found]


def _chosen(classes: Sequence[str] | str | Path, known: Collection[str]) -> list[str]:
    """The names that are asked for, sorted; each must be known."""
    if isinstance(classes, (str, Path)):
        path = Path(classes).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"classes={str(classes)!r} expects a text file with the name of a class on each "
                f"line, and there is none. Give its path, or the names as a list."
            )
        lines = path.read_text("utf-8").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if not classes or repeated:
        got = f"{', '.join(repeated)} more than once" if repeated else "none"
        raise ValueError(f"classes expects one name or more, each once; got {got}.")
    for name in classes:
        if name not in known:
            raise ValueError(
                f"classes names {name!r}, {_not_in_train(name, known)}. Correct it, or "
                f"unpack this class in train."
            )
    return sorted(classes)


def _not_in_train(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"which is none of the {len(known)} classes that have a folder in train, such as "
        f"{', '.join(near or sorted(known)[:3])}"
    )


def _test_images(part: Path, names: Sequence[str], every: bool) -> dict[str, list[str]]:
    """Paths of the test images of each class of ``names``, by annotations or by folders.

    Where ``every`` class of ``train`` is used, there must be no others.
    """
    if (part / ANNOTATIONS).is_file():
        annotated = _annotated(part)
        _check_same_classes(part / ANNOTATIONS, annotated, names, every)
        return {name: annotated[name] for name in names}
    folders = _class_folders(part)
    if folders.keys() == {"images"} and "images" not in names:
        raise FileNotFoundError(
            f"{part / ANNOTATIONS} is missing: it gives the class of each of the images in "
            f"{part / 'images'}. Unpack Tiny ImageNet again."
        )
    _check_same_classes(part, folders, names, every)
    return {name: _images(folders[name]) for name in names}


def _annotated(part: Path) -> dict[str, list[str]]:
    """Paths of Tiny ImageNet's validation images by class, in the order of the annotations."""
    found: dict[str, list[str]] = {}
    folder = part / "images"
    present = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
    lines = (part / ANNOTATIONS).read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        image, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if not image or not name:
            raise ValueError(
                f"{part / ANNOTATIONS}, line {number}: expected an image, a tab, its class, a "
                f"tab and more, such as 'val_0.JPEG\\tn03444034\\t0\\t32\\t44\\t62'; got "
                f"{line!r}. Unpack Tiny ImageNet again."
            )
        if image not in present:
            raise FileNotFoundError(
                f"{folder / image} is missing, though {part / ANNOTATIONS} lists it in "
                f"line {number}. Unpack Tiny ImageNet again."
            )
        found.setdefault(name, []).append(f"{folder}/{image}")
    return found


def _check_same_classes(
    place: Path, tested: Collection[str], names: Sequence[str], every: bool
) -> None:
    """Every class of the stream must be tested, and, of ``every`` class, no other."""
    for name in sorted(tested):
        if every and name not in names:
            raise ValueError(
                f"{place} has class {name!r}, {_not_in_train(name, names)}. Unpack this class in "
                f"train, or name the classes to use with classes=."
            )
    untested = [name for name in names if name not in tested]
    if untested:
        raise ValueError(
            f"{place} has no images of {len(untested)} of the {len(names)} classes, the first of "
            f"which is {untested[0]!r}. Unpack them in val, or leave these classes out with "
            f"classes=."
        )


def _check_enough(names: Sequence[str], train: Images) -> None:
    """A fifth of each class must be an image at least."""
    for name, n in zip(names, train[1].bincount().tolist(), strict=True):
        if n < 3:
            raise ValueError(
                f"validation=True holds out a fifth of each class's training images, which takes 3 "
                f"or more; {name!r} has {n}. Add images, or leave it out with classes=."
            )


def _numbered(images: Mapping[str, list[str]]) -> tuple[list[str], Images]:
    """All paths, and for each its number in that list and the number of its class."""
    paths = [path for group in images.values() for path in group]
    sizes = torch.tensor([len(group) for group in images.values()])
    labels = torch.arange(len(images)).repeat_interleave(sizes)
    return paths, (torch.arange(len(paths)), labels)


def _listed(paths: Sequence[str], parts: Sequence[Images]) -> list[list[tuple[str, int]]]:
    """The path and the label of every image of every experience."""
    return [
        [(paths[int(i)], int(label)) for i, label in zip(x.tolist(), y.tolist(), strict=True)]
        for x, y in parts
    ]
