"""Data that stay on a CUDA device: run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import ReplayPlugin
from torchvision.transforms import (
    ColorJitter,
    Compose,
    ConvertImageDtype,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
)

from avalanche_ext import MLP, BERPlugin, DeviceDataPlugin, ERPlugin
from avalanche_ext.functional.augmentation import color_jitter, random_crop, random_flip
from avalanche_ext.training.loading.resident_loader import ResidentLoader
from tests.conftest import class_stream, naive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FLOAT = [ConvertImageDtype(torch.float32), Normalize((0.5,) * 3, (0.2,) * 3)]


def images(transform, n=64):
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8),
            torch.arange(n) % 2 + 2 * k,
        )
        for k in range(3)
    ]
    return tensors_benchmark(
        train_tensors=parts, test_tensors=parts, task_labels=[0] * 3,
        train_transform=transform, eval_transform=Compose(FLOAT),
    )  # fmt: skip


def weights(strategy):
    return torch.cat([p.detach().flatten().cpu() for p in strategy.model.parameters()])


def train(benchmark, plugins, width, **kwargs):
    torch.manual_seed(0)
    strategy = naive(MLP(width, (32,), 6), plugins, device="cuda", **kwargs)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


@pytest.mark.parametrize("replay", [None, ReplayPlugin, ERPlugin, BERPlugin])
def test_weights_are_those_of_the_host_loader(replay):
    def run(*first):
        return weights(train(class_stream(), [*first, *([replay(20)] if replay else [])], 8))

    assert torch.equal(run(DeviceDataPlugin()), run())


def test_images_and_exemplars_stay_on_the_device_as_uint8():
    plugin, replay = DeviceDataPlugin(), BERPlugin(10)
    strategy = train(images(Compose(FLOAT)), [plugin, replay], 192)
    ((x, _), (y, _), (t, _)) = replay.memory.locate(torch.arange(3))
    assert (x.device.type, y.device.type, t.device.type) == ("cuda",) * 3
    assert x.dtype == torch.uint8
    assert plugin.bytes_allocated == 3 * 64 * (192 + 16)
    strategy.eval(images(Compose(FLOAT)).test_stream)


def test_random_transforms_repeat_with_the_seed_and_equal_those_of_the_cpu():
    moved = Compose([RandomCrop(8, padding=2), RandomHorizontalFlip(), ColorJitter(0.2), *FLOAT])
    one, two = (train(images(moved), [DeviceDataPlugin(), ERPlugin(10)], 192) for _ in range(2))
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("call", [
    lambda x, g: random_crop(x, (8, 8), 2, generator=g),
    lambda x, g: random_flip(x, 0.5, -1, g),
    lambda x, g: color_jitter(x, (0.5, 1.5), (0.5, 1.5), (0.5, 1.5), (-0.2, 0.2), g),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_equals_that_of_the_cpu(call, dtype):
    x = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
    x = x if dtype == torch.uint8 else x.float() / 255
    there = call(x.cuda(), torch.Generator().manual_seed(1))
    here = call(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        there.cpu().float(), here.float(), rtol=0, atol=1.0 if dtype == torch.uint8 else 1e-5
    )


def test_data_beyond_the_budget_are_read_by_workers_and_the_memory_follows_to_the_host():
    replay = ERPlugin(10)
    benchmark = images(Compose(FLOAT))
    torch.manual_seed(0)
    strategy = naive(MLP(192, (32,), 6), [DeviceDataPlugin(), replay], device="cuda")
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.plugins[0].budget = 8 * (192 + 16)
    with pytest.warns(UserWarning, match="budget are left"):
        strategy.train(benchmark.train_stream[1], eval_streams=[])
    strategy.plugins[0].budget = 2**30
    strategy.train(benchmark.train_stream[2], eval_streams=[])


def test_a_step_on_resident_data_does_not_wait_for_the_device():
    strategy = train(class_stream(), [DeviceDataPlugin()], 8)
    plugin = strategy.plugins[0]
    experience = class_stream().train_stream[0]
    strategy.is_training, strategy.experience = True, experience
    source = plugin.resident_source(strategy, experience.dataset.train())
    from torch.utils.data import DataLoader

    loader = ResidentLoader(DataLoader(experience.dataset, 8, shuffle=True), [source])
    batches = iter(loader)
    next(batches)  # the epoch's numbers go to the device here
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in batches:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
