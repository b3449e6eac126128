"""What a run's generator makes: pictures after each experience, and how good they are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import JointTraining
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from avalanche_ext.evaluation.generation import (
    class_accuracy,
    evaluate_generator,
    reverse_accuracy,
)
from avalanche_ext.experiments.checkpoint import random_state, set_random_state
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.generators.base import GenerativeModel
from avalanche_ext.models.generators.wgan import WGAN
from avalanche_ext.models.modes import evaluating
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin

__all__ = ["GENERATION_COLUMNS", "GenerationWatch", "generator_of"]

# What tables show of it; reports have the rest.
GENERATION_COLUMNS = ("generator_accuracy", "reverse_accuracy", "generator_distance")

_TILES = 20  # in a strip
_MADE = _REAL = 1000  # generated samples, and real test samples that they are compared with
_BATCH = 64  # of the judge
_GAP = 2


def generator_of(strategy: Any) -> GenerativeModel | None:
    """The generator of images that a strategy, or a plugin of it, replays from; ``None`` if none.

    A plugin's is the ``model`` of its ``source``.
    """
    owners = [strategy, *(getattr(p, "source", None) for p in strategy.plugins)]
    for owner in owners:
        for name in ("generator", "model"):
            found = getattr(owner, name, None)
            if isinstance(found, GenerativeModel) and len(found.in_shape) == 3:
                return found
    return None


class GenerationWatch:
    """Looks at a strategy's generator behind every experience; training does not notice.

    A strip of samples from the same noise each time goes to ``folder/samples/exp_K.png`` and to
    TensorBoard (``samples/generated``): forgetting is what changes from strip to strip. A
    conditional generator's samples stand in the order of the classes, free places for those that
    are still to come; ``real.png`` has test images of them.

    Numbers are those of ``evaluate_generator`` and, at the end, ``reverse_accuracy``, in the eyes
    of a judge that is the same for all methods and seeds of a benchmark: the ``mlp`` (400, 400) for
    grey images, the ``small_convnet`` for others, trained on all training images at once, Adam
    1e-3, batches of 64, seed 0, for as many epochs as make 2000 steps, at most 20. Its own accuracy
    is noted. The network of the reverse accuracy takes as many steps. ``critic_accuracy`` is that
    of a critic's own class head on test images.

    Args:
        strategy: Strategy with or without a generator; without, nothing is done.
        benchmark: The benchmark, a test experience for each training experience or one for all.
        n_classes: Its classes.
        folder: The seed's folder.
        writer: TensorBoard's ``SummaryWriter``.
    """

    def __init__(
        self,
        strategy: Any,
        benchmark: Any,
        n_classes: int,
        folder: Path,
        writer: Any,
    ) -> None:
        self.strategy, self.benchmark, self.n_classes = strategy, benchmark, n_classes
        self.folder, self.writer = folder / "samples", writer
        images = sum(len(e.dataset) for e in benchmark.train_stream)
        self._epochs = min(20, math.ceil(2000 * _BATCH / images))
        self._steps = self._epochs * math.ceil(images / _BATCH)
        self._judge: nn.Module | None = None
        self._judge_accuracy = 0.0

    def after_experience(self, k: int) -> list[dict[str, Any]]:
        """Pictures of experience ``k``, and one set of numbers; none without a generator.

        ``reverse_accuracy`` is among them after the last experience, for a conditional generator.
        """
        generator = generator_of(self.strategy)
        if generator is None or not generator.seen:
            return []
        before = random_state()
        try:
            return [self._looked_at(generator, k)]
        finally:
            set_random_state(before)

    def summary(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Fields of a result: all sets of numbers, the last one, and what masks took of layers."""
        taken = getattr(generator_of(self.strategy), "capacity", None)
        fields: dict[str, Any] = {}
        if found:
            fields = {"generation_per_experience": found, **found[-1]}
        if len(found) > 5:  # as of accuracy
            fields["generator_accuracy_after_5"] = found[4].get("generator_accuracy")
        if taken:
            fields["capacity"] = [
                {name: dataclasses.asdict(c) for name, c in layers.items()} for layers in taken
            ]
        return fields

    def _looked_at(self, generator: GenerativeModel, k: int) -> dict[str, Any]:
        if self._judge is None:
            self._judge = self._trained_judge(generator)
        x, y = self._real(generator, generator.seen, _REAL, self.benchmark.test_stream[: k + 1])
        self._draw(generator, k)
        numbers = dataclasses.asdict(
            evaluate_generator(generator, x, self._judge, self._features, n=_MADE)
        )
        found = {f"generator_{name}": value for name, value in numbers.items()}
        found["judge_accuracy"] = self._judge_accuracy
        if isinstance(generator, WGAN) and generator.conditional:
            with evaluating(generator):
                found["critic_accuracy"] = class_accuracy(generator.classify, x, y)
        if k + 1 == len(self.benchmark.train_stream) and generator.conditional:
            fresh = self._network(generator)
            found["reverse_accuracy"] = reverse_accuracy(generator, fresh, x, y, steps=self._steps)
        # JSON knows no infinity.
        return {name: v if v is None or math.isfinite(v) else None for name, v in found.items()}

    # the judge ------------------------------------------------------------------------------

    def _network(self, generator: GenerativeModel) -> nn.Module:
        RNGManager.set_random_seeds(0)
        name = "mlp" if generator.in_shape[0] == 1 else "small_convnet"
        network = build_backbone(name, self.n_classes, generator.in_shape, hidden=(400, 400))
        return network.to(self.strategy.device)

    def _trained_judge(self, generator: GenerativeModel) -> nn.Module:
        network = self._network(generator)
        nothing: Any = None
        training = JointTraining(
            model=network, optimizer=torch.optim.Adam(network.parameters()),
            criterion=nn.CrossEntropyLoss(), train_mb_size=_BATCH,
            train_epochs=self._epochs,
            device=self.strategy.device, plugins=[DeviceDataPlugin()],
            evaluator=nothing,  # to measure
        )  # fmt: skip
        training.train(self.benchmark.train_stream)
        network.eval()
        everything = self._real(generator, list(range(self.n_classes)), 10_000)
        self._judge_accuracy = class_accuracy(network, *everything)
        return network

    def _features(self, x: Tensor) -> Tensor:
        """What the judge's head sees."""
        assert self._judge is not None
        return self._judge.features(x.flatten(1) if x.shape[1] == 1 else x)  # type: ignore[operator]

    def _real(
        self, generator: GenerativeModel, classes: list[int], n: int, stream: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Test images of some classes and their labels, the same ones each time."""
        experiences = self.benchmark.test_stream if stream is None else stream
        data: Any = concat_datasets([e.dataset for e in experiences]).eval()
        labels = torch.as_tensor(list(data.targets))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        kept = order[torch.isin(labels[order], torch.tensor(classes))][:n]
        device = next(generator.parameters()).device
        x = torch.stack([data[i][0] for i in kept.tolist()])
        return x.to(device), labels[kept].to(device)

    # pictures -------------------------------------------------------------------------------

    def _draw(self, generator: GenerativeModel, k: int) -> None:
        places, each = self._places()
        empty = [None] * each
        tiles: list[Tensor | None] = []
        if generator.conditional:
            for c in places:
                draws = torch.Generator().manual_seed(c)
                known = c in generator.seen
                tiles += generator.sample(each, [c], draws)[0] if known else empty
        else:
            draws = torch.Generator().manual_seed(0)
            tiles += generator.sample(each * len(places), None, draws)[0]
        strip = _strip(tiles, generator)
        self.folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(strip).save(self.folder / f"exp_{k}.png", optimize=True)
        self.writer.add_image("samples/generated", strip, k)
        path = self.folder / "real.png"
        if not path.exists():
            real, y = self._real(generator, places, 10_000)
            shown = [x for c in places for x in real[y == c][:each]]
            to_pil_image(_strip(list(shown), generator)).save(path, optimize=True)

    def _places(self) -> tuple[list[int], int]:
        """Classes in the strip, and samples of each."""
        classes = list(range(min(self.n_classes, _TILES)))
        return classes, max(1, _TILES // len(classes))


def _strip(tiles: list[Tensor | None], generator: GenerativeModel) -> Tensor:
    """Tiles side by side as bytes ``(C, height, width)``; places without one are left dark grey."""
    channels, height, width = generator.in_shape
    low, high = generator.value_range or (0.0, 1.0)
    step = width + _GAP
    strip = torch.full((channels, height, len(tiles) * step - _GAP), 48, dtype=torch.uint8)
    for k, tile in enumerate(tiles):
        if tile is not None:
            unit = ((tile.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
            strip[:, :, k * step : k * step + width] = (255 * unit).round().to(torch.uint8)
    return strip
