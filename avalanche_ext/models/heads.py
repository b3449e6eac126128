"""Classifier heads whose tensors keep their shape while classes arrive.

Avalanche's ``IncrementalClassifier`` replaces its linear layer when a class arrives: new parameter
objects of a new shape, which compiled code, captured graphs and optimizer state do not survive.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from avalanche.models import DynamicModule, IncrementalClassifier
from torch import Tensor, nn
from torch.nn.utils import skip_init

__all__ = ["FixedSizeClassifier"]


class FixedSizeClassifier(DynamicModule):
    r"""A linear head of ``max_classes`` units that acts like Avalanche's growing head.

    .. math:: z_c = w_c^\top x + b_c \text{ for the classes seen in training, else } \mathrm{mask}

    Equal to ``IncrementalClassifier`` in loss, gradients and predictions: units come into use at
    the same adaptations (in evaluation too, where they stay masked), with the same random draws in
    the same order. Units that the growing head would not have yet are zero in weight and bias;
    their gradient is zero, so weight decay and momentum leave them at zero.

    Two differences follow from the constant shape. Avalanche restarts the optimizer's state of a
    head that has grown, while here the parameters, and so their state, go on (``CompilePlugin``
    restarts it, to keep the equality). A head that grows in an evaluation in the middle of an
    experience goes on to learn here; Avalanche's is a new object that the optimizer meets at the
    next experience only.

    The output is ``max_classes`` wide: losses that average over all outputs (label smoothing,
    squared error) see the masked columns, and need the columns of the seen classes instead.

    Args:
        in_features: Width of the input.
        max_classes: Number of units; labels are 0 to ``max_classes - 1``.
        initial_out_features: Units in use from the start, as in ``IncrementalClassifier``.
        masking: Mask units in use whose class has not been trained on. Units that are not in use
            are masked in any case.
        mask_value: What a masked unit puts out.
        auto_adapt: Whether Avalanche's recursive adaptation visits this head.

    Shapes:
        Input (B, D), output (B, max_classes). ``classifier.weight`` is (max_classes, D),
        ``active_units`` is (max_classes,).

    Raises:
        ValueError: If a label, or a converted head, needs more than ``max_classes`` units.
    """

    classifier: nn.Linear
    active_units: Tensor
    units_in_use: Tensor

    def __init__(
        self,
        in_features: int,
        max_classes: int,
        *,
        initial_out_features: int = 2,
        masking: bool = True,
        mask_value: float = -1000,
        auto_adapt: bool = True,
    ) -> None:
        super().__init__(auto_adapt=auto_adapt)
        if isinstance(max_classes, bool) or not isinstance(max_classes, int) or max_classes < 1:
            raise ValueError(
                f"FixedSizeClassifier expects a whole number max_classes >= 1; got {max_classes!r}."
            )
        self.masking = masking
        self.mask_value = mask_value
        # skip_init draws no random numbers: the units draw theirs when they come into use.
        self.classifier = cast(nn.Linear, skip_init(nn.Linear, in_features, max_classes))
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.zero_()
        self.register_buffer("active_units", torch.zeros(max_classes, dtype=torch.int8))
        self.register_buffer("units_in_use", torch.zeros((), dtype=torch.int64))
        self._extend(initial_out_features)

    @classmethod
    def from_incremental(cls, head: nn.Module, max_classes: int) -> FixedSizeClassifier:
        """A fixed head that goes on where an ``IncrementalClassifier`` stands.

        Args:
            head: The growing head; it is left as it is.
            max_classes: Number of units of the new head.

        Raises:
            TypeError: If ``head`` is not exactly an ``IncrementalClassifier``: a multi-head
                classifier adds whole heads, and a subclass may adapt in its own way.
            ValueError: If it has more than ``max_classes`` units.
        """
        if type(head) is not IncrementalClassifier:
            raise TypeError(
                f"FixedSizeClassifier can take over an avalanche.models.IncrementalClassifier, not "
                f"a {type(head).__name__}, whose adaptation it would lose. Leave that head as it "
                f"is, or build the model with a FixedSizeClassifier."
            )
        linear = head.classifier
        fixed = cls(
            linear.in_features,
            max_classes,
            initial_out_features=0,
            masking=head.masking,
            mask_value=head.mask_value,
            auto_adapt=head._auto_adapt,
        ).to(linear.weight.device, linear.weight.dtype)
        fixed._take_units(linear)
        if head.masking:
            fixed.active_units[: linear.out_features] = head.active_units
        fixed.classifier.weight.requires_grad_(linear.weight.requires_grad)
        fixed.classifier.bias.requires_grad_(linear.bias.requires_grad)
        return fixed.train(head.training)

    @property
    def max_classes(self) -> int:
        """The number of units, in use or not."""
        return self.classifier.out_features

    @torch.no_grad()
    def adaptation(self, experience: Any) -> None:
        """Take the units of the experience's classes into use; in training, unmask them."""
        super().adaptation(experience)
        classes = list(experience.classes_in_this_experience)
        self._extend(max(classes) + 1)
        if self.masking and self.training:
            self.active_units[classes] = 1

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The logits, masked where the class is unknown; task labels are not used."""
        return self.classifier(x).masked_fill(self.active_units == 0, self.mask_value)

    def _extend(self, n_units: int) -> None:
        """Use ``n_units`` units; the draws are those of a new ``nn.Linear`` of that width."""
        if n_units > int(self.units_in_use):
            self._check_fits(n_units)
            self._take_units(nn.Linear(self.classifier.in_features, n_units))

    def _check_fits(self, n_units: int) -> None:
        if n_units > self.max_classes:
            raise ValueError(
                f"label {n_units - 1} needs {n_units} units, but the head was made for "
                f"max_classes={self.max_classes}. Pass the number of classes of the whole stream, "
                f"test classes included."
            )

    @torch.no_grad()
    def _take_units(self, linear: nn.Linear) -> None:
        """Copy the rows that are not in use yet."""
        n_units, known = linear.out_features, int(self.units_in_use)
        self._check_fits(n_units)
        self.classifier.weight[known:n_units] = linear.weight[known:].to(self.classifier.weight)
        self.classifier.bias[known:n_units] = linear.bias[known:].to(self.classifier.bias)
        self.units_in_use.fill_(n_units)
        if not self.masking:
            self.active_units[:n_units] = 1
