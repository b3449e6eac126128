"""Penalties on hidden activations that selfless learning is compared with: L1 and DeCov.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, Sec. 3; Cogswell et al.
    (2016), Reducing Overfitting in Deep Networks by Decorrelating Representations.

Faithfulness:
    1. Both are means over the samples of the batch, sums over units and over layers.
    2. Statistics are those of the batch, replayed samples included, never running averages.
    3. Layers: the ReLUs between fully connected layers, as for SLNI. The paper does not say which.
    4. The paper prints no weights. On five permuted MNIST tasks of 10,000 images, with MAS and an
       MLP of 2 x 64 units, L1 did best at 3e-3 and silenced the network at 3e-2; DeCov at 0.1.

Cost: one read of the activations forward, one read and one write backward; DeCov a product of
``min(B, N)`` squared times ``max(B, N)``.
"""

from __future__ import annotations

from torch import Tensor

from avalanche_ext.functional.sparsity import decov, l1_activation
from avalanche_ext.models.recording import LayerSpec
from avalanche_ext.training.representation_penalty import RepresentationPenalty

__all__ = ["DeCovPlugin", "L1RepPlugin"]


class L1RepPlugin(RepresentationPenalty, supports_distributed=True):
    r"""Add ``lam`` times the mean L1 norm of chosen layers' activations to the loss.

    .. math:: L = L_{clf} + \lambda \sum_l \frac1B \sum_m \|h_l^m\|_1

    Logged per epoch as ``L1Rep_R``; ``last`` holds each layer's term of the last batch.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Useful: 1e-4 to 1e-2.
        layers: Hidden layers; the ReLUs between fully connected layers by default.
        conv: ``"pool"`` or ``"location"`` to take feature maps, which are refused by default.

    Raises:
        ValueError: See ``RepresentationPenalty``.

    References:
        Aljundi et al. (2018), "L1-Rep".
    """

    label = "L1Rep"

    def __init__(
        self, lam: float = 3e-3, *, layers: LayerSpec = "auto", conv: str = "error"
    ) -> None:
        super().__init__(lam, layers, conv)

    def penalty(self, name: str, h: Tensor) -> Tensor:
        """See ``RepresentationPenalty``."""
        return l1_activation(h)


class DeCovPlugin(RepresentationPenalty, supports_distributed=True):
    r"""Add ``lam`` times the squared covariances between units of chosen layers to the loss.

    .. math:: L = L_{clf} + \lambda \sum_l \tfrac12 \left(\|C_l\|_F^2 - \|diag\, C_l\|^2\right)

    with each layer's covariance :math:`C_l` over the batch. Logged per epoch as ``DeCov_R``;
    ``last`` holds each layer's term of the last batch.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit. Useful: 1e-3 to 1.
        layers: Hidden layers; the ReLUs between fully connected layers by default.
        conv: ``"pool"`` or ``"location"`` to take feature maps, which are refused by default.

    Raises:
        ValueError: See ``RepresentationPenalty``.

    References:
        Cogswell et al. (2016).
    """

    label = "DeCov"

    def __init__(
        self, lam: float = 0.1, *, layers: LayerSpec = "auto", conv: str = "error"
    ) -> None:
        super().__init__(lam, layers, conv)

    def penalty(self, name: str, h: Tensor) -> Tensor:
        """See ``RepresentationPenalty``."""
        return decov(h)
