"""Accuracy and loss that stay on the device until they are reported.

Avalanche's metrics turn a tensor into a Python number at every step, and so make an accelerator
finish all queued work each time. These keep their sums on the device and are read once per epoch,
experience or stream. Names, hooks and numbers are Avalanche's: change one import.

Metrics that report every iteration have to be read every iteration; they are not offered here.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics as _avalanches_accuracy
from avalanche.evaluation.metrics import loss_metrics as _avalanches_loss
from torch import Tensor

__all__ = ["DeviceAccuracy", "DeviceLoss", "accuracy_metrics", "loss_metrics"]


class _DeviceMean:
    """A weighted mean whose sum lives where its values live, in float64."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sum: Tensor | None = None
        self._weight = 0

    def add(self, value: Tensor, weight: int) -> None:
        """Add a value that is already multiplied by its weight, without reading it."""
        value = value.detach().double()
        self._sum = value if self._sum is None else self._sum + value
        self._weight += weight

    def result(self) -> float:
        """The mean; 0 before the first value, as in Avalanche. This reads the device."""
        return float(self._sum) / self._weight if self._sum is not None and self._weight else 0.0


class DeviceAccuracy(_DeviceMean):
    """Share of samples whose largest output is the label."""

    def update(self, predicted_y: Tensor, true_y: Tensor) -> None:
        """Count one mini-batch.

        Shapes:
            predicted_y ``(B,)`` labels or ``(B, C)`` outputs; true_y likewise.

        Raises:
            ValueError: If the two differ in length.
        """
        if len(predicted_y) != len(true_y):
            raise ValueError(
                f"accuracy expects as many predictions as labels; got {len(predicted_y)} and "
                f"{len(true_y)}."
            )
        guesses, labels = (y.argmax(1) if y.ndim > 1 else y for y in (predicted_y, true_y))
        self.add((guesses == labels).sum(), len(true_y))


class DeviceLoss(_DeviceMean):
    """Mean loss per sample."""

    def update(self, loss: Tensor, patterns: int) -> None:
        """Count the mean loss of a mini-batch of ``patterns`` samples."""
        self.add(torch.mean(loss.detach()).double() * patterns, patterns)


def accuracy_metrics(
    *,
    epoch: bool = False,
    experience: bool = False,
    stream: bool = False,
    trained_experience: bool = False,
) -> list[Any]:
    """Avalanche's ``accuracy_metrics`` of the same arguments, kept on the device.

    Args:
        epoch: Over a training epoch, ``Top1_Acc_Epoch``.
        experience: Over each evaluated experience, ``Top1_Acc_Exp``.
        stream: Over the evaluated stream, ``Top1_Acc_Stream``.
        trained_experience: Over the experiences trained on so far.
    """
    metrics: list[Any] = _avalanches_accuracy(
        epoch=epoch, experience=experience, stream=stream, trained_experience=trained_experience
    )
    for metric in metrics:
        metric._metric = DeviceAccuracy()
    return metrics


def loss_metrics(
    *, epoch: bool = False, experience: bool = False, stream: bool = False
) -> list[Any]:
    """Avalanche's ``loss_metrics`` of the same arguments, kept on the device.

    Args:
        epoch: Over a training epoch, ``Loss_Epoch``.
        experience: Over each evaluated experience, ``Loss_Exp``.
        stream: Over the evaluated stream, ``Loss_Stream``.
    """
    metrics: list[Any] = _avalanches_loss(epoch=epoch, experience=experience, stream=stream)
    for metric in metrics:
        metric._metric = metric._loss = DeviceLoss()  # Avalanche's class keeps it under both names
    return metrics
