"""BER: balanced experience replay, every step sees every past experience (or class) equally.

Reference:
    Chen, Ma, Wang, Ming, Massiah, Diethe (2020), Discriminative Representation Loss (DRL) for
    Continual Learning: A Solution for CLVision Challenge, Alg. 1 and Sec. 3.

Faithfulness:
    1. Alg. 1 draws B samples from each "task (class)" in memory and names no current batch. As in
       the authors' code, the step trains on B current samples plus B from each past experience:
       ``B (t + 1)`` in experience t. ``group_by="class"`` or ``"task"`` reads "task (class)" so.
    2. Sec. 3 can also be read as one batch spread evenly over all groups seen:
       ``mode="balanced"``, B samples in all, of which the current experience gets its share (one
       share for each of its classes with ``group_by="class"``). If there are fewer places than
       groups, random groups get one sample each and the current one is always among them. Steps
       per epoch stay ``ceil(n / B)``, one for each arriving mini-batch.
    3. Draws inside a group are with replacement, so a group may hold fewer than B samples.
    4. ``mem`` counts per experience, as in the paper's Tables 1 to 3: memory grows by up to
       ``mem`` random samples with each experience and nothing is dropped. (Avalanche's
       ``mem_size`` is a total; ``mem_scope="total"`` gives that.) Under a total budget groups
       share it equally and shrink as new ones come.
    5. Exemplars are chosen at the end of an experience, uniformly at random. The authors choose
       before training on it and use them from the next one on: the same distribution.
    6. The last mini-batch of an epoch may be short, as everywhere in Avalanche; the authors pad
       it. Its replayed part is complete.
    7. With task labels each replayed sample goes through its own head. The authors' code sends it
       through the current one.
    8. The authors' later code has variants that guarantee pairs of one class in batches with fewer
       places than classes (BER1, BER2). They are not offered; the behaviour here is its BER0.
    9. Data with random augmentation is augmented anew at each replay; the authors store tensors.

Cost: ``t + 1`` times the samples per step in experience t (``max_groups=k`` bounds it by
``k + 1`` times, ``mode="balanced"`` by one time). Drawing and gathering cost no more than the
samples themselves, however many experiences there were.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.storage_policy import ExemplarsBuffer

from avalanche_ext.training.checks import check_count, check_one_of
from avalanche_ext.training.loading.sampling import BalancedDraw, Draw, GroupIndex, PerGroupDraw
from avalanche_ext.training.plugins.replay_template import ReplayTemplate

__all__ = ["BERPlugin"]


class BERPlugin(ReplayTemplate, supports_distributed=True):
    """Balanced experience replay (Alg. 1).

    Args:
        mem: Exemplars, see ``mem_scope``; default 200, or what ``storage_policy`` holds. 0 is
            plain training, bit for bit. Paper: 10 to 2000 per experience.
        mem_scope: ``"experience"``: ``mem`` for every experience (paper). ``"total"``: in all.
        mode: ``"per_group"``: a mini-batch of current samples and as many from each past group.
            ``"balanced"``: one mini-batch in all, spread over current and past groups.
        group_by: ``"experience"``, ``"class"`` or ``"task"``.
        max_groups: In ``"per_group"`` mode, at most this many random past groups in each step.
        storage_policy: A memory of ours or of Avalanche's instead of ``mem`` and ``mem_scope``;
            it then decides the groups.

    Raises:
        ValueError: For a bad argument; before an experience is trained on that is empty, whose
            labels do not fit the head, or whose groups the memory cannot hold.

    References:
        Chen et al. (2020), Alg. 1.
    """

    label = "BER"
    by_group = True

    def __init__(
        self,
        mem: int | None = None,
        *,
        mem_scope: str = "experience",
        mode: str = "per_group",
        group_by: str = "experience",
        max_groups: int | None = None,
        storage_policy: ExemplarsBuffer | None = None,
    ) -> None:
        check_one_of("BERPlugin", "mode", mode, ("per_group", "balanced"))
        check_one_of("BERPlugin", "group_by", group_by, ("experience", "class", "task"))
        check_count("BERPlugin", max_groups=max_groups)
        if max_groups is not None and mode != "per_group":
            raise ValueError(
                f"BERPlugin expects max_groups in mode='per_group' only; got "
                f"max_groups={max_groups} in mode={mode!r}."
            )
        super().__init__(mem, mem_scope, group_by, storage_policy)
        self.mode = mode
        self.max_groups = max_groups

    def draw(self, strategy: Any, index: GroupIndex) -> Draw:
        """See ``ReplayTemplate``."""
        if self.mode == "per_group":
            return PerGroupDraw(strategy.train_mb_size, self.max_groups)
        names = {"class": "classes_in_this_experience", "task": "task_labels"}
        here = getattr(strategy.experience, names.get(self.group_by or "", ""), None)
        return BalancedDraw(strategy.train_mb_size, len(here) if here else 1)
