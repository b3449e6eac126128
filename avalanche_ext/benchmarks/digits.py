"""Split digits: real handwritten digits that come with scikit-learn, nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from avalanche_ext.benchmarks.streams import hold_out, split_by_class

__all__ = ["split_digits"]


def split_digits(
    n_experiences: int = 5,
    *,
    scenario: str = "class",
    class_order: Sequence[int] | None = None,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
) -> Any:
    """1,797 handwritten digits of 8 x 8 pixels, in experiences of ``10 / n_experiences`` classes.

    Pixels are scaled to [0, 1]. A fixed fifth of each class (359 images) is the test set, whatever
    the seed.

    Args:
        n_experiences: A divisor of 10.
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental, see ``split_by_class``.
            Domain-incremental with 5 experiences: the first or the second digit of a pair?
        class_order: The digits in the order of arrival.
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on a fifth of the training images instead; for choosing settings.
        seed: Seed of ``train_per_experience``.

    Returns:
        An Avalanche benchmark with images ``(1, 8, 8)`` and one test experience for each
        training experience.

    References:
        E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI.
    """
    from sklearn.datasets import load_digits

    images: Any = load_digits()
    x = torch.from_numpy(images.images).float().div(16)[:, None]
    y = torch.from_numpy(images.target).long()
    train, test = hold_out((x, y))
    if validation:
        train, test = hold_out(train, seed=1)
    return split_by_class(
        train, test, n_experiences, scenario=scenario, class_order=class_order,
        train_per_experience=train_per_experience, seed=seed,
    )  # fmt: skip
