"""What rehearsal in feature space shares: the cut, the frozen encoder, and the mixed loss.

The network is cut at a layer. A memory gives features of earlier classes to the head behind it,
beside the new samples; it learns when an experience has ended, by one pass in evaluation mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from avalanche.models import MultiTaskModule
from avalanche.models.utils import avalanche_forward
from avalanche.training.templates.problem_type.supervised_problem import SupervisedProblem
from avalanche.training.utils import _at_task_boundary
from torch import Tensor, nn

from avalanche_ext.functional.generative import new_data_weight
from avalanche_ext.models.modes import evaluating
from avalanche_ext.models.network_split import NetworkSplit
from avalanche_ext.training.checks import CheckedPlugin
from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.loading.sources import TensorSource, source_for
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.replay_sources import (
    check_one_mixture,
    classes_of,
    whole_experience,
)
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["LatentMemory", "LatentRehearsal", "dataset_features"]

_POOL = 2**21  # numbers that are drawn at once, for several steps
_MOST_AHEAD = 8  # steps


class LatentMemory(Protocol):
    """Features of what has been learnt."""

    @property
    def classes(self) -> list[int]:
        """Classes that can be drawn."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held between experiences."""
        ...

    def write(self, u: Tensor, y: Tensor, generator: torch.Generator | None = None) -> None:
        """Learn features ``(N, D)`` of classes ``(N,)``."""
        ...

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` features and their classes, which take turns."""
        ...


class LatentRehearsal(CheckedPlugin):
    """Base of the plugins that rehearse features.

    Args:
        layer: Name of the layer that ends the encoder.
        memory: Where features come from.
        encoder: ``"freeze_after_first"``: it learns in the first experience alone; ``"frozen"``: it
            never does; ``"slow"``: behind the first one only a share of each of its steps is taken;
            anything else: always. What is frozen stays so when training has ended
            (``requires_grad`` is off). Frozen, slow or distilled, it is in evaluation mode after
            the first experience.
        slow: That share, whatever the optimizer, in [0, 1].
        r: Weight of the new data, see ``new_data_weight``, or ``"share"``: every sample of a step
            counts the same, new or old. With 1 nothing is done, bit for bit.

    Attributes:
        seen: Classes of earlier experiences.
    """

    label = ""

    def __init__(
        self, layer: str, memory: Any, encoder: str, r: str | float, slow: float = 0.1
    ) -> None:
        super().__init__()
        if isinstance(slow, bool) or not isinstance(slow, int | float) or not 0 <= slow <= 1:
            raise ValueError(
                f"{type(self).__name__} expects slow in [0, 1], the share of a step that the "
                f"encoder takes; got {slow!r}."
            )
        if not isinstance(layer, str):
            raise TypeError(
                f"{type(self).__name__} expects the name of one layer, such as 'features.1'; got "
                f"{layer!r}. Names are those of model.named_modules()."
            )
        self.layer = layer
        self.memory: LatentMemory = memory
        self.encoder = encoder
        self.r = r
        self.slow = slow
        self.seen: list[int] = []
        self.experiences = 0
        self._classes: list[int] = []  # of this experience
        self._learning: Any = None  # this experience, until the memory has learnt it
        self._classes_learnt = 0  # counted in each experience
        self._weight = 1.0
        self._split: NetworkSplit | None = None
        self._encoder: list[nn.Module] = []  # modules in front of the cut
        self._statistics: list[tuple[Tensor, Tensor]] = []  # their buffers that stay, and values
        self._slowed: list[nn.Parameter] = []  # in this experience
        self._before: list[Tensor] = []  # what they were before this step
        self._shape: torch.Size | None = None  # of one sample's features
        self._draws: torch.Generator | None = None
        self._pool: tuple[Tensor, Tensor] | None = None
        self._at = 0
        self._replay: tuple[Tensor, Tensor] | None = None  # of this step
        self._sum: Tensor | None = None
        self._steps = 0

    @property
    def mixes_criterion(self) -> bool:
        """See ``check_one_mixture``."""
        return self.r != 1

    @property
    def bytes_remembered(self) -> int:
        """Bytes of the memory between experiences."""
        return self.memory.nbytes

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the encoder stays as it is in this experience."""
        after_first = self.encoder == "freeze_after_first" and self.experiences > 1
        return self.encoder == "frozen" or after_first

    # for subclasses -------------------------------------------------------------------------

    def begin(self, strategy: Any) -> None:
        """An experience has begun, and the network been cut."""

    def learn(self, strategy: Any, u: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """An experience has ended.

        Args:
            strategy: The strategy.
            u: Features of all the experience's samples, ``(N, D)``.
            y: Their labels, ``(N,)``.
            generator: Random numbers.
        """
        self.memory.write(u, y, generator)

    # an experience --------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse what cannot be rehearsed, before anything changes."""
        super().before_train_dataset_adaptation(strategy, **kwargs)
        if self.r != 1 and _at_task_boundary(strategy.experience, before=True):
            self._check_model(strategy)
            self._close(strategy)  # an online stream does not always say which part is the last

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Cut the network, and weigh the new data against what came before."""
        if self.r == 1:
            return
        check_one_mixture(self, strategy)
        if _at_task_boundary(strategy.experience, before=True):
            self._open(whole_experience(strategy.experience))
        self._cut(strategy)  # adaptation may have replaced modules
        if self._weight < 1:
            wrap(strategy, "criterion", self._criterion)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let the memory learn the experience."""
        if self.r == 1:
            return
        unwrap(strategy, "criterion", self._criterion)
        if _at_task_boundary(strategy.experience, before=False):
            self._close(strategy)
        self._split = self._replay = None
        self._encoder, self._slowed, self._before, self._statistics = [], [], [], []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Hold a still encoder still: GEM and A-GEM put the whole network in training mode."""
        if self._holds and any(module.training for module in self._encoder):
            self._to_evaluation()
            for buffer, value in self._statistics:
                buffer.copy_(value)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Keep what the encoder was, where it is slow."""
        self._before = [p.detach().clone() for p in self._slowed]

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Take back all but a share of the encoder's step."""
        for parameter, before in zip(self._slowed, self._before, strict=True):
            parameter.lerp_(before, 1 - self.slow)
        self._before = []

    def _open(self, experience: Any) -> None:
        self._learning = experience
        self._classes = classes_of(experience)
        self.experiences += 1
        self._classes_learnt += len(self._classes)
        rule = 0.5 if self.r == "share" else self.r  # of one step, where its samples are counted
        self._weight = new_data_weight(
            rule, self.experiences, len(self._classes), self._classes_learnt
        )
        self._draws = seeded(torch.initial_seed(), *self.label.encode(), self.experiences)
        self._pool, self._at, self._sum, self._steps = None, 0, None, 0

    def _cut(self, strategy: Any) -> None:
        model, data = bare(strategy.model), strategy.experience.dataset.eval()
        self._split = NetworkSplit(model, self.layer)
        with evaluating(model), torch.random.fork_rng(devices=[]):
            x = source_for(strategy, data).gather(torch.arange(min(2, len(data))))[0]
            x = x.to(strategy.device)
            self._split.check(x)
            parameters, self._encoder = self._split.encoder_parts(x)
            with torch.no_grad():
                shape = self._split.features(x).shape[1:]
        if not shape:
            raise ValueError(
                f"{type(self).__name__}: layer {self.layer!r} gives one number for each sample, "
                f"without a dimension of features. Cut the network at another layer."
            )
        if self._shape not in (None, shape) and self.memory.classes:
            raise ValueError(
                f"{type(self).__name__}: layer {self.layer!r} gave features of shape "
                f"{tuple(self._shape or ())} before, and now {tuple(shape)}. Keep the network and "
                f"the size of its inputs."
            )
        self._shape = shape
        if self.encoder_is_frozen:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            if not any(p.requires_grad for p in model.parameters()):
                raise ValueError(
                    f"{type(self).__name__}: nothing is left to learn: all of the network is in "
                    f"front of the end of layer {self.layer!r}, and frozen. Cut it further in "
                    f"front, or choose an encoder that learns."
                )
        elif self._holds and self.encoder == "slow":
            self._slowed = list(parameters.values())
        if self._holds:
            self._to_evaluation()
            own = [b for module in self._encoder for b in module.buffers(recurse=False)]
            self._statistics = [(buffer, buffer.clone()) for buffer in own]
        self.begin(strategy)

    def _close(self, strategy: Any) -> None:
        if self._learning is None:
            return
        split = NetworkSplit(bare(strategy.model), self.layer)
        u = dataset_features(strategy, split, self._learning.dataset)
        y = attribute_values(self._learning.dataset, "targets")
        assert y is not None
        assert self._draws is not None
        self.learn(strategy, u, y.to(u.device), self._draws)
        if self._sum is not None:
            publish(self, strategy, f"{self.label}_Loss", float(self._sum) / self._steps)
        publish(self, strategy, f"{self.label}_Bytes", float(self.bytes_remembered))
        self.seen = sorted({*self.seen, *self._classes})
        self._draws = self._pool = self._sum = self._learning = None

    # one step -------------------------------------------------------------------------------

    def _criterion(self, strategy: Any, inner: Any) -> Tensor:
        """What stands around the strategy's criterion: the weighted sum of both losses."""
        loss = inner()
        if not strategy.is_training:
            return loss
        n = self.rows(strategy)
        self._replay = u, y = self._drawn(n)
        replay = strategy._criterion(self._head(strategy, u, y), y)
        value = replay.detach()
        self._sum = value if self._sum is None else self._sum + value
        self._steps += 1
        new = len(strategy.mb_y)
        weight = new / (new + n) if self.r == "share" else self._weight
        return weight * loss + (1 - weight) * replay

    def rows(self, strategy: Any) -> int:
        """Features per step: as many as new samples."""
        return len(strategy.mb_y)

    @torch.no_grad()
    def _drawn(self, n: int) -> tuple[Tensor, Tensor]:
        if self._pool is None or self._at + n > len(self._pool[0]):
            assert self._shape is not None
            ahead = max(1, min(_MOST_AHEAD, _POOL // (n * self._shape.numel())))
            self._pool, self._at = self.memory.sample(n * ahead, self._draws), 0
        rows = slice(self._at, self._at + n)
        self._at += n
        return self._pool[0][rows], self._pool[1][rows]

    def _head(self, strategy: Any, u: Tensor, y: Tensor) -> Tensor:
        """The head's output for features ``(n, D)``."""
        assert self._split is not None
        assert self._shape is not None
        u = u.unflatten(1, self._shape) if len(self._shape) > 1 else u
        x = torch.zeros_like(strategy.mb_x[:1])
        with self._still(), self._split.replaced(u):
            if type(strategy).forward is not SupervisedProblem.forward:
                # A strategy's own forward may count batches: these are none of its loader's.
                return avalanche_forward(strategy.model, x, torch.zeros_like(y))
            current, strategy.mbatch = strategy.mbatch, [x, y, torch.zeros_like(y)]
            try:
                return strategy.forward()  # with mixed precision, if a plugin is around it
            finally:
                strategy.mbatch = current

    # parts ----------------------------------------------------------------------------------

    @property
    def _holds(self) -> bool:
        """Whether the encoder is in evaluation mode in this experience."""
        held = self.encoder in ("slow", "distill") and self.experiences > 1
        return self.encoder_is_frozen or held

    def _to_evaluation(self) -> None:
        # Statistics of new classes alone are not those that features were measured with.
        for module in self._encoder:
            module.training = False

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Inside, no statistic in front of the cut follows the single sample that passes there."""
        moving = [module for module in self._encoder if module.training]
        for module in moving:
            module.training = False
        try:
            yield
        finally:
            for module in moving:
                module.training = True

    def _check_model(self, strategy: Any) -> None:
        owner, model = type(self).__name__, bare(strategy.model)
        if isinstance(model, MultiTaskModule):
            raise ValueError(
                f"{owner} rehearses features that have no task label; the model is a "
                f"{type(model).__name__}, with a head for each task. Use a model with one head."
            )
        if hasattr(strategy.model, "_orig_mod"):
            raise ValueError(
                f"{owner} gives features to the head through hooks, of which a network from "
                f"torch.compile takes no notice. Give the strategy the network itself, and "
                f"plugins=[CompilePlugin(), ...]."
            )
        if isinstance(strategy.model, nn.DataParallel):
            raise ValueError(
                f"{owner} gives features to the head of one network; torch.nn.DataParallel has "
                f"several. Use one device."
            )


@torch.no_grad()
def dataset_features(strategy: Any, split: NetworkSplit, dataset: Any, *, task: int = 0) -> Tensor:
    """Features of a whole data set, flat.

    In evaluation mode and with the transforms of evaluation, without a draw from the global random
    state.

    Args:
        strategy: Where its data is and how many samples a batch has.
        split: The encoder.
        dataset: Avalanche's, or a tensor of inputs.
        task: Task label, for a network with one head per task.

    Shapes:
        ``(N, D)``, on the strategy's device.
    """
    given = isinstance(dataset, Tensor)
    source = TensorSource([dataset]) if given else source_for(strategy, dataset.eval())
    size = max(strategy.eval_mb_size or 1, 64)
    with evaluating(split.model), torch.random.fork_rng(devices=[]):
        parts = [
            split.features(source.gather(rows)[0].to(strategy.device), task).flatten(1)
            for rows in torch.arange(len(dataset)).split(size)
        ]
    return torch.cat(parts)
