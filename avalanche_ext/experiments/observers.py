"""What watches a run: the event file, the progress bar, the counter of samples."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import BaseLogger, TensorboardLogger
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from tqdm import tqdm

__all__ = ["ClassCounter", "EventLog", "Logs", "Progress", "SampleCounter"]

_SILENCE = 10.0  # seconds between two lines of a run that has no terminal


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


class Logs:
    """A run's event file and TensorBoard folder: how far they are, and back to there.

    Args:
        folder: The seed's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._old = sorted((folder / "tensorboard").glob("events*"))
        self.events = EventLog(folder / "events.jsonl")
        self.board = TensorboardLogger(str(folder / "tensorboard"))
        self._folder = folder / "tensorboard"

    def position(self) -> dict[str, int]:
        """Bytes of every file."""
        self.board.writer.flush()
        files = [*sorted(self._folder.glob("events*")), self.events.path]
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def rewind(self, position: dict[str, int]) -> None:
        """Forget what an earlier process wrote after ``position``."""
        for file in [*self._old, self.events.path]:
            if file.name in position:
                with file.open("r+b") as stream:
                    stream.truncate(position[file.name])
            else:
                file.unlink(missing_ok=True)


class Progress(SupervisedPlugin):
    """A progress bar over the current samples of all epochs and experiences.

    It shows the experience, the epoch, samples per second (of the experience itself, not replayed
    ones) and the time left. Both are of the whole run so far, evaluations included. Drawn on a
    terminal only; elsewhere ``say`` may be told, at most once per experience and in 10 seconds.

    Args:
        title: Text in front of the bar.
        sizes: Training samples of each experience.
        epochs: Epochs of each experience, or of all.
        file: Where to draw; standard error by default.
        shown: Whether to draw; by default if ``file`` is a terminal.
        say: Called with a line of text where no bar is drawn; nothing is said by default.
    """

    def __init__(
        self,
        title: str,
        sizes: Sequence[int],
        epochs: int | Sequence[int],
        *,
        file: Any = None,
        shown: bool | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.title, self.sizes = title, list(sizes)
        self.epochs = [epochs] * len(sizes) if isinstance(epochs, int) else list(epochs)
        each = [n * e for n, e in zip(self.sizes, self.epochs, strict=True)]
        self._ends = [0, *itertools.accumulate(each)]  # samples before each experience
        self._begun, self._steps, self._step = 0, 1, 0
        self._experience, self._at = 0, 0
        # A step of tqdm's own choosing and a mean over the last moments stop the bar at evaluations
        # and leave their time out of the forecast.
        self._bar = tqdm(
            total=self._ends[-1], desc=title, unit=" samples", unit_scale=True,
            leave=False, file=file, disable=None if shown is None else not shown,
            miniters=1, smoothing=0,
        )  # fmt: skip
        self._say = say
        # Of this process: where it began, where it is, when it began and spoke last.
        self._first = self._here = 0
        self._started = self._spoke = time.monotonic()

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Name the experience and the epoch."""
        k, epoch = strategy.clock.train_exp_counter, strategy.clock.train_exp_epochs
        self._experience = k
        self._begun = self._ends[k] + self.sizes[k] * epoch
        self._steps = max(1, len(strategy.dataloader))
        self._step = 0
        self._bar.set_postfix_str(
            f"experience {k + 1}/{len(self.sizes)}, epoch {epoch + 1}/{self.epochs[k]}",
            refresh=False,
        )
        self._move(self._begun)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Advance by the step's share of the epoch."""
        self._step += 1
        if self._bar.disable:
            return
        share = min(1.0, self._step / self._steps)
        self._move(self._begun + round(share * self.sizes[self._experience]))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Advance to the end of the epoch."""
        self._move(self._begun + self.sizes[self._experience])

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Advance to the end of the experience, however many epochs it took, and say so."""
        k = self._experience
        self._move(self._ends[k + 1])
        now = time.monotonic()
        if self._say is None or not self._bar.disable or now - self._spoke < _SILENCE:
            return
        if self._at == self._first:  # no samples, no forecast
            return
        self._spoke = now
        rate = (self._at - self._first) / (now - self._started)
        left = (self._ends[-1] - self._at) / rate
        self._say(
            f"{self.title}: experience {k + 1}/{len(self.sizes)} trained on, "
            f"{rate:,.0f} samples/s, {timedelta(seconds=round(left))} left"
        )

    def skip(self, experiences: int) -> None:
        """Begin behind the experiences of an earlier process, which do not count as progress."""
        self._at = self._here = self._first = self._ends[experiences]
        self._bar.initial = self._bar.n = self._at
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _move(self, to: int) -> None:
        if self._at != self._here:  # a checkpoint from inside an experience has moved it
            self._first += self._at - self._here
            self._bar.initial, self._bar.n = self._first, self._at
        self._at = self._here = to
        self._bar.update(to - self._bar.n)

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_bar", "_say", "_first", "_here", "_started", "_spoke")
        return {name: value for name, value in self.__dict__.items() if name not in mine}


class SampleCounter(SupervisedPlugin):
    """Count the samples that training steps were made on, replayed ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Add one mini-batch."""
        self.samples += len(strategy.mb_y)


class ClassCounter(SupervisedPlugin):
    """Right answers and samples of each class, in the last evaluation.

    Args:
        n_classes: Labels below this are counted.
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self._counts: Tensor | None = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Begin again."""
        self._counts = None

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count a mini-batch, on its device."""
        y = strategy.mb_y
        right = (strategy.mb_output.argmax(1) == y).double()
        counts = torch.stack([torch.zeros_like(right) + 1, right])
        sums = counts.new_zeros(2, self.n_classes).index_add_(1, y, counts)
        self._counts = sums if self._counts is None else self._counts + sums

    @property
    def accuracy(self) -> list[float | None]:
        """Accuracy of each class; ``None`` for one without samples."""
        if self._counts is None:
            return [None] * self.n_classes
        return [right / n if n else None for n, right in self._counts.T.tolist()]
