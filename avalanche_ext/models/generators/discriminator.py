"""An adversarial critic that is a classifier as well, for data as it comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avalanche_ext.models.generators.base import ValueRange, to_symmetric
from avalanche_ext.models.generators.networks import ConvCritic, MLPCritic

__all__ = ["UNSEEN_LOGIT", "Discriminator"]

UNSEEN_LOGIT = -1000.0


class Discriminator(nn.Module):
    """Tells the classes apart, and real samples from generated ones.

    Called as any classifier it gives logits. Those of classes that it has not been shown are
    ``UNSEEN_LOGIT``.

    Args:
        in_shape: Shape of one sample.
        n_classes: Classes of the whole stream.
        network: ``"conv"`` or ``"mlp"``.
        widths: Channels of the maps, from the smallest on, or hidden layers from the last one on.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds, with
            ``"mlp"`` only.

    Shapes:
        x ``(B, *in_shape)``, result ``(B, n_classes)``.

    Raises:
        ValueError: For a bad argument.
    """

    known: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        n_classes: int,
        network: str = "conv",
        widths: Sequence[int] = (128, 64, 32),
        value_range: ValueRange = (0.0, 1.0),
    ) -> None:
        super().__init__()
        bounded = value_range is not None
        if (
            network not in ("conv", "mlp") or not widths or n_classes < 1
            or (network == "conv" and not bounded)
        ):  # fmt: skip
            raise ValueError(
                f"Discriminator expects network 'conv' (with a value_range) or 'mlp', at least one "
                f"width and n_classes >= 1; got network={network!r}, value_range={value_range}, "
                f"widths={tuple(widths)}, n_classes={n_classes}."
            )
        self.n_classes = n_classes
        self.value_range = value_range
        cls = ConvCritic if network == "conv" else MLPCritic
        self.critic = cls(tuple(in_shape), widths, n_classes)
        self.register_buffer("known", torch.zeros(n_classes, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of data."""
        return self.judge(to_symmetric(x, self.value_range))[1]

    def judge(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(B,)`` and logits of samples in [-1, 1]."""
        value, logits = self.critic(u)
        return value, logits.masked_fill(~self.known, UNSEEN_LOGIT)

    def learn_classes(self, classes: Sequence[int]) -> None:
        """Unmask the logits of new classes.

        Raises:
            ValueError: If there is no logit for one of them.
        """
        outside = [c for c in classes if not 0 <= c < self.n_classes]
        if outside:
            raise ValueError(
                f"Discriminator was built with n_classes={self.n_classes} and has no output for "
                f"{outside}; build it with n_classes={max(classes) + 1}."
            )
        self.known[list(classes)] = True

    def restart(self) -> None:
        """Draw all weights anew; the parameters are the same objects."""
        for module in self.critic.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
