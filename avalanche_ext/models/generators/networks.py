"""The networks of adversarial pairs: a generator from noise to [-1, 1], a critic with a class head.

Convolutional ones are those of Memory Replay GANs for 32 x 32 images; images of other sizes are
made larger by a border of their lowest value, as is done there for MNIST, and cut again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.models.mlp import MLP

__all__ = ["ConditionalNorm", "ConvCritic", "ConvGenerator", "MLPCritic", "MLPGenerator"]

_SLOPE = 0.2  # of the critics' LeakyReLU


class ConditionalNorm(nn.Module):
    """Batch normalisation of maps with a scale and a shift for each class, or one for all.

    Args:
        channels: Channels of the map.
        n_classes: Classes; 0 for none.
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        rows = max(1, n_classes)
        self.scale = nn.Parameter(torch.ones(rows, channels))
        self.shift = nn.Parameter(torch.zeros(rows, channels))

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Maps ``(B, C, H, W)`` of samples of the classes ``y``."""
        scale, shift = (p if y is None else p[y] for p in (self.scale, self.shift))
        return torch.addcmul(shift[..., None, None], self.norm(x), scale[..., None, None])


class ConvGenerator(nn.Module):
    """Noise through a linear layer and deconvolutions of stride 2, each doubling the side.

    Args:
        in_shape: Channels, height and width of an image.
        latent: Numbers of noise.
        widths: Channels of the maps, from the smallest map on.
        n_classes: Classes of the conditional norms; 0 for none.
    """

    def __init__(
        self, in_shape: Sequence[int], latent: int, widths: Sequence[int], n_classes: int
    ) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.first = (widths[0], *(side // 2 ** len(widths) for side in padded(in_shape, widths)))
        self.linear = nn.Linear(latent, math.prod(self.first))
        self.norms = nn.ModuleList(ConditionalNorm(c, n_classes) for c in widths)
        self.deconvolutions = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 5, 2, padding=2, output_padding=1)
            for wide, narrow in itertools.pairwise([*widths, in_shape[0]])
        )

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Images ``(B, C, H, W)`` in [-1, 1] from noise ``(B, latent)``."""
        x = self.linear(z).unflatten(1, self.first)
        for norm, deconvolution in zip(self.norms, self.deconvolutions, strict=True):
            x = deconvolution(norm(x, y).relu())
        height, width = self.in_shape[1:]
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return x[..., top : top + height, left : left + width].tanh()


class ConvCritic(nn.Module):
    """Convolutions of stride 2 without normalisation: a value per image, and logits of classes.

    Args:
        in_shape: Channels, height and width of an image.
        widths: Those of the generator; taken in reverse order.
        n_classes: Logits; 0 for none.
    """

    def __init__(self, in_shape: Sequence[int], widths: Sequence[int], n_classes: int) -> None:
        super().__init__()
        sides = padded(in_shape, widths)
        missing = [large - side for large, side in zip(sides, in_shape[1:], strict=True)]
        self.border = [
            part for gap in reversed(missing) for part in (gap // 2, gap - gap // 2)
        ]  # fmt: skip
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c, d, 5, 2, padding=2)
            for c, d in itertools.pairwise([in_shape[0], *reversed(widths)])
        )
        features = widths[0] * math.prod(side // 2 ** len(widths) for side in sides)
        self.value = nn.Linear(features, 1)
        self.classes = nn.Linear(features, n_classes) if n_classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values ``(B,)`` and logits ``(B, n_classes)`` of images in [-1, 1]."""
        h = F.pad(x, self.border, value=-1.0)  # the darkest value, like MNIST's background
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), _SLOPE)
        h = h.flatten(1)
        return self.value(h)[:, 0], None if self.classes is None else self.classes(h)


class MLPGenerator(nn.Module):
    """Noise and the label through hidden layers to samples of any shape.

    Args:
        in_shape: Shape of a sample.
        latent: Numbers of noise.
        widths: Hidden layers.
        n_classes: Classes; 0 for none.
        bounded: Whether the output is held in [-1, 1].
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        latent: int,
        widths: Sequence[int],
        n_classes: int,
        bounded: bool,
    ) -> None:
        super().__init__()
        self.in_shape, self.n_classes, self.bounded = tuple(in_shape), n_classes, bounded
        self.layers = MLP(latent + n_classes, widths, math.prod(in_shape))

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Samples ``(B, *in_shape)`` from noise ``(B, latent)``."""
        if y is not None:
            z = torch.cat([z, F.one_hot(y, self.n_classes).to(z.dtype)], 1)
        out = self.layers(z).unflatten(1, self.in_shape)
        return out.tanh() if self.bounded else out


class MLPCritic(nn.Module):
    """Hidden layers to a value per sample, and logits of classes.

    Args:
        in_shape: Shape of a sample.
        widths: Those of the generator; taken in reverse order.
        n_classes: Logits; 0 for none.
    """

    def __init__(self, in_shape: Sequence[int], widths: Sequence[int], n_classes: int) -> None:
        super().__init__()
        sizes = [math.prod(in_shape), *reversed(widths)]
        self.layers = nn.ModuleList(nn.Linear(c, d) for c, d in itertools.pairwise(sizes))
        self.value = nn.Linear(sizes[-1], 1)
        self.classes = nn.Linear(sizes[-1], n_classes) if n_classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values ``(B,)`` and logits ``(B, n_classes)``."""
        h = x.flatten(1)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), _SLOPE)
        return self.value(h)[:, 0], None if self.classes is None else self.classes(h)


def padded(in_shape: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Sides of the image that ``len(widths)`` doublings make, at least as large as the image.

    Raises:
        ValueError: If the samples are no images, or too small for so many doublings.
    """
    step = 2 ** len(widths)
    if len(in_shape) != 3 or min(in_shape[1:]) < 2 * step:
        raise ValueError(
            f"a convolutional generator with {len(widths)} widths expects images (channels, "
            f"height, width) of at least {2 * step} pixels a side; got {tuple(in_shape)}. Give "
            f"fewer widths, or use network='mlp', which makes samples of any shape."
        )
    return [-(-side // step) * step for side in in_shape[1:]]
