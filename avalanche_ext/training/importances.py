r"""How important parameters are to an experience that has been learnt: ``L2``, EWC's and MAS's.

Those of SI and RWalk, measured while it is being learnt, are in ``path_importances``.

``Fisher`` (EWC) and ``OutputNorm`` (MAS) look at every sample of the experience by itself, so that
the size of batches does not matter. They run in evaluation mode with the evaluation transforms,
leave batch statistics and random states alone, and put every module's mode back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_ext.functional.importance import sampled_labels
from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.models.modes import evaluating
from avalanche_ext.models.network_split import as_written
from avalanche_ext.training.checks import check_nonnegative, check_one_of
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.sample_gradients import SampleGradients

__all__ = ["L2", "Fisher", "Importance", "OutputNorm", "trainable"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may move, by name."""
    return {name: p for name, p in bare(model).named_parameters() if p.requires_grad}


class Importance:
    r"""How important parameters are to one experience, and how experiences add up.

    Args:
        merge: ``"sum"`` over experiences, their ``"mean"``, or a number in [0, 1] by which what
            earlier experiences found is multiplied before the new one is added.

    Attributes:
        kappa: Factor of the term: 1/2 for a negative log posterior, else 1.
        label: The method's name in logs.
    """

    kappa = 1.0
    label = "Anchor"

    def __init__(self, merge: str | float = "sum") -> None:
        if isinstance(merge, str):
            check_one_of(type(self).__name__, "merge", merge, ("sum", "mean"))
        else:
            check_nonnegative(type(self).__name__, merge=merge)
            if merge > 1:
                raise ValueError(
                    f"{type(self).__name__} expects merge 'sum', 'mean' or a factor from 0 to 1 "
                    f"for what earlier experiences found; got {merge}."
                )
        self.merge = merge

    def shares(self, n: int) -> tuple[float, float]:
        """Factors of the importance before, and of the ``n``-th experience's (from 1)."""
        if self.merge == "mean":
            return (n - 1) / n, 1 / n
        return (1.0 if self.merge == "sum" else float(self.merge)), 1.0

    def start(self, parameters: dict[str, nn.Parameter]) -> None:
        """An experience begins."""

    def before_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gradients of the loss without the anchor are there; parameters have not moved yet."""

    def after_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """Parameters have moved."""

    def finish(self, strategy: Any) -> dict[str, Tensor]:
        """The importance to the experience that has been learnt, by name, >= 0."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")


class L2(Importance):
    """1 for every parameter; 0 for classes of a growing head that have not been trained on."""

    kappa = 0.5
    label = "L2Transfer"

    def __init__(self) -> None:
        super().__init__(merge=0.0)

    def finish(self, strategy: Any) -> dict[str, Tensor]:
        """See ``Importance``."""
        found = {name: torch.ones_like(p) for name, p in trainable(strategy.model).items()}
        for layer, rows in _trained_rows(bare(strategy.model)):
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in found:
                    found[name][: len(rows)][~rows] = 0
                    found[name][len(rows) :] = 0
        return found


class _PerSample(Importance):
    """Measured by one pass over the experience, each sample's gradient by itself."""

    def finish(self, strategy: Any) -> dict[str, Tensor]:
        """See ``Importance``."""
        model, dataset = bare(strategy.model), strategy.experience.dataset.eval()
        loader = DataLoader(
            dataset,
            batch_size=strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            generator=torch.Generator(),  # the global random state belongs to training
        )
        # All numbers at once: the draw of a sample does not depend on the batch it stands in.
        draws = seeded(torch.initial_seed(), strategy.clock.train_exp_counter)
        uniform = torch.rand(len(dataset), generator=draws, dtype=torch.float64)
        gradients = SampleGradients(
            model, trainable(model), objective=self._objective, of=self._of, labels=self._labels,
            owner=type(self).__name__,
        )  # fmt: skip
        with evaluating(model), as_written(model):
            for x, y, *_, tasks in ((*batch, batch[-1]) for batch in loader):
                own, uniform = uniform.tensor_split([len(x)])
                for task in tasks.unique().tolist() if is_multi_task_module(model) else (None,):
                    rows = slice(None) if task is None else tasks == task
                    here, labels = (column[rows].to(strategy.device) for column in (x, y))
                    gradients.add(here, labels, task, own[rows])
        return {name: total / len(dataset) for name, total in gradients.sums.items()}

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over a batch of what is differentiated, from the output and the labels."""
        raise NotImplementedError

    def _of(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def _labels(self, logits: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return y


class Fisher(_PerSample):
    r"""Diagonal of the Fisher information, per sample.

    .. math:: F_k = \frac1n \sum_x \left(\frac{\partial \log p(y|x)}{\partial \theta_k}\right)^2

    Args:
        mode: Where ``y`` comes from: ``"sampled"``, from the model's own distribution, is the
            Fisher information; ``"empirical"`` takes the true labels, ``"argmax"`` the most likely
            ones. Where the model is certain, the last two are far smaller.
        merge: See ``Importance``.
    """

    kappa = 0.5
    label = "EWC"

    def __init__(self, mode: str = "sampled", *, merge: str | float = "sum") -> None:
        super().__init__(merge)
        check_one_of("Fisher", "mode", mode, ("sampled", "empirical", "argmax"))
        self.mode = mode

    def _labels(self, logits: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise ValueError(
                f"Fisher expects logits (B, C); the network gives shape {tuple(logits.shape)}. Use "
                "importance='mas' or 'si', which need no classes."
            )
        if self.mode == "sampled":
            return sampled_labels(logits.cpu(), uniform).to(y)
        return y if self.mode == "empirical" else logits.argmax(1)

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def _of(self, gradient: Tensor) -> Tensor:
        return gradient.square()


class OutputNorm(_PerSample):
    r"""Sensitivity of the output's squared length, per sample; labels are not needed.

    .. math:: \Omega_k = \frac1n \sum_x \left|
              \frac{\partial \lVert z(x) \rVert^2}{\partial \theta_k}\right|

    Args:
        merge: See ``Importance``.
    """

    label = "MAS"

    def __init__(self, *, merge: str | float = "sum") -> None:
        super().__init__(merge)

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.square().sum()

    def _of(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


def _trained_rows(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Linear layers of growing heads, and which of their rows have been trained on."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        growing = isinstance(module, IncrementalClassifier) and module.masking
        if growing or isinstance(module, FixedSizeClassifier):
            assert isinstance(module.active_units, Tensor)
            yield f"{prefix}classifier", module.active_units != 0
        elif isinstance(module, MultiHeadClassifier):
            for task, head in module.classifiers.items():
                assert isinstance(head, IncrementalClassifier)
                rows = torch.ones_like(head.classifier.bias, dtype=torch.bool)
                if int(task) not in module.known_train_tasks_labels:
                    rows = ~rows
                elif module.masking:
                    rows = module.task_masks[int(task)]
                yield f"{prefix}classifiers.{task}.classifier", rows
