"""Sums over samples of a function of each sample's own gradient, by the fastest way there is.

A network of linear layers, convolutions and batch norms takes one backward pass per batch
(``layer_gradients``). Samples of any other go through ``torch.func.vmap``, as many at a time as
have room for their gradients (16 MiB on a CPU, 256 MiB elsewhere). Where that is only a few they
take one backward pass each. So do those of a network that cannot be vectorised (recurrent layers,
control flow that depends on values), with a warning. The sums are the same.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.func import functional_call

from avalanche_ext.functional.importance import per_sample_sums
from avalanche_ext.training.layer_gradients import LayerGradients

__all__ = ["SampleGradients"]

# Memory for the gradients of samples that are taken together: on a CPU, what caches hold.
_GRADIENT_BYTES = {"cpu": 16 << 20, "accelerator": 256 << 20}
_WORTH_VECTORISING = 4  # samples; for fewer one backward pass each is faster


class SampleGradients:
    r"""Adds up :math:`\sum_n f(\nabla_\theta \ell_n)`, batch by batch, in evaluation mode.

    Args:
        model: The network, which is in evaluation mode.
        parameters: Those to look at, by name.
        objective: :math:`\sum_n \ell_n` from the output ``(B, ...)`` and labels ``(B,)``.
        of: :math:`f`, entry by entry: the square or the absolute value.
        labels: Labels from the output, those of the data and a number in [0, 1) per sample.
        owner: Who measures, for warnings.

    Attributes:
        sums: By name.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        *,
        objective: Callable[[Tensor, Tensor], Tensor],
        of: Callable[[Tensor], Tensor],
        labels: Callable[[Tensor, Tensor, Tensor], Tensor],
        owner: str,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.objective = objective
        self.of = of
        self.labels = labels
        self.owner = owner
        self.sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        on_cpu = all(p.device.type == "cpu" for p in parameters.values())
        room = _GRADIENT_BYTES["cpu" if on_cpu else "accelerator"]
        chunk = room // (1 + sum(p.nbytes for p in parameters.values()))
        self._chunk = chunk if chunk >= _WORTH_VECTORISING else 0
        self._layers: LayerGradients | None = LayerGradients(model, parameters, room // 4)
        if not self._layers.supported:
            self._layers = None

    def add(self, x: Tensor, y: Tensor, task: int | None, uniform: Tensor) -> None:
        """Add a batch.

        Args:
            x: Inputs.
            y: Labels of the data ``(B,)``.
            task: The head they use; ``None`` where there is but one.
            uniform: ``(B,)``, for ``labels``.
        """
        found = None
        if self._layers is not None:
            found = self._layers.sums(
                functools.partial(self._of_batch, x, y, task, uniform), self.of
            )
        if found is None:
            self._layers = None
            found = self._of_samples(x, y, task, uniform)
        for name, value in found.items():
            self.sums[name].add_(value)

    def _output(self, x: Tensor, task: int | None) -> Tensor:
        tasks = torch.full((len(x),), task or 0, device=x.device)
        return avalanche_forward(self.model, x, tasks)

    def _of_batch(self, x: Tensor, y: Tensor, task: int | None, uniform: Tensor) -> Tensor:
        z = self._output(x, task)
        return self.objective(z, self.labels(z.detach(), y, uniform))

    def _of_samples(
        self, x: Tensor, y: Tensor, task: int | None, uniform: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self._output(x, task)
        labels = self.labels(z, y, uniform)
        objective = functools.partial(self._of_sample, task, z.shape[-1])
        given: dict[str, Tensor] = dict(self.parameters)
        if self._chunk:
            try:
                return per_sample_sums(objective, given, [x, labels], of=self.of, chunk=self._chunk)
            except (RuntimeError, AttributeError) as error:
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"{self.owner} goes through the experience one sample at a time, which is "
                    f"slow: torch.func.vmap cannot vectorise this network ({reason}).",
                    stacklevel=2,
                )
                self._chunk = 0
        return per_sample_sums(objective, given, [x, labels], of=self.of)

    def _of_sample(
        self, task: int | None, width: int, parameters: Any, x: Tensor, label: Tensor
    ) -> Tensor:
        # The label as a number: Avalanche's modules cannot split a vectorised batch by task.
        inputs = (x[None],) if task is None else (x[None], task)
        z = functional_call(self.model, parameters, inputs)
        # A head of one task may be narrower than the output of a batch, which Avalanche pads.
        return self.objective(nn.functional.pad(z, (0, width - z.shape[-1])), label[None])
