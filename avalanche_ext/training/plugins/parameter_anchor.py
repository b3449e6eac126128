r"""EWC, online EWC, SI, MAS, RWalk and L2 transfer: important parameters are held where they are.

One loss term and five answers to what is important. For who comes from Avalanche's plugins of the
same names one import changes: ``from avalanche_ext import EWCPlugin``. Values of ``lam`` do not
carry over, see 3.

Reference:
    Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks (EWC); Schwarz
    et al. (2018), Progress and compress (online EWC); Zenke, Poole, Ganguli (2017), Continual
    learning through synaptic intelligence (SI); Aljundi et al. (2018), Memory aware synapses (MAS);
    Chaudhry et al. (2018), Riemannian walk for incremental learning (RWalk).

Faithfulness:
    1. The term is :math:`\lambda \kappa \sum_k \Omega_k (\theta_k - \theta^*_k)^2`, with
       :math:`\kappa = 1/2` for EWC and L2 transfer, which are negative log posteriors, and 1 for
       the others, as in the papers. Avalanche's EWC has no 1/2; its SI has one.
    2. One anchor and one importance, whatever the number of experiences. By default importances add
       up around the latest optimum. ``anchor="each"`` is EWC's term per experience around that
       experience's own optimum: a sum of parabolas is a parabola, so it is held exactly, but for a
       constant, by the mean of the optima weighted by importance.
    3. Fisher information and MAS come from each sample's own gradient. Avalanche's come from batch
       means and fall as the batch grows, EWC's by up to the batch size. Its MAS also halves what is
       old with each experience (``alpha``); the paper adds up.
    4. EWC's labels are drawn from the model, as the Fisher information is defined. Many codes take
       the true ones (``fisher="empirical"``).
    5. SI's and RWalk's gradient leaves the anchor's own out, as the papers' does. Avalanche's SI
       includes it, holds importance below 0.001, and on a CPU measures 0: what it keeps of the old
       parameters is a view of them. Its RWalk makes a second forward and backward pass per step,
       and leaves the model in evaluation mode for training.
    6. RWalk's scores are averaged as they are, and scaled to [0, 1] for the term. What a score had
       no value for before (a new row) is averaged with 0.
    7. The gradient is added behind the backward pass, in closed form, to parameters that the
       batch's loss has reached, for momentum and weight decay move a head whose gradient is 0
       instead of absent. ``strategy.loss`` holds the term's value.
    8. New parameters, and new rows of a head that grows, have no importance. Parameters that are
       frozen are left out while they are. Biases and norms' scales are held like weights; batch
       statistics are not.

Cost: three passes over the parameters per step, and two copies of them in memory; SI twice, RWalk
four times that. A pass over each experience for EWC and MAS
(``avalanche_ext.training.importances``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_ext.functional.importance import anchor_term, grown, quantiles
from avalanche_ext.training.checks import CheckedPlugin, check_nonnegative, check_one_of
from avalanche_ext.training.importances import L2, Fisher, Importance, OutputNorm, trainable
from avalanche_ext.training.path_importances import FisherPath, PathIntegral
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = [
    "EWCPlugin",
    "L2TransferPlugin",
    "MASPlugin",
    "OnlineEWCPlugin",
    "ParameterAnchorPlugin",
    "RWalkPlugin",
    "SynapticIntelligencePlugin",
]

_IMPORTANCES: dict[str, Callable[[], Importance]] = {
    "l2": L2,
    "ewc": Fisher,
    "si": PathIntegral,
    "mas": OutputNorm,
    "rwalk": FisherPath,
}
_ORDER = 30  # outside the layers that average and unscale gradients: they are true ones here


class ParameterAnchorPlugin(CheckedPlugin, supports_distributed=True):
    r"""Hold each parameter where the last experience left it, by its importance.

    .. math:: L = L_{clf} + \lambda \kappa \sum_k \Omega_k (\theta_k - \theta^*_k)^2

    from the second experience on. Logged per epoch as ``<method>_R``, the sum with
    :math:`\kappa` and without ``lam``.

    Args:
        lam: Weight >= 0; 0 is plain training, bit for bit, and measures nothing.
        importance: ``"l2"``, ``"ewc"``, ``"si"``, ``"mas"``, ``"rwalk"``, or an object of
            ``avalanche_ext.training.importances`` or ``path_importances``, which is copied.
        anchor: ``"latest"``, or ``"each"``: every experience's term around its own optimum. Not
            for ``"l2"`` and ``"rwalk"``, which are not sums over experiences.

    Attributes:
        importance: Importance of each parameter, by name.
        anchors: Where each parameter is held, by name.
        last: Value of the term at the last step, as it is logged; ``None`` before the first.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for a parameter that has shrunk or a
            strategy that does not call ``backward()`` once per step.
    """

    def __init__(
        self, lam: float, *, importance: str | Importance = "ewc", anchor: str = "latest"
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_nonnegative(owner, lam=lam)
        check_one_of(owner, "anchor", anchor, ("latest", "each"))
        if not isinstance(importance, Importance):
            check_one_of(owner, "importance", importance, tuple(_IMPORTANCES))
            importance = _IMPORTANCES[importance]()
        if anchor == "each" and importance.merge == 0:
            raise ValueError(
                f"anchor='each' needs an importance that adds up over experiences; "
                f"{type(importance).__name__} does not. Use anchor='latest'."
            )
        self.lam = lam
        self.measure = copy.deepcopy(importance)
        self.anchor = anchor
        self.importance: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self._learnt = 0
        self._pulls: dict[str, Tensor] = {}  # half the gradient of this step's term
        self._backwards = 0  # of this step
        self._sum: Tensor | None = None
        self._steps = 0

    def quantiles(self, q: Sequence[float] = (0.5, 0.9, 0.99, 1.0)) -> list[float]:
        """Quantiles of the importance of all parameters; empty before the first is known.

        Args:
            q: Each in [0, 1].
        """
        if not all(0 <= p <= 1 for p in q):
            raise ValueError(f"quantiles expects numbers from 0 to 1; got {list(q)}.")
        return quantiles(list(self.importance.values()), q) if self.importance else []

    # set-up ---------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Stand behind the backward pass."""
        if self.lam != 0:
            wrap(strategy, "backward", self._backward, order=_ORDER)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The model has been adapted: parameters may have grown."""
        if self.lam != 0:
            self._pulls, self._backwards = {}, 0
            self.measure.start(trainable(strategy.model))

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Start the epoch's mean."""
        self._sum, self._steps = None, 0

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        unwrap(strategy, "backward", self._backward)

    # one step -------------------------------------------------------------------------------

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the term's value to the loss; its gradient follows the backward pass."""
        held = {n: p for n, p in trainable(strategy.model).items() if n in self.importance}
        if not held:
            return
        for name, p in held.items():
            self._fit(name, p)
        value, pulls = anchor_term(
            list(held.values()),
            [self.anchors[name] for name in held],
            [self.importance[name] for name in held],
        )
        self._pulls = dict(zip(held, pulls, strict=True))
        self.last = self.measure.kappa * value
        strategy.loss = strategy.loss + self.lam * self.last
        self._sum = self.last if self._sum is None else self._sum + self.last
        self._steps += 1

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Parameters have moved, whatever took part in moving them."""
        if self.lam == 0:
            return
        if self._backwards != 1:
            raise ValueError(
                f"{type(self).__name__} expects one strategy.backward() per training iteration; "
                f"{type(strategy).__name__} called it {self._backwards} times."
            )
        self._backwards = 0
        self.measure.after_step(trainable(strategy.model))

    def _backward(self, strategy: Any, inner: Callable[[], Any]) -> Any:
        result = inner()
        parameters = trainable(strategy.model)
        self.measure.before_step(parameters)
        factor = 2 * self.lam * self.measure.kappa
        for name, pull in self._pulls.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.add_(pull, alpha=factor)
        self._pulls = {}
        self._backwards += 1
        return result

    # after an experience --------------------------------------------------------------------

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Publish the epoch's mean."""
        if self._sum is None:
            return
        mean = float(self._sum) / self._steps
        if not math.isfinite(mean):
            raise ValueError(
                f"{type(self).__name__}: the term is no longer finite (lam={self.lam}, largest "
                f"importance {self.quantiles([1.0])[0]:.3g}). Plain gradient descent needs a "
                f"learning rate below 1 / (lam * kappa * largest importance): lower one of the two."
            )
        publish(self, strategy, f"{self.measure.label}_R", mean)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Measure what the experience needs, and hold the parameters where they are now."""
        if self.lam == 0:
            return
        self._learnt += 1
        before, now = self.measure.shares(self._learnt)
        parameters = trainable(strategy.model)
        with torch.enable_grad():
            found = self.measure.finish(strategy)
        for name, new in found.items():
            p = parameters[name].detach()
            if name not in self.importance:
                self.importance[name], self.anchors[name] = torch.zeros_like(p), p.clone()
            self._fit(name, p)
            old, new = before * self.importance[name], now * new
            total = old + new
            place = p.clone()
            if self.anchor == "each":
                mean = torch.lerp(self.anchors[name], p, new / total)
                place = torch.where(total > 0, mean, place)
            self.importance[name], self.anchors[name] = total, place
        existing = {name for name, _ in bare(strategy.model).named_parameters()}
        for name in self.importance.keys() - existing:
            del self.importance[name], self.anchors[name]

    def _fit(self, name: str, p: Tensor) -> None:
        """Give a parameter that has grown an importance of 0 where it is new."""
        if self.importance[name].shape == p.shape:
            return
        try:
            self.importance[name] = grown(self.importance[name], p)
            self.anchors[name] = grown(self.anchors[name], p)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}, parameter {name!r}: {error}") from error


class EWCPlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""Elastic weight consolidation, with each sample's own Fisher information.

    .. math:: L = L_{clf} + \frac{\lambda}{2} \sum_k F_k (\theta_k - \theta^*_k)^2

    Args:
        lam: Weight >= 0. In use: 1e3 (PyCIL) to 1e4 (FACIL's search).
        fisher: Labels are ``"sampled"`` from the model, the true ones (``"empirical"``) or the
            most likely ones (``"argmax"``).
        anchor: ``"latest"``: the sum of all Fisher informations, around the latest optimum; or
            ``"each"``: one term per experience, as in the paper and Avalanche's ``"separate"``.

    References:
        Kirkpatrick et al. (2017), Eq. 3; Huszar (2018), Note on the quadratic penalties in EWC, for
        the latest optimum.
    """

    def __init__(self, lam: float, *, fisher: str = "sampled", anchor: str = "latest") -> None:
        check_one_of(type(self).__name__, "fisher", fisher, ("sampled", "empirical", "argmax"))
        super().__init__(lam, importance=Fisher(fisher), anchor=anchor)


class OnlineEWCPlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""EWC whose older experiences fade: :math:`F \leftarrow \gamma F + F_{new}`.

    Args:
        lam: Weight >= 0, as for ``EWCPlugin``.
        decay_factor: :math:`\gamma` from 0 to 1; 1 is ``EWCPlugin``.
        fisher: As for ``EWCPlugin``.

    References:
        Schwarz et al. (2018), Sec. 3.
    """

    def __init__(self, lam: float, *, decay_factor: float = 0.95, fisher: str = "sampled") -> None:
        owner = type(self).__name__
        check_one_of(owner, "fisher", fisher, ("sampled", "empirical", "argmax"))
        check_nonnegative(owner, decay_factor=decay_factor)
        super().__init__(lam, importance=Fisher(fisher, merge=decay_factor))


class SynapticIntelligencePlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""Synaptic intelligence: importance is what a parameter has done for the loss.

    .. math:: L = L_{clf} + \lambda \sum_k \Omega_k (\theta_k - \theta^*_k)^2, \quad
              \Omega_k = \sum_{exp} \frac{\max(0, \omega_k)}{\Delta_k^2 + \xi}

    Args:
        lam: Weight >= 0 (the paper's c). Paper: 0.1 to 1.
        eps: :math:`\xi > 0`. Paper: 0.1.

    References:
        Zenke et al. (2017), Eqs. 4 and 5.
    """

    def __init__(self, lam: float = 0.1, *, eps: float = 0.1) -> None:
        super().__init__(lam, importance=PathIntegral(eps=eps))


class MASPlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""Memory aware synapses: importance is how much the output's length depends on a parameter.

    .. math:: L = L_{clf} + \lambda \sum_k \Omega_k (\theta_k - \theta^*_k)^2, \quad
              \Omega_k = \frac1n \sum_x |\partial \lVert z(x) \rVert^2 / \partial \theta_k|

    Args:
        lam: Weight >= 0. FACIL: 1.
        merge: ``"sum"`` over experiences (paper), their ``"mean"``, or a factor from 0 to 1 for
            what is older.

    References:
        Aljundi et al. (2018), Memory aware synapses, Sec. 4.
    """

    def __init__(self, lam: float = 1.0, *, merge: str | float = "sum") -> None:
        super().__init__(lam, importance=OutputNorm(merge=merge))


class RWalkPlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""Riemannian walk: a moving Fisher information plus a score of the way, each up to 1.

    .. math:: L = L_{clf} + \lambda \sum_k (F_k + s_k) (\theta_k - \theta^*_k)^2

    The paper adds a few exemplars: ``plugins=[RWalkPlugin(...), ERPlugin(...)]``.

    Args:
        lam: Weight >= 0. FACIL's search starts at 20.
        alpha: Weight of a step's squared gradient in F, above 0 to 1. Paper: 0.9.
        delta_t: Steps between two updates of the score. Paper: 10.

    References:
        Chaudhry et al. (2018), Eqs. 6 to 8.
    """

    def __init__(self, lam: float = 0.1, *, alpha: float = 0.9, delta_t: int = 10) -> None:
        super().__init__(lam, importance=FisherPath(alpha=alpha, delta_t=delta_t))


class L2TransferPlugin(ParameterAnchorPlugin, supports_distributed=True):
    r"""Hold all parameters alike: the baseline that importances have to beat.

    .. math:: L = L_{clf} + \frac{\lambda}{2} \sum_k (\theta_k - \theta^*_k)^2

    Args:
        lam: Weight >= 0; sweep powers of ten.

    References:
        Kirkpatrick et al. (2017), "L2".
    """

    def __init__(self, lam: float) -> None:
        super().__init__(lam, importance=L2())
