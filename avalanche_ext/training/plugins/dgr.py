r"""DGR: deep generative replay. A generator makes samples of the past, the last solver labels them.

``Naive(solver, ..., plugins=[DGRPlugin(GeneratorTraining(model=VAE((1, 28, 28))))])``. The solver
stays an ordinary classifier in an ordinary strategy.

Reference:
    Shin, Lee, Kim, Kim (2017), Continual Learning with Deep Generative Replay, NeurIPS.

Faithfulness:
    1. Labels: the paper leaves open whether the last solver's output is taken as it is or as its
       most likely class. ``labels="hard"`` is the usual reading; ``"soft"`` distils with
       temperature 2, over the classes that the last solver had learnt, the others at 0. Soft
       labels are better on permuted images, where hard ones can be worse than nothing.
    2. Weight ``r`` of the new data: ``"1/t"``, as in code of later papers; the paper sets it by the
       importance of the new task. The generator has its own ``r``.
    3. The mixture replaces the criterion's value, so terms of other plugins are not scaled, in
       whatever order they stand; the batch, the output and the metrics of it are new data alone.
    4. Samples are drawn for every step; the paper's description makes a data set of them first.
       All come from generator and solver as they were when the experience began, whichever is
       trained first (``schedule``).
    5. New and replayed samples pass through the solver apart, so batch norms see them apart.
    6. Labels are restricted to classes seen before; outputs of the solver are not.
    7. Rivals: ``DGRPlugin(NoiseReplay(shape))``, ``DGRPlugin(ExactReplay(), labels="source")``
       ("ER" in the source's figure) and no plugin.

Cost: a step on the replay beside that on the new data, a pass through decoder and last solver
without gradients, and with ``schedule="interleaved"`` a step of the generator on both. During an
experience copies of generator and solver are held, between experiences the generator alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from avalanche.models.utils import avalanche_forward
from avalanche.training.templates.problem_type.supervised_problem import SupervisedProblem
from avalanche.training.utils import _at_task_boundary
from torch import Tensor

from avalanche_ext.functional.generative import new_data_weight, soft_cross_entropy
from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.training.checks import CheckedPlugin, check_count, check_one_of
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.replay_sources import (
    ReplaySource,
    check_new_data_weight,
    check_one_mixture,
    classes_of,
    whole_experience,
)
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["DGRPlugin"]

_SALT = 0x646772  # keeps its draws apart from those of other users of the seed


class DGRPlugin(CheckedPlugin):
    r"""Train the solver on new samples and on replayed ones, with weights ``r`` and ``1 - r``.

    .. math:: L(S_t) = r\, \mathbb E_{D_t}[\ell(S_t(x), y)] + (1 - r)\,
              \mathbb E_{x' \sim G_{t-1}}[\ell(S_t(x'), S_{t-1}(x'))]

    Logged after each experience: ``DGR_Loss``, the mean of the replay's term, and ``DGR_LabelKL``,
    how far the labels are from even, :math:`\sum_c p_c \log (p_c K)`.

    Args:
        source: Gives the samples: ``GeneratorTraining``, ``NoiseReplay`` or ``ExactReplay``.
        r: Weight of the new data: ``"1/t"``, ``"class_ratio"`` or a number in [0, 1]; see
            ``avalanche_ext.functional.generative.new_data_weight``. With 1 nothing is done, bit
            for bit, and the source does not learn either.
        labels: ``"hard"`` or ``"soft"`` of the last solver, or ``"source"``: those that a
            conditional generator or exact replay gives itself.
        n: Samples per step; as many as the batch by default.
        schedule: When the source learns: ``"interleaved"``, a step with each of the solver's, on
            the same samples; ``"before"`` or ``"after"`` the solver, in the source's own loop. By
            default ``"before"`` for adversarial generators, else ``"interleaved"``.
        prefetch: Steps for which samples are made at once.

    Attributes:
        label_counts: Replays of this experience by label.

    Raises:
        ValueError: For a bad argument; for a model with a head for each of several task labels,
            which a replayed sample does not have.
    """

    def __init__(
        self,
        source: ReplaySource,
        *,
        r: str | float = "1/t",
        labels: str = "hard",
        n: int | None = None,
        schedule: str | None = None,
        prefetch: int = 1,
    ) -> None:
        super().__init__()
        missing = [m for m in ("begin", "replay", "step", "finish") if not hasattr(source, m)]
        if missing:
            raise TypeError(
                f"DGRPlugin expects a source such as GeneratorTraining(model=VAE(...)); got a "
                f"{type(source).__name__} without {', '.join(missing)}."
            )
        check_new_data_weight("DGRPlugin", r)
        check_one_of("DGRPlugin", "labels", labels, ("hard", "soft", "source"))
        check_one_of("DGRPlugin", "schedule", schedule, (None, "interleaved", "before", "after"))
        check_count("DGRPlugin", n=n, prefetch=prefetch)
        if labels == "source" and not source.labelled:
            raise ValueError(
                "DGRPlugin(labels='source') takes the labels of a conditional generator, and this "
                "source has none. Build the generator with n_classes, or use labels='hard'."
            )
        self.source = source
        self.r = r
        self.labels = labels
        self.n = n
        self.schedule = schedule or ("before" if source.adversarial else "interleaved")
        self.prefetch = prefetch
        self.seen: list[int] = []  # classes of earlier experiences
        self.experiences = 0
        self.label_counts: Tensor | None = None
        self._weight = 1.0
        self._classes_learnt = 0  # counted in each experience
        self._classes: list[int] = []  # of this experience
        self._task: int | None = None
        self._teacher: FrozenCopy | None = None
        self._draws: torch.Generator | None = None
        self._pool: list[Tensor] = []  # samples ahead, labels of the source, targets
        self._at = 0
        self._replay: tuple[Tensor, Tensor | None] | None = None  # of this step
        self._sum: Tensor | None = None
        self._steps = 0

    @property
    def mixes_criterion(self) -> bool:
        """See ``check_one_mixture``."""
        return self.r != 1

    # an experience --------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the solver as it is: afterwards it may have new units, which know nothing."""
        super().before_train_dataset_adaptation(strategy, **kwargs)
        if self.r == 1 or not _at_task_boundary(strategy.experience, before=True):
            return
        self._close(strategy)  # an online stream does not always say which part is the last
        self._check_tasks(strategy)
        if self.experiences and self.labels != "source":
            self._teacher = FrozenCopy(bare(strategy.model))

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Prepare the replay of what came before."""
        if self.r == 1:
            return
        check_one_mixture(self, strategy)
        if _at_task_boundary(strategy.experience, before=True):
            self._open(strategy)
        if self.schedule == "before":
            self._learn(strategy.experience)
        if self._weight < 1:
            wrap(strategy, "criterion", self._criterion)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let the source learn, if it has not, and report."""
        if self.r == 1:
            return
        unwrap(strategy, "criterion", self._criterion)
        if self.schedule == "after":
            self._learn(strategy.experience)
        if _at_task_boundary(strategy.experience, before=False):
            self._close(strategy)

    def _learn(self, experience: Any) -> None:
        """The source's own loop, whose order of batches is no matter of the solver's."""
        with torch.random.fork_rng(devices=[]):
            own = seeded(torch.initial_seed(), _SALT, self.experiences, 1)
            torch.default_generator.manual_seed(own.initial_seed())
            self.source.learn(experience)

    def _open(self, strategy: Any) -> None:
        experience = whole_experience(strategy.experience)
        self._classes = classes_of(experience)
        self.experiences += 1
        self._classes_learnt += len(self._classes)
        self._weight = new_data_weight(
            self.r, self.experiences, len(self._classes), self._classes_learnt
        )
        self._draws = seeded(torch.initial_seed(), _SALT, self.experiences)
        self._pool, self._at, self._sum, self._steps = [], 0, None, 0
        self.label_counts = None
        self.source.begin(experience, strategy.device)

    def _close(self, strategy: Any) -> None:
        if self._draws is None:
            return
        self.source.finish()
        self._report(strategy)
        self.seen = sorted({*self.seen, *self._classes})
        self._teacher = self._draws = self._sum = None
        self._pool = []

    # one step -------------------------------------------------------------------------------

    def _criterion(self, strategy: Any, inner: Any) -> Tensor:
        """What stands around the strategy's criterion: the weighted sum of both losses."""
        loss = inner()
        if not strategy.is_training:
            return loss
        x, y, target = self._drawn(strategy, self.n or len(strategy.mb_y))
        output = self._output(strategy, x)
        if self.labels == "soft":
            replay = soft_cross_entropy(output, target).mean()
        else:
            replay = strategy._criterion(output, target)
        self._replay = (x, y)
        value = replay.detach()
        self._sum = value if self._sum is None else self._sum + value
        self._steps += 1
        return self._weight * loss + (1 - self._weight) * replay

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A step of the source on what the solver has seen."""
        if self.r != 1 and self.schedule == "interleaved":
            self.source.step(strategy.mb_x, strategy.mb_y, self._replay)
        self._replay = None

    def _output(self, strategy: Any, x: Tensor) -> Tensor:
        """The solver's output for replayed samples."""
        tasks = torch.full((len(x),), self._task or 0, device=x.device)
        if type(strategy).forward is not SupervisedProblem.forward:
            # A strategy's own forward may count batches: the replay is not one of its loader's.
            return avalanche_forward(strategy.model, x, tasks)
        current = strategy.mbatch
        strategy.mbatch = [x, tasks, tasks]
        try:
            return strategy.forward()  # with mixed precision, if a plugin is around it
        finally:
            strategy.mbatch = current

    @torch.no_grad()
    def _drawn(self, strategy: Any, n: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Samples for a step, the source's labels or ``None``, and what the solver shall give."""
        if not self._pool or self._at + n > len(self._pool[0]):
            assert self._draws is not None
            x, y = self.source.replay(n * self.prefetch, self._draws)
            target = self._targets(x, y)
            labels = target.argmax(1) if self.labels == "soft" else target
            counts = torch.bincount(labels, minlength=max(self.seen) + 1)
            self.label_counts = counts if self.label_counts is None else self.label_counts + counts
            self._pool, self._at = [x, target] if y is None else [x, target, y], 0
        rows = slice(self._at, self._at + n)
        self._at += n
        x, target, *y = (column[rows] for column in self._pool)
        return x, y[0] if y else None, target

    def _targets(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Labels ``(n,)``, or for soft ones the last solver's logits, of classes seen before."""
        if self.labels == "source":
            assert y is not None
            return y
        assert self._teacher is not None
        tasks = torch.full((len(x),), self._task or 0, device=x.device)
        logits = avalanche_forward(self._teacher.module, x, tasks)
        columns = torch.tensor(self.seen, device=x.device)
        known = torch.full_like(logits, -torch.inf)
        known[:, columns] = logits[:, columns]
        return known if self.labels == "soft" else known.argmax(1)

    # reports --------------------------------------------------------------------------------

    def _report(self, strategy: Any) -> None:
        if self._sum is None or self.label_counts is None:
            return
        publish(self, strategy, "DGR_Loss", float(self._sum) / self._steps)
        counts = self.label_counts[self.seen].double().cpu()
        p = counts / counts.sum()
        publish(self, strategy, "DGR_LabelKL", float(torch.xlogy(p, p * len(p)).sum()))
        absent = [c for c, n in zip(self.seen, counts.tolist(), strict=True) if n == 0]
        # A few hundred samples may miss a class by chance.
        if absent and counts.sum() >= 100 * len(counts):
            warnings.warn(
                f"none of the {int(counts.sum())} samples that were replayed in experience "
                f"{self.experiences} was labelled {', '.join(map(str, absent))}: what was learnt "
                f"of these classes is lost. The source makes no such samples, or the last solver "
                f"does not know them. Train the generator longer, or use a conditional one with "
                f"labels='source'.",
                stacklevel=4,
            )

    def _check_tasks(self, strategy: Any) -> None:
        tasks = sorted({int(t) for t in getattr(strategy.experience, "task_labels", ())}) or [0]
        known = tasks[:1] if self._task is None else [self._task]
        model = bare(strategy.model)
        if tasks != known and isinstance(model, MultiTaskModule):
            raise ValueError(
                f"DGRPlugin replays samples that have no task label; the stream has the task "
                f"labels {sorted({*tasks, *known})}, the model is a {type(model).__name__}, with a "
                f"head for each task. Use a model with one head, or one task label throughout."
            )
        self._task = known[0]

    def __str__(self) -> str:
        return "DGR"
