"""Channel masks by themselves: learn which channels a network needs, then remove the others.

python examples/channel_masks.py

Trains a small ConvNet on scikit-learn's digits with a mask on each channel and the sparsity loss,
makes the masks hard, removes closed channels, folds batch norms, and compares outputs, accuracy,
parameters and operations of the three networks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from avalanche_ext import GatedNetwork, build_backbone, fold_batch_norms, prune_channels
from avalanche_ext.benchmarks import split_digits
from avalanche_ext.evaluation.accounting import count_parameters, flops_per_sample


def images(stream) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [sample for experience in stream for sample in experience.dataset]
    return torch.stack([x for x, *_ in samples]), torch.tensor([y for _, y, *_ in samples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lam", type=float, default=0.1, help="weight of the sparsity loss")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/channel_masks"))
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch")
    options = parser.parse_args()

    benchmark = split_digits(train_per_experience=40 if options.smoke else None)
    (x, y), (x_test, y_test) = images(benchmark.train_stream), images(benchmark.test_stream)
    torch.manual_seed(0)
    gated = GatedNetwork(build_backbone("small_convnet", 10, x.shape[1:]))
    optimizer = torch.optim.SGD(
        [
            {"params": gated.network.parameters(), "weight_decay": 5e-4},
            # HAT's factor on the gates' learning rate, and no decay towards half-open gates.
            {"params": gated.embeddings.parameters(), "lr": 0.05 * gated.s_max},
        ],
        lr=0.05,
        momentum=0.9,
    )
    for _ in range(1 if options.smoke else options.epochs):
        batches = torch.randperm(len(x)).split(64)
        for k, batch in enumerate(batches):
            gated.anneal(k + 1, len(batches))
            optimizer.zero_grad()
            loss = F.cross_entropy(gated(x[batch]), y[batch])
            (loss + options.lam * gated.sparsity_loss()).backward()
            optimizer.step()
            gated.clamp_embeddings()
    gated.eval()  # hard masks from here on
    pruned = prune_channels(gated.network, gated.groups, gated.kept()).network
    networks = {"masked": gated, "pruned": pruned, "pruned, folded": fold_batch_norms(pruned)}
    results = {}
    with torch.no_grad():
        reference = gated(x_test)
        for name, network in networks.items():
            z = network(x_test)
            results[name] = {
                "accuracy": (z.argmax(1) == y_test).float().mean().item(),
                "difference": (z - reference).abs().max().item(),
                "parameters": count_parameters(network),
                "flops": flops_per_sample(network, x_test),
            }
            print(
                f"{name:15s} accuracy {100 * results[name]['accuracy']:.1f} %, largest difference "
                f"{results[name]['difference']:.1e}, {results[name]['parameters']:,} parameters, "
                f"{results[name]['flops']:,} operations per image"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "channel_masks.json").write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
