r"""Backward and forward transfer of the representation, along training.

Reference:
    S. Yan, J. Xie, X. He (2021), DER: Dynamically Expandable Representation for Class Incremental
    Learning, CVPR, Sec. 4 (ExpandableDER here, which is not Dark Experience Replay).

After each experience i, a linear probe on the frozen features gives :math:`A^i_j`, the accuracy on
each experience j so far, see ``evaluation.representation``. Emitted are, as if training ended there:

| emitted as | meaning |
|---|---|
| ``RepresentationBWT`` | :math:`\frac{1}{T-1}\sum_{i\ge2}\frac1i\sum_{j\le i} A^i_j - A^j_j` |
| ``RepresentationFWT`` | :math:`\frac{1}{T-1}\sum_{i\ge2} A^i_i - \bar A^i_i`, given ``alone`` |

Nothing is emitted after the first experience, where both are undefined.

Faithfulness:
    1. As ``evaluation.representation`` says: the probe's form is ours.
    2. The inner mean of the backward transfer counts the experience just trained, whose difference
       is 0, as the paper's formula does.
    3. :math:`\bar A^i_i` is the accuracy, by the same probe, of a network that was trained from
       random weights with cross-entropy alone on experience i and the memory of that time. It takes
       a training of its own, so it is the caller's: ``examples/representation_transfer.py``.

Cost: after experience i one pass over the training and test data of experiences 1 to i, and a
probe; over a stream of T that is about T / 2 passes over all data.
"""  # noqa: E501 - a table

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.training.supervised import JointTraining

from avalanche_ext.evaluation.accuracy_matrix import (
    backward_transfer_expandable_der,
    forward_transfer_expandable_der,
)
from avalanche_ext.evaluation.representation import (
    check_penalty,
    feature_taps,
    representation_accuracies,
)
from avalanche_ext.training.loading.sources import source_for

__all__ = ["RepresentationTransfer"]


class RepresentationTransfer(PluginMetric[dict[str, float]]):
    """Transfer of the features, measured after each experience, once its plugins are done with it.

    Rows and columns follow the order of training. An experience that is trained on again replaces
    the last row. Sub-experiences of an online stream count as the one they were cut from, and each
    replaces the row of the one before it: use large ones. Training is left as it is, random states
    included.

    Args:
        train_stream: The training experiences.
        test_stream: Their test experiences, in the same order.
        alone: For the forward transfer: on each experience the accuracy of a network that met it
            first, see the module's text; in the order of training, 0 to 1.
        l2: Of the probe, see ``evaluation.representation.linear_probe``.

    Raises:
        ValueError: If streams or ``alone`` do not pair up; at the start of training, for a model
            without known features or an experience that is not in ``train_stream``.

    References:
        Yan et al. (2021), Sec. 4.
    """

    def __init__(
        self,
        train_stream: Iterable[Any],
        test_stream: Iterable[Any],
        *,
        alone: Sequence[float] | None = None,
        l2: float = 1e-3,
    ) -> None:
        super().__init__()
        check_penalty("RepresentationTransfer", l2)
        experiences = list(train_stream)
        # Data sets, not experiences, which lead to the whole benchmark and often cannot be pickled.
        self._numbers = [experience.current_experience for experience in experiences]
        self._train = [experience.dataset for experience in experiences]
        self._test = [experience.dataset for experience in test_stream]
        lengths = {"test_stream": len(self._test)}
        if alone is not None:
            lengths["alone"] = len(alone)
        n = len(experiences)
        for name, length in lengths.items():
            if length != n:
                raise ValueError(
                    f"RepresentationTransfer expects one entry of {name} for each of the {n} "
                    f"training experiences; got {length}."
                )
        self.alone = None if alone is None else [float(a) for a in alone]
        self.l2 = l2
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._order: list[int] = []  # positions in train_stream
        self._rows: dict[int, list[float]] = {}  # by the number of experiences trained on
        self._values: dict[str, float] = {}

    def result(self) -> dict[str, float]:
        """The last values, by the names they are emitted under."""
        return dict(self._values)

    def matrix(self) -> list[list[float]]:
        """The rows so far, i + 1 accuracies in row i; ``nan`` where nothing was measured."""
        n = len(self._order)
        return [self._rows.get(i, [math.nan] * i) for i in range(1, n + 1)]

    def before_training_exp(self, strategy: Any) -> None:
        """Refuse what could not be measured afterwards."""
        feature_taps(strategy.model)
        self._positions(strategy)

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Fit the probe, add a row, and emit what the matrix now defines."""
        self._order += [k for k in self._positions(strategy) if k not in self._order]
        self._rows[len(self._order)] = representation_accuracies(
            strategy.model,
            [self._train[k] for k in self._order],
            [self._test[k] for k in self._order],
            l2=self.l2,
            batch_size=max(64, strategy.eval_mb_size or 1),
            source=functools.partial(source_for, strategy),
        )
        self._values = self._defined()
        step = strategy.clock.train_iterations
        return [
            MetricValue(self, get_metric_name(name, strategy, add_task=False), value, step)
            for name, value in self._values.items()
        ]

    def __str__(self) -> str:
        return "RepresentationTransfer"

    def _positions(self, strategy: Any) -> list[int]:
        """Of what is trained on; ``JointTraining`` does with all of its experiences at once."""
        joint = isinstance(strategy, JointTraining)
        found = []
        for experience in strategy._experiences if joint else [strategy.experience]:
            number = getattr(experience, "origin_experience", experience).current_experience
            if number not in self._numbers:
                raise ValueError(
                    f"RepresentationTransfer was given the training experiences {self._numbers}; "
                    f"training is on experience {number}. Give it the whole stream."
                )
            found.append(self._numbers.index(number))
        return found

    def _defined(self) -> dict[str, float]:
        matrix = self.matrix()
        values = {"RepresentationBWT": backward_transfer_expandable_der(matrix)}
        if self.alone is not None:
            alone = self.alone[: len(matrix)]
            values["RepresentationFWT"] = forward_transfer_expandable_der(matrix, alone)
        return {name: value for name, value in values.items() if math.isfinite(value)}
