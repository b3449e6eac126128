r"""SLNI: sparse coding through local neural inhibition, so that later tasks find free units.

Units that are active together inhibit each other, near ones most; few stay active for any sample.
Added to a method that protects important parameters (MAS, EWC), that leaves capacity free:
``plugins=[MASPlugin(...), SLNIPlugin(1e-3)]``, in either order. On its own it does not prevent
forgetting.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, NeurIPS workshop on
    continual learning; extended at ICLR 2019.

Faithfulness:
    1. Names are those of the extended paper: ``form="slni"`` is Eq. 4; ``"slnid"`` (D: discounted)
       is Eq. 6, which the workshop paper and its figures call SLNI as well; ``"sni"`` is Eq. 2 and
       ``"snid"`` its discounted form.
    2. Sums run over ordered pairs and divide by the batch alone, in paper and released code, so a
       good ``lam`` falls with the width: 1e-3 for 128 units, 1e-6 for 500 in a VGG.
    3. Discount of a pair: the product of both units' (Eq. 6); the released code takes the smaller
       (``form="released"``, ``SLNIPlugin.released_code()``). The difference was within 0.1 points.
    4. Importance (Eq. 5) differentiates the loss; the released code does so beside EWC, but beside
       MAS it takes the squared length of the output. ``"auto"`` follows the code. It matters: near
       an optimum the gradient of the loss is nearly 0, hence the discount nearly 1 for all units.
       ``gain`` multiplies importance where that shall change.
    5. Importance is taken at the ReLU's input, in evaluation mode, with the evaluation transforms,
       on the experience just learnt, and added up over experiences, all as in the released code.
    6. Layers: the released code names the ReLUs between fully connected layers, behind the ReLU;
       the paper says "each layer". Feature maps have to be asked for (``conv``).
    7. ``sigma`` is a sixth of the width, as everywhere in the released code.
    8. The regulariser acts from the first experience on, in training only. The released code adds
       it to the validation loss as well.

Cost: no extra forward pass in training; about three reads of the activations, and a product with a
matrix of rank 16 for widths beyond 128 (``avalanche_ext.functional.inhibition_operators``). Forms
with a discount make one pass over the data after each experience.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_ext.functional.inhibition import (
    FORMS,
    InhibitionForm,
    inhibition_loss,
    neuron_sensitivity,
)
from avalanche_ext.functional.inhibition_operators import Operator, inhibition_operator
from avalanche_ext.models.modes import evaluating
from avalanche_ext.models.recording import ActivationRecorder, LayerSpec
from avalanche_ext.training.checks import check_nonnegative, check_one_of
from avalanche_ext.training.importances import OutputNorm
from avalanche_ext.training.representation_penalty import RepresentationPenalty, hidden_taps

__all__ = ["NeuronImportance", "SLNIPlugin"]


@dataclass(frozen=True)
class NeuronImportance:
    r"""How units' importance to earlier experiences is measured and kept.

    .. math:: \alpha_i = \frac1n \sum_m | \partial \mathcal{L}_m / \partial n_i^m |

    Args:
        objective: ``"output_l2"``: squared length of the output (no labels); ``"loss"``: the
            criterion; ``"auto"``: ``"output_l2"`` beside MAS, else ``"loss"``.
        at: ``"pre"`` or ``"post"``: the ReLU's input or output.
        accumulate: Over experiences: ``"sum"``, ``"mean"`` or ``"max"``.
        gain: Factor >= 0 of the accumulated importance in the discount.
    """

    objective: str = "auto"
    at: str = "pre"
    accumulate: str = "sum"
    gain: float = 1.0

    def __post_init__(self) -> None:
        owner = "NeuronImportance"
        check_one_of(owner, "objective", self.objective, ("auto", "output_l2", "loss"))
        check_one_of(owner, "at", self.at, ("pre", "post"))
        check_one_of(owner, "accumulate", self.accumulate, ("sum", "mean", "max"))
        check_nonnegative(owner, gain=self.gain)


class SLNIPlugin(RepresentationPenalty, supports_distributed=True):
    r"""Add ``lam`` times the neural inhibition of chosen hidden layers to the loss.

    .. math:: L = L_{clf} + \lambda \sum_l \frac1B \sum_{i \ne j} s_{ij}\,
              e^{-(i-j)^2 / 2\sigma^2} \sum_m h_i^m h_j^m

    with :math:`s_{ij} = e^{-(\alpha_i + \alpha_j)}` for the discounted forms, else 1. Logged per
    epoch as ``SLNI_R``; ``last`` holds each layer's term of the last batch, ``importance`` the
    accumulated importance of each layer's units.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Paper's demos: 1e-3 with MAS, 2e-3 with
            EWC on MNIST, 1e-6 for 500 units.
        form: ``"slni"`` (Eq. 4, default), ``"sni"`` (Eq. 2), ``"slnid"`` (Eq. 6), ``"snid"``,
            ``"released"``, or an ``InhibitionForm``.
        layers: Hidden layers; the ReLUs between fully connected layers by default.
        sigma: Reach in units, > 0, or as a part of the width: ``"N/6"``.
        conv: ``"pool"`` (channel means) or ``"location"`` (each position a sample) to take feature
            maps, which are refused by default. Distance is that of channel numbers.
        importance: Settings for the discounted forms.

    Raises:
        ValueError: For a bad argument; at the first experience, for layers that match nothing; in
            training, for negative activations or a value that is no longer finite.

    References:
        Aljundi et al. (2018), Eqs. 2 to 6.
    """

    label = "SLNI"

    def __init__(
        self,
        lam: float = 1e-3,
        *,
        form: str | InhibitionForm = "slni",
        layers: LayerSpec = "auto",
        sigma: float | str = "N/6",
        conv: str = "error",
        importance: NeuronImportance | None = None,
    ) -> None:
        super().__init__(lam, layers, conv)
        if not isinstance(form, InhibitionForm):
            check_one_of("SLNIPlugin", "form", form, tuple(FORMS))
        self.form = form
        kind = self._form
        _sigma(sigma, 1)
        if not kind.local and sigma != "N/6":
            raise ValueError(f"form={form!r} has no locality; got sigma={sigma!r}. Use 'slni'.")
        if not kind.discount and importance is not None:
            raise ValueError(f"form={form!r} has no discount; got {importance}. Use 'slnid'.")
        self.sigma = sigma
        self.measure = importance or NeuronImportance()
        self.importance: dict[str, Tensor] = {}
        self._measured = 0
        self._operators: dict[str, tuple[Any, Operator]] = {}  # built again where needed

    @classmethod
    def released_code(cls, lam: float = 1e-3, *, layers: LayerSpec = "auto") -> SLNIPlugin:
        """The authors' released code: locality, and the smaller discount of each pair."""
        return cls(lam, form="released", layers=layers)

    @property
    def nonnegative(self) -> bool:  # type: ignore[override]
        """Whether negative activations are refused."""
        return self._form.signed == "error"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_operators": {}}

    def penalty(self, name: str, h: Tensor) -> Tensor:
        """See ``RepresentationPenalty``."""
        # Negative values are looked for with the other values that can go wrong, not here.
        signed = "abs_moment" if self._form.signed == "abs_moment" else "product"
        operator = self._operator(name, h)
        return inhibition_loss(h, operator=operator, reduction=self._form.reduction, signed=signed)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Measure how important each unit was to the experience."""
        super().after_training_exp(strategy, **kwargs)
        if self.lam != 0 and self._form.discount:
            self._accumulate(self._measure(strategy))

    # parts ----------------------------------------------------------------------------------

    @property
    def _form(self) -> InhibitionForm:
        return self.form if isinstance(self.form, InhibitionForm) else FORMS[self.form]

    def _operator(self, name: str, h: Tensor) -> Operator:
        """The weights of a layer's pairs, built once for a width and the importance so far."""
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        key = (h.shape[1], dtype, h.device)
        if name not in self._operators or self._operators[name][0] != key:
            form, width = self._form, h.shape[1]
            method = form.method
            if form.signed == "abs_moment" and method == "auto":
                method = "dense"  # it needs every pair by itself
            operator = inhibition_operator(
                width,
                _sigma(self.sigma, width) if form.local else None,
                self._discounting(name, width),
                combine=form.combine,
                method=method,
                like=torch.empty(0, dtype=dtype, device=h.device),
            )
            self._operators[name] = (key, operator)
        return self._operators[name][1]

    def _discounting(self, name: str, width: int) -> Tensor | None:
        if not self._form.discount or name not in self.importance:
            return None
        return self.measure.gain * _widened(self.importance[name], width)

    def _measure(self, strategy: Any) -> dict[str, Tensor]:
        """Eq. 5 for each layer on the experience just learnt, whatever the size of batches."""
        model, dataset = strategy.model, strategy.experience.dataset.eval()
        loader = DataLoader(
            dataset,
            batch_size=strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            generator=torch.Generator(),  # the global random state belongs to training
        )
        taps = hidden_taps("SLNIPlugin", model, self.layers)
        recorder = ActivationRecorder(self.layers)
        sums: dict[str, Tensor] = {}
        with evaluating(model):
            for x, y, *_, tasks in ((*batch, batch[-1]) for batch in loader):
                x, y, tasks = (column.to(strategy.device) for column in (x, y, tasks))
                if x.is_floating_point():
                    x = x.requires_grad_().view_as(x)  # frozen layers have a sensitivity as well
                with torch.enable_grad():
                    recorder.attach(model, taps)
                    try:
                        output = avalanche_forward(model, x, tasks)
                    finally:
                        recorder.detach()
                    found = self.outputs(recorder, output, len(y))
                    objective = self._objective(strategy, output, y)
                sensitivity = self._sensitivity(objective, found)
                for name, value in sensitivity.items():
                    sums[name] = sums[name] + value if name in sums else value
        return {name: (total / len(dataset)).float() for name, total in sums.items()}

    def _sensitivity(self, objective: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        values = neuron_sensitivity(objective, list(found.values()), at=self.measure.at)
        return dict(zip(found, values, strict=True))

    def _objective(self, strategy: Any, output: Tensor, y: Tensor) -> Tensor:
        """The scalar of Eq. 5, added up over the batch."""
        kind = self.measure.objective
        if kind == "auto":
            kind = "output_l2" if any(map(_is_mas, strategy.plugins)) else "loss"
        if kind == "output_l2":
            return output.square().sum()
        criterion = strategy._criterion
        value = criterion(output, y)
        mean = value.ndim == 0 and getattr(criterion, "reduction", "mean") == "mean"
        return value * len(y) if mean else value.sum()

    def _accumulate(self, new: dict[str, Tensor]) -> None:
        self._measured += 1
        for name, value in new.items():
            width = max(len(value), len(self.importance.get(name, value)))
            value = _widened(value, width)
            old = _widened(self.importance.get(name, torch.zeros_like(value)), width).to(value)
            if self.measure.accumulate == "sum":
                self.importance[name] = old + value
            elif self.measure.accumulate == "mean":
                self.importance[name] = old + (value - old) / self._measured
            else:
                self.importance[name] = torch.maximum(old, value)
        self._operators = {}


def _is_mas(plugin: Any) -> bool:
    """Ours, one built on its importance, Avalanche's, or a class derived from it."""
    named = any("MAS" in c.__name__ for c in type(plugin).__mro__)
    return named or isinstance(getattr(plugin, "measure", None), OutputNorm)


def _sigma(sigma: float | str, width: int) -> float:
    """The reach in units.

    Raises:
        ValueError: If it is neither a finite number > 0 nor such a part of the width.
    """
    if isinstance(sigma, str):
        match = re.fullmatch(r"N/(\d+(?:\.\d+)?)", sigma)
        value = width / float(match[1]) if match and float(match[1]) > 0 else 0.0
    else:
        value = 0.0 if isinstance(sigma, bool) else float(sigma)
    if not 0 < value < float("inf"):
        raise ValueError(
            f"SLNIPlugin expects sigma to be a finite number of units > 0, or a part of the width "
            f'such as "N/6"; got {sigma!r}. For no locality use form="sni" or "snid".'
        )
    return value


def _widened(importance: Tensor, width: int) -> Tensor:
    """Units that a grown layer has gained were of no importance so far."""
    return nn.functional.pad(importance, (0, width - len(importance)))
