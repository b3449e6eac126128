r"""Rivals of neural inhibition: penalties on activations and on weights.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, Sec. 3, which compares
    them; Cogswell et al. (2016), Reducing Overfitting in Deep Networks by Decorrelating
    Representations; Rodriguez et al. (2017), Regularizing CNNs with Locally Constrained
    Decorrelations.

Notation: ``B`` samples, ``N`` units of a layer or rows of a weight, ``D`` inputs of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["decov", "l1_activation", "orthogonality"]


def l1_activation(h: Tensor) -> Tensor:
    r"""Mean over samples of the L1 norm of a layer's activations.

    .. math:: \frac{1}{B} \sum_m \sum_i |h_i^m|

    Shapes:
        h ``(B, N)``, result ``()``, in float32 (float64 for float64 input).

    Raises:
        ValueError: If ``h`` is no matrix or has no sample.

    References:
        Aljundi et al. (2018), "L1-Rep".
    """
    h = _matrix("l1_activation", h)
    return h.abs().sum() / len(h)


def decov(h: Tensor) -> Tensor:
    r"""Half the squared covariances between different units over a batch.

    .. math::
        \tfrac12 \left( \|C\|_F^2 - \|\mathrm{diag}\, C\|^2 \right), \qquad
        C = \tfrac1B (H - \mu)^\top (H - \mu)

    with the batch mean :math:`\mu`. For ``B < N`` the norm is that of the ``B x B`` matrix of inner
    products, which is the same number in ``O(B^2 N)`` instead of ``O(B N^2)``.

    Shapes:
        h ``(B, N)``, result ``()``, in float32 (float64 for float64 input).

    Returns:
        The penalty; 0 for one sample, which has no covariance.

    Raises:
        ValueError: If ``h`` is no matrix or has no sample.

    References:
        Cogswell et al. (2016).
    """
    h = _matrix("decov", h)
    batch, width = h.shape
    with torch.autocast(h.device.type, enabled=False):
        centred = h - h.mean(0)
        products = centred @ centred.T if batch < width else centred.T @ centred
        all_pairs = products.square().sum(dtype=torch.float64)
        own = centred.square().sum(0).square().sum(dtype=torch.float64)
        return (0.5 * (all_pairs - own) / batch**2).to(h.dtype)


def orthogonality(
    weight: Tensor,
    *,
    form: Literal["local", "global"] = "local",
    sharpness: float = 10.0,
    gradient: Literal["exact", "authors"] = "exact",
) -> Tensor:
    r"""How far the rows of a weight are from orthogonal, by the cosines of ordered pairs of rows.

    .. math::
        \text{local: } \sum_{i \ne j} \log\!\left(1 + e^{\lambda (c_{ij} - 1)}\right), \qquad
        \text{global: } \tfrac12 \sum_{i \ne j} c_{ij}^2, \qquad
        c_{ij} = \frac{w_i^\top w_j}{\|w_i\| \|w_j\|}

    The local form leaves rows alone that point away from each other; the global form does not.
    Rows of zeros have no direction: they have cosine 0 and no gradient.

    Args:
        weight: A linear layer's weight or a convolution's filters; everything behind the first
            axis is flattened.
        form: ``"local"`` or ``"global"``.
        sharpness: :math:`\lambda` of the local form, > 0. Paper: 10.
        gradient: ``"exact"``, or ``"authors"``: what the released code adds to each row instead,
            :math:`\sum_j \lambda\, s(\lambda (c_{ij} - 1))\, w_j / \|w_j\|` with the logistic
            function ``s``: half of the pairs, and not projected to the tangent of the sphere. The
            value stays the same. For the local form only.

    Shapes:
        weight ``(N, ...)``, result ``()``.

    Raises:
        ValueError: For an argument out of range, or a weight with less than two axes.

    References:
        Rodriguez et al. (2017), Eqs. 3 and 4.
    """
    if weight.ndim < 2:
        raise ValueError(f"orthogonality expects a weight (N, D, ...); got {tuple(weight.shape)}.")
    if form not in ("local", "global") or gradient not in ("exact", "authors"):
        raise ValueError(
            f"orthogonality expects form 'local' or 'global' and gradient 'exact' or 'authors'; "
            f"got {form!r} and {gradient!r}."
        )
    if not sharpness > 0 or (form == "global" and gradient == "authors"):
        raise ValueError(
            f"orthogonality expects sharpness > 0, and gradient='authors' with form='local'; got "
            f"sharpness={sharpness}, gradient={gradient!r}, form={form!r}."
        )
    rows = weight.flatten(1)
    unit = _directions(rows)
    cosines = unit @ unit.T
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if form == "global":
        return 0.5 * (cosines.square() * others).sum()
    exponents = sharpness * (cosines - 1)
    value = (F.softplus(exponents) * others).sum()
    if gradient == "exact":
        return value
    pull = (sharpness * torch.sigmoid(exponents) * others) @ unit
    linear = (rows * pull.detach()).sum()
    return value.detach() + linear - linear.detach()


def _matrix(owner: str, h: Tensor) -> Tensor:
    if h.ndim != 2 or len(h) < 1:
        raise ValueError(f"{owner} expects activations (B, N) with B >= 1; got {tuple(h.shape)}.")
    return h if h.dtype == torch.float64 else h.float()


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays, and gets no gradient."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > 0, rows / torch.where(norms > 0, norms, 1.0), 0.0)
