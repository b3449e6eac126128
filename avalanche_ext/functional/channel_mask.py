r"""Channel masks: one number per channel that an embedding opens or closes.

References:
    Serra, Suris, Miron, Karatzoglou (2018), Overcoming Catastrophic Forgetting with Hard Attention
    to the Task (HAT), sections 2.2 to 2.6.
    Yan, Xie, He (2021), DER: Dynamically Expandable Representation for Class Incremental Learning,
    section 3.3, channel-level masks and sparsity loss. (Not Dark Experience Replay.)

Notation: ``e`` holds the embeddings of a layer's channels, ``s`` is the scale that grows within
every epoch, :math:`\sigma` the logistic function and :math:`m = \sigma(s e)` the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "COMPENSATIONS",
    "SparsityTerm",
    "ambiguous_share",
    "anneal",
    "compensate_hat",
    "compensation_factor",
    "gate",
    "hard_gate",
    "hat_gradient_mask",
    "hat_sparsity",
    "sparsity_loss",
    "weight_counts",
]

Compensation = Literal["exact", "hat", "none"]
COMPENSATIONS = ("exact", "hat", "none")


class SparsityTerm(NamedTuple):
    """One layer of ``sparsity_loss``: weights per pair of channels, and who reads and writes.

    A tensor is a mask, a whole number is that many channels which are always there.
    """

    area: int
    channels_in: Tensor | int
    channels_out: Tensor | int


def anneal(batch: int, batches: int, s_max: float) -> float:
    r"""Scale of the gates in one batch of an epoch.

    .. math::
        s_b = \frac{1}{s_{max}} + \Big(s_{max} - \frac{1}{s_{max}}\Big) \frac{b - 1}{B - 1}

    Args:
        batch: ``b``, from 1 to ``batches``.
        batches: ``B``, number of batches in the epoch; with 1 the result is ``s_max``.
        s_max: Scale in the last batch, > 0 (HAT: 400; here 100 for the expandable network).

    Raises:
        ValueError: If the batch does not lie in the epoch, or ``s_max`` is not positive.
    """
    if not 1 <= batch <= batches:
        raise ValueError(f"anneal expects 1 <= batch <= batches; got {batch} of {batches}.")
    if not 0 < s_max < float("inf"):
        raise ValueError(f"anneal expects a finite s_max > 0; got {s_max}.")
    if batches == 1:
        return float(s_max)
    # Weighing the two ends gives s_max itself, not nearly so, in the last batch.
    done = (batch - 1) / (batches - 1)
    return (1 - done) / s_max + done * s_max


def gate(
    e: Tensor, s: Tensor | float, compensation: Compensation = "exact", *, s_max: float = 1.0
) -> Tensor:
    r"""Mask :math:`m = \sigma(s e)`, and the gradient that its embeddings get.

    The plain gradient :math:`s\,\sigma'(s e)` vanishes for nearly every channel once ``s`` is
    large. Multiplied by the compensation of both papers it becomes :math:`\sigma'(e)`, whatever
    ``s``:

    - ``"exact"``: :math:`\partial m / \partial e = \sigma'(e)`, by a straight-through term. No
      division, no clamp; the value is that of :math:`\sigma(s e)` to the last bit.
    - ``"hat"``: what HAT's code computes: the float32 derivative times ``compensate_hat``. It is 0
      for ``s e`` above about 17, where the sigmoid has rounded to 1: open gates stay open.
    - ``"none"``: the plain derivative.

    Args:
        e: Embeddings of any shape. Half precision is widened: bfloat16 rounds a gate to 1 from 7.
        s: Scale > 0; a tensor of no axes, updated in place, spares a compiled step.
        compensation: One of ``COMPENSATIONS``.
        s_max: Only for ``"hat"``: its factor on the gradient, which acts as a learning rate.

    Returns:
        The mask, in float32 (float64 for float64 embeddings), of the shape of ``e``.

    Raises:
        ValueError: If the compensation is unknown.
    """
    e = _wide(e)
    s = s.detach().to(e.dtype) if isinstance(s, Tensor) else s
    if compensation == "none":
        return torch.sigmoid(s * e)
    constant = e.detach()
    m = torch.sigmoid(s * constant)
    if compensation == "exact":
        through = torch.sigmoid(e)
        return m + (through - through.detach())  # the difference is exactly 0
    if compensation == "hat":
        slope = compensate_hat(s * m * (1 - m), constant, s, s_max)
        return m + slope * (e - constant)
    raise ValueError(f"compensation must be one of {list(COMPENSATIONS)}; got {compensation!r}.")


def compensation_factor(e: Tensor, s: Tensor | float) -> Tensor:
    r"""What turns the plain gradient of ``e`` into that of :math:`\sigma(e)`.

    .. math::
        \frac{\sigma(e)(1 - \sigma(e))}{s\,\sigma(s e)(1 - \sigma(s e))}
        = \frac{\cosh(s e) + 1}{s\,(\cosh e + 1)}

    Infinite where ``cosh`` overflows (float32: ``|s e|`` above 89); ``gate`` does not need it.
    """
    e = _wide(e)
    return (torch.cosh(s * e) + 1) / (s * (torch.cosh(e) + 1))


def compensate_hat(
    grad: Tensor, e: Tensor, s: Tensor | float, s_max: float, *, clamp: float = 50.0
) -> Tensor:
    r"""HAT's compensation of a gradient of ``e`` that autograd has computed.

    .. math::
        \frac{s_{max}}{s} \cdot \frac{\cosh(\mathrm{clip}(s e, \pm 50)) + 1}{\cosh e + 1} \cdot g

    Args:
        grad: Gradient ``g`` of the plain gate, of the shape of ``e``.
        e: Embeddings.
        s: Scale in this batch.
        s_max: Scale in the last batch.
        clamp: Limit of ``|s e|``, against overflow.
    """
    e = _wide(e)
    ratio = (torch.cosh((s * e).clamp(-clamp, clamp)) + 1) / (torch.cosh(e) + 1)
    return grad * (s_max / s) * ratio


def hard_gate(e: Tensor, at_least: int = 0) -> Tensor:
    r"""Binary mask :math:`1[e \ge 0]`, the limit of ``gate``: 0 or 1 in float32 (or float64).

    Args:
        e: Embeddings ``(channels,)``.
        at_least: Channels that stay open whatever their sign, those of largest ``e`` (more where
            the embeddings tie): a layer without channels would cut the network in two.

    Raises:
        ValueError: If ``at_least`` exceeds the number of channels.
    """
    e = _wide(e.detach())
    if not 0 <= at_least <= e.numel():
        raise ValueError(
            f"hard_gate expects at_least from 0 to {e.numel()}, the number of channels; "
            f"got {at_least}."
        )
    is_open = e >= 0
    if at_least:
        is_open = is_open | (e >= e.topk(at_least).values[-1])
    return is_open.to(e.dtype)


def ambiguous_share(e: Tensor, s_max: float, *, margin: float = 0.05) -> Tensor:
    r"""Share of gates with :math:`\sigma(s_{max} e)` farther than ``margin`` from 0 and from 1.

    Unless it is close to 0, the network with soft gates and the pruned one differ.
    """
    m = torch.sigmoid(s_max * _wide(e.detach()))
    return ((m > margin) & (m < 1 - margin)).to(m.dtype).mean()


def sparsity_loss(terms: Sequence[SparsityTerm | tuple[int, Tensor | int, Tensor | int]]) -> Tensor:
    r"""Share of the weights that the masks keep.

    .. math::
        L_S = \frac{\sum_l K_l \|m_{l-1}\|_1 \|m_l\|_1}{\sum_l K_l c_{l-1} c_l}

    Args:
        terms: Per layer ``(K, in, out)``: weights per pair of channels (kernel height times width;
            1 for a linear layer), and the mask of the channels that it reads and writes, or how
            many there are where no mask acts.

    Returns:
        The loss, ``()``, in the masks' precision.

    Raises:
        ValueError: If there is no term, or no term has a mask.
    """
    kept, total = weight_counts(terms)
    if not isinstance(kept, Tensor):
        raise ValueError(
            f"sparsity_loss expects at least one layer with a mask; got {len(terms)} layers "
            f"without. Choose channels to prune first."
        )
    return kept / total


def weight_counts(
    terms: Sequence[SparsityTerm | tuple[int, Tensor | int, Tensor | int]],
) -> tuple[Tensor | int, int]:
    """Numerator and denominator of ``sparsity_loss``: weights kept, and weights there are.

    The first is a whole number, not a tensor, where no term has a mask.
    """
    # A mask occurs in several layers: one sum each. The key is the object; `terms` keeps it alive.
    sums: dict[int, Tensor] = {}

    def norm(channels: Tensor | int) -> Tensor | int:
        if not isinstance(channels, Tensor):
            return channels
        if id(channels) not in sums:
            sums[id(channels)] = channels.sum()
        return sums[id(channels)]

    def count(channels: Tensor | int) -> int:
        return channels.numel() if isinstance(channels, Tensor) else channels

    kept: Tensor | int = 0
    total = 0
    for area, channels_in, channels_out in terms:
        kept = kept + norm(channels_in) * norm(channels_out) * area
        total += area * count(channels_in) * count(channels_out)
    return kept, total


def hat_sparsity(masks: Sequence[Tensor], masks_before: Sequence[Tensor] | None = None) -> Tensor:
    r"""HAT's regulariser: capacity that the new task takes of what earlier tasks left free.

    .. math::
        R = \frac{\sum_l \sum_i m_{l,i} (1 - m^{<t}_{l,i})}{\sum_l \sum_i (1 - m^{<t}_{l,i})}

    Args:
        masks: Masks of the current task, one per layer.
        masks_before: Element-wise maxima over the earlier tasks; ``None`` for the first task.

    Returns:
        The value, ``()``; 0 with a graph where no capacity is free.

    Raises:
        ValueError: If the masks of now and of before do not match.
    """
    m = torch.cat([x.flatten() for x in masks])
    if masks_before is None:
        return m.mean()
    before = torch.cat([x.flatten() for x in masks_before])
    if len(masks) != len(masks_before) or m.shape != before.shape:
        raise ValueError(
            f"hat_sparsity expects masks_before of the shapes of masks; got "
            f"{[tuple(x.shape) for x in masks_before]} for {[tuple(x.shape) for x in masks]}."
        )
    free = 1 - before
    # Where nothing is free the sum above is 0 too, and 0 / 1 keeps it.
    return (m * free).sum() / torch.where(free.sum() > 0, free.sum(), torch.ones_like(free.sum()))


def hat_gradient_mask(
    m_in: Tensor | None, m_out: Tensor | None, shape: Sequence[int]
) -> Tensor | float:
    r"""What the gradient of a weight is multiplied with, to keep what earlier tasks need.

    .. math::
        1 - \min(m^{<t}_{out,i},\ m^{<t}_{in,j})

    Args:
        m_in: Maxima over the earlier tasks' masks of the channels that the layer reads; ``None``
            where no mask acts (the network's input, a bias), which counts as 1.
        m_out: The same for the channels that it writes.
        shape: Shape of the weight, ``(out, in, ...)`` or ``(out,)``. Several columns per channel
            (a linear layer behind a flattened map) repeat its value.

    Returns:
        A tensor that broadcasts against the weight; the number 0.0 where both are ``None``.

    Raises:
        ValueError: If a mask does not fit the shape.
    """
    if (m_out is not None and tuple(m_out.shape) != (shape[0],)) or (
        m_in is not None
        and (len(shape) < 2 or m_in.ndim != 1 or not len(m_in) or shape[1] % len(m_in))
    ):
        shapes = [None if m is None else tuple(m.shape) for m in (m_in, m_out)]
        raise ValueError(
            f"a weight of shape {tuple(shape)} needs one mask (channels,) for what it reads and "
            f"one for what it writes, or None; got {shapes[0]} and {shapes[1]}."
        )
    used: Tensor | None = None
    if m_out is not None:
        used = m_out.reshape(-1, *[1] * (len(shape) - 1))
    if m_in is not None:
        tail = [1] * (len(shape) - 2)
        columns = m_in.repeat_interleave(shape[1] // len(m_in)).reshape(1, -1, *tail)
        used = columns if used is None else torch.minimum(used, columns)
    return 0.0 if used is None else 1 - used


def _wide(e: Tensor) -> Tensor:
    return e if e.dtype == torch.float64 else e.float()
