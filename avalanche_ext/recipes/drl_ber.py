"""Recipes of DRL + BER and its rivals (Chen et al., 2020), on images that anybody has.

The paper's tables are on CORe50; of MNIST it shows only figures. So these recipes have no
published column. Their settings come from the small protocol in which the orderings
DRL+BER > BER > ER > Naive can be seen in seconds (learning rate 0.1, ``lam`` 1e-3). For the other
streams both were chosen on held-out training images (``examples/drl_ber_validation.py``), never on
the test set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.streams import PermutedMNIST, SplitDigits, SplitMNIST

__all__ = ["RECIPES", "ReplayRecipe"]

_SOURCE = "Chen et al. (2020), Discriminative Representation Loss for Continual Learning"


@dataclass(frozen=True, kw_only=True)
class ReplayRecipe(Recipe):
    """A protocol of a replay method, with or without DRL.

    Args:
        mem: Exemplars, see ``mem_scope``.
        mem_scope: ``"experience"`` or ``"total"``.
        mode: ``"per_group"`` or ``"balanced"`` (BER).
        group_by: ``"experience"``, ``"class"`` or ``"task"`` (BER).
        max_groups: Past groups per step at most (BER).
        lam: Weight of DRL.
        form: Its form.
        layers: Its layers.
        memory_strength: Margin of GEM.
    """

    mem: int = 300
    mem_scope: str = "total"
    mode: str = "per_group"
    group_by: str = "experience"
    max_groups: int | None = None
    lam: float = 1e-3
    form: str = "drl"
    layers: str = "auto"
    memory_strength: float = 0.5
    source: str = _SOURCE


# Method of a table's row -> its catalog key and what it changes in the protocol.
_ROWS: dict[str, tuple[str, dict]] = {
    "naive": ("naive", {}),
    "shuffle_replay": ("shuffle_replay", {}),
    "er": ("er", {}),
    "ber_balanced": ("ber", {"mode": "balanced"}),
    "ber": ("ber", {}),
    "drl": ("drl", {}),
    "drl_er": ("drl_er", {}),
    "drl_ber_balanced": ("drl_ber", {"mode": "balanced"}),
    "drl_shuffle_replay": ("drl_shuffle_replay", {}),
    "drl_ber": ("drl_ber", {}),
    "gem": ("gem", {}),
    "agem": ("agem", {}),
    "joint": ("joint", {}),
}


# The rows that the small benchmarks' tables show beside DRL+BER.
_TABLE = tuple(row for row in _ROWS if row not in ("drl_ber", "drl_shuffle_replay"))


def _table(protocol: ReplayRecipe, benchmark: str, variant: str = "") -> dict[str, ReplayRecipe]:
    """One recipe per row; that of ``drl_ber`` runs the whole table."""

    def name(row: str) -> str:
        key = _ROWS[row][0]
        extra = [x for x in (row[len(key) + 1 :], variant) if x]
        return "/".join([key, "_".join([benchmark, *extra])])

    made = {}
    for row, (key, changes) in _ROWS.items():
        rivals = tuple(name(r) for r in _TABLE) if row == "drl_ber" else ()
        made[name(row)] = dataclasses.replace(
            protocol, name=name(row), method=key, baselines=rivals, **changes
        )
    return made


def _small(scope: str) -> ReplayRecipe:
    return ReplayRecipe(
        name="", method="", benchmark=SplitMNIST(train_per_experience=1000), mem_scope=scope,
        seeds=tuple(range(8)),
    )  # fmt: skip


def _full(scope: str) -> ReplayRecipe:
    return dataclasses.replace(_small(scope), benchmark=SplitMNIST(), lr=0.05, seeds=(0, 1, 2))


def _permuted(scope: str) -> ReplayRecipe:
    return dataclasses.replace(
        _small(scope), benchmark=PermutedMNIST(train_per_experience=1000), lr=0.2, seeds=(0, 1, 2)
    )


_DIGITS = ReplayRecipe(
    name="", method="", benchmark=SplitDigits(), mem=50, epochs=10, lr=0.1, lam=3e-3
)

RECIPES: dict[str, ReplayRecipe] = {
    **_table(_DIGITS, "split_digits"),
    **_table(
        dataclasses.replace(_DIGITS, benchmark=SplitDigits(scenario="domain")),
        "split_digits", "domain",
    ),
    **_table(_small("total"), "split_mnist", "small"),
    **_table(_small("experience"), "split_mnist", "small_per_experience"),
    **_table(_full("total"), "split_mnist"),
    **_table(_full("experience"), "split_mnist", "per_experience"),
    **_table(_permuted("total"), "permuted_mnist"),
    **_table(_permuted("experience"), "permuted_mnist", "per_experience"),
}  # fmt: skip

# The main job, and its twin: a minute on a laptop, so they compare three systems, not twelve.
for _stream in ("split_digits", "split_digits_domain"):
    RECIPES[f"drl_ber/{_stream}"] = dataclasses.replace(
        RECIPES[f"drl_ber/{_stream}"], baselines=(f"naive/{_stream}", f"er/{_stream}")
    )
