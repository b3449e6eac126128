"""Send a plugin's own numbers through Avalanche's evaluator to every logger."""

from __future__ import annotations

from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name

__all__ = ["publish"]


def publish(plugin: Any, strategy: Any, name: str, value: float) -> None:
    """Log ``value`` under Avalanche's name for ``name`` on the current stream."""
    metric = get_metric_name(name, strategy, add_experience=False)
    step = strategy.clock.train_iterations
    strategy.evaluator.publish_metric_value(MetricValue(plugin, metric, value, step))
