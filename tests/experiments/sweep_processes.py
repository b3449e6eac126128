"""Workers of a sweep as processes, for ``test_sweep``; one of them stops in mid-trial for good."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# What workers import, once for all of them.
CONTEXT.set_forkserver_preload(
    ["tests.experiments.sweep_processes", "avalanche_ext.benchmarks", "matplotlib.figure",
     "matplotlib.backends.backend_agg", "optuna", "sklearn.datasets", "sqlalchemy.orm"]
)  # fmt: skip

from avalanche.training.templates.base_sgd import BaseSGDTemplate  # noqa: E402

from avalanche_ext.experiments.leases import FileLock, Lease  # noqa: E402
from avalanche_ext.experiments.sweep import work  # noqa: E402


def worker(folder: Path) -> None:
    """Work until the sweep is done."""
    torch.set_num_threads(1)
    work(folder)


def stuck_worker(folder: Path, pipe) -> None:
    """Work; in the middle of the first trial's second seed say so, and stay there."""
    torch.set_num_threads(1)
    epochs, go_on = [], BaseSGDTemplate._after_training_epoch

    def stop(strategy, **kwargs):
        epochs.append(strategy)
        if len(epochs) == 3:  # a seed is two experiences of one epoch
            pipe.send("in the middle")
            signal.pause()
        go_on(strategy, **kwargs)

    BaseSGDTemplate._after_training_epoch = stop
    work(folder)


def holder(folder: Path, pipe) -> None:
    """Hold a lease and a lock, and tell the lease's name."""
    with Lease(folder) as lease, FileLock(folder / "lock"):
        pipe.send(lease.name)
        signal.pause()
