"""Split MNIST and Permuted MNIST on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from avalanche_ext.benchmarks.streams import (
    Images,
    _thin,
    benchmark_of,
    hold_out,
    split_by_class,
)

__all__ = ["load_mnist", "permuted_mnist", "split_mnist"]


def split_mnist(
    n_experiences: int = 5,
    *,
    scenario: str = "class",
    class_order: Sequence[int] | None = None,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
    root: str | Path | None = None,
    download: bool = False,
) -> Any:
    """MNIST in experiences of ``10 / n_experiences`` digits (also called Disjoint MNIST).

    Args:
        n_experiences: A divisor of 10; 5 gives the pairs 0/1, 2/3, ...
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental, see ``split_by_class``.
        class_order: The digits in the order of arrival.
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on a fifth of the training images instead; for choosing settings.
        seed: Seed of ``train_per_experience``.
        root: Folder that holds ``MNIST/raw``; Avalanche's data folder by default.
        download: Fetch the files if they are absent.

    Returns:
        An Avalanche benchmark with images ``(1, 28, 28)`` in [0, 1] and one test experience for
        each training experience.

    Raises:
        FileNotFoundError: If the files are absent and ``download`` is off.
    """
    train, test = load_mnist(root, download)
    if validation:
        train, test = hold_out(train)
    return split_by_class(
        train, test, n_experiences, scenario=scenario, class_order=class_order,
        train_per_experience=train_per_experience, seed=seed,
    )  # fmt: skip


def permuted_mnist(
    n_experiences: int = 10,
    *,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
    permutation_seed: int | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> Any:
    """MNIST under another fixed permutation of its pixels in every experience.

    Domain-incremental: ten classes throughout, no task label. The first experience is not
    permuted. The test set is permuted like the training set.

    Args:
        n_experiences: Number of permutations.
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on a fifth of the training images instead; for choosing settings.
        seed: Seed of the permutations and of ``train_per_experience``.
        permutation_seed: Seed of the permutations alone, where it is another.
        root: Folder that holds ``MNIST/raw``; Avalanche's data folder by default.
        download: Fetch the files if they are absent.

    Returns:
        An Avalanche benchmark with images ``(1, 28, 28)`` in [0, 1].

    Raises:
        FileNotFoundError: If the files are absent and ``download`` is off.
    """
    train, test = load_mnist(root, download)
    if validation:
        train, test = hold_out(train)
    generator = torch.Generator().manual_seed(seed)
    order = generator
    if permutation_seed is not None:
        order = torch.Generator().manual_seed(permutation_seed)
    streams: tuple[list[Images], list[Images]] = ([], [])
    for k in range(n_experiences):
        pixels = torch.arange(784) if k == 0 else torch.randperm(784, generator=order)
        images = _thin(train, train_per_experience, generator)
        streams[0].append((images[0].flatten(1)[:, pixels].view_as(images[0]), images[1]))
        streams[1].append((test[0].flatten(1)[:, pixels].view_as(test[0]), test[1]))
    return benchmark_of(*streams)


def load_mnist(root: str | Path | None = None, download: bool = False) -> tuple[Images, Images]:
    """MNIST's training and test images as float tensors in [0, 1], with labels.

    Raises:
        FileNotFoundError: If the files are absent and ``download`` is off.
    """
    from avalanche.benchmarks.datasets import default_dataset_location
    from torchvision.datasets import MNIST

    default = Path(default_dataset_location("mnist"))
    places = [Path(root).expanduser()] if root else [default, default.parent]
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]  # fmt: skip
    complete = [p for p in places if all((p / "MNIST" / "raw" / n).is_file() for n in names)]
    found = complete[0] if complete else None
    if found is None and not download:
        raise FileNotFoundError(
            f"MNIST is not in {' or '.join(str(p / 'MNIST' / 'raw') for p in places)}. Put the "
            f"four files {', '.join(names)} there, name their folder with root=, or pass "
            f"download=True."
        )
    parts = []
    for train in (True, False):
        data = MNIST(str(found or places[0]), train=train, download=found is None)
        parts.append((data.data.float().div(255)[:, None], data.targets))
    return parts[0], parts[1]
