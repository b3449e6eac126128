r"""Wasserstein GAN with gradient penalty, plain or conditional with an auxiliary classifier.

.. math::
    L_D = \mathbb E[D(G(z, c))] - \mathbb E[D(x)] + \lambda\, \mathbb E[(\|\nabla D(\hat x)\| - 1)^2]
          + \mathrm{CE}(C(x), y) \\
    L_G = -\mathbb E[D(G(z, c))] + \mathrm{CE}(C(G(z, c)), c)

with the terms of ``C`` for a conditional generator, where generated samples beside ``x`` have its
labels.

Reference:
    Gulrajani et al. (2017), Improved Training of Wasserstein GANs; Odena, Olah, Shlens (2017),
    Conditional Image Synthesis with Auxiliary Classifier GANs; networks of Wu et al. (2018), Memory
    Replay GANs, and its released code.
"""  # noqa: E501 - the formula

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator as Draws
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.functional.generative import gradient_penalty, replay_alignment
from avalanche_ext.models.generators.base import GenerativeModel, ValueRange, to_symmetric
from avalanche_ext.models.generators.networks import (
    ConvCritic,
    ConvGenerator,
    MLPCritic,
    MLPGenerator,
)
from avalanche_ext.models.modes import evaluating

__all__ = ["WGAN"]

_PENALTY = 10.0  # weight of the gradient penalty in all papers


class WGAN(GenerativeModel):
    """Adversarial generator for images, or with ``network="mlp"`` for samples of any shape.

    ``WGAN((1, 32, 32), n_classes=10)`` has the networks of Memory Replay GANs (525,569 and 279,563
    parameters). A border makes 28 x 28 images 32 x 32.

    Args:
        in_shape: Shape of one sample.
        network: ``"conv"`` or ``"mlp"``.
        widths: Channels of the generator's maps, from the smallest on, or its hidden layers; the
            critic has them in reverse order. Each map doubles the side.
        latent: Numbers of noise.
        n_classes: Classes that can be asked for; 0 for a generator without labels.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds, with
            ``"mlp"`` only.

    Shapes:
        ``data_loss``: x ``(B, *in_shape)``, y ``(B,)``, result ``(B,)``.

    Raises:
        ValueError: For a bad argument, or an image size that the network cannot make.
    """

    adam = (1e-4, (0.0, 0.9))
    adversarial = True

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        network: str = "conv",
        widths: Sequence[int] = (128, 64, 32),
        latent: int = 128,
        n_classes: int = 0,
        value_range: ValueRange = (0.0, 1.0),
    ) -> None:
        super().__init__(in_shape, latent, n_classes, value_range)
        bounded = value_range is not None
        if network not in ("conv", "mlp") or not widths or (network == "conv" and not bounded):
            raise ValueError(
                f"WGAN expects network 'conv' or 'mlp', at least one width, and a value_range with "
                f"'conv'; got network={network!r}, widths={tuple(widths)}, "
                f"value_range={value_range}."
            )
        self.generator: nn.Module
        self.critic: nn.Module
        if network == "conv":
            self.generator = ConvGenerator(self.in_shape, latent, widths, n_classes)
            self.critic = ConvCritic(self.in_shape, widths, n_classes)
        else:
            self.generator = MLPGenerator(self.in_shape, latent, widths, n_classes, bounded)
            self.critic = MLPCritic(self.in_shape, widths, n_classes)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """See ``GenerativeModel``."""
        return self.from_symmetric(self.generator(z, self._checked(y)))

    def data_loss(self, x: Tensor, y: Tensor, generator: Draws | None = None) -> Tensor:
        """The critic's loss of each sample, against one generated sample of its class."""
        real, labels = to_symmetric(x, self.value_range), y if self.conditional else None
        noise = self.noise(len(x), generator)
        with torch.no_grad():
            fake = self.generator(noise, labels)
        at = noise.device if generator is None else generator.device
        share = torch.rand(len(x), generator=generator, device=at).to(x)
        value, logits = self.critic(real)
        loss = self.critic(fake)[0] - value
        loss = loss + _PENALTY * gradient_penalty(lambda u: self.critic(u)[0], real, fake, share)
        if labels is not None:
            loss = loss + F.cross_entropy(logits, labels, reduction="none")
        return loss

    def sample_loss(
        self, n: int, generator: Draws | None = None, classes: Sequence[int] | None = None
    ) -> Tensor:
        """The generator's loss of each of ``n`` samples, by default of all classes seen."""
        y = self.labels(n, classes, generator)
        value, logits = self.critic(self.generator(self.noise(n, generator), y))
        return -value if y is None else F.cross_entropy(logits, y, reduction="none") - value

    def alignment_loss(self, before: WGAN, n: int, generator: Draws | None = None) -> Tensor:
        """How far each of ``n`` samples is from the one that an earlier generator makes, ``(n,)``.

        Labels are those that the earlier one has learnt, and values lie in the networks' [-1, 1].
        Both are in evaluation mode: with a batch's own statistics a generator would differ from its
        copy.
        """
        y, z = before.labels(n, None, generator), before.noise(n, generator)
        with torch.no_grad(), evaluating(before):
            target = before.generator(z, y)
        with evaluating(self):
            return replay_alignment(self.generator(z, y), target)

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``(B, n_classes)`` of the critic's class head for data.

        Raises:
            ValueError: If the pair was built without labels.
        """
        logits = self.critic(to_symmetric(x, self.value_range))[1]
        if logits is None:
            raise ValueError(
                "this WGAN was built without labels (n_classes=0), so its critic has no class "
                "head; build it with n_classes."
            )
        return logits

    def data_parameters(self) -> list[nn.Parameter]:
        """The critic's."""
        return list(self.critic.parameters())

    def sample_parameters(self) -> list[nn.Parameter]:
        """The generator's."""
        return list(self.generator.parameters())

    def _checked(self, y: Tensor | None) -> Tensor | None:
        if self.conditional and y is None:
            raise ValueError("a conditional WGAN needs labels; got none.")
        return y if self.conditional else None
