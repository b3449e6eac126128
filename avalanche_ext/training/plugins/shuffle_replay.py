"""Shuffle: the memory joins the new data, and the model trains on both as usual.

Reference:
    Chen, Ma, Wang, Ming, Massiah, Diethe (2020), Discriminative Representation Loss (DRL) for
    Continual Learning: A Solution for CLVision Challenge, Sec. 3.

Faithfulness:
    1. Every memorised sample is visited exactly once per epoch, as in the authors' code: an epoch
       has ``ceil((n + memory) / B)`` steps.
    2. ``mem`` counts per experience by default, as for ``BERPlugin``.

Cost: the mini-batch stays as it is; the epoch grows by the size of the memory.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.storage_policy import ExemplarsBuffer

from avalanche_ext.training.loading.sampling import Draw, GroupIndex, MergeDraw
from avalanche_ext.training.plugins.replay_template import ReplayTemplate

__all__ = ["ShuffleReplayPlugin"]


class ShuffleReplayPlugin(ReplayTemplate, supports_distributed=True):
    """Shuffle the memory into the current experience.

    Args:
        mem: Exemplars, see ``mem_scope``; default 200, or what ``storage_policy`` holds. 0 is
            plain training, bit for bit. Paper: 10 to 100 per experience.
        mem_scope: ``"experience"``: ``mem`` for every experience (paper). ``"total"``: in all.
        storage_policy: A memory of ours or of Avalanche's instead of ``mem`` and ``mem_scope``.

    Raises:
        ValueError: For a bad argument; before an experience is trained on that is empty or whose
            labels do not fit the head; together with a plugin that replaces the loader.

    References:
        Chen et al. (2020), Sec. 3.
    """

    label = "Shuffle"

    def __init__(
        self,
        mem: int | None = None,
        *,
        mem_scope: str = "experience",
        storage_policy: ExemplarsBuffer | None = None,
    ) -> None:
        super().__init__(mem, mem_scope, "experience", storage_policy)

    def draw(self, strategy: Any, index: GroupIndex) -> Draw:
        """See ``ReplayTemplate``."""
        return MergeDraw()
