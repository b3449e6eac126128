"""Checkpoints: a killed run goes on where it was and ends with the same numbers.

Two files at most. ``experience.pt`` is the state between two experiences. ``step.pt`` is the state
behind a training step, every N steps on request; it goes together with the ``experience.pt`` before
it. Resuming inside an experience lets the experience begin once more, up to the first epoch's
loader, then puts the state of the step in place, lets the loader draw what it had drawn, and goes
on with the next batch.

Files hold tensors and plain values (``avalanche_ext.experiments.state``) and are loaded without
running code from them. They are written beside the old ones and then renamed: a crash while writing
leaves the old one.
"""

from __future__ import annotations

import os
import pickle
import random
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avalanche_ext.experiments.data_index import DataIndex, UnsupportedStateError
from avalanche_ext.experiments.state import capture, restore
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["Checkpoints", "UntrustedCheckpointError"]

_FORMAT = 2
# What the loop sets anew, and what belongs to the process.
_NOT_STATE = {
    "experience", "adapted_dataset", "dataloader", "mbatch", "mb_output", "loss", "device",
    "current_eval_stream", "_eval_streams", "_experiences", "_criterion",
}  # fmt: skip


class UntrustedCheckpointError(ValueError):
    """A checkpoint holds pickled state, which can run any code when it is loaded."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where the files are.
        strategy: The strategy, built as it was when the checkpoint was written.
        benchmark: Its benchmark, likewise.
        every: Also save behind every so many training steps.
        trusted: Load state that could only be pickled.
        log_position: Returns how far the logs have been written, as plain values.
        rewind_logs: Called with such a value, or an empty one: forget what was logged after it.
    """

    def __init__(
        self,
        folder: Path,
        strategy: Any,
        benchmark: Any,
        *,
        every: int | None = None,
        trusted: bool = False,
        log_position: Callable[[], dict[str, Any]] = dict,
        rewind_logs: Callable[[dict[str, Any]], None] = lambda position: None,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every expects a number of steps, 1 or more; got {every}.")
        self.folder = folder
        self.strategy = strategy
        self.data = DataIndex(benchmark)
        self.every = every
        self.trusted = trusted
        self.log_position = log_position
        self.rewind_logs = rewind_logs
        self.seconds = 0.0  # that writing has taken within the present experience
        self._experience = 0
        self._pending: dict[str, Any] | None = None
        self._loggers: Any = None
        self._warned: set[str] = set()

    # a run's side ---------------------------------------------------------------------------

    def resume(self) -> dict[str, Any]:
        """Put the strategy into the state of the last checkpoint.

        Returns:
            What ``save`` was given with it; empty if there is no checkpoint.

        Raises:
            UntrustedCheckpointError: If a plugin's state was pickled and ``trusted`` is off.
            ValueError: If the file is damaged, or of another version or strategy.
        """
        saved = self._load("experience.pt")
        step = self._load("step.pt")
        if step is not None and step["experience"] != (saved or {"experience": 0})["experience"]:
            step = None  # the experience that it belongs to was finished after it
        if saved is not None:
            self._put(saved)
            set_random_state(saved["random"])
        if step is not None:
            self._pending = step
        found = step or saved
        self.rewind_logs({} if found is None else found["logs"])
        return {} if saved is None else saved["run"]

    def train(self, index: int, experience: Any, **kwargs: Any) -> None:
        """``strategy.train`` on experience ``index``, or on what is left of it."""
        strategy, self._experience, self.seconds = self.strategy, index, 0.0
        epochs = strategy.train_epochs
        if self._pending is not None:
            # What the experience's beginning logs was logged the first time.
            self._loggers, strategy.evaluator.loggers = strategy.evaluator.loggers, []
            strategy.train_epochs = epochs - self._pending["epoch"]
        wrap(strategy, "training_epoch", self._epoch, order=100)
        try:
            strategy.train(experience, eval_streams=[], **kwargs)
        finally:
            unwrap(strategy, "training_epoch", self._epoch)
            strategy.train_epochs = epochs

    def save(self, next_experience: int, run: dict[str, Any]) -> None:
        """Save the state before experience ``next_experience``, with ``run`` (plain values).

        A strategy with a plugin that cannot even be pickled is not saved, with a warning.
        """
        if self._can_save():
            self._write("experience.pt", {**self._state(next_experience), "run": run})
            (self.folder / "step.pt").unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the files: the run is complete."""
        for name in ("experience.pt", "step.pt"):
            (self.folder / name).unlink(missing_ok=True)

    # the loop's side ------------------------------------------------------------------------

    def _epoch(self, strategy: Any, inner: Any, **kwargs: Any) -> Any:
        loader, pending = strategy.dataloader, self._pending
        if pending is None and self.every is None:
            return inner(**kwargs)
        skip = 0
        if pending is not None:
            self._pending = None
            self._put(pending)
            strategy.evaluator.loggers = self._loggers
            part = loader
            while part is not None:  # ours count how often they have been iterated
                if hasattr(part, "epoch"):
                    setattr(part, "epoch", pending["epoch"])  # noqa: B010
                part = getattr(part, "loader", getattr(part, "current", None))
            skip = pending["step"]
        strategy.dataloader = _Paced(self, loader, skip, pending)
        return inner(**kwargs)

    def _save_step(self, step: int, began: Any, draws: list[tuple[int, Tensor]]) -> None:
        start = time.perf_counter()
        self._write("step.pt", {
            **self._state(self._experience),
            "epoch": self.strategy.clock.train_exp_epochs,
            "step": step,
            "epoch_random": began,
            "draws": [list(draw) for draw in draws],
        })  # fmt: skip
        self.seconds += time.perf_counter() - start

    # state ----------------------------------------------------------------------------------

    def _can_save(self) -> bool:
        plugins = self._only_pickled()
        try:
            pickle.dumps([vars(plugin) for plugin in plugins.values()])
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            names = ", ".join(type(plugin).__name__ for plugin in plugins.values())
            if names not in self._warned:
                self._warned.add(names)
                warnings.warn(
                    f"{names} cannot be saved ({error}), so no checkpoint is written: if this run "
                    f"is interrupted it begins again.",
                    stacklevel=3,
                )
            return False
        return True

    def _state(self, experience: int) -> dict[str, Any]:
        strategy = self.strategy
        layers = {k for k in vars(strategy) if callable(getattr(type(strategy), k, None))}
        pickled = self._only_pickled()
        graph = capture(
            strategy, self.data, leave_out=_NOT_STATE | layers, keep=list(pickled.values())
        )
        return {
            "format": _FORMAT,
            "experience": experience,
            "plugins": self._plugin_names(),
            "strategy": graph,
            "pickled": {k: _as_tensor(pickle.dumps(vars(p))) for k, p in pickled.items()},
            "random": random_state(),
            "logs": self.log_position(),
        }

    def _only_pickled(self) -> dict[str, Any]:
        """Plugins whose state is more than tensors and plain values, by their place and class."""
        return {
            f"{k} {type(plugin).__name__}": plugin
            for k, plugin in enumerate(self.strategy.plugins)
            if not self._writable(plugin)
        }

    def _writable(self, plugin: Any) -> bool:
        try:
            capture(plugin, self.data)
        except UnsupportedStateError:
            return False
        return True

    def _plugin_names(self) -> list[str]:
        return [type(plugin).__name__ for plugin in self.strategy.plugins]

    def _put(self, saved: dict[str, Any]) -> None:
        if saved["plugins"] != self._plugin_names():
            raise ValueError(
                f"the checkpoint in {self.folder} belongs to a strategy with the plugins "
                f"{saved['plugins']}; this one has {self._plugin_names()}. Build the strategy as "
                f"it was, or begin again with --overwrite."
            )
        if saved["pickled"] and not self.trusted:
            raise UntrustedCheckpointError(
                f"the checkpoint in {self.folder} holds pickled state "
                f"({', '.join(saved['pickled'])}): loading it can run any code. If you wrote it "
                f"yourself, say so: --trust-checkpoint (trusted=True)."
            )
        restore(self.strategy, saved["strategy"], self.data)
        for name, blob in saved["pickled"].items():
            plugin = self.strategy.plugins[int(name.partition(" ")[0])]
            vars(plugin).update(pickle.loads(blob.cpu().numpy().tobytes()))

    def _write(self, name: str, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{name}.part"
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.folder / name)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        if not _is_whole(path):
            raise ValueError(
                f"{path} is damaged, so its run cannot go on from there. Delete the folder of its "
                f"seed, or begin again with --overwrite."
            )
        state = torch.load(path, map_location=self.strategy.device, weights_only=True)
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"{path} was written in format {state.get('format')}, and this version reads "
                f"{_FORMAT}; run it with the version that wrote it, or with --overwrite."
            )
        return state


def _is_whole(path: Path) -> bool:
    """Whether a file of ``torch.save`` has the checksums that it was written with."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


class _Paced:
    """A loader that first skips what was trained on, and saves behind every so many steps."""

    def __init__(
        self, owner: Checkpoints, loader: Any, skip: int, pending: dict[str, Any] | None
    ) -> None:
        self.owner, self.loader, self.skip, self.pending = owner, loader, skip, pending

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        owner, saved = self.owner, self.pending
        owner.strategy.dataloader = self.loader  # plugins look at it
        if saved is not None:
            set_random_state(saved["epoch_random"])
        began = random_state()
        known = dict(saved["draws"]) if saved is not None else {}
        draws: list[tuple[int, Tensor]] = []
        batches, step = iter(self.loader), 0
        while True:
            if step < self.skip and step in known:
                torch.set_rng_state(known[step].cpu())
            before = torch.get_rng_state()
            batch = next(batches, None)
            if batch is None:
                return
            if not torch.equal(before, torch.get_rng_state()):
                draws.append((step, before))
            step += 1
            if step < self.skip:
                continue
            if step == self.skip and saved is not None:
                set_random_state(saved["random"])
                continue
            yield batch
            if owner.every is not None and step % owner.every == 0 and owner._can_save():
                owner._save_step(step, began, draws)


def _as_tensor(blob: bytes) -> Tensor:
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def random_state() -> dict[str, Any]:
    """Torch's (all devices), NumPy's and Python's global random states, as plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, numbers, python_gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss,
                  gauss],
        "python": [version, list(numbers), python_gauss],
    }  # fmt: skip


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
