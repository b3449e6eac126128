"""Workers of a sweep: processes on this machine, or jobs of a Slurm cluster.

``python -m avalanche_ext.experiments.sweep_workers DIR`` is one worker.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avalanche_ext.experiments.sweep import Say, work

__all__ = ["launch", "submit"]

_say_now = functools.partial(print, flush=True)


def launch(folder: Path, workers: int, say: Say = lambda text: None) -> None:
    """Start workers on this machine and wait for them; the cores are shared out among them.

    A worker that dies is reported; the others take up its trial.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [sys.executable, "-m", "avalanche_ext.experiments.sweep_workers", str(folder)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    try:
        for number, process in enumerate(processes):
            if process.wait():
                say(f"worker {number} ended with status {process.returncode}")
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def submit(folder: Path, workers: int, parameters: Mapping[str, Any]) -> list[str]:
    """Submit workers to a Slurm cluster and return at once.

    Args:
        folder: Made ready by ``prepare``, on a file system that the nodes share.
        workers: Number of jobs, as one array.
        parameters: submitit's, such as ``timeout_min`` or ``slurm_partition``; ``cluster`` names
            another executor of submitit's than Slurm's.

    Returns:
        The jobs' numbers.

    Raises:
        ModuleNotFoundError: If submitit is not installed.
    """
    try:
        submitit = importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--slurm needs submitit, which is not installed: pip install 'avalanche-ext[slurm]'"
        ) from error
    options = {"name": "avalanche-ext-sweep", **parameters}
    executor = submitit.AutoExecutor(
        folder=str(folder / "slurm"), cluster=options.pop("cluster", "slurm")
    )
    executor.update_parameters(**options)
    with executor.batch():
        jobs = [executor.submit(work, folder.resolve(), _say_now) for _ in range(workers)]
    return [str(job.job_id) for job in jobs]


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), _say_now)
    except KeyboardInterrupt:
        sys.exit(130)
