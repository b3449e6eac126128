"""Time of a training step over a hand-written loop that does the same mathematics.

An MLP on MNIST (batch 10, 64, 256) and ResNet-18 on CIFAR-100 (batch 32, 128); Naive, ER, BER and
DRL+BER, second experience, with the memory filled by the first. The hand-written loop starts from
the same weights, draws the same samples and ends at the same weights (the largest difference is in
the record); it is what one would write for this one method on tensors, with no library.

Beside it: Avalanche as it comes, without worker processes and with two persistent ones. Its
``ReplayPlugin`` stands in for ER and BER (it replays as many rows per step), with ``DRLPlugin`` on
top for DRL+BER.

A step's time is taken from the first step's start to the epoch's end; what happens once per
experience (loaders, adaptation, moving data) is in its own column.
"""

from __future__ import annotations

import copy
import time

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from torchvision.transforms import (
    Compose,
    ConvertImageDtype,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
)

from avalanche_ext import MLP, BERPlugin, DeviceDataPlugin, DRLPlugin, ERPlugin
from avalanche_ext.benchmarks.cifar import CIFAR100_MEAN, CIFAR100_STD, load_cifar100
from avalanche_ext.benchmarks.mnist import load_mnist
from avalanche_ext.functional.augmentation import normalize, random_crop, random_flip, to_float
from avalanche_ext.functional.drl import drl_loss
from avalanche_ext.training.loading.sampling import seeded
from tests.perf.timing import arguments, interleaved_samples, record

METHODS = ("naive", "er", "ber", "drl_ber")
LAM, MEM = 1e-3, 300


class Stopwatch(SupervisedPlugin):
    """When the first step of an experience began, and when its epoch ended."""

    def before_training_iteration(self, strategy, **kwargs):
        if self.began is None:
            self.began = time.perf_counter()

    def after_training_epoch(self, strategy, **kwargs):
        synchronize()
        self.ended = time.perf_counter()

    def __init__(self):
        super().__init__()
        self.began = self.ended = None


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Work:
    """One network on one data set: two experiences on tensors, and the transforms of images."""

    def __init__(self, name, train, make_model, transforms, layers):
        self.name, self.train, self.make_model = name, train, make_model
        self.transforms, self.layers = transforms, layers
        self.benchmark = tensors_benchmark(
            train_tensors=train, test_tensors=[(x[:8], y[:8]) for x, y in train],
            task_labels=[0] * len(train), **transforms,
        )  # fmt: skip

    @property
    def images(self):
        return bool(self.transforms)

    def augmented(self, x, draws):
        """The transforms of the benchmark, on a batch."""
        x = random_crop(x, (32, 32), 4, generator=draws)
        x = random_flip(x, 0.5, -1, draws)
        return normalize(to_float(x), CIFAR100_MEAN, CIFAR100_STD)


def mlp_on_mnist(samples):
    (x, y), _ = load_mnist()
    parts = [torch.isin(y, torch.tensor(digits)) for digits in ([0, 1], [2, 3])]
    train = [(x[mine][:samples], y[mine][:samples]) for mine in parts]
    return Work("MLP on MNIST", train, lambda: MLP(784, (100, 100), 10), {}, 3)


def resnet18_on_cifar100(samples):
    (x, y), _ = load_cifar100()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    train = [(x[mine][:samples], y[mine][:samples]) for mine in (y < 10, (y >= 10) & (y < 20))]
    to_float_ = [ConvertImageDtype(torch.float32), Normalize(CIFAR100_MEAN, CIFAR100_STD)]
    transforms = {
        "train_transform": Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), *to_float_]),
        "eval_transform": Compose(to_float_),
    }
    return Work("ResNet-18 on CIFAR-100", train, cifar_resnet18, transforms, 3)


def cifar_resnet18(classes=100):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem of stride 1, no pooling behind it."""
    model = resnet18(num_classes=classes)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


def plugins_of(method, *, ours, batch):
    if method == "naive":
        replay = []
    elif not ours:
        replay = [ReplayPlugin(MEM, batch_size_mem=batch)]
    else:
        replay = [ERPlugin(MEM) if method == "er" else BERPlugin(MEM)]
    return [*([DRLPlugin(LAM)] if method == "drl_ber" else []), *replay]


def strategy_of(work, method, batch, *, device_data, ours=True, device="cpu"):
    torch.manual_seed(0)
    model = work.make_model()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.01),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        device=device,
        evaluator=None,
        plugins=[
            *([DeviceDataPlugin()] if device_data else []),
            *plugins_of(method, ours=ours, batch=batch),
            Stopwatch(),
        ],
    )


def prepared(work, method, batch, **kwargs):
    """A strategy that has trained on the first experience."""
    strategy = strategy_of(work, method, batch, **kwargs)
    strategy.train(work.benchmark.train_stream[0], eval_streams=[])
    return strategy


def library(start, work, workers=0):
    """Train a copy of ``start`` on the second experience; seconds of setting up and of steps."""
    loading = {"num_workers": workers, "persistent_workers": True} if workers else {}

    def run():
        strategy = copy.deepcopy(start)
        watch = next(p for p in strategy.plugins if isinstance(p, Stopwatch))
        watch.began = None
        torch.manual_seed(1)
        synchronize()
        begin = time.perf_counter()
        strategy.train(work.benchmark.train_stream[1], eval_streams=[], **loading)
        return {
            "steps": watch.ended - watch.began,
            "setting_up": watch.began - begin,
            "model": strategy.model,
        }

    return run


def by_hand(start, work, method, batch, device="cpu"):
    """The second experience in a plain loop on tensors, with the same draws."""
    replay = next((p for p in start.plugins if hasattr(p, "memory")), None)
    x, y = (c.to(device) for c in work.train[1])
    if replay is not None:
        slots = replay.memory.index().slots
        mem_x, mem_y, _ = (c[: len(slots)] for c, _ in replay.memory.locate(slots))
        seed = (1, *replay._name.encode(), replay._loaders + 1)  # the plugin asks for torch's seed
    device_data = next(p for p in start.plugins if isinstance(p, DeviceDataPlugin))

    def run():
        model = copy.deepcopy(start.model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        kept = []
        layers = drl_layers(model) if method == "drl_ber" else []
        hooks = [layer.register_forward_hook(lambda m, i, o: kept.append(o)) for layer in layers]
        torch.manual_seed(1)
        synchronize()
        begin = time.perf_counter()
        if replay is None:
            torch.empty((), dtype=torch.int64).random_()  # a DataLoader's draw for its workers
            shuffle = torch.Generator().manual_seed(
                int(torch.empty((), dtype=torch.int64).random_().item())
            )
            draws = seeded(device_data._seed, device_data._epochs + 1, -5, 1, 0)
        else:
            shuffle, picks = seeded(*seed, 1, -2), seeded(*seed, 1)
            draws = seeded(*seed, 1, -3, 0)
        for rows in torch.randperm(len(y), generator=shuffle).split(batch):
            rows = rows.to(device)
            bx, by = x.index_select(0, rows), y.index_select(0, rows)
            if replay is not None:
                if method == "er":
                    at = torch.randint(len(slots), (batch,), generator=picks)
                else:
                    at = torch.rand(1, batch, generator=picks, dtype=torch.float64) * len(slots)
                    at = at.long().reshape(-1)
                at = slots[at].to(device)
                bx = torch.cat([bx, mem_x.index_select(0, at)])
                by = torch.cat([by, mem_y.index_select(0, at)])
            if work.images:
                bx = work.augmented(bx, draws)
            optimizer.zero_grad()
            kept.clear()
            logits = model(bx)
            loss = cross_entropy(logits, by)
            if method == "drl_ber":
                loss = loss + LAM * drl_loss([*kept, logits], by, form="drl")
            loss.backward()
            optimizer.step()
        synchronize()
        end = time.perf_counter()
        for hook in hooks:
            hook.remove()
        return {"steps": end - begin, "setting_up": 0.0, "model": model}

    return run


def drl_layers(model):
    """The modules that ``layers="auto"`` stands for, less the logits."""
    if isinstance(model, MLP):
        return [m for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    return [model.layer4, model.avgpool]


def largest_difference(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def measure(work, method, batch, repeats, device="cpu", workers=2):
    """One row of the table."""
    ours = prepared(work, method, batch, device_data=True, device=device)
    stock = prepared(work, method, batch, device_data=False, ours=False, device=device)
    variants = {
        "by_hand": by_hand(ours, work, method, batch, device),
        "ours": library(ours, work),
        "avalanche": library(stock, work),
    }
    if workers:
        variants["avalanche_workers"] = library(stock, work, workers)
    samples = interleaved_samples(variants, repeats)
    steps = -(-len(work.train[1][1]) // batch)
    median = {
        name: {
            key: 1e3 * sorted(run[key] for run in runs)[len(runs) // 2] / count
            for key, count in (("steps", steps), ("setting_up", 1))
        }
        for name, runs in samples.items()
    }
    hand = median["by_hand"]["steps"]
    row = {
        "work": work.name,
        "batch": batch,
        "method": method,
        "steps": steps,
        "milliseconds_per_step": {name: value["steps"] for name, value in median.items()},
        "milliseconds_once": {name: value["setting_up"] for name, value in median.items()},
        "over_by_hand": {name: value["steps"] / hand for name, value in median.items()},
        "largest_difference_of_weights": max(
            largest_difference(a["model"], b["model"])
            for a, b in zip(samples["ours"], samples["by_hand"], strict=True)
        ),
    }
    ratios = ", ".join(f"{k} {v:.2f}" for k, v in row["over_by_hand"].items() if k != "by_hand")
    print(
        f"{work.name}, batch {batch}, {method}: by hand {hand:.3f} ms, over that: {ratios}; once "
        f"per experience {median['ours']['setting_up']:.0f} ms; weights differ by "
        f"{row['largest_difference_of_weights']:.1e}",
        flush=True,
    )
    return row


def main() -> None:
    options = arguments(__doc__.splitlines()[0], parts=("mlp", "resnet18"))
    if options.part == "mlp":
        batches = [64] if options.quick else [10, 64, 256]
        works = [mlp_on_mnist(2_000 if options.quick else 12_000)] * len(batches)
    else:
        batches = [4] if options.quick else [32, 128]
        works = [resnet18_on_cifar100(max(128, 2 * batch)) for batch in batches]
    rows = [
        measure(work, method, batch, options.repeats)
        for work, batch in zip(works, batches, strict=True)
        for method in METHODS
    ]
    name = f"step_time_{options.part}"
    record(options, name, rows, mem=MEM, lam=LAM, worker_processes=2)


if __name__ == "__main__":
    main()
