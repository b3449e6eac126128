"""The seven raw numbers of the CLVision challenge as one Avalanche metric.

| emitted as | meaning |
|---|---|
| ``ChallengeAverageValidationAccuracy`` | over experiences and all tasks, see ``evaluation.challenge`` |
| ``ChallengeTestAccuracy`` | mean over test experiences at the last evaluation of the test stream |
| ``ChallengeAverageValidationAccuracySeen`` | the same over the tasks seen so far |
| ``ChallengeMinutes`` | of training, evaluations inside it included, and of validation behind it |
| ``ChallengeMeanRAM``, ``ChallengeMaxRAM`` | resident memory of the process in MB of 2^20 bytes, sampled behind every epoch |
| ``ChallengeMeanDisk``, ``ChallengeMaxDisk`` | size of the external memory's folder, likewise |
"""  # noqa: E501 - a table

from __future__ import annotations

import time
import weakref
from pathlib import Path
from typing import Any

from avalanche.evaluation.metric_definitions import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name

from avalanche_ext.evaluation.challenge import (
    ChallengeScores,
    average_validation_accuracy,
    average_validation_accuracy_seen,
)
from avalanche_ext.evaluation.metrics.device import DeviceAccuracy

__all__ = ["ChallengeMetrics"]

_MB = 2**20
# field of ChallengeScores -> name under which Avalanche's loggers see it
_FIELDS = {
    "final_test_accuracy": "ChallengeTestAccuracy",
    "average_validation_accuracy": "ChallengeAverageValidationAccuracy",
    "minutes": "ChallengeMinutes",
    "mean_ram_mb": "ChallengeMeanRAM",
    "max_ram_mb": "ChallengeMaxRAM",
    "mean_disk_mb": "ChallengeMeanDisk",
    "max_disk_mb": "ChallengeMaxDisk",
    "average_validation_accuracy_seen": "ChallengeAverageValidationAccuracySeen",
}
# When a metric's clock was last read. Times of one process mean nothing in another, so they are
# kept out of the metric, which a checkpoint may restore elsewhere.
_READ: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


class ChallengeMetrics(PluginMetric[dict]):
    """Emits the challenge's numbers after each evaluation of the validation or the test stream.

    Args:
        valid: Name of the stream that is evaluated after every experience. Where the benchmark
            has none of that name the test stream stands in, whose time is not counted.
        disk: Folder of the external memory; without one its size is 0.

    Raises:
        FileNotFoundError: If there is no such folder.

    Of several evaluations behind one experience the last counts. Numbers of the test stream are
    left out until it was evaluated.
    """

    def __init__(self, *, valid: str = "valid", disk: str | Path | None = None) -> None:
        super().__init__()
        self.valid = valid
        if disk is not None and not Path(disk).is_dir():
            raise FileNotFoundError(f"ChallengeMetrics expects a folder as disk=; got {disk}.")
        self.disk = None if disk is None else str(disk)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._trained = 0
        self._validation: dict[int, list[float]] = {}
        self._test: list[float] = []
        self._row: list[float] = []
        self._accuracy = DeviceAccuracy()
        self._seconds = 0.0
        _READ.pop(self, None)
        self._ram: list[float] = []
        self._folder: list[float] = []

    def result(self) -> dict[str, float]:
        """The numbers so far; those that are not defined yet are left out."""
        values = {"ChallengeMinutes": self._seconds / 60}
        rows = [self._validation[k] for k in sorted(self._validation) if k]
        if len(rows) == self._trained and _is_matrix(rows):
            values["ChallengeAverageValidationAccuracy"] = average_validation_accuracy(rows)
            seen = average_validation_accuracy_seen(rows)
            values["ChallengeAverageValidationAccuracySeen"] = seen
        if self._test:
            values["ChallengeTestAccuracy"] = sum(self._test) / len(self._test)
        for name, samples in (("RAM", self._ram), ("Disk", self._folder)):
            if samples:
                values[f"ChallengeMean{name}"] = sum(samples) / len(samples)
                values[f"ChallengeMax{name}"] = max(samples)
        return values

    def scores(self) -> ChallengeScores:
        """All of the challenge's numbers, behind the last evaluation of the test stream.

        Raises:
            ValueError: If one of them is not defined.
        """
        values = self.result()
        missing = [field for field, name in _FIELDS.items() if name not in values]
        if missing:
            raise ValueError(
                f"ChallengeMetrics has no {', '.join(missing)} yet: evaluate the validation stream "
                f"after every experience, and the test stream at the end."
            )
        return ChallengeScores(**{field: values[name] for field, name in _FIELDS.items()})

    def before_training_exp(self, strategy: Any) -> None:
        """Count the experience, start the clock."""
        self._trained += 1
        _READ[self] = time.perf_counter()

    def before_training_epoch(self, strategy: Any) -> None:
        """Read the clock, which a resumed run starts here."""
        self._read_clock()

    def after_training_epoch(self, strategy: Any) -> None:
        """Read the clock, sample memory and disk."""
        import psutil

        self._read_clock()
        self._ram.append(psutil.Process().memory_info().rss / _MB)
        self._folder.append(_size(self.disk) / _MB)

    def after_training_exp(self, strategy: Any) -> None:
        """Stop the clock."""
        self._read_clock()
        _READ.pop(self, None)

    def before_eval(self, strategy: Any) -> None:
        """Begin a row."""
        self._row = []
        if not strategy.is_training:
            _READ[self] = time.perf_counter()

    def before_eval_exp(self, strategy: Any) -> None:
        """Begin an experience."""
        self._accuracy.reset()

    def after_eval_iteration(self, strategy: Any) -> None:
        """Count a mini-batch."""
        self._accuracy.update(strategy.mb_output, strategy.mb_y)

    def after_eval_exp(self, strategy: Any) -> None:
        """Note the experience's accuracy."""
        self._row.append(self._accuracy.result())

    def after_eval(self, strategy: Any) -> list[MetricValue] | None:
        """Keep the stream's accuracies and emit what is defined."""
        stream = strategy.experience.origin_stream
        if stream.name not in (self.valid, "test"):
            return None
        if stream.name == "test":
            self._test = self._row
        else:
            self._read_clock()
        if stream.name == self.valid or self.valid not in _streams(stream):
            self._validation[self._trained] = self._row
        return [
            MetricValue(
                self,
                get_metric_name(name, strategy, add_task=False),
                value,
                strategy.clock.train_iterations,
            )
            for name, value in self.result().items()
        ]

    def _read_clock(self) -> None:
        now = time.perf_counter()
        self._seconds += now - _READ.get(self, now)
        _READ[self] = now


def _is_matrix(rows: list[list[float]]) -> bool:
    """Whether all tasks were evaluated each time, and they are one or those of training."""
    widths = {len(row) for row in rows}
    return len(widths) == 1 and not 1 < min(widths) < len(rows)


def _streams(stream: Any) -> Any:
    """Names of the streams of a stream's benchmark."""
    return getattr(getattr(stream, "benchmark", None), "streams", {})


def _size(folder: str | None) -> int:
    if folder is None:
        return 0
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
