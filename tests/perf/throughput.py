"""Images per second on an accelerator, peak memory, and the share of the card's bf16 peak.

ResNet-18 on CIFAR-100 images, batch 128 and 1024; Naive, ER, BER and DRL+BER in the second
experience; float32, bf16 autocast with channels_last, and the same compiled. The peak is what one
large bf16 matrix product reaches on the same card in the same run; a step's arithmetic is three
times the forward pass of its rows, counted by torch.

Runs on a CPU too (``--quick``), to see that it works.
"""

from __future__ import annotations

import time

import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch.utils.flop_counter import FlopCounterMode

from avalanche_ext import BERPlugin, CompilePlugin, DeviceDataPlugin, DRLPlugin, ERPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from tests.perf.step_time import METHODS, cifar_resnet18, resnet18_on_cifar100, synchronize
from tests.perf.timing import arguments, record

SETTINGS = {
    "float32": lambda: [],
    "bf16, channels_last": lambda: [
        PrecisionPlugin("bf16", channels_last=True, fused_optimizer=True)
    ],
    "bf16, channels_last, compiled": lambda: [
        PrecisionPlugin("bf16", channels_last=True, fused_optimizer=True),
        CompilePlugin(),
    ],
}
WARM_UP = 3


class Clock(SupervisedPlugin):
    """Seconds and rows of the steps behind the first few."""

    def before_training_exp(self, strategy, **kwargs):
        self.step, self.rows = 0, 0

    def before_training_iteration(self, strategy, **kwargs):
        if self.step == WARM_UP:
            synchronize()
            self.began = time.perf_counter()
        self.step += 1
        self.rows += len(strategy.mb_y) if self.step > WARM_UP else 0

    def after_training_epoch(self, strategy, **kwargs):
        synchronize()
        self.seconds = time.perf_counter() - self.began


def plugins_of(method):
    mem = 2_000
    return {
        "naive": [],
        "er": [ERPlugin(mem)],
        "ber": [BERPlugin(mem)],
        "drl_ber": [DRLPlugin(1e-3), BERPlugin(mem)],
    }[method]


def peak_flops(device):
    """Floating-point operations per second of a large bf16 product."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return 20 * 2 * n**3 / (time.perf_counter() - start)


def flops_per_image(device):
    """Of one training step: three times the forward pass."""
    with FlopCounterMode(display=False) as counter:
        cifar_resnet18().to(device)(torch.zeros(1, 3, 32, 32, device=device))
    return 3 * counter.get_total_flops()


def measure(work, method, setting, batch, device):
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, clock = cifar_resnet18(), Clock()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        device=device,
        evaluator=None,
        plugins=[DeviceDataPlugin("8GB"), *SETTINGS[setting](), *plugins_of(method), clock],
    )
    for experience in work.benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "method": method, "setting": setting, "batch": batch,
        "rows_per_second": clock.rows / clock.seconds, "peak_bytes": peak,
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        raise SystemExit("no CUDA device; --quick runs a few steps on the CPU")
    peak, flops = peak_flops(device), flops_per_image(device)
    rows = []
    for batch in [8] if options.quick else [128, 1024]:
        samples = (WARM_UP + 2) * batch if options.quick else 5_000
        work = resnet18_on_cifar100(samples)
        for setting in list(SETTINGS)[:2] if options.quick else SETTINGS:
            for method in METHODS:
                row = measure(work, method, setting, batch, device)
                row["share_of_bf16_peak"] = row["rows_per_second"] * flops / peak
                rows.append(row)
                print(
                    f"batch {batch}, {setting}, {method}: {row['rows_per_second']:,.0f} images/s, "
                    f"{100 * row['share_of_bf16_peak']:.1f} % of the bf16 peak, "
                    f"{(row['peak_bytes'] or 0) / 1e9:.2f} GB",
                    flush=True,
                )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record(
        options, "throughput", rows, device=name, bf16_peak_flops=peak, flops_per_image=flops
    )  # fmt: skip


if __name__ == "__main__":
    main()
