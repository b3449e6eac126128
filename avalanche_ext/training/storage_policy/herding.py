"""Herding: of each class, the exemplars whose mean feature follows the class's mean.

Reference:
    S.-A. Rebuffi et al. (2017), iCaRL: Incremental Classifier and Representation Learning, CVPR;
    in the form of scalar products, M. Welling (2009), Herding Dynamical Weights to Learn, ICML.

Faithfulness:
    1. Features come from images without augmentation, once, when the class is trained on; rows are
       divided by their length. An exemplar's rank never changes: a smaller quota keeps a prefix.
    2. The scalar-product form, as in the code of ExpandableDER: with the class's mean feature mu,
       w starts at mu; each step takes the argmax of <w, z_i> and adds mu - z_i to w. A sample
       that is chosen again adds nothing to the list.
    3. ``mem`` samples in all are ``mem // classes`` for each; the remainder is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avalanche_ext.training.checks import check_count
from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sources import Source, source_for
from avalanche_ext.training.storage_policy.exemplar_memory import ExemplarMemory
from avalanche_ext.training.storage_policy.ledger import Unit

__all__ = ["HerdingMemory", "herding_order"]

# A sample may win again and again; then the loop ends and the rest follows by scalar product.
_MOST_STEPS = 1000


def herding_order(features: Tensor, n: int) -> Tensor:
    """The first ``n`` samples in herding's order.

    Args:
        features: Rows of unit length, ``(N, D)``.
        n: How many, at most N.

    Returns:
        Their positions, ``(n,)``.
    """
    mean = features.mean(0)
    w, chosen = mean.clone(), []
    for _ in range(_MOST_STEPS):
        if len(chosen) == n:
            break
        best = int((features @ w).argmax())
        w = w + mean - features[best]
        if best not in chosen:
            chosen.append(best)
    left = [i for i in (features @ mean).argsort(descending=True).tolist() if i not in {*chosen}]
    return torch.tensor((chosen + left)[:n], dtype=torch.int64)


class HerdingMemory(ExemplarMemory):
    """Exemplars chosen by herding, the same number of every class.

    The strategy's model gives the features through ``super_feature(x)``.

    Args:
        mem: Budget in samples in all; 0 keeps none.
        mem_per_class: Or a number for each class, without a bound on the whole.

    Raises:
        ValueError: If both or none are given; when the budget holds fewer samples than classes.
        TypeError: If the model gives no features.
    """

    def __init__(self, mem: int | None = None, *, mem_per_class: int | None = None) -> None:
        if (mem is None) == (mem_per_class is None):
            raise ValueError(
                f"HerdingMemory expects mem or mem_per_class; got mem={mem} and "
                f"mem_per_class={mem_per_class}."
            )
        check_count("HerdingMemory", mem_per_class=mem_per_class)
        super().__init__(mem if mem is not None else 0, group_by="class")
        self.mem_per_class = mem_per_class

    def check_room(self, experience: Any) -> None:
        """Raise if the budget cannot hold one sample of each class."""
        if self.mem_per_class is None:
            super().check_room(experience)

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Store the exemplars of the experience's classes."""
        if self.mem_per_class is not None:
            classes = self._groups_of(exp).unique().tolist()
            known = {unit[1] for unit in self._ledger.units_of(None)}
            self.max_size = self.mem_per_class * len({*known, *classes})
        super().post_adapt(agent, exp)

    def _budget(self, units: list[Unit]) -> int:
        n = len({*self._ledger.units_of(units[0][0]), *units})
        return self.max_size // n * n

    def _priorities(self, agent: Any, exp: Any, source: Source) -> Tensor:
        """The k-th sample in a class's order has priority -k."""
        if not hasattr(agent.model, "super_feature"):
            raise TypeError(
                f"HerdingMemory expects a model with super_feature(x), such as ExpandableNet; got "
                f"{type(agent.model).__name__}."
            )
        labels = attribute_values(exp.dataset, "targets")
        assert labels is not None
        features = _features(agent, source_for(agent, exp.dataset.eval()), len(labels))
        ranks = torch.zeros(len(labels), dtype=torch.float64)
        for c in labels.unique():
            mine = torch.nonzero(labels == c)[:, 0]
            # A class never has more than its first quota: what is behind that needs no order.
            n = min(len(mine), self.max_size)
            order = herding_order(features[mine], n)
            ranks[mine] = -float(len(mine))
            ranks[mine[order]] = -torch.arange(n, dtype=torch.float64)
        return ranks


@torch.no_grad()
def _features(agent: Any, source: Source, n: int) -> Tensor:
    model, size = agent.model, max(agent.eval_mb_size or 1, 64)
    training = model.training
    model.eval()
    parts = []
    for batch in torch.arange(n).split(size):
        x = source.gather(batch)[0].to(agent.device)
        parts.append(F.normalize(model.super_feature(x).double(), dim=1).cpu())
    model.train(training)
    return torch.cat(parts)
