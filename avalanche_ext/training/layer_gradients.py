r"""Sums over samples of each sample's gradient, from one backward pass of a batch.

What a layer was given and the gradient at its output hold every sample's gradient, so that no
sample needs a backward pass of its own: that of a linear layer is
:math:`g_n = \delta_n a_n^\top`, and for the square and the absolute value

.. math:: \sum_n f(\delta_n a_n^\top) = f(\delta)^\top f(a)

without any :math:`g_n` being formed. Convolutions form theirs by one batched matrix product.

References:
    Goodfellow (2015), Efficient per-example gradient computations; Rochette, Manoel, Tramel (2019),
    Efficient per-example gradient computations in convolutional neural networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LayerGradients"]

_Of = Callable[[Tensor], Tensor]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class LayerGradients:
    """Per-sample gradients of a network of linear layers, convolutions and batch norms.

    The network is in evaluation mode, so that samples do not see each other. Each layer may run
    once per forward pass.

    Args:
        model: The network.
        parameters: Those to look at, by name.
        room: Bytes that the gradients of samples in one layer may take at a time.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], room: int) -> None:
        self.parameters = parameters
        self.room = room
        self.checked = False
        names = {id(p): name for name, p in parameters.items()}
        self._layers: dict[nn.Module, dict[str, str]] = {}
        for module in model.modules():
            own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False)
                   if id(p) in names}  # fmt: skip
            if own:
                self._layers[module] = own
        found = [name for own in self._layers.values() for name in own.values()]
        self.supported = sorted(found) == sorted(parameters) and all(
            _is_supported(module) for module in self._layers
        )

    def sums(self, objective: Callable[[], Tensor], of: _Of) -> dict[str, Tensor] | None:
        r"""Sum over the samples of ``of`` of each sample's gradient.

        Args:
            objective: Runs the network on a batch; the sum over its samples of a scalar of each.
            of: Entry by entry, with :math:`f(\delta a) = f(\delta) f(a)`.

        Returns:
            A sum per parameter, 0 for one that the objective does not depend on. ``None`` where
            the layers do not tell: one ran more than once, or a parameter is used outside of its
            layer (the first batch is held against autograd's gradient).
        """
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        repeated = False

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal repeated
            repeated = repeated or module in seen
            # Its gradient is the output's, whatever is done to the output in place later on.
            probe = output.new_zeros(()).expand(output.shape).requires_grad_()
            seen[module] = (inputs[0].detach(), probe)
            return output + probe

        handles = [module.register_forward_hook(watch) for module in self._layers]
        try:
            with torch.enable_grad():
                value = objective()
        finally:
            for handle in handles:
                handle.remove()
        if repeated:
            return None
        leaves = [probe for _, probe in seen.values()]
        if not self.checked:
            leaves += list(self.parameters.values())
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        deltas = dict(zip(seen, gradients, strict=False))
        taken = {m: (x, delta) for m, (x, _) in seen.items() if (delta := deltas[m]) is not None}
        if not self.checked:
            if not self._agrees(taken, gradients[len(seen) :]):
                return None
            self.checked = True
        return self._total(taken, of)

    def _total(self, taken: dict[nn.Module, tuple[Tensor, Tensor]], of: _Of) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for module, (x, delta) in taken.items():
            for key, total in _layer_sums(module, x, delta, of, self.room):
                if key in self._layers[module]:
                    sums[self._layers[module][key]].add_(total.detach())
        return sums

    def _agrees(
        self,
        taken: dict[nn.Module, tuple[Tensor, Tensor]],
        gradients: tuple[Tensor | None, ...],
    ) -> bool:
        """Whether the samples' gradients add up to the batch's."""
        sums = self._total(taken, lambda g: g)
        if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
            raise ValueError(
                "the samples' gradients are not finite: training has diverged. Lower the learning "
                "rate."
            )
        return all(
            torch.allclose(
                total, torch.zeros_like(total) if want is None else want, rtol=1e-3,
                atol=1e-4 * float(total.abs().max()) if total.numel() else 0.0,
            )
            for total, want in zip(sums.values(), gradients, strict=True)
        )  # fmt: skip


def _is_supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    if type(module) in _BATCH_NORMS:
        return bool(module.track_running_stats)
    return type(module) is nn.Linear


def _layer_sums(
    module: nn.Module, x: Tensor, delta: Tensor, of: _Of, room: int
) -> Iterator[tuple[str, Tensor]]:
    """``weight`` and ``bias``, each with its sum over samples."""
    if isinstance(module, nn.Linear):
        if x.ndim == 2:
            yield "weight", of(delta).T @ of(x)
            yield "bias", of(delta).sum(0)
            return
        x, delta = (t.reshape(len(t), -1, t.shape[-1]).transpose(1, 2) for t in (x, delta))
    elif isinstance(module, nn.Conv2d):
        x = _patches(module, x)
        delta = delta.flatten(2)
    else:
        assert isinstance(module, _BATCH_NORMS)
        x = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        axes = tuple(range(2, x.ndim))
        for key, g in (("weight", x * delta), ("bias", delta)):
            yield key, of(g.sum(axes) if axes else g).sum(0)
        return
    # (B, in, L) and (B, out, L): a gradient is a product over L.
    weight = module.weight
    rows = max(1, room // (1 + weight.nbytes))
    total = sum(of(d @ a.mT).sum(0) for a, d in zip(x.split(rows), delta.split(rows), strict=True))
    assert isinstance(total, Tensor)
    yield "weight", total.view_as(weight)
    yield "bias", of(delta.sum(2)).sum(0)


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What each position of the output is made of, ``(B, in * k_h * k_w, L)``.

    As torch's ``unfold``, by views and one copy: several times faster on a CPU.
    """
    x = F.pad(x, module._reversed_padding_repeated_twice)
    for axis, (size, step, apart) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
