r"""How diverse are gradients and representations: similarity of pairs of samples, by class.

Samples of different classes that look alike to a network pull its weights in opposite directions.
``similarity_report`` measures that for a model and a batch, without Avalanche's loop;
``GradientDiversity`` does so after each experience of a run.

Reference:
    Chen et al. (2020), Discriminative Representation Loss (DRL) for Continual Learning: A Solution
    for CLVision Challenge, Sec. 2, Figs. 1 and 2.

Cost: one forward pass, and ``B`` gradients of all ``P`` trainable parameters held at once: 4 B P
bytes (36 MB for 100 samples of an MLP with 89,610 parameters, 9.4 GB for those of a ResNet-50).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from avalanche_ext.evaluation.random_states import random_states_kept
from avalanche_ext.functional.similarity import (
    PairSplit,
    cosine_similarities,
    pearson,
    per_sample_gradients,
    split_pairs,
)
from avalanche_ext.models.recording import (
    ActivationRecorder,
    LayerSpec,
    mask_value,
    select_layers,
    unmasked,
)

__all__ = ["GradientDiversity", "SimilarityReport", "similarity_report"]

_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class SimilarityReport:
    """Cosine similarities of all pairs of a batch, pairs of different and of one class apart.

    Attributes:
        input: Of the flattened inputs.
        representation: Of the recorded layers' outputs, concatenated.
        gradient: Of each sample's own loss gradient; a zero gradient has similarity 0.
    """

    input: PairSplit
    representation: PairSplit
    gradient: PairSplit

    @property
    def separable(self) -> bool:
        """Whether every pair of one class is more alike, represented, than any other pair."""
        different, same = self.representation
        return bool(len(different) and len(same) and same.min() > different.max())

    def values(self) -> dict[str, float]:
        """Means, sample standard deviations and correlations, by metric name.

        ``Similarity_{input,representation,gradient}_{different,same}`` are means,
        ``Similarity_sd_...`` their standard deviations over pairs, and
        ``Similarity_r_{input,representation}_{different,same}`` Pearson's r with the gradient's
        similarity. What is not defined (no such pair, or a similarity that does not vary) is left
        out.
        """
        out: dict[str, float] = {}
        for kind in PairSplit._fields:
            varies = {}
            for what in ("input", "representation", "gradient"):
                pairs = getattr(getattr(self, what), kind)
                if len(pairs):
                    out[f"Similarity_{what}_{kind}"] = float(pairs.mean())
                if len(pairs) > 1:
                    out[f"Similarity_sd_{what}_{kind}"] = float(pairs.std())
                varies[what] = len(pairs) > 1 and bool(pairs.std() > 1e-6)  # rounding
            for what in ("input", "representation"):
                if varies[what] and varies["gradient"]:
                    r = pearson(getattr(self.gradient, kind), getattr(getattr(self, what), kind))
                    out[f"Similarity_r_{what}_{kind}"] = float(r)
        return out


def similarity_report(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    layers: LayerSpec = "auto",
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    chunk_size: int | None = None,
) -> SimilarityReport:
    r"""Cosine similarities of inputs, representations and per-sample gradients of a batch.

    The model is measured in eval mode and handed back as it was: weights, ``.grad``, buffers, each
    module's mode and the global random states. Samples are taken to the model's device.

    Args:
        model: Called as ``model(x)``.
        x: Samples.
        y: Their labels.
        layers: Which outputs make up the representation, see
            ``avalanche_ext.models.recording.select_layers``. The default suits the paper's
            network: every hidden layer after its activation, and the logits.
        loss: Mean loss of a batch, whose gradient is taken sample by sample.
        chunk_size: Samples to differentiate at once; all by default.

    Shapes:
        x ``(B, ...)`` with ``B >= 2``, y ``(B,)``; the result holds ``B (B - 1) / 2`` pairs.

    Raises:
        TypeError: If the model needs task labels or does not return one tensor.
        ValueError: If the shapes or labels do not fit, a layer matches nothing, or per-sample
            gradients cannot be taken.

    References:
        Chen et al. (2020), Sec. 2.
    """
    _check_model(model)
    if y.ndim != 1 or len(x) != len(y) or len(y) < 2:
        raise ValueError(
            f"similarity_report expects x (B, ...) and y (B,) with B >= 2; got {tuple(x.shape)} "
            f"and {tuple(y.shape)}."
        )
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    with _as_it_was(model), random_states_kept(device):
        representations = _representations(model, x, y, layers)
        try:
            gradients = per_sample_gradients(model, x, y, loss, chunk_size)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"per-sample gradients of {type(model).__name__} could not be taken "
                f"({str(error).strip().splitlines()[0]}). torch.func.vmap must run the model: no "
                f"recurrent layer, no .item(), no branch on values, no random numbers."
            ) from error
    rows = (x.float(), representations, gradients)
    return SimilarityReport(*(split_pairs(cosine_similarities(r), y) for r in rows))


class GradientDiversity(PluginMetric[dict[str, float]]):
    """Similarities of gradients, representations and inputs on a probe, after each experience.

    Measured in ``after_training_exp``, not after evaluation: every experience gives exactly one
    set of values, of the model as other plugins' ``after_training_exp`` left it, however often the
    run evaluates. Names are those of ``SimilarityReport.values``, such as
    ``Similarity_gradient_different/train_phase/train_stream``: no experience, so that a run forms
    one curve over iterations, and no task, because the probe holds samples of several.

    The probe is used for nothing but measuring. Without ``probe`` it is a simple random sample of
    all training samples of the experiences seen so far, in their eval transform: every sample draws
    a random key once and the ``n_samples`` smallest keys stay, so no more is ever held. Pairs are
    told apart by label. A model that cannot be measured is refused before its first update.

    Args:
        n_samples: Largest number of samples, at least 2. Paper: 100 (Fig. 1).
        probe: Samples to use instead, the same at every measurement: a pair of tensors
            ``(x, y)`` or a data set of ``(x, y, ...)``; a random ``n_samples`` of them if there
            are more. The paper uses test samples.
        layers: See ``avalanche_ext.models.recording.select_layers``.
        loss: Mean loss of a batch, whose gradient is taken sample by sample.
        seed: Seed of the choice of samples.
        chunk_size: Samples to differentiate at once; all by default.

    Raises:
        TypeError: For an argument of the wrong type; for a model that needs task labels.
        ValueError: For a bad argument, or a model whose per-sample gradients cannot be taken.

    References:
        Chen et al. (2020), Sec. 2.
    """

    def __init__(
        self,
        n_samples: int = 100,
        *,
        probe: Dataset | tuple[Tensor, Tensor] | None = None,
        layers: LayerSpec = "auto",
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_integer("n_samples", n_samples, 2)
        _check_integer("seed", seed, 0)
        if chunk_size is not None:
            _check_integer("chunk_size", chunk_size, 1)
        if not callable(loss):
            raise TypeError(f"GradientDiversity expects a function loss(logits, y); got {loss!r}.")
        if isinstance(layers, list | tuple) and not layers:
            raise ValueError("GradientDiversity expects at least one layer; got an empty list.")
        self.n_samples, self.seed = n_samples, seed
        self.layers, self.loss, self.chunk_size = layers, loss, chunk_size
        self._given = False
        self.reset()
        if probe is not None:
            self._given = True
            self._add(_as_samples(probe), seed)
            if len(self._y) < 2:
                raise ValueError(
                    f"GradientDiversity expects a probe of at least 2 samples; got {len(self._y)}."
                )

    def before_training_exp(self, strategy: Any) -> None:
        """Refuse a model that cannot be measured, once, before it is trained."""
        x, y, samples = self._x, self._y, strategy.experience.dataset.eval()
        if not self._checked and (self._given or len(samples) > 1):
            if not self._given:
                with random_states_kept(strategy.device):
                    x, y = _take(samples, (0, 1))
            self._report(strategy.model, x, y)
            self._checked = True

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Extend the probe by the experience, measure, and emit."""
        experience = strategy.experience
        key = (experience.origin_stream.name, experience.current_experience)
        if not self._given and key not in self._experiences:
            self._experiences.add(key)
            with random_states_kept(strategy.device):
                self._add(experience.dataset.eval(), self.seed + _SEEDS_APART * (1 + key[1]))
        if self._x is None or len(self._y) < 2:
            return []
        self._values = self._report(strategy.model, self._x, self._y).values()
        step = strategy.clock.train_iterations
        return [
            MetricValue(self, get_metric_name(name, strategy, add_task=False), value, step)
            for name, value in self._values.items()
        ]

    def result(self) -> dict[str, float] | None:
        """The values of the last measurement, ``None`` before the first."""
        return self._values

    def reset(self) -> None:
        """Forget the last measurement and the samples of the stream; a given probe stays."""
        self._values: dict[str, float] | None = None
        self._checked = False
        self._experiences: set[tuple[str, int]] = set()
        if not self._given:
            self._x: Tensor | None = None
            self._y = torch.empty(0, dtype=torch.long)
            self._keys = torch.empty(0, dtype=torch.float64)

    def __str__(self) -> str:
        return "Similarity"

    def _report(self, model: nn.Module, x: Any, y: Tensor) -> SimilarityReport:
        settings = {"loss": self.loss, "chunk_size": self.chunk_size}
        return similarity_report(model, x, y, self.layers, **settings)

    def _add(self, samples: Any, seed: int) -> None:
        """Give each sample a random key; hold the samples with the smallest ones."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(len(samples), generator=generator, dtype=torch.float64)
        chosen = keys.argsort()[: self.n_samples]
        if not len(chosen):
            return
        x, y = _take(samples, chosen.tolist())
        keys = torch.cat([self._keys, keys[chosen]])
        x = x if self._x is None else torch.cat([self._x, x])
        kept = keys.argsort()[: self.n_samples]
        self._keys, self._x, self._y = keys[kept], x[kept], torch.cat([self._y, y])[kept]


def _check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"GradientDiversity expects an integer {name} >= {low}; got {value!r}.")
    if value < low:
        raise ValueError(f"GradientDiversity expects {name} >= {low}; got {name}={value}.")


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if is_multi_task_module(model):
        raise TypeError(
            f"{name} needs the task label of each sample, so per-sample gradients of it cannot be "
            f"taken in one batch. Use a model with one head that is called as model(x)."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{name} has no trainable parameter, hence no gradients to compare.")
    mixing = [
        n for n, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
    ]  # fmt: skip
    if mixing:
        raise ValueError(
            f"per-sample gradients of {name} are not defined: {mixing[:3]} normalise by the "
            f"statistics of the batch in eval mode too. Use track_running_stats=True."
        )


def _representations(model: nn.Module, x: Tensor, y: Tensor, layers: LayerSpec) -> Tensor:
    taps, with_logits = select_layers(model, layers)
    recorder = ActivationRecorder(layers)
    recorder.attach(model, taps)
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        recorder.detach()
    recorded = recorder.pop()
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"similarity_report expects a model that returns a tensor of logits; "
            f"{type(model).__name__} returned {type(logits).__name__}."
        )
    if logits.ndim == 2 and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(
            f"the samples have labels {int(y.min())} to {int(y.max())}, but the model has "
            f"{logits.shape[1]} outputs; measure samples of known classes, or widen the head."
        )
    if with_logits:
        recorded.append(("logits", unmasked(logits, mask_value(model))))
    for name, h in recorded:
        if len(h) != len(x):
            raise ValueError(
                f"layer {name!r} gives {len(h)} rows for {len(x)} samples; choose layers whose "
                f"first axis is the batch."
            )
    return torch.cat([h.flatten(1).float() for _, h in recorded], dim=1)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode and every buffer's value are back."""
    modes = [(m, m.training) for m in model.modules()]
    found = [(m._buffers, n, b) for m in model.modules() for n, b in m._buffers.items()]
    buffers = [(owner, n, b, b.clone()) for owner, n, b in found if b is not None]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                owner[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _as_samples(probe: Any) -> Any:
    if isinstance(probe, tuple | list):
        if len(probe) == 2 and all(isinstance(part, Tensor) for part in probe):
            if probe[1].ndim != 1 or len(probe[0]) != len(probe[1]):
                raise ValueError(
                    f"GradientDiversity expects a probe (x, y) of shapes (N, ...) and (N,); got "
                    f"{tuple(probe[0].shape)} and {tuple(probe[1].shape)}."
                )
            return TensorDataset(*probe)
    elif not isinstance(probe, Tensor) and hasattr(probe, "__getitem__"):
        return probe.eval() if callable(getattr(probe, "eval", None)) else probe
    raise TypeError(
        f"GradientDiversity expects probe to be two tensors (x, y) or a data set of (x, y, ...); "
        f"got {type(probe).__name__}."
    )


def _take(samples: Any, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    chosen = [samples[i] for i in indices]
    if not isinstance(chosen[0][0], Tensor):
        raise TypeError(
            f"GradientDiversity expects samples that are tensors; got "
            f"{type(chosen[0][0]).__name__}. Give the data set a transform such as ToTensor."
        )
    x = torch.stack([sample[0].detach().cpu() for sample in chosen])
    return x, torch.tensor([int(sample[1]) for sample in chosen])
