"""Train DRL+BER with several processes, each on its part of every batch.

torchrun --nproc-per-node 2 examples/data_parallel.py
python examples/data_parallel.py

Both lines train the same: Split digits, the same batches, the same steps. Each process uses the
GPU of its number where there are enough of them, else the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, BERPlugin, DataParallelPlugin, DRLPlugin
from avalanche_ext.benchmarks import split_digits


def own_device() -> torch.device:
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def accuracies(model, stream, device) -> list[float]:
    model.eval()
    found = []
    for experience in stream:
        x, y = (torch.stack([torch.as_tensor(s[k]) for s in experience.dataset]) for k in (0, 1))
        with torch.no_grad():
            found.append(float((model(x.to(device)).argmax(1).cpu() == y).float().mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=20, help="rows of all processes together")
    parser.add_argument("--out", type=Path, default=Path("runs/data_parallel"))
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch")
    options = parser.parse_args()

    benchmark = split_digits(train_per_experience=40 if options.smoke else None)
    torch.manual_seed(0)
    device, model = own_device(), MLP(64, (100, 100), 10)
    data_parallel = DataParallelPlugin()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=options.batch,
        train_epochs=1 if options.smoke else 10,
        device=device,
        plugins=[data_parallel, DRLPlugin(lam=1e-3), BERPlugin(mem=20)],
        evaluator=None,
    )
    start = time.perf_counter()
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    seconds = time.perf_counter() - start

    if not data_parallel.is_main:
        return  # every process has the same model; one of them reports
    each = accuracies(model, benchmark.test_stream, device)
    result = {
        "world_size": data_parallel.world,
        "device": str(device),
        "seconds": seconds,
        "accuracy": sum(each) / len(each),
        "accuracy_of_each_experience": each,
        "sum_of_weights": sum(float(p.detach().double().sum()) for p in model.parameters()),
    }
    print(f"{data_parallel.world} process(es) on {device}, {seconds:.1f} s")
    for k, accuracy in enumerate(each):
        print(f"  experience {k}   {100 * accuracy:5.1f} %")
    print(f"  average        {100 * result['accuracy']:5.1f} %")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1), "utf-8")


if __name__ == "__main__":
    main()
