"""Discriminative representation loss (DRL): how alike are the representations of a batch?

Reference:
    Chen, Ma, Wang, Ming, Massiah, Diethe (2020), Discriminative Representation Loss (DRL) for
    Continual Learning: A Solution for CLVision Challenge, Eq. 3.

Notation: ``h_i`` is the flattened representation of sample ``i`` in one layer, ``y_i`` its class,
``S_c`` the sum of the representations of class ``c`` and ``T`` the sum of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "FORMS",
    "GRAM_MAX_PRODUCTS",
    "DRLForm",
    "DRLTerms",
    "drl_combine",
    "drl_loss",
    "drl_terms",
]

Method = Literal["auto", "gram", "class_sums"]

# Up to this many products (batch size times numbers in the batch) the Gram form, which is little
# work in few operations, takes less time than the class sums; tests/perf/drl_loss.py measures it.
GRAM_MAX_PRODUCTS = 1 << 21
# Small layers are put side by side: one product instead of one for each.
_JOIN_NUMEL = 1 << 18
# Half-precision rows are widened in blocks of about this many numbers, never all at once.
_BLOCK_NUMEL = 1 << 20


class DRLForm(NamedTuple):
    r"""How the two terms become one loss: :math:`\beta L_{bt} + \alpha L_{wi}`.

    ``reduction="pairs"`` divides each term by the number of its own pairs, as Eq. 3 does;
    ``"batch"`` divides both sums by :math:`B^2`, as the authors' code does.
    """

    between: float
    within: float
    reduction: Literal["pairs", "batch"]


FORMS: dict[str, DRLForm] = {
    "eq3": DRLForm(1.0, -1.0, "pairs"),  # as printed; unbounded below
    "drl": DRLForm(1.0, 1.0, "pairs"),  # the sign that the authors' code runs, Eq. 3's divisors
    "challenge": DRLForm(0.5, 0.5, "batch"),  # the released challenge code (there: logits only)
    "followup": DRLForm(1.0, 2.0, "batch"),  # the authors' later code, its default alpha
}


class DRLTerms(NamedTuple):
    """Sums over ordered pairs of samples, added over layers, and the number of such pairs."""

    between_sum: Tensor
    within_sum: Tensor
    between_pairs: Tensor
    within_pairs: Tensor

    @property
    def between(self) -> Tensor:
        """``L_bt``: mean inner product of pairs of different class, 0 without such a pair."""
        return self.between_sum / self.between_pairs.clamp(min=1)

    @property
    def within(self) -> Tensor:
        """``L_wi``: mean inner product of pairs of one class, 0 without such a pair."""
        return self.within_sum / self.within_pairs.clamp(min=1)


def drl_loss(
    representations: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    form: str | DRLForm,
    normalize: bool = False,
    method: Method = "auto",
) -> Tensor:
    r"""Discriminative representation loss of one batch.

    .. math::
        L_{bt} = \frac{1}{B_{bt}} \sum_l \sum_{i,j:\, y_i \ne y_j} h_{l,i}^\top h_{l,j}, \qquad
        L_{wi} = \frac{1}{B_{wi}} \sum_l \sum_{i \ne j:\, y_i = y_j} h_{l,i}^\top h_{l,j}

    ``form="eq3"`` is :math:`L_{bt} - L_{wi}`, the equation as printed, which is unbounded below;
    ``form="drl"`` is :math:`L_{bt} + L_{wi}`, the sign of the authors' released code.

    Args:
        representations: One tensor, or one per layer; everything behind the first axis is
            flattened.
        targets: Class labels; any integers, only their equality counts.
        form: A name in ``FORMS`` or a ``DRLForm``. There is no default: the sign is a choice.
        normalize: Divide each representation by its Euclidean norm first (cosine similarity).
        method: ``"gram"`` (all pairs, ``O(B^2 D)``), ``"class_sums"`` (exact too, ``O(B D)``), or
            ``"auto"``, the faster one for the batch size.

    Shapes:
        representations ``(B, ...)`` each, targets ``(B,)``, result ``()``.

    Returns:
        The loss in float32 (float64 for float64 input); an exact zero with a graph where no pair
        exists.

    Raises:
        ValueError: On an empty list, shapes that disagree, or an unknown form or method.
    """
    terms = drl_terms(representations, targets, normalize=normalize, method=method)
    return drl_combine(terms, form, len(targets))


def drl_combine(terms: DRLTerms, form: str | DRLForm, batch_size: int) -> Tensor:
    """Turn the two terms into the loss that ``form`` names (see ``drl_loss``).

    Raises:
        ValueError: If the form is unknown.
    """
    if isinstance(form, str):
        if form not in FORMS:
            raise ValueError(f"form must be one of {sorted(FORMS)} or a DRLForm; got {form!r}.")
        form = FORMS[form]
    if form.reduction == "pairs":
        return form.between * terms.between + form.within * terms.within
    if form.reduction == "batch":
        total = form.between * terms.between_sum + form.within * terms.within_sum
        return total / batch_size**2
    raise ValueError(f"DRLForm.reduction must be 'pairs' or 'batch'; got {form.reduction!r}.")


def drl_terms(
    representations: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    normalize: bool = False,
    method: Method = "auto",
) -> DRLTerms:
    """Sums of inner products over pairs of different class and of one class, over all layers.

    Arguments, shapes and errors are those of ``drl_loss``. Computed in float32 also under
    autocast: products of half-precision maps overflow or lose the difference that matters.
    """
    layers = [representations] if isinstance(representations, Tensor) else list(representations)
    _check(layers, targets, method)
    numel = sum(h.numel() for h in layers)
    if method == "auto":
        method = "gram" if len(targets) * numel <= GRAM_MAX_PRODUCTS else "class_sums"
    with _full_precision(targets.device.type):
        rows = [_flat(h, normalize) for h in layers]
        if len(rows) > 1 and numel <= _JOIN_NUMEL:
            rows = [torch.cat(rows, dim=1)]  # inner products add up over layers
        if method == "gram":
            same = targets[:, None] == targets[None, :]
            between = (~same).flatten()
            within = same.fill_diagonal_(False).flatten()
            sums = [_gram_sums(h, between, within) for h in rows]
            pairs = between.sum(), within.sum()
        else:
            classes, class_of = targets.unique(return_inverse=True)
            counts = torch.zeros_like(classes).index_add_(0, class_of, torch.ones_like(class_of))
            squares = counts.square().sum()
            pairs = len(targets) ** 2 - squares, squares - len(targets)
            sums = [_ClassSums.apply(h, class_of, counts) for h in rows]
        between_sum, within_sum = (
            parts[0] if len(rows) == 1 else torch.stack(parts).sum()
            for parts in zip(*sums, strict=True)
        )
    return DRLTerms(between_sum, within_sum, *pairs)


def _full_precision(device_type: str) -> Any:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return contextlib.nullcontext()


def _check(layers: list[Tensor], targets: Tensor, method: str) -> None:
    if not layers:
        raise ValueError("drl expects at least one layer's representations; got an empty list.")
    if targets.ndim != 1 or len(targets) < 1:
        raise ValueError(f"drl expects targets (B,) with B >= 1; got {tuple(targets.shape)}.")
    for h in layers:
        if h.ndim < 1 or len(h) != len(targets):
            raise ValueError(
                f"drl expects representations (B, ...) and targets (B,); got {tuple(h.shape)} "
                f"and {tuple(targets.shape)}."
            )
    if method not in ("auto", "gram", "class_sums"):
        raise ValueError(f"method must be 'auto', 'gram' or 'class_sums'; got {method!r}.")


def _flat(h: Tensor, normalize: bool) -> Tensor:
    h = h.reshape(len(h), -1)
    return F.normalize(h if h.dtype == torch.float64 else h.float(), dim=1) if normalize else h


def _accumulation_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _gram_sums(h: Tensor, between: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: every inner product, masked. The oracle of ``_ClassSums``."""
    h = h.to(_accumulation_dtype(h))
    gram = (h @ h.T).flatten()
    return gram.dot(between.to(gram.dtype)), gram.dot(within.to(gram.dtype))


class _ClassSums(torch.autograd.Function):
    r"""Both sums from the class sums, ``O(B D)``, exact.

    .. math::
        S_{bt} = \sum_c S_c^\top (T - S_c), \qquad
        S_{wi} = \sum_{c:\, n_c > 1} \Big(\|S_c\|^2 - \sum_{i:\, y_i = c} \|h_i\|^2\Big)

    One class alone gives exactly 0 in the first, classes of one sample exactly 0 in the second.
    Norms are subtracted in float64: on zero-mean representations the difference is small.
    The gradient of :math:`a S_{bt} + b S_{wi}` at :math:`h_i` is
    :math:`2a\,(T - S_{y_i}) + 2b\,(S_{y_i} - h_i)`: a row of a small table, less a multiple of
    :math:`h_i`; the second part is left out, not rounded to nearly 0, for a class of one sample.
    """

    @staticmethod
    def forward(ctx, h: Tensor, class_of: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _accumulation_dtype(h)
        sums = h.new_zeros((len(counts), h.shape[1]), dtype=dtype)
        norms = h.new_empty(len(h), dtype=torch.float64)
        for rows in _blocks(h):
            block = h[rows].to(dtype)
            if h.is_cuda:  # index_add_ adds in no fixed order there; a product of matrices does
                sums.addmm_(F.one_hot(class_of[rows], len(counts)).to(dtype).T, block)
            else:
                sums.index_add_(0, class_of[rows], block)
            norms[rows] = _square_norms(block)
        total = sums.sum(0)
        between = torch.dot((total - sums).reshape(-1), sums.reshape(-1))
        crowded = counts > 1
        of_sums = _square_norms(sums) * crowded
        of_rows = norms * crowded[class_of]
        ctx.save_for_backward(h, class_of, sums, total, crowded)
        return between, (of_sums.sum() - of_rows.sum()).to(dtype)

    @staticmethod
    def backward(ctx, grad_between: Tensor, grad_within: Tensor):  # type: ignore[override]
        h, class_of, sums, total, crowded = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative autograd has to see the sums grow
            sums = torch.zeros_like(sums).index_add(0, class_of, h.to(sums.dtype))
            total = sums.sum(0)
        weight = (2 * grad_within * crowded)[:, None]
        table = (total - sums).mul_(2 * grad_between).addcmul_(weight, sums)
        if h.dtype == table.dtype:
            grad = table.index_select(0, class_of)
            return grad.addcmul_(h, weight[class_of], value=-1), None, None
        grad = torch.empty_like(h)
        for rows in _blocks(h):
            row = table.index_select(0, class_of[rows])
            grad[rows] = row.addcmul_(h[rows].to(table.dtype), weight[class_of[rows]], value=-1)
        return grad, None, None


def _blocks(h: Tensor) -> list[slice]:
    """Rows to work on at once: all, unless a full-precision copy of them has to be made."""
    if h.dtype == _accumulation_dtype(h):
        return [slice(0, len(h))]
    rows = max(1, _BLOCK_NUMEL // max(1, h.shape[1]))
    return [slice(a, a + rows) for a in range(0, len(h), rows)]


def _square_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row: reduced in stretches, added up in float64.

    One float32 reduction over a long row drifts by more digits than the differences can spare.
    """
    stretch = 1024
    whole = rows.shape[1] - rows.shape[1] % stretch
    parts = rows[:, :whole].unflatten(1, (-1, stretch)), rows[:, None, whole:]
    squares = [torch.linalg.vector_norm(p, dim=2).double().square().sum(1) for p in parts]
    return squares[0] + squares[1]
