r"""Variational autoencoder, plain or conditional on the class.

.. math:: -\mathrm{ELBO}(x) = -\log p(x|z) + \mathrm{KL}(q(z|x) \| \mathcal N(0, I)),
          \qquad z \sim q(z|x) = \mathcal N(\mu(x), e^{v(x)})

Reference:
    Kingma & Welling (2014), Auto-Encoding Variational Bayes; Sohn, Lee, Yan (2015), Learning
    Structured Output Representation using Deep Conditional Generative Models; sizes of van de Ven &
    Tolias (2018), Generative replay with feedback connections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator as Draws
from torch import Tensor, nn

from avalanche_ext.functional.generative import (
    bernoulli_nll,
    gaussian_kl,
    gaussian_nll,
    reparametrise,
)
from avalanche_ext.models.generators.base import GenerativeModel, ValueRange, normal_noise
from avalanche_ext.models.mlp import MLP

__all__ = ["VAE"]


class VAE(GenerativeModel):
    """Fully connected variational autoencoder for samples of any shape.

    A sample is the mean that the decoder gives: a Bernoulli's for data with bounds, which are
    mapped to [0, 1], a Gaussian's of variance 1 for data without. A conditional one gives the label
    to encoder and decoder. ``VAE((1, 28, 28))`` is the paper's for Split MNIST (1,069,784
    parameters).

    Args:
        in_shape: Shape of one sample.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            Papers: (400, 400) for Split MNIST, (1000, 1000) for Permuted MNIST.
        latent: Latent units (papers: 100).
        n_classes: Classes that can be asked for; 0 for a generator without labels.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds.

    Shapes:
        ``data_loss``: x ``(B, *in_shape)``, y ``(B,)``, result ``(B,)``.

    Raises:
        ValueError: For a bad argument.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (400, 400),
        latent: int = 100,
        n_classes: int = 0,
        value_range: ValueRange = (0.0, 1.0),
    ) -> None:
        super().__init__(in_shape, latent, n_classes, value_range)
        if not hidden:
            raise ValueError("VAE expects at least one hidden layer; got hidden=().")
        features = math.prod(self.in_shape)
        self.encoder = MLP(features + n_classes, hidden, 0)
        self.mean = nn.Linear(hidden[-1], latent)
        self.logvar = nn.Linear(hidden[-1], latent)
        self.decoder = MLP(latent + n_classes, tuple(reversed(hidden)), features)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of ``q(z|x)``, each ``(B, latent)``."""
        h = self.encoder(self._with_label(self.to_unit(x).flatten(1), y))
        return self.mean(h), self.logvar(h)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """See ``GenerativeModel``."""
        out = self._raw(z, y)
        return out if self.value_range is None else self.from_unit(torch.sigmoid(out))

    def data_loss(self, x: Tensor, y: Tensor, generator: Draws | None = None) -> Tensor:
        """The negative ELBO of each sample, with one draw of ``z``."""
        mean, logvar = self.encode(x, y)
        z = reparametrise(mean, logvar, normal_noise(tuple(mean.shape), generator, mean))
        nll = gaussian_nll if self.value_range is None else bernoulli_nll
        return nll(self._raw(z, y), self.to_unit(x)) + gaussian_kl(mean, logvar)

    def _raw(self, z: Tensor, y: Tensor | None) -> Tensor:
        """The decoder's output: logits for data with bounds, values for data without."""
        return self.decoder(self._with_label(z, y)).unflatten(1, self.in_shape)

    def _with_label(self, h: Tensor, y: Tensor | None) -> Tensor:
        if not self.conditional:
            return h
        if y is None:
            raise ValueError("a conditional VAE needs labels; got none.")
        return torch.cat([h, self.one_hot(y)], 1)
