"""Split CIFAR-100 on uint8 tensors, with the usual augmentation as torchvision transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avalanche_ext.benchmarks.streams import Images, hold_out, split_by_class

__all__ = ["CIFAR100_MEAN", "CIFAR100_STD", "load_cifar100", "split_cifar100"]

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


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
    from torchvision.transforms import (
        Compose,
        ConvertImageDtype,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
    )

    train, test = load_cifar100(root, download)
    if validation:
        train, test = hold_out(train)
    if class_order is not None:
        train, test = (_of_classes(part, class_order) for part in (train, test))
    to_float = [ConvertImageDtype(torch.float32), Normalize(CIFAR100_MEAN, CIFAR100_STD)]
    shift = [RandomCrop(32, padding=4), RandomHorizontalFlip()] if augment else []
    return split_by_class(
        train, test, n_experiences, scenario=scenario, class_order=class_order,
        first_classes=first_classes, train_per_experience=train_per_experience, seed=seed,
        train_transform=Compose([*shift, *to_float]), eval_transform=Compose(to_float),
    )  # fmt: skip


def load_cifar100(root: str | Path | None = None, download: bool = False) -> tuple[Images, Images]:
    """CIFAR-100's training and test images, uint8 ``(N, 3, 32, 32)``, with fine labels.

    Raises:
        FileNotFoundError: If the data are absent and ``download`` is off.
    """
    from avalanche.benchmarks.datasets import default_dataset_location
    from torchvision.datasets import CIFAR100

    default = Path(default_dataset_location("cifar100"))
    places = [Path(root).expanduser()] if root else [default, default.parent]
    for place in places:
        if (place / "cifar100.npz").is_file():
            with np.load(place / "cifar100.npz") as arrays:
                parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
            break
        if download or (place / "cifar-100-python").is_dir():
            files = [CIFAR100(str(place), train=t, download=download) for t in (True, False)]
            parts = [(data.data, np.array(data.targets)) for data in files]
            break
    else:
        raise FileNotFoundError(
            f"CIFAR-100 is not in {' or '.join(str(p) for p in places)}: neither cifar100.npz "
            f"(with x_train, y_train, x_test, y_test) nor torchvision's cifar-100-python. Name "
            f"the folder with root=, or pass download=True."
        )
    train, test = (
        (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long())
        for x, y in parts
    )
    return train, test


def _of_classes(images: Images, classes: Sequence[int]) -> Images:
    mine = torch.isin(images[1], torch.tensor(list(classes)))
    return images[0][mine], images[1][mine]
