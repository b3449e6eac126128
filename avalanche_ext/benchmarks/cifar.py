"""Split CIFAR-100, CIFAR-10 and SVHN on uint8 tensors, with the usual augmentation.

Images are kept as uint8 and made float by the data set's transforms, which are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from avalanche_ext.benchmarks.streams import Images, hold_out, split_by_class

__all__ = [
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "load_cifar100",
    "split_cifar10",
    "split_cifar100",
    "split_svhn",
]

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class _DataSet(NamedTuple):
    """Where a data set is, and in which units its images reach the network."""

    title: str
    name: str  # of Avalanche's folder, and of a packed file
    files: str  # what torchvision keeps
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR100 = _DataSet("CIFAR-100", "cifar100", "cifar-100-python", CIFAR100_MEAN, CIFAR100_STD)
_CIFAR10 = _DataSet("CIFAR-10", "cifar10", "cifar-10-batches-py", (0.5,) * 3, (0.5,) * 3)
_SVHN = _DataSet("SVHN", "svhn", "train_32x32.mat", (0.5,) * 3, (0.5,) * 3)


def split_cifar100(
    n_experiences: int = 10,
    *,
    scenario: str = "class",
    class_order: Sequence[int] | None = None,
    first_classes: int | None = None,
    train_per_experience: int | None = None,
    augment: bool = True,
    validation: bool = False,
    seed: int = 0,
    root: str | Path | None = None,
    download: bool = False,
) -> Any:
    """CIFAR-100 in experiences of ``100 / n_experiences`` classes.

    Images are kept as uint8 and made float, in units of standard deviations, by the data set's
    transforms; training images are shifted by up to 4 pixels and mirrored at random first.

    Args:
        n_experiences: A divisor of 100, or of the length of ``class_order``.
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental, see ``split_by_class``.
        class_order: The classes in the order of arrival; some of them only is a smaller benchmark.
        first_classes: Classes of the first experience, where it is larger (50 in B50).
        train_per_experience: Keep this many random training images of each experience.
        augment: Whether training images are shifted and mirrored.
        validation: Test on a fifth of the training images instead; for choosing settings.
        seed: Seed of ``train_per_experience``.
        root: Folder that holds ``cifar100.npz`` or torchvision's ``cifar-100-python``; Avalanche's
            data folder by default.
        download: Fetch the data if they are absent.

    Returns:
        An Avalanche benchmark with images ``(3, 32, 32)``.

    Raises:
        FileNotFoundError: If the data are absent and ``download`` is off.

    References:
        A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
    """
    return _split(
        _CIFAR100, root, download, validation, augment, n_experiences, scenario=scenario,
        class_order=class_order, first_classes=first_classes,
        train_per_experience=train_per_experience, seed=seed,
    )  # fmt: skip


def split_cifar10(
    n_experiences: int = 5, *, augment: bool = False, validation: bool = False,
    root: str | Path | None = None, download: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """CIFAR-10 in experiences of ``10 / n_experiences`` classes, values in [-1, 1].

    Args:
        n_experiences: A divisor of 10, or of the length of ``class_order``.
        augment: Whether training images are shifted and mirrored.
        validation: See ``split_cifar100``.
        root: Folder that holds ``cifar10.npz`` or torchvision's ``cifar-10-batches-py``.
        download: Fetch the data if they are absent.
        **options: As of ``split_cifar100``.

    Returns:
        An Avalanche benchmark with images ``(3, 32, 32)``.

    Raises:
        FileNotFoundError: If the data are absent and ``download`` is off.
    """
    return _split(_CIFAR10, root, download, validation, augment, n_experiences, **options)


def split_svhn(
    n_experiences: int = 5, *, augment: bool = False, validation: bool = False,
    root: str | Path | None = None, download: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Street View House Numbers in experiences of ``10 / n_experiences`` digits, in [-1, 1].

    Args:
        n_experiences: A divisor of 10, or of the length of ``class_order``.
        augment: Whether training images are shifted and mirrored.
        validation: See ``split_cifar100``.
        root: Folder that holds ``svhn.npz`` or torchvision's ``train_32x32.mat``.
        download: Fetch the data if they are absent.
        **options: As of ``split_cifar100``.

    Returns:
        An Avalanche benchmark with images ``(3, 32, 32)``.

    Raises:
        FileNotFoundError: If the data are absent and ``download`` is off.

    References:
        Netzer et al. (2011), Reading Digits in Natural Images with Unsupervised Feature Learning.
    """
    return _split(_SVHN, root, download, validation, augment, n_experiences, **options)


def load_cifar100(root: str | Path | None = None, download: bool = False) -> tuple[Images, Images]:
    """CIFAR-100's training and test images, uint8 ``(N, 3, 32, 32)``, with fine labels.

    Raises:
        FileNotFoundError: If the data are absent and ``download`` is off.
    """
    return _load(_CIFAR100, root, download)


def _split(
    kind: _DataSet, root: str | Path | None, download: bool, validation: bool, augment: bool,
    n_experiences: int, *, class_order: Sequence[int] | None = None, **options: Any,
) -> Any:  # fmt: skip
    from torchvision.transforms import (
        Compose,
        ConvertImageDtype,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
    )

    train, test = _load(kind, root, download)
    if validation:
        train, test = hold_out(train)
    if class_order is not None:
        train, test = (_of_classes(part, class_order) for part in (train, test))
    to_float = [ConvertImageDtype(torch.float32), Normalize(kind.mean, kind.std)]
    shift = [RandomCrop(32, padding=4), RandomHorizontalFlip()] if augment else []
    return split_by_class(
        train, test, n_experiences, class_order=class_order,
        train_transform=Compose([*shift, *to_float]), eval_transform=Compose(to_float),
        **options,
    )  # fmt: skip


def _load(kind: _DataSet, root: str | Path | None, download: bool) -> tuple[Images, Images]:
    from avalanche.benchmarks.datasets import default_dataset_location

    default = Path(default_dataset_location(kind.name))
    places = [Path(root).expanduser()] if root else [default, default.parent]
    for place in places:
        if (place / f"{kind.name}.npz").is_file():
            with np.load(place / f"{kind.name}.npz") as arrays:
                parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
            break
        if download or (place / kind.files).exists():
            parts = [
                _of_torchvision(kind, str(place), part, download) for part in ("train", "test")
            ]
            break
    else:
        raise FileNotFoundError(
            f"{kind.title} is not in {' or '.join(str(p) for p in places)}: neither "
            f"{kind.name}.npz (with x_train, y_train, x_test, y_test) nor torchvision's "
            f"{kind.files}. Name the folder with root=, or pass download=True."
        )
    train, test = (
        (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long())
        for x, y in parts
    )
    return train, test


def _of_torchvision(
    kind: _DataSet, place: str, part: str, download: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, 32, 32, 3)`` and labels."""
    from torchvision import datasets

    if kind is _SVHN:
        found = datasets.SVHN(place, split=part, download=download)
        return np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), np.array(found.labels)
    source = datasets.CIFAR100 if kind is _CIFAR100 else datasets.CIFAR10
    images = source(place, train=part == "train", download=download)
    return images.data, np.array(images.targets)


def _of_classes(images: Images, classes: Sequence[int]) -> Images:
    mine = torch.isin(images[1], torch.tensor(list(classes)))
    return images[0][mine], images[1][mine]
