"""What penalties on hidden activations share: which layers, when, how often, and what is wrong.

A penalty plugin adds ``lam`` times the sum over layers of a function of the activations of the
batch that is being trained on (replayed samples included) to the loss.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avalanche_ext.models.recording import (
    ActivationRecorder,
    LayerSpec,
    Tap,
    identity,
    select_layers,
)
from avalanche_ext.training.checks import CheckedPlugin, check_nonnegative, check_one_of
from avalanche_ext.training.distributed import whole_batch
from avalanche_ext.training.publishing import publish

__all__ = [
    "CONV_CHOICES",
    "RepresentationPenalty",
    "as_rows",
    "bare",
    "hidden_fc_relus",
    "hidden_taps",
]

CONV_CHOICES = ("error", "pool", "location")
# On an accelerator reading a value stops the queue of work: look at the flags this often.
_STEPS_BETWEEN_CHECKS = 50
_AFFINE = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


def bare(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and ``DistributedDataParallel``."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def hidden_fc_relus(model: nn.Module) -> list[str]:
    """Names of the ReLU modules between two fully connected layers, in the order of the modules.

    The layers that the released code penalises: both hidden ReLUs of an MLP, those of the
    classifier part of a VGG; never feature maps, never the logits.
    """
    names: list[str] = []
    waiting: str | None = None
    last: nn.Module | None = None
    for name, module in bare(model).named_modules():
        if isinstance(module, _AFFINE):
            if waiting is not None and not isinstance(module, nn.modules.conv._ConvNd):
                names.append(waiting)
            last, waiting = module, None
        elif isinstance(module, nn.ReLU | nn.ReLU6) and isinstance(last, nn.Linear):
            waiting = name
    return names


def hidden_taps(owner: str, model: nn.Module, layers: LayerSpec) -> list[Tap]:
    """The hidden layers that ``layers`` selects in ``model``; logits are no part of them.

    Args:
        owner: Who asks, for the error.
        model: The network.
        layers: ``"auto"`` for ``hidden_fc_relus``, or for a network without any the classifier's
            input; otherwise see ``avalanche_ext.models.recording.select_layers``.

    Raises:
        ValueError: If nothing is found.
    """
    if layers != "auto":
        return select_layers(model, layers)[0]
    names = hidden_fc_relus(model)
    if names:
        return [(name, "output") for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a choice of layers that is not used here
        taps = [tap for tap in select_layers(model, "auto")[0] if tap[1] == "input"]
    if not taps:
        raise ValueError(
            f"{owner}(layers='auto') looks for ReLU modules between fully connected layers; "
            f"{type(model).__name__} has none. Name hidden layers, such as layers=['features.1'], "
            f"feature maps with conv='pool'."
        )
    return taps


def as_rows(name: str, h: Tensor, conv: str) -> Tensor:
    """Activations of a layer as one row per sample, or per sample and position.

    Args:
        name: The layer, for the error.
        h: Its output.
        conv: For feature maps: ``"pool"`` takes each channel's mean over positions,
            ``"location"`` makes each position a row, ``"error"`` refuses them.

    Shapes:
        h ``(B, N)`` or ``(B, N, H, W)``; result ``(B, N)``, or ``(B H W, N)`` for ``"location"``.

    Raises:
        ValueError: For a feature map under ``"error"``, or a tensor with other axes.
    """
    if h.ndim == 2:
        return h
    if h.ndim != 4 or conv == "error":
        raise ValueError(
            f"layer {name!r} gives shape {tuple(h.shape)}; expected (B, N), or a feature map "
            f'(B, N, H, W) with conv="pool" (channel means) or conv="location" (each position a '
            f"row). Say which, or choose fully connected layers."
        )
    return h.mean((2, 3)) if conv == "pool" else h.movedim(1, -1).flatten(0, 2)


class RepresentationPenalty(CheckedPlugin):
    """A loss term of hidden activations; subclasses say which in ``penalty``.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit.
        layers: ``"auto"`` for ``hidden_fc_relus``, or for a network without any the classifier's
            input; otherwise see ``avalanche_ext.models.recording.select_layers``. Logits are never
            penalised.
        conv: What to do with feature maps, see ``as_rows``.

    Raises:
        ValueError: For a bad argument; at the first experience, for layers that match nothing; in
            training, for a layer that cannot take part or a value that is no longer finite.
    """

    label = "penalty"
    nonnegative = False  # whether negative activations are refused

    def __init__(self, lam: float, layers: LayerSpec, conv: str) -> None:
        super().__init__()
        owner = type(self).__name__
        check_nonnegative(owner, lam=lam)
        check_one_of(owner, "conv", conv, CONV_CHOICES)
        if isinstance(layers, list | tuple) and not layers:
            raise ValueError(f"{owner} expects at least one layer; got an empty list.")
        if layers == "logits" or (isinstance(layers, list | tuple) and "logits" in layers):
            raise ValueError(f"{owner} penalises hidden layers; got layers={layers!r}.")
        self.lam = lam
        self.layers = layers
        self.conv = conv
        self._recorder = ActivationRecorder(layers)
        self._taps: list[Tap] = []
        self._term: Tensor | None = None
        self._last: dict[str, Tensor] = {}
        self._sum: Tensor | None = None
        self._silent: dict[str, Tensor] = {}  # rows of the epoch without an active unit
        self._rows: dict[str, int] = {}
        self._lowest: Tensor | None = None
        self._steps = 0

    def penalty(self, name: str, h: Tensor) -> Tensor:
        """The term of one layer, from its rows ``(B, N)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no penalty.")

    @property
    def last(self) -> dict[str, Tensor]:
        """Value of each layer's term in the last batch, without ``lam``; empty before the first."""
        return dict(self._last)

    # set-up ---------------------------------------------------------------------------------

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Find the layers: adaptation may have replaced modules."""
        if self.lam == 0:
            return
        if isinstance(strategy.model, nn.DataParallel):
            raise ValueError(
                f"{type(self).__name__} needs the activations of the whole batch; "
                f"torch.nn.DataParallel splits it. Use one device, or distributed training."
            )
        self._taps = hidden_taps(type(self).__name__, strategy.model, self.layers)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Start the epoch's mean and counts."""
        self._sum, self._steps, self._lowest = None, 0, None
        self._silent, self._rows = {}, {}

    # one step -------------------------------------------------------------------------------

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Attach the recorder."""
        if self.lam != 0:
            self._recorder.attach(strategy.model, self._taps)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Compute the term at once: another plugin's forward pass may follow."""
        super().after_forward(strategy, **kwargs)
        if self.lam == 0:
            return
        self._recorder.detach()
        found = self.outputs(self._recorder, strategy.mb_output, len(strategy.mb_y))
        trained = {name: h for name, h in found.items() if h.requires_grad}  # others are frozen
        if not trained:
            raise ValueError(
                f"layers={self.layers!r} leaves {type(self).__name__} nothing to train: no "
                f"hidden layer among them depends on a trainable parameter (logits do not count). "
                f"Choose other layers."
            )
        if self.conv != "location":  # positions are no rows of the batch, which is put together
            trained = {name: as_rows(name, h, self.conv) for name, h in trained.items()}
        whole = whole_batch(strategy, list(trained.values()))
        rows = {n: as_rows(n, h, self.conv) for n, h in zip(trained, whole, strict=True)}
        terms = {name: self.penalty(name, h) for name, h in rows.items()}
        self._term = torch.stack(list(terms.values())).sum()
        self._keep(terms, rows)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the weighted term to the loss."""
        if self._term is not None:
            strategy.loss = strategy.loss + self.lam * self._term
            self._term = None

    # reports --------------------------------------------------------------------------------

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Publish the epoch's mean, and say so where a layer has fallen silent."""
        if self._sum is None:
            return
        self._check_values()
        publish(self, strategy, f"{self.label}_R", float(self._sum) / self._steps)
        for name, silent in self._silent.items():
            share = float(silent) / self._rows[name]
            # Single positions of a map may well be empty; for samples it is the end of learning.
            if share > 0.5 and (share == 1 or self.conv != "location"):
                warnings.warn(
                    f"no unit of layer {name!r} was active for {100 * share:.0f} % of the samples "
                    f"of the epoch: {type(self).__name__}(lam={self.lam}) is switching the layer "
                    f"off, and what it does not pass on cannot be learnt. Start again with a lam "
                    f"ten times smaller.",
                    stacklevel=2,
                )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Hold nothing of the graph between experiences."""
        self._recorder.detach()
        self._recorder.pop()
        self._term = None

    def __str__(self) -> str:
        return self.label

    # parts ----------------------------------------------------------------------------------

    def outputs(
        self, recorder: ActivationRecorder, logits: Tensor, batch_size: int
    ) -> dict[str, Tensor]:
        """What ``recorder`` heard, by layer; the second call of a module is ``"name#2"``."""
        found: dict[str, Tensor] = {}
        recorded = recorder.pop()
        if recorder.silent and not self._may_be_silent(recorder.silent):
            raise ValueError(
                f"layers={self.layers!r}: {recorder.silent} gave no tensor in the forward pass: "
                f"not called, an output that is not a tensor, or a compiled model that was called "
                f"before training. Choose other layers."
            )
        for name, h in recorded:
            if identity(h) == identity(logits):
                continue
            if h.shape[:1] != (batch_size,):
                raise ValueError(
                    f"layer {name!r} gives shape {tuple(h.shape)} for a batch of {batch_size} "
                    f"samples; choose a layer whose first axis is the batch."
                )
            calls = sum(key.partition("#")[0] == name for key in found)
            found[name if not calls else f"{name}#{calls + 1}"] = h
        return found

    def _may_be_silent(self, silent: list[str]) -> bool:
        """A pattern may match a module that is not called; a name, or everything, may not."""
        named = isinstance(self.layers, list | tuple) and not set(silent).isdisjoint(self.layers)
        return not named and len(silent) < len(self._taps)

    def _keep(self, terms: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        assert self._term is not None
        self._last = {name: term.detach() for name, term in terms.items()}
        total = self._term.detach().double()
        self._sum = total if self._sum is None else self._sum + total
        self._steps += 1
        for name, h in rows.items():
            h = h.detach()
            low, high = h.amin(1), h.amax(1)  # aminmax(dim=1) is ten times slower on a CPU
            silent, low = (high == 0).logical_and(low == 0).sum(), low.amin()
            self._silent[name] = self._silent.get(name, 0) + silent
            self._rows[name] = self._rows.get(name, 0) + len(h)
            self._lowest = low if self._lowest is None else torch.minimum(self._lowest, low)
        if not total.is_cuda or self._steps % _STEPS_BETWEEN_CHECKS == 0:
            self._check_values()

    def _check_values(self) -> None:
        assert self._sum is not None
        assert self._lowest is not None
        if self.nonnegative and float(self._lowest) < 0:
            raise ValueError(
                f"{type(self).__name__} expects activations >= 0, as behind a ReLU; the layers "
                f"{list(self._last)} give {float(self._lowest):.3g}. Choose other layers, or a "
                f'form with signed="abs_moment" (tanh, maxout, winner takes all).'
            )
        if not math.isfinite(float(self._sum)):
            last = {name: float(value) for name, value in self._last.items()}
            raise ValueError(
                f"{type(self).__name__}: the penalty is no longer finite (step {self._steps} of "
                f"this epoch, lam={self.lam}, last values {last}): the activations have diverged. "
                f"Lower lam or the learning rate."
            )
