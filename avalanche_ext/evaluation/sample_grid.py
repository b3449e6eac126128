"""A grid of a few images of a data set, each under its label, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avalanche_ext.training.checks import check_count

__all__ = ["sample_grid"]

_COLUMNS, _GAP = 8, 2
_SMALLEST, _LARGEST = 48, 128  # pixels of an image's longer side in the grid
_BACKGROUND = 48  # neither black nor white, so that an image's edge can be seen
# Digits of 3 x 5 pixels, a row per number, its bits from left to right.
_DIGITS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1), "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 1, 1),
    "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7), "-": (0, 0, 7, 0, 0),
}  # fmt: skip


def sample_grid(
    samples: Any, labels: Sequence[int] | Tensor | None = None, *, n: int = 32, seed: int = 0
) -> Tensor | None:
    r"""A grid of ``n`` random images in the order of their labels, which stand above them.

    Each image is scaled to its own range, :math:`(x - \min x) / (\max x - \min x)` over all its
    channels: so normalised images can be seen without their statistics, but the brightness and
    contrast of two images do not compare. An image of one value is black; so are numbers that are
    not finite, and they are left out of the range. Images of more than 128 pixels a side are
    averaged down, smaller ones enlarged by whole pixels.

    Args:
        samples: A tensor ``(N, C, H, W)``, or a data set whose items are ``x`` or begin with
            ``x, y``. Only samples that are drawn are read. Their sizes may differ.
        labels: The samples' labels, instead of ``y``.
        n: Images in the grid; all of them where there are fewer.
        seed: Which samples; torch's global random state is left alone.

    Shapes:
        x ``(C, H, W)`` with C 1 or 3, any type of real numbers; result ``(C, rows, columns)``,
        uint8, of three channels if any image has three.

    Returns:
        The grid; ``None`` if there are no samples, or they are not images.

    Raises:
        ValueError: If ``n`` is below 1, or there is not one label per sample.
    """
    check_count("sample_grid", n=n)
    if labels is not None and len(labels) != len(samples):
        raise ValueError(
            f"sample_grid expects one label per sample, {len(samples)}; got {len(labels)}."
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    drawn = [_image_and_label(samples, labels, i) for i in order[:n].tolist()]
    if not drawn or not all(_is_image(x) for x, _ in drawn):
        return None
    drawn.sort(key=lambda item: -1 if item[1] is None else item[1])
    channels = max(len(x) for x, _ in drawn)
    tiles = [_tile(x.expand(channels, -1, -1), label) for x, label in drawn]
    return _joined(tiles)


def _image_and_label(samples: Any, labels: Any, i: int) -> tuple[Any, int | None]:
    item = samples[i]
    x, *rest = item if isinstance(item, tuple | list) else [item]
    return x, _whole(labels[i] if labels is not None else rest[0] if rest else None)


def _whole(label: Any) -> int | None:
    """The label if it is a class; ``None`` for a regression target, a box, several labels."""
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    return int(label) if isinstance(label, Integral) else None


def _is_image(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.ndim == 3
        and len(x) in (1, 3)
        and x.numel() > 0
        and not x.is_complex()
    )


def _tile(x: Tensor, label: int | None) -> Tensor:
    """One image as bytes, its label above it."""
    x = _resized(_scaled(x))
    if label is None:
        return x
    text = _digits(label, scale=max(2, max(x.shape[1:]) // 40))
    width = max(x.shape[2], text.shape[1])
    tile = x.new_full((len(x), text.shape[0] + x.shape[1], width), _BACKGROUND)
    tile[:, : text.shape[0], : text.shape[1]] = text
    tile[:, text.shape[0] :, : x.shape[2]] = x
    return tile


def _scaled(x: Tensor) -> Tensor:
    """0 to 255 over the image's own range; float64, so that no range overflows."""
    x = x.detach().cpu().double()
    finite = x.isfinite()
    if not finite.any():
        return torch.zeros_like(x)
    low, high = x[finite].min(), x[finite].max()
    # Halves, since the difference of two large numbers may not be finite.
    span = high / 2 - low / 2
    share = (x / 2 - low / 2) / span if span > 0 else torch.zeros_like(x)
    return 255 * share.where(finite, 0)


def _resized(x: Tensor) -> Tensor:
    side = max(x.shape[1:])
    if side > _LARGEST:
        height, width = (max(1, round(edge * _LARGEST / side)) for edge in x.shape[1:])
        x = F.adaptive_avg_pool2d(x, (height, width))
    x = x.round().to(torch.uint8)
    zoom = -(-_SMALLEST // side) if side < _SMALLEST else 1
    return x.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def _digits(number: int, scale: int) -> Tensor:
    """A number as white pixels, one free pixel around each digit; ``(7, 4 k + 1)`` at scale 1."""
    text = str(number)
    out = torch.full((7, 4 * len(text) + 1), _BACKGROUND, dtype=torch.uint8)
    for k, character in enumerate(text):
        for row, bits in enumerate(_DIGITS[character]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    out[row + 1, 4 * k + column + 1] = 255
    return out.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def _joined(tiles: list[Tensor]) -> Tensor:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = (max(t.shape[axis] for t in tiles) for axis in (1, 2))
    step_down, step_right = height + _GAP, width + _GAP
    grid = torch.full(
        (len(tiles[0]), rows * step_down + _GAP, columns * step_right + _GAP),
        _BACKGROUND,
        dtype=torch.uint8,
    )
    for k, tile in enumerate(tiles):
        top = k // columns * step_down + _GAP
        left = k % columns * step_right + _GAP
        grid[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return grid
