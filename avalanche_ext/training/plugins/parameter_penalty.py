r"""Penalties on parameters that selfless learning is compared with: OrthReg, L1 and L2 decay.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, Sec. 3; Rodriguez et al.
    (2017), Regularizing CNNs with Locally Constrained Decorrelations.

Faithfulness:
    1. OrthReg is differentiated through the norms, over ordered pairs. Its authors add half of that
       without the projection to the tangent of the sphere; ``gradient="authors"`` does so.
    2. The routine released with Selfless Sequential Learning skips matrices, so there OrthReg does
       nothing on an MLP; here rows of linear layers count like filters. Biases do not.
    3. OrthReg leaves growing and multi-head classifiers alone: their old heads would move.
    4. L1 and L2 are added to the gradient behind the backward pass, where there is one, as in the
       released code and as ``weight_decay`` does: a head that the batch did not use keeps still.
       For plain SGD ``L2DecayPlugin(lam)`` is ``weight_decay=lam``, bit for bit.

Cost: for OrthReg a product of each weight with itself; for L1 and L2 one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from avalanche.models import IncrementalClassifier, MultiTaskModule
from torch import Tensor, nn

from avalanche_ext.functional.sparsity import orthogonality
from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.models.recording import LayerSpec, select_layers
from avalanche_ext.training.checks import CheckedPlugin, check_nonnegative, check_one_of
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.representation_penalty import bare

__all__ = ["L1ParamPlugin", "L2DecayPlugin", "OrthRegPlugin"]

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_HEADS = (IncrementalClassifier, MultiTaskModule, FixedSizeClassifier)


class OrthRegPlugin(CheckedPlugin, supports_distributed=True):
    r"""Add ``lam`` times the alikeness of the rows of chosen weights to the loss.

    .. math:: L = L_{clf} + \lambda \sum_l \sum_{i \ne j} \log(1 + e^{s (c_{ij} - 1)})

    with the cosine :math:`c_{ij}` of rows i and j of layer l's weight, or half the sum of squared
    cosines for ``form="global"``. Logged per epoch as ``OrthReg_R``; ``last`` holds each layer's
    value at the last step.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Useful: 1e-4 to 1e-1.
        form: ``"local"`` (rows that point apart are left alone) or ``"global"``.
        sharpness: ``s`` of the local form, > 0. Paper: 10.
        gradient: ``"exact"`` or ``"authors"``, see ``avalanche_ext.functional.sparsity``.
        layers: Linear and convolution layers; all outside growing and multi-head classifiers by
            default.

    Raises:
        ValueError: For a bad argument; at the first experience, for layers without such a weight.

    References:
        Rodriguez et al. (2017), Eqs. 3 and 4.
    """

    def __init__(
        self,
        lam: float = 1e-2,
        *,
        form: Literal["local", "global"] = "local",
        sharpness: float = 10.0,
        gradient: Literal["exact", "authors"] = "exact",
        layers: LayerSpec = "auto",
    ) -> None:
        super().__init__()
        check_nonnegative("OrthRegPlugin", lam=lam, sharpness=sharpness)
        check_one_of("OrthRegPlugin", "form", form, ("local", "global"))
        check_one_of("OrthRegPlugin", "gradient", gradient, ("exact", "authors"))
        if sharpness == 0 or (form == "global" and gradient == "authors"):
            raise ValueError(
                f"OrthRegPlugin expects sharpness > 0, and gradient='authors' with form='local'; "
                f"got sharpness={sharpness}, gradient={gradient!r}, form={form!r}."
            )
        self.lam = lam
        self.form: Literal["local", "global"] = form
        self.sharpness = sharpness
        self.gradient: Literal["exact", "authors"] = gradient
        self.layers = layers
        self.last: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._steps = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Find the weights: adaptation may have replaced modules."""
        if self.lam != 0:
            self._names = _weighted_layers(strategy.model, self.layers)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Start the epoch's mean."""
        self._sum, self._steps = None, 0

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the weighted term to the loss."""
        if self.lam == 0:
            return
        modules, terms = dict(bare(strategy.model).named_modules()), {}
        for name in self._names:
            weight = modules[name].weight
            if isinstance(weight, Tensor) and weight.requires_grad:
                terms[name] = orthogonality(
                    weight, form=self.form, sharpness=self.sharpness, gradient=self.gradient
                )
        if not terms:
            return
        total = torch.stack(list(terms.values())).sum()
        strategy.loss = strategy.loss + self.lam * total
        self.last = {name: term.detach() for name, term in terms.items()}
        self._sum = total.detach() if self._sum is None else self._sum + total.detach()
        self._steps += 1

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Publish the epoch's mean."""
        if self._sum is not None:
            publish(self, strategy, "OrthReg_R", float(self._sum) / self._steps)


class L1ParamPlugin(CheckedPlugin, supports_distributed=True):
    r"""Penalise the L1 norm of all trainable parameters: add ``lam`` times their sign to gradients.

    .. math:: g \leftarrow g + \lambda\, \mathrm{sign}(\theta)

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Useful: 1e-6 to 1e-4.
        include_bias: Whether vectors (biases, scales) are penalised, as in the released code.

    References:
        Aljundi et al. (2018), "L1-Param".
    """

    def __init__(self, lam: float = 1e-5, *, include_bias: bool = True) -> None:
        super().__init__()
        check_nonnegative("L1ParamPlugin", lam=lam)
        self.lam = lam
        self.include_bias = include_bias

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to gradients that are there."""
        if self.lam == 0:
            return
        for gradient, parameter in _gradients(strategy.model, self.include_bias):
            gradient.add_(parameter.sign(), alpha=self.lam)


class L2DecayPlugin(CheckedPlugin, supports_distributed=True):
    r"""Penalise half the squared norm of all trainable parameters.

    .. math:: g \leftarrow g + \lambda\, \theta

    For plain SGD this is its ``weight_decay``. With an adaptive optimizer it is the classic L2
    penalty, which ``AdamW`` is not.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Useful: 1e-5 to 2e-3.
        include_bias: Whether vectors (biases, scales) are penalised.

    References:
        Krogh and Hertz (1992); Aljundi et al. (2018), "L2-WD".
    """

    def __init__(self, lam: float = 5e-4, *, include_bias: bool = True) -> None:
        super().__init__()
        check_nonnegative("L2DecayPlugin", lam=lam)
        self.lam = lam
        self.include_bias = include_bias

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to gradients that are there."""
        if self.lam == 0:
            return
        for gradient, parameter in _gradients(strategy.model, self.include_bias):
            gradient.add_(parameter, alpha=self.lam)


def _gradients(model: nn.Module, include_bias: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients that the backward pass has left, each with its parameter."""
    for parameter in model.parameters():
        if parameter.grad is not None and (include_bias or parameter.ndim > 1):
            yield parameter.grad, parameter.detach()


def _weighted_layers(model: nn.Module, layers: LayerSpec) -> list[str]:
    modules = dict(bare(model).named_modules())
    if layers != "auto":
        named = [name for name, _ in select_layers(model, layers)[0]]
        names = [name for name in named if isinstance(modules[name], _WEIGHTED)]
        if len(names) < len(named) and isinstance(layers, str | list | tuple):
            odd = [name for name in named if name not in names]
            raise ValueError(
                f"OrthRegPlugin expects linear and convolution layers; {odd} are none. Its "
                f"layers are {[n for n, m in modules.items() if isinstance(m, _WEIGHTED)]}."
            )
        return names
    heads = [name for name, m in modules.items() if name and isinstance(m, _HEADS)]
    names = [
        name
        for name, m in modules.items()
        if isinstance(m, _WEIGHTED) and not any(name.startswith(f"{head}.") for head in heads)
    ]
    if not names:
        raise ValueError(
            f"OrthRegPlugin(layers='auto') found no linear or convolution layer outside the "
            f"classifiers of {type(model).__name__}; name the layers."
        )
    return names
