"""The accuracy matrix along training, and the metrics that follow from it.

Avalanche's ``StreamForgetting`` and ``StreamBWT`` compare with the accuracy right after training;
of the field's other numbers it has none. Here every evaluation fills one row of the matrix and
emits what the matrix so far defines, as if training ended there:

| emitted as | function of ``evaluation.accuracy_matrix`` |
|---|---|
| ``StreamAverageAccuracy`` | mean of the last row, over the experiences trained on so far |
| ``StreamAverageIncrementalAccuracy`` | ``average_incremental_accuracy``, mean over experiences |
| ``StreamAverageIncrementalAccuracySamples`` | the same over test samples |
| ``StreamForgettingFromBest`` | ``forgetting`` |
| ``StreamBWT_GEM``, ``StreamBWT_ExpandableDER`` | the two backward transfers |
| ``StreamFWT_GEM``, ``StreamFWT_ExpandableDER`` | the two forward transfers |
| ``StreamIntransigence`` | ``intransigence`` |

What is undefined is not emitted: a gap in a curve is honest, a ``nan`` breaks a log. That is, transfer
before the second experience; GEM's forward transfer without an evaluation before training, or
where nothing ahead was tested; ExpandableDER's and intransigence without their references; all
but the average accuracies on a stream with one test experience, whose experiences have no test of
their own; and everything after an evaluation that left out an experience trained on, or where
training and test experiences do not correspond (other numbers of them).
"""  # noqa: E501 - a table

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from avalanche.evaluation.metric_definitions import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.training.supervised import JointTraining

from avalanche_ext.evaluation.accuracy_matrix import matrix_metrics
from avalanche_ext.evaluation.metrics.device import DeviceAccuracy

__all__ = ["METRICS", "AccuracyMatrixMetrics"]

# function of evaluation.accuracy_matrix -> name under which Avalanche's loggers see it
METRICS = {
    "average_accuracy": "StreamAverageAccuracy",
    "average_incremental_accuracy": "StreamAverageIncrementalAccuracy",
    "average_incremental_accuracy_samples": "StreamAverageIncrementalAccuracySamples",
    "forgetting": "StreamForgettingFromBest",
    "backward_transfer_gem": "StreamBWT_GEM",
    "backward_transfer_expandable_der": "StreamBWT_ExpandableDER",
    "forward_transfer_gem": "StreamFWT_GEM",
    "forward_transfer_expandable_der": "StreamFWT_ExpandableDER",
    "intransigence": "StreamIntransigence",
}


class _Rows:
    """One stream's test accuracies: after so many trained experiences, of which experience."""

    def __init__(self) -> None:
        self.accuracy: dict[int, dict[int, float]] = {}
        self.samples: dict[int, int] = {}
        self.single = False


class AccuracyMatrixMetrics(PluginMetric[dict]):
    """Emits the metrics of the accuracy matrix after each evaluation of the stream.

    Columns follow the order of training, whatever the experiences' numbers. An evaluation inside
    an experience is replaced by the next one, so that in the end each row was measured behind its
    experience; so is that of an experience trained on again. Sub-experiences of an online stream
    count as the experience they were cut from. Accuracies stay on the device until the end of an
    experience.

    Args:
        names: Which to emit, keys of ``METRICS``; all by default.
        alone: References of ExpandableDER's forward transfer, in the order of training.
        joint: References of intransigence, in the order of training.

    Raises:
        ValueError: For an unknown name; during evaluation, for too few references.
    """

    def __init__(
        self,
        names: Iterable[str] = tuple(METRICS),
        *,
        alone: Sequence[float] | None = None,
        joint: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.names = _known(names)
        self.alone = None if alone is None else list(alone)
        self.joint = None if joint is None else list(joint)
        self.reset()

    def reset(self) -> None:
        """Forget all evaluations."""
        self._order: list[int] = []
        self._train_length: int | None = None
        self._streams: dict[str, _Rows] = {}
        self._values: dict[str, float] = {}
        self._row: dict[int, tuple[float, int]] = {}
        self._accuracy = DeviceAccuracy()

    def result(self) -> dict[str, float]:
        """What the last evaluation defined, by the keys of ``METRICS``."""
        return dict(self._values)

    def matrix(self, stream: str = "test") -> list[list[float]]:
        """The matrix of a stream so far; ``nan`` where nothing was tested."""
        rows = self._streams.get(stream, _Rows())
        done = rows.accuracy
        columns = [0] if rows.single else self._order
        return [
            [done.get(i, {}).get(j, math.nan) for j in columns]
            for i in range(1, len(self._order) + 1)
        ]

    def before_training_exp(self, strategy: Any) -> None:
        """Note what is trained on."""
        joint = isinstance(strategy, JointTraining)  # it trains on all at once, as the first
        for experience in strategy._experiences if joint else [strategy.experience]:
            whole = _whole(experience)
            self._train_length = _length(whole)
            if whole.current_experience not in self._order:
                self._order.append(whole.current_experience)

    def before_eval(self, strategy: Any) -> None:
        """Begin a row."""
        self._row = {}

    def before_eval_exp(self, strategy: Any) -> None:
        """Begin an experience."""
        self._accuracy.reset()
        self._tested = 0

    def after_eval_iteration(self, strategy: Any) -> None:
        """Count a mini-batch."""
        self._accuracy.update(strategy.mb_output, strategy.mb_y)
        self._tested += len(strategy.mb_y)

    def after_eval_exp(self, strategy: Any) -> None:
        """Note the experience's accuracy."""
        if self._tested:
            number = _whole(strategy.experience).current_experience
            self._row[number] = (self._accuracy.result(), self._tested)

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        """Emit what the stream's matrix now defines."""
        self._values = {}
        if self._row:
            experience = _whole(strategy.experience)
            stream = experience.origin_stream.name
            rows = self._streams.setdefault(stream, _Rows())
            if self._keep(rows, _length(experience)):
                self._values = self._defined(stream, rows)
        return [
            MetricValue(
                self,
                get_metric_name(METRICS[name], strategy, add_task=False),
                value,
                strategy.clock.train_iterations,
            )
            for name, value in self._values.items()
        ]

    def _keep(self, rows: _Rows, length: int | None) -> bool:
        """Store the row; ``False`` if it leaves out something that was trained on."""
        row = {j: accuracy for j, (accuracy, _) in self._row.items()}
        if not self._order:
            rows.accuracy[0] = row
            return False
        rows.single = length == 1
        known = None not in (length, self._train_length)
        if not rows.single and known and length != self._train_length:
            return False  # experiences of training and test do not correspond
        if not ({0} if rows.single else {*self._order}) <= {*row}:
            return False
        rows.accuracy[len(self._order)] = row
        rows.samples.update({j: n for j, (_, n) in self._row.items()})
        return True

    def _defined(self, stream: str, rows: _Rows) -> dict[str, float]:
        n = len(self._order)
        columns = [0] if rows.single else self._order
        before = rows.accuracy.get(0)
        values = matrix_metrics(
            self.matrix(stream),
            samples=[rows.samples[j] for j in columns],
            initial=None if before is None else [before.get(j, math.nan) for j in self._order],
            alone=_first("alone", self.alone, n),
            joint=_first("joint", self.joint, n),
        )
        return {name: values[name] for name in self.names if name in values}


def _known(names: Iterable[str]) -> tuple[str, ...]:
    asked = (names,) if isinstance(names, str) else tuple(names)
    for name in asked:
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), METRICS, n=3, cutoff=0.4)
            hint = f"Close: {', '.join(near)}. " if near else ""
            raise ValueError(
                f"AccuracyMatrixMetrics has no metric {name!r}. {hint}There are "
                f"{', '.join(METRICS)}."
            )
    return asked


def _whole(experience: Any) -> Any:
    """The experience, or the one that an online stream cut it from."""
    return getattr(experience, "origin_experience", experience)


def _length(experience: Any) -> int | None:
    """Experiences in the whole of its stream, ``None`` where that is not known."""
    stream = experience.origin_stream
    streams = getattr(getattr(stream, "benchmark", None), "streams", {})
    try:
        return len(streams.get(stream.name, stream))
    except TypeError:  # a stream that is generated as it goes
        return None


def _first(name: str, values: list[float] | None, n: int) -> list[float] | None:
    if values is not None and len(values) < n:
        raise ValueError(
            f"{name} expects an accuracy for each experience trained on; got {len(values)} for {n}."
        )
    return None if values is None else values[:n]
