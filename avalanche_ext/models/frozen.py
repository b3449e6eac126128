"""A copy of a network that stays as it is: what a teacher or an earlier generator is."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["FrozenCopy"]


class FrozenCopy(nn.Module):
    """A deep copy without gradients, in evaluation mode whatever ``train`` is called with.

    Args:
        module: The network to copy; it is left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.grad = None
        self.eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output."""
        return self.module(*args, **kwargs)
