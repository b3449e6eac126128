"""A training step of ExpandableDER against the number of extractors, with each trick on and off.

A step trains the newest extractor and the classifier on ``[frozen features, new features]``; the
frozen extractors cost t - 1 forward passes. Variants do the same work, from the same weights:

- ``loop``: a plain loop over extractors, their batch norms as trained, batch by batch;
- ``folded``: batch norms of frozen extractors folded;
- ``look_ahead``: folded, and the frozen features of all batches of a round in one go;
- ``pruned``: 28 % of the channels of frozen extractors left (about 8 % of the weights), folded,
  looking ahead;
- on a GPU also ``bf16`` (look_ahead under autocast, channels last) and ``compiled`` (bf16, the new
  extractor compiled).

ResNet-18 and batch 128 on a GPU, ResNet-32 and batch 32 on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.channel_groups import find_channel_groups
from avalanche_ext.models.expandable_net import ExpandableNet
from avalanche_ext.models.pruning import fold_batch_norms, prune_channels
from tests.perf.timing import arguments, interleaved, record

SHAPE = (3, 32, 32)
SHARE = 0.28
CLASSES = 10  # of an experience


def grown(name: str, t: int, device: str, fold: bool) -> ExpandableNet:
    torch.manual_seed(0)
    net = ExpandableNet(build_backbone(name, 0, SHAPE), fold=fold)
    for k in range(t):
        net.grow(list(range(CLASSES * k, CLASSES * (k + 1))))
    return net.to(device).train()


def pruned(net: ExpandableNet, name: str, device: str) -> ExpandableNet:
    dense = build_backbone(name, 0, SHAPE).eval()
    groups = find_channel_groups(dense, prune_output=True)
    draw = torch.Generator().manual_seed(0)
    keep = [torch.randperm(n, generator=draw)[: max(1, round(SHARE * n))] for n in groups.sizes]
    small = fold_batch_norms(prune_channels(dense, groups, keep).network).requires_grad_(False)
    net = copy.deepcopy(net)
    for k in range(len(net.extractors) - 1):
        net.extractors[k] = copy.deepcopy(small).to(device)
        net.widths[k] = small.num_features
    net.classifier = nn.Linear(sum(net.widths), len(net.classes), bias=False, device=device)
    return net.train()


def trained(
    net: ExpandableNet, xs: list[torch.Tensor], ys: list[torch.Tensor], *, ahead: bool,
    bf16: bool = False,
) -> Any:  # fmt: skip
    """A round: one step on each batch."""
    live = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(live, 1e-3, 0.9, weight_decay=5e-4)
    device = xs[0].device.type
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if bf16 else contextlib.nullcontext

    def run() -> None:
        olds: list[Any] = [None] * len(xs)
        if ahead and len(net.extractors) > 1:
            with autocast():
                found = net.old_features(torch.cat(xs))
            assert found is not None
            olds = list(found.split([len(x) for x in xs]))
        for x, y, old in zip(xs, ys, olds, strict=True):
            optimizer.zero_grad()
            with autocast():
                features = net.super_feature(x, old)
                z, aux = net.logits(features), net.auxiliary_logits(features)
            loss = F.cross_entropy(z.float(), y)
            loss = loss + F.cross_entropy(aux.float(), net.auxiliary_labels(y))
            loss.backward()
            optimizer.step()

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    name, batch, round_ = ("cifar_resnet18", 128, 16) if cuda else ("cifar_resnet32", 32, 4)
    rows = []
    for t in (1, 3) if options.quick else (1, 2, 5, 10, 20):
        xs = [torch.randn(batch, *SHAPE, device=device) for _ in range(round_)]
        ys = [torch.randint(CLASSES * t, (batch,), device=device) for _ in range(round_)]
        variants = {
            "loop": trained(grown(name, t, device, False), xs, ys, ahead=False),
            "folded": trained(grown(name, t, device, True), xs, ys, ahead=False),
            "look_ahead": trained(grown(name, t, device, True), xs, ys, ahead=True),
            "pruned": trained(
                pruned(grown(name, t, device, True), name, device), xs, ys, ahead=True
            ),
        }
        if cuda:
            last = [x.contiguous(memory_format=torch.channels_last) for x in xs]
            for variant in ("bf16", "compiled"):
                net = grown(name, t, device, True).to(memory_format=torch.channels_last)
                if variant == "compiled":
                    net.extractors[-1].compile()
                variants[variant] = trained(net, last, ys, ahead=True, bf16=True)
        seconds = interleaved(variants, options.repeats)
        for variant, value in seconds.items():
            rows.append({
                "extractors": t, "variant": variant, "seconds_per_step": value / round_,
                "over_loop": value / seconds["loop"],
            })  # fmt: skip
            print(
                f"t {t:2d} {variant:10s} {1e3 * value / round_:8.1f} ms a step, "
                f"{value / seconds['loop']:.2f} of the loop's",
                flush=True,
            )
    record(options, "expandable_step", rows, device=device, network=name, batch=batch, round=round_)


if __name__ == "__main__":
    main()
