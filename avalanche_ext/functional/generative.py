r"""Losses of generators, and of a solver that learns from what they make.

Reference:
    Kingma & Welling (2014), Auto-Encoding Variational Bayes; Gulrajani et al. (2017), Improved
    Training of Wasserstein GANs; Shin et al. (2017), Continual Learning with Deep Generative
    Replay; Wu et al. (2018), Memory Replay GANs.

Losses are one number per sample, so that new and replayed samples can be weighted apart.

Notation: ``B`` samples, ``D`` numbers each, ``Z`` latent units, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "bernoulli_nll",
    "gaussian_kl",
    "gaussian_nll",
    "gradient_penalty",
    "new_data_weight",
    "reparametrise",
    "replay_alignment",
    "soft_cross_entropy",
]


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    r"""Divergence of a diagonal Gaussian from the standard one.

    .. math:: \tfrac12 \sum_j \left(\mu_j^2 + e^{v_j} - 1 - v_j\right)

    Shapes:
        mean and logvar ``(B, Z)``, result ``(B,)``.

    References:
        Kingma & Welling (2014), appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)


def reparametrise(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    r"""A draw of :math:`\mathcal N(\mu, e^v)` from standard noise: :math:`\mu + e^{v/2} \epsilon`.

    Shapes:
        all ``(B, Z)``.
    """
    return mean + (0.5 * logvar).exp() * noise


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Negative log-likelihood of values in [0, 1] under independent Bernoulli units.

    Shapes:
        logits and x ``(B, ...)``, result ``(B,)``: the sum over a sample's numbers.
    """
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return nll.flatten(1).sum(1)


def gaussian_nll(mean: Tensor, x: Tensor) -> Tensor:
    """Half the squared distance: that of a Gaussian of variance 1, up to a constant.

    Shapes:
        mean and x ``(B, ...)``, result ``(B,)``.
    """
    return 0.5 * (x - mean).square().flatten(1).sum(1)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor
) -> Tensor:
    r"""How far the critic's slope is from 1 between pairs of real and generated samples.

    .. math:: \left(\|\nabla_{\hat x} D(\hat x)\|_2 - 1\right)^2, \qquad
              \hat x = u\, x + (1 - u)\, \tilde x

    The norm is that of all of a sample's numbers. The result can be differentiated with respect to
    the critic. It can be evaluated under ``torch.no_grad`` as well.

    Args:
        critic: Gives one number per sample, of this sample alone (no batch statistics).
        real: Samples of the data.
        fake: As many generated ones; no gradient goes to either.
        share: :math:`u` of each pair, in [0, 1].

    Shapes:
        real and fake ``(B, ...)``, share ``(B,)``, result ``(B,)``.

    References:
        Gulrajani et al. (2017), Eq. 3.
    """
    u = share.reshape(-1, *(1,) * (real.ndim - 1))
    with torch.enable_grad():
        between = torch.lerp(fake.detach(), real.detach(), u).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        flat = slope.flatten(1)
        squared = flat.square().sum(1)
        # The root has no slope at 0, where a dead critic is.
        norm = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)
        return (norm - 1).square()


def replay_alignment(now: Tensor, before: Tensor) -> Tensor:
    r"""How far a generator has moved: squared distance of two samples of one noise and label.

    .. math:: \|G_t(z, c) - G_{t-1}(z, c)\|^2

    Args:
        now: What the generator makes.
        before: What it made when the experience began; it gets no gradient.

    Shapes:
        now and before ``(B, ...)``, result ``(B,)``: the sum over a sample's numbers.

    References:
        Wu et al. (2018), replay alignment.
    """
    return (now - before.detach()).square().flatten(1).sum(1)


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Cross-entropy to a teacher's softened distribution.

    .. math:: -\sum_c p_c \log \mathrm{softmax}(z)_c, \qquad p = \mathrm{softmax}(s / T)

    on both sides with temperature :math:`T`, and without a factor :math:`T^2`. Classes that the
    teacher does not know have :math:`p_c = 0`: they stand behind its own.

    Args:
        logits: The student's, of at least as many classes.
        teacher: The teacher's.
        temperature: :math:`T > 0`.

    Shapes:
        logits ``(B, C)``, teacher ``(B, K)`` with ``K <= C``, result ``(B,)``.

    References:
        Hinton et al. (2015), Distilling the Knowledge in a Neural Network; as in van de Ven &
        Tolias (2018), Generative replay with feedback connections.
    """
    p = F.pad(torch.softmax(teacher / temperature, 1), (0, logits.shape[1] - teacher.shape[1]))
    return -(p * torch.log_softmax(logits / temperature, 1)).sum(1)


def new_data_weight(rule: str | float, experience: int, n_new: int, n_seen: int) -> float:
    r"""Weight :math:`r` of the new data beside :math:`1 - r` of the replay.

    Args:
        rule: ``"1/t"``: every experience counts the same; ``"class_ratio"``: every class does; or
            the weight itself, in [0, 1].
        experience: Number of the experience, from 1; the first has nothing to replay: 1.
        n_new: Classes of this experience.
        n_seen: Classes of this one and those before.

    References:
        Shin et al. (2017), Eqs. 1 and 2.
    """
    if experience <= 1:
        return 1.0
    if rule == "1/t":
        return 1 / experience
    if rule == "class_ratio":
        return n_new / n_seen
    return float(rule)
