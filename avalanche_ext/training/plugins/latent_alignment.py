r"""LSA: latent space alignment. One embedder, a head per task, bridges to where each head lives.

``Naive(as_multitask(MLP(784, (256, 64), 2), "classifier"), plugins=[LatentAlignmentPlugin()])``
on a stream with one task label per experience. Nothing about training changes; predictions do.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Latent Space Alignment".

Faithfulness:
    1. The embedder is all in front of the model's ``MultiHeadClassifier``. What a head was trained
       on is its input of that time: after each task a bridge from the new embedding to the last one
       is fitted on data at hand, and the old embedder is deleted.
    2. The source leaves the kind of a bridge open. Affine maps by ridge regression are the default,
       networks (``"mlp"``) carry less well beyond the data that they were fitted on.
    3. ``compose="direct"`` fits a map to every earlier space instead of applying bridges one after
       the other; its targets are what the maps before gave, so errors add up all the same.
    4. Bridges are fitted on the current experience; ``data`` takes other samples, of all tasks if
       there are any, without labels.
    5. Evaluation during a task's training asks the last embedder, which is still there, for
       earlier tasks.
    6. Networks that were trained apart are aligned by ``avalanche_ext.models.bridges.align``.
    7. Embeddings are taken in evaluation mode. What the new embedder no longer tells, no bridge
       brings back.

Cost: while a task is trained, a copy of the network; between tasks a matrix ``D x D`` per earlier
task. Two passes over the experience at its end. In evaluation a product with as many matrices as
tasks lie between, or with one (``"direct"``).
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks.utils.data import AvalancheDataset
from avalanche.models import MultiHeadClassifier
from torch import Tensor, nn

from avalanche_ext.functional.linear_map import r_squared
from avalanche_ext.models.bridges import Bridges
from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.models.network_split import NetworkSplit, as_written
from avalanche_ext.training.checks import CheckedPlugin, check_nonnegative, check_one_of
from avalanche_ext.training.latent_rehearsal import dataset_features
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["LatentAlignmentPlugin"]

_LABEL = "LatentAlignment"


class LatentAlignmentPlugin(CheckedPlugin):
    r"""Predict earlier tasks by their heads, on features that bridges lead back.

    .. math:: \hat y_k(x) = h_k(g_{k+1 \to k} \circ \dots \circ g_{T \to T-1}(f_T(x))), \qquad
              g_{t \to t-1} = \arg\min_g \sum_x \| g(f_t(x)) - f_{t-1}(x) \|^2

    Logged after each experience but the first: ``LatentAlignment_R2`` of its bridge, and
    ``LatentAlignment_ChainError_n``, the share of variance that features led back over ``n`` tasks
    have lost with this bridge.

    Args:
        bridge: ``"linear"`` or ``"mlp"``, see ``Bridges``.
        compose: ``"chain"`` or ``"direct"``, see ``Bridges``.
        lam: Weight of the ridge, see ``Bridges``.
        data: Inputs, as a tensor or an Avalanche data set, that bridges are fitted on instead of
            the current experience.

    Attributes:
        bridges: Maps to earlier embeddings.
        spaces: Number of its embedding for each task label.
        r2: R squared of each bridge, on the samples that it was fitted on.
        chain_errors: For each bridge the errors by length, the shortest first.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for a model without one
            ``MultiHeadClassifier``, or experiences that do not bring one new task label each.
    """

    def __init__(
        self, bridge: str = "linear", *, compose: str = "chain", lam: float = 1e-2, data: Any = None
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_one_of(owner, "bridge", bridge, ("linear", "mlp"))
        check_one_of(owner, "compose", compose, ("chain", "direct"))
        check_nonnegative(owner, lam=lam)
        if not isinstance(data, Tensor | AvalancheDataset | None):
            raise TypeError(
                f"{owner} expects data to be a tensor of inputs, an Avalanche data set, or None "
                f"for the current experience; got a {type(data).__name__}."
            )
        self.bridges = Bridges(bridge, compose=compose, lam=lam)
        self.data = data
        self.spaces: dict[int, int] = {}
        self.r2: list[float] = []
        self.chain_errors: list[list[float]] = []
        self._task = -1  # of this experience
        self._old: FrozenCopy | None = None

    # an experience --------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the embedder as it is, before anything changes."""
        super().before_train_dataset_adaptation(strategy, **kwargs)
        self._task = self._new_label(strategy.experience)
        _head(strategy.model)
        self._old = FrozenCopy(bare(strategy.model)) if self.spaces else None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Build the bridge from the new embedding to the last one, which goes."""
        if self._old is not None:
            self._build(strategy)
        self.spaces[self._task] = len(self.spaces)
        self._old = None

    def _build(self, strategy: Any) -> None:
        assert self._old is not None
        dataset = strategy.experience.dataset if self.data is None else self.data
        new, old = (
            dataset_features(strategy, NetworkSplit(m, _head(m), "input"), dataset, task=self._task)
            for m in (bare(strategy.model), self._old.module)
        )
        n = len(self.spaces)
        before = [self.bridges(old, k) for k in range(n)]
        draws = seeded(torch.initial_seed(), *_LABEL.encode(), n)
        self.r2.append(self.bridges.extend(new, old, draws))
        publish(self, strategy, f"{_LABEL}_R2", self.r2[-1])
        errors = [1 - float(r_squared(self.bridges(new, k), before[k])) for k in range(n)]
        self.chain_errors.append(errors[::-1])
        for length, error in enumerate(self.chain_errors[-1], 1):
            publish(self, strategy, f"{_LABEL}_ChainError_{length}", error)

    # evaluation -----------------------------------------------------------------------------

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Stand around the forward pass."""
        wrap(strategy, "forward", self._forward)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        unwrap(strategy, "forward", self._forward)

    def _forward(self, strategy: Any, inner: Any) -> Any:
        model = bare(strategy.model)

        def lead_back(head: nn.Module, args: Any, kwargs: Any) -> Any:
            u, labels = _arguments(*args, **kwargs)
            return None if labels is None else ((self._led_back(strategy, u, labels), labels), {})

        head = model.get_submodule(_head(model))
        handle = head.register_forward_pre_hook(lead_back, with_kwargs=True)
        try:
            with as_written(model):
                return inner()
        finally:
            handle.remove()

    def _led_back(self, strategy: Any, u: Tensor, labels: int | Tensor) -> Tensor:
        """Each row in the space of its task; those of tasks that have not been learnt stay."""
        tasks = labels if isinstance(labels, Tensor) else torch.full((len(u),), labels)
        found = u.clone()
        for task in tasks.unique().tolist():
            if task not in self.spaces:
                continue
            rows = (tasks == task).to(u.device)
            start = u[rows]
            if self._old is not None:  # a task is being learnt: there is no bridge from it yet
                old = NetworkSplit(self._old.module, _head(self._old.module), "input")
                start = old.features(strategy.mb_x[strategy.mb_task_id == task], task)
            found[rows] = self.bridges(start.float(), self.spaces[task]).to(u.dtype)
        return found

    # parts ----------------------------------------------------------------------------------

    def _new_label(self, experience: Any) -> int:
        labels = sorted({int(t) for t in getattr(experience, "task_labels", ())})
        if len(labels) != 1 or labels[0] in self.spaces:
            raise ValueError(
                f"{type(self).__name__} ties a head to the embedding that it was trained on: every "
                f"experience has one task label of its own. This one has {labels}, after "
                f"{list(self.spaces)}. Build the benchmark with task_labels=True, and train on "
                f"each experience once."
            )
        return labels[0]

    def __str__(self) -> str:
        return _LABEL


def _arguments(u: Tensor, task_labels: Any = None) -> tuple[Tensor, Any]:
    """Of a multi-head classifier, however it is called."""
    return u, task_labels


def _head(model: nn.Module) -> str:
    """Name of the model's multi-head classifier."""
    names = [n for n, m in bare(model).named_modules() if isinstance(m, MultiHeadClassifier)]
    if len(names) != 1 or not names[0]:
        raise ValueError(
            f"LatentAlignmentPlugin expects a model with one MultiHeadClassifier behind its "
            f"embedder; {type(bare(model)).__name__} has {len(names)}. Make one with "
            f"avalanche.models.as_multitask(model, 'classifier')."
        )
    return names[0]
