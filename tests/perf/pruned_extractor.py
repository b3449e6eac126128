"""Forward pass of a frozen extractor: dense, batch norms folded, channels removed and folded.

ResNet-18 for CIFAR, in evaluation mode and without gradients, as ExpandableDER runs its old
extractors. Channels are kept at random, the same share of each group: 0.5 leaves a quarter of the
weights, 0.28 about the 8 % of the paper's tables.
"""

from __future__ import annotations

import torch

from avalanche_ext.evaluation.accounting import count_parameters, flops_per_sample
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.channel_groups import find_channel_groups
from avalanche_ext.models.pruning import fold_batch_norms, prune_channels
from tests.perf.timing import arguments, interleaved, record

SHAPE = (3, 32, 32)
SHARES = (0.5, 0.28)


def extractors():
    dense = build_backbone("cifar_resnet18", 0, SHAPE).eval()
    found = {"dense": dense, "folded": fold_batch_norms(dense)}
    groups = find_channel_groups(dense, prune_output=True)
    for share in SHARES:
        generator = torch.Generator().manual_seed(0)
        keep = [
            torch.randperm(n, generator=generator)[: max(1, round(share * n))] for n in groups.sizes
        ]
        for multiple in (1, 8):
            pruned = prune_channels(dense, groups, keep, channel_multiple=multiple)
            found[f"pruned_{share}_multiple_{multiple}"] = fold_batch_norms(pruned.network)
    return found


def forward(network, x):
    @torch.inference_mode()
    def run():
        return network(x)

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    networks = extractors()
    sizes = {
        name: {
            "parameters": count_parameters(network),
            "flops": flops_per_sample(network, torch.randn(1, *SHAPE)),
        }
        for name, network in networks.items()
    }
    rows = []
    for batch in (32,) if options.quick else (32, 128):
        x = torch.randn(batch, *SHAPE, device=device)
        variants = {name: forward(net.to(device), x) for name, net in networks.items()}
        seconds = interleaved(variants, options.repeats)
        for name, value in seconds.items():
            row = {
                "batch": batch,
                "extractor": name,
                "seconds": value,
                "speed_over_dense": seconds["dense"] / value,
                "flops_of_dense": sizes[name]["flops"] / sizes["dense"]["flops"],
                **sizes[name],
            }
            rows.append(row)
            print(
                f"B {batch:4d} {name:24s} {1e3 * value:8.1f} ms, {row['speed_over_dense']:5.2f} x "
                f"as quick as dense, {row['flops_of_dense']:.3f} of its FLOPs, "
                f"{row['parameters']} parameters",
                flush=True,
            )
    record(options, "pruned_extractor", rows, device=device)


if __name__ == "__main__":
    main()
