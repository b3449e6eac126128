"""How alike are samples: pairwise cosine similarity, its parts by class, and its correlation.

Reference:
    Chen et al. (2020), Discriminative Representation Loss (DRL) for Continual Learning, Sec. 2,
    Figs. 1 and 2: similarities of inputs, representations and per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module
from torch.nn import functional as F

__all__ = ["PairSplit", "cosine_similarities", "pearson", "per_sample_gradients", "split_pairs"]


class PairSplit(NamedTuple):
    """Values of the unordered pairs ``i < j``, by whether the two samples share their class."""

    different: Tensor
    same: Tensor


def cosine_similarities(rows: Tensor) -> Tensor:
    r"""All pairwise cosine similarities :math:`h_i^\top h_j / (\|h_i\| \|h_j\|)`.

    A zero row has similarity 0 with every row.

    Shapes:
        rows ``(B, ...)``, flattened behind the first axis; result ``(B, B)``.
    """
    rows = rows.flatten(1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    # Gradients of well-learnt samples are tiny: scale first, or their norms vanish in the squares.
    rows = F.normalize(rows / largest.where(largest > 0, torch.ones_like(largest)), dim=1)
    return rows @ rows.T


def split_pairs(matrix: Tensor, targets: Tensor) -> PairSplit:
    """The upper triangle of a pairwise matrix, split into pairs of different and of one class.

    Shapes:
        matrix ``(B, B)``, targets ``(B,)``; together the results hold ``B (B - 1) / 2`` values.

    Raises:
        ValueError: If the shapes disagree.
    """
    if matrix.shape != (len(targets), len(targets)):
        raise ValueError(
            f"split_pairs expects matrix (B, B) and targets (B,); got {tuple(matrix.shape)} "
            f"and {tuple(targets.shape)}."
        )
    i, j = torch.triu_indices(len(targets), len(targets), offset=1, device=matrix.device)
    same = targets[i] == targets[j]
    values = matrix[i, j]
    return PairSplit(values[~same], values[same])


def pearson(a: Tensor, b: Tensor) -> Tensor:
    r"""Pearson correlation :math:`r` of two equally long vectors; NaN where one is constant.

    Raises:
        ValueError: If the shapes disagree or there are fewer than two values.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(
            f"pearson expects two vectors of one length >= 2; got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]


def per_sample_gradients(
    model: Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Gradient of each sample's own loss with respect to all trainable parameters.

    Args:
        model: Called as ``model(inputs)``; put it in eval mode first if it draws random numbers
            or keeps batch statistics. Its parameters' ``.grad`` are left alone.
        inputs: Samples.
        targets: Their labels.
        loss: Mean loss of a batch; it is given batches of one.
        chunk_size: Samples to differentiate at once; all of them by default.

    Shapes:
        inputs ``(B, ...)``, targets ``(B,)``, result ``(B, P)`` for ``P`` parameters.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, {**parameters, **fixed}, (x[None],)), y[None])

    gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0), chunk_size=chunk_size)(
        parameters, inputs, targets
    )
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
