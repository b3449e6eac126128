"""What a generator is: it can be sampled, and says which loss it is trained with.

Nothing here knows about images: a sample has any shape, features ``(D,)`` included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator as Draws
from torch import Tensor, nn

from avalanche_ext.models.modes import evaluating

__all__ = ["GenerativeModel", "Generator", "ValueRange", "normal_noise", "to_symmetric"]

ValueRange = tuple[float, float] | None


@runtime_checkable
class Generator(Protocol):
    """Anything that gives samples."""

    in_shape: tuple[int, ...]
    seen: list[int]  # classes that have been learnt

    @property
    def conditional(self) -> bool:
        """Whether samples can be asked for by class."""
        ...

    def sample(
        self, n: int, classes: Sequence[int] | None = None, generator: Draws | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``n`` samples ``(n, *in_shape)`` and their labels ``(n,)``, ``None`` if it has none.

        Args:
            n: How many.
            classes: Of which classes, as many of each as of any other, give or take one; by
                default of all that have been learnt. Only for conditional generators.
            generator: Random numbers; torch's global ones by default.
        """
        ...


class GenerativeModel(nn.Module):
    """A generator with latent noise. Subclasses define ``decode`` and the losses.

    Every batch of data trains ``data_parameters()`` on ``data_loss``. Where ``sample_loss`` is
    defined, it needs no data, and trains ``sample_parameters()``: the generator of an adversarial
    pair, whose critic is what sees the data.

    Args:
        in_shape: Shape of one sample.
        latent: Numbers of noise per sample.
        n_classes: Classes that can be asked for; 0 for a generator without labels.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds, such
            as features.

    Attributes:
        seen: Classes that have been learnt, in the order of arrival.
        adam: Learning rate and betas that suit it.

    Raises:
        ValueError: For a bad argument.
    """

    adam: tuple[float, tuple[float, float]] = (1e-3, (0.9, 0.999))
    adversarial = False

    def __init__(
        self, in_shape: Sequence[int], latent: int, n_classes: int, value_range: ValueRange
    ) -> None:
        super().__init__()
        owner, shape = type(self).__name__, tuple(in_shape)
        if not shape or min(shape) < 1 or latent < 1 or n_classes < 0:
            raise ValueError(
                f"{owner} expects the shape of a sample, at least one latent unit and n_classes "
                f">= 0; got in_shape={shape}, latent={latent}, n_classes={n_classes}."
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(
                f"{owner} expects value_range=(lowest, highest) of the data, or None for data "
                f"without bounds; got {value_range}."
            )
        self.in_shape = shape
        self.latent = latent
        self.n_classes = n_classes
        self.value_range = value_range
        self.seen: list[int] = []

    @property
    def conditional(self) -> bool:
        """Whether samples can be asked for by class."""
        return self.n_classes > 0

    # to be defined --------------------------------------------------------------------------

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples from noise, and labels for a conditional generator; with gradients.

        Shapes:
            z ``(B, latent)``, y ``(B,)``, result ``(B, *in_shape)``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no decode.")

    def data_loss(self, x: Tensor, y: Tensor, generator: Draws | None = None) -> Tensor:
        """Loss of each sample of the data, ``(B,)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no data_loss.")

    def sample_loss(
        self, n: int, generator: Draws | None = None, classes: Sequence[int] | None = None
    ) -> Tensor:
        """Loss of each of ``n`` generated samples, ``(n,)``, for an adversarial generator.

        ``classes``: as in ``sample``.
        """
        raise NotImplementedError(f"{type(self).__name__} is not adversarial.")

    def data_parameters(self) -> list[nn.Parameter]:
        """What ``data_loss`` trains."""
        return list(self.parameters())

    def sample_parameters(self) -> list[nn.Parameter]:
        """What ``sample_loss`` trains."""
        return []

    # sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, classes: Sequence[int] | None = None, generator: Draws | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Generator``: in evaluation mode, without gradients; modes stay as they are.

        Raises:
            ValueError: If ``n`` is below 1; for classes that have not been learnt, or any class of
                a generator without labels.
        """
        if n < 1:
            raise ValueError(f"sample expects n >= 1; got {n}.")
        y = self.labels(n, classes, generator)
        z = self.noise(n, generator)
        with evaluating(self):
            return self.decode(z, y), y

    def noise(self, n: int, generator: Draws | None = None) -> Tensor:
        """Standard normal noise ``(n, latent)``."""
        return normal_noise((n, self.latent), generator, next(self.parameters()))

    def labels(
        self, n: int, classes: Sequence[int] | None = None, generator: Draws | None = None
    ) -> Tensor | None:
        """Labels ``(n,)`` to ask for, spread evenly; ``None`` for a generator without labels."""
        owner = type(self).__name__
        if not self.conditional:
            if classes is not None:
                raise ValueError(
                    f"this {owner} was built without labels (n_classes=0) and cannot be asked for "
                    f"classes {list(classes)}; leave classes out, or build it with n_classes."
                )
            return None
        wanted = self.seen if classes is None else [int(c) for c in classes]
        unseen = sorted(set(wanted) - set(self.seen))
        if unseen or not wanted:
            raise ValueError(
                f"{owner} can make samples of the classes that it has learnt, "
                f"{sorted(self.seen)}; got a request for {wanted or 'none'}. Train it on them "
                f"first."
            )
        device = next(self.parameters()).device
        start = _draw_device(generator, device)
        first = torch.randint(len(wanted), (1,), generator=generator, device=start)
        turn = (torch.arange(n, device=start) + first) % len(wanted)
        return torch.tensor(wanted, device=start)[turn].to(device)

    def learn_classes(self, classes: Sequence[int]) -> None:
        """Note classes as learnt: training on them begins.

        Raises:
            ValueError: If a conditional generator has no label for one of them.
        """
        outside = [c for c in classes if not 0 <= c < self.n_classes]
        if self.conditional and outside:
            raise ValueError(
                f"{type(self).__name__} was built with n_classes={self.n_classes} and has no "
                f"label for {outside}; build it with n_classes={max(classes) + 1}."
            )
        self.seen = [*self.seen, *(int(c) for c in classes if c not in self.seen)]

    def check_data(self, x: Tensor) -> None:
        """Raise if samples have another shape, or values outside ``value_range``."""
        owner = type(self).__name__
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(
                f"{owner} was built for samples of shape {self.in_shape}; the data has "
                f"{tuple(x.shape[1:])}. Build it with in_shape={tuple(x.shape[1:])}."
            )
        if self.value_range is None:
            return
        (low, high), found = self.value_range, torch.stack(x.aminmax()).tolist()
        slack = 1e-3 * (high - low)
        if not (low - slack <= found[0] and found[1] <= high + slack):
            raise ValueError(
                f"{owner} expects values in [{low}, {high}]; the data has {found[0]:.3g} to "
                f"{found[1]:.3g}. Pass value_range=(lowest, highest) of the data as it reaches the "
                f"network, after normalisation, or None for data without bounds."
            )

    def get_extra_state(self) -> list[int]:
        """What was learnt is part of ``state_dict``."""
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        """See ``get_extra_state``."""
        self.seen = list(state)

    # for subclasses -------------------------------------------------------------------------

    def to_unit(self, x: Tensor) -> Tensor:
        """Data to [0, 1]; data without bounds as it is."""
        return x if self.value_range is None else _to_unit(x, self.value_range)

    def from_unit(self, unit: Tensor) -> Tensor:
        """Values in [0, 1] to those of the data."""
        if self.value_range is None:
            return unit
        low, high = self.value_range
        return low + (high - low) * unit

    def from_symmetric(self, x: Tensor) -> Tensor:
        """Values in [-1, 1] to those of the data; without bounds as they are."""
        return x if self.value_range is None else self.from_unit((x + 1) / 2)

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as rows of a conditional network's input."""
        return nn.functional.one_hot(y, self.n_classes).to(next(self.parameters()).dtype)


def to_symmetric(x: Tensor, value_range: ValueRange) -> Tensor:
    """Data to the [-1, 1] of adversarial networks; data without bounds as it is."""
    return x if value_range is None else 2 * _to_unit(x, value_range) - 1


def _to_unit(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    low, high = value_range
    return ((x - low) / (high - low)).clamp(0, 1)


def normal_noise(shape: tuple[int, ...], generator: Draws | None, like: Tensor) -> Tensor:
    """Standard normal numbers of the type and on the device of ``like``."""
    at = _draw_device(generator, like.device)
    noise = torch.randn(shape, generator=generator, device=at, dtype=like.dtype)
    return noise.to(like.device, non_blocking=True)


def _draw_device(generator: Draws | None, default: torch.device) -> torch.device:
    """Where a generator draws: numbers from the CPU's are the same whatever the device."""
    return default if generator is None else generator.device
