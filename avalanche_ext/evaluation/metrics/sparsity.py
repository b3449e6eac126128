"""How sparse hidden activations are, and how importance is spread over units.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning: a representation of few
    active units leaves the others to later tasks.

After each evaluation, for every recorded layer, over all samples of the evaluated stream:

| emitted as | meaning |
|---|---|
| ``ActiveShare_LAYER`` | share of units that are active, mean over samples |
| ``UsedShare_LAYER`` | share of units that are active for more than 1 % of samples |
| ``Importance_qQQ_LAYER`` | quantile QQ (in percent) of the units' importance |

The last where a plugin of the strategy has ``importance`` by layer, such as a discounted
``SLNIPlugin``. Histograms of magnitudes stay in ``SparsityMetrics.histograms``.

Cost: two passes over the recorded activations for each evaluated batch; three with histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

from avalanche_ext.models.recording import ActivationRecorder, LayerSpec, Tap, identity
from avalanche_ext.training.checks import check_nonnegative
from avalanche_ext.training.representation_penalty import hidden_taps

__all__ = ["HISTOGRAM_EDGES", "SparsityMetrics"]

# Powers of two; the first bin holds what is no larger than the first edge, exact zeros included.
HISTOGRAM_EDGES = tuple(2.0**k for k in range(-10, 11))


class SparsityMetrics(PluginMetric[dict[str, float]]):
    """Shares of active and of used units, and quantiles of importance, after each evaluation.

    Args:
        layers: Hidden layers; by default the ReLUs between fully connected layers, or for a network
            without any the classifier's input. Otherwise see
            ``avalanche_ext.models.recording.select_layers``; logits are left out.
        threshold: A unit is active where its magnitude exceeds this, >= 0.
        used: A unit is used if it is active for more than this share of samples, >= 0.
        quantiles: Which quantiles of importance, 0 to 1.
        histogram: Count magnitudes as well.

    Raises:
        ValueError: For a bad argument; in evaluation, for layers that match nothing.

    References:
        Aljundi et al. (2018).
    """

    def __init__(
        self,
        *,
        layers: LayerSpec = "auto",
        threshold: float = 0.0,
        used: float = 0.01,
        quantiles: Sequence[float] = (0.0, 0.5, 1.0),
        histogram: bool = False,
    ) -> None:
        super().__init__()
        check_nonnegative("SparsityMetrics", threshold=threshold, used=used)
        if any(not 0 <= q <= 1 for q in quantiles):
            raise ValueError(f"SparsityMetrics expects quantiles 0 to 1; got {list(quantiles)}.")
        self.layers = layers
        self.threshold = threshold
        self.used = used
        self.quantiles = tuple(quantiles)
        self.histogram = histogram
        self._recorder = ActivationRecorder(layers)
        self._taps: list[Tap] = []
        self.reset()

    def reset(self) -> None:
        """Forget the last evaluation."""
        self._values: dict[str, float] = {}
        self._start()

    def result(self) -> dict[str, float]:
        """What the last evaluation found, by name."""
        return dict(self._values)

    @property
    def histograms(self) -> dict[str, Tensor]:
        """Counts of magnitudes by layer: up to the first of ``HISTOGRAM_EDGES``, ..., beyond."""
        return {name: counts.cpu() for name, counts in self._histograms.items()}

    # evaluation -----------------------------------------------------------------------------

    def before_eval(self, strategy: Any) -> None:
        """Begin again."""
        self._start()

    def before_eval_exp(self, strategy: Any) -> None:
        """Find the layers: adaptation may have replaced modules."""
        self._taps = hidden_taps("SparsityMetrics", strategy.model, self.layers)

    def before_eval_forward(self, strategy: Any) -> None:
        """Attach the recorder."""
        self._recorder.attach(strategy.model, self._taps)

    def after_eval_forward(self, strategy: Any) -> None:
        """Count the active units of the batch, on its device."""
        self._recorder.detach()
        for name, h in self._recorder.pop():
            if identity(h) == identity(strategy.mb_output):
                continue
            if h.shape[:1] != (len(strategy.mb_y),):
                raise ValueError(
                    f"layer {name!r} gives shape {tuple(h.shape)} for {len(strategy.mb_y)} "
                    f"samples; SparsityMetrics expects layers whose first axis is the batch."
                )
            sizes = h.detach().flatten(1).abs()
            active = (sizes > self.threshold).sum(0, dtype=torch.float64)
            self._active[name] = self._active.get(name, 0) + active
            self._samples[name] = self._samples.get(name, 0) + len(h)
            if self.histogram:
                edges = torch.tensor(HISTOGRAM_EDGES, device=h.device, dtype=sizes.dtype)
                bins = torch.bucketize(sizes.flatten(), edges)
                counts = torch.bincount(bins, minlength=len(edges) + 1)
                self._histograms[name] = self._histograms.get(name, 0) + counts

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        """Emit the shares and quantiles."""
        values: dict[str, float] = {}
        for name, active in self._active.items():
            shares = active / self._samples[name]
            values[f"ActiveShare_{name}"] = float(shares.mean())
            values[f"UsedShare_{name}"] = float((shares > self.used).double().mean())
        for plugin in strategy.plugins:
            importance = getattr(plugin, "importance", None)
            if isinstance(importance, dict):
                values |= self._quantiles(importance)
        self._values = values
        step = strategy.clock.train_iterations
        return [
            MetricValue(self, get_metric_name(name, strategy, add_task=False), value, step)
            for name, value in values.items()
        ]

    def __str__(self) -> str:
        return "Sparsity"

    # parts ----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._active: dict[str, Any] = {}
        self._samples: dict[str, int] = {}
        self._histograms: dict[str, Any] = {}

    def _quantiles(self, importance: dict[Any, Any]) -> dict[str, float]:
        """Of importance by unit; importance by parameter is another thing and left out."""
        found = {}
        for name, value in importance.items():
            if isinstance(value, Tensor) and value.ndim == 1 and name in self._active:
                for q in self.quantiles:
                    key = f"Importance_q{100 * q:02.0f}_{name}"
                    found[key] = float(torch.quantile(value.double(), q))
        return found
