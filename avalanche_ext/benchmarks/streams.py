"""Cut labelled images into the experiences of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import tensors_benchmark
from torch import Tensor

from avalanche_ext.training.checks import check_count, check_one_of

__all__ = ["SCENARIOS", "Images", "benchmark_of", "cut_by_class", "hold_out", "split_by_class"]

Images = tuple[Tensor, Tensor]
SCENARIOS = ("class", "task", "domain")


def split_by_class(
    train: Images,
    test: Images,
    n_experiences: int,
    *,
    scenario: str = "class",
    class_order: Sequence[int] | None = None,
    first_classes: int | None = None,
    train_per_experience: int | None = None,
    seed: int = 0,
    **transforms: Any,
) -> Any:
    """A stream in which every experience brings its own classes.

    Args:
        train: Images ``(N, ...)`` and labels ``(N,)``.
        test: The same for the test stream; it is cut like the training stream.
        n_experiences: Number of experiences; it must divide the number of classes.
        scenario: ``"class"``: labels 0, 1, 2, ... in the order of arrival, one head, no task
            label. ``"task"``: labels start again at 0 in every experience and the task label is
            given. ``"domain"``: labels start again at 0 and no task label is given.
        class_order: The classes in the order of arrival; ascending by default.
        first_classes: Classes of the first experience, where it is larger than the others (half
            of all, in the protocols called B50); ``"class"`` scenario only. The others divide
            the rest.
        train_per_experience: Keep this many random training images of each experience.
        seed: Seed of that choice.
        **transforms: ``train_transform`` and ``eval_transform`` of the images.

    Raises:
        ValueError: If the classes cannot be divided, or the order is not a permutation of them.
    """
    streams = cut_by_class(
        train, test, n_experiences, scenario=scenario, class_order=class_order,
        first_classes=first_classes, train_per_experience=train_per_experience, seed=seed,
    )  # fmt: skip
    return benchmark_of(*streams, task_labels=scenario == "task", **transforms)


def cut_by_class(
    train: Images,
    test: Images,
    n_experiences: int,
    *,
    scenario: str = "class",
    class_order: Sequence[int] | None = None,
    first_classes: int | None = None,
    train_per_experience: int | None = None,
    seed: int = 0,
) -> tuple[list[Images], list[Images]]:
    """The training and the test images of every experience, with the labels they get there.

    Arguments and errors are those of ``split_by_class``. What stands for an image may be anything
    that has a row for each label: numbers of files, where the images stay on disk.
    """
    check_one_of("split_by_class", "scenario", scenario, SCENARIOS)
    check_count("split_by_class", train_per_experience=train_per_experience)
    classes = sorted(train[1].unique().tolist())
    order = classes if class_order is None else [int(c) for c in class_order]
    if sorted(order) != classes:
        raise ValueError(f"class_order must be a permutation of {classes}; got {order}.")
    sizes = _sizes(len(classes), n_experiences, first_classes, scenario)
    starts = [sum(sizes[:k]) for k in range(n_experiences)]
    chosen = [order[start : start + n] for start, n in zip(starts, sizes, strict=True)]
    generator = torch.Generator().manual_seed(seed)

    def cut(images: Images, k: int) -> Images:
        x, y = images
        own, place = torch.tensor(chosen[k]).sort()
        mine = torch.isin(y, own)
        position = place[torch.searchsorted(own, y[mine].long())]
        return x[mine], position + (starts[k] if scenario == "class" else 0)

    train_parts, test_parts = (
        [cut(images, k) for k in range(n_experiences)] for images in (train, test)
    )
    return [_thin(images, train_per_experience, generator) for images in train_parts], test_parts


def _sizes(n_classes: int, n: int, first: int | None, scenario: str) -> list[int]:
    """Classes of each experience."""
    if first is None:
        if n < 1 or n_classes % n:
            raise ValueError(
                f"{n_classes} classes cannot be cut into {n} equal experiences; use a divisor of "
                f"{n_classes}."
            )
        return [n_classes // n] * n
    rest = n_classes - first
    if scenario != "class" or n < 2 or not 0 < first < n_classes or rest % (n - 1):
        raise ValueError(
            f"first_classes={first} of {n_classes} leaves {rest}, which {n - 1} further "
            f"experiences cannot divide equally; use n_experiences - 1 = a divisor of {rest}, and "
            f"the 'class' scenario (got {scenario!r})."
        )
    return [first] + [rest // (n - 1)] * (n - 1)


def benchmark_of(
    train: list[Images], test: list[Images], *, task_labels: bool = False, **transforms: Any
) -> Any:
    """An Avalanche benchmark with one experience for each pair of tensors."""
    return tensors_benchmark(
        train_tensors=train,
        test_tensors=test,
        task_labels=list(range(len(train))) if task_labels else [0] * len(train),
        **transforms,
    )


def hold_out(images: Images, share: float = 0.2, seed: int = 0) -> tuple[Images, Images]:
    """Split images at random into a larger and a smaller part, the same share of each class."""
    x, y = images
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        mine = torch.nonzero(y == c)[:, 0]
        order = torch.randperm(len(mine), generator=generator)
        out[mine[order[: round(share * len(mine))]]] = True
    return (x[~out], y[~out]), (x[out], y[out])


def _thin(images: Images, n: int | None, generator: torch.Generator) -> Images:
    if n is None or n >= len(images[1]):
        return images
    kept = torch.randperm(len(images[1]), generator=generator)[:n]
    return images[0][kept], images[1][kept]
