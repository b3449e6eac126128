"""What watches a run: the event file, the progress bar, the counter of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from avalanche.training.plugins import SupervisedPlugin
from tqdm import tqdm

__all__ = ["EventLog", "Progress", "SampleCounter"]


class EventLog(BaseLogger):
    """Every metric value as one line of JSON, appended; the file is closed between lines.

    Tensors and pictures are left to TensorBoard.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """See Avalanche's ``BaseLogger``."""
        if isinstance(value, int | float):
            self.write({"step": x_plot, "metric": name, "value": value})

    def write(self, event: dict[str, Any]) -> None:
        """Append one event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class Progress(SupervisedPlugin):
    """A progress bar over the epochs of all experiences.

    Args:
        title: Text in front of the bar.
        n_experiences: Length of the stream.
        epochs: Epochs per experience.

    Drawn on a terminal only.
    """

    def __init__(self, title: str, n_experiences: int, epochs: int) -> None:
        super().__init__()
        self.n_experiences = n_experiences
        total = n_experiences * epochs
        self._bar = tqdm(total=total, desc=title, unit="epoch", leave=False, disable=None)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Name the experience."""
        done = strategy.clock.train_exp_counter
        self._bar.set_postfix_str(f"experience {done + 1}/{self.n_experiences}")

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Advance."""
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class SampleCounter(SupervisedPlugin):
    """Count the samples that training steps were made on, replayed ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Add one mini-batch."""
        self.samples += len(strategy.mb_y)
