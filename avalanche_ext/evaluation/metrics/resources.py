"""What the strategy costs, emitted after each evaluation beside its accuracy.

| emitted as | meaning |
|---|---|
| ``StreamParameters`` | numbers that the network learns or learnt, now |
| ``StreamParametersMean`` | their mean over the experiences trained on |
| ``StreamFlopsPerSample`` | operations to classify one sample, a multiply-add counted as 2 |
| ``StreamBytesRemembered`` | bytes of exemplars kept from the past |

Papers on growing networks print the size at the end or its mean over training, without saying
which: with one network of 11.2 M added per experience, the first is 11.2 T and the second
11.2 (T + 1) / 2. Avalanche's ``MAC`` ignores a convolution's input channels, and its RAM metrics
sample the whole process; neither is a budget.
"""

from __future__ import annotations

from typing import Any

from avalanche.evaluation.metric_definitions import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name

from avalanche_ext.evaluation.accounting import (
    bytes_remembered,
    count_parameters,
    flops_per_sample,
)

__all__ = ["ResourceMetrics"]


class ResourceMetrics(PluginMetric[dict]):
    """Emits parameters, operations and bytes remembered after each evaluation.

    Args:
        flops: Count operations: one more forward pass of one sample per evaluation.

    Parameters are counted as training left them: to evaluate an experience ahead, Avalanche grows a
    head by its classes, and the network keeps them. The mean is over experiences, each as the last
    evaluation behind it saw it; it is left out while one went without.
    """

    def __init__(self, *, flops: bool = True) -> None:
        super().__init__()
        self.flops = flops
        self.reset()

    def reset(self) -> None:
        """Forget all evaluations."""
        self._trained = 0
        self._parameters: dict[int, int] = {}
        self._sample: tuple[Any, Any] | None = None
        self._values: dict[str, float] = {}

    def result(self) -> dict[str, float]:
        """What the last evaluation found, by name."""
        return dict(self._values)

    def before_training_exp(self, strategy: Any) -> None:
        """Count the experience."""
        self._trained += 1

    def before_eval(self, strategy: Any) -> None:
        """Count the parameters, and wait for a sample."""
        self._parameters[self._trained] = count_parameters(strategy.model)
        self._sample = None

    def after_eval_iteration(self, strategy: Any) -> None:
        """Keep the first sample."""
        if self._sample is None and self.flops:
            self._sample = strategy.mb_x[:1], strategy.mb_task_id[:1]

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        """Emit the numbers."""
        values: dict[str, float] = {"StreamParameters": self._parameters[self._trained]}
        sizes = [n for k, n in self._parameters.items() if k > 0]
        if sizes and len(sizes) == self._trained:
            values["StreamParametersMean"] = sum(sizes) / len(sizes)
        if self._sample is not None:
            values["StreamFlopsPerSample"] = flops_per_sample(strategy.model, *self._sample)
            self._sample = None
        values["StreamBytesRemembered"] = bytes_remembered(strategy)
        self._values = values
        return [
            MetricValue(
                self,
                get_metric_name(name, strategy, add_task=False),
                value,
                strategy.clock.train_iterations,
            )
            for name, value in values.items()
        ]
