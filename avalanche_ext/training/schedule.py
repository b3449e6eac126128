"""Learning rates over the epochs of an experience."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avalanche_ext.training.checks import check_nonnegative

__all__ = ["Schedule", "set_rate"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate of an epoch: a linear warm-up, then a factor 0.1 at each milestone.

    Args:
        lr: Learning rate after warm-up.
        warmup_epochs: In epoch e of the warm-up it is ``lr * (e + 1) / warmup_epochs``.
        milestones: Epochs of the drops, ascending, counted from the end of the warm-up.

    Raises:
        ValueError: For a number out of range.
    """

    lr: float = 0.1
    warmup_epochs: int = 10
    milestones: tuple[int, ...] = (100, 120)

    def __post_init__(self) -> None:
        check_nonnegative("Schedule", lr=self.lr, warmup_epochs=self.warmup_epochs)
        if list(self.milestones) != sorted({m for m in self.milestones if m >= 0}):
            raise ValueError(
                f"Schedule expects milestones >= 0 in ascending order; got {self.milestones}."
            )

    def at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        drops = sum(epoch - self.warmup_epochs >= m for m in self.milestones)
        return self.lr * 0.1**drops


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate, times its own ``lr_factor`` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
