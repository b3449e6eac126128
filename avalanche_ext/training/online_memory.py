"""What the plugins of online generative memory share: the inputs whose outputs are to be kept.

Their labels are never used: what the outputs should be is what they were before the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from avalanche.models.utils import avalanche_forward
from torch import Tensor

from avalanche_ext.models.modes import evaluating
from avalanche_ext.training.checks import CheckedPlugin, check_count
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.storage_policy.exemplar_memory import ExemplarMemory, ReservoirMemory

__all__ = ["OnlineMemory", "descend", "float32_evaluation", "learning_rates"]

_DEFAULT_MEM = 200
# On an accelerator reading a value stops the queue of work: look at it this often.
_STEPS_BETWEEN_CHECKS = 50


class OnlineMemory(CheckedPlugin):
    """A plugin that keeps outputs for ``n_inputs`` inputs, drawn anew in every step.

    Args:
        source: Where they come from. ``"memory"``: a reservoir of the stream's samples that the
            plugin fills behind every experience; it acts from the second experience on.
            ``"previous_batch"``: the mini-batch before this one. A replay plugin of the same
            strategy (``ERPlugin``, ``BERPlugin``): what its memory holds. A generator, that is an
            object with ``sample(n, generator=...)`` that returns inputs, or inputs and labels:
            it is asked from the second experience on.
        mem: Samples in the reservoir; 0 is plain training, bit for bit.
        n_inputs: Inputs per step.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for a source that is no part of the
            strategy, or whose inputs do not fit the model.
    """

    label = ""

    def __init__(self, source: Any, mem: int | None, n_inputs: int) -> None:
        super().__init__()
        owner = type(self).__name__
        if n_inputs is None:
            raise TypeError(f"{owner} expects a whole number n_inputs >= 1; got None.")
        check_count(owner, n_inputs=n_inputs)
        own = isinstance(source, str) and source == "memory"
        lends = _lent(source) is not None
        generates = callable(getattr(source, "sample", None))
        if not (own or lends or generates or source == "previous_batch"):
            raise ValueError(
                f"{owner} expects source to be 'memory', 'previous_batch', a replay plugin of "
                f"avalanche_ext with a memory of its own, or a generator with sample(n, "
                f"generator=...); got {source!r}."
            )
        if mem is not None and not own:
            raise ValueError(
                f"{owner} got mem={mem} and source={source!r}, which has no reservoir of the "
                f"plugin's own; leave mem out."
            )
        self.source = source
        self.n_inputs = n_inputs
        self.memory = ReservoirMemory(_DEFAULT_MEM if mem is None else mem) if own else None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._learnt = 0
        self._seed: int | None = None
        self._draws = 0
        self._stepped = False
        self._value: Tensor | None = None
        self._sum: Tensor | None = None
        self._steps = 0

    @property
    def weighs_nothing(self) -> bool:
        """Whether the plugin's own setting makes it plain training."""
        raise NotImplementedError(f"{type(self).__name__} does not say when it does nothing.")

    @property
    def active(self) -> bool:
        """Whether there is anything to do, now or later."""
        none = self.memory is not None and self.memory.max_size == 0
        return not (none or self.weighs_nothing)

    @property
    def bytes_remembered(self) -> int:
        """Bytes of samples held between experiences; those of another plugin are its own."""
        if self._batch is not None:
            return sum(column.nbytes for column in self._batch)
        return 0 if self.memory is None else self.memory.nbytes

    # hooks ----------------------------------------------------------------------------------

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Is the plugin whose memory is used there to fill it?"""
        if _lent(self.source) is not None and all(p is not self.source for p in strategy.plugins):
            raise ValueError(
                f"{type(self).__name__} uses the memory of a {type(self.source).__name__} that is "
                f"not among the strategy's plugins, so it would stay empty. Put it into the list."
            )

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Start the epoch's mean."""
        self._sum, self._steps = None, 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the batch, where it is the next step's source."""
        if not self.active:
            return
        if not self._stepped:
            raise ValueError(
                f"{type(self).__name__} acts around strategy.optimizer_step(), which "
                f"{type(strategy).__name__} does not call. Use a strategy that does."
            )
        self._stepped = False
        if self.source == "previous_batch":
            self._batch = (strategy.mb_x.detach(), _task_labels(strategy.mbatch))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Publish the epoch's mean."""
        if self._sum is not None:
            self._check_value()
            publish(self, strategy, self.label, float(self._sum) / self._steps)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Store samples of the experience."""
        self._learnt += 1
        if self.active and self.memory is not None:
            self.memory.post_adapt(strategy, strategy.experience)

    def __str__(self) -> str:
        return self.label

    # for subclasses -------------------------------------------------------------------------

    @property
    def last(self) -> Tensor | None:
        """The value of the last step, as it is logged; ``None`` before the first."""
        return self._value

    def draw(self, strategy: Any) -> tuple[Tensor, Tensor] | None:
        """Inputs and task labels for this step; ``None`` while there are none.

        Neither torch's global random state nor the model's mode changes.
        """
        if not self.active:
            return None
        if self._seed is None:
            self._seed = torch.initial_seed()
        self._draws += 1
        g = seeded(self._seed, *self.label.encode(), self._draws)
        memory = _lent(self.source) if self.memory is None else self.memory
        if memory is not None:
            batch = self._from_memory(memory, g)
        elif self.source == "previous_batch":
            batch = self._from_batch(g)
        else:
            batch = self._from_generator(strategy, g)
        if batch is None:
            return None
        x, tasks = (column.to(strategy.device) for column in batch)
        if x.shape[1:] != strategy.mb_x.shape[1:]:
            raise ValueError(
                f"{type(self).__name__}: the source gives inputs of shape {tuple(x.shape[1:])}; "
                f"those of the current batch have {tuple(strategy.mb_x.shape[1:])}. Give both the "
                f"same transforms, or choose another source."
            )
        return x, tasks

    def keep(self, value: Tensor) -> None:
        """Remember what this step's value is, for the logs; it has to be finite."""
        self._value = value.detach()
        self._sum = self._value if self._sum is None else self._sum + self._value
        self._steps += 1
        if not value.is_cuda or self._steps % _STEPS_BETWEEN_CHECKS == 0:
            self._check_value()

    # parts ----------------------------------------------------------------------------------

    def _from_memory(self, memory: ExemplarMemory, g: torch.Generator) -> Any:
        if not len(memory):
            return None
        slots = memory.index().slots
        chosen = slots[torch.randperm(len(slots), generator=g)[: self.n_inputs]]
        if memory.locate(chosen) is not None:
            return _x_and_tasks(memory.gather(chosen, g))
        # Transforms of single samples draw from the global random state, which is not ours.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(g.initial_seed())
            return _x_and_tasks(memory.gather(chosen, g))

    def _from_batch(self, g: torch.Generator) -> Any:
        if self._batch is None or len(self._batch[0]) <= self.n_inputs:
            return self._batch
        chosen = torch.randperm(len(self._batch[0]), generator=g)[: self.n_inputs]
        return tuple(column[chosen.to(column.device)] for column in self._batch)

    @torch.no_grad()
    def _from_generator(self, strategy: Any, g: torch.Generator) -> Any:
        if not self._learnt:
            return None
        if isinstance(bare(strategy.model), MultiTaskModule):
            raise ValueError(
                f"{type(self).__name__}: the inputs of a generator have no task label, which a "
                f"{type(strategy.model).__name__} needs. Use source='memory', or one head."
            )
        generator: Any = self.source
        found = generator.sample(self.n_inputs, generator=g)
        x = found[0] if isinstance(found, tuple | list) else found
        return x, torch.zeros(len(x), dtype=torch.int64)

    def _check_value(self) -> None:
        if self._sum is not None and not math.isfinite(float(self._sum)):
            raise ValueError(
                f"{type(self).__name__}: the outputs of kept inputs are no longer finite (step "
                f"{self._steps} of this epoch): training has diverged. Lower the learning rate, or "
                f"lam where there is one."
            )


def learning_rates(strategy: Any) -> list[tuple[str, Tensor, float]]:
    """What the optimizer trains: name, parameter, and the learning rate of its group."""
    rates = {id(p): g["lr"] for g in strategy.optimizer.param_groups for p in g["params"]}
    named = bare(strategy.model).named_parameters()
    return [(name, p, rates[id(p)]) for name, p in named if p.requires_grad and id(p) in rates]


@torch.no_grad()
def descend(trained: list[tuple[str, Tensor, float]], slopes: Any, lam: float) -> None:
    """A step of plain gradient descent, at ``lam`` times each parameter's learning rate.

    Args:
        trained: See ``learning_rates``.
        slopes: Gradients by name; what has none stays.
        lam: Factor.
    """
    for name, p, rate in trained:
        if slopes.get(name) is not None:
            p.add_(slopes[name], alpha=-lam * float(rate))


@contextlib.contextmanager
def float32_evaluation(strategy: Any) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Evaluation mode without autocast inside, so that no statistic and no random number moves.

    Yields:
        The model's outputs for inputs and task labels.
    """
    model = bare(strategy.model)  # its layers are listened to, which a compiled one does not notice
    with evaluating(model), torch.autocast(strategy.device.type, enabled=False):
        yield lambda x, tasks: avalanche_forward(model, x, tasks)


def _lent(source: Any) -> ExemplarMemory | None:
    """The memory of a replay plugin."""
    memory = getattr(source, "memory", None)
    return memory if isinstance(memory, ExemplarMemory) else None


def _x_and_tasks(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0], _task_labels(batch)


def _task_labels(batch: list[Tensor]) -> Tensor:
    return batch[-1] if len(batch) > 2 else torch.zeros_like(batch[1])
