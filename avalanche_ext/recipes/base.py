"""What every recipe states: benchmark, network, optimisation, seeds, and what it is held to.

A recipe is a frozen dataclass: one protocol, complete. Changing a field makes another recipe.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from avalanche_ext.recipes.streams import BenchmarkSettings

__all__ = ["Published", "Recipe"]


@dataclass(frozen=True)
class Published:
    """A figure of a paper that the recipe is held to."""

    quantity: str
    value: float
    deviation: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One protocol.

    Args:
        name: ``catalog key/benchmark``, or with a third part for a variant.
        method: Catalog key.
        benchmark: The stream.
        backbone: The network, a name of ``models.backbones.build_backbone``.
        hidden: Widths of the hidden layers, if it is ``"mlp"``.
        head: ``"fixed"``: all units from the start; ``"growing"``: those of classes that were
            trained on, as Avalanche's ``IncrementalClassifier``.
        pretrained: Start from ImageNet's weights: ``true``, or a file that holds them.
        freeze: Names of the network's modules that are not trained.
        optimizer: ``"sgd"`` or ``"adam"``.
        lr: Its learning rate.
        momentum: SGD's momentum.
        weight_decay: Its weight decay.
        batch_size: Current samples per step.
        epochs: Passes over each experience.
        warmup_epochs: Epochs of each experience in which the learning rate rises.
        milestones: Epochs after them at which it falls by 0.1. With either of the two, the
            optimizer starts anew in every experience.
        seeds: Seeds of initialisation and draws; one run each.
        order_seeds: Seeds of the order of the classes, one for each of ``seeds`` (one alone
            goes with all of them, and one of ``seeds`` with all of these); empty for the
            benchmark's own order.
        title: Name of its row in tables; the method's by default.
        baselines: Recipes that run beside this one and share its table.
        source: Where the protocol comes from.
        published: The paper's figures; empty where none could be verified.

    Raises:
        ValueError: For a number out of range; if ``seeds`` and ``order_seeds`` do not pair up.
    """

    name: str
    method: str
    benchmark: BenchmarkSettings
    backbone: str = "mlp"
    hidden: tuple[int, ...] = (100, 100)
    head: str = "fixed"
    pretrained: bool | str = False
    freeze: tuple[str, ...] = ()
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 10
    epochs: int = 1
    warmup_epochs: int = 0
    milestones: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    order_seeds: tuple[int, ...] = ()
    title: str = ""
    baselines: tuple[str, ...] = ()
    source: str = ""
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"{self.name}: expected optimizer 'sgd' or 'adam'; got {self.optimizer!r}."
            )
        if self.head not in ("fixed", "growing"):
            raise ValueError(f"{self.name}: expected head 'fixed' or 'growing'; got {self.head!r}.")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(
                f"{self.name}: momentum is SGD's; got momentum={self.momentum} with "
                f"optimizer='adam'. Set one of the two."
            )
        for field, least in (("batch_size", 1), ("epochs", 1), ("warmup_epochs", 0)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"{self.name}: expected {field} >= {least}; got {getattr(self, field)}."
                )
        for field in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(
                    f"{self.name}: expected a finite {field} >= 0; got {getattr(self, field)}."
                )
        if list(self.milestones) != sorted({m for m in self.milestones if m >= 0}):
            raise ValueError(
                f"{self.name}: expected milestones >= 0 in ascending order; got "
                f"{list(self.milestones)}."
            )
        sizes = {len(self.seeds), len(self.order_seeds) or 1} - {1}
        if not self.seeds or len(sizes) > 1:
            raise ValueError(
                f"{self.name}: expected at least one seed, and no order_seeds, one, or one for "
                f"each seed; got seeds {list(self.seeds)} and order_seeds "
                f"{list(self.order_seeds)}."
            )

    @property
    def runs(self) -> tuple[tuple[int, int | None], ...]:
        """The seed and the order's seed of each run."""
        orders = self.order_seeds or (None,)
        n = max(len(self.seeds), len(orders))
        return tuple((self.seeds[k % len(self.seeds)], orders[k % len(orders)]) for k in range(n))

    def epochs_of(self, experience: int) -> int:
        """Passes over an experience, by its number in the stream."""
        return self.epochs

    def smoke(self) -> Recipe:
        """The same recipe with few images, one epoch and one seed, held to nothing."""
        return dataclasses.replace(
            self, benchmark=self.benchmark.smoke(), epochs=1, warmup_epochs=0, seeds=self.seeds[:1],
            order_seeds=self.order_seeds[:1], published=(),
        )  # fmt: skip
