r"""Online projection: take the nearest step that leaves remembered outputs where they are.

Each layer's step is projected onto the steps that change what the layer gives for a few inputs by
no more than ``eps``. With ``eps=0`` the first layer's outputs for them do not change, so the second
layer's inputs do not, and so on: the network's outputs stay, at any step size.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Online Generative Memory", third
    idea. Orthogonal weights modification (Zeng et al., 2019) is its ridge form with the inputs of
    all earlier samples; orthogonal gradient descent (Farajtabar et al., 2020) projects the gradient
    of the whole network, which keeps the outputs to first order only.

Faithfulness:
    1. "wrt spectral or frobenius norm": of the change of one layer's outputs, a matrix of inputs by
       units, at the inputs that the layer had before the step. ``eps`` bounds every layer by
       itself: for ``eps > 0`` changes of several layers add up.
    2. Frobenius: the nearest step (Newton's method for its multiplier). Spectral: singular values
       are cut at a bound that is safe for every direction; the nearest step has no closed form.
       Cutting those of the outputs' change itself would be tight, but may enlarge the step.
    3. The source projects the gradient. Here it is the step that the optimizer has taken, so that
       momentum, weight decay and Adam keep the bound too. For plain SGD both are the same;
       ``eps_on="gradient"`` measures the bound before the learning rate.
    4. Linear and convolution layers are projected, weight and bias together. Any other parameter
       that takes part in these outputs (a norm's scale, attention's packed weights, what two layers
       share) is held still, with a warning. What takes no part, such as the head of another task,
       moves freely.
    5. Outputs are those of evaluation mode in float32. Batch statistics follow the current data and
       move them all the same, with a warning.
    6. What other plugins change behind the optimizer's step is theirs.

Cost: per step a forward and a partial backward pass on ``n_inputs`` samples, a copy of the weights,
and for each layer an eigendecomposition of the order of ``n_inputs`` (convolutions: patch size).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.functional.step_projection import (
    conv_rows,
    linear_rows,
    project_step,
    row_space,
)
from avalanche_ext.training.checks import check_nonnegative, check_one_of
from avalanche_ext.training.online_memory import OnlineMemory, float32_evaluation, learning_rates
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["OnlineProjectionPlugin"]

_ORDER = 25  # outside loss scaling (20), which may skip a step, and inside distillation (30)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class _Heard(NamedTuple):
    """A layer that the inputs passed, and what it was given: ``A``, once per call."""

    name: str
    layer: Any
    rows: list[Tensor]


class OnlineProjectionPlugin(OnlineMemory):
    r"""Replace each layer's step by the nearest one that keeps its outputs for remembered inputs.

    .. math:: \Delta = \arg\min \|\Delta - G\|_F \quad \text{s.t.} \quad
              \|A \Delta\| \le \varepsilon

    with the layer's inputs ``A`` and the optimizer's step ``G``. Logged per epoch as
    ``OnlineProjection_Cosine``: the cosine of the step taken and the step planned, of all projected
    layers together.

    Args:
        eps: Bound >= 0 on the change of each layer's outputs; 0 for none. Infinity is plain
            training, bit for bit.
        norm: ``"frobenius"`` or ``"spectral"``.
        eps_on: ``"step"``, or ``"gradient"``: the bound is ``eps`` times the learning rate.
        source: Where inputs come from, see ``avalanche_ext.training.online_memory``.
        mem: Samples in the reservoir of ``source="memory"``, 200 by default.
        n_inputs: Inputs per step, >= 1. With ``eps=0`` well below the layers' widths: as many
            independent inputs as a layer has leave it nothing to learn with.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for inputs that are not finite, or a
            strategy that does not call ``optimizer_step()``.
    """

    label = "OnlineProjection_Cosine"

    def __init__(
        self,
        eps: float = 0.0,
        *,
        norm: str = "frobenius",
        eps_on: str = "step",
        source: Any = "memory",
        mem: int | None = None,
        n_inputs: int = 16,
    ) -> None:
        super().__init__(source, mem, n_inputs)
        owner = type(self).__name__
        if eps != math.inf:
            check_nonnegative(owner, eps=eps)
        check_one_of(owner, "norm", norm, ("frobenius", "spectral"))
        check_one_of(owner, "eps_on", eps_on, ("step", "gradient"))
        self.eps = eps
        self.norm: Any = norm
        self.eps_on = eps_on
        self._warned: set[str] = set()

    @property
    def weighs_nothing(self) -> bool:
        """See ``OnlineMemory``."""
        return self.eps == math.inf

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Stand around the optimizer's step."""
        if self.active:
            wrap(strategy, "optimizer_step", self._optimizer_step, order=_ORDER)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        unwrap(strategy, "optimizer_step", self._optimizer_step)

    def _optimizer_step(self, strategy: Any, inner: Callable[[], Any]) -> Any:
        self._stepped = True
        inputs = self.draw(strategy)
        if inputs is None:
            return inner()
        trained = learning_rates(strategy)
        heard, held = self._constraints(strategy, inputs, trained)
        rates = {id(p): float(rate) for _, p, rate in trained}
        before = {p: p.detach().clone() for part in heard for p in _trained_parts(part.layer)}
        before |= {p: p.detach().clone() for p in held}
        result = inner()
        with torch.no_grad():
            for p in held:
                p.copy_(before[p])
            products = [self._project(part, before, rates) for part in heard]
            if products:
                along, taken, planned = torch.stack(products).sum(0)
                # Where nothing was planned, or nothing is left, there is no angle: 1, and 0.
                lengths = (taken * planned).sqrt()
                still = (planned == 0).to(lengths)
                self.keep(torch.where(lengths > 0, along / lengths, still))
        return result

    # parts ----------------------------------------------------------------------------------

    def _constraints(
        self, strategy: Any, inputs: tuple[Tensor, Tensor], trained: list[tuple[str, Tensor, float]]
    ) -> tuple[list[_Heard], list[Tensor]]:
        """The layers that the inputs pass, and the other parameters that take part."""
        heard: dict[str, _Heard] = {}
        with (
            torch.enable_grad(),
            float32_evaluation(strategy) as outputs,
            _listening(bare(strategy.model), heard),
        ):
            found = outputs(*inputs)
        layers = list(heard.values())
        covered = {id(p) for part in layers for p in _trained_parts(part.layer)}
        others = [(name, p) for name, p, _ in trained if id(p) not in covered]
        held = []
        if others and found.requires_grad:
            slopes = torch.autograd.grad(found.sum(), [p for _, p in others], allow_unused=True)
            pairs = zip(others, slopes, strict=True)
            held = [(name, p) for (name, p), slope in pairs if slope is not None]
        self._warn(strategy, [name for name, _ in held])
        return layers, [p for _, p in held]

    def _project(self, part: _Heard, before: Any, rates: dict[int, float]) -> Tensor:
        """Project the step of one layer; the products of the steps taken and planned."""
        layer, parameters = part.layer, _trained_parts(part.layer)
        groups = getattr(layer, "groups", 1)
        blocks = [(p - before[p]).reshape(groups, p.shape[0] // groups, -1).mT for p in parameters]
        planned = torch.cat(blocks, dim=-2)
        eps = self.eps
        if self.eps_on == "gradient":
            eps = eps * rates.get(id(parameters[0]), 0.0)  # 0: the optimizer does not train it
        space = row_space(torch.cat(part.rows, dim=-2))
        if eps == 0 and bool((space.sizes > 0).sum() == planned[..., 0].numel()):
            self._say(
                "full",
                f"{self.n_inputs} inputs span everything that layer {part.name!r} can be given, so "
                f"with eps=0 it cannot learn. Use fewer n_inputs, a wider layer, or eps > 0.",
            )
        taken = project_step(planned, space, eps, norm=self.norm)
        if taken is not planned:
            sizes = [block.shape[-2] for block in blocks]
            for p, block in zip(parameters, taken.split(sizes, dim=-2), strict=True):
                p.copy_(before[p] + block.mT.reshape(p.shape))
        a, b = taken.flatten(), planned.flatten()
        return torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])

    def _warn(self, strategy: Any, held: list[str]) -> None:
        if held:
            self._say(
                "held",
                f"parameters outside linear and convolution layers are held still while outputs "
                f"are kept: {held}.",
            )
        norms = [
            name
            for name, m in bare(strategy.model).named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            and m.training
            and m.track_running_stats
        ]
        if norms:
            self._say(
                "norms",
                f"the batch statistics of {norms} follow the current data, so outputs move all the "
                f"same. Keep these layers in evaluation mode, or use group norms.",
            )

    def _say(self, what: str, text: str) -> None:
        """Warn, once."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"OnlineProjectionPlugin: {text}", stacklevel=2)


@contextmanager
def _listening(model: nn.Module, heard: dict[str, _Heard]) -> Iterator[None]:
    """Collect the inputs of the layers that are called, by name.

    A parameter that several modules share has no inputs of one kind: it is left to be held.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())

    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Any, ...]) -> None:
            if _trained_parts(layer):
                with torch.no_grad():
                    rows = _rows_of(layer, inputs[0])
                heard.setdefault(name, _Heard(name, layer, [])).rows.append(rows)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(name))
        for name, module in model.named_modules()
        if type(module) in _LAYERS
        and isinstance(module.weight, nn.Parameter)
        and all(owners[id(p)] == 1 for p in module.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trained_parts(layer: Any) -> list[Tensor]:
    """Weight and bias, as far as they are trained."""
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]


def _rows_of(layer: Any, x: Tensor) -> Tensor:
    parts = {id(p) for p in _trained_parts(layer)}
    weight, bias = id(layer.weight) in parts, id(layer.bias) in parts
    if isinstance(layer, nn.Linear):
        return linear_rows(x, weight=weight, bias=bias)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):  # a picture of height 1
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    return conv_rows(
        x, kernel, stride=stride, dilation=dilation, groups=layer.groups, weight=weight, bias=bias
    )
