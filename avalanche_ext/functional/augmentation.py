"""Random augmentation of a whole batch at once, an independent draw for each sample.

The distributions are those of torchvision's per-image transforms of the same name. Random numbers
are drawn on the CPU, from ``generator`` or from the global one, and moved to the batch's device
without waiting for it; the same seed gives the same augmentation on every device. A batch that
needs no change may be returned as it is; the input is never written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = [
    "PADDING_MODES",
    "color_jitter",
    "normalize",
    "padding_sides",
    "random_crop",
    "random_flip",
    "to_float",
]

PADDING_MODES = ("constant", "edge", "reflect", "symmetric")
Range = tuple[float, float] | None


def random_crop(
    x: Tensor,
    size: tuple[int, int],
    padding: int | Sequence[int] = 0,
    *,
    fill: float | Sequence[float] = 0,
    padding_mode: str = "constant",
    generator: Generator | None = None,
) -> Tensor:
    """Pad every image and cut a window out of it, its corner uniform and independent per sample.

    Args:
        x: Images of any type.
        size: Height and width of the result.
        padding: See ``padding_sides``.
        fill: Value of a constant padding, in the units of ``x``; one number or one per channel.
        padding_mode: ``"constant"``, ``"edge"``, ``"reflect"`` (the edge pixel is not repeated) or
            ``"symmetric"`` (it is).
        generator: Random numbers; the global ones by default.

    Shapes:
        x ``(B, C, H, W)``, result ``(B, C, *size)``.

    Raises:
        ValueError: If the padded image is smaller than ``size`` or ``padding_mode`` is unknown.
    """
    _check_images("random_crop", x)
    x = _pad(x, padding_sides(padding), fill, padding_mode).contiguous()
    (b, c, height, width), (h, w) = x.shape, size
    if height < h or width < w:
        raise ValueError(
            f"random_crop expects images of at least {(h, w)} after padding; got "
            f"{(height, width)}. Pad more or crop less."
        )
    top = torch.randint(height - h + 1, (b,), generator=generator)
    left = torch.randint(width - w + 1, (b,), generator=generator)
    if b == 0 or (height, width) == (h, w):
        return x[..., :h, :w]
    # A view of overlapping windows, one for each place it could start at: index_select copies
    # whole windows and is four to five times as fast as indexing an unfolded view by sample.
    plane = height * width
    windows = x.as_strided(
        (x.numel() - (c - 1) * plane - (h - 1) * width - w + 1, c, h, w), (1, plane, width, 1)
    )
    start = torch.arange(b) * (c * plane) + top * width + left
    return windows.index_select(0, start.to(x.device, non_blocking=True))


def random_flip(x: Tensor, p: float, dim: int = -1, generator: Generator | None = None) -> Tensor:
    """Mirror each image with probability ``p``: left and right (``dim=-1``), or up and down (-2).

    Shapes:
        x ``(B, C, H, W)``, of any type; so is the result.

    Raises:
        ValueError: If ``dim`` is neither -1 nor -2.
    """
    _check_images("random_flip", x)
    if dim not in (-1, -2):
        raise ValueError(f"random_flip expects dim -1 (horizontal) or -2 (vertical); got {dim}.")
    b = x.shape[0]
    rows = torch.arange(b) + b * (torch.rand(b, generator=generator) < p)
    return torch.cat((x, x.flip(dim))).index_select(0, rows.to(x.device, non_blocking=True))


def color_jitter(
    x: Tensor,
    brightness: Range = None,
    contrast: Range = None,
    saturation: Range = None,
    hue: Range = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Change brightness, contrast, saturation and hue, by uniform factors and in random order.

    Each sample has its own factor :math:`f` for each operation and its own order of the operations.
    The first three are :math:`f x + (1 - f) o`, where ``o`` is black, the mean of the grey image
    and the grey image; hue is turned by ``f`` of a full circle. Results are clamped to the
    range of an image after each operation.

    Floats agree with torchvision within 1e-5. ``uint8`` images are computed in float32 and rounded
    to the nearest level once, at the end, where torchvision cuts the fraction off after each
    operation: one operation differs from it by at most 1 level (factors from 0.5 to 1.5), all four
    with factors from 0.6 to 1.4 by 1.3 levels on average and 6 at most in 600 images measured. PIL
    images, whose hue torchvision turns in 8-bit HSV, differ by 1.5 on average and 23 at most.

    Args:
        x: Images, floats in [0, 1] or ``uint8``.
        brightness: Lowest and highest factor, >= 0; ``None`` to leave it alone.
        contrast: Likewise.
        saturation: Likewise; it leaves images of one channel alone.
        hue: Lowest and highest turn, in [-0.5, 0.5]; it leaves images of one channel alone.
        generator: Random numbers; the global ones by default.

    Shapes:
        x ``(B, C, H, W)`` with C of 1 or 3; result the same, in the type of ``x``.

    Raises:
        ValueError: If ``x`` has another number of channels or is of another integer type.
    """
    _check_images("color_jitter", x)
    b, channels = x.shape[:2]
    if channels not in (1, 3) or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(
            f"color_jitter expects images of 1 or 3 channels, uint8 or float; got {channels} "
            f"channels of {x.dtype}."
        )
    chosen = [(_brighten, brightness), (_set_contrast, contrast)]
    chosen += [(_saturate, saturation), (_turn_hue, hue)] if channels == 3 else []
    active = [(operation, *ends) for operation, ends in chosen if ends is not None]
    order = torch.rand(b, len(active), generator=generator, dtype=torch.float64).argsort(1)
    draws = torch.rand(len(active), b, 1, 1, 1, generator=generator)
    if not active:
        return x
    y = to_float(x) if x.dtype == torch.uint8 else x.to(torch.float32, copy=True)
    for position in order.T:
        for k, (operation, low, high) in enumerate(active):
            rows = (position == k).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            f = (low + (high - low) * draws[k, rows]).to(x.device, non_blocking=True)
            rows = rows.to(x.device, non_blocking=True)
            y.index_copy_(0, rows, operation(y.index_select(0, rows), f))
    return (y.mul_(255).round_() if x.dtype == torch.uint8 else y).to(x.dtype)


def to_float(x: Tensor, *, reciprocal: bool = False) -> Tensor:
    """Bytes as float32 in [0, 1], bit for bit as torchvision computes them; floats as they are.

    Args:
        x: ``uint8`` or floats.
        reciprocal: Multiply by ``1 / 255`` as ``v2.ToDtype`` does, instead of dividing by 255 as
            ``ToTensor`` does: about half of the 256 levels differ in their last bit.

    Raises:
        ValueError: If ``x`` is of another integer type.
    """
    if x.is_floating_point():
        return x
    if x.dtype != torch.uint8:
        raise ValueError(f"to_float expects uint8 or floats; got {x.dtype}. Store images as uint8.")
    y = x.to(torch.float32)
    # A number on the batch's device: CUDA turns the division by a Python number into a product.
    return y.mul_(1 / 255) if reciprocal else y.div_(y.new_full((), 255.0))


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Per channel ``(x - mean) / std``, bit for bit as torchvision computes it.

    Shapes:
        x ``(B, C, H, W)`` floats; mean, std of C numbers, or of one for all channels.

    Raises:
        ValueError: If ``x`` holds integers, or mean and std do not fit its channels.
    """
    _check_images("normalize", x)
    if not x.is_floating_point():
        raise ValueError(
            f"normalize expects floats; got {x.dtype}. Convert with to_float (ToTensor) first."
        )
    if not {len(mean), len(std)} <= {1, x.shape[1]}:
        raise ValueError(
            f"normalize expects mean and std of 1 or {x.shape[1]} numbers, for images of shape "
            f"{tuple(x.shape[1:])}; got {len(mean)} and {len(std)}."
        )
    columns = (torch.tensor([*v], dtype=x.dtype).view(-1, 1, 1) for v in (mean, std))
    means, stds = (c.to(x.device, non_blocking=True) for c in columns)
    return x.sub(means).div_(stds)


def padding_sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding in torchvision's order (left, top, right, bottom).

    One number is for all sides, two are for left and right and for top and bottom.

    Raises:
        ValueError: If there are other than 1, 2 or 4 numbers, or a negative one.
    """
    sides = (padding,) if isinstance(padding, int) else tuple(padding)
    if len(sides) not in (1, 2, 4) or any(side < 0 for side in sides):
        raise ValueError(f"padding is 1, 2 or 4 numbers >= 0; got {padding!r}.")
    left, top, right, bottom = sides * (4 // len(sides))
    return left, top, right, bottom


def _check_images(owner: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{owner} expects images (B, C, H, W); got shape {tuple(x.shape)}.")


def _pad(
    x: Tensor, sides: tuple[int, int, int, int], fill: float | Sequence[float], mode: str
) -> Tensor:
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode is one of {list(PADDING_MODES)}; got {mode!r}.")
    left, top, right, bottom = sides
    if not any(sides):
        return x
    if mode != "constant":  # torch pads bytes with constants only
        return _repeat(_repeat(x, 2, top, bottom, mode), 3, left, right, mode)
    if isinstance(fill, int | float):
        return F.pad(x, (left, right, top, bottom), value=fill)
    if len(fill) not in (1, x.shape[1]):
        raise ValueError(f"fill is one number or {x.shape[1]}, one per channel; got {fill!r}.")
    out = F.pad(x, (left, right, top, bottom))
    values = torch.tensor([*fill], dtype=x.dtype).to(x.device, non_blocking=True)[:, None, None]
    out[:] = values
    out[..., top : top + x.shape[2], left : left + x.shape[3]] = x
    return out


def _repeat(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Pad one axis with copies of its own rows, also by more than it is long."""
    n = x.shape[dim]
    at = torch.cat((torch.arange(-before, 0), torch.arange(n, n + after)))
    if mode == "edge":
        at = at.clamp(0, n - 1)
    else:
        period, last = (max(2 * n - 2, 1), 2 * n - 2) if mode == "reflect" else (2 * n, 2 * n - 1)
        at = at.remainder(period)
        at = torch.minimum(at, last - at)
    border = x.index_select(dim, at.to(x.device, non_blocking=True))
    return torch.cat((border.narrow(dim, 0, before), x, border.narrow(dim, before, after)), dim)


def _brighten(x: Tensor, f: Tensor) -> Tensor:
    return (x * f).clamp_(0, 1)


def _set_contrast(x: Tensor, f: Tensor) -> Tensor:
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True), x, f).clamp_(0, 1)


def _saturate(x: Tensor, f: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, f).clamp_(0, 1)


def _turn_hue(x: Tensor, f: Tensor) -> Tensor:
    r"""RGB to HSV, ``h + f``, and back.

    A channel is :math:`V - C \min(\max(\min(k, 4 - k), 0), 1)` with chroma ``C``, value ``V`` and
    :math:`k = (n + 6 h) \bmod 6`, ``n`` = 5, 3, 1 for red, green, blue.
    """
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    if_green, if_blue = (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4)
    h = torch.where(value == r, g - b, torch.where(value == g, if_green, if_blue))
    h = h.div_(chroma.clamp_min(1e-12)).add_(6 * f)  # grey: 0 / 1e-12
    k = h + h.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    k -= (k / 6).floor_().mul_(6)  # k mod 6, several times as fast as remainder
    return torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma).neg_().add_(value)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)
