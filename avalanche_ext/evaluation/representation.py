r"""How much a representation says about each experience: a linear probe on frozen features.

Reference:
    S. Yan, J. Xie, X. He (2021), DER: Dynamically Expandable Representation for Class Incremental
    Learning, CVPR, Sec. 4 (ExpandableDER here): backward and forward transfer "for representation".

The accuracies of a class-incremental network fall because its classifier forgets and because there
are more and more classes to choose from. To see what its features have lost or gained, a new
classifier is fitted to them after each experience, on the training data of everything seen, and
tested on each experience among the classes of that experience. These accuracies form a matrix like
any other, see ``accuracy_matrix.backward_transfer_expandable_der`` and
``forward_transfer_expandable_der``.

Faithfulness:
    1. The paper's text as we know it does not say how the classifier is fitted again. Here it is
       softmax regression with an L2 penalty, on features of mean 0 and deviation 1, solved to its
       only minimum: no schedule, no random draw. The default of ``l2`` is ours.
    2. The probe may see all training data, not the memory alone: it measures the features, not
       what the method could do with them.
    3. Features come from evaluation mode and evaluation transforms.
    4. Where there are task labels, a class is a label of a task.

Cost: one pass over all training and test data seen so far, and some hundred products of the
features with the probe's weights, in float64 on the features' device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.evaluation.random_states import random_states_kept
from avalanche_ext.models.modes import evaluating
from avalanche_ext.models.recording import ActivationRecorder, Tap
from avalanche_ext.training.checks import check_count, check_nonnegative
from avalanche_ext.training.loading.sources import Source, as_source
from avalanche_ext.training.representation_penalty import bare

__all__ = [
    "LinearProbe",
    "check_penalty",
    "feature_taps",
    "features_of",
    "linear_probe",
    "representation_accuracies",
]

_MOST_STEPS = 2000
_TOLERANCE = 1e-7  # of the largest entry of the gradient
_LABELS_PER_TASK = 1 << 32  # the same label of two tasks means two classes
_CONSTANT = 1e-7  # a feature that varies less than this share of its size is float32's rounding


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted softmax regression, see ``linear_probe``.

    Args:
        weight: On standardised features, ``(D, C)``.
        bias: ``(C,)``.
        mean: The features' mean in the data it was fitted to, ``(D,)``.
        scale: Their standard deviation, 1 for a constant feature, ``(D,)``.
        classes: The labels that the columns stand for, ascending, ``(C,)``.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    classes: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``(B, C)`` from features ``(B, D)``."""
        return (features.to(self.mean) - self.mean) / self.scale @ self.weight + self.bias

    def predict(self, features: Tensor, classes: Iterable[int] | None = None) -> Tensor:
        """The most likely label of each row.

        Args:
            features: ``(B, D)``.
            classes: Labels to choose from; all by default.

        Raises:
            ValueError: For no label to choose from, or one that the probe was not fitted to.
        """
        z = self.logits(features)
        if classes is None:
            return self.classes[z.argmax(1)]
        allowed, known = {int(c) for c in classes}, self.classes.tolist()
        if not allowed or not allowed <= {*known}:
            raise ValueError(
                f"LinearProbe expects classes among {known}, which it was fitted to, at least one "
                f"of them; got {sorted(allowed)}."
            )
        columns = torch.tensor([c in allowed for c in known], device=z.device)
        return self.classes[columns][z[:, columns].argmax(1)]


def linear_probe(features: Tensor, labels: Tensor, *, l2: float = 1e-3) -> LinearProbe:
    r"""Softmax regression on standardised features, in float64 by L-BFGS from zero.

    .. math:: \min_{W, b} \frac1N \sum_n -\log \mathrm{softmax}(W^\top x_n + b)_{y_n}
              + \frac{l_2}{2} \lVert W \rVert^2

    scikit-learn's ``LogisticRegression(C=1 / (l2 * N))`` has the same minimum. The same features
    give the same probe, bit for bit on one device.

    Args:
        features: One row per sample; no gradient reaches them.
        labels: Any whole numbers.
        l2: Weight of the penalty, > 0: without it separable features have no minimum.

    Shapes:
        features ``(N, D)``, labels ``(N,)``, N at least 1.

    Raises:
        ValueError: For other shapes, features that are not finite, or ``l2`` not above 0.
    """
    check_penalty("linear_probe", l2)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise ValueError(
            f"linear_probe expects features (N, D) and labels (N,) with N and D at least 1; got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    x = features.detach().double()
    if not bool(x.isfinite().all()):
        raise ValueError(
            "linear_probe expects finite features; got inf or nan: the network has diverged."
        )
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = scale.where(scale > _CONSTANT * x.abs().amax(0), 1.0)
    classes, y = labels.to(x.device).unique(return_inverse=True)
    weight, bias = _fitted((x - mean) / scale, y, len(classes), l2)
    return LinearProbe(weight, bias, mean, scale, classes)


def check_penalty(owner: str, l2: float) -> None:
    """Raise unless ``l2`` is a finite number > 0."""
    check_nonnegative(owner, l2=l2)
    if l2 == 0:
        raise ValueError(
            f"{owner} expects l2 > 0; got 0, with which features that can be separated have no "
            f"best probe. A small one is 1e-6."
        )


def _fitted(x: Tensor, y: Tensor, n_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(x.shape[1], n_classes, requires_grad=True)
    bias = x.new_zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MOST_STEPS, max_eval=2 * _MOST_STEPS,
        tolerance_grad=_TOLERANCE, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(x @ weight + bias, y) + l2 / 2 * weight.square().sum()
            loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    closure()
    steepest = max(float(p.grad.abs().amax()) for p in (weight, bias) if p.grad is not None)
    if not steepest <= _TOLERANCE:
        warnings.warn(
            f"linear_probe stopped before its minimum: the gradient is still {steepest:.1e}, not "
            f"{_TOLERANCE:.0e}, after at most {_MOST_STEPS} steps. Raise l2 (it is {l2:g}).",
            stacklevel=3,
        )
    return weight.detach(), bias.detach()


def feature_taps(model: nn.Module) -> list[Tap]:
    """Where ``features_of`` looks: nothing to record for a model that has ``super_feature``.

    Raises:
        ValueError: If the model has neither that nor a linear layer.
    """
    network = bare(model)
    if hasattr(network, "super_feature"):
        return []
    taps = [(name, "input") for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not taps:
        raise ValueError(
            f"the features of {type(network).__name__} are not known: it has no linear layer whose "
            f"input they could be. Give it a method super_feature(x) that returns them, (B, D)."
        )
    return taps


def features_of(model: nn.Module, x: Tensor, tasks: Tensor | None = None) -> Tensor:
    """Features ``(B, D)`` of a batch: ``model.super_feature(x)``, or the classifier's input.

    The latter is the input of the linear layer that the forward pass calls last. The pass is made
    in the mode that the model is in.

    Args:
        model: The network, compiled or not.
        x: The batch.
        tasks: Its task labels, for a model that takes them; one task for all of the batch.

    Raises:
        ValueError: If the features cannot be found.
    """
    network: Any = bare(model)
    taps = feature_taps(network)
    if not taps:
        return network.super_feature(x).flatten(1)
    recorder = ActivationRecorder()
    recorder.attach(network, taps)
    try:
        avalanche_forward(network, x, tasks)
    finally:
        recorder.detach()
    recorded = [h for _, h in recorder.pop()]
    if not recorded or recorded[-1].shape[:1] != (len(x),):
        given = tuple(recorded[-1].shape) if recorded else "nothing"
        raise ValueError(
            f"the features of {type(network).__name__} are not known: of a batch of {len(x)} "
            f"samples its last linear layer was given {given}. Give it a method super_feature(x) "
            f"that returns them, (B, D)."
        )
    return recorded[-1].flatten(1)


def representation_accuracies(
    model: nn.Module,
    train: Sequence[Any],
    test: Sequence[Any],
    *,
    l2: float = 1e-3,
    batch_size: int = 512,
    source: Callable[[Any], Source] = as_source,
) -> list[float]:
    """One row of the representation's accuracy matrix: a probe's accuracy on each experience.

    The probe is fitted to all of ``train`` and tested on each of ``test``, among the classes that
    the data set of the same number in ``train`` has. The model is handed back as it was: weights,
    batch statistics, each module's mode, the global random states.

    Args:
        model: The network; data are taken to its device.
        train: The training data seen so far, Avalanche's data set of each experience.
        test: The test data, likewise.
        l2: See ``linear_probe``.
        batch_size: Samples per forward pass.
        source: Reads a data set; ``training.loading.sources.source_for`` finds what a plugin keeps
            on the device.

    Returns:
        Accuracies from 0 to 1, one for each of ``test``.

    Raises:
        ValueError: If the two do not pair up, a data set is empty, or the features cannot be found.
    """
    check_count("representation_accuracies", batch_size=batch_size)
    if not train or len(train) != len(test):
        raise ValueError(
            f"representation_accuracies expects one test set for each training set, at least "
            f"one; got {len(train)} and {len(test)}."
        )
    device = next(model.parameters()).device

    def read(dataset: Any) -> tuple[Tensor, Tensor]:
        return _features_and_labels(model, source(dataset.eval()), batch_size, device)

    accuracies = []
    with evaluating(bare(model)), random_states_kept(device):
        seen = [read(dataset) for dataset in train]
        features, labels = (torch.cat(column) for column in zip(*seen, strict=True))
        probe = linear_probe(features, labels, l2=l2)
        for dataset, (_, own) in zip(test, seen, strict=True):
            x, y = read(dataset)
            found = probe.predict(x, own.unique().tolist())
            accuracies.append(float((found == y).double().mean()))
    return accuracies


@torch.no_grad()
def _features_and_labels(
    model: nn.Module, samples: Source, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if not len(samples):
        raise ValueError(
            "representation_accuracies expects data sets with samples; one of them is empty. Drop "
            "it, and the one that it is paired with."
        )
    parts = []
    for batch in torch.arange(len(samples)).split(batch_size):
        x, y, *rest = (column.to(device) for column in samples.gather(batch))
        tasks = rest[-1] if rest else torch.zeros_like(y)
        parts.append((features_of(model, x, tasks), y + _LABELS_PER_TASK * tasks))
    features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, labels
