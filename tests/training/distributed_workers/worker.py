"""One of the processes that torchrun starts: train every case, write the records to a folder."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import torch
from avalanche.benchmarks.utils import data_loader
from avalanche.distributed import DistributedHelper

from tests.training.distributed_workers.cases import CASES, LOOSE, MISTAKES, dtypes, fails, train


def main(folder: Path, patience: float) -> None:
    faulthandler.dump_traceback_later(patience, exit=True)  # a dead-lock ends with a traceback
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    records = {}
    for name, case in {**CASES, **LOOSE}.items():
        for dtype in dtypes(*case):
            records[f"{name} {dtype}"] = train(name, dtype, seed=rank)
    records["helper restored"] = data_loader.DistributedHelper is DistributedHelper
    records["distributed"] = DistributedHelper.is_distributed
    for name, make in MISTAKES.items():
        records[name] = fails(make, rank)
    torch.save(records, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
