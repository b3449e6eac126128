"""The benchmarks of recipes: what ``benchmarks`` offers, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from avalanche_ext.recipes.class_orders import CLASS_ORDERS
from avalanche_ext.recipes.names import lookup
from avalanche_ext.recipes.split_streams import (
    BenchmarkSettings,
    PermutedMNIST,
    SplitDigits,
    SplitMNIST,
)

__all__ = [
    "BENCHMARKS",
    "BenchmarkSettings",
    "CORe50Track",
    "ImageFolder",
    "PermutedMNIST",
    "SplitCIFAR10",
    "SplitCIFAR100",
    "SplitDigits",
    "SplitMNIST",
    "SplitSVHN",
    "ToyCORe50",
]


@dataclass(frozen=True, kw_only=True)
class SplitCIFAR100(SplitDigits):
    """``benchmarks.split_cifar100``; a ``class_order`` of some classes is a smaller benchmark.

    ``first_classes`` is the size of the first experience, where it is larger than the others.
    ``orders`` names a list of ``class_orders``: order seed 1 is its first, and so on.
    """

    n_experiences: int = 10
    first_classes: int | None = None
    augment: bool = True
    orders: str | None = None
    download: bool = False

    def ordered(self, order_seed: int | None) -> tuple[int, ...] | None:
        """See ``SplitDigits``; the first seeds stand for the published orders."""
        known = lookup("orders", self.orders, CLASS_ORDERS) if self.orders else ()
        if order_seed is not None and 1 <= order_seed <= len(known):
            return known[order_seed - 1]
        return super().ordered(order_seed)

    @property
    def n_classes(self) -> int:
        """Classes of the data set that the stream brings."""
        return 100 if self.class_order is None else len(self.class_order)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (3, 32, 32)

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks.cifar import CIFAR100_MEAN, CIFAR100_STD

        return CIFAR100_MEAN, CIFAR100_STD

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_cifar100

        return split_cifar100(
            self.n_experiences, first_classes=self.first_classes, augment=self.augment,
            download=self.download,
            **self.options(seed, order_seed),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SplitCIFAR10(SplitCIFAR100):
    """``benchmarks.split_cifar10``."""

    n_experiences: int = 5
    augment: bool = False

    @property
    def n_classes(self) -> int:
        """Classes of the data set that the stream brings."""
        return 10 if self.class_order is None else len(self.class_order)

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        return (0.5,), (0.5,)

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_cifar10

        return split_cifar10(
            self.n_experiences, augment=self.augment, download=self.download,
            **self.options(seed, order_seed),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SplitSVHN(SplitCIFAR10):
    """``benchmarks.split_svhn``."""

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_svhn

        return split_svhn(
            self.n_experiences, augment=self.augment, download=self.download,
            **self.options(seed, order_seed),
        )  # fmt: skip


class _Folder(NamedTuple):
    """What a data set of images in folders has where nothing else is said."""

    folder: str
    classes: int
    size: int


_FOLDERS = {
    "imagenet100": _Folder("imagenet100", 100, 224),
    # Where Avalanche's own TinyImagenet unpacks it.
    "tinyimagenet": _Folder("tinyimagenet/tiny-imagenet-200", 200, 56),
    "imagenet": _Folder("imagenet", 1000, 224),
}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(SplitDigits):
    """``benchmarks.split_image_folder``: ImageNet, parts of it, Tiny ImageNet; never downloaded.

    Args:
        n_experiences: Length of the stream.
        train_per_experience: Random training images to keep of each experience.
        validation: Test on held-out training images.
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental.
        class_order: The classes in the order of arrival; ascending by default.
        dataset: ``"imagenet100"``, ``"tinyimagenet"`` or ``"imagenet"``: number of classes, size,
            and folder below Avalanche's data folder where nothing else is said.
        root: Folder that holds ``train`` and ``val``.
        classes: Text file with the names of the classes to use; all of the folder by default.
        total_classes: Number of classes, where ``classes`` or ``root`` make it another.
        size: Height and width of the images, where it is another.
        first_classes: Size of the first experience, where it is larger than the others.
        augment: Whether training images are cropped and mirrored at random.
    """

    n_experiences: int = 10
    dataset: str = "imagenet100"
    root: str | None = None
    classes: str | None = None
    total_classes: int | None = None
    size: int | None = None
    first_classes: int | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        lookup("dataset", self.dataset, _FOLDERS)

    @property
    def n_classes(self) -> int:
        """Classes of the data set that the stream brings."""
        return self.total_classes or _FOLDERS[self.dataset].classes

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        size = self.size or _FOLDERS[self.dataset].size
        return (3, size, size)

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN, CHALLENGE_STD

        return CHALLENGE_MEAN, CHALLENGE_STD

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche.benchmarks.datasets import default_dataset_location

        from avalanche_ext.benchmarks import split_image_folder

        folder = _FOLDERS[self.dataset].folder
        benchmark = split_image_folder(
            self.root or default_dataset_location(folder), self.n_experiences,
            classes=self.classes, first_classes=self.first_classes, size=self.in_shape[-1],
            augment=self.augment, **self.options(seed, order_seed),
        )  # fmt: skip
        if benchmark.n_classes != self.n_classes:
            raise ValueError(
                f"ImageFolder expects {self.n_classes} classes of {self.dataset!r}; the folder "
                f"brings {benchmark.n_classes}. Set total_classes={benchmark.n_classes}, or name "
                f"{self.n_classes} of its classes in a file with classes=."
            )
        return benchmark

    def smoke(self) -> BenchmarkSettings:
        """A few training images of each experience, all images small."""
        return dataclasses.replace(self, train_per_experience=40, size=32)


@dataclass(frozen=True, kw_only=True)
class CORe50Track(BenchmarkSettings):
    """``benchmarks.core50``: a track of the CLVision challenge; ``order_seed`` is CORe50's run.

    Args:
        n_experiences: Follows from ``track`` and ``validation``.
        train_per_experience: Random training images to keep of each experience.
        validation: Test on two held-out training sessions.
        track: ``"ni"``, ``"nc"`` or ``"nic"``.
        mini: The images of 32 x 32.
        root: CORe50's folder; Avalanche's default by default.
        download: Fetch what is absent.
    """

    n_experiences: int = dataclasses.field(init=False, default=8)
    track: str = "ni"
    mini: bool = False
    root: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        held_out = {"ni": 6, "nc": 9, "nic": 291}
        lengths = held_out if self.validation else {"ni": 8, "nc": 9, "nic": 391}
        object.__setattr__(self, "n_experiences", lookup("track", self.track, lengths))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (3, 32, 32) if self.mini else (3, 128, 128)

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return 50

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN, CHALLENGE_STD

        return CHALLENGE_MEAN, CHALLENGE_STD

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import core50

        return core50(
            self.track, run=order_seed or 0, mini=self.mini, validation=self.validation,
            train_per_experience=self.train_per_experience, seed=seed, root=self.root,
            download=self.download,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ToyCORe50(BenchmarkSettings):
    """``benchmarks.toy_core50``: the same tracks rendered, nothing to download.

    Every seed of a run sees the same objects and rooms.

    Args:
        n_experiences: Follows from ``track`` and ``objects``.
        train_per_experience: Random training images to keep of each experience.
        validation: Test on three sessions that are in neither stream.
        track: ``"ni"``, ``"nc"`` or ``"nic"``.
        objects: 10, 15, ... 50.
        frames: Frames of one object in one session.
        size: Height and width of the images.
        data_seed: Seed of the objects and rooms.
    """

    n_experiences: int = dataclasses.field(init=False, default=8)
    track: str = "ni"
    objects: int = 50
    frames: int = 20
    size: int = 24
    data_seed: int = 0

    def __post_init__(self) -> None:
        lengths = {"ni": 8, "nc": 1 + (self.objects - 10) // 5, "nic": 8 * self.objects - 9}
        object.__setattr__(self, "n_experiences", lookup("track", self.track, lengths))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (3, self.size, self.size)

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return self.objects

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks.core50_tracks import CHALLENGE_MEAN, CHALLENGE_STD

        return CHALLENGE_MEAN, CHALLENGE_STD

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import toy_core50

        return toy_core50(
            self.track, objects=self.objects, frames=self.frames, size=self.size,
            train_per_experience=self.train_per_experience, validation=self.validation,
            seed=self.data_seed, order_seed=order_seed,
        )  # fmt: skip

    def smoke(self) -> BenchmarkSettings:
        """Twenty objects (ten in the long stream), two frames each."""
        objects = 10 if self.track == "nic" else 20
        return dataclasses.replace(self, objects=objects, frames=2, size=16)


BENCHMARKS: dict[str, type[BenchmarkSettings]] = {
    kind.__name__: kind
    for kind in (
        SplitDigits, SplitMNIST, SplitCIFAR10, SplitCIFAR100, SplitSVHN, ImageFolder,
        PermutedMNIST, CORe50Track, ToyCORe50,
    )
}  # fmt: skip
