"""Transforms of a whole batch, and the translation of per-sample transforms into them.

A per-sample transform such as ``Compose([Resize(32), RandomCrop(32, 4), ToTensor(),
Normalize(...)])`` is split in two: what is deterministic is applied once, when a sample is stored
(``MovedTransform.prepare``), the rest to each batch at every draw (``MovedTransform.batch``).
``uint8`` images stay ``uint8`` until then. What cannot be moved without changing what a model sees
is refused with ``UnmovableTransform``.

Equal to the per-sample transform bit for bit, given the same random draws; only ``ColorJitter`` on
``uint8`` images rounds otherwise (see ``functional.augmentation.color_jitter``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import torch
import torchvision.transforms as v1
from avalanche.benchmarks.utils.transforms import (
    MultiParamCompose,
    MultiParamTransformCallable,
    TupleTransform,
)
from PIL import Image
from torch import Generator, Tensor, nn
from torchvision.transforms import v2

from avalanche_ext.functional.augmentation import (
    PADDING_MODES,
    color_jitter,
    normalize,
    padding_sides,
    random_crop,
    random_flip,
    to_float,
)

__all__ = [
    "BatchCompose",
    "ColorJitter",
    "MovedTransform",
    "Normalize",
    "RandomCrop",
    "RandomFlip",
    "ToFloat",
    "UnmovableTransform",
    "to_stored",
    "translate",
]

BatchStep = Callable[[Tensor, Generator | None], Tensor]
Range = tuple[float, float] | None
STORED_MODES = ("L", "RGB", "RGBA")  # Pillow's modes whose pixels are bytes in [0, 255]


class UnmovableTransform(ValueError):  # noqa: N818 - it names the transform's fault
    """A per-sample transform that has no equal on batches of stored samples."""


@dataclass(frozen=True)
class RandomCrop:
    """Pad and cut a random window; see ``functional.augmentation.random_crop``.

    ``size`` is one number for a square or (height, width); ``padding`` one number, two (left and
    right, top and bottom) or four (left, top, right, bottom).
    """

    size: int | tuple[int, int]
    padding: int | tuple[int, ...] = 0
    fill: float | tuple[float, ...] = 0
    padding_mode: str = "constant"

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"RandomCrop expects a size of 1 or 2 numbers >= 1; got {self.size}.")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f"RandomCrop expects padding_mode to be one of {list(PADDING_MODES)}; got "
                f"{self.padding_mode!r}."
            )
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "padding", padding_sides(self.padding))
        if not isinstance(self.fill, int | float):
            object.__setattr__(self, "fill", tuple(self.fill))

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Crop each image of the batch."""
        return random_crop(
            x,
            self.size,  # type: ignore[arg-type]  # a pair since __post_init__
            self.padding,
            fill=self.fill,
            padding_mode=self.padding_mode,
            generator=generator,
        )


@dataclass(frozen=True)
class RandomFlip:
    """Mirror with probability ``p``, horizontally (``dim=-1``) or vertically (``dim=-2``)."""

    p: float = 0.5
    dim: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or self.dim not in (-1, -2):
            raise ValueError(
                f"RandomFlip expects 0 <= p <= 1 and dim -1 or -2; got p={self.p}, dim={self.dim}."
            )

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Mirror some images of the batch."""
        return random_flip(x, self.p, self.dim, generator)


@dataclass(frozen=True)
class ColorJitter:
    """Change colours by factors from these ranges; see ``functional.augmentation.color_jitter``."""

    brightness: Range = None
    contrast: Range = None
    saturation: Range = None
    hue: Range = None

    def __post_init__(self) -> None:
        for field in fields(self):
            ends = getattr(self, field.name)
            low, high = (-0.5, 0.5) if field.name == "hue" else (0, float("inf"))
            if ends is None:
                continue
            if len(ends) != 2 or not low <= ends[0] <= ends[1] <= high:
                raise ValueError(
                    f"ColorJitter expects {field.name} to be None or (lowest, highest) within "
                    f"[{low}, {high}]; got {ends}."
                )
            object.__setattr__(self, field.name, tuple(ends))

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Change the colours of each image of the batch."""
        return color_jitter(x, self.brightness, self.contrast, self.saturation, self.hue, generator)


@dataclass(frozen=True)
class ToFloat:
    """``uint8`` to float32 in [0, 1] as ``ToTensor`` does, or by ``reciprocal`` as ``v2.ToDtype``.

    Floats stay as they are.
    """

    reciprocal: bool = False

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Convert the batch."""
        return to_float(x, reciprocal=self.reciprocal)


@dataclass(frozen=True)
class Normalize:
    """``(x - mean) / std`` per channel, of floats."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if not all(self.std):
            raise ValueError(f"Normalize expects every std to differ from 0; got {self.std}.")

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Normalize the batch."""
        return normalize(x, self.mean, self.std)


@dataclass(frozen=True)
class BatchCompose:
    """Batch steps one after the other, all drawing from one generator; none is the identity.

    A step of your own is any callable ``step(x, generator)``; make it comparable and picklable.
    """

    steps: tuple[BatchStep, ...] = ()

    def __post_init__(self) -> None:
        nested = (s.steps if isinstance(s, BatchCompose) else (s,) for s in self.steps)
        object.__setattr__(self, "steps", tuple(itertools.chain.from_iterable(nested)))

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Apply every step to the batch."""
        for step in self.steps:
            x = step(x, generator)
        return x


@dataclass(frozen=True)
class MovedTransform:
    """A per-sample transform in two parts.

    Args:
        prepare: Deterministic transforms of one sample, applied once, before ``to_stored``. They
            compare as torchvision's objects do: by identity.
        batch: What is applied to every batch of stored samples.
    """

    prepare: tuple[Callable[[Any], Any], ...] = ()
    batch: BatchCompose = BatchCompose()

    def store(self, sample: Any) -> Tensor:
        """The tensor to store for a raw sample: ``prepare``, then ``to_stored``.

        Raises:
            UnmovableTransform: If the sample cannot be stored, or if it is still an image or an
                array and nothing in the transform would have made a tensor of it.
        """
        for transform in self.prepare:
            sample = transform(sample)
        if not isinstance(sample, Tensor) and ToFloat not in map(type, self.batch.steps):
            raise UnmovableTransform(
                f"the transform leaves samples as {type(sample).__name__}, not as tensors; add "
                f"ToTensor() to it, or leave loading to a DataLoader."
            )
        return to_stored(sample)


def to_stored(sample: Any) -> Tensor:
    """The tensor in which a prepared sample is stored.

    An image or an array is stored channels first, before the division by 255 that ``ToTensor``
    would do; a tensor is stored as it is.

    Shapes:
        Array ``(H, W)`` or ``(H, W, C)`` of ``uint8`` or floats, image of mode L, RGB or RGBA;
        result ``(C, H, W)``.

    Raises:
        UnmovableTransform: If the sample is neither of these.
    """
    if isinstance(sample, Tensor):
        return sample.as_subclass(Tensor)
    if isinstance(sample, Image.Image) and sample.mode in STORED_MODES:
        sample = np.asarray(sample)
    if (
        isinstance(sample, np.ndarray)
        and sample.ndim in (2, 3)
        and sample.dtype in (np.uint8, np.float16, np.float32, np.float64)
    ):
        channels_last = sample[:, :, None] if sample.ndim == 2 else sample
        return torch.from_numpy(channels_last.transpose(2, 0, 1).copy())
    if isinstance(sample, Image.Image):
        what, remedy = f"an image of mode {sample.mode!r}", "convert it to 'L' or 'RGB'"
    elif isinstance(sample, np.ndarray):
        what, remedy = f"a {sample.dtype} array of shape {sample.shape}", "convert it to a tensor"
    else:
        what, remedy = f"a {type(sample).__name__}", "convert it to a tensor"
    raise UnmovableTransform(
        f"cannot store {what}: a sample is a tensor, an image of mode {', '.join(STORED_MODES)}, "
        f"or an array (H, W) or (H, W, C) of uint8 or floats; {remedy} in the dataset, or leave "
        f"loading to a DataLoader."
    )


def translate(transform: Any) -> MovedTransform:
    """Split a per-sample transform into what is stored and what is done to each batch.

    Args:
        transform: ``None``, a transform of torchvision (v1 or v2), a ``Compose`` of them, an
            ``nn.Sequential``, a list or tuple, Avalanche's multi-parameter transforms (what
            concerns ``x``), a batch transform of this module; nested at will.

    Raises:
        UnmovableTransform: If a part of it cannot be moved; the message names it.
    """
    prepare: list[Callable[[Any], Any]] = []
    batch: list[BatchStep] = []
    for part in _flat(transform):
        kind = type(part)
        steps = _BATCH_STEPS[kind](part) if kind in _BATCH_STEPS else None
        if steps is not None:
            batch += steps
        elif kind in _SAME_VALUES and batch:
            continue
        elif kind not in _DETERMINISTIC | _SAME_VALUES:
            _refuse(part, "how it acts on a whole batch is not known", _LISTED)
        elif batch:
            names = ", ".join(getattr(step, "__name__", type(step).__name__) for step in batch)
            _refuse(
                part,
                f"it is deterministic, hence done once, when a sample is stored, but it comes "
                f"after {names}",
                "Put it before the random transforms and before the conversion to floats",
            )
        else:
            prepare.append(part)
    return MovedTransform(tuple(prepare), BatchCompose(tuple(batch)))


def _flat(transform: Any) -> Iterator[Any]:
    """The single transforms of ``x``, in order."""
    if transform is None or type(transform) in (nn.Identity, v2.Identity):
        return
    if isinstance(transform, TupleTransform):
        parts: Sequence[Any] = transform.transforms[:1]
    elif isinstance(transform, MultiParamTransformCallable):
        parts = [transform.transform]
    elif type(transform) in (v1.Compose, v2.Compose, MultiParamCompose):
        parts = transform.transforms
    elif type(transform) is nn.Sequential or isinstance(transform, list | tuple):
        parts = list(transform)
    else:
        yield transform
        return
    for part in parts:
        yield from _flat(part)


def _crop(part: Any) -> list[BatchStep]:
    kind, fill = type(part), 0 if part.fill is None else part.fill
    sides = [part.padding or 0] if isinstance(part.padding or 0, int) else list(part.padding)
    if kind is v2.RandomCrop and len(sides) == 4:  # it keeps left, right, top, bottom
        sides = [sides[0], sides[2], sides[1], sides[3]]
    if part.pad_if_needed:
        _refuse(part, "pad_if_needed pads each sample by its own size", "Pad by a fixed padding")
    if min(sides) < 0:
        _refuse(part, "its padding is negative", "Use CenterCrop to cut borders off")
    if not isinstance(fill, int | float | list | tuple):
        _refuse(part, f"its fill is {fill!r}", "Fill with one number, or one per channel")
    fill = fill if isinstance(fill, int | float) else tuple(fill)
    return [RandomCrop(tuple(part.size), tuple(sides), fill, part.padding_mode)]


def _jitter(part: Any) -> list[BatchStep]:
    return [ColorJitter(part.brightness, part.contrast, part.saturation, part.hue)]


def _normalize(part: Any) -> list[BatchStep]:
    mean, std = (
        tuple(torch.as_tensor(v, dtype=torch.float64).flatten().tolist())
        for v in (part.mean, part.std)
    )
    return [Normalize(mean, std)]


def _conversion(part: Any) -> list[BatchStep] | None:
    """The batch step of a conversion to float32; ``None`` for one to bytes."""
    scale = getattr(part, "scale", True)
    if part.dtype == torch.float32 and scale:
        return [ToFloat(reciprocal=type(part) is not v1.ConvertImageDtype)]
    if part.dtype != torch.uint8 or not scale:
        why = "it is not a conversion to float32 or to uint8 that scales the values"
        _refuse(part, why, "Use ToTensor() or ToDtype(torch.float32, scale=True)")
    return None


def _refuse(part: Any, why: str, remedy: str) -> NoReturn:
    raise UnmovableTransform(
        f"{part!r} cannot be moved from single samples to batches: {why}. {remedy}; or "
        f"leave loading to a DataLoader."
    )


_SAME_VALUES = {v1.PILToTensor, v2.PILToTensor, v2.ToImage, v2.ToPureTensor}
_CONVERSIONS = (v1.ConvertImageDtype, v2.ConvertImageDtype, v2.ToDtype)
_DETERMINISTIC = {
    *(v1.Resize, v1.CenterCrop, v1.Pad, v1.Grayscale, v1.ToPILImage),
    *(v2.Resize, v2.CenterCrop, v2.Pad, v2.Grayscale, v2.ToPILImage),
    *([v2.RGB] if hasattr(v2, "RGB") else []),
    *_CONVERSIONS,
}
_BATCH_STEPS: dict[type, Callable[[Any], Sequence[BatchStep] | None]] = {
    v1.RandomCrop: _crop,
    v2.RandomCrop: _crop,
    v1.RandomHorizontalFlip: lambda part: [RandomFlip(part.p, -1)],
    v2.RandomHorizontalFlip: lambda part: [RandomFlip(part.p, -1)],
    v1.RandomVerticalFlip: lambda part: [RandomFlip(part.p, -2)],
    v2.RandomVerticalFlip: lambda part: [RandomFlip(part.p, -2)],
    v1.ColorJitter: _jitter,
    v2.ColorJitter: _jitter,
    v1.ToTensor: lambda part: [ToFloat()],
    v2.ToTensor: lambda part: [ToFloat()],
    v1.Normalize: _normalize,
    v2.Normalize: _normalize,
    BatchCompose: lambda part: part.steps,
    **dict.fromkeys(_CONVERSIONS, _conversion),
    **dict.fromkeys((RandomCrop, RandomFlip, ColorJitter, ToFloat, Normalize), lambda part: [part]),
}
_LISTED = (
    "Use Resize, CenterCrop, Pad, Grayscale, then RandomCrop, RandomHorizontalFlip, "
    "RandomVerticalFlip, ColorJitter, ToTensor, Normalize or your own step in a BatchCompose"
)
